/**
 * Goal: a daemon may be killed at any moment and started again under a running guest: every request is answered exactly once, with
 * the data it should have, and none is stuck; also when answers come far out of order.
 *
 * Method: the compiled daemon on a real file, writes held back so that reads overtake them, or all held back at random; a driver that
 * keeps sixteen requests in flight on each of two queues and its rings and in-flight region over every kill -9, as QEMU does.
 * Blocks are stamped with what was written last, and a block is in one request at a time, so that each read has one right answer.
 */
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import type { FrontendOptions } from '../frontend/frontend.js';
import type { DriverQueue, Request } from '../frontend/driver-queue.js';
import { ConfigAt, RequestType, Status } from '../frontend/protocol.js';
import { seededRandom } from '../support/seed.js';
import { Program, STRATA, newFolder, writeConfig } from './programs.js';

const KILLS = 6;
const QUEUES = 2;
const DEPTH = 16;
const BLOCK_BYTES = 4096;
const BLOCKS = 256;
/** Answers between two kills, at most. */
const ANSWERS_MAX = 150;
const WAIT_MS = 30_000;
const TIMEOUT_MS = 180_000;

const configText = (delay: string): string => `
bdevs:
  - {name: file, module: uring, path: disk.img, create: 16MiB}
  - {name: disk, module: delay, base: file, ${delay}}
controllers: [{name: vm, bdev: disk, socket: vm.sock, queues: ${QUEUES}}]
metrics: {listen: off}
`;

type Random = ReturnType<typeof seededRandom>;

interface Task {
  readonly request: Request;
  readonly block: number;
  /** What the block holds when the request is done. */
  readonly stamp: number;
}

/** Keeps requests in flight on one queue, in blocks of its own. */
class Load {
  answers = 0;
  readonly #queue: DriverQueue;
  readonly #first: number;
  readonly #random: Random;
  readonly #stamps = new Uint32Array(BLOCKS);
  readonly #busy = new Set<number>();
  #tasks: Task[] = [];
  #nextStamp = 1;

  constructor(queue: DriverQueue, random: Random) {
    this.#queue = queue;
    this.#first = queue.index * BLOCKS;
    this.#random = random;
  }

