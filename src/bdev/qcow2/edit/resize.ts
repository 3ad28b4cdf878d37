/**
 * Changing the size of the virtual disk, and what lies at its end: what is beyond the end belongs to nobody, and what is new reads as
 * zeroes, also where a backing file holds data or a cluster that the old end cut held some.
 *
 * It is one edit with one commit: the size, the L1 table and the bitmaps change together. Snapshots keep their own sizes.
 */
import { BdevError } from '../../bdev.js';
import {
  Autoclear,
  CryptMethod,
  L1_BYTES_MAX,
  OFFSET_LIMIT,
  hasExtendedL2,
  hasExternalData,
  l1EntriesFor,
  l2EntryBytes,
} from '../format.js';
import type { Qcow2Header } from '../format.js';
import { unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import type { Bitmap } from '../tables.js';
import type { Task } from '../../task.js';
import { freeBits, loadBits, placeBits, placeDirectory, trusted } from './bitmaps.js';
import {
  entryOffset,
  isCompressed,
  isEmptyEntry,
  isZeroEntry,
  setCopied,
  writeEntry,
  writeZeroEntry,
} from './entries.js';
import { writeAt } from './file-access.js';
import { ImageEdit } from './image-edit.js';
import { countEntries, countReferences, dataOffset, rewriteL2 } from './l2-tables.js';

const SUBCLUSTERS = 32;
const ZEROES_BYTES = 2 ** 20;
/** Of a file: it reserves whole blocks. */
const BLOCK_BYTES_MAX = 4096;

/** `off`: nothing. `metadata`: clusters. `falloc`: and their space in the file. `full`: and zeroes in it. */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full';

/** What is read where an image has nothing of its own. */
export interface BackingContent {
  readonly sizeBytes: number;
  /** What lies beyond the end reads as zeroes. Throws BdevError. */
  read(offset: number, bytes: Uint8Array): Task<void>;
}

export interface ResizeOptions {
  readonly preallocation?: Preallocation;
  /** Data beyond the new end may be lost. */
  readonly mayShrink?: boolean;
  /** The backing file of an image that has one. */
  readonly backing?: BackingContent | null;
  /** The external data file of an image that has one: it is made longer; making it shorter is left to the caller. */
  readonly dataFile?: ImageFile | null;
}

/** Gives the virtual disk another size. Throws BdevError, and then nothing has changed. */
export function* resizeImage(file: ImageFile, sizeBytes: number, options: ResizeOptions = {}): Task<Qcow2Header> {
  const edit = yield* ImageEdit.open(file);
  const { header, clusterBytes } = edit;
  assertPossible(edit, sizeBytes, options);
  if (sizeBytes === header.sizeBytes) return header;

  const l1Entries = l1EntriesFor(header, sizeBytes);
  const l1 = Buffer.alloc(Math.max(l1Entries * 8, edit.l1.length));
  edit.l1.copy(l1);
  // Also when the disk grows: VM state that a snapshot brought back lies there.
  yield* dropFrom(edit, l1, Math.ceil(Math.min(sizeBytes, header.sizeBytes) / clusterBytes));
  if (sizeBytes > header.sizeBytes) yield* fillNew(edit, l1, sizeBytes, options);
  const bitmaps = yield* resizeBitmaps(edit, sizeBytes);
  const newL1 = l1.subarray(0, l1Entries * 8);
  const resized = yield* edit.commit({ sizeBytes, ...bitmaps, ...(yield* replaceL1(edit, newL1)) });
  if (sizeBytes < header.sizeBytes) yield* edit.giveBack();
  return resized;
}

function assertPossible({ header, snapshots, bitmaps }: ImageEdit, sizeBytes: number, options: ResizeOptions): void {
  const { preallocation = 'off', mayShrink = false } = options;
  const refuse = (problem: string, hint: string): BdevError => new BdevError('bad-size', 'size', problem, hint);
  if (sizeBytes <= 0 || sizeBytes % 512 !== 0)
    throw refuse(`${sizeBytes} is not a positive multiple of 512`, 'round it');
  if (sizeBytes >= OFFSET_LIMIT || l1EntriesFor(header, sizeBytes) * 8 > L1_BYTES_MAX) {
    throw refuse(
      `${sizeBytes} needs an L1 table of more than ${L1_BYTES_MAX} bytes`,
      'use larger clusters: convert it',
    );
  }
  if (header.version < 3 && snapshots.length > 0) {
    throw unsupportedImage(
      'header.version',
      'is 2, and it has snapshots, which keep no size',
      'delete them, or convert it',
    );
  }
  for (const bitmap of bitmaps) trusted(bitmap);
  if (sizeBytes < header.sizeBytes) {
    if (!mayShrink) throw refuse(`${sizeBytes} is less than ${header.sizeBytes}: data would be lost`, 'say --shrink');
    if (preallocation !== 'off') throw refuse('a disk that shrinks has nothing to preallocate', 'leave it out');
    return;
  }
  if (preallocation !== 'off' && header.cryptMethod !== CryptMethod.none) {
    throw unsupportedImage('header.crypt_method', 'says that it is encrypted', 'resize it without preallocation');
  }
  if (hasExternalData(header)) {
    if (options.dataFile === undefined || options.dataFile === null) throw notOpened('data file');
    if (preallocation === 'falloc' || preallocation === 'full') {
      throw unsupportedImage(
        'header.incompatible_features',
        'says that the data lies in an external file',
        'preallocate that file, and the metadata here',
      );
    }
  }
  if (header.backingFile !== null && sizeBytes > header.sizeBytes) assertBacking(header, options.backing);
}

function assertBacking({ version, cryptMethod, sizeBytes }: Qcow2Header, backing?: BackingContent | null): void {
  if (backing === undefined || backing === null) throw notOpened('backing file');
  if (backing.sizeBytes <= sizeBytes) return;
  if (version < 3) {
    throw unsupportedImage(
      'header.version',
      'is 2, which cannot hide what its larger backing file holds',
      'convert it',
    );
  }
  if (cryptMethod !== CryptMethod.none) {
    throw unsupportedImage('header.crypt_method', 'says that it is encrypted, with a larger backing file', 'rebase it');
  }
}

function notOpened(what: string): BdevError {
  return new BdevError('not-opened', '', `the image has a ${what}, and it was not opened`, `open the ${what} as well`);
}

/** Lets go of all from a cluster of the disk on. */
function* dropFrom(edit: ImageEdit, l1: Buffer, cluster: number): Task<void> {
  const entryBytes = l2EntryBytes(edit.header);
  const perTable = edit.clusterBytes / entryBytes;
  const index = Math.floor(cluster / perTable);
  const first = cluster % perTable;
  if (first > 0 && index * 8 < l1.length && entryOffset(l1, index * 8) > 0) {
    const table = Buffer.alloc(edit.clusterBytes);
    yield* edit.file.read(entryOffset(l1, index * 8), table);
    if (table.subarray(first * entryBytes).some((byte) => byte !== 0)) {
      yield* rewriteL2(edit, l1, index, function* (bytes) {
        yield* countEntries(edit, bytes, first, perTable, -1, index);
        bytes.fill(0, first * entryBytes);
      });
    }
  }
  const from = first > 0 ? index + 1 : index;
  if (from * 8 >= l1.length) return;
  yield* countReferences(edit, l1, -1, { from, to: l1.length / 8 });
  l1.fill(0, from * 8);
}

/** Makes what lies between the old end and the new one read as zeroes. */
function* fillNew(edit: ImageEdit, l1: Buffer, sizeBytes: number, options: ResizeOptions): Task<void> {
  const { header, clusterBytes } = edit;
  const backing = header.backingFile === null ? null : options.backing!;
  yield* clearTail(edit, l1, backing);
  const from = Math.ceil(header.sizeBytes / clusterBytes);
  const to = Math.ceil(sizeBytes / clusterBytes);
  const { preallocation = 'off', dataFile } = options;
  if (hasExternalData(header)) {
    yield* dataFile!.grow(sizeBytes);
    yield* dataFile!.sync();
  }
  // A raw data file is read without the tables by others: they have to say that all of it is there.
  const isRaw = (header.autoclear & Autoclear.rawExternalData) !== 0n;
  if (preallocation !== 'off' || isRaw) yield* preallocate(edit, l1, from, to, preallocation);
  else if (backing !== null) {
    const hidden = Math.ceil(Math.min(sizeBytes, backing.sizeBytes) / clusterBytes);
    yield* changeEntries(edit, l1, from, hidden, function* (table, at, count) {
      const entryBytes = l2EntryBytes(header);
      for (let i = 0; i < count; i++) writeZeroEntry(table, at + i * entryBytes, entryBytes);
    });
  }
}

/** Changes the L2 entries of clusters of the disk, which are empty, table by table. */
function* changeEntries(
  edit: ImageEdit,
  l1: Buffer,
  from: number,
  to: number,
  change: (table: Buffer, at: number, count: number, cluster: number) => Task<void>,
): Task<void> {
  const entryBytes = l2EntryBytes(edit.header);
  const perTable = edit.clusterBytes / entryBytes;
  for (let cluster = from; cluster < to;) {
    const first = cluster % perTable;
    const count = Math.min(to - cluster, perTable - first);
    const start = cluster;
    yield* rewriteL2(edit, l1, Math.floor(cluster / perTable), function* (table) {
      yield* change(table, first * entryBytes, count, start);
    });
    cluster += count;
  }
}

function* preallocate(edit: ImageEdit, l1: Buffer, from: number, to: number, mode: Preallocation): Task<void> {
  const { header, clusterBytes, file } = edit;
  const isExternal = hasExternalData(header);
  const entryBytes = l2EntryBytes(header);
  const oldEnd = file.sizeBytes;
  yield* changeEntries(edit, l1, from, to, function* (table, at, count, cluster) {
    const first = isExternal ? cluster : yield* edit.refcounts.allocate(count);
    for (let i = 0; i < count; i++) {
      const entry = at + i * entryBytes;
      writeEntry(table, entry, (first + i) * clusterBytes);
      setCopied(table, entry, true);
      if (hasExtendedL2(header)) table.writeUInt32BE(0xffffffff, entry + 12);
    }
    if (isExternal) return;
    const offset = first * clusterBytes;
    const end = offset + count * clusterBytes;
    // What the file gets anew is zeroes; clusters that were used before hold what they held.
    const reserves = mode === 'falloc' && file.allocate !== undefined && clusterBytes >= BLOCK_BYTES_MAX;
    const isWritten = mode === 'full' || (mode === 'falloc' && !reserves);
    yield* writeZeroes(file, offset, isWritten ? end : Math.min(end, Math.max(offset, oldEnd)));
    yield* file.grow(end);
    if (reserves) yield* file.allocate!(offset, end - offset);
  });
}

function* writeZeroes(file: ImageFile, offset: number, end: number): Task<void> {
  const zeroes = Buffer.alloc(Math.min(ZEROES_BYTES, Math.max(0, end - offset)));
  for (let at = offset; at < end; at += zeroes.length) {
    yield* writeAt(file, at, zeroes.subarray(0, Math.min(zeroes.length, end - at)));
  }
}

/**
 * Zeroes what the cluster at the old end holds beyond it: in a copy of the cluster, so that nothing changes before the commit. A
 * compressed cluster stays as it is, and so does an encrypted one and one of an external file, as in QEMU.
 */
function* clearTail(edit: ImageEdit, l1: Buffer, backing: BackingContent | null): Task<void> {
  const { header, clusterBytes } = edit;
  const used = header.sizeBytes % clusterBytes;
  if (used === 0 || hasExternalData(header) || header.cryptMethod !== CryptMethod.none) return;
  const entryBytes = l2EntryBytes(header);
  const perTable = clusterBytes / entryBytes;
  const cluster = Math.floor(header.sizeBytes / clusterBytes);
  const index = Math.floor(cluster / perTable);
  const at = (cluster % perTable) * entryBytes;
  const table = Buffer.alloc(clusterBytes);
  const l2Offset = entryOffset(l1, index * 8);
  if (l2Offset > 0) yield* edit.file.read(l2Offset, table);
  if (isCompressed(table, at)) return;
  const content = yield* readCluster(edit, table, at, backing, cluster * clusterBytes);
  if (content.subarray(used).every((byte) => byte === 0)) return;
  content.fill(0, used);
  const placed = yield* edit.place(content);
  yield* rewriteL2(edit, l1, index, function* (bytes) {
    yield* countEntries(edit, bytes, cluster % perTable, (cluster % perTable) + 1, -1, index);
    writeEntry(bytes, at, placed);
    if (hasExtendedL2(header)) writeSubclusters(bytes, at, 0, 0xffffffff);
  });
}

function writeSubclusters(table: Buffer, at: number, zero: number, allocated: number): void {
  table.writeUInt32BE(zero, at + 8);
  table.writeUInt32BE(allocated, at + 12);
}

/** What a cluster that is not compressed reads as. */
function* readCluster(
  edit: ImageEdit,
  table: Buffer,
  at: number,
  backing: BackingContent | null,
  diskOffset: number,
): Task<Buffer> {
  const { header, clusterBytes, file } = edit;
  const content = Buffer.alloc(clusterBytes);
  const isExtended = hasExtendedL2(header);
  const zero = isExtended ? table.readUInt32BE(at + 8) : isZeroEntry(table, at) ? 0xffffffff : 0;
  const host = dataOffset(table, at, clusterBytes, 0, at);
  const allocated = isExtended ? table.readUInt32BE(at + 12) : host > 0 ? 0xffffffff : 0;
  if (isEmptyEntry(table, at) && zero === 0 && backing === null) return content;
  const partBytes = clusterBytes / SUBCLUSTERS;
  for (let i = 0; i < SUBCLUSTERS; i++) {
    const part = content.subarray(i * partBytes, (i + 1) * partBytes);
    if (((zero >>> i) & 1) !== 0) continue;
    if (((allocated >>> i) & 1) !== 0) yield* file.read(host + i * partBytes, part);
    else if (backing !== null) yield* backing.read(diskOffset + i * partBytes, part);
  }
  return content;
}

function* resizeBitmaps(edit: ImageEdit, sizeBytes: number): Task<Partial<Qcow2Header>> {
  if (edit.bitmaps.length === 0) return {};
  const resized: Bitmap[] = [];
  for (const bitmap of edit.bitmaps) {
    const bits = yield* loadBits(edit.file, edit.header, bitmap);
    yield* freeBits(edit, bitmap);
    resized.push({ ...bitmap, ...(yield* placeBits(edit, bits.resized(sizeBytes))) });
  }
  return yield* placeDirectory(edit, resized);
}

function* replaceL1(edit: ImageEdit, l1: Buffer): Task<Partial<Qcow2Header>> {
  if (l1.equals(edit.l1)) return {};
  yield* edit.free({ offset: edit.header.l1Offset, lengthBytes: edit.l1.length });
  return { l1Offset: yield* edit.place(l1), l1Entries: l1.length / 8 };
}
