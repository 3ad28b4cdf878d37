/**
 * Goal: an edit of an image that is damaged in any way, or whose file fails, ends with an error that says so or with an edited image;
 * never in another way, and never with anything changed that the image uses.
 * Method: random damage to all kinds of metadata, and every operation on the file failing in turn; VM state and encryption.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { ChannelFile } from '../../../src/bdev/qcow2/channel-file.js';
import {
  addBitmap,
  clearBitmap,
  enableBitmap,
  loadBitmap,
  markBitmapsInUse,
  mergeBitmaps,
  removeBitmap,
  storeBitmaps,
} from '../../../src/bdev/qcow2/edit/bitmaps.js';
import { changeBackingFile } from '../../../src/bdev/qcow2/edit/header.js';
import { resizeImage } from '../../../src/bdev/qcow2/edit/resize.js';
import {
  applySnapshot,
  createSnapshot,
  deleteSnapshot,
  listSnapshots,
} from '../../../src/bdev/qcow2/edit/snapshots.js';
import type { ImageFile } from '../../../src/bdev/qcow2/image-file.js';
import { completeTask } from '../../../src/bdev/task.js';
import type { Task } from '../../../src/bdev/task.js';
import type { UringConfig } from '../../../src/bdev/uring/uring.js';
import { Rig } from '../../support/rig.js';
import { seed, seededRandom } from '../../support/seed.js';
import { headerOf, plainState } from './plain-reader.js';
import { ImageFolder, check, content, newImage, qemuImg, qemuIo } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

const CASES = 3000;
const SIZE = 2 ** 20;
const TIME = { seconds: 1, nanoseconds: 1 };
const EDITS: Readonly<Record<string, (file: ImageFile) => Task<unknown>>> = {
  createSnapshot: (file) => createSnapshot(file, { name: 'x', ...TIME }),
  deleteSnapshot: (file) => deleteSnapshot(file, '1'),
  applySnapshot: (file) => applySnapshot(file, '1'),
  grow: (file) => resizeImage(file, 3 * SIZE, { preallocation: 'metadata', backing: null }),
  shrink: (file) => resizeImage(file, SIZE / 2 + 512, { mayShrink: true }),
  addBitmap: (file) => addBitmap(file, { name: 'n' }),
  removeBitmap: (file) => removeBitmap(file, 'b'),
  clearBitmap: (file) => clearBitmap(file, 'b'),
  enableBitmap: (file) => enableBitmap(file, 'b', false),
  mergeBitmaps: (file) => mergeBitmaps(file, 'b', ['b']),
  markBitmapsInUse: (file) => markBitmapsInUse(file, ['b']),
  changeBackingFile: (file) => changeBackingFile(file, '/x', 'raw'),
};

/** An image with a bit of everything. */
function fullImage(options: string): Buffer {
  const file = new RecordingFile(newImage(folder, options, SIZE, seededRandom(options.length), 10));
  runTask(createSnapshot(file, { name: 'a', ...TIME }));
  if (!options.includes('0.10')) {
    runTask(addBitmap(file, { name: 'b', granularityBits: 9 }));
    const bits = runTask(loadBitmap(file, 'b'));
    bits.set(5, 70_000);
    runTask(storeBitmaps(file, new Map([['b', bits]])));
  }
  runTask(createSnapshot(file, { name: 'c', ...TIME }));
  return file.bytes;
}

const FULL = ['cluster_size=4096', 'cluster_size=512', 'cluster_size=16384,extended_l2=on', 'compat=0.10'].map(
  fullImage,
);

