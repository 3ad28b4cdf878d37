/**
 * Who uses which cluster: everything an image holds is walked once, and each host cluster's references are counted.
 *
 * L2 tables are first counted by where they are, then read in the order of the file, each once however many snapshots share it.
 *
 * Invariants
 * - Nothing beyond the end of the file is counted; an offset is compared before it becomes an index.
 * - What is read is bounded by the size of the file: an image whose tables overlap so that they would be more is given up.
 */
import { BdevError } from '../../bdev.js';
import { counterMax } from '../counter-bits.js';
import { Autoclear, clusterBytesOf, hasExtendedL2, hasExternalData, l2EntryBytes } from '../format.js';
import type { Qcow2Header } from '../format.js';
import type { ImageFile } from '../image-file.js';
import { decodeBitmaps } from '../tables.js';
import type { Task } from '../../task.js';
import { PagedCounters } from './paged-counters.js';
import type { ReportBuilder } from './report.js';
import { walkSnapshots } from './snapshots.js';

const READ_BYTES = 2 ** 20;
/** L2 tables that lie this near to each other are read at once. */
const READ_GAP_BYTES = 64 * 1024;
/** Clusters of one image, as QEMU has it. */
export const CLUSTERS_MAX = 2 ** 31 - 1;
const UNALIGNED_TABLES_MAX = 1024;
/** Reads beyond those of the file's size: small tables, read in whole buffers. */
const SLACK_BYTES = 256 * 2 ** 20;

/** Bits of `ImageReferences.flags`: how the active tables refer to a cluster, and its refcount. */
export const ClusterFlag = { usedCopied: 1, usedShared: 2, refcountIsOne: 4 } as const;

/** High and low half of an entry, read as big endian. */
const OFFSET_HIGH = 0x00ffffff;
const OFFSET_LOW = 0xfffffe00;
const COMPRESSED_HIGH = 0x40000000;
const L1_RESERVED_HIGH = 0x7f000000;
const L1_RESERVED_LOW = 0x1ff;
const L2_RESERVED_HIGH = 0x3f000000;
const L2_RESERVED_LOW = 0x1fe;
const ZERO_LOW = 1;
const BITMAP_RESERVED_HIGH = 0xff000000;
const BITMAP_RESERVED_LOW = 0x1fe;

/** A preallocated cluster whose offset cannot be right holds nothing: its entry may be made one of zeroes. */
export interface BadZeroEntry {
  readonly tableOffset: number;
  readonly index: number;
}

export interface WalkOptions {
  /** Whether entries that can be made good will be: they are not counted then, see `badZeroEntries`. */
  readonly isRepair: boolean;
  /** Called with 0 to 1. */
  readonly onProgress: (fraction: number) => void;
}

export class ImageReferences {
  readonly file: ImageFile;
  readonly header: Qcow2Header;
  readonly report: ReportBuilder;
  readonly clusterBytes: number;
  readonly fileBytes: number;
  readonly clusterCount: number;
  readonly counts: PagedCounters;
  readonly flags: PagedCounters;
  /** L2 tables by cluster: how many entries of the active L1, and of those of snapshots, name them. */
  readonly activeTables: PagedCounters;
  readonly inactiveTables: PagedCounters;
  /** Offsets of L2 tables that begin at no cluster, with the same two numbers. */
  readonly unalignedTables = new Map<number, { active: number; inactive: number }>();
  readonly badZeroEntries: BadZeroEntry[] = [];
  /** Whether "copied" bits are wrong for sure: in entries of clusters that are outside of the file, or in another one. */
  hasWrongCopied = false;
  #readBytes = 0;
  readonly #options: WalkOptions;

  constructor(file: ImageFile, header: Qcow2Header, report: ReportBuilder, options: WalkOptions) {
    this.file = file;
    this.header = header;
    this.report = report;
    this.#options = options;
    this.clusterBytes = clusterBytesOf(header);
    this.fileBytes = file.sizeBytes;
    this.clusterCount = Math.ceil(this.fileBytes / this.clusterBytes);
    const counters = (max: number) => new PagedCounters(this.clusterCount, max);
    this.counts = counters(counterMax(header.refcountOrder));
    this.flags = counters(0xff);
    this.activeTables = counters(2 ** 32 - 1);
    this.inactiveTables = counters(2 ** 32 - 1);
  }

  /** Counts all but the refcount table and its blocks. Throws BdevError when the image cannot be walked. */
  *count(): Task<void> {
    const { header } = this;
    this.reference(0, this.clusterBytes, 1, 'header');
    yield* this.#countL1('l1', header.l1Offset, header.l1Entries, true);
    yield* walkSnapshots(this);
    yield* this.#countL2Tables();
    const { luksHeader } = header;
    if (luksHeader !== null) this.reference(luksHeader.offset, luksHeader.lengthBytes, 1, 'luks.offset');
    yield* this.#countBitmaps();
  }

