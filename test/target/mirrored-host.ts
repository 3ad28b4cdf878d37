/** A daemon with a disk in a raw file and an image to move it to, asked on its control socket, and a driver that knows what its disk holds. */
import { execFileSync } from 'node:child_process';
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { callRpc } from '../../src/target/rpc/rpc-client.js';
import type { DriverQueue, Request } from '../frontend/driver-queue.js';
import { Frontend } from '../frontend/frontend.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { seededRandom } from '../support/seed.js';
import { Program, STRATA, newFolder, runToEnd, until, writeConfig } from './programs.js';

export const MIB = 2 ** 20;
export const DISK_BYTES = 24 * MIB;
const BLOCK_BYTES = 4096;
const BLOCKS = DISK_BYTES / BLOCK_BYTES;
export const DEPTH = 8;
export const TIMEOUT_MS = 60_000;
const random = seededRandom(72);

export interface ConfigOptions {
  readonly bdev?: string;
  /** Lines of the image's bdevs. */
  readonly image?: string;
  readonly controller?: string;
  readonly more?: string;
}

export const IMAGE = `
  - {name: image-file, module: uring, path: image.qcow2}
  - {name: image, module: qcow2, base: image-file}`;

export const configText = ({
  bdev = 'raw',
  image = IMAGE,
  controller = '',
  more = 'state_dir: state',
}: ConfigOptions = {}): string => `
bdevs:
  - {name: raw, module: uring, path: raw.img, create: ${DISK_BYTES}}${image}
  - {name: memory, module: malloc, size: ${DISK_BYTES}}
controllers: [{name: vm, bdev: ${bdev}, socket: vm.sock, queues: 1${controller}}]
metrics: {listen: off}
log: {format: json}
rpc: {socket: control.sock}
${more}
`;

export class Host {
  readonly folder = newFolder();
  program!: Program;

  constructor() {
    this.qemuImg('create', '-q', '-f', 'qcow2', 'image.qcow2', String(DISK_BYTES));
  }

  async start(options?: ConfigOptions): Promise<void> {
    const config = writeConfig(this.folder, configText(options));
    this.program = await Program.serving(STRATA, ['serve', '--config', config], this.folder);
  }

  /** The problems of a start that fails. */
  refusal(options: ConfigOptions): string {
    const config = writeConfig(this.folder, configText(options));
    const ended = runToEnd(STRATA, ['serve', '--config', config], this.folder);
    expect(ended.exitCode).toBe(1);
    return ended.stderr;
  }

  async ask(method: string, params: Record<string, unknown> = {}): Promise<Record<string, unknown>> {
    const response = await callRpc(join(this.folder, 'control.sock'), method, params);
    if ('error' in response) throw new Error(response.error.message);
    return response.result as Record<string, unknown>;
  }

  connect(): Promise<Frontend> {
    return Frontend.connect(join(this.folder, 'vm.sock'), { timeoutMs: 20_000 });
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  get records(): string[] {
    return readdirSync(this.path('state')).filter((name) => name !== 'lock');
  }

  /** Last line of the log with this message. */
  said(message: string): Record<string, unknown> | undefined {
    return this.program.log.findLast((entry) => entry.message === message);
  }

  qemuImg(...args: string[]): void {
    execFileSync('qemu-img', args, { cwd: this.folder });
  }

  contents(file: string, format: string): Buffer {
    this.qemuImg('convert', '-f', format, '-O', 'raw', file, 'contents.raw');
    return readFileSync(this.path('contents.raw'));
  }
}

/** Keeps writes in flight, each block in one at a time, and knows what the disk holds. */
export class Writer {
  readonly model = Buffer.alloc(DISK_BYTES);
  readonly #queue: DriverQueue;
  #inflight: { readonly request: Request; readonly block: number; readonly stamp: number }[] = [];
  #stamp = 1;
  answers = 0;

  constructor(queue: DriverQueue) {
    this.#queue = queue;
  }

  get inflight(): number {
    return this.#inflight.length;
  }

  turn(depth: number): void {
    while (this.#queue.takeUsed() !== undefined);
    this.#inflight = this.#inflight.filter(({ request, block, stamp }) => {
      if (request.completion === undefined) return true;
      expect(request.completion.status).toBe(Status.ok);
      stamped(stamp).copy(this.model, block * BLOCK_BYTES);
      this.answers++;
      return false;
    });
    while (this.#inflight.length < depth) {
      const block = random.below(BLOCKS);
      if (this.#inflight.some((other) => other.block === block)) continue;
      const stamp = this.#stamp++;
      const spec = { type: RequestType.write, sector: (block * BLOCK_BYTES) / 512, out: stamped(stamp) };
      this.#inflight.push({ request: this.#queue.submit(spec)[0]!, block, stamp });
    }
  }
}

function stamped(stamp: number): Buffer {
  return Buffer.from(new Uint32Array(BLOCK_BYTES / 4).fill(stamp).buffer);
}

/** Goes on writing until the promise has settled. */
export async function writeDuring<T>(frontend: Frontend, writer: Writer, promise: Promise<T>): Promise<T> {
  let isSettled = false;
  const settle = (): void => void (isSettled = true);
  promise.then(settle, settle);
  await frontend.waiter.until('what is written during', () => {
    writer.turn(DEPTH);
    return isSettled || undefined;
  });
  return promise;
}

export async function stopWriting(frontend: Frontend, writer: Writer): Promise<void> {
  await frontend.waiter.until('an answer to everything', () => {
    writer.turn(0);
    return writer.inflight === 0 || undefined;
  });
}

export const mirrorState = (host: Host, state: string): Promise<Record<string, unknown>> =>
  until(`a mirror that is ${state}`, async () => {
    const info = await host.ask('controller_mirror_get', { name: 'vm' });
    if (info['state'] === 'failed' && state !== 'failed') throw new Error(String(info['error']));
    return info['state'] === state ? info : undefined;
  });

export async function expectDisk(frontend: Frontend, model: Buffer): Promise<void> {
  for (let at = 0; at < DISK_BYTES; at += MIB) {
    const { data, status } = await frontend.queue.read(at / 512, MIB);
    expect(status).toBe(Status.ok);
    expect(data.equals(model.subarray(at, at + MIB)), `the MiB at ${at}`).toBe(true);
  }
}
