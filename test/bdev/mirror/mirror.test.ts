/**
 * Goal: whatever a guest does while its disk is mirrored, and in whichever order the two legs carry it out, both hold the same in the end; a pivot
 * is noticed by nobody; and what goes wrong with the target is never the guest's.
 *
 * Method: random requests, overlapping ones too, over stacks that answer late and out of order, with both legs compared; and each rule
 * by itself, on disks that hold requests back or fail them.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { IoFlag, IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { ErrorBdev, ErrorRule } from '../../../src/bdev/error/error.js';
import { IoCounter } from '../../../src/bdev/io-stats.js';
import type { Mirror } from '../../../src/bdev/mirror/mirror.js';
import { expectBytes, fresh } from '../../support/bytes.js';
import type { Request } from '../../support/disk.js';
import type { LimitedBdev } from '../../support/limited.js';
import { seededRandom } from '../../support/seed.js';
import { delay, error, limited, malloc, passthru, qcow2, qos, stack, uringFile } from '../stacks.js';
import type { Stack } from '../stacks.js';
import { MirroredDisk } from './mirrored-disk.js';

const MIB = 2 ** 20;
/** The last chunk is not whole. */
const SIZE = 5 * MIB + 12 * 512;
const DEPTH = 24;
const random = seededRandom(71);

let disk: MirroredDisk;
let release: (() => void)[] = [];

function open(source: Stack, target: Stack): MirroredDisk {
  release = [source.release, target.release];
  disk = new MirroredDisk(source, target);
  return disk;
}

afterEach(() => {
  disk.close();
  for (const end of release) end();
});

const memory = (): Stack => malloc(512, SIZE);
const errors = (name: string): ErrorBdev => disk.rig.registry.get(name) as ErrorBdev;
const completed = (name: string, type: IoType): number =>
  disk.rig.registry.stats(name)!.counter(type, IoCounter.completed);
const isDone = (request: Request): boolean => request.completions > 0;
const hang = (type: ErrorRule['type'], first = 1): ErrorRule => ({ type, action: 'hang', first, count: 1 });

/** Fills the disk with what occurs nowhere else, and the target with other things. */
function fill(): Buffer {
  const content = fresh(SIZE);
  // A chunk that holds nothing.
  content.fill(0, MIB, 2 * MIB);
  disk.write(0, content);
  disk.forget();
  const target = disk.rig.registry.open('target', 'filler', 'name');
  const request = disk.prepare(IoType.write, 0, SIZE);
  disk.scatter(request, Buffer.alloc(SIZE, 0xee));
  request.io.push(request, 0);
  target.channel.submit(request.io);
  disk.finish(request);
  target.close();
  disk.forget();
  return content;
}

function randomRequest(): Request {
  const blocks = SIZE / 512;
  const [type, flags] = [
    [IoType.write, 0],
    [IoType.write, 0],
    [IoType.write, IoFlag.fua],
    [IoType.read, 0],
    [IoType.flush, 0],
    [IoType.discard, 0],
    [IoType.writeZeroes, 0],
    [IoType.writeZeroes, IoFlag.unmap],
  ][random.below(8)] as [IoType, number];
  if (type === IoType.flush) return disk.start(type, 0, 0);
  // Small ones in a narrow place overlap; large ones cross chunks.
  const isLarge = random.below(8) === 0;
  const length = 1 + random.below(isLarge ? 700 : 24);
  const offset = isLarge ? random.below(blocks - length) : 2000 + random.below(100);
  if (type !== IoType.write) return disk.start(type, offset * 512, length * 512, flags);
  return disk.startWrite(offset * 512, fresh(length * 512), flags);
}

/** Keeps requests in flight until `end`; each has to succeed. */
function loadUntil(end: () => boolean, count = Infinity): void {
  let inflight: Request[] = [];
  for (let started = 0; !end() && started < count;) {
    while (inflight.length < DEPTH && started++ < count) inflight.push(randomRequest());
    disk.rig.step();
    for (const request of inflight) if (isDone(request)) expect(request.status).toBe(IoStatus.success);
    inflight = inflight.filter((request) => !isDone(request));
    if (inflight.length === 0) disk.forget();
    else if (started % 100 === 0) {
      disk.finish(...inflight);
      inflight = [];
      disk.forget();
    }
  }
  disk.finish(...inflight);
  disk.forget();
}

