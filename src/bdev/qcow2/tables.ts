/**
 * The tables beside the mapping: internal snapshots and the bitmap directory, as bytes and as values. Everything is big endian.
 *
 *     snapshot entry, 8-aligned                        bitmap directory entry, 8-aligned
 *      0  8  l1_table_offset                            0  8  bitmap_table_offset
 *      8  4  l1_size, entries                           8  4  bitmap_table_size, entries
 *     12  2  id length                                 12  4  flags: 1 in use, 2 auto, 4 extra data compatible
 *     14  2  name length                               16  1  type: 1 dirty tracking
 *     16  4  seconds, 20 4 nanoseconds                 17  1  granularity_bits
 *     24  8  guest clock, ns                           18  2  name length
 *     32  4  VM state size                             20  4  extra data size
 *     36  4  extra data size                           24  .. extra data, name
 *     40  8  VM state size, 48 8 disk size, 56 8 icount
 *     ..     id, name
 */
import { isUtf8 } from 'node:buffer';
import { L1_BYTES_MAX, checkTable, clusterBytesOf, l1EntriesFor, offsetAt, writeUInt64 } from './format.js';
import type { Qcow2Header } from './format.js';
import { badImage } from './image-error.js';

const SNAPSHOT_FIXED_BYTES = 40;
const SNAPSHOT_EXTRA_BYTES = 24;
const SNAPSHOT_EXTRA_BYTES_MAX = 1024;
export const SNAPSHOT_TABLE_BYTES_MAX = 64 * 2 ** 20;
const BITMAP_FIXED_BYTES = 24;
const BITMAP_NAME_BYTES_MAX = 1023;
const ICOUNT_NONE = 0xffffffffffffffffn;

export interface Snapshot {
  readonly id: string;
  readonly name: string;
  readonly l1Offset: number;
  readonly l1Entries: number;
  readonly seconds: number;
  readonly nanoseconds: number;
  /** Nanoseconds that the guest ran. */
  readonly guestClock: bigint;
  readonly vmStateBytes: number;
  readonly sizeBytes: number;
  /** Instruction count of record and replay; all ones: none. */
  readonly icount: bigint;
  /** Extra data that is not known here, kept. */
  readonly unknownExtra: Buffer;
  /** Id and name as they are in the image, where they are not UTF-8: kept. */
  readonly rawNames?: { readonly id: Buffer; readonly name: Buffer };
}

export interface Bitmap {
  readonly name: string;
  readonly tableOffset: number;
  readonly tableEntries: number;
  readonly flags: number;
  readonly granularityBits: number;
  readonly extra: Buffer;
  /** The name as it is in the image, where it is not UTF-8: kept. */
  readonly rawName?: Buffer;
}

/** Bits of `Bitmap.flags`. */
export const BitmapFlag = { inUse: 1, auto: 2, extraDataCompatible: 4 } as const;
export const BITMAP_GRANULARITY_BITS_MIN = 9;
export const BITMAP_GRANULARITY_BITS_MAX = 31;
const BITMAP_TYPE_DIRTY = 1;

/**
 * @param bytes from the start of the table: at least what one entry may take more than is there, or the rest of the file
 * @returns the snapshots and the bytes the table takes. Throws BdevError.
 */
export function decodeSnapshots(
  bytes: Buffer,
  header: Qcow2Header,
  fileBytes: number,
): { snapshots: Snapshot[]; bytes: number } {
  const snapshots: Snapshot[] = [];
  let at = 0;
  for (let i = 0; i < header.snapshotCount; i++) {
    const field = `snapshots[${i}]`;
    const { snapshot, lengthBytes } = decodeSnapshot(bytes.subarray(at), header, field);
    checkTable(
      `${field}.l1_table_offset`,
      snapshot.l1Offset,
      snapshot.l1Entries * 8,
      clusterBytesOf(header),
      fileBytes,
    );
    snapshots.push(snapshot);
    at += lengthBytes;
    if (at > SNAPSHOT_TABLE_BYTES_MAX) throw badImage(field, `ends beyond ${SNAPSHOT_TABLE_BYTES_MAX} bytes of table`);
  }
  return { snapshots, bytes: at };
}

