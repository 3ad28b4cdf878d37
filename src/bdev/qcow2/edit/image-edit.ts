/**
 * One edit of an image: what is new is written to free clusters, and `commit` puts it into force with one write of the header.
 *
 * Invariants
 * - Before the commit nothing that the image uses is written to, so a crash leaves the image as it was, without a leak.
 * - The commit comes after a sync of all that it points at; it is durable when `commit` returns.
 * - An edit that ends with an error has not changed the image.
 */
import { BdevError } from '../../bdev.js';
import { Autoclear, clusterBytesOf, hasExternalData } from '../format.js';
import type { BitmapsExtension, Qcow2Header } from '../format.js';
import { badImage, unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import { SNAPSHOT_TABLE_BYTES_MAX, decodeBitmaps, decodeSnapshots } from '../tables.js';
import type { Bitmap, Snapshot } from '../tables.js';
import type { Task } from '../../task.js';
import { ClusterRanges } from './cluster-ranges.js';
import { entryOffset } from './entries.js';
import { writeAt } from './file-access.js';
import { assertEditable, commitHeader, loadHeader } from './header.js';
import type { LoadedHeader } from './header.js';
import { RefcountEditor } from './refcount-editor.js';

/** Where a table lies, and how much of its clusters it takes. */
export interface Extent {
  readonly offset: number;
  readonly lengthBytes: number;
}

const SNAPSHOT_FIXED_BYTES = 40;
/** A file has holes of whole blocks. */
const FILE_BLOCK_BYTES = 4096;

export class ImageEdit {
  readonly file: ImageFile;
  readonly refcounts: RefcountEditor;
  readonly clusterBytes: number;
  readonly snapshots: readonly Snapshot[];
  readonly bitmaps: readonly Bitmap[];
  /** The active L1 table as it is in the file. */
  readonly l1: Buffer;
  readonly #loaded: LoadedHeader;
  readonly #snapshotTableBytes: number;

  private constructor(
    file: ImageFile,
    refcounts: RefcountEditor,
    loaded: LoadedHeader,
    l1: Buffer,
    { snapshots, bytes }: { snapshots: readonly Snapshot[]; bytes: number },
    bitmaps: readonly Bitmap[],
  ) {
    this.file = file;
    this.refcounts = refcounts;
    this.clusterBytes = clusterBytesOf(loaded.header);
    this.#loaded = loaded;
    this.l1 = l1;
    this.snapshots = snapshots;
    this.#snapshotTableBytes = bytes;
    this.bitmaps = bitmaps;
  }

  /** Reads what an edit has to know. Throws BdevError for an image that must not be changed. */
  static *open(file: ImageFile): Task<ImageEdit> {
    const loaded = yield* loadHeader(file);
    const { header } = loaded;
    assertEditable(header);
    const metadata = new ClusterRanges();
    const clusterBytes = clusterBytesOf(header);
    const add = (offset: number, lengthBytes: number): void =>
      metadata.add(offset / clusterBytes, Math.ceil(lengthBytes / clusterBytes));
    add(0, clusterBytes);
    if (header.luksHeader !== null) add(header.luksHeader.offset, header.luksHeader.lengthBytes);

    const l1 = yield* loadL1(file, header, header.l1Offset, header.l1Entries, 'l1');
    add(header.l1Offset, l1.length);
    for (let at = 0; at < l1.length; at += 8) {
      const offset = entryOffset(l1, at);
      if (offset > 0) add(offset, clusterBytes);
    }
    const snapshots = yield* loadSnapshots(file, header);
    if (snapshots.bytes > 0) add(header.snapshotTableOffset, snapshots.bytes);
    for (const { l1Offset, l1Entries } of snapshots.snapshots) add(l1Offset, l1Entries * 8);
    const bitmaps = yield* loadBitmapDirectory(file, header);
    if (bitmaps.length > 0) add(header.bitmaps!.directoryOffset, header.bitmaps!.directoryBytes);
    for (const { tableOffset, tableEntries } of bitmaps) add(tableOffset, tableEntries * 8);

    const refcounts = yield* RefcountEditor.open(file, header, metadata);
    const edit = new ImageEdit(file, refcounts, loaded, l1, snapshots, bitmaps);
    yield* edit.#assertCounted();
    return edit;
  }

  get header(): Qcow2Header {
    return this.#loaded.header;
  }

  /** Where the snapshot table lies. */
  get snapshotTable(): Extent {
    return { offset: this.header.snapshotTableOffset, lengthBytes: this.#snapshotTableBytes };
  }

  /** Where the bitmap directory lies. */
  get bitmapDirectory(): Extent {
    const { bitmaps } = this.header;
    if (bitmaps === null || !hasBitmaps(this.header)) return { offset: 0, lengthBytes: 0 };
    return { offset: bitmaps.directoryOffset, lengthBytes: bitmaps.directoryBytes };
  }

  /** Writes a table to new clusters that follow one another. Nothing is written for an empty one: its offset is 0. */
  *place(table: Buffer): Task<number> {
    if (table.length === 0) return 0;
    const count = Math.ceil(table.length / this.clusterBytes);
    const whole = Buffer.alloc(count * this.clusterBytes);
    table.copy(whole);
    const offset = (yield* this.refcounts.allocate(count)) * this.clusterBytes;
    yield* writeAt(this.file, offset, whole);
    return offset;
  }

  /** Gives back the clusters of a table. */
  *free({ offset, lengthBytes }: Extent): Task<void> {
    if (lengthBytes === 0) return;
    yield* this.refcounts.lower(offset / this.clusterBytes, Math.ceil(lengthBytes / this.clusterBytes));
  }

  /** Puts the edit into force. Throws BdevError, and then it is as if nothing had been done, unless that was the last sync. */
  *commit(change: Partial<Qcow2Header>): Task<Qcow2Header> {
    const table = yield* this.refcounts.finish();
    yield* this.file.sync();
    const header = { ...this.header, ...change, ...table };
    // Bitmaps that somebody let go stale are not carried on.
    const wanted = hasBitmaps(header) ? header : { ...header, bitmaps: null };
    return (yield* commitHeader(this.file, this.#loaded, wanted)).header;
  }

  /** After the commit: gives the space of what is not in use any more back to the file system, where that can be done. */
  *giveBack(): Task<void> {
    const { file, clusterBytes } = this;
    if (file.deallocate === undefined) return;
    const block = Math.max(clusterBytes, FILE_BLOCK_BYTES);
    try {
      yield* this.refcounts.eachFreed(function* (first, count) {
        const start = Math.ceil((first * clusterBytes) / block) * block;
        const end = Math.min(Math.floor(((first + count) * clusterBytes) / block) * block, file.sizeBytes);
        if (end > start) yield* file.deallocate!(start, end - start);
      });
    } catch (error) {
      // The edit is done; not every file can have holes.
      if (!(error instanceof BdevError)) throw error;
    }
  }

  /** The tables that an edit moves are counted: found here, before anything is written. */
  *#assertCounted(): Task<void> {
    const { header } = this;
    const tables: readonly (readonly [string, number, number])[] = [
      ['header', 0, 1],
      ['header.l1_table_offset', header.l1Offset, this.l1.length],
      ['header.refcount_table_offset', header.refcountTableOffset, header.refcountTableClusters * this.clusterBytes],
      ['header.snapshots_offset', header.snapshotTableOffset, this.#snapshotTableBytes],
      ['bitmaps.bitmap_directory_offset', this.bitmapDirectory.offset, this.bitmapDirectory.lengthBytes],
    ];
    for (const [field, offset, lengthBytes] of tables) {
      for (let at = offset; at < offset + lengthBytes; at += this.clusterBytes) {
        if ((yield* this.refcounts.get(at / this.clusterBytes)) === 0) {
          throw badImage(field, `lies at ${offset}, where the refcount is 0`);
        }
      }
    }
  }
}

/** Loads an L1 table and checks its offsets. Throws BdevError. */
export function* loadL1(
  file: ImageFile,
  header: Qcow2Header,
  offset: number,
  entries: number,
  field: string,
): Task<Buffer> {
  const clusterBytes = clusterBytesOf(header);
  const l1 = Buffer.alloc(entries * 8);
  yield* file.read(offset, l1);
  let tables = 0;
  for (let i = 0; i < entries; i++) {
    const at = entryOffset(l1, i * 8);
    if (at === 0) continue;
    tables++;
    if (at % clusterBytes !== 0) throw badImage(`${field}[${i}]`, `is ${at}, not the start of a cluster`);
    if (at + clusterBytes > Math.ceil(file.sizeBytes / clusterBytes) * clusterBytes) {
      throw badImage(`${field}[${i}]`, `is ${at}, beyond the end of the file`);
    }
  }
  if (tables * clusterBytes > file.sizeBytes) throw badImage(field, 'has more L2 tables than the file has clusters');
  return l1;
}

/** The snapshots and the length of their table. Throws BdevError. */
export function* loadSnapshots(
  file: ImageFile,
  header: Qcow2Header,
): Task<{ snapshots: readonly Snapshot[]; bytes: number }> {
  if (header.snapshotCount === 0) return { snapshots: [], bytes: 0 };
  const limit = Math.min(SNAPSHOT_TABLE_BYTES_MAX, file.sizeBytes - header.snapshotTableOffset);
  let bytes = Buffer.alloc(Math.min(limit, header.snapshotCount * 256));
  yield* file.read(header.snapshotTableOffset, bytes);
  let at = 0;
  for (let i = 0; i < header.snapshotCount; i++) {
    // An entry has up to 40 + 1024 + 2 * 65535 bytes; what does not end within the limit is found by the decoder.
    while (at + entryBytes(bytes, at) > bytes.length && bytes.length < limit) {
      bytes = Buffer.alloc(Math.min(limit, bytes.length * 2));
      yield* file.read(header.snapshotTableOffset, bytes);
    }
    at += entryBytes(bytes, at);
  }
  return decodeSnapshots(bytes, header, file.sizeBytes);
}

/** Length of a snapshot's entry, as far as it can be seen. */
function entryBytes(bytes: Buffer, at: number): number {
  if (at + SNAPSHOT_FIXED_BYTES > bytes.length) return SNAPSHOT_FIXED_BYTES;
  const names = bytes.readUInt16BE(at + 12) + bytes.readUInt16BE(at + 14);
  return Math.ceil((SNAPSHOT_FIXED_BYTES + bytes.readUInt32BE(at + 36) + names) / 8) * 8;
}

/** Whether the bitmaps are up to date: a program that does not know them clears the bit when it writes. */
export function hasBitmaps({ autoclear, bitmaps }: Qcow2Header): boolean {
  return bitmaps !== null && (autoclear & Autoclear.bitmaps) !== 0n;
}

/** The bitmaps of the image. Throws BdevError. */
export function* loadBitmapDirectory(file: ImageFile, header: Qcow2Header): Task<readonly Bitmap[]> {
  if (!hasBitmaps(header)) return [];
  const { count, directoryOffset, directoryBytes } = header.bitmaps as BitmapsExtension;
  const bytes = Buffer.alloc(directoryBytes);
  yield* file.read(directoryOffset, bytes);
  return decodeBitmaps(bytes, count, header, file.sizeBytes);
}

/** Throws BdevError for an image whose data lies in another file: it has no snapshots. */
export function assertNoExternalData(header: Qcow2Header): void {
  if (!hasExternalData(header)) return;
  throw unsupportedImage(
    'header.incompatible_features',
    'says that the data lies in an external file',
    'snapshots need the data within the image: convert it',
  );
}

/** Where the last cluster that is in use ends: what the file has beyond is not needed. Throws BdevError. */
export function* imageEnd(file: ImageFile): Task<number> {
  const { header } = yield* loadHeader(file);
  assertEditable(header);
  const refcounts = yield* RefcountEditor.open(file, header, new ClusterRanges());
  return ((yield* refcounts.last()) + 1) * clusterBytesOf(header);
}
