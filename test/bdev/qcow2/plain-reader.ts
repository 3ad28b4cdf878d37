/**
 * The plainest possible reader of qcow2 images in memory, for tests that read thousands of them: the disk, its snapshots and its
 * bitmaps as bytes. It shares nothing with the engine but the decoding of headers and tables, and is itself compared with qemu-img.
 */
import { createHash } from 'node:crypto';
import { inflateRawSync } from 'node:zlib';
import { Autoclear, clusterBytesOf, decodeHeader, hasExtendedL2 } from '../../../src/bdev/qcow2/format.js';
import type { Qcow2Header } from '../../../src/bdev/qcow2/format.js';
import { decodeBitmaps, decodeSnapshots } from '../../../src/bdev/qcow2/tables.js';

export function headerOf(image: Buffer): Qcow2Header {
  const clusterBytes = 2 ** image.readUInt32BE(20);
  return decodeHeader(image.subarray(0, clusterBytes), image.length);
}

function u64(bytes: Buffer, at: number): bigint {
  return at + 8 <= bytes.length ? bytes.readBigUInt64BE(at) : 0n;
}

/** @param backing what is read where nothing is allocated */
export function readDisk(
  image: Buffer,
  l1Offset: number,
  sizeBytes: number,
  backing: Buffer = Buffer.alloc(0),
): Buffer {
  const header = headerOf(image);
  const clusterBytes = clusterBytesOf(header);
  const isExtended = hasExtendedL2(header);
  const perTable = clusterBytes / (isExtended ? 16 : 8);
  const disk = Buffer.alloc(Math.ceil(sizeBytes / clusterBytes) * clusterBytes);
  backing.copy(disk);
  for (let cluster = 0; cluster * clusterBytes < sizeBytes; cluster++) {
    const l2 = Number(u64(image, l1Offset + Math.floor(cluster / perTable) * 8) & 0x00fffffffffffe00n);
    if (l2 === 0) continue;
    const at = l2 + (cluster % perTable) * (isExtended ? 16 : 8);
    const entry = u64(image, at);
    const start = cluster * clusterBytes;
    const end = start + clusterBytes;
    if ((entry & (1n << 62n)) !== 0n) {
      const x = BigInt(62 - (header.clusterBits - 8));
      const offset = Number(entry & ((1n << x) - 1n));
      const sectors = Number((entry & ((1n << 62n) - 1n)) >> x) + 1;
      const packed = image.subarray(offset, offset + sectors * 512 - (offset % 512));
      inflateRawSync(packed, { maxOutputLength: clusterBytes, finishFlush: 2 }).copy(disk, start);
      continue;
    }
    const host = Number(entry & 0x00fffffffffffe00n);
    if (!isExtended) {
      if ((entry & 1n) !== 0n) disk.fill(0, start, end);
      else if (host > 0) image.copy(disk.fill(0, start, end), start, host, host + clusterBytes);
      continue;
    }
    const bits = u64(image, at + 8);
    const part = clusterBytes / 32;
    for (let i = 0; i < 32; i++) {
      const from = start + i * part;
      if ((bits & (1n << BigInt(32 + i))) !== 0n) disk.fill(0, from, from + part);
      else if ((bits & (1n << BigInt(i))) !== 0n) image.copy(disk, from, host + i * part, host + (i + 1) * part);
    }
  }
  return disk.subarray(0, sizeBytes);
}

/** All that a user sees of an image, in words. */
export function plainState(image: Buffer, backing?: Buffer): string {
  const header = headerOf(image);
  const hash = (bytes: Buffer): string => createHash('sha1').update(bytes).digest('hex');
  const { snapshots } = decodeSnapshots(image.subarray(header.snapshotTableOffset), header, image.length);
  const { bitmaps } = header;
  const isValid = bitmaps !== null && (header.autoclear & Autoclear.bitmaps) !== 0n;
  const directory = isValid
    ? decodeBitmaps(
        image.subarray(bitmaps.directoryOffset, bitmaps.directoryOffset + bitmaps.directoryBytes),
        bitmaps.count,
        header,
        image.length,
      )
    : [];
  return JSON.stringify({
    format: [header.version, header.refcountOrder],
    size: header.sizeBytes,
    backing: [header.backingFile, header.backingFormat],
    features: [header.incompatible, header.compatible, header.autoclear].map(String),
    disk: hash(readDisk(image, header.l1Offset, header.sizeBytes, backing)),
    snapshots: snapshots.map(({ id, name, l1Offset, sizeBytes }) => ({
      id,
      name,
      sizeBytes,
      disk: hash(readDisk(image, l1Offset, sizeBytes, backing)),
    })),
    bitmaps: directory.map(({ name, flags, granularityBits, tableOffset, tableEntries }) => ({
      name,
      flags,
      granularityBits,
      bits: hash(readBits(image, tableOffset, tableEntries, clusterBytesOf(header))),
    })),
  });
}

/** The clusters of a bitmap's bits. */
export function readBits(image: Buffer, tableOffset: number, tableEntries: number, clusterBytes: number): Buffer {
  return Buffer.concat(
    Array.from({ length: tableEntries }, (_, i) => {
      const entry = u64(image, tableOffset + i * 8);
      const offset = Number(entry & 0x00fffffffffffe00n);
      if (offset === 0) return Buffer.alloc(clusterBytes, (entry & 1n) !== 0n ? 0xff : 0);
      return image.subarray(offset, offset + clusterBytes);
    }),
  );
}