function expectSame(what: string): void {
  expectBytes(disk.contents('target'), disk.contents('source'), what);
}

const stacks: readonly (readonly [string, () => readonly [Stack, Stack]])[] = [
  ['memory to memory', () => [memory(), memory()]],
  [
    'answers out of order, the target slower',
    () => [
      stack(memory(), delay({ writeUs: 30, jitterUs: 300 })),
      stack(memory(), delay({ readUs: 10, writeUs: 100, flushUs: 500, jitterUs: 900 })),
    ],
  ],
  [
    'answers out of order, the source slower',
    () => [
      stack(memory(), delay({ writeUs: 100, discardUs: 300, jitterUs: 900 })),
      stack(memory(), delay({ jitterUs: 300 })),
    ],
  ],
  [
    'requests carried out out of order',
    () => [
      stack(memory(), error({ type: 'any', action: 'again', first: 1, count: null, probability: 0.3 })),
      stack(
        memory(),
        error({ type: 'any', action: 'again', first: 1, count: null, probability: 0.5 }),
        qos({ totalIops: 1e6 }),
      ),
    ],
  ],
  [
    'other limits on each side',
    () => [
      stack(memory(), limited({ maxTransferBytes: 8192, maxSegments: 2 }, ['fua', 'writeZeroes'])),
      stack(memory(), limited({ maxTransferBytes: 4096, memoryAlignmentBytes: 512 }, ['fua', 'writeZeroes'])),
    ],
  ],
  ['a file to a qcow2 image', () => [uringFile({}, SIZE), qcow2('', {}, SIZE)]],
  [
    'a qcow2 image to a file, through filters',
    () => [stack(qcow2('', {}, SIZE), passthru), stack(uringFile({}, SIZE), delay({ jitterUs: 200 }))],
  ],
];

describe('a mirror under load', () => {
  it.each(stacks)('%s: both legs hold the same, and so they do after the pivot', async (_, make) => {
    const [source, target] = make();
    open(source, target);
    fill();
    loadUntil(() => false, 200);
    const mirror = disk.mirror();
    loadUntil(() => mirror.info.doneBytes === mirror.info.totalBytes, 1200);
    loadUntil(() => false, 500);
    disk.untilReady(mirror);
    expectSame('in step');
    loadUntil(() => false, 100);
    disk.untilReady(mirror);
    const last = Array.from({ length: DEPTH }, () => randomRequest());
    await disk.settled(mirror.preparePivot());
    expect(last.every(isDone)).toBe(true);
    const sourceBytes = disk.contents('source');
    expectBytes(disk.contents('target'), sourceBytes, 'at the pivot');
    const held = disk.startWrite(512, fresh(512));
    mirror.commitPivot();
    disk.finish(held);
    expect(disk.open.bdev.name).toBe('target');
    loadUntil(() => false, 200);
    expectBytes(disk.contents('source'), sourceBytes, 'the source after the pivot');
    expect(mirror.info.state).toBe('pivoted');
  });

  it('is cancelled in the middle: the source has everything, and the target is written no more', async () => {
    open(memory(), stack(memory(), delay({ writeUs: 200, jitterUs: 200 })));
    fill();
    const mirror = disk.mirror(200 * MIB);
    loadUntil(() => mirror.info.doneBytes >= 2 * MIB, 2000);
    const write = disk.startWrite(0, fresh(300 * 1024));
    disk.rig.step();
    await disk.settled(mirror.cancel());
    expect(mirror.info).toMatchObject({ state: 'cancelled', source: 'source', target: 'target' });
    disk.finish(write);
    expect(write.status).toBe(IoStatus.success);
    const before = disk.contents('target');
    loadUntil(() => false, 200);
    expectBytes(disk.contents('target'), before, 'the target');
    expect(disk.rig.registry.writerOf('target')).toBeNull();
    // Another one can be had.
    const again = disk.mirror();
    disk.untilReady(again);
    expectSame('the second mirror');
    await disk.settled(again.cancel());
  });
});