  /**
   * Counts a reference to a range of the file; one that is not in the file is a corruption.
   * @returns whether all of it was counted
   */
  reference(offset: number, lengthBytes: number, times: number, field: string): boolean {
    if (lengthBytes === 0) return true;
    const { clusterBytes } = this;
    // The last cluster of a file may be cut short.
    if (offset + lengthBytes - this.fileBytes >= clusterBytes) {
      this.report.corruption(field, `reaches to ${offset + lengthBytes}, the file ends at ${this.fileBytes}`, times);
      return false;
    }
    let isCounted = true;
    const last = Math.min(Math.floor((offset + lengthBytes - 1) / clusterBytes), this.clusterCount - 1);
    for (let cluster = Math.floor(offset / clusterBytes); cluster <= last; cluster++) {
      const excess = this.counts.add(cluster, times);
      if (excess === 0) continue;
      this.#overflow(cluster, excess);
      isCounted = false;
    }
    return isCounted;
  }

  /** Takes note of a snapshot's L1 table. */
  *countSnapshotL1(field: string, offset: number, entries: number): Task<void> {
    yield* this.#countL1(field, offset, entries, false);
  }

  /** Reads part of a table, in big pieces. Throws BdevError when an image makes that endless. */
  *readTable(offset: number, bytes: Uint8Array): Task<void> {
    this.#readBytes += bytes.length;
    if (this.#readBytes > this.fileBytes * 2 + SLACK_BYTES) {
      const message = 'the tables of the image overlap: they have more entries than the file has room for';
      throw new BdevError('bad-image', 'image', message, 'restore the image from a backup');
    }
    yield* this.file.read(offset, bytes);
  }

  /** Reads a table of 8-byte entries from end to end. @param take is given whole entries, as words in the order of the file */
  *eachEntries(offset: number, entries: number, take: (words: Uint32Array, first: number) => void): Task<void> {
    const wanted = Math.min(entries * 8, Math.max(0, Math.ceil((this.fileBytes - offset) / 8) * 8));
    const buffer = new Uint32Array(Math.min(READ_BYTES, wanted) / 4);
    for (let at = 0; at < wanted; at += READ_BYTES) {
      const words = buffer.subarray(0, Math.min(buffer.length, (wanted - at) / 4));
      yield* this.readTable(offset + at, new Uint8Array(words.buffer, 0, words.byteLength));
      take(words, at / 8);
    }
  }

