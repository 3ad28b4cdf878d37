/**
 * Goal: whichever of the requests that a large one is made of fails, the large one fails with its status, nothing new is started,
 * nothing hangs, nothing beside it changes, and the disk goes on as before.
 *
 * Method: every scenario is rerun with its Nth request failing, N = 1, 2, ... until it passes untouched; once and for good, at
 * once and after a while.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { ErrorBdev, ErrorRule } from '../../src/bdev/error/error.js';
import { cut, expectBytes, fresh } from '../support/bytes.js';
import { Disk } from '../support/disk.js';
import type { Request } from '../support/disk.js';
import type { LimitedBdev } from '../support/limited.js';
import { Rig } from '../support/rig.js';
import * as make from './stacks.js';

const EROFS = 30;
const ENOSPC = 28;
const LENGTH_BYTES = 40 * 4096;
/** The scenarios work behind a guard block. */
const START_BYTES = 4096;
/** Children of one channel that may be under way at once. */
const CHILDREN_MAX = 32;

type Filters = readonly make.Filter[];

const pieces = { maxTransferBytes: 4096, maxDiscardBytes: 4096, maxWriteZeroesBytes: 4096 };
const plain = make.limited(pieces);
const bouncing = make.limited({ ...pieces, memoryAlignmentBytes: 512, maxSegments: 2 });
const emulating = make.limited(pieces, ['fua', 'writeZeroes']);

/** A large request; answers without having driven it. */
interface Scenario {
  readonly name: string;
  readonly limits: make.Filter;
  readonly start: (disk: Disk) => Request;
}

const scenarios: readonly Scenario[] = [
  { name: 'a read', limits: plain, start: (disk) => disk.start(IoType.read, START_BYTES, LENGTH_BYTES) },
  {
    name: 'a read through bounce buffers',
    limits: bouncing,
    start: (disk) => disk.start(IoType.read, START_BYTES, LENGTH_BYTES, 0, cut(LENGTH_BYTES, 50, 1)),
  },
  { name: 'a write', limits: plain, start: (disk) => disk.startWrite(START_BYTES, fresh(LENGTH_BYTES)) },
  {
    name: 'a write through bounce buffers',
    limits: bouncing,
    start: (disk) => disk.startWrite(START_BYTES, fresh(LENGTH_BYTES), 0, cut(LENGTH_BYTES, 50, 1)),
  },
  {
    name: 'a write with emulated FUA',
    limits: emulating,
    start: (disk) => disk.startWrite(START_BYTES, fresh(LENGTH_BYTES), IoFlag.fua),
  },
  { name: 'a writeZeroes', limits: plain, start: (disk) => disk.start(IoType.writeZeroes, START_BYTES, LENGTH_BYTES) },
  {
    name: 'an emulated writeZeroes with FUA',
    limits: emulating,
    start: (disk) => disk.start(IoType.writeZeroes, START_BYTES, LENGTH_BYTES, IoFlag.fua),
  },
  { name: 'a discard', limits: plain, start: (disk) => disk.start(IoType.discard, START_BYTES, LENGTH_BYTES) },
];

const failures = [
  { action: 'fail', errno: EROFS, count: 1, status: IoStatus.ioError },
  { action: 'fail', errno: EROFS, count: null, status: IoStatus.ioError },
  { action: 'noSpace', errno: ENOSPC, count: 1, status: IoStatus.noSpace },
] as const;

let disk: Disk;

afterEach(() => {
  disk.close();
});

function open(limits: make.Filter, between: Filters): void {
  disk = new Disk(new Rig('fail-nth'), make.stack(make.malloc(), make.error(), ...between, limits).configs);
}

const inject = (...rules: ErrorRule[]): void => (disk.rig.registry.get('filter0') as ErrorBdev).setRules(rules);
const limitedBdev = (): LimitedBdev => disk.rig.registry.get(disk.open.bdev.name) as LimitedBdev;
const taken = (): number => limitedBdev().taken.reduce((sum, count) => sum + count, 0);

/** More large requests at once than there are children for: they need every pool to be full again. */
function expectPoolsFull(): void {
  disk.forget();
  const data = fresh(LENGTH_BYTES);
  const writes = Array.from({ length: 6 }, (_, i) =>
    disk.startWrite(i * LENGTH_BYTES, data, IoFlag.fua, cut(data.length, 9, 1)),
  );
  disk.finish(...writes);
  expect(writes.every((write) => write.status === IoStatus.success)).toBe(true);
  expectBytes(disk.read(5 * LENGTH_BYTES, LENGTH_BYTES), data, 'read back');
}

