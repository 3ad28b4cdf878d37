/**
 * Goal: snapshots are taken, applied and deleted as QEMU does it, and a crash at any write leaves the image as it was or as it is to
 * be, with nothing for `qemu-img check` to say.
 * Method: images with random content of every kind, in every format; the same operations on a twin by qemu-img; then crashes
 * after each operation on the file, judged by qemu-img.
 */
import { createHash } from 'node:crypto';
import { afterAll, describe, expect, it } from 'vitest';
import {
  applySnapshot,
  createSnapshot,
  deleteSnapshot,
  listSnapshots,
} from '../../../src/bdev/qcow2/edit/snapshots.js';
import { addBitmap } from '../../../src/bdev/qcow2/edit/bitmaps.js';
import { seededRandom } from '../../support/seed.js';
import { imageEnd } from '../../../src/bdev/qcow2/edit/image-edit.js';
import type { Task } from '../../../src/bdev/task.js';
import { NodeFile } from '../../../src/target/img/node-file.js';
import { judgeCrashes } from './crash-judge.js';
import { headerOf, readDisk } from './plain-reader.js';
import {
  FORMATS,
  ImageFolder,
  check,
  content,
  info,
  newImage as newRandomImage,
  qemuImg,
  qemuIo,
  randomWrites,
} from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

const TIME = { seconds: 1_700_000_000, nanoseconds: 5 };

/** Runs an edit on an image's file. */
function edit<T>(name: string, task: (file: RecordingFile) => Task<T>): T {
  const file = new RecordingFile(folder.read(name));
  const result = runTask(task(file));
  folder.write(name, file.bytes);
  return result;
}

function newImage(options: string, sizeBytes: number, writes: number): Buffer {
  return newRandomImage(folder, options, sizeBytes, seededRandom(77), writes);
}

describe.each(FORMATS)('an image with %s', (options) => {
  const random = seededRandom(FORMATS.indexOf(options));
  const sizeBytes = 1024 * 1024 * (options.includes('2097152') ? 4 : 1);

  it('has the snapshots that qemu-img gives its twin', () => {
    const [ours, twin] = [folder.of('ours'), folder.of('twin')];
    qemuImg('create', '-q', '-f', 'qcow2', '-o', options, ours, String(sizeBytes));
    qemuIo(ours, ...randomWrites(random, sizeBytes, 12, options));
    folder.copy('ours', 'twin');
    const ids: string[] = [];
    const step = (what: string): void => {
      expect(check(ours), what).toBe('');
      expect(qemuImg('compare', ours, twin), what).toMatch('identical');
      expect(info(ours).snapshots?.map(({ id, name }) => [id, name])).toEqual(
        info(twin).snapshots?.map(({ id, name }) => [id, name]),
      );
    };
    const steps = options.includes('2097152') ? 2 : 5;
    for (let i = 0; i < steps; i++) {
      const writes = randomWrites(random, sizeBytes, 5, options);
      qemuIo(ours, ...writes);
      qemuIo(twin, ...writes);
      const kind = random.below(4);
      if (kind === 2 && ids.length > 0) {
        const [id] = ids.splice(random.below(ids.length), 1) as [string];
        edit('ours', (file) => deleteSnapshot(file, id));
        qemuImg('snapshot', '-d', `s${id}`, twin);
        step(`delete ${id}`);
      } else if (kind === 3 && ids.length > 0) {
        const id = ids[random.below(ids.length)]!;
        edit('ours', (file) => applySnapshot(file, id));
        qemuImg('snapshot', '-a', id, twin);
        step(`apply ${id}`);
      } else {
        const next = String(Math.max(0, ...ids.map(Number)) + 1);
        const { id } = edit('ours', (file) => createSnapshot(file, { name: `s${next}`, ...TIME }));
        expect(id).toBe(next);
        qemuImg('snapshot', '-c', `s${next}`, twin);
        ids.push(id);
        step(`create ${id}`);
      }
    }
    for (const id of ids) expect(content(ours, id)).toBe(content(twin, id));
  });
});

describe.each([
  'compat=0.10,cluster_size=4096',
  'cluster_size=512,refcount_bits=8',
  'cluster_size=16384,extended_l2=on',
])('a crash in an image with %s', (options) => {
  const random = seededRandom(options.length);

  it('leaves the snapshots as they were or as they are to be', () => {
    let image = newImage(options, 256 * 1024, 10);
    let crashes = 0;
    const writes = (): void => {
      folder.write('next', image);
      qemuIo(folder.of('next'), ...randomWrites(random, 256 * 1024, 4, options));
      image = folder.read('next');
    };
    const judge = (task: (file: RecordingFile) => Task<unknown>): void => {
      const judged = judgeCrashes(folder, image, task, random);
      crashes += judged.crashes;
      image = judged.after;
    };
    judge((file) => createSnapshot(file, { name: 'first', ...TIME }));
    writes();
    judge((file) => createSnapshot(file, { name: 'second', ...TIME }));
    writes();
    judge((file) => applySnapshot(file, 'first'));
    judge((file) => deleteSnapshot(file, 'second'));
    judge((file) => deleteSnapshot(file, '1'));
    expect(crashes).toBeGreaterThan(20);
  });
});

