/** qcow2 images for the harness: small ones, made by QEMU, on disks of a fixed size. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { qcow2On } from '../bdev/stacks.js';
import { SECTOR_BYTES } from '../sim/sim-disk.js';
import { simDisk } from './sim-machine.js';
import type { Stack } from './sim-machine.js';

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

/** A qcow2 bdev on the first disk. */
export const qcow2Stack: Stack = ([path], memoryDir): readonly BdevConfig[] => [
  simDisk('file', path!),
  qcow2On({ restartDir: memoryDir })('volume', 'file'),
];