describe('a mirror', () => {
  it('copies zeroes as zeroes, and says how far it is, at the pace it is given', async () => {
    open(memory(), stack(memory(), limited({})));
    const content = fill();
    const target = disk.rig.registry.get('target') as LimitedBdev;
    target.taken.fill(0);
    const mirror = disk.mirror(10 * MIB);
    expect(mirror.info).toEqual({
      source: 'source',
      target: 'target',
      state: 'copying',
      doneBytes: 0,
      totalBytes: SIZE,
      bytesPerSecond: 10 * MIB,
    });
    const startUs = disk.rig.clock.nowUs();
    disk.rig.until(() => mirror.info.doneBytes >= 3 * MIB, 'a part');
    expect(disk.rig.clock.nowUs() - startUs).toBeGreaterThan(150_000);
    disk.untilReady(mirror);
    expect(mirror.info).toMatchObject({ state: 'ready', doneBytes: SIZE });
    expect([target.taken[IoType.write], target.taken[IoType.writeZeroes]]).toEqual([5, 1]);
    expectBytes(disk.contents('target'), content, 'the target');
    await disk.settled(mirror.cancel());
  });

  it('lets a write wait for the copying of its chunk, and others pass', () => {
    open(memory(), stack(memory(), error()));
    fill();
    errors('target').setRules([hang('write')]);
    const mirror = disk.mirror();
    disk.rig.until(() => errors('target').hanging === 1, 'the first chunk');
    const here = disk.startWrite(4096, fresh(4096));
    const across = disk.startWrite(MIB - 4096, fresh(8192));
    const elsewhere = disk.startWrite(3 * MIB, fresh(4096));
    disk.finish(elsewhere);
    disk.rig.pass(10_000);
    expect([isDone(here), isDone(across)]).toEqual([false, false]);
    expect(completed('source', IoType.write)).toBe(2);
    errors('target').release();
    disk.finish(here, across);
    disk.untilReady(mirror);
    expectSame('in the end');
  });

  it('copies a chunk only when the writes to it are done', () => {
    open(stack(memory(), error()), memory());
    fill();
    errors('source').setRules([hang('write')]);
    const before = disk.startWrite(0, fresh(4096));
    const mirror = disk.mirror();
    // What came before the mirror is waited for.
    disk.rig.pass(1000);
    expect(mirror.info.doneBytes).toBe(0);
    const held = disk.startWrite(MIB, fresh(4096));
    disk.rig.pass(1000);
    expect(isDone(held)).toBe(false);
    errors('source').setRules([hang('write', 2)]);
    errors('source').release();
    disk.finish(before, held);
    const during = disk.startWrite(4 * MIB, fresh(4096));
    disk.rig.pass(10_000);
    expect(mirror.info.state).toBe('copying');
    expect(completed('target', IoType.write)).toBeLessThan(6);
    if (!isDone(during)) errors('source').release();
    disk.finish(during);
    disk.untilReady(mirror);
    expectSame('in the end');
  });

  it('is not begun while a request before it takes too long', () => {
    open(stack(memory(), error()), memory());
    errors('source').setRules([hang('read')]);
    const before = disk.start(IoType.read, 0, 512);
    const mirror = disk.mirror();
    const held = disk.startWrite(0, fresh(512));
    disk.finish(held);
    expect(mirror.info).toMatchObject({ state: 'failed', error: expect.stringMatching(/in time/) as string });
    errors('source').release();
    disk.finish(before);
  });

  it('answers a write when both legs have it, and a flush when both have carried it out', () => {
    open(memory(), stack(memory(), error()));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('target').setRules([hang('write'), hang('flush')]);
    const write = disk.startWrite(0, fresh(4096));
    const flush = disk.start(IoType.flush, 0, 0);
    const read = disk.start(IoType.read, 0, 4096);
    disk.finish(read);
    disk.rig.pass(10_000);
    expect([isDone(write), isDone(flush)]).toEqual([false, false]);
    expect([completed('source', IoType.write), completed('source', IoType.flush)]).toEqual([2, 1]);
    errors('target').release();
    disk.finish(write, flush);
    expect(completed('target', IoType.flush)).toBe(1);
  });

  it('makes a write durable on both legs that has to be', () => {
    open(memory(), stack(memory(), limited({}, ['fua'])));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    const { taken } = disk.rig.registry.get('target') as LimitedBdev;
    const before = taken[IoType.flush]!;
    disk.write(0, fresh(4096), IoFlag.fua);
    expect(taken[IoType.flush]).toBe(before + 1);
  });

  it('writes the same to both when the guest changes its memory meanwhile', () => {
    open(stack(memory(), error()), memory());
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('source').setRules([hang('write')]);
    const write = disk.startWrite(8192, fresh(4096));
    disk.rig.pass(100);
    disk.scatter(write, fresh(4096));
    errors('source').release();
    disk.finish(write);
    expectSame('after it');
  });

  it.each([IoType.write, IoType.writeZeroes])('lets requests that overlap take turns (type %i)', (type) => {
    // The first write hangs on the target: without turns the second one would be overwritten by it there.
    open(memory(), stack(memory(), error()));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('target').setRules([hang('write')]);
    const first = disk.startWrite(4096, fresh(8192));
    const second = type === IoType.write ? disk.startWrite(8192, fresh(8192)) : disk.start(type, 8192, 8192);
    const apart = disk.startWrite(12288 + 4096, fresh(512));
    disk.rig.pass(1000);
    expect(isDone(second)).toBe(false);
    errors('target').release();
    disk.finish(first, second, apart);
    expectSame('after both');
  });

  it('copies again what a discard has named', () => {
    open(memory(), stack(memory(), limited({})));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    expect(disk.run(IoType.discard, 4096, 8192)).toBe(IoStatus.success);
    disk.untilReady(mirror);
    expectSame('after it');
    expect((disk.rig.registry.get('target') as LimitedBdev).taken[IoType.discard]).toBe(0);
  });

  it('has more writes on both legs than it has places for, and large ones in pieces', () => {
    open(memory(), stack(memory(), delay({ writeUs: 500, jitterUs: 500 })));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    const writes = Array.from({ length: 200 }, (_, i) => disk.startWrite(i * 8192, fresh(4096)));
    const large = disk.startWrite(2 * MIB, fresh(2 * MIB + 512), 0);
    disk.finish(...writes, large);
    expectSame('after all');
  });

  it('gives back what waits when the disk is reset, and finds out what the legs hold', () => {
    open(stack(memory(), error()), stack(memory(), error()));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('source').setRules([hang('write')]);
    errors('target').setRules([hang('write', 2)]);
    const hanging = [disk.startWrite(0, fresh(4096)), disk.startWrite(MIB, fresh(4096))];
    const waiting = disk.startWrite(0, fresh(4096));
    disk.rig.pass(100);
    const reset = disk.start(IoType.reset, 0, 0);
    disk.finish(reset, waiting, ...hanging);
    expect([hanging[0]!.status, waiting.status, hanging[1]!.status]).toEqual([
      IoStatus.aborted,
      IoStatus.aborted,
      IoStatus.success,
    ]);
    expect(mirror.info.state).toBe('copying');
    disk.untilReady(mirror);
    expectSame('after it');
  });

  it('is refused, with what to do, where it cannot be', () => {
    open(memory(), memory());
    const { registry } = disk.rig;
    const create = (name: string, extra: Record<string, unknown>): void => {
      const config = { name, module: 'malloc', sizeBytes: SIZE, blockSizeBytes: 512, ...extra };
      registry.create(config);
    };
    create('small', { sizeBytes: SIZE - 512 });
    create('blocks', { sizeBytes: 8 * MIB, blockSizeBytes: 4096 });
    create('weak-base', {});
    registry.create(limited({}, ['discard'])('weak', 'weak-base'));
    create('ro-base', {});
    registry.create(limited({}, [], true)('ro', 'ro-base'));
    const refusal = (target: string): unknown => {
      try {
        disk.mirror(0, target);
      } catch (caught) {
        return caught;
      }
      return null;
    };
    expect(refusal('small')).toMatchObject({ code: 'too-small', field: 'target' });
    expect(refusal('blocks')).toMatchObject({ code: 'other-blocks' });
    expect(refusal('weak')).toMatchObject({ code: 'does-less' });
    expect(refusal('ro')).toMatchObject({ code: 'read-only' });
    expect(refusal('source')).toMatchObject({ code: 'same-bdev' });
    expect(refusal('nothing')).toMatchObject({ code: 'no-such-bdev', field: 'target' });
    expect(refusal('weak-base')).toMatchObject({ code: 'claimed' });
    expect(registry.writerOf('small')).toBeNull();
  });

  it('keeps the sizes of both disks as they are', async () => {
    open(memory(), memory());
    const mirror = disk.mirror();
    for (const name of ['source', 'target']) {
      const { size } = disk.rig.registry.get(name)!;
      expect(() => size.resize(2 * SIZE)).toThrow(/is mirrored to target/);
    }
    await disk.settled(mirror.cancel());
    disk.rig.registry.get('source')!.size.resize(2 * SIZE);
    expect(disk.open.bdev.blockCount).toBe((2 * SIZE) / 512);
  });
});

