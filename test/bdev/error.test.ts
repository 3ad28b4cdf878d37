/**
 * Goal: the error filter does what its rules say: to which requests, from which one on, how often, and nothing else.
 *
 * Method: one disk over malloc, rules changed while it runs.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BdevError } from '../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { ErrorBdev, ErrorRule } from '../../src/bdev/error/error.js';
import { cut, expectBytes, fresh } from '../support/bytes.js';
import { Disk } from '../support/disk.js';
import { Rig } from '../support/rig.js';
import { error, malloc, stack } from './stacks.js';

const EIO = 5;
const EROFS = 30;

let disk: Disk;
let bdev: ErrorBdev;

beforeEach(() => {
  disk = new Disk(new Rig('error'), stack(malloc(), error()).configs);
  bdev = disk.open.bdev as ErrorBdev;
});

afterEach(() => {
  disk.close();
});

/** Statuses of a series of one-block requests. */
function series(type: IoType, count: number): IoStatus[] {
  return Array.from({ length: count }, (_, i) => disk.run(type, i * 512, type === IoType.flush ? 0 : 512));
}

const { success, ioError, noSpace } = IoStatus;

describe('a rule', () => {
  it('acts on the requests from the first for its count', () => {
    bdev.setRules([{ type: 'write', action: 'fail', first: 3, count: 2 }]);
    expect(series(IoType.write, 6)).toEqual([success, success, ioError, ioError, success, success]);
  });

  it('acts for ever without a count', () => {
    bdev.setRules([{ type: 'write', action: 'noSpace', first: 2, count: null }]);
    expect(series(IoType.write, 4)).toEqual([success, noSpace, noSpace, noSpace]);
  });

  it('acts on its own type only', () => {
    const types = ['read', 'write', 'flush', 'discard', 'writeZeroes'] as const;
    for (const ruled of types) {
      bdev.setRules([{ type: ruled, action: 'fail', first: 1, count: null }]);
      for (const type of types) expect(series(IoType[type], 1)).toEqual([type === ruled ? ioError : success]);
    }
  });

  it('of type any acts on every type but a reset', () => {
    bdev.setRules([{ type: 'any', action: 'fail', first: 1, count: null }]);
    for (const type of ['read', 'write', 'flush', 'discard', 'writeZeroes'] as const) {
      expect(series(IoType[type], 1)).toEqual([ioError]);
    }
    expect(disk.run(IoType.reset)).toBe(success);
  });

  it('acts on requests that touch its range', () => {
    bdev.setRules([
      { type: 'read', action: 'fail', first: 1, count: null, fromOffsetBytes: 1024, toOffsetBytes: 2048 },
    ]);
    expect(series(IoType.read, 6)).toEqual([success, success, ioError, ioError, success, success]);
    expect(disk.run(IoType.read, 0, 1024)).toBe(success);
    expect(disk.run(IoType.read, 0, 1536)).toBe(ioError);
    expect(disk.run(IoType.read, 0, 8192)).toBe(ioError);
  });

  it('gives its errno, and EIO without one', () => {
    const errnoOf = (rule: Partial<ErrorRule>): number => {
      bdev.setRules([{ type: 'any', action: 'fail', first: 1, count: 1, ...rule }]);
      const request = disk.start(IoType.flush, 0, 0);
      disk.finish(request);
      return request.errno;
    };
    expect(errnoOf({ errno: EROFS })).toBe(EROFS);
    expect(errnoOf({})).toBe(EIO);
  });

  it('with a probability acts on about that share of requests', () => {
    bdev.setRules([{ type: 'write', action: 'fail', first: 1, count: null, probability: 0.25 }]);
    const failed = series(IoType.write, 2000).filter((status) => status === ioError).length;
    // Six standard deviations to each side.
    expect(failed).toBeGreaterThan(500 - 117);
    expect(failed).toBeLessThan(500 + 117);
  });

  it('counts requests that another rule acts on', () => {
    bdev.setRules([
      { type: 'write', action: 'fail', first: 1, count: 2 },
      { type: 'write', action: 'noSpace', first: 3, count: 1 },
    ]);
    expect(series(IoType.write, 4)).toEqual([ioError, ioError, noSpace, success]);
  });

  it('yields to the rules before it', () => {
    bdev.setRules([
      { type: 'write', action: 'noSpace', first: 2, count: 1 },
      { type: 'any', action: 'fail', first: 1, count: null },
    ]);
    expect(series(IoType.write, 3)).toEqual([ioError, noSpace, ioError]);
  });

  it('lets nothing of a failed write reach the disk', () => {
    const old = fresh(4096);
    disk.write(0, old);
    bdev.setRules([{ type: 'write', action: 'fail', first: 1, count: 1 }]);
    const write = disk.startWrite(0, fresh(4096));
    disk.finish(write);
    expect(write.status).toBe(ioError);
    expectBytes(disk.read(0, 4096), old, 'contents');
  });
});

