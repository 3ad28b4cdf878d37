/**
 * Goal: a disk gets another size as QEMU gives it, snapshots and bitmaps stay valid, what is new reads as zeroes, and a crash at any
 * write leaves the old size or the new one.
 * Method: images of every format beside a twin that qemu-img resizes; crashes after each operation, judged by qemu-img.
 */
import { afterAll, describe, expect, it } from 'vitest';
import { addBitmap, loadBitmap, storeBitmaps } from '../../../src/bdev/qcow2/edit/bitmaps.js';
import { resizeImage } from '../../../src/bdev/qcow2/edit/resize.js';
import type { ResizeOptions } from '../../../src/bdev/qcow2/edit/resize.js';
import { createSnapshot } from '../../../src/bdev/qcow2/edit/snapshots.js';
import { seededRandom } from '../../support/seed.js';
import { judgeCrashes } from './crash-judge.js';
import { headerOf, readDisk } from './plain-reader.js';
import { FORMATS, ImageFolder, check, content, info, newImage, qemuImg, qemuIo, randomWrites } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

const TIME = { seconds: 1, nanoseconds: 0 };

function resize(name: string, sizeBytes: number, options: ResizeOptions = {}): void {
  const file = new RecordingFile(folder.read(name));
  runTask(resizeImage(file, sizeBytes, { mayShrink: true, ...options }));
  folder.write(name, file.bytes);
}

describe.each(FORMATS)('an image with %s', (options) => {
  const random = seededRandom(FORMATS.indexOf(options));

  it('has the size and the content that qemu-img gives its twin', () => {
    const unit = options.includes('2097152') ? 2 ** 20 : 2 ** 18;
    const [ours, twin] = [folder.of('ours'), folder.of('twin')];
    folder.write('ours', newImage(folder, options, 4 * unit, random, 10));
    if (!options.includes('0.10')) qemuImg('snapshot', '-c', 'kept', ours);
    folder.copy('ours', 'twin');
    // Growing from an odd size shows what lies behind it: zeroes here, whatever was there in QEMU. So twins shrink to whole clusters.
    for (const sizeBytes of [7 * unit + 512, 2 * unit, 9 * unit, 4 * unit]) {
      const writes = randomWrites(random, sizeBytes, 4, options);
      resize('ours', sizeBytes);
      qemuImg('resize', '-q', '--shrink', '-f', 'qcow2', twin, String(sizeBytes));
      expect([sizeBytes, check(ours), info(ours)['virtual-size']]).toEqual([sizeBytes, '', sizeBytes]);
      expect(qemuImg('compare', ours, twin)).toMatch('identical');
      qemuIo(ours, ...writes);
      qemuIo(twin, ...writes);
      expect([check(ours), qemuImg('compare', ours, twin)]).toEqual(['', 'Images are identical.\n']);
    }
    if (!options.includes('0.10')) expect(content(ours, '1')).toBe(content(twin, '1'));
  });
});

describe('a disk that grows', () => {
  it.each(['metadata', 'falloc', 'full'] as const)(
    'has clusters for all that is new, with preallocation=%s',
    (mode) => {
      for (const options of [
        'cluster_size=4096',
        'cluster_size=16384,extended_l2=on',
        'compat=0.10,cluster_size=512',
      ]) {
        const random = seededRandom(3);
        const path = folder.write('grown', newImage(folder, options, 256 * 1024, random, 8));
        // Free clusters that hold something: it must not come to light.
        qemuIo(path, 'write -P 99 0 200k', 'discard 0 200k');
        const before = readDisk(folder.read('grown'), headerOf(folder.read('grown')).l1Offset, 256 * 1024);
        resize('grown', 1000 * 512 + 1024 * 1024, { preallocation: mode });
        const image = folder.read('grown');
        const { l1Offset, sizeBytes } = headerOf(image);
        const disk = readDisk(image, l1Offset, sizeBytes);
        expect([check(path), disk.subarray(0, before.length).equals(before)]).toEqual(['', true]);
        expect(disk.subarray(before.length).every((byte) => byte === 0)).toBe(true);
        const map = JSON.parse(qemuImg('map', '--output', 'json', path)) as { start: number; offset?: number }[];
        expect(map.filter(({ start }) => start >= 256 * 1024).every(({ offset }) => offset !== undefined)).toBe(true);
      }
    },
  );

  it('does not show what its larger backing file holds', () => {
    const random = seededRandom(4);
    const held = Buffer.from(Array.from({ length: 512 * 1024 }, () => 1 + random.below(255)));
    const backing = {
      sizeBytes: held.length,
      *read(offset: number, bytes: Uint8Array) {
        bytes.fill(0);
        bytes.set(held.subarray(offset, offset + bytes.length));
      },
    };
    folder.write('base', held);
    for (const options of ['cluster_size=4096', 'cluster_size=16384,extended_l2=on']) {
      for (const oldSize of [128 * 1024, 128 * 1024 + 1536]) {
        const path = folder.of('overlay');
        qemuImg(
          'create',
          '-q',
          '-f',
          'qcow2',
          '-o',
          options,
          '-b',
          folder.of('base'),
          '-F',
          'raw',
          path,
          String(oldSize),
        );
        qemuIo(path, 'write -P 5 8k 4k');
        folder.copy('overlay', 'twin');
        resize('overlay', 400 * 1024, { backing });
        qemuImg('resize', '-q', folder.of('twin'), String(400 * 1024));
        expect([check(path), qemuImg('compare', path, folder.of('twin'))]).toEqual(['', 'Images are identical.\n']);
      }
    }
    const old = new RecordingFile(
      (qemuImg(
        'create',
        '-q',
        '-f',
        'qcow2',
        '-o',
        'compat=0.10',
        '-b',
        folder.of('base'),
        '-F',
        'raw',
        folder.of('v2'),
        '64k',
      ),
      folder.read('v2')),
    );
    expect(() => runTask(resizeImage(old, 128 * 1024, { backing }))).toThrow('cannot hide');
    expect(() => runTask(resizeImage(old, 128 * 1024))).toThrow('was not opened');
    expect(old.writes).toBe(0);
  });

  it('does not show what it lost when it became smaller', () => {
    for (const options of ['cluster_size=4096', 'cluster_size=16384,extended_l2=on']) {
      const path = folder.of('shrunk');
      qemuImg('create', '-q', '-f', 'qcow2', '-o', options, path, '256k');
      qemuIo(path, 'write -P 7 0 256k');
      qemuImg('snapshot', '-c', 'whole', path);
      const whole = content(path, '1');
      resize('shrunk', 100 * 1024 + 512);
      resize('shrunk', 256 * 1024);
      const image = folder.read('shrunk');
      const disk = readDisk(image, headerOf(image).l1Offset, 256 * 1024);
      expect(disk.equals(Buffer.concat([Buffer.alloc(100 * 1024 + 512, 7), Buffer.alloc(156 * 1024 - 512)]))).toBe(
        true,
      );
      expect([check(path), content(path, '1')]).toEqual(['', whole]);
    }
  });

  it('takes its external data file along', () => {
    for (const raw of ['on', 'off']) {
      const path = folder.of('external');
      const data = folder.of('external.data');
      qemuImg(
        'create',
        '-q',
        '-f',
        'qcow2',
        '-o',
        `cluster_size=4096,data_file=${data},data_file_raw=${raw}`,
        path,
        '64k',
      );
      qemuIo(path, 'write -P 3 0 64k');
      const dataFile = new RecordingFile(folder.read('external.data'));
      resize('external', 5 * 1024 * 1024, { dataFile });
      folder.write('external.data', dataFile.bytes);
      expect([check(path), dataFile.sizeBytes]).toEqual(['', 5 * 1024 * 1024]);
      qemuIo(path, 'write -P 4 4M 1M', 'read -P 3 0 64k', 'read -P 0 64k 1M');
      expect(check(path)).toBe('');
    }
  });
});