it('damage anywhere in the metadata is an error or does no harm', () => {
  const random = seededRandom(4711);
  const values32 = [0, 1, 512, 4096, 0x7fffffff, 0x80000000, 0xffffffff];
  const values64 = [0n, 512n, 4096n, 12288n, 1n << 53n, 1n << 63n, (1n << 63n) | 4096n, (1n << 64n) - 1n];
  const names = Object.keys(EDITS);
  let refused = 0;
  for (let n = 0; n < CASES; n++) {
    const whole = FULL[random.below(FULL.length)]!;
    const { l1Offset, refcountTableOffset, snapshotTableOffset, bitmaps } = headerOf(whole);
    const hostAt = (at: number): number => Number(whole.readBigUInt64BE(at) & 0x00fffffffffffe00n);
    const places = [0, l1Offset, refcountTableOffset, snapshotTableOffset, bitmaps?.directoryOffset ?? 0];
    places.push(hostAt(refcountTableOffset), hostAt(l1Offset));
    const image = Buffer.from(whole);
    for (let k = random.below(3); k >= 0; k--) {
      const at = Math.min(image.length - 8, places[random.below(places.length)]! + random.below(160));
      const kind = random.below(3);
      if (kind === 0) image[at] = random.below(256);
      else if (kind === 1) image.writeUInt32BE(values32[random.below(values32.length)]!, at - (at % 4));
      else image.writeBigUInt64BE(values64[random.below(values64.length)]!, at - (at % 8));
    }
    const file = new RecordingFile(image);
    const name = names[random.below(names.length)]!;
    try {
      runTask(EDITS[name]!(file));
    } catch (error) {
      expect(error, `STRATA_SEED=${seed}, case ${n}, ${name}`).toBeInstanceOf(BdevError);
      // The header is in force, and with it all that it points at.
      expect(file.bytes.compare(image, 0, 512, 0, 512), `STRATA_SEED=${seed}, case ${n}, ${name}`).toBe(0);
      refused++;
    }
  }
  expect(refused).toBeGreaterThan(CASES / 10);
  expect(refused).toBeLessThan(CASES);
});

/** Fails at one of the operations that change the file, without doing it. */
class FailingFile extends RecordingFile {
  failAt = -1;

  override *write(offset: number, bytes: Uint8Array): Task<void> {
    this.#fail();
    yield* super.write(offset, bytes);
  }

  override *sync(): Task<void> {
    this.#fail();
    yield* super.sync();
  }

  override *grow(sizeBytes: number): Task<void> {
    if (sizeBytes > this.sizeBytes) this.#fail();
    yield* super.grow(sizeBytes);
  }

  #fail(): void {
    if (this.failAt-- === 0) throw new BdevError('io-error', '', 'the disk failed', 'replace it');
  }
}

it.each(Object.keys(EDITS))(
  '%s leaves the image as it was, or edited, when its file fails at any operation',
  (name) => {
    // Applying a snapshot is refused while there are bitmaps.
    const image = name === 'applySnapshot' ? FULL[3]! : FULL[0]!;
    const done = new RecordingFile(image);
    runTask(EDITS[name]!(done));
    const lastSync = done.operations.findLastIndex(({ type }) => type === 'sync');
    const states = [plainState(image), plainState(done.bytes)];
    const seen = new Set<string>();
    for (let failAt = 0; failAt < done.operations.length; failAt++) {
      const file = new FailingFile(image);
      file.failAt = failAt;
      // Space that cannot be given back after the last sync is no error.
      if (failAt <= lastSync) expect(() => runTask(EDITS[name]!(file))).toThrow('the disk failed');
      else runTask(EDITS[name]!(file));
      expect(states).toContain(plainState(file.bytes));
      seen.add(file.bytes.toString('latin1'));
      // Done again, it succeeds.
      if (plainState(file.bytes) === states[0]) {
        runTask(EDITS[name]!(file));
        expect(plainState(file.bytes)).toBe(states[1]);
      }
    }
    let n = 0;
    for (const bytes of seen)
      if (n++ % 4 === 0) expect(check(folder.write('failed', Buffer.from(bytes, 'latin1')))).toBe('');
  },
);

