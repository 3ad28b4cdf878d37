/**
 * Goal: persistent dirty bitmaps are kept as QEMU keeps them: it reads ours, we read its, and a crash at any write leaves the
 * bitmaps as they were, as they are to be, or marked as not to be trusted.
 * Method: qemu-img and qemu-io make and change bitmaps, and say what is dirty; a model of bits; crashes after each operation.
 */
import { afterAll, describe, expect, it } from 'vitest';
import { BitmapBits } from '../../../src/bdev/qcow2/edit/bitmap-bits.js';
import {
  addBitmap,
  clearBitmap,
  enableBitmap,
  listBitmaps,
  loadBitmap,
  markBitmapsInUse,
  mergeBitmaps,
  removeBitmap,
  storeBitmaps,
} from '../../../src/bdev/qcow2/edit/bitmaps.js';
import { createSnapshot } from '../../../src/bdev/qcow2/edit/snapshots.js';
import type { Task } from '../../../src/bdev/task.js';
import { seededRandom } from '../../support/seed.js';
import { judgeCrashes } from './crash-judge.js';
import { headerOf } from './plain-reader.js';
import { ImageFolder, check, info, newImage, qemuImg, qemuIo } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

const SIZE = 4 * 2 ** 20;

function edit<T>(name: string, task: (file: RecordingFile) => Task<T>): T {
  const file = new RecordingFile(folder.read(name));
  const result = runTask(task(file));
  folder.write(name, file.bytes);
  return result;
}

function ranges(name: string, bitmap: string): [number, number][] {
  return [...edit(name, (file) => loadBitmap(file, bitmap)).ranges()].map((range) => [range.offset, range.lengthBytes]);
}

/** What QEMU finds dirty in a bitmap: it merges it into one of its own, which is read from the image then. */
function qemuRanges(name: string, bitmap: string): [number, number][] {
  folder.copy(name, 'merged');
  const path = folder.of('merged');
  const { granularity } = info(path)['format-specific'].data.bitmaps!.find((found) => found.name === bitmap)!;
  qemuImg('bitmap', '-g', String(granularity), '--add', '--merge', bitmap, path, 'by-qemu');
  return ranges('merged', 'by-qemu');
}

describe.each(['cluster_size=512', 'cluster_size=4096', 'cluster_size=65536', 'cluster_size=65536,extended_l2=on'])(
  'bitmaps in an image with %s',
  (options) => {
    const random = seededRandom(options.length);

    it('record what QEMU writes, and are read as they are stored', () => {
      const path = folder.write('image', newImage(folder, options, SIZE, random, 3));
      edit('image', (file) => addBitmap(file, { name: 'on', granularityBits: 12 }));
      edit('image', (file) => addBitmap(file, { name: 'off', granularityBits: 16, isDisabled: true }));
      edit('image', (file) => addBitmap(file, { name: 'default' }));
      const found = info(path)['format-specific'].data.bitmaps!;
      const usual = Math.max(4096, Math.min(65536, 2 ** headerOf(folder.read('image')).clusterBits));
      expect(found.map(({ name, granularity, flags }) => [name, granularity, flags])).toEqual([
        ['on', 4096, ['auto']],
        ['off', 65536, []],
        ['default', usual, ['auto']],
      ]);
      qemuIo(path, 'write 8k 5000', 'write 1M 64k', 'write -z 2M 4k', 'write 4190208 512');
      expect(ranges('image', 'on')).toEqual([
        [8192, 8192],
        [2 ** 20, 65536],
        [2 * 2 ** 20, 4096],
        [4190208, 4096],
      ]);
      expect(ranges('image', 'off')).toEqual([]);
      expect(check(path)).toBe('');
      edit('image', (file) => enableBitmap(file, 'off', true));
      edit('image', (file) => enableBitmap(file, 'on', false));
      qemuIo(path, 'write 0 512');
      expect(ranges('image', 'off')).toEqual([[0, 65536]]);
      expect(ranges('image', 'on')[0]).toEqual([8192, 8192]);
      edit('image', (file) => mergeBitmaps(file, 'on', ['off', 'default']));
      expect(ranges('image', 'on')[0]).toEqual([0, 65536]);
      edit('image', (file) => clearBitmap(file, 'default'));
      edit('image', (file) => removeBitmap(file, 'off'));
      expect([ranges('image', 'default'), check(path)]).toEqual([[], '']);
      edit('image', (file) => removeBitmap(file, 'default'));
      edit('image', (file) => removeBitmap(file, 'on'));
      expect([info(path)['format-specific'].data.bitmaps, check(path)]).toEqual([undefined, '']);
    });

    it('are read where all of their bits are set, which takes no cluster', () => {
      const path = folder.write('image', newImage(folder, options, SIZE, random, 3));
      qemuImg('bitmap', '--add', path, 'all');
      qemuIo(path, `write 0 ${SIZE}`);
      edit('image', (file) => mergeBitmaps(file, 'all', ['all']));
      expect([ranges('image', 'all'), qemuRanges('image', 'all'), check(path)]).toEqual([[[0, SIZE]], [[0, SIZE]], '']);
    });

    it('hold any bits, and QEMU finds the same', () => {
      const path = folder.write('image', newImage(folder, options, SIZE + 512, random, 3));
      qemuImg('bitmap', '--add', '-g', '512', path, 'made by qemu');
      const bits = new BitmapBits(SIZE + 512, 9);
      for (const [offset, length] of [
        [0, 512],
        [700, 300_000],
        [2 ** 20, 3 * 2 ** 20],
        [SIZE, 512],
      ] as const) {
        bits.set(offset, length);
        edit('image', (file) => storeBitmaps(file, new Map([['made by qemu', bits]])));
        expect(qemuRanges('image', 'made by qemu')).toEqual(
          [...bits.ranges()].map((range) => [range.offset, range.lengthBytes]),
        );
        expect(check(path)).toBe('');
      }
      bits.set(0, SIZE + 512);
      edit('image', (file) => storeBitmaps(file, new Map([['made by qemu', bits]])));
      expect(qemuRanges('image', 'made by qemu')).toEqual([[0, SIZE + 512]]);
    });
  },
);

