/** Load of the soak on an attached front-end: every kind of request, in every framing, verified as it goes. */
import type { Random } from '../../src/poller/clock.js';
import type { DriverQueue, RequestSpec } from '../frontend/driver-queue.js';
import { encodeRanges } from '../frontend/driver-queue.js';
import type { Region } from '../frontend/guest-memory.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { BLOCK_BYTES, ZEROES } from './stamped-disk.js';
import type { StampedDisk } from './stamped-disk.js';

const SECTORS_PER_BLOCK = BLOCK_BYTES / 512;
const BLOCKS_MAX = 8;

/** A request, and what to tell the disk's record when it has ended, or was cut off. */
interface Operation {
  readonly spec: RequestSpec;
  completed(data: Buffer): void;
  abandoned(): void;
}

/** Counts over the whole soak. */
export interface LoadCounters {
  requests: number;
}

/** Runs `count` requests on a queue, `depth` at a time. Throws Corruption, and Error on a failed request. */
export async function runVerified(
  queue: DriverQueue,
  disk: StampedDisk,
  random: Random,
  counters: LoadCounters,
  options: { readonly count: number; readonly depth: number; readonly region?: Region },
): Promise<void> {
  let left = options.count;
  const worker = async (): Promise<void> => {
    while (left-- > 0) {
      const operation = nextOperation(disk, random, options.region);
      const { status, data } = await queue.run(operation.spec);
      if (status !== Status.ok) throw new Error(`request of type ${operation.spec.type} failed with status ${status}`);
      operation.completed(data);
      counters.requests++;
    }
  };
  await Promise.all(Array.from({ length: options.depth }, worker));
}

/** Submits requests and leaves them: the caller breaks the connection. */
export function submitAndAbandon(queue: DriverQueue, disk: StampedDisk, random: Random, count: number): void {
  const operations = Array.from({ length: count }, () => nextOperation(disk, random));
  queue.submit(...operations.map((operation) => operation.spec));
  for (const operation of operations) operation.abandoned();
}

function nextOperation(disk: StampedDisk, random: Random, region?: Region): Operation {
  const kind = random.below(100);
  if (kind < 2) return { spec: { type: RequestType.flush }, completed: () => undefined, abandoned: () => undefined };
  const count = 1 + random.below(BLOCKS_MAX);
  const first = disk.take(count);
  const place = { sector: first * SECTORS_PER_BLOCK, ...framing(random), ...(region !== undefined && { region }) };
  if (kind < 45) {
    return {
      spec: { type: RequestType.read, inBytes: count * BLOCK_BYTES, ...place },
      completed: (data) => disk.read(first, data),
      abandoned: () => disk.untouched(first, count),
    };
  }
  if (kind < 94) {
    const { sequence, data } = disk.stamp(first, count);
    return {
      spec: { type: RequestType.write, out: data, ...place },
      completed: () => disk.wrote(first, count, sequence),
      abandoned: () => disk.mayHaveWritten(first, count, sequence),
    };
  }
  const range = { sector: place.sector, sectors: count * SECTORS_PER_BLOCK };
  if (kind < 97) {
    const out = encodeRanges([{ ...range, unmap: random.below(2) === 0 }]);
    return {
      spec: { type: RequestType.writeZeroes, out },
      completed: () => disk.wrote(first, count, ZEROES),
      abandoned: () => disk.mayHaveWritten(first, count, ZEROES),
    };
  }
  return {
    spec: { type: RequestType.discard, out: encodeRanges([range]) },
    // What is discarded may read as anything; here it is the old content or zeroes.
    completed: () => disk.mayHaveWritten(first, count, ZEROES),
    abandoned: () => disk.mayHaveWritten(first, count, ZEROES),
  };
}

/** As Linux does it, mostly; sometimes from memory no device likes, or without a table. */
function framing(random: Random): Pick<RequestSpec, 'shiftBytes' | 'indirectFrom'> {
  switch (random.below(8)) {
    case 0:
      return { shiftBytes: 1 + random.below(600) };
    case 1:
      return { indirectFrom: Infinity };
    default:
      return {};
  }
}