it('resizes bitmaps with the disk: what is new is clean', () => {
  const random = seededRandom(8);
  const file = new RecordingFile(newImage(folder, 'cluster_size=4096', 2 ** 20, random, 4));
  runTask(addBitmap(file, { name: 'b', granularityBits: 9 }));
  const bits = runTask(loadBitmap(file, 'b'));
  bits.set(0, 5000);
  bits.set(2 ** 20 - 700, 700);
  runTask(storeBitmaps(file, new Map([['b', bits]])));
  runTask(resizeImage(file, 64 * 2 ** 20));
  expect([...runTask(loadBitmap(file, 'b')).ranges()]).toEqual([
    { offset: 0, lengthBytes: 5120 },
    { offset: 2 ** 20 - 1024, lengthBytes: 1024 },
  ]);
  expect(check(folder.write('bits', file.bytes))).toBe('');
  runTask(resizeImage(file, 1024, { mayShrink: true }));
  runTask(resizeImage(file, 2 ** 20));
  expect([...runTask(loadBitmap(file, 'b')).ranges()]).toEqual([{ offset: 0, lengthBytes: 1024 }]);
  expect(check(folder.write('bits', file.bytes))).toBe('');
});

it('refuses what QEMU refuses, and writes nothing', () => {
  const random = seededRandom(9);
  const file = new RecordingFile(newImage(folder, 'cluster_size=512', 2 ** 20, random, 4));
  const refused = (sizeBytes: number, options: ResizeOptions, message: RegExp): void => {
    expect(() => runTask(resizeImage(file, sizeBytes, options))).toThrow(message);
  };
  refused(2 ** 19, {}, /data would be lost/);
  refused(2 ** 19, { mayShrink: true, preallocation: 'full' }, /nothing to preallocate/);
  refused(1000, { mayShrink: true }, /multiple of 512/);
  refused(0, { mayShrink: true }, /positive/);
  refused(2 ** 40, {}, /L1 table of more than/);
  refused(2 ** 53, {}, /L1 table of more than/);
  expect(file.operations).toEqual([]);
  const old = new RecordingFile(newImage(folder, 'compat=0.10', 2 ** 20, random, 4));
  runTask(createSnapshot(old, { name: 'a', ...TIME }));
  const { writes } = old;
  expect(() => runTask(resizeImage(old, 2 ** 21))).toThrow('has snapshots');
  expect(old.writes).toBe(writes);
});

describe.each(['cluster_size=4096', 'cluster_size=16384,extended_l2=on', 'cluster_size=512,refcount_bits=64'])(
  'a crash in an image with %s',
  (options) => {
    it('leaves the old size or the new one', () => {
      const random = seededRandom(options.length);
      let image = newImage(folder, options, 200 * 1024 + 512, random, 8);
      const judge = (sizeBytes: number, more: ResizeOptions = {}): void => {
        const task = (file: RecordingFile): ReturnType<typeof resizeImage> =>
          resizeImage(file, sizeBytes, { mayShrink: true, ...more });
        image = judgeCrashes(folder, image, task, random).after;
      };
      judge(2 ** 20);
      const file = new RecordingFile(image);
      runTask(createSnapshot(file, { name: 'kept', ...TIME }));
      runTask(addBitmap(file, { name: 'b', granularityBits: 9 }));
      const bits = runTask(loadBitmap(file, 'b'));
      bits.set(0, 70000);
      runTask(storeBitmaps(file, new Map([['b', bits]])));
      image = file.bytes;
      judge(60 * 1024 + 512);
      judge(120 * 1024, { preallocation: 'metadata' });
    });
  },
);
