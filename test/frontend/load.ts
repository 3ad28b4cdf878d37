/**
 * Load on a queue, by the native generator: one call keeps requests in flight for a while and returns what came of it. It
 * blocks the calling thread, which does nothing else meanwhile; the client's own cost is some ten nanoseconds a request.
 *
 * The typed face of native/loadgen.cc.
 */
import { createRequire } from 'node:module';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { SystemError } from '../../native/index.js';
import type { DriverQueue } from './driver-queue.js';
import type { Frontend } from './frontend.js';
import { DESCRIPTOR_BYTES, SECTOR_BYTES } from './protocol.js';

export interface LoadOptions {
  /** Requests in flight. Without indirect descriptors each takes three of the ring. */
  readonly depth: number;
  /** How long requests are started. */
  readonly seconds: number;
  /** Length of each request, a multiple of 512. Default 4096. */
  readonly blockBytes?: number;
  /** Part of the disk that is used, from its start. */
  readonly rangeBytes: number;
  /** 0 to 100; the others are writes. Default 100. */
  readonly readPercent?: number;
  readonly pattern?: 'random' | 'sequential';
  /** Ends earlier, after so many requests. */
  readonly requestsMax?: number;
  /** Sleep before each request but the first: what an idle disk makes of a request. Default 0. */
  readonly gapUs?: number;
  /** The device has hung when it answers nothing for so long. Default 10. */
  readonly stallSeconds?: number;
  readonly seed?: number;
  /** Lets others have the core while it waits: for tests, which share it. Default false. */
  readonly polite?: boolean;
}

/** Latencies are from making a request available to seeing its used entry. */
export interface LoadResult {
  readonly requests: number;
  /** Requests whose status was not OK. */
  readonly errors: number;
  readonly kicks: number;
  readonly elapsedUs: number;
  /** What the client itself spends on a request, without waiting; it bounds what can be measured. */
  readonly clientNsPerRequest: number;
  readonly meanUs: number;
  readonly p50Us: number;
  readonly p99Us: number;
  readonly p999Us: number;
  readonly maxUs: number;
  /** Requests per second. */
  readonly iops: number;
}

interface Generator {
  run(parameters: Record<string, number | boolean>): Omit<LoadResult, 'iops'> | number;
}

const CONTROL_BYTES = 128;
const PAGE_BYTES = 4096;
const SLOTS_PER_DIRECT_REQUEST = 3;
const ETIMEDOUT = 110;

function loadGenerator(): Generator {
  // Beside the addon under test, which is elsewhere when it is a special build.
  const override = process.env['STRATA_ADDON'];
  const folder =
    override === undefined || override === ''
      ? fileURLToPath(new URL('../../build/Release', import.meta.url))
      : dirname(override);
  const path = join(folder, 'strata_loadgen.node');
  if (!existsSync(path)) throw new Error(`${path} is not built: run \`npm run install\``);
  return createRequire(import.meta.url)(path) as Generator;
}

let generator: Generator | undefined;

/** Throws when the device hangs or answers what it was not asked. The queue has nothing in flight before and after. */
export function runLoad(frontend: Frontend, queue: DriverQueue, options: LoadOptions): LoadResult {
  const { depth, blockBytes = 4096, readPercent = 100 } = options;
  const blockCount = Math.floor(options.rangeBytes / blockBytes);
  if (queue.inflight > 0) throw new Error('the queue has requests in flight');
  if (depth < 1 || depth * (queue.indirect ? 1 : SLOTS_PER_DIRECT_REQUEST) > queue.size) {
    throw new Error(`a queue of ${queue.size} has no room for ${depth} requests`);
  }
  if (blockBytes % SECTOR_BYTES !== 0 || blockCount < 1) throw new Error(`blocks of ${blockBytes} bytes do not fit`);

  const { memory } = frontend;
  const poolBytes = Math.ceil((depth * CONTROL_BYTES) / PAGE_BYTES) * PAGE_BYTES + depth * blockBytes;
  const pool = memory.allocate(poolBytes, PAGE_BYTES);
  memory.bytes(pool, poolBytes).fill('the quick brown fox jumps over the lazy dog');
  generator ??= loadGenerator();
  const outcome = generator.run({
    descriptorsAddress: memory.absoluteAddress(queue.descriptors, DESCRIPTOR_BYTES * queue.size),
    availableAddress: memory.absoluteAddress(queue.available, 6 + 2 * queue.size),
    usedAddress: memory.absoluteAddress(queue.used, 6 + 8 * queue.size),
    poolAddress: memory.absoluteAddress(pool, poolBytes),
    poolGuestAddress: pool,
    queueSize: queue.size,
    depth,
    blockBytes,
    firstBlock: 0,
    blockCount,
    readPercent,
    sequential: options.pattern === 'sequential',
    eventIdx: queue.eventIdx,
    indirect: queue.indirect,
    polite: options.polite ?? false,
    kickFd: queue.kickFd,
    durationUs: options.seconds * 1e6,
    requestsMax: options.requestsMax ?? 0,
    gapUs: options.gapUs ?? 0,
    stallUs: (options.stallSeconds ?? 10) * 1e6,
    seed: options.seed ?? 1,
  });
  // After a failure the device may still write to the pool: it stays taken.
  if (typeof outcome === 'number') {
    throw new SystemError(
      -outcome,
      outcome === -ETIMEDOUT ? 'wait for the device to answer' : 'understand the used ring',
    );
  }
  memory.free(pool);
  queue.resume();
  return { ...outcome, iops: outcome.elapsedUs > 0 ? (outcome.requests / outcome.elapsedUs) * 1e6 : 0 };
}