describe('what is not seen on the disk', () => {
  it('VM state comes and goes with snapshots, and never shows on a disk that grows', () => {
    const path = folder.of('vm');
    qemuImg('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4096', path, '1M');
    qemuIo(path, 'write -P 3 0 100k', 'write -b -P 5 0 100k');
    const file = new RecordingFile(folder.read('vm'));
    runTask(createSnapshot(file, { name: 'with state', ...TIME }));
    runTask(resizeImage(file, 8 * SIZE));
    folder.write('vm', file.bytes);
    qemuIo(path, 'read -P 0 1M 7M', 'read -P 3 0 100k');
    expect(check(path)).toBe('');
    runTask(applySnapshot(file, 'with state'));
    folder.write('vm', file.bytes);
    qemuIo(path, 'read -b -P 5 0 100k', 'read -P 3 0 100k');
    runTask(deleteSnapshot(file, 'with state'));
    expect(check(folder.write('vm', file.bytes))).toBe('');
  });

  it('names that are not UTF-8 are kept as they are', () => {
    const file = new RecordingFile(newImage(folder, 'cluster_size=4096', SIZE, seededRandom(2), 3));
    runTask(createSnapshot(file, { name: 'abcd', ...TIME }));
    const bytes = Buffer.from(file.bytes);
    const at = bytes.indexOf('1abcd', headerOf(bytes).snapshotTableOffset) + 1;
    bytes[at] = 0xe4;
    const latin = new RecordingFile(bytes);
    runTask(createSnapshot(latin, { name: 'other', ...TIME }));
    expect(runTask(listSnapshots(latin)).map(({ rawNames }) => rawNames?.name.toString('latin1'))).toEqual([
      'äbcd',
      undefined,
    ]);
    expect(check(folder.write('latin', latin.bytes))).toBe('');
  });

  it('what is encrypted stays readable, in snapshots and at every size', () => {
    const path = folder.of('luks');
    const secret = ['--object', 'secret,id=key,data=secret'];
    const options = ['encrypt.format=luks', 'encrypt.key-secret=key', 'encrypt.iter-time=100'].join(',');
    const create = ['create', '-q', ...secret, '-f', 'qcow2', '-o', options, path, '1M'];
    // QEMU measures the processor, and gives up when that is too short to be measured.
    for (let tries = 0; spawnSync('qemu-img', create).status !== 0; tries++) expect(tries).toBeLessThan(10);
    const opened = `driver=qcow2,encrypt.key-secret=key,file.filename=${path}`;
    const io = (...commands: string[]): void => {
      const all = commands.flatMap((command) => ['-c', command]);
      const output = execFileSync('qemu-io', [...secret, '--image-opts', ...all, opened], { encoding: 'utf8' });
      expect(output).not.toContain('fail');
    };
    const edit = (task: (file: ImageFile) => Task<unknown>): void => {
      const file = new RecordingFile(folder.read('luks'));
      runTask(task(file));
      folder.write('luks', file.bytes);
      expect(qemuImg('check', ...secret, '--image-opts', opened)).toContain('No errors');
    };
    io('write -P 7 0 1M');
    edit((file) => createSnapshot(file, { name: 'a', ...TIME }));
    io('write -P 8 0 512k');
    edit((file) => resizeImage(file, 5 * SIZE));
    io('read -P 8 0 512k', 'read -P 7 512k 512k', 'write -P 9 4M 64k');
    edit((file) => applySnapshot(file, 'a'));
    io('read -P 7 0 1M');
    const file = new RecordingFile(folder.read('luks'));
    expect(() => runTask(resizeImage(file, 5 * SIZE, { preallocation: 'full' }))).toThrow('encrypted');
  });
});

it.each([512, 4096] as const)('edits run on a reactor, over a disk of %i-byte blocks', (blockSizeBytes) => {
  const path = folder.write('disk', newImage(folder, 'cluster_size=4096', SIZE, seededRandom(3), 8));
  const before = content(path);
  const rig = new Rig('edits');
  const config: UringConfig = {
    name: 'file',
    module: 'uring',
    path,
    readOnly: false,
    create: null,
    blockSizeBytes,
    direct: false,
    iopoll: false,
    fixedBuffers: false,
    lock: true,
  };
  const disk = rig.open([config]);
  const run = <T>(task: (file: ImageFile) => Task<T>): T =>
    completeTask(task(new ChannelFile(disk.bdev, disk.channel, rig.reactor)), () => void rig.step());
  run((file) => createSnapshot(file, { name: 'a', ...TIME }));
  run((file) => addBitmap(file, { name: 'b' }));
  run((file) => resizeImage(file, 20 * SIZE, { preallocation: 'falloc' }));
  run((file) => removeBitmap(file, 'b'));
  run((file) => applySnapshot(file, 'a'));
  disk.close();
  rig.close();
  expect([check(path), content(path), content(path, '1')]).toEqual(['', before, before]);
});