describe('a bitmap', () => {
  const random = seededRandom(5);
  const image = (): RecordingFile => new RecordingFile(newImage(folder, 'cluster_size=4096', SIZE, random, 3));

  it('that is in use is marked before its bits get ahead, and is not trusted until it is stored', () => {
    const file = image();
    runTask(addBitmap(file, { name: 'a' }));
    runTask(addBitmap(file, { name: 'b' }));
    const bits = runTask(loadBitmap(file, 'a'));
    const before = file.writes;
    runTask(markBitmapsInUse(file, ['a']));
    expect([file.writes - before, file.operations.at(-1)]).toEqual([1, { type: 'sync' }]);
    const path = folder.write('used', file.bytes);
    expect(info(path)['format-specific'].data.bitmaps!.map(({ flags }) => flags)).toEqual([
      ['in-use', 'auto'],
      ['auto'],
    ]);
    for (const task of [
      loadBitmap(file, 'a'),
      clearBitmap(file, 'a'),
      enableBitmap(file, 'a', false),
      mergeBitmaps(file, 'b', ['a']),
      markBitmapsInUse(file, ['a']),
    ]) {
      expect(() => runTask<unknown>(task)).toThrow('was in use when a program ended');
    }
    bits.set(0, 1);
    runTask(storeBitmaps(file, new Map([['a', bits]])));
    folder.write('used', file.bytes);
    expect([check(path), ranges('used', 'a')]).toEqual(['', [[0, 4096]]]);
    runTask(markBitmapsInUse(file, ['a', 'b']));
    runTask(removeBitmap(file, 'a'));
    expect(runTask(listBitmaps(file)).map(({ name, flags }) => [name, flags])).toEqual([['b', 3]]);
  });

  it('is gone when a program that does not know it has written to the image', () => {
    const file = image();
    runTask(addBitmap(file, { name: 'a' }));
    const bytes = Buffer.from(file.bytes);
    bytes.writeBigUInt64BE(0n, 88);
    const stale = new RecordingFile(bytes);
    expect(runTask(listBitmaps(stale))).toEqual([]);
    runTask(addBitmap(stale, { name: 'a' }));
    const path = folder.write('stale', stale.bytes);
    expect([check(path), info(path)['format-specific'].data.bitmaps!.length]).toEqual(['leaks', 1]);
  });

  it('is refused where QEMU refuses it, and nothing is written', () => {
    const file = image();
    runTask(addBitmap(file, { name: 'a' }));
    const { writes } = file;
    const refused = (task: Task<unknown>, message: string): void => expect(() => runTask(task)).toThrow(message);
    refused(addBitmap(file, { name: 'a' }), 'has a bitmap "a"');
    refused(addBitmap(file, { name: '' }), 'may have 1 to 1023');
    refused(addBitmap(file, { name: 'x'.repeat(1024) }), 'may have 1 to 1023');
    refused(addBitmap(file, { name: 'b', granularityBits: 8 }), 'granularity is 256 bytes');
    refused(addBitmap(file, { name: 'b', granularityBits: 32 }), 'granularity is 4294967296 bytes');
    refused(removeBitmap(file, 'b'), 'no bitmap "b"');
    refused(storeBitmaps(file, new Map([['a', new BitmapBits(512, 12)]])), 'not those of the bitmap a');
    expect(file.writes).toBe(writes);
    expect(() => new BitmapBits(2 ** 42, 9)).toThrow('the most is');
    const old = new RecordingFile(newImage(folder, 'compat=0.10', SIZE, random, 3));
    refused(addBitmap(old, { name: 'a' }), 'version is 2');
    expect(old.writes).toBe(0);
  });

  it('with a table that leads outside is refused, and nothing is written', () => {
    const file = image();
    runTask(addBitmap(file, { name: 'a' }));
    const [bitmap] = runTask(listBitmaps(file));
    for (const entry of [0x1200n, 0x00ff000000000000n]) {
      const bytes = Buffer.from(file.bytes);
      bytes.writeBigUInt64BE(entry, bitmap!.tableOffset);
      const hostile = new RecordingFile(bytes);
      for (const task of [removeBitmap, clearBitmap, loadBitmap]) {
        expect(() => runTask<unknown>(task(hostile, 'a'))).toThrow(/table\[0\]/);
      }
      expect(hostile.writes).toBe(0);
    }
  });

  it('is the same as a model of bits, of any granularity', () => {
    const sizeBytes = 1_000_000 - (1_000_000 % 512);
    const bits = new BitmapBits(sizeBytes, 9);
    const coarse = new BitmapBits(sizeBytes, 13);
    const model = new Uint8Array(bits.count);
    for (let i = 0; i < 300; i++) {
      const offset = random.below(sizeBytes);
      const length = 1 + random.below(Math.min(40_000, sizeBytes - offset));
      const isSet = random.below(3) > 0;
      if (isSet) {
        bits.set(offset, length);
        model.fill(1, Math.floor(offset / 512), Math.ceil((offset + length) / 512));
      } else {
        bits.clear(offset, length);
        const end = offset + length === sizeBytes ? model.length : Math.floor((offset + length) / 512);
        model.fill(0, Math.ceil(offset / 512), Math.max(Math.ceil(offset / 512), end));
      }
      const found = new Uint8Array(bits.count);
      for (const range of bits.ranges()) found.fill(1, range.offset / 512, (range.offset + range.lengthBytes) / 512);
      expect(Buffer.from(found).equals(model)).toBe(true);
      expect(bits.dirtyBytes).toBe(model.reduce((sum, bit) => sum + bit * 512, 0));
    }
    coarse.merge(bits);
    model.forEach((bit, i) => {
      if (bit === 1) expect(coarse.isDirty(i * 512)).toBe(true);
    });
    const fine = new BitmapBits(sizeBytes, 9);
    fine.merge(coarse);
    expect([...fine.ranges()]).toEqual([...coarse.ranges()]);
  });
});