  /** Takes answers and starts as many requests anew. */
  turn(depth: number): void {
    while (this.#queue.takeUsed() !== undefined);
    this.#tasks = this.#tasks.filter((task) => !this.#finish(task));
    while (this.#tasks.length < depth) this.#start();
  }

  get inflight(): number {
    return this.#tasks.length;
  }

  /** Reads every block. */
  async readAll(): Promise<void> {
    for (let block = 0; block < BLOCKS; block++) {
      const { data } = await this.#queue.read(((this.#first + block) * BLOCK_BYTES) / 512, BLOCK_BYTES);
      expect(data.equals(stamped(this.#stamps[block]!)), `block ${block} at the end`).toBe(true);
    }
  }

  #start(): void {
    const random = this.#random;
    let block = random.below(BLOCKS);
    while (this.#busy.has(block)) block = (block + 1) % BLOCKS;
    this.#busy.add(block);
    const isWrite = random.below(2) === 0;
    const stamp = isWrite ? this.#nextStamp++ : this.#stamps[block]!;
    const sector = ((this.#first + block) * BLOCK_BYTES) / 512;
    const spec = isWrite
      ? { type: RequestType.write, sector, out: stamped(stamp) }
      : { type: RequestType.read, sector, inBytes: BLOCK_BYTES };
    this.#tasks.push({ request: this.#queue.submit(spec)[0]!, block, stamp });
  }

  #finish({ request, block, stamp }: Task): boolean {
    const { completion, spec } = request;
    if (completion === undefined) return false;
    expect(completion.status).toBe(Status.ok);
    if (spec.type === RequestType.read) {
      expect(completion.usedBytes).toBe(BLOCK_BYTES + 1);
      expect(completion.data.equals(stamped(stamp)), `block ${block} holds stamp ${stamp}`).toBe(true);
    }
    this.#stamps[block] = stamp;
    this.#busy.delete(block);
    this.answers++;
    return true;
  }
}

/** Requests that the daemon found in flight when it started. */
function resubmissions(program: Program): number {
  return program.log.reduce((sum, entry) => sum + Number(entry['resubmitted'] ?? 0), 0);
}

/** A block full of one number; blocks never written hold 0. */
function stamped(stamp: number): Buffer {
  return Buffer.from(new Uint32Array(BLOCK_BYTES / 4).fill(stamp).buffer);
}

const kinds: readonly { readonly kind: string; readonly options: FrontendOptions }[] = [
  { kind: 'split', options: {} },
  { kind: 'packed', options: { packed: true } },
];

/** With the cache mode that a guest chose. */
async function killedWith(writeback: number, writeCache: boolean): Promise<number> {
  const folder = newFolder();
  const disk = `{name: vm, bdev: d, socket: vm.sock, write_cache: ${writeCache}}`;
  const config = writeConfig(
    folder,
    `bdevs: [{name: d, module: malloc, size: 1MiB}]\ncontrollers: [${disk}]\nmetrics: {listen: off}\n`,
  );
  const start = (): Promise<Program> => Program.serving(STRATA, ['serve', '--config', config], folder);
  let program = await start();
  const frontend = await Frontend.connect(join(folder, 'vm.sock'), { timeoutMs: WAIT_MS });
  await frontend.setConfig(ConfigAt.writeback, Buffer.of(writeback));
  await program.kill();
  program = await start();
  await frontend.reconnect();
  const kept = (await frontend.blkConfig()).writeback;
  frontend.close();
  await program.stop();
  return kept;
}

describe('a daemon that is killed and started again', () => {
  it.each([
    [0, true],
    [1, false],
  ])('goes on with the cache mode that the guest chose: writeback %i', async (writeback, writeCache) => {
    expect(await killedWith(writeback, writeCache)).toBe(writeback);
  });
});

describe.each(kinds)(
  'a daemon with $kind rings is killed and started again, and every request is answered once',
  ({ options }) => {
    async function killUnderLoad(delay: string, random: Random): Promise<number> {
      const folder = newFolder();
      const config = writeConfig(folder, configText(delay));
      const start = (): Promise<Program> => Program.serving(STRATA, ['serve', '--config', config], folder);
      let program = await start();
      const limits = { queues: QUEUES, timeoutMs: WAIT_MS };
      const frontend = await Frontend.connect(join(folder, 'vm.sock'), { ...limits, ...options });
      const loads = frontend.queues.map((queue) => new Load(queue, random));
      const answers = (): number => loads.reduce((sum, load) => sum + load.answers, 0);
      let resubmitted = 0;
      try {
        for (let kill = 0; kill < KILLS; kill++) {
          const enough = answers() + random.below(ANSWERS_MAX);
          await frontend.waiter.until(`answers before kill ${kill + 1}`, () => {
            for (const load of loads) load.turn(DEPTH);
            return answers() >= enough || undefined;
          });
          await program.kill();
          resubmitted += resubmissions(program);
          // What was answered at the last moment is seen while nobody serves, and more is asked for.
          for (const load of loads) load.turn(DEPTH);
          program = await start();
          await frontend.reconnect();
        }
        await frontend.waiter.until('an answer to everything', () => {
          for (const load of loads) load.turn(0);
          return loads.every((load) => load.inflight === 0) || undefined;
        });
        for (const load of loads) await load.readAll();
      } finally {
        frontend.close();
      }
      expect((await program.stop()).exitCode).toBe(0);
      return resubmitted + resubmissions(program);
    }

    it.each([
      ['reads overtake writes', 'write_us: 4000', 1],
      ['answers come in any order', 'write_us: 200, jitter_us: 5000', 2],
    ])(
      '%s',
      async (_what, delay, salt) => {
        expect(await killUnderLoad(delay, seededRandom(salt))).toBeGreaterThan(KILLS);
      },
      TIMEOUT_MS,
    );
  },
);