/** @param startedAtMost requests that may have been given out when the Nth has failed */
function failEachOf(scenario: Scenario, startedAtMost: (n: number) => number): void {
  for (const { action, errno, count, status } of failures) {
    let n = 1;
    for (; ; n++) {
      disk.forget();
      const guard = fresh(START_BYTES);
      inject();
      disk.write(0, guard);
      disk.write(START_BYTES + LENGTH_BYTES, guard);
      inject({ type: 'any', action, errno, first: n, count });
      const takenBefore = taken();
      const request = scenario.start(disk);
      disk.finish(request);
      const started = taken() - takenBefore;
      inject();
      expectBytes(disk.read(0, START_BYTES), guard, 'in front');
      expectBytes(disk.read(START_BYTES + LENGTH_BYTES, START_BYTES), guard, 'behind');
      if (request.status === IoStatus.success) {
        expect(started).toBe(n - 1);
        break;
      }
      expect([request.status, request.errno]).toEqual([status, errno]);
      expect(started).toBeLessThanOrEqual(startedAtMost(n));
    }
    // One request per 4 KiB at least.
    expect(n).toBeGreaterThan(LENGTH_BYTES / 4096);
    expectPoolsFull();
  }
}

describe('failing at once', () => {
  for (const scenario of scenarios) {
    it(`ends ${scenario.name}, and no piece is started after the one that failed`, () => {
      open(scenario.limits, []);
      failEachOf(scenario, (n) => n);
    });
  }
});

describe('failing after a while', () => {
  const slow = make.delay({ readUs: 30, writeUs: 30, flushUs: 30, discardUs: 30, jitterUs: 60 });

  for (const scenario of scenarios) {
    it(`ends ${scenario.name}, and only pieces that were under way follow`, () => {
      open(scenario.limits, [slow]);
      // Each piece that succeeded before the Nth failed has made room for one more.
      failEachOf(scenario, (n) => n + 2 * CHILDREN_MAX);
    });
  }

  it('starts no more than were under way when the first one fails', () => {
    open(plain, [make.delay({ writeUs: 50 })]);
    inject({ type: 'any', action: 'fail', first: 1, count: null });
    const request = disk.startWrite(START_BYTES, fresh(4 * LENGTH_BYTES));
    disk.finish(request);
    expect(request.status).toBe(IoStatus.ioError);
    expect(taken()).toBe(CHILDREN_MAX);
  });

  it('makes no flush after a piece of an emulated FUA write has failed', () => {
    open(emulating, [slow]);
    inject({ type: 'write', action: 'fail', first: 40, count: 1 });
    const request = disk.startWrite(START_BYTES, fresh(LENGTH_BYTES), IoFlag.fua);
    disk.finish(request);
    expect(request.status).toBe(IoStatus.ioError);
    expect(limitedBdev().taken[IoType.flush]).toBe(0);
  });

  it('fails an emulated FUA write whose flush fails', () => {
    open(emulating, [slow]);
    inject({ type: 'flush', action: 'fail', errno: EROFS, first: 1, count: 1 });
    const request = disk.startWrite(START_BYTES, fresh(LENGTH_BYTES), IoFlag.fua);
    disk.finish(request);
    expect([request.status, request.errno]).toEqual([IoStatus.ioError, EROFS]);
  });
});

describe('many at once', () => {
  it('each end with their own outcome while others fail', () => {
    open(bouncing, [make.delay({ readUs: 20, writeUs: 20, jitterUs: 40 })]);
    // The third of ten disk areas is bad.
    inject({
      type: 'any',
      action: 'fail',
      errno: EROFS,
      first: 1,
      count: null,
      fromOffsetBytes: 3 * LENGTH_BYTES + 8192,
      toOffsetBytes: 3 * LENGTH_BYTES + 8193,
    });
    const requests = Array.from({ length: 10 }, (_, i) =>
      i % 2 === 0
        ? disk.start(IoType.read, i * LENGTH_BYTES, LENGTH_BYTES, 0, cut(LENGTH_BYTES, 20, 1))
        : disk.startWrite(i * LENGTH_BYTES, fresh(LENGTH_BYTES), 0, cut(LENGTH_BYTES, 20, 1)),
    );
    disk.finish(...requests);
    requests.forEach((request, i) => expect(request.errno, `request ${i}`).toBe(i === 3 ? EROFS : 0));
  });
});