describe('snapshots', () => {
  it('are read by a plain reader as qemu-img reads them', () => {
    const image = newImage('cluster_size=4096', 256 * 1024, 10);
    const file = new RecordingFile(image);
    const { id } = runTask(createSnapshot(file, { name: 'kept', ...TIME }));
    const path = folder.write('kept', file.bytes);
    qemuIo(path, 'write -P 9 0 200k');
    const after = folder.read('kept');
    const { l1Offset, sizeBytes } = runTask(listSnapshots(new RecordingFile(after)))[0]!;
    const hash = (bytes: Buffer): string => createHash('sha1').update(bytes).digest('hex');
    expect(hash(readDisk(after, l1Offset, sizeBytes))).toBe(content(path, id));
    expect(hash(readDisk(after, headerOf(after).l1Offset, sizeBytes))).toBe(content(path));
  });

  it('have names of any letters, more than one of the same, and the time they were given', () => {
    const file = new RecordingFile(newImage('compat=1.1', 1024 * 1024, 2));
    runTask(createSnapshot(file, { name: 'vor dem Ändern ✓', ...TIME }));
    runTask(createSnapshot(file, { name: 'vor dem Ändern ✓', ...TIME }));
    const path = folder.write('names', file.bytes);
    const lines = qemuImg('snapshot', '-l', path).split('\n');
    expect(lines.filter((line) => line.includes('vor dem Ändern ✓'))).toHaveLength(2);
    expect(lines[2]).toMatch(/^1 .*0 B 2023-11-1[45] \d\d:13:20 00:00:00.000/);
    // Of two with one name the first is meant.
    runTask(deleteSnapshot(file, 'vor dem Ändern ✓'));
    expect(runTask(listSnapshots(file)).map(({ id }) => id)).toEqual(['2']);
  });

  it('give back what only they held, and the file can be cut where its last cluster ends', () => {
    const path = folder.of('sparse');
    qemuImg('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=65536', path, '64M');
    qemuIo(path, 'write -P 1 0 64M');
    const file = new NodeFile(path, { mode: 'write' });
    runTask(createSnapshot(file, { name: 'whole', ...TIME }));
    file.close();
    qemuIo(path, 'write -P 2 0 64M');
    const disk = content(path);
    const again = new NodeFile(path, { mode: 'write' });
    const before = again.allocatedBytes;
    runTask(deleteSnapshot(again, 'whole'));
    expect(before - again.allocatedBytes).toBeGreaterThan(63 * 2 ** 20);
    const end = runTask(imageEnd(again));
    again.truncate(end);
    again.close();
    const checked = JSON.parse(qemuImg('check', '--output', 'json', path)) as { 'image-end-offset': number };
    expect([checked['image-end-offset'], check(path), content(path)]).toEqual([end, '', disk]);
  });

  it('bring back the size that the disk had', () => {
    const path = folder.write('sized', newImage('cluster_size=4096', 1024 * 1024, 6));
    const before = content(path);
    edit('sized', (file) => createSnapshot(file, { name: 'small', ...TIME }));
    qemuImg('resize', '-q', path, '40M');
    qemuIo(path, 'write -P 7 30M 1M');
    edit('sized', (file) => createSnapshot(file, { name: 'large', ...TIME }));
    const large = content(path, '2');
    edit('sized', (file) => applySnapshot(file, 'small'));
    expect([check(path), info(path)['virtual-size'], content(path)]).toEqual(['', 1024 * 1024, before]);
    edit('sized', (file) => applySnapshot(file, 'large'));
    expect([check(path), info(path)['virtual-size'], content(path)]).toEqual(['', 40 * 2 ** 20, large]);
  });

  it.each([
    ['refcount_bits=1', 0],
    ['refcount_bits=2', 2],
  ])('are refused when a refcount of %s cannot hold one more, and nothing is written', (options, possible) => {
    const path = folder.of('narrow');
    qemuImg('create', '-q', '-f', 'qcow2', '-o', options, path, '1M');
    // Nothing compressed: of those several share a cluster.
    qemuIo(path, 'write 0 200k', 'write -z 300k 100k');
    const file = new RecordingFile(folder.read('narrow'));
    for (let i = 0; i < possible; i++) runTask(createSnapshot(file, { name: `s${i}`, ...TIME }));
    const { writes } = file;
    expect(() => runTask(createSnapshot(file, { name: 'one more', ...TIME }))).toThrow(/cannot have \d users/);
    expect(file.writes).toBe(writes);
    expect(check(folder.write('full', file.bytes))).toBe('');
  });

  it('are refused where QEMU refuses them', () => {
    const path = folder.of('external');
    qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${folder.of('data')}`, path, '1M');
    const external = new RecordingFile(folder.read('external'));
    expect(() => runTask(createSnapshot(external, { name: 'a', ...TIME }))).toThrow('external file');
    const file = new RecordingFile(newImage('compat=1.1', 1024 * 1024, 2));
    runTask(createSnapshot(file, { name: 'a', ...TIME }));
    expect(() => runTask(applySnapshot(file, 'b'))).toThrow('no snapshot "b"');
    qemuImg('bitmap', '--add', folder.write('tracked', file.bytes), 'backup');
    const tracked = new RecordingFile(folder.read('tracked'));
    expect(() => runTask(applySnapshot(tracked, 'a'))).toThrow('track what is written');
    expect(tracked.writes + external.writes).toBe(0);
  });
});

describe('an image that lies', () => {
  const make = (options = 'cluster_size=4096'): Buffer => newImage(options, 256 * 1024, 12);
  const refuse = (image: Buffer, message: RegExp): void => {
    for (const task of [createSnapshot, (file: RecordingFile) => applySnapshot(file, '1')]) {
      const file = new RecordingFile(image);
      expect(() => runTask(task(file, { name: 'a', ...TIME }) as Task<unknown>)).toThrow(message);
      expect(file.writes).toBe(0);
    }
  };
  const withSnapshot = (image: Buffer): Buffer => {
    const file = new RecordingFile(image);
    runTask(createSnapshot(file, { name: 's', ...TIME }));
    return file.bytes;
  };
  /** Where the first refcount block is. */
  const blockOf = (image: Buffer): number => Number(image.readBigUInt64BE(headerOf(image).refcountTableOffset));

  it('about where an L2 table is, or a cluster, is refused', () => {
    const image = withSnapshot(make());
    const { l1Offset } = headerOf(image);
    const l2 = Number(image.readBigUInt64BE(l1Offset) & 0x00fffffffffffe00n);
    const table = Buffer.from(image);
    table.writeBigUInt64BE((1n << 63n) | 0x1200n, l1Offset);
    refuse(table, /l1\[0\].*not the start of a cluster/);
    table.writeBigUInt64BE(0x00ff000000000000n, l1Offset);
    refuse(table, /l1\[0\].*beyond the end/);
    const entry = Buffer.from(image);
    entry.writeBigUInt64BE((1n << 63n) | 0x200n, l2);
    refuse(entry, /l2\[0\]\[0\].*not the start of a cluster/);
    entry.writeBigUInt64BE((1n << 63n) | 0x7f000n, l2 + 8);
  });

  it('about refcounts is refused before anything is written', () => {
    const image = withSnapshot(make());
    const block = blockOf(image);
    const none = Buffer.from(image);
    none.fill(0, block, block + 4096);
    refuse(none, /where the refcount is 0/);
    // Only the metadata that an edit moves is counted.
    const { l1Offset, refcountTableOffset, snapshotTableOffset } = headerOf(image);
    for (const offset of [0, l1Offset, refcountTableOffset, snapshotTableOffset]) {
      none.writeUInt16BE(1, block + (offset / 4096) * 2);
    }
    refuse(none, /count fewer users/);
  });

  it('about free clusters does not get its metadata overwritten', () => {
    const image = make();
    const { l1Offset } = headerOf(image);
    const l2 = Number(image.readBigUInt64BE(l1Offset) & 0x00fffffffffffe00n);
    image.fill(0, l2, l2 + 4096);
    image.writeUInt16BE(0, blockOf(image) + (l2 / 4096) * 2);
    const file = new RecordingFile(image);
    // A bitmap's table looks at no L2 table: only the check of what is handed out is in the way.
    expect(() => runTask(addBitmap(file, { name: 'b' }))).toThrow('metadata lies there');
    expect(file.writes).toBe(0);
  });

  it('is not changed when it is marked as corrupt or dirty', () => {
    const image = withSnapshot(make());
    for (const bits of [1n, 2n]) {
      image.writeBigUInt64BE(bits, 72);
      refuse(image, /corrupt|dirty/);
    }
  });
});
