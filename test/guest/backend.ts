/**
 * Serves a file as a vhost-user-blk disk, by Strata's one-disk program.
 *
 * With STRATA_GUEST_BACKEND=qsd in the environment QEMU's storage daemon serves it instead: a test that fails on both
 * is at fault itself. The few assertions that do not hold there ask `isStrata`.
 */
import { closeSync, existsSync, ftruncateSync, openSync, statSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { callRpc } from '../../src/target/rpc/rpc-client.js';
import { Child, waitUntil, type ChildExit } from './child.js';

export interface DiskOptions {
  /** The file; the socket appears beside it, named `<path>.sock`. */
  readonly path: string;
  /** Makes the file, sparse and of this size; left out, the file must exist and is served as it is. */
  readonly sizeBytes?: number;
  readonly readOnly?: boolean;
  readonly serial?: string;
  readonly numQueues?: number;
  /** False: the disk says that it has no volatile cache. QEMU's storage daemon says so in any case. */
  readonly writeCache?: boolean;
  /** Default: `<path>.sock`. */
  readonly socketPath?: string;
  /** Keeps others from the file only while a guest's rings run. Strata only. */
  readonly lockWhileRunning?: boolean;
  /** Makes a control socket, named `<socketPath>.rpc`. Strata only. */
  readonly rpc?: boolean;
  /** The file is a qcow2 image, and what it names lies beside it. Strata only. */
  readonly isQcow2?: boolean;
  /** Time for which the answer of each write is held back. Strata only. */
  readonly writeDelayUs?: number;
}

const START_TIMEOUT_MS = 15_000;
const STOP_TIMEOUT_MS = 10_000;

const programPath = (name: string): string => fileURLToPath(new URL(`../../dist/src/target/${name}`, import.meta.url));
const PROGRAM = programPath('strata-vhost-user-blk.js');
/** What Strata logs when its socket listens. */
const SERVING = '"message":"serving"';

export const isStrata = selectedBackend() === 'strata';

function selectedBackend(): 'strata' | 'qsd' {
  const name = process.env['STRATA_GUEST_BACKEND'] ?? 'strata';
  if (name !== 'strata' && name !== 'qsd') throw new Error(`STRATA_GUEST_BACKEND is strata or qsd, not ${name}`);
  return name;
}

/**
 * Starts a daemon for one disk and waits until its socket listens.
 *
 * @throws Error with the daemon's output when it does not come up
 */
export async function startDisk(options: DiskOptions): Promise<Disk> {
  if (options.sizeBytes !== undefined) createSparseFile(options.path, options.sizeBytes);
  const disk = new Disk(options);
  await disk.start();
  return disk;
}

function startStrata(options: DiskOptions, socketPath: string): Child {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing. Build it with:\n  npm run build`);
  if (options.writeDelayUs !== undefined || options.isQcow2 === true) return startStack(options, socketPath);
  return new Child(process.execPath, [
    PROGRAM,
    `--socket-path=${socketPath}`,
    `--blk-file=${options.path}`,
    ...(options.readOnly === true ? ['--read-only'] : []),
    ...(options.serial === undefined ? [] : [`--serial=${options.serial}`]),
    ...(options.numQueues === undefined ? [] : [`--num-queues=${options.numQueues}`]),
    ...(options.writeCache === false ? ['--write-cache=off'] : []),
    ...(options.lockWhileRunning === true ? ['--lock=running'] : []),
    ...(options.rpc === true ? [`--rpc-socket=${socketPath}.rpc`] : []),
  ]);
}

/** The one-disk program serves plain files, so this disk is configured. */
function startStack(
  { path, numQueues = 1, writeDelayUs, isQcow2 = false, rpc = false }: DiskOptions,
  socketPath: string,
): Child {
  const bdevs: Record<string, unknown>[] = [{ name: 'file', module: 'uring', path }];
  const add = (name: string, options: object): void =>
    void bdevs.push({ name, base: bdevs.at(-1)!['name'], ...options });
  if (isQcow2) add('image', { module: 'qcow2', image_dir: dirname(path) });
  if (writeDelayUs !== undefined) add('delayed', { module: 'delay', write_us: writeDelayUs });
  const config = {
    bdevs,
    controllers: [{ name: 'disk', bdev: bdevs.at(-1)!['name'], socket: socketPath, queues: numQueues }],
    metrics: { listen: 'off' },
    ...(rpc ? { rpc: { socket: `${socketPath}.rpc` } } : {}),
  };
  // YAML holds JSON.
  writeFileSync(`${path}.yaml`, JSON.stringify(config));
  return new Child(process.execPath, [programPath('strata.js'), 'serve', '--config', `${path}.yaml`]);
}

function startQsd(options: DiskOptions, socketPath: string): Child {
  const writable = options.readOnly === true ? 'off' : 'on';
  return new Child('qemu-storage-daemon', [
    '--blockdev',
    `driver=file,node-name=disk,filename=${options.path},discard=unmap,read-only=${options.readOnly === true ? 'on' : 'off'}`,
    '--export',
    `type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=${socketPath},writable=${writable},` +
      `num-queues=${options.numQueues ?? 1}`,
  ]);
}

function createSparseFile(path: string, sizeBytes: number): void {
  const fd = openSync(path, 'wx');
  try {
    ftruncateSync(fd, sizeBytes);
  } finally {
    closeSync(fd);
  }
}

export class Disk implements AsyncDisposable {
  #child!: Child;
  readonly path: string;
  readonly socketPath: string;
  readonly #options: DiskOptions;
  /** Logs of daemons that were killed. */
  #pastLog = '';

  /** Use startDisk. */
  constructor(options: DiskOptions) {
    this.#options = options;
    this.path = options.path;
    this.socketPath = options.socketPath ?? `${options.path}.sock`;
  }

  /** Starts a daemon, when none runs. Throws Error with its output when it does not come up. */
  async start(): Promise<void> {
    const child = isStrata ? startStrata(this.#options, this.socketPath) : startQsd(this.#options, this.socketPath);
    this.#child = child;
    // A socket may be left of a daemon that was killed.
    const isUp = (): boolean => (isStrata ? child.stderr.includes(SERVING) : existsSync(this.socketPath));
    await waitUntil(() => isUp() || !child.running, START_TIMEOUT_MS);
    if (child.running && isUp()) return;
    await this.stop();
    throw new Error(`The disk ${this.path} did not come up:\n${this.log}`);
  }

  /** Kills the daemon by SIGKILL and starts another on the same file and socket. */
  async restart(): Promise<void> {
    await this.kill('SIGKILL');
    this.#pastLog += this.log;
    await this.start();
  }

  /** Requests that daemons found in flight when they were started. */
  get resubmitted(): number {
    const counts = (this.#pastLog + this.log).matchAll(/"resubmitted":(\d+)/g);
    return [...counts].reduce((sum, [, count]) => sum + Number(count), 0);
  }

  /** Asks the daemon by its control socket. Throws Error when it says no. */
  async rpc(method: string, params: Record<string, unknown> = {}): Promise<unknown> {
    const response = await callRpc(`${this.socketPath}.rpc`, method, params);
    if ('error' in response) throw new Error(response.error.message);
    return response.result;
  }

  get pid(): number {
    return this.#child.pid;
  }

  get running(): boolean {
    return this.#child.running;
  }

  /** The daemon's output. */
  get log(): string {
    return this.#child.stdout + this.#child.stderr;
  }

  /** Space the file takes on the host. */
  get allocatedBytes(): number {
    return statSync(this.path).blocks * 512;
  }

  /** Sends a signal to the daemon and waits until it is gone. */
  async kill(signal: NodeJS.Signals): Promise<ChildExit> {
    this.#child.kill(signal);
    return this.#child.exited;
  }

  /** Ends the daemon by SIGTERM, after a while by SIGKILL. */
  async stop(): Promise<ChildExit> {
    return this.#child.stop(STOP_TIMEOUT_MS);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}