describe('a mirror whose target fails', () => {
  it.each(['write', 'flush', 'writeZeroes'] as const)('at any %s: the guest notices nothing', (type) => {
    for (let n = 1, state = ''; state !== 'ready'; n++) {
      open(memory(), stack(memory(), error()));
      fill();
      errors('target').setRules([{ type, action: 'noSpace', first: n, count: null }]);
      const mirror = disk.mirror();
      loadUntil(() => false, 40);
      disk.rig.until(
        () =>
          mirror.info.state !== 'copying' &&
          (disk.rig.registry.writerOf('target') !== null) === (mirror.info.state === 'ready'),
        'an end',
      );
      ({ state } = mirror.info);
      if (state === 'failed') {
        expect(mirror.info.error).toMatch(/of bdev target failed/);
        disk.write(0, fresh(512));
        expect(n).toBeLessThan(300);
      } else expectSame(`n ${n}`);
      disk.close();
      for (const end of release) end();
    }
    open(memory(), memory());
  });

  it('is cancelled when it hangs: the guest does not wait for it', async () => {
    open(memory(), stack(memory(), error(), delay({ writeUs: 1e9 })));
    const mirror = disk.mirror();
    disk.rig.pass(100_000);
    // The copying hangs, and so does what wants to write there.
    const write = disk.startWrite(0, fresh(400 * 1024));
    disk.rig.pass(1000);
    expect(isDone(write)).toBe(false);
    const cancelled = disk.settled(mirror.cancel());
    disk.finish(write);
    expect(write.status).toBe(IoStatus.success);
    await cancelled;
    expect(mirror.info.state).toBe('cancelled');
  });

  it('is cancelled when a write hangs there: the rest goes to the source alone', async () => {
    open(memory(), stack(memory(), error()));
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('target').setRules([hang('write', 2)]);
    const data = fresh(400 * 1024);
    const write = disk.startWrite(4096, data);
    disk.rig.pass(1000);
    expect(isDone(write)).toBe(false);
    await disk.settled(mirror.cancel());
    disk.finish(write);
    expectBytes(disk.contents('source').subarray(4096, 4096 + data.length), data, 'the source');
  });
});

