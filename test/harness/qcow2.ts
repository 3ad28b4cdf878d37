/** qcow2 images for the harness: small ones, made by QEMU, on disks of a fixed size. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { CREATE_DEFAULTS, createImage } from '../../src/bdev/qcow2/create.js';
import { checkImage } from '../../src/bdev/qcow2/check.js';
import type { CheckReport } from '../../src/bdev/qcow2/check.js';
import type { ImageFile } from '../../src/bdev/qcow2/image-file.js';
import { cipherSpec } from '../../src/bdev/qcow2/luks/sector-cipher.js';
import type { Qcow2Config } from '../../src/bdev/qcow2/qcow2.js';
import { completeTask } from '../../src/bdev/task.js';
import { qcow2On } from '../bdev/stacks.js';
import { Violation } from '../sim/oracle.js';
import { SECTOR_BYTES } from '../sim/sim-disk.js';
import { simDisk } from './sim-machine.js';
import type { Stack } from './sim-machine.js';
import type { Operation } from './volume.js';

/** An empty image, as QEMU makes it, in a file of `fileBytes`. */
export function newImage(options: string, sectors: number, fileBytes: number, ...more: readonly string[]): Uint8Array {
  const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  const path = join(folder, 'image');
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, String(sectors * SECTOR_BYTES)]);
  for (const command of more) execFileSync('qemu-io', ['-f', 'qcow2', '-c', command, path]);
  const image = new Uint8Array(fileBytes);
  image.set(readFileSync(path));
  rmSync(folder, { recursive: true });
  return image;
}

/** An empty overlay over what is going to be the second disk. */
export function newOverlay(options: string, sectors: number, fileBytes: number): Uint8Array {
  const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  const path = join(folder, 'disk0');
  const bytes = String(sectors * SECTOR_BYTES);
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', join(folder, 'disk1'), bytes]);
  execFileSync('qemu-img', [
    ...['create', '-q', '-f', 'qcow2', '-o', options, '-b', 'disk1', '-F', 'qcow2', path, bytes],
  ]);
  const image = new Uint8Array(fileBytes);
  image.set(readFileSync(path));
  rmSync(folder, { recursive: true });
  return image;
}

/** A qcow2 bdev on the first disk. */
export const qcow2Stack: Stack = ([path], memoryDir): readonly BdevConfig[] => [
  simDisk('file', path!),
  qcow2On({ restartDir: memoryDir, codecThreads: 0 })('volume', 'file'),
];

/** An overlay on the first disk, whose image names the second one as its base. */
export const overlayStack: Stack = ([path], memoryDir): readonly BdevConfig[] => [
  simDisk('file', path!),
  qcow2On({ restartDir: memoryDir, codecThreads: 0, imageDir: dirname(path!) })('volume', 'file'),
];

/** The base of an overlay is a bdev of its own, which the config names. */
export const overlayOnBdevStack: Stack = ([path, base], memoryDir): readonly BdevConfig[] => [
  simDisk('base-file', base!),
  qcow2On({ restartDir: memoryDir, codecThreads: 0 })('base', 'base-file'),
  simDisk('file', path!),
  qcow2On({ restartDir: memoryDir, codecThreads: 0, backing: 'base' })('volume', 'file'),
];

/** Commits the overlay. @param isAwaited it is over when the operation is, else it goes on beside those that follow */
export function commitOperation(name: string, isAwaited: boolean): Operation {
  return {
    name,
    type: 'call',
    start: (life) => {
      const job = (): unknown => (life.open.bdev.describe()['job'] as { state: string } | null)?.state;
      life.perform(() => {
        // What it was refused for is told by its state, or was death.
        life.open.bdev.operate!('commit', {}).catch(() => undefined);
      });
      return isAwaited ? () => job() !== 'running' : () => true;
    },
  };
}

/** The same without what outlives a kill: changes are durable before they are answered. */
export const qcow2WithoutLog: Stack = ([path]): readonly BdevConfig[] => [
  simDisk('file', path!),
  qcow2On({ restartDir: null, codecThreads: 0 })('volume', 'file'),
];

/** No passphrase is tried here, so its header may be anything. */
export const LUKS_HEADER = Buffer.alloc(512, 'LUKS');
const MASTER_KEY = Uint8Array.from({ length: 64 }, (_, i) => i);

/** An empty image with encryption, in a file of `fileBytes`. */
export function newEncryptedImage(clusterBits: number, sectors: number, fileBytes: number): Uint8Array {
  let image = new Uint8Array(0);
  const file: ImageFile = {
    get sizeBytes() {
      return image.length;
    },
    *read(offset, bytes) {
      bytes.set(image.subarray(offset, offset + bytes.length));
    },
    *write(offset, bytes) {
      image.set(bytes, offset);
    },
    *sync() {},
    *grow(sizeBytes) {
      const grown = new Uint8Array(Math.max(sizeBytes, fileBytes));
      grown.set(image);
      image = grown;
    },
  };
  const options = { ...CREATE_DEFAULTS, sizeBytes: sectors * SECTOR_BYTES, clusterBits, luksHeader: LUKS_HEADER };
  completeTask(createImage(file, options), () => undefined);
  return image;
}

/** The key of images with LUKS_HEADER. It is for one bdev, which forgets it. */
export function unlocked(): NonNullable<Qcow2Config['unlocked']> {
  return { spec: cipherSpec('aes', 'xts-plain64', 64), masterKey: Buffer.from(MASTER_KEY) };
}

/** The same, with a key that is known. */
export const encryptedStack: Stack = ([path], memoryDir): readonly BdevConfig[] => {
  const options = { restartDir: memoryDir, codecThreads: 0, unlocked: unlocked() };
  return [simDisk('file', path!), qcow2On(options)('volume', 'file')];
};

/** What a check finds in an image. */
export function checkBytes(image: Uint8Array): CheckReport {
  const file: ImageFile = {
    sizeBytes: image.length,
    *read(offset, bytes) {
      const there = image.subarray(offset, offset + bytes.length);
      bytes.set(there);
      bytes.fill(0, there.length);
    },
    write: refuse,
    sync: refuse,
    grow: refuse,
  };
  return completeTask(checkImage(file, { repair: 'none' }), () => undefined);
}

/** After a crash images may have clusters that nobody uses, and nothing else. Throws Violation. */
export function expectWhole(images: readonly Uint8Array[]): void {
  images.forEach((image, i) => {
    const report = checkBytes(image);
    if (report.corruptions > 0 || report.checkErrors > 0) throw new Violation(`image ${i}: ${JSON.stringify(report)}`);
  });
}

function refuse(): never {
  throw new Error('a check writes nothing');
}
