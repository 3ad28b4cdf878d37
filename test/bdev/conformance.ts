/**
 * Goal: every bdev, alone or in a stack, is the same disk: it keeps what is written, whatever the shape of the request; it takes
 * everything that is legal and refuses what is not; it completes each request once; and it counts exactly.
 *
 * Method: `conformance` runs one suite against a disk on a real reactor and ring, with an in-memory model to compare with.
 */
import assert from 'node:assert/strict';
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { IO_TYPE_COUNT, IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import { IoCounter, LATENCY_BUCKETS } from '../../src/bdev/io-stats.js';
import { cut, expectBytes, fresh } from '../support/bytes.js';
import { Disk, flat } from '../support/disk.js';
import type { Layout, Request } from '../support/disk.js';
import { Rig } from '../support/rig.js';
import { seed } from '../support/seed.js';
import type { Ring } from '../../src/poller/ring.js';
import type { Stack } from './stacks.js';

const EINVAL = 22;
const RANDOM_RUNS = 25;
/** Random mixes work on the last part of the disk; the rest must stay as it is. */
const WINDOW_BYTES = 512 * 1024;
const PIECES_MAX = 200;

export interface ConformanceOptions {
  /** False for a disk that reads zeroes whatever was written. */
  readonly keepsData?: boolean;
  /** Makes the ring to run on, over the shared arena. */
  readonly makeRing?: () => Ring;
}

export function conformance(name: string, makeStack: () => Stack, options: ConformanceOptions = {}): void {
  const { keepsData = true, makeRing } = options;
  describe(name, () => {
    let disk: Disk;
    let stack: Stack;

    beforeAll(() => {
      stack = makeStack();
      disk = new Disk(new Rig(name, makeRing?.()), stack.configs);
    });

    afterEach(() => {
      expect(disk.open.stats.inflight).toBe(0);
      disk.forget();
    });

    afterAll(() => {
      try {
        disk.close();
      } finally {
        stack.release();
      }
    });

    const expectRead = (offsetBytes: number, expected: Buffer, layout?: Layout): void => {
      const actual = disk.read(offsetBytes, expected.length, layout);
      expectBytes(actual, keepsData ? expected : Buffer.alloc(expected.length), `read at ${offsetBytes}`);
    };

    it('keeps its first and its last block', () => {
      const first = fresh(disk.blockBytes);
      const last = fresh(disk.blockBytes);
      disk.write(0, first);
      disk.write(disk.sizeBytes - disk.blockBytes, last);
      expectRead(0, first);
      expectRead(disk.sizeBytes - disk.blockBytes, last);
    });

    it('takes data in many segments, of any length and at any address', () => {
      for (let count = 1; count <= PIECES_MAX; count = Math.ceil(count * 1.7)) {
        for (const unit of [1, 4, 512, 4096]) {
          disk.forget();
          const lengthBytes = disk.blockBytes * Math.ceil((count * unit) / disk.blockBytes + 3);
          const data = fresh(lengthBytes);
          disk.write(disk.blockBytes, data, 0, cut(lengthBytes, count, unit));
          expectRead(disk.blockBytes, data, cut(lengthBytes, count, unit));
        }
      }
    });

    it('takes memory that is misaligned by every small amount', () => {
      const data = fresh(3 * disk.blockBytes);
      for (const gap of [1, 2, 3, 4, 8, 16, 511, 513]) {
        disk.write(0, data, 0, { lengths: [data.length], gaps: [gap] });
        expectRead(0, data, { lengths: [data.length], gaps: [gap + 1] });
      }
    });

    it('moves more than 16 MiB by one request', () => {
      const data = fresh(17 * 2 ** 20 + disk.blockBytes);
      disk.write(disk.blockBytes, data, 0, cut(data.length, 37, 512));
      disk.forget();
      expectRead(disk.blockBytes, data, cut(data.length, 3, 1));
    });

    it('zeroes a range and nothing beside it, with and without deallocation', () => {
      const block = disk.blockBytes;
      const data = fresh(64 * block);
      for (const flags of [0, IoFlag.unmap, IoFlag.fua, IoFlag.unmap | IoFlag.fua]) {
        disk.write(0, data);
        expect(disk.run(IoType.writeZeroes, 5 * block, 33 * block, flags)).toBe(IoStatus.success);
        const expected = Buffer.from(data).fill(0, 5 * block, 38 * block);
        expectRead(0, expected);
      }
    });

    it('zeroes the whole disk by one request', () => {
      disk.write(disk.sizeBytes / 2, fresh(disk.blockBytes));
      expect(disk.run(IoType.writeZeroes, 0, disk.sizeBytes, IoFlag.unmap)).toBe(IoStatus.success);
      for (let at = 0; at < disk.sizeBytes; at += 4 * 2 ** 20) {
        disk.forget();
        expectRead(at, Buffer.alloc(4 * 2 ** 20));
      }
    });

    it('discards a range and nothing beside it, or says that it cannot', () => {
      const block = disk.blockBytes;
      const data = fresh(64 * block);
      disk.write(0, data);
      const status = disk.run(IoType.discard, 16 * block, 32 * block);
      const supported = disk.open.bdev.supports(IoType.discard);
      expect(status).toBe(supported ? IoStatus.success : IoStatus.notSupported);
      expectRead(0, data.subarray(0, 16 * block));
      expectRead(48 * block, data.subarray(48 * block));
      if (!supported) expectRead(16 * block, data.subarray(16 * block, 48 * block));
    });

    it('flushes, and writes with forced unit access', () => {
      const data = fresh(40 * disk.blockBytes);
      disk.write(0, data, IoFlag.fua, cut(data.length, 9, 1));
      expect(disk.run(IoType.flush)).toBe(IoStatus.success);
      expectRead(0, data);
    });

    it('refuses what lies beyond its end, and changes nothing', () => {
      const block = disk.blockBytes;
      const last = fresh(block);
      disk.write(disk.sizeBytes - block, last);
      const ranges = [
        [disk.sizeBytes, block],
        [disk.sizeBytes - block, 2 * block],
        [disk.sizeBytes + 2 ** 32, block],
        [2 ** 52, block],
        [0, disk.sizeBytes + block],
      ] as const;
      for (const type of [IoType.read, IoType.write, IoType.discard, IoType.writeZeroes]) {
        for (const [offsetBytes, lengthBytes] of ranges) {
          disk.forget();
          const request = disk.start(type, offsetBytes, lengthBytes);
          disk.finish(request);
          expect([request.status, request.errno], `type ${type} at ${offsetBytes}`).toEqual([IoStatus.ioError, EINVAL]);
        }
      }
      expectRead(disk.sizeBytes - block, last);
    });

    it('refuses what is not in whole blocks', () => {
      const block = disk.blockBytes;
      const ranges = [
        [1, block],
        [block / 2, block],
        [0, block + 1],
        [0, block / 2],
        [block, block * 1.5],
      ] as const;
      for (const type of [IoType.read, IoType.write, IoType.discard, IoType.writeZeroes]) {
        for (const [offsetBytes, lengthBytes] of ranges) {
          const request = disk.start(type, offsetBytes, lengthBytes);
          disk.finish(request);
          expect([request.status, request.errno], `type ${type} at ${offsetBytes}`).toEqual([IoStatus.ioError, EINVAL]);
        }
      }
    });

    it('takes requests of no length and does nothing', () => {
      const data = fresh(disk.blockBytes);
      disk.write(0, data);
      for (const type of [IoType.read, IoType.write, IoType.writeZeroes]) {
        expect(disk.run(type, 0, 0)).toBe(IoStatus.success);
        expect(disk.run(type, disk.sizeBytes, 0)).toBe(IoStatus.success);
      }
      expectRead(0, data);
    });

    it('keeps each block of overlapping writes whole', () => {
      const block = disk.blockBytes;
      const old = fresh(64 * block);
      disk.write(0, old);
      const writes = Array.from({ length: 12 }, (_, i) => {
        const start = (i * 7) % 40;
        const data = fresh((4 + ((i * 5) % 20)) * block);
        return { start, data, end: start + data.length / block, request: disk.startWrite(start * block, data) };
      });
      const reads = [0, 10, 20].map((start) => disk.start(IoType.read, start * block, 30 * block));
      const requests = [...writes.map((write) => write.request), ...reads];
      disk.finish(...requests);
      for (const request of requests) expect(request.status).toBe(IoStatus.success);
      if (!keepsData) return;
      const after = disk.read(0, old.length);
      for (let at = 0; at < 64; at++) {
        const covering = writes.filter((write) => write.start <= at && at < write.end);
        const legal = covering.map(({ start, data }) => data.subarray((at - start) * block, (at - start + 1) * block));
        if (legal.length === 0) legal.push(old.subarray(at * block, (at + 1) * block));
        const actual = after.subarray(at * block, (at + 1) * block);
        assert.ok(
          legal.some((bytes) => bytes.equals(actual)),
          `block ${at} holds what nobody wrote`,
        );
      }
    });

    it('takes more requests at once than anything below has room for', () => {
      const block = disk.blockBytes;
      const count = 1500;
      const data = fresh(count * block);
      const writes = Array.from({ length: count }, (_, i) =>
        disk.startWrite(i * block, data.subarray(i * block, (i + 1) * block)),
      );
      disk.finish(...writes);
      for (const write of writes) expect(write.status).toBe(IoStatus.success);
      disk.forget();
      expectRead(0, data);
    });

    it('resets: everything in flight comes back, then the reset, and the disk goes on', () => {
      const block = disk.blockBytes;
      const data = fresh(64 * block);
      const requests: Request[] = [];
      for (let i = 0; i < 40; i++) {
        requests.push(disk.startWrite(64 * block * i, data, i % 5 === 0 ? IoFlag.fua : 0, cut(data.length, 7, 1)));
        requests.push(disk.start(IoType.read, 64 * block * i, 64 * block));
      }
      requests.push(disk.start(IoType.flush, 0, 0));
      requests.push(disk.start(IoType.writeZeroes, 0, 2 ** 20));
      const reset = disk.prepare(IoType.reset, 0, 0);
      let unfinished = -1;
      reset.then = () => (unfinished = requests.filter((request) => request.completions === 0).length);
      disk.submit(reset);
      disk.finish(reset, ...requests);
      expect(reset.status).toBe(IoStatus.success);
      expect(unfinished).toBe(0);
      for (const request of requests) expect([IoStatus.success, IoStatus.aborted]).toContain(request.status);
      disk.forget();
      disk.write(0, data);
      expectRead(0, data);
    });

    it('counts operations, bytes, errors and latencies exactly', () => {
      const block = disk.blockBytes;
      const { stats } = disk.open;
      const before = Float64Array.from(stats.values);
      const canDiscard = disk.open.bdev.supports(IoType.discard);
      const requests = [
        ...[1, 2, 300].map((blocks) => disk.start(IoType.read, 0, blocks * block)),
        ...[1, 4].map((blocks) => disk.start(IoType.write, 400 * block, blocks * block, IoFlag.fua)),
        disk.start(IoType.flush, 0, 0),
        disk.start(IoType.discard, 500 * block, 9 * block),
        disk.start(IoType.writeZeroes, 600 * block, 256 * block),
        disk.start(IoType.read, disk.sizeBytes, block),
        disk.start(IoType.write, 1, block),
      ];
      expect(stats.inflight).toBe(requests.filter((request) => request.completions === 0).length);
      disk.finish(...requests);
      expect(stats.inflight).toBe(0);
      const delta = (type: IoType): number[] =>
        [IoCounter.completed, IoCounter.bytes, IoCounter.errors].map(
          (counter) => stats.counter(type, counter) - before[type * 4 + counter]!,
        );
      expect(delta(IoType.read)).toEqual([3, 303 * block, 1]);
      expect(delta(IoType.write)).toEqual([2, 5 * block, 1]);
      expect(delta(IoType.flush)).toEqual([1, 0, 0]);
      expect(delta(IoType.discard)).toEqual(canDiscard ? [1, 9 * block, 0] : [0, 0, 1]);
      expect(delta(IoType.writeZeroes)).toEqual([1, 256 * block, 0]);
      expect(delta(IoType.reset)).toEqual([0, 0, 0]);
    });

    it('agrees with a model in random mixes', () => {
      disk.write(0, fresh(disk.blockBytes * 8));
      const outside = [0, disk.sizeBytes - WINDOW_BYTES - 2 ** 20].map((at) => ({ at, bytes: disk.read(at, 2 ** 20) }));
      fc.assert(
        fc.property(fc.array(fc.array(operation, { maxLength: 8 }), { maxLength: 10 }), (batches) => {
          new Mix(disk, keepsData).run(batches);
        }),
        { seed, numRuns: RANDOM_RUNS, endOnFailure: process.env['STRATA_SHRINK'] === undefined },
      );
      disk.forget();
      for (const { at, bytes } of outside) expectRead(at, bytes);
    });

    it('has counted each completion in a histogram', () => {
      const { stats } = disk.open;
      for (let type = 0 as IoType; type < IO_TYPE_COUNT; type++) {
        let sum = 0;
        for (let bucket = 0; bucket < LATENCY_BUCKETS; bucket++) sum += stats.bucket(type, bucket);
        expect(sum).toBe(stats.counter(type, IoCounter.completed));
      }
      expect(stats.counter(IoType.read, IoCounter.completed)).toBeGreaterThan(0);
    });
  });
}

interface Operation {
  readonly type: IoType;
  /** Place and length in fractions of what there is. */
  readonly at: number;
  readonly blocks: number;
  readonly pieces: number;
  readonly unit: number;
  readonly flags: number;
}

const operation = fc.record({
  type: fc.constantFrom(
    IoType.read,
    IoType.read,
    IoType.write,
    IoType.write,
    IoType.write,
    IoType.flush,
    IoType.discard,
    IoType.writeZeroes,
  ),
  at: fc.nat(WINDOW_BYTES - 1),
  blocks: fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 300 })),
  pieces: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 40 })),
  unit: fc.constantFrom(1, 2, 512, 4096),
  flags: fc.constantFrom(0, 0, 0, IoFlag.fua, IoFlag.unmap, IoFlag.fua | IoFlag.unmap),
});

