/**
 * Goal: the latency histogram puts every duration into one bucket whose bounds hold it, and percentiles are right within a
 * bucket.
 *
 * Method: every bucket's bounds against the function that chooses buckets, and random durations against a sorted list.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BdevIo, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import {
  IO_STATS_LENGTH,
  IoCounter,
  IoStats,
  LATENCY_BUCKETS,
  bucketUpperUs,
  latencyBucket,
} from '../../src/bdev/io-stats.js';
import { seed } from '../support/seed.js';

const LARGEST_US = 2 ** 26;

/** Counts the end of a request that took `durationUs`. */
function end(
  stats: IoStats,
  type: IoType,
  durationUs: number,
  lengthBytes: number,
  status: IoStatus = IoStatus.success,
): void {
  const io = new BdevIo();
  io.prepare(type, 0, lengthBytes, 0);
  io.status = status;
  io.notes[io.depth] = 0;
  stats.ended(io, { nowUs: durationUs });
}

/** The bucket that a request of this duration is counted in. */
function bucketOf(durationUs: number): number {
  const stats = new IoStats();
  end(stats, IoType.read, durationUs, 0);
  for (let bucket = 0; bucket < LATENCY_BUCKETS; bucket++) if (stats.bucket(IoType.read, bucket) > 0) return bucket;
  return -1;
}

describe('a bucket', () => {
  it('ends where the next one begins, without gaps, up to the largest duration', () => {
    for (let bucket = 0; bucketUpperUs(bucket) < LARGEST_US; bucket++) {
      const upperUs = bucketUpperUs(bucket);
      expect(latencyBucket(upperUs - 1)).toBe(bucket);
      expect(bucketOf(upperUs - 0.001)).toBe(bucket);
      expect(latencyBucket(upperUs)).toBe(bucket + 1);
    }
  });

  it('is at most a quarter wider than its lower bound', () => {
    for (let bucket = 4; bucket + 1 < LATENCY_BUCKETS; bucket++) {
      const lowerUs = bucketUpperUs(bucket - 1);
      expect(bucketUpperUs(bucket) / lowerUs).toBeLessThanOrEqual(1.25);
    }
  });

  it('exists for every duration, also for none, negative and huge ones', () => {
    for (const us of [-1e9, -1, -0.5, 0, 0.5, LARGEST_US - 1, LARGEST_US, 1e12, Infinity]) {
      const bucket = bucketOf(us);
      expect(bucket).toBeGreaterThanOrEqual(0);
      expect(bucket).toBeLessThan(LATENCY_BUCKETS);
    }
    expect(bucketOf(-1)).toBe(0);
    expect(bucketOf(Infinity)).toBe(latencyBucket(LARGEST_US - 1));
  });
});

describe('percentiles', () => {
  it('lie in the bucket of the duration at that rank', () => {
    const durations = fc.array(fc.double({ min: 0, max: 1e8, noNaN: true }), { minLength: 1, maxLength: 200 });
    fc.assert(
      fc.property(durations, fc.double({ min: 0.001, max: 1, noNaN: true }), (durations, fraction) => {
        const stats = new IoStats();
        for (const us of durations) {
          stats.started();
          end(stats, IoType.read, us, 512);
        }
        const sorted = [...durations].sort((a, b) => a - b);
        const exact = sorted[Math.ceil(sorted.length * fraction) - 1]!;
        expect(stats.percentileUs(IoType.read, fraction)).toBe(bucketUpperUs(bucketOf(exact)));
      }),
      { seed },
    );
  });

  it('are not a number without any completion', () => {
    expect(new IoStats().percentileUs(IoType.read, 0.5)).toBeNaN();
  });
});

describe('counters', () => {
  it('keep types apart, and failures out of bytes and histogram', () => {
    const stats = new IoStats();
    for (let i = 0; i < 3; i++) stats.started();
    expect(stats.inflight).toBe(3);
    end(stats, IoType.write, 10, 4096);
    end(stats, IoType.write, 20, 4096, IoStatus.ioError);
    end(stats, IoType.flush, 30, 0);
    expect(stats.inflight).toBe(0);
    const { completed, bytes, timeUs, errors } = IoCounter;
    const of = (type: IoType): number[] => [completed, bytes, timeUs, errors].map((at) => stats.counter(type, at));
    expect(of(IoType.write)).toEqual([1, 4096, 30, 1]);
    expect(of(IoType.flush)).toEqual([1, 0, 30, 0]);
    expect(of(IoType.read)).toEqual([0, 0, 0, 0]);
  });

  it('are one array that another thread may look at', () => {
    const stats = new IoStats();
    expect(stats.values).toHaveLength(IO_STATS_LENGTH);
    expect(stats.values.buffer).toBeInstanceOf(SharedArrayBuffer);
    stats.started();
    expect(new IoStats(stats.values).inflight).toBe(1);
  });
});
