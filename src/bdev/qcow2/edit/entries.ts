/**
 * Entries of L1 and L2 tables as bytes: two halves of 32 bits, as no number holds 64 of them.
 *
 *     63  copied: the cluster's refcount is exactly 1        62  compressed
 *     standard: 9-55 host offset, 0 reads as zeroes (not with extended L2)
 *     compressed: 0 to x-1 host offset, x to 61 further sectors of 512 bytes; x = 62 - (cluster_bits - 8)
 */
import type { Qcow2Header } from '../format.js';

const COPIED = 0x80000000;
const COMPRESSED = 0x40000000;
const OFFSET_HIGH = 0x00ffffff;
const OFFSET_LOW = 0xfffffe00;
const ZERO = 1;
const SECTOR_BYTES = 512;

/** Host offset of a standard entry, or of an entry of the L1 table; 0: none. */
export function entryOffset(table: Buffer, at: number): number {
  return (table.readUInt32BE(at) & OFFSET_HIGH) * 2 ** 32 + ((table.readUInt32BE(at + 4) & OFFSET_LOW) >>> 0);
}

/** Whether all bits of an entry are 0. */
export function isEmptyEntry(table: Buffer, at: number): boolean {
  return table.readUInt32BE(at) === 0 && table.readUInt32BE(at + 4) === 0;
}

export function isCompressed(table: Buffer, at: number): boolean {
  return (table[at]! & (COMPRESSED >>> 24)) !== 0;
}

export function isCopied(table: Buffer, at: number): boolean {
  return (table[at]! & (COPIED >>> 24)) !== 0;
}

/** Whether a standard entry reads as zeroes; says nothing of extended L2 entries. */
export function isZeroEntry(table: Buffer, at: number): boolean {
  return (table[at + 7]! & ZERO) !== 0;
}

export function setCopied(table: Buffer, at: number, copied: boolean): void {
  const bit = COPIED >>> 24;
  table[at] = copied ? table[at]! | bit : table[at]! & ~bit;
}

/** Writes an entry that points at a cluster of its own. */
export function writeEntry(table: Buffer, at: number, offset: number): void {
  table.writeUInt32BE((Math.floor(offset / 2 ** 32) | (offset > 0 ? COPIED : 0)) >>> 0, at);
  table.writeUInt32BE(offset % 2 ** 32, at + 4);
}

/** Writes an entry that reads as zeroes and has no cluster. */
export function writeZeroEntry(table: Buffer, at: number, entryBytes: 8 | 16): void {
  table.fill(0, at, at + entryBytes);
  if (entryBytes === 8) table[at + 7] = ZERO;
  else table.writeUInt32BE(0xffffffff, at + 8);
}

/** The bytes of the file that a compressed entry takes. */
export function compressedRange(
  table: Buffer,
  at: number,
  { clusterBits }: Pick<Qcow2Header, 'clusterBits'>,
): { offset: number; lengthBytes: number } {
  const high = table.readUInt32BE(at) & (COMPRESSED - 1);
  // The offset has 49 to 61 bits: the count of sectors is within the upper half.
  const offsetBitsHigh = 62 - (clusterBits - 8) - 32;
  const offset = (high & (2 ** offsetBitsHigh - 1)) * 2 ** 32 + table.readUInt32BE(at + 4);
  const sectors = (high >>> offsetBitsHigh) + 1;
  return { offset, lengthBytes: sectors * SECTOR_BYTES - (offset % SECTOR_BYTES) };
}