describe.each(['cluster_size=4096', 'cluster_size=512', 'cluster_size=65536'])(
  'a crash in an image with %s',
  (options) => {
    it('leaves the bitmaps as they were or as they are to be', () => {
      const random = seededRandom(options.length);
      // QEMU's header has its extensions for bitmaps across two sectors.
      const path = folder.write('image', newImage(folder, options, SIZE, random, 3));
      if (options !== 'cluster_size=512') qemuImg('bitmap', '--add', path, 'made by qemu');
      let image = folder.read('image');
      let crashes = 0;
      const judge = (task: (file: RecordingFile) => Task<unknown>): void => {
        const judged = judgeCrashes(folder, image, task, random);
        crashes += judged.crashes;
        image = judged.after;
      };
      const bits = new BitmapBits(SIZE, 9);
      bits.set(1000, 2_000_000);
      judge((file) => addBitmap(file, { name: 'a', granularityBits: 9 }));
      judge((file) => markBitmapsInUse(file, ['a']));
      judge((file) => storeBitmaps(file, new Map([['a', bits]])));
      judge((file) => createSnapshot(file, { name: 's', seconds: 1, nanoseconds: 1 }));
      judge((file) => enableBitmap(file, 'a', false));
      judge((file) => clearBitmap(file, 'a'));
      judge((file) => removeBitmap(file, 'a'));
      expect(crashes).toBeGreaterThan(20);
    });
  },
);