function decodeSnapshot(
  bytes: Buffer,
  header: Qcow2Header,
  field: string,
): { snapshot: Snapshot; lengthBytes: number } {
  if (bytes.length < SNAPSHOT_FIXED_BYTES) throw badImage(field, 'is cut off');
  const idBytes = bytes.readUInt16BE(12);
  const nameBytes = bytes.readUInt16BE(14);
  const extraBytes = bytes.readUInt32BE(36);
  if (extraBytes > SNAPSHOT_EXTRA_BYTES_MAX) {
    throw badImage(`${field}.extra_data_size`, `is ${extraBytes}, more than ${SNAPSHOT_EXTRA_BYTES_MAX}`);
  }
  const idAt = SNAPSHOT_FIXED_BYTES + extraBytes;
  const end = idAt + idBytes + nameBytes;
  if (bytes.length < end) throw badImage(field, 'is cut off');
  const l1Entries = bytes.readUInt32BE(8);
  if (l1Entries * 8 > L1_BYTES_MAX)
    throw badImage(`${field}.l1_size`, `is ${l1Entries}, more than ${L1_BYTES_MAX / 8}`);
  const sizeBytes = extraBytes >= 16 ? offsetAt(bytes, 48, `${field}.disk_size`) : header.sizeBytes;
  if (l1EntriesFor(header, sizeBytes) > l1Entries) {
    throw badImage(`${field}.l1_size`, `is ${l1Entries}, too small for its disk of ${sizeBytes} bytes`);
  }
  const id = Buffer.from(bytes.subarray(idAt, idAt + idBytes));
  const name = Buffer.from(bytes.subarray(idAt + idBytes, end));
  return {
    snapshot: {
      id: id.toString('utf8'),
      name: name.toString('utf8'),
      ...(isUtf8(id) && isUtf8(name) ? {} : { rawNames: { id, name } }),
      l1Offset: offsetAt(bytes, 0, `${field}.l1_table_offset`),
      l1Entries,
      seconds: bytes.readUInt32BE(16),
      nanoseconds: bytes.readUInt32BE(20),
      guestClock: bytes.readBigUInt64BE(24),
      vmStateBytes: extraBytes >= 8 ? offsetAt(bytes, 40, `${field}.vm_state_size`) : bytes.readUInt32BE(32),
      sizeBytes,
      icount: extraBytes >= 24 ? bytes.readBigUInt64BE(56) : ICOUNT_NONE,
      unknownExtra: Buffer.from(
        bytes.subarray(
          SNAPSHOT_FIXED_BYTES + SNAPSHOT_EXTRA_BYTES,
          Math.max(idAt, SNAPSHOT_FIXED_BYTES + SNAPSHOT_EXTRA_BYTES),
        ),
      ),
    },
    lengthBytes: align8(end),
  };
}

export function encodeSnapshots(snapshots: readonly Snapshot[]): Buffer {
  return Buffer.concat(
    snapshots.map((snapshot) => {
      const id = snapshot.rawNames?.id ?? Buffer.from(snapshot.id, 'utf8');
      const name = snapshot.rawNames?.name ?? Buffer.from(snapshot.name, 'utf8');
      const extraBytes = SNAPSHOT_EXTRA_BYTES + snapshot.unknownExtra.length;
      const idAt = SNAPSHOT_FIXED_BYTES + extraBytes;
      const bytes = Buffer.alloc(align8(idAt + id.length + name.length));
      writeUInt64(bytes, snapshot.l1Offset, 0);
      bytes.writeUInt32BE(snapshot.l1Entries, 8);
      bytes.writeUInt16BE(id.length, 12);
      bytes.writeUInt16BE(name.length, 14);
      bytes.writeUInt32BE(snapshot.seconds, 16);
      bytes.writeUInt32BE(snapshot.nanoseconds, 20);
      bytes.writeBigUInt64BE(snapshot.guestClock, 24);
      bytes.writeUInt32BE(snapshot.vmStateBytes < 2 ** 32 ? snapshot.vmStateBytes : 0, 32);
      bytes.writeUInt32BE(extraBytes, 36);
      writeUInt64(bytes, snapshot.vmStateBytes, 40);
      writeUInt64(bytes, snapshot.sizeBytes, 48);
      bytes.writeBigUInt64BE(snapshot.icount, 56);
      snapshot.unknownExtra.copy(bytes, SNAPSHOT_FIXED_BYTES + SNAPSHOT_EXTRA_BYTES);
      id.copy(bytes, idAt);
      name.copy(bytes, idAt + id.length);
      return bytes;
    }),
  );
}

