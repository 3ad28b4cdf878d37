/**
 * Goal: what the core promises beyond being a disk: requests that a module refuses are retried in order and none starves, a reset
 * frees whatever is stuck, a read-only disk stays as it is, and what is emulated is done in the right order and no more often
 * than needed.
 *
 * Method: stacks of filters that refuse, hang or lack things, and that keep a journal of what they were given.
 */
import { chmodSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { ErrorBdev } from '../../src/bdev/error/error.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { Disk } from '../support/disk.js';
import type { Request } from '../support/disk.js';
import type { LimitedBdev } from '../support/limited.js';
import type { Attempt, ReluctantBdev } from '../support/reluctant.js';
import { Rig } from '../support/rig.js';
import * as make from './stacks.js';

const { delay, error, limited, passthru, reluctant, stack } = make;
const EROFS = 30;

let disk: Disk;
let release: () => void;

function open(made: make.Stack): Disk {
  release = made.release;
  disk = new Disk(new Rig('core'), made.configs);
  return disk;
}

/** The `n`-th filter from below. */
function filter<T>(n: number): T {
  return disk.rig.registry.get(`filter${n}`) as T;
}

afterEach(() => {
  try {
    disk.close();
  } finally {
    release();
  }
});

/** One block to each of `count` places, all at once. */
function writeBlocks(count: number, from = 0): Request[] {
  const data = fresh(disk.blockBytes);
  return Array.from({ length: count }, (_, i) => disk.startWrite((from + i) * disk.blockBytes, data));
}

function places(attempts: readonly Attempt[]): number[] {
  return attempts.map((attempt) => attempt.offsetBytes / disk.blockBytes);
}

const ascending = (a: number, b: number): number => a - b;

describe('requests that are refused', () => {
  it('at once, are taken in their order, each in two attempts', () => {
    open(stack(make.malloc(), reluctant('now')));
    const steps = disk.rig.steps;
    const requests = writeBlocks(300);
    disk.finish(...requests);
    expect(disk.rig.steps - steps).toBeLessThan(700);
    expect(requests.every((request) => request.status === IoStatus.success)).toBe(true);
    const { journal } = filter<ReluctantBdev>(0);
    const taken = places(journal.filter((attempt) => attempt.accepted));
    expect(taken).toEqual(Array.from({ length: 300 }, (_, i) => i));
    expect(journal).toHaveLength(600);
  });

  it('beyond what the module can hold, are taken in their order as it makes room', () => {
    open(stack(make.malloc(), delay({ writeUs: 500, jitterUs: 500 }), reluctant('beyondCapacity', 4)));
    disk.finish(...writeBlocks(100));
    const { journal } = filter<ReluctantBdev>(1);
    const taken = places(journal.filter((attempt) => attempt.accepted));
    expect(taken).toEqual(Array.from({ length: 100 }, (_, i) => i));
  });

  it('first later and then at once, keep their order', () => {
    open(stack(make.malloc(), reluctant('laterThenAllButOne')));
    disk.finish(...writeBlocks(40));
    const { journal } = filter<ReluctantBdev>(0);
    const taken = places(journal.filter((attempt) => attempt.accepted));
    expect(taken).toEqual(Array.from({ length: 40 }, (_, i) => i));
  });

  it('later, are retried in their order, in passes that halve their number', () => {
    open(stack(make.malloc(), reluctant('later')));
    const requests = writeBlocks(256);
    disk.finish(...requests);
    expect(requests.every((request) => request.status === IoStatus.success)).toBe(true);
    const passes = new Map<number, Attempt[]>();
    for (const attempt of filter<ReluctantBdev>(0).journal) {
      passes.set(attempt.step, [...(passes.get(attempt.step) ?? []), attempt]);
    }
    for (const pass of passes.values()) expect(places(pass)).toEqual(places(pass).sort(ascending));
    // 256, 128, ... 1, and at most one pass more for the last one.
    expect(passes.size).toBeLessThanOrEqual(10);
  });

  it('again and again under new arrivals, are never passed by for long', () => {
    open(stack(make.malloc(), reluctant('later')));
    const requests: Request[] = [];
    for (let round = 0; round < 400; round++) {
      requests.push(...writeBlocks(1 + (round % 5), requests.length));
      disk.forget();
      disk.rig.step();
    }
    disk.finish(...requests);
    const attempts = new Map<number, number>();
    for (const place of places(filter<ReluctantBdev>(0).journal)) attempts.set(place, (attempts.get(place) ?? 0) + 1);
    expect(attempts.size).toBe(requests.length);
    expect(Math.max(...attempts.values())).toBeLessThanOrEqual(8);
  });

  it('are retried ahead of those that came meanwhile', () => {
    open(stack(make.malloc(), error({ type: 'write', action: 'again', first: 1, count: 5 })));
    const order: number[] = [];
    const requests = writeBlocks(3);
    requests.push(...writeBlocks(3, 3));
    requests.forEach((request, i) => (request.then = () => order.push(i)));
    disk.finish(...requests);
    expect(order).toEqual([0, 1, 2, 3, 4, 5]);
  });

  it('as pieces of a larger one, still make it whole', () => {
    open(stack(make.malloc(), reluctant('later'), limited({ maxTransferBytes: 4096 })));
    const data = fresh(2 ** 20);
    disk.write(0, data);
    expectBytes(disk.read(0, data.length), data, 'read back');
  });

  it('do not keep the reactor awake for nothing: no poller is left when they are done', () => {
    open(stack(make.malloc(), reluctant('now')));
    disk.finish(...writeBlocks(50));
    disk.rig.step();
    disk.rig.step();
    expect(disk.rig.step()).toBe(false);
  });
});

describe('a reset', () => {
  const hangAll = error({ type: 'any', action: 'hang', first: 1, count: null });

  function resetDisk(requests: Request[]): void {
    const reset = disk.start(IoType.reset, 0, 0);
    disk.finish(reset, ...requests);
    expect(reset.status).toBe(IoStatus.success);
    for (const request of requests) expect(request.status).toBe(IoStatus.aborted);
  }

  function expectAlive(): void {
    filter<ErrorBdev>(0).setRules([]);
    disk.forget();
    const data = fresh(2 ** 20);
    disk.write(0, data);
    expectBytes(disk.read(0, data.length), data, 'read back');
  }

  it('frees requests that hang, and those that wait behind them', () => {
    open(stack(make.malloc(), hangAll, reluctant('beyondCapacity', 1)));
    resetDisk(writeBlocks(20));
    expectAlive();
  });

  it('frees large requests of which pieces hang, and those that wait for room to start any', () => {
    open(stack(make.malloc(), hangAll, limited({ maxTransferBytes: 4096, memoryAlignmentBytes: 512 })));
    const large = Array.from({ length: 8 }, (_, i) => disk.start(IoType.read, i * 2 ** 20, 2 ** 20));
    resetDisk([...large, disk.start(IoType.writeZeroes, 0, 2 ** 20), disk.start(IoType.flush, 0, 0)]);
    const { taken } = filter<LimitedBdev>(1);
    expect(taken[IoType.read]! + taken[IoType.writeZeroes]!).toBe(32);
    expectAlive();
  });

  it('frees what would be retried for ever', () => {
    open(stack(make.malloc(), error({ type: 'any', action: 'again', first: 1, count: null })));
    const requests = writeBlocks(10);
    for (let i = 0; i < 20; i++) disk.rig.step();
    resetDisk([...requests, disk.start(IoType.read, 0, 2 ** 20)]);
    expectAlive();
  });

  it('completes on a leaf when what is under way there has', () => {
    open(make.uringFile());
    const writes = writeBlocks(50);
    const reset = disk.start(IoType.reset, 0, 0);
    expect(reset.completions).toBe(0);
    reset.then = () => expect(writes.every((write) => write.completions === 1)).toBe(true);
    disk.finish(reset, ...writes);
    for (const write of writes) expect(write.status).toBe(IoStatus.success);
  });

  it('completes at once when there is nothing to wait for, also twice', () => {
    open(stack(make.malloc(), passthru, delay()));
    const resets = [disk.start(IoType.reset, 0, 0), disk.start(IoType.reset, 0, 0)];
    disk.finish(...resets);
    for (const reset of resets) expect(reset.status).toBe(IoStatus.success);
  });
});

describe('a read-only disk', () => {
  function expectReadOnly(): void {
    for (const type of [IoType.write, IoType.discard, IoType.writeZeroes]) {
      const request = disk.start(type, 0, disk.blockBytes);
      disk.finish(request);
      expect([request.status, request.errno]).toEqual([IoStatus.ioError, EROFS]);
      expect(disk.run(type, 0, 2 ** 20)).toBe(IoStatus.ioError);
    }
    expect(disk.run(IoType.flush)).toBe(IoStatus.success);
    expectBytes(disk.read(0, 2 ** 20), Buffer.alloc(2 ** 20), 'contents');
  }

  it('refuses all that would change it, by its module', () => {
    open(stack(make.malloc(), limited({}, [], true)));
    expectReadOnly();
  });

  it('refuses all that would change it, by its file, with filters over it', () => {
    const made = make.uringFile({ readOnly: true });
    chmodSync((made.configs[0] as UringConfig).path, 0o400);
    open(stack(made, passthru, limited({ maxTransferBytes: 8192 }), delay({ readUs: 10 })));
    expectReadOnly();
  });
});

describe('what is emulated', () => {
  it('splits at the longest transfer and no finer', () => {
    open(stack(make.malloc(), limited({ maxTransferBytes: 65536 })));
    disk.write(0, fresh(65536 * 5 + 512));
    expect(filter<LimitedBdev>(0).taken[IoType.write]).toBe(6);
  });

  it('splits at boundaries and no finer', () => {
    open(stack(make.malloc(), limited({ boundaryBytes: 65536 })));
    disk.write(65536 - 512, fresh(65536 + 1024));
    expect(filter<LimitedBdev>(0).taken[IoType.write]).toBe(3);
  });

  it('makes one flush of a write with forced unit access, after all its pieces', () => {
    open(
      stack(
        make.malloc(),
        error({ type: 'write', action: 'hang', first: 1, count: null }),
        limited({ maxTransferBytes: 4096 }, ['fua']),
      ),
    );
    const write = disk.startWrite(0, fresh(65536), IoFlag.fua);
    const { taken } = filter<LimitedBdev>(1);
    for (let i = 0; i < 5; i++) disk.rig.step();
    expect([taken[IoType.write], taken[IoType.flush], write.completions]).toEqual([16, 0, 0]);
    filter<ErrorBdev>(0).release();
    disk.finish(write);
    expect([taken[IoType.write], taken[IoType.flush], write.status]).toEqual([16, 1, IoStatus.success]);
  });

  it('makes no flush of a write with forced unit access where nothing is kept back', () => {
    open(stack(make.malloc(), limited({}, ['fua', 'flush'])));
    disk.write(0, fresh(4096), IoFlag.fua);
    expect(filter<LimitedBdev>(0).taken).toEqual([0, 1, 0, 0, 0, 0]);
    expect(disk.run(IoType.flush)).toBe(IoStatus.success);
    expect(filter<LimitedBdev>(0).taken).toEqual([0, 1, 0, 0, 0, 0]);
  });

  it('writes zeroes once, where it turns out under way that the module cannot', () => {
    const chunk = 65536;
    open(stack(make.malloc(), limited({ maxWriteZeroesBytes: chunk, maxTransferBytes: chunk }, ['triedZeroes'])));
    expect(disk.run(IoType.writeZeroes, 0, 20 * chunk)).toBe(IoStatus.success);
    const { taken } = filter<LimitedBdev>(0);
    expect([taken[IoType.writeZeroes], taken[IoType.write]]).toEqual([20, 20]);
  });

  it('does not pass a discard to a module that has none', () => {
    open(stack(make.malloc(), limited({}, ['discard'])));
    expect(disk.run(IoType.discard, 0, 4096)).toBe(IoStatus.notSupported);
    expect(filter<LimitedBdev>(0).taken).toEqual([0, 0, 0, 0, 0, 0]);
  });
});

describe('closing', () => {
  it('with requests in flight is a mistake that is noticed', () => {
    open(stack(make.malloc(), delay({ writeUs: 100 })));
    const requests = writeBlocks(3);
    expect(() => disk.open.close()).toThrow('in flight');
    disk.finish(...requests);
  });

  it('with requests that are being taken apart is one too', () => {
    open(stack(make.malloc(), limited({ maxTransferBytes: 4096 })));
    const request = disk.startWrite(0, fresh(2 ** 20));
    expect(() => disk.open.close()).toThrow('in flight');
    disk.finish(request);
  });
});