describe('a mirror whose source fails', () => {
  it('a write: the guest is told, and the legs are made the same again', () => {
    for (let n = 1, failures = 1; failures > 0; n++) {
      open(stack(memory(), error()), memory());
      fill();
      const mirror = disk.mirror();
      disk.untilReady(mirror);
      errors('source').setRules([{ type: 'write', action: 'fail', first: n, count: 1 }]);
      const writes = Array.from({ length: 8 }, (_, i) => disk.startWrite(i * 65536, fresh(4096 + (i % 3) * 131072)));
      disk.finish(...writes);
      failures = writes.filter(({ status }) => status === IoStatus.ioError).length;
      expect(failures).toBeLessThanOrEqual(1);
      disk.untilReady(mirror);
      expectSame(`n ${n}`);
      disk.close();
    }
    open(memory(), memory());
  });

  it('a read of the copying: the mirror fails, and the disk is served on', () => {
    open(stack(memory(), error()), memory());
    fill();
    errors('source').setRules([{ type: 'read', action: 'fail', first: 3, count: 1 }]);
    const mirror = disk.mirror();
    disk.rig.until(() => mirror.info.state === 'failed', 'the end');
    expect(mirror.info.error).toMatch(/read of \d+ bytes at 2097152 of bdev source failed/);
    disk.write(0, fresh(512));
  });
});

