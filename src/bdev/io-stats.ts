/**
 * Counters and latency histograms of one bdev on one reactor: one typed array, written by the reactor and, being in shared memory,
 * read by any other thread at any time. Each counter is one aligned double, so a reader never sees half of one.
 *
 * Histogram: buckets grow by a quarter of an octave of the microsecond count (error at most 25 %):
 * 0, 1, 2, 3 us have their own bucket, then four buckets per power of two, up to 2^26 us.
 */
import { IO_TYPE_COUNT, IoStatus } from './bdev-io.js';
import type { BdevIo, IoType } from './bdev-io.js';

export const LATENCY_BUCKETS = 104;

/** Where the last bucket ends: longer is counted as this. */
const LONGEST_US = 2 ** 26 - 1;

/** Counters of one request type, in this order. */
export const IoCounter = { completed: 0, bytes: 1, timeUs: 2, errors: 3 } as const;
const COUNTERS = 4;
const HISTOGRAMS_AT = IO_TYPE_COUNT * COUNTERS;
const INFLIGHT_AT = HISTOGRAMS_AT + IO_TYPE_COUNT * LATENCY_BUCKETS;
/** Length of the array of an IoStats. */
export const IO_STATS_LENGTH = INFLIGHT_AT + 1;

export class IoStats {
  readonly values: Float64Array;

  /** @param values an array of IO_STATS_LENGTH to look at, as received from another thread */
  constructor(values?: Float64Array) {
    this.values = values ?? new Float64Array(new SharedArrayBuffer(IO_STATS_LENGTH * 8));
  }

  started(): void {
    this.values[INFLIGHT_AT]!++;
  }

  /**
   * A request is over that was started at `io.notes[io.depth]`, as its status says.
   * @param clock whose `nowUs` is the time; durations and lengths are no arguments, as they would be boxed
   */
  ended(io: BdevIo, clock: { readonly nowUs: number }): void {
    const values = this.values;
    const { type } = io;
    const at = type * COUNTERS;
    const durationUs = clock.nowUs - io.notes[io.depth]!;
    values[INFLIGHT_AT]!--;
    values[at + IoCounter.timeUs]! += durationUs;
    if (io.status !== IoStatus.success) {
      values[at + IoCounter.errors]!++;
      return;
    }
    values[at + IoCounter.completed]!++;
    values[at + IoCounter.bytes]! += io.lengthBytes;
    values[
      HISTOGRAMS_AT + type * LATENCY_BUCKETS + latencyBucket(durationUs >= LONGEST_US ? LONGEST_US : durationUs | 0)
    ]!++;
  }

  get inflight(): number {
    return this.values[INFLIGHT_AT]!;
  }

  counter(type: IoType, counter: (typeof IoCounter)[keyof typeof IoCounter]): number {
    return this.values[type * COUNTERS + counter]!;
  }

  /** Count of completions in one bucket of one type's histogram. */
  bucket(type: IoType, bucket: number): number {
    return this.values[HISTOGRAMS_AT + type * LATENCY_BUCKETS + bucket]!;
  }

  /** Latency below which `fraction` of the type's completions lie, in microseconds; NaN without any. */
  percentileUs(type: IoType, fraction: number): number {
    let total = 0;
    for (let b = 0; b < LATENCY_BUCKETS; b++) total += this.bucket(type, b);
    if (total === 0) return NaN;
    let seen = 0;
    for (let b = 0; b < LATENCY_BUCKETS; b++) {
      seen += this.bucket(type, b);
      if (seen >= total * fraction) return bucketUpperUs(b);
    }
    return bucketUpperUs(LATENCY_BUCKETS - 1);
  }
}

/** @param us whole microseconds, at most LONGEST_US */
export function latencyBucket(us: number): number {
  if (us < 4) return us < 0 ? 0 : us;
  const octave = 31 - Math.clz32(us);
  return octave * 4 - 4 + ((us >>> (octave - 2)) & 3);
}

/** Exclusive upper bound of a bucket in microseconds. */
export function bucketUpperUs(bucket: number): number {
  if (bucket < 4) return bucket + 1;
  const octave = (bucket >>> 2) + 1;
  return 2 ** (octave - 2) * ((bucket & 3) + 5);
}