/** A range of a batch in flight, [start, end) in bytes of the disk. */
interface Busy {
  readonly start: number;
  readonly end: number;
  readonly changes: boolean;
}

/** One run of random batches. Within a batch all is in flight at once, on ranges that do not disturb each other. */
class Mix {
  readonly #disk: Disk;
  readonly #keepsData: boolean;
  readonly #start: number;
  readonly #model = Buffer.alloc(WINDOW_BYTES);
  #busy: Busy[] = [];
  #checks: (() => void)[] = [];

  constructor(disk: Disk, keepsData: boolean) {
    this.#disk = disk;
    this.#keepsData = keepsData;
    this.#start = disk.sizeBytes - WINDOW_BYTES;
  }

  run(batches: readonly (readonly Operation[])[]): void {
    this.#disk.forget();
    assert.equal(this.#disk.run(IoType.writeZeroes, this.#start, WINDOW_BYTES), IoStatus.success);
    for (const batch of batches) {
      this.#disk.forget();
      this.#busy = [];
      this.#checks = [];
      const requests = batch.flatMap((operation) => this.#begin(operation));
      this.#disk.finish(...requests);
      for (const check of this.#checks) check();
    }
    this.#disk.forget();
    this.#expect(this.#disk.read(this.#start, WINDOW_BYTES), 0, 'window');
  }

  #expect(actual: Buffer, at: number, what: string): void {
    const expected = this.#model.subarray(at, at + actual.length);
    expectBytes(actual, this.#keepsData ? expected : Buffer.alloc(actual.length), `${what} at ${at}`);
  }

  #begin(operation: Operation): Request[] {
    const block = this.#disk.blockBytes;
    const { type } = operation;
    if (type === IoType.flush) {
      const request = this.#disk.start(type, 0, 0);
      this.#checks.push(() => assert.equal(request.status, IoStatus.success, 'flush'));
      return [request];
    }
    const at = Math.floor(operation.at / block) * block;
    const lengthBytes = Math.min(operation.blocks * block, WINDOW_BYTES - at);
    const range = { start: at, end: at + lengthBytes, changes: type !== IoType.read };
    const disturbs = this.#busy.some(
      ({ start, end, changes }) => start < range.end && range.start < end && (changes || range.changes),
    );
    if (disturbs) return [];
    this.#busy.push(range);
    return [this.#submit(operation, at, lengthBytes)];
  }

  #submit({ type, flags, pieces, unit }: Operation, at: number, lengthBytes: number): Request {
    const disk = this.#disk;
    const offsetBytes = this.#start + at;
    const layout = lengthBytes % unit === 0 ? cut(lengthBytes, pieces, unit) : flat(lengthBytes);
    switch (type) {
      case IoType.read: {
        const request = disk.start(type, offsetBytes, lengthBytes, 0, layout);
        this.#checks.push(() => {
          assert.equal(request.status, IoStatus.success, 'read');
          this.#expect(disk.gather(request), at, 'read');
        });
        return request;
      }
      case IoType.write: {
        const data = fresh(lengthBytes);
        const request = disk.startWrite(offsetBytes, data, flags & IoFlag.fua, layout);
        this.#checks.push(() => {
          assert.equal(request.status, IoStatus.success, 'write');
          data.copy(this.#model, at);
        });
        return request;
      }
      case IoType.discard: {
        const request = disk.start(type, offsetBytes, lengthBytes);
        this.#checks.push(() => {
          const supported = disk.open.bdev.supports(IoType.discard);
          assert.equal(request.status, supported ? IoStatus.success : IoStatus.notSupported, 'discard');
          this.#learn(at, lengthBytes);
        });
        return request;
      }
      default: {
        const request = disk.start(type, offsetBytes, lengthBytes, flags);
        this.#checks.push(() => {
          assert.equal(request.status, IoStatus.success, 'writeZeroes');
          this.#model.fill(0, at, at + lengthBytes);
        });
        return request;
      }
    }
  }

  /** After a discard each block holds zeroes or what it held. */
  #learn(at: number, lengthBytes: number): void {
    const block = this.#disk.blockBytes;
    const actual = this.#disk.read(this.#start + at, lengthBytes);
    if (!this.#keepsData) return;
    for (let offset = 0; offset < lengthBytes; offset += block) {
      const now = actual.subarray(offset, offset + block);
      if (now.every((byte) => byte === 0)) this.#model.fill(0, at + offset, at + offset + block);
    }
    this.#expect(actual, at, 'discarded range');
  }
}
