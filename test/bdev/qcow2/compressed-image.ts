/** Images with compressed clusters, made by qemu-img, and where in them those clusters lie. */
import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { clusterBytesOf, decodeHeader, firstClusterBytes } from '../../../src/bdev/qcow2/format.js';
import type { CompressionType } from '../../../src/bdev/qcow2/format.js';
import { seededRandom } from '../../support/seed.js';

/** A sanitizer's runtime, where the tests are run with one, is for this process alone. */
const env: NodeJS.ProcessEnv = { ...process.env, LD_PRELOAD: undefined };

const WORDS = 500;
const COMPRESSED = 0x40000000;

export interface CompressedCluster {
  /** In the disk. */
  readonly index: number;
  /** In the file; up to the end of its last sector, or of the file. */
  readonly offset: number;
  readonly lengthBytes: number;
}

export interface CompressedImage {
  readonly path: string;
  readonly clusterBytes: number;
  readonly type: CompressionType;
  readonly file: Buffer;
  /** What the disk holds. */
  readonly data: Buffer;
  readonly clusters: readonly CompressedCluster[];
}

/** Data of all kinds: words, which compress well, zeroes, and noise between them. */
export function mixedData(lengthBytes: number, salt: number): Buffer {
  const random = seededRandom(salt);
  const words = Array.from({ length: WORDS }, () => `${random.below(2 ** 32).toString(36)} `);
  const bytes = Buffer.alloc(lengthBytes);
  let at = 0;
  while (at < lengthBytes) {
    const kind = random.below(10);
    const run = 50 + random.below(3000);
    const end = Math.min(lengthBytes, at + run);
    if (kind < 8) while (at < end) at += bytes.write(words[random.below(WORDS)]!, at, 'latin1');
    else if (kind === 8) while (at < end) bytes[at++] = random.below(256);
    at = end;
  }
  return bytes;
}

/** @param options of `qemu-img -o`, as `cluster_size=4k,compression_type=zstd` */
export function makeCompressedImage(folder: string, options: string, data: Buffer): CompressedImage {
  const raw = join(folder, 'data.raw');
  const path = join(folder, `${options.replace(/[^a-z0-9]+/gi, '-')}.qcow2`);
  writeFileSync(raw, data);
  execFileSync('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', '-o', options, raw, path], { env });
  const file = readFileSync(path);
  const header = decodeHeader(file.subarray(0, firstClusterBytes(file)), file.length);
  const clusterBytes = clusterBytesOf(header);
  const clusters: CompressedCluster[] = [];
  const entriesPerTable = clusterBytes / 8;
  for (let index = 0; index < data.length / clusterBytes; index++) {
    const tableOffset = numberAt(file, header.l1Offset + Math.floor(index / entriesPerTable) * 8, 0xffffff);
    if (tableOffset === 0) continue;
    const at = tableOffset + (index % entriesPerTable) * 8;
    const high = file.readUInt32BE(at);
    if ((high & COMPRESSED) === 0) continue;
    const offsetBits = 62 - (header.clusterBits - 8);
    const offset = numberAt(file, at, 2 ** (offsetBits - 32) - 1);
    const sectors = 1 + ((high & 0x3fffffff) >>> (offsetBits - 32));
    const end = Math.min(file.length, Math.floor(offset / 512) * 512 + sectors * 512);
    clusters.push({ index, offset, lengthBytes: end - offset });
  }
  return { path, clusterBytes, type: header.compressionType, file, data, clusters };
}

/** What the disk of an image holds, as QEMU sees it. */
export function readByQemu(path: string, folder: string, extra: readonly string[] = []): Buffer {
  const raw = join(folder, 'read.raw');
  execFileSync('qemu-img', ['convert', '-O', 'raw', ...extra, path, raw], { env });
  return readFileSync(raw);
}

function numberAt(bytes: Buffer, offset: number, highMask: number): number {
  return (bytes.readUInt32BE(offset) & highMask) * 2 ** 32 + bytes.readUInt32BE(offset + 4);
}