  #overflow(cluster: number, times: number): void {
    const { refcountOrder } = this.header;
    const message = `of ${2 ** refcountOrder} bits are too narrow for the references to cluster ${cluster}`;
    this.report.corruption('refcounts', message, times);
  }

  *#countL1(field: string, offset: number, entries: number, isActive: boolean): Task<void> {
    this.reference(offset, entries * 8, 1, `${field}_table_offset`);
    yield* this.eachEntries(offset, entries, (words, first) => {
      for (let i = 0; i < words.length; i += 2) {
        if ((words[i]! | words[i + 1]!) !== 0) {
          this.#countL1Entry(`${field}[${first + i / 2}]`, swap(words[i]!), swap(words[i + 1]!), isActive);
        }
      }
    });
  }

  #countL1Entry(field: string, high: number, low: number, isActive: boolean): void {
    const { clusterBytes, report } = this;
    if ((high & L1_RESERVED_HIGH) !== 0 || (low & L1_RESERVED_LOW) !== 0) {
      report.corruption(field, 'has reserved bits set');
    }
    const offset = offsetOf(high, low);
    this.reference(offset, clusterBytes, 1, field);
    const isInside = offset < this.fileBytes;
    if (offset % clusterBytes !== 0) {
      report.corruption(field, `is ${offset}, not the start of a cluster`);
      if (isInside) this.#noteUnaligned(offset, isActive);
    } else if (isInside && offset !== 0) {
      (isActive ? this.activeTables : this.inactiveTables).add(offset / clusterBytes, 1);
    }
    if (isActive && offset !== 0) this.#noteCopied(offset, high < 0);
  }

  #noteUnaligned(offset: number, isActive: boolean): void {
    const known = this.unalignedTables.get(offset) ?? { active: 0, inactive: 0 };
    if (isActive) known.active++;
    else known.inactive++;
    this.unalignedTables.set(offset, known);
    if (this.unalignedTables.size > UNALIGNED_TABLES_MAX) {
      const message = `the L1 tables are destroyed: more than ${UNALIGNED_TABLES_MAX} entries are not the start of a cluster`;
      throw new BdevError('bad-image', 'l1', message, 'restore the image from a backup');
    }
  }

  #noteCopied(offset: number, isCopied: boolean): void {
    const cluster = Math.floor(offset / this.clusterBytes);
    if (cluster < this.clusterCount) {
      this.flags.mark(cluster, isCopied ? ClusterFlag.usedCopied : ClusterFlag.usedShared);
    } else if (isCopied) {
      this.hasWrongCopied = true;
    }
  }

  *#countL2Tables(): Task<void> {
    const { clusterBytes, clusterCount } = this;
    const buffer = new Uint32Array(Math.max(READ_BYTES, clusterBytes) / 4);
    const bytes = new Uint8Array(buffer.buffer);
    const wordsPerTable = clusterBytes / 4;
    const clustersPerRead = bytes.length / clusterBytes;
    const gap = Math.max(1, READ_GAP_BYTES / clusterBytes);
    for (let cluster = this.nextTable(0); cluster < clusterCount;) {
      const tables = [cluster];
      let next = this.nextTable(cluster + 1);
      while (next < clusterCount && next - cluster < clustersPerRead && next - tables.at(-1)! <= gap) {
        tables.push(next);
        next = this.nextTable(next + 1);
      }
      const piece = bytes.subarray(0, (tables.at(-1)! - cluster + 1) * clusterBytes);
      yield* this.readTable(cluster * clusterBytes, piece);
      for (const table of tables) {
        const start = (table - cluster) * wordsPerTable;
        const words = buffer.subarray(start, start + wordsPerTable);
        this.#countL2(words, table * clusterBytes, this.activeTables.get(table), this.inactiveTables.get(table));
      }
      this.#options.onProgress(cluster / clusterCount);
      cluster = next;
    }
    for (const [offset, { active, inactive }] of this.unalignedTables) {
      yield* this.readTable(offset, bytes.subarray(0, clusterBytes));
      this.#countL2(buffer.subarray(0, wordsPerTable), offset, active, inactive);
    }
  }

  /** The first L2 table from this cluster on. */
  nextTable(from: number): number {
    return Math.min(this.activeTables.nextUsed(from), this.inactiveTables.nextUsed(from));
  }

  /** One L2 table, in as many L1 entries as `active` and `inactive` say. */
  #countL2(words: Uint32Array, tableOffset: number, active: number, inactive: number): void {
    const { header, report, clusterBytes } = this;
    const isExtended = hasExtendedL2(header);
    const isExternal = hasExternalData(header);
    const step = l2EntryBytes(header) / 4;
    const times = active + inactive;
    let contiguous = 0;
    for (let i = 0; i < words.length; i += step) {
      const rawHigh = words[i]!;
      const rawLow = words[i + 1]!;
      const bitmap = isExtended ? words[i + 2]! | words[i + 3]! : 0;
      if ((rawHigh | rawLow | bitmap) === 0) continue;
      const high = swap(rawHigh);
      const low = swap(rawLow);
      const index = i / step;
      if ((high & COMPRESSED_HIGH) !== 0) {
        if (this.#countCompressed(high, low, bitmap !== 0, times, `l2@${hex(tableOffset)}[${index}]`)) {
          report.allocatedClusters += active;
          report.compressedClusters += active;
          report.fragmentedClusters += active;
        }
        continue;
      }
      if ((high & L2_RESERVED_HIGH) !== 0 || (low & L2_RESERVED_LOW) !== 0) {
        report.corruption(`l2@${hex(tableOffset)}[${index}]`, 'has reserved bits set', times);
      }
      const isZero = !isExtended && (low & ZERO_LOW) !== 0;
      const offset = offsetOf(high, low);
      if (offset === 0 && !(isExternal && !isZero && high < 0)) {
        // Swapping keeps a word's bits: what counts is whether there are any.
        if (isExtended && words[i + 3]! !== 0) {
          report.corruption(`l2@${hex(tableOffset)}[${index}]`, 'has subclusters without a cluster', times);
        }
        continue;
      }
      if (isExtended && (words[i + 2]! & words[i + 3]!) !== 0) {
        report.corruption(`l2@${hex(tableOffset)}[${index}]`, 'has subclusters that are both data and zeroes', times);
      }
      if (offset % clusterBytes !== 0) {
        const holdsData = isExtended ? words[i + 3]! !== 0 : !isZero;
        if (this.#noteUnalignedCluster(tableOffset, index, offset, holdsData, times)) continue;
      }
      if (active > 0) {
        report.allocatedClusters += active;
        if (contiguous !== 0 && offset !== contiguous) report.fragmentedClusters += active;
        contiguous = offset + clusterBytes;
        if (!isExternal) this.#noteCopied(offset, high < 0);
        else if (high >= 0) this.hasWrongCopied = true;
      }
      if (!isExternal) this.#countCluster(offset, times, tableOffset, index);
    }
  }

  #countCluster(offset: number, times: number, tableOffset: number, index: number): void {
    const { clusterBytes } = this;
    if (offset % clusterBytes === 0 && offset < this.fileBytes) {
      const excess = this.counts.add(offset / clusterBytes, times);
      if (excess > 0) this.#overflow(offset / clusterBytes, excess);
    } else {
      this.reference(offset, clusterBytes, times, `l2@${hex(tableOffset)}[${index}]`);
    }
  }

  /** @returns whether the entry will be repaired */
  #noteUnalignedCluster(
    tableOffset: number,
    index: number,
    offset: number,
    holdsData: boolean,
    times: number,
  ): boolean {
    if (!holdsData && this.#options.isRepair) {
      this.badZeroEntries.push({ tableOffset, index });
      return true;
    }
    this.report.corruption(`l2@${hex(tableOffset)}[${index}]`, `is ${offset}, not the start of a cluster`, times);
    return false;
  }

  /** @returns whether it could be a compressed cluster */
  #countCompressed(high: number, low: number, hasBitmap: boolean, times: number, field: string): boolean {
    const { header, report } = this;
    if (high < 0) report.corruption(field, 'is compressed and says "copied"', times);
    if (hasExternalData(header)) {
      report.corruption(field, 'is compressed in an image with an external data file', times);
      return false;
    }
    if (hasBitmap) {
      report.corruption(field, 'is compressed and has subclusters', times);
      return false;
    }
    const { offset, lengthBytes } = compressedExtent(high, low, header.clusterBits);
    this.reference(offset, lengthBytes, times, field);
    return true;
  }

  *#countBitmaps(): Task<void> {
    const { header, report } = this;
    const { bitmaps } = header;
    // Without the bit somebody wrote to the image who knew no bitmaps: they are gone, and their clusters leaked.
    if (bitmaps === null || (header.autoclear & Autoclear.bitmaps) === 0n) return;
    this.reference(bitmaps.directoryOffset, bitmaps.directoryBytes, 1, 'bitmaps.bitmap_directory_offset');
    const directory = Buffer.alloc(bitmaps.directoryBytes);
    yield* this.readTable(bitmaps.directoryOffset, directory);
    for (const bitmap of decodeBitmaps(directory, bitmaps.count, header, Infinity)) {
      const field = `bitmap "${bitmap.name}"`;
      this.reference(bitmap.tableOffset, bitmap.tableEntries * 8, 1, `${field}.bitmap_table_offset`);
      yield* this.eachEntries(bitmap.tableOffset, bitmap.tableEntries, (words, first) => {
        for (let i = 0; i < words.length; i += 2) {
          if ((words[i]! | words[i + 1]!) === 0) continue;
          const high = swap(words[i]!);
          const low = swap(words[i + 1]!);
          const offset = offsetOf(high, low);
          const isBad =
            (high & BITMAP_RESERVED_HIGH) !== 0 ||
            (low & BITMAP_RESERVED_LOW) !== 0 ||
            (offset !== 0 && ((low & 1) !== 0 || offset % this.clusterBytes !== 0));
          const entry = `${field}[${first + i / 2}]`;
          if (isBad) report.corruption(entry, 'is no entry of a bitmap table');
          else if (offset !== 0) this.reference(offset, this.clusterBytes, 1, entry);
        }
      });
    }
  }
}

/** Where the data of a compressed cluster is: from a byte to the end of a sector. */
export function compressedExtent(
  high: number,
  low: number,
  clusterBits: number,
): { offset: number; lengthBytes: number } {
  const offsetBits = 62 - (clusterBits - 8);
  const highBits = offsetBits - 32;
  const offset = (high & (2 ** highBits - 1)) * 2 ** 32 + (low >>> 0);
  const sectors = ((high & 0x3fffffff) >>> highBits) + 1;
  return { offset, lengthBytes: sectors * 512 - (offset % 512) };
}

/** The offset of a standard entry: exact up to 2^53, and beyond every file above that. */
export function offsetOf(high: number, low: number): number {
  return (high & OFFSET_HIGH) * 2 ** 32 + ((low & OFFSET_LOW) >>> 0);
}

/** A word in the other byte order, as a signed number: bit 63 of an entry is the sign of its high half. */
export function swap(word: number): number {
  return ((word & 0xff) << 24) | ((word & 0xff00) << 8) | ((word >>> 8) & 0xff00) | (word >>> 24);
}

export function hex(offset: number): string {
  return `0x${offset.toString(16)}`;
}