describe('requests that hang', () => {
  const hang: ErrorRule = { type: 'any', action: 'hang', first: 1, count: null };

  it('go on where they were when they are released', () => {
    bdev.setRules([hang]);
    const data = fresh(4096);
    const write = disk.startWrite(0, data);
    const flush = disk.start(IoType.flush, 0, 0);
    disk.rig.pass(1e6);
    expect([write.completions, flush.completions, bdev.hanging]).toEqual([0, 0, 2]);
    bdev.setRules([]);
    bdev.release();
    disk.finish(write, flush);
    expect([write.status, flush.status, bdev.hanging]).toEqual([success, success, 0]);
    expectBytes(disk.read(0, 4096), data, 'contents');
  });

  it('are aborted by a reset, and have changed nothing', () => {
    const old = fresh(4096);
    disk.write(0, old);
    bdev.setRules([hang]);
    const write = disk.startWrite(0, fresh(4096));
    const reset = disk.start(IoType.reset, 0, 0);
    disk.finish(write, reset);
    expect([write.status, reset.status]).toEqual([IoStatus.aborted, success]);
    bdev.setRules([]);
    expectBytes(disk.read(0, 4096), old, 'contents');
  });

  it('count as in flight', () => {
    bdev.setRules([hang]);
    const write = disk.startWrite(0, fresh(512));
    expect(disk.open.stats.inflight).toBe(1);
    bdev.setRules([]);
    bdev.release();
    disk.finish(write);
  });
});

describe('corruption', () => {
  it('flips one bit of what is read, wherever it lies, and leaves the disk as it is', () => {
    const data = fresh(16384);
    disk.write(0, data);
    bdev.setRules([{ type: 'read', action: 'corrupt', first: 1, count: null }]);
    const places = new Set<number>();
    for (let i = 0; i < 200; i++) {
      disk.forget();
      const read = disk.read(0, data.length, cut(data.length, 20, 1));
      const wrong = [...read.keys()].filter((at) => read[at] !== data[at]);
      expect(wrong).toHaveLength(1);
      const difference = read[wrong[0]!]! ^ data[wrong[0]!]!;
      expect(difference & (difference - 1)).toBe(0);
      places.add(wrong[0]!);
    }
    expect(places.size).toBeGreaterThan(150);
    bdev.setRules([]);
    expectBytes(disk.read(0, data.length), data, 'contents');
  });

  it('is refused for what is not a read', () => {
    let thrown: unknown;
    try {
      bdev.setRules([{ type: 'write', action: 'corrupt', first: 1, count: 1 }]);
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(BdevError);
    expect((thrown as BdevError).field).toBe('rules[0].type');
  });
});

describe('describe', () => {
  it('shows the rules in force', () => {
    const rules: ErrorRule[] = [{ type: 'read', action: 'fail', first: 1, count: null }];
    bdev.setRules(rules);
    expect(bdev.describe()).toEqual({ base: 'leaf', rules, hanging: 0 });
  });
});
