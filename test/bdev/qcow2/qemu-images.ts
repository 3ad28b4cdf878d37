/** Images made and judged by the real qemu-img and qemu-io. */
import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Random } from '../../../src/poller/clock.js';

export class ImageFolder {
  readonly path = mkdtempSync(join(tmpdir(), 'strata-qcow2-'));

  of(name: string): string {
    return join(this.path, name);
  }

  write(name: string, bytes: Buffer): string {
    writeFileSync(this.of(name), bytes);
    return this.of(name);
  }

  read(name: string): Buffer {
    return readFileSync(this.of(name));
  }

  copy(from: string, to: string): void {
    copyFileSync(this.of(from), this.of(to));
  }

  remove(): void {
    rmSync(this.path, { recursive: true });
  }
}

/** Output of qemu-img. Throws when it fails. */
export function qemuImg(...args: string[]): string {
  return execFileSync('qemu-img', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Commands of qemu-io on an image; a compressed write to what is allocated is refused by QEMU, which is fine. Throws for others. */
export function qemuIo(path: string, ...commands: string[]): void {
  const all = commands.flatMap((command) => ['-c', command]);
  const { stdout, stderr } = spawnSync('qemu-io', ['-f', 'qcow2', ...all, path], { encoding: 'utf8' });
  const said = `${stdout}${stderr}`.split('\n').filter((line) => /fail|error|open/i.test(line));
  const bad = said.filter((line) => line !== 'write failed: Input/output error');
  if (bad.length > 0) throw new Error(bad.join('\n'));
}

/** '' when `qemu-img check` finds nothing, 'leaks', or what it says of an image with errors. */
export function check(path: string): string {
  // Without its backing file, which need not be there.
  const image = { driver: 'qcow2', backing: null, file: { driver: 'file', filename: path } };
  const { status, stdout, stderr } = spawnSync('qemu-img', ['check', `json:${JSON.stringify(image)}`], {
    encoding: 'utf8',
  });
  if (status === 0) return '';
  return status === 3 ? 'leaks' : `${status}: ${stdout}${stderr}`;
}

export interface ImageInfo {
  readonly 'virtual-size': number;
  readonly snapshots?: readonly { readonly id: string; readonly name: string; readonly 'vm-state-size': number }[];
  readonly 'backing-filename'?: string;
  readonly 'format-specific': {
    readonly data: {
      readonly bitmaps?: readonly { readonly name: string; readonly granularity: number; readonly flags: string[] }[];
    };
  };
}

export function info(path: string): ImageInfo {
  return JSON.parse(qemuImg('info', '--output', 'json', '-f', 'qcow2', path)) as ImageInfo;
}

/** What the disk holds, or what a snapshot of it holds. */
export function content(path: string, snapshotId?: string): string {
  const snapshot = snapshotId === undefined ? [] : ['-l', `snapshot.id=${snapshotId}`];
  const raw = `${path}.raw`;
  qemuImg('convert', '-f', 'qcow2', ...snapshot, '-O', 'raw', path, raw);
  const hash = createHash('sha1').update(readFileSync(raw)).digest('hex');
  rmSync(raw);
  return hash;
}

/** All that a user sees of an image, in words. */
export function state(path: string): string {
  const { 'virtual-size': size, snapshots = [], 'format-specific': specific } = info(path);
  return JSON.stringify({
    size,
    disk: content(path),
    snapshots: snapshots.map(({ id, name }) => ({ id, name, disk: content(path, id) })),
    bitmaps: specific.data.bitmaps ?? [],
  });
}

/** A new image with random content, as bytes. */
export function newImage(
  folder: ImageFolder,
  options: string,
  sizeBytes: number,
  random: Random,
  writes: number,
): Buffer {
  const path = folder.of('new');
  qemuImg('create', '-q', '-f', 'qcow2', '-o', options, path, String(sizeBytes));
  qemuIo(path, ...randomWrites(random, sizeBytes, writes, options));
  return folder.read('new');
}

/**
 * Commands of qemu-io that write something of each kind that a format can hold. Compressed clusters come last: QEMU 7.2 damages an
 * image when it discards one and writes another in the same run.
 */
export function randomWrites(random: Random, sizeBytes: number, count: number, options: string): string[] {
  const isV2 = options.includes('compat=0.10');
  const clusterBytes = clusterBytesOf(options);
  const commands = Array.from({ length: count }, () => {
    const kind = random.below(8);
    const length = 512 * (1 + random.below(Math.min(400, Math.ceil(sizeBytes / 512 / 4))));
    const isWhole = sizeBytes >= clusterBytes;
    const start = 512 * random.below(Math.max(1, (sizeBytes - length) / 512));
    const cluster = clusterBytes * random.below(Math.max(1, Math.floor(sizeBytes / clusterBytes)));
    const pattern = 1 + random.below(255);
    if (!isWhole) return `write -P ${pattern} ${start} ${length}`;
    if (kind === 0) return `write -c -P ${pattern} ${cluster} ${clusterBytes}`;
    if (kind === 1 && !isV2) return `write -z ${cluster} ${clusterBytes}`;
    if (kind === 2 && !isV2) return `write -z -u ${cluster} ${clusterBytes}`;
    if (kind === 3) return `discard ${cluster} ${clusterBytes}`;
    return `write -P ${pattern} ${start} ${length}`;
  });
  const isCompressed = (command: string): boolean => command.startsWith('write -c');
  return [...commands.filter((one) => !isCompressed(one)), ...commands.filter(isCompressed)];
}

export function clusterBytesOf(options: string): number {
  const found = /cluster_size=(\d+)/.exec(options);
  return found === null ? 65536 : Number(found[1]);
}

/** The formats that an edit has to work on: `-o` of qemu-img create. */
export const FORMATS = [
  'compat=0.10',
  'compat=1.1',
  'cluster_size=512',
  'cluster_size=4096,refcount_bits=64',
  'cluster_size=16384,extended_l2=on',
  'cluster_size=65536,extended_l2=on,compression_type=zstd',
  'cluster_size=4096,refcount_bits=4,lazy_refcounts=on',
  'cluster_size=2097152,refcount_bits=8',
  'cluster_size=1024,refcount_bits=32,compat=1.1',
] as const;