/** @param bytes the directory, as long as the header's extension says. Throws BdevError. */
export function decodeBitmaps(bytes: Buffer, count: number, header: Qcow2Header, fileBytes: number): Bitmap[] {
  const bitmaps: Bitmap[] = [];
  const clusterBytes = clusterBytesOf(header);
  let at = 0;
  for (let i = 0; i < count; i++) {
    const field = `bitmaps[${i}]`;
    if (bytes.length - at < BITMAP_FIXED_BYTES) throw badImage(field, 'is cut off');
    const nameBytes = bytes.readUInt16BE(at + 18);
    const extraBytes = bytes.readUInt32BE(at + 20);
    const end = at + BITMAP_FIXED_BYTES + extraBytes + nameBytes;
    if (nameBytes === 0 || nameBytes > BITMAP_NAME_BYTES_MAX) throw badImage(`${field}.name_size`, `is ${nameBytes}`);
    if (end > bytes.length) throw badImage(field, 'is cut off');
    const granularityBits = bytes[at + 17]!;
    if (granularityBits < BITMAP_GRANULARITY_BITS_MIN || granularityBits > BITMAP_GRANULARITY_BITS_MAX) {
      throw badImage(`${field}.granularity_bits`, `is ${granularityBits}, it may be 9 to 31`);
    }
    if (bytes[at + 16] !== BITMAP_TYPE_DIRTY) throw badImage(`${field}.type`, `is ${bytes[at + 16]}, only 1 is known`);
    const tableEntries = bytes.readUInt32BE(at + 8);
    const needed = bitmapTableEntries(header.sizeBytes, granularityBits, clusterBytes);
    const flags = bytes.readUInt32BE(at + 12);
    // A bitmap that was left in use may be of any size: it is not used.
    if ((flags & BitmapFlag.inUse) === 0 && tableEntries !== needed) {
      throw badImage(`${field}.bitmap_table_size`, `is ${tableEntries}, its disk needs ${needed}`);
    }
    const tableOffset = offsetAt(bytes, at, `${field}.bitmap_table_offset`);
    checkTable(`${field}.bitmap_table_offset`, tableOffset, tableEntries * 8, clusterBytes, fileBytes);
    const name = Buffer.from(bytes.subarray(end - nameBytes, end));
    bitmaps.push({
      name: name.toString('utf8'),
      ...(isUtf8(name) ? {} : { rawName: name }),
      tableOffset,
      tableEntries,
      flags,
      granularityBits,
      extra: Buffer.from(bytes.subarray(at + BITMAP_FIXED_BYTES, at + BITMAP_FIXED_BYTES + extraBytes)),
    });
    at = align8(end);
  }
  const names = new Set(bitmaps.map(({ name }) => name));
  if (names.size < bitmaps.length) throw badImage('bitmaps', 'has two of the same name');
  return bitmaps;
}

export function encodeBitmaps(bitmaps: readonly Bitmap[]): Buffer {
  return Buffer.concat(
    bitmaps.map((bitmap) => {
      const name = bitmap.rawName ?? Buffer.from(bitmap.name, 'utf8');
      const end = BITMAP_FIXED_BYTES + bitmap.extra.length + name.length;
      const bytes = Buffer.alloc(align8(end));
      writeUInt64(bytes, bitmap.tableOffset, 0);
      bytes.writeUInt32BE(bitmap.tableEntries, 8);
      bytes.writeUInt32BE(bitmap.flags, 12);
      bytes[16] = BITMAP_TYPE_DIRTY;
      bytes[17] = bitmap.granularityBits;
      bytes.writeUInt16BE(name.length, 18);
      bytes.writeUInt32BE(bitmap.extra.length, 20);
      bitmap.extra.copy(bytes, BITMAP_FIXED_BYTES);
      name.copy(bytes, end - name.length);
      return bytes;
    }),
  );
}

/** Entries of the table of a bitmap: one for each cluster of its bits. */
export function bitmapTableEntries(sizeBytes: number, granularityBits: number, clusterBytes: number): number {
  const bits = Math.ceil(sizeBytes / 2 ** granularityBits);
  return Math.ceil(bits / 8 / clusterBytes);
}

function align8(value: number): number {
  return Math.ceil(value / 8) * 8;
}