describe('a pivot', () => {
  const pivotOf = (mirror: Mirror): Promise<void> => disk.settled(mirror.preparePivot());

  it('is refused until all is copied, and when the mirror is over', async () => {
    open(memory(), memory());
    const mirror = disk.mirror(MIB);
    await expect(pivotOf(mirror)).rejects.toMatchObject({ code: 'not-ready' });
    await disk.settled(mirror.cancel());
    await expect(pivotOf(mirror)).rejects.toMatchObject({ code: 'no-mirror' });
  });

  it('flushes the target before it is decided, and holds requests until then', async () => {
    open(memory(), memory());
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    await pivotOf(mirror);
    expect(completed('target', IoType.flush)).toBe(1);
    const requests = [disk.startWrite(0, fresh(512)), disk.start(IoType.read, 0, 512), disk.start(IoType.flush, 0, 0)];
    disk.rig.pass(1000);
    expect(requests.some(isDone)).toBe(false);
    await expect(mirror.cancel()).rejects.toMatchObject({ code: 'busy' });
    mirror.abortPivot();
    disk.finish(...requests);
    expectSame('after a pivot that was called off');
    disk.untilReady(mirror);
    await pivotOf(mirror);
    mirror.commitPivot();
    expect(disk.rig.registry.writerOf('source')).toBeNull();
    expect(disk.rig.registry.writerOf('target')).toBe('test');
  });

  it('that is called off lets everything through, also when the target fails at once', async () => {
    open(memory(), stack(memory(), error()));
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    await pivotOf(mirror);
    const held = [0, 1, 2].map((i) => disk.startWrite(i * 4096, fresh(4096)));
    errors('target').setRules([{ type: 'write', action: 'fail', first: 1, count: null }]);
    mirror.abortPivot();
    disk.finish(...held);
    expect(held.every(({ status }) => status === IoStatus.success)).toBe(true);
    expect(mirror.info.state).toBe('failed');
  });

  it('waits for what a discard has left to be copied', async () => {
    open(memory(), stack(memory(), delay({ writeUs: 1000 })));
    fill();
    const mirror = disk.mirror(MIB);
    disk.untilReady(mirror);
    const discard = disk.start(IoType.discard, 0, SIZE);
    await pivotOf(mirror);
    expect(isDone(discard)).toBe(true);
    expectSame('at the pivot');
    mirror.commitPivot();
  });

  it('is given up when a request takes too long, and everything goes on', async () => {
    open(stack(memory(), error()), memory());
    fill();
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('source').setRules([hang('read')]);
    const hanging = disk.start(IoType.read, 0, 512);
    const pivot = mirror.preparePivot();
    disk.rig.pass(10_000);
    const held = disk.startWrite(0, fresh(512));
    await expect(disk.settled(pivot)).rejects.toMatchObject({ code: 'busy' });
    disk.finish(held);
    errors('source').release();
    disk.finish(hanging);
    expectSame('after it');
    await pivotOf(mirror);
    mirror.commitPivot();
  });

  it('is given up when the flush of the target hangs: requests are not held for it for ever', async () => {
    open(memory(), stack(memory(), error()));
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('target').setRules([hang('flush')]);
    const pivot = mirror.preparePivot();
    disk.rig.pass(1000);
    const held = disk.startWrite(0, fresh(512));
    await expect(disk.settled(pivot)).rejects.toMatchObject({ code: 'busy' });
    expect(mirror.info).toMatchObject({ state: 'failed', error: 'flush of bdev target did not end in time' });
    disk.finish(held);
    expect(held.status).toBe(IoStatus.success);
  });

  it('is given up when the target cannot be flushed', async () => {
    open(memory(), stack(memory(), error()));
    const mirror = disk.mirror();
    disk.untilReady(mirror);
    errors('target').setRules([{ type: 'flush', action: 'fail', first: 1, count: 1 }]);
    await expect(pivotOf(mirror)).rejects.toMatchObject({ code: 'busy' });
    expect(mirror.info.state).toBe('failed');
    disk.write(0, fresh(512));
    expect(disk.open.bdev.name).toBe('source');
  });
});
