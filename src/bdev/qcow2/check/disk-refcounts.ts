/**
 * The refcounts that an image holds, against the references that were counted; and putting them right, in place or from scratch.
 *
 * Invariants
 * - From scratch, nothing of the old refcounts is written over: the new ones lie in clusters that neither they nor anything else uses,
 *   and are in force with one write to the header, after a sync.
 * - In place, a block is only written to when it is used by nothing else.
 */
import { BdevError } from '../../bdev.js';
import { readCounter, writeCounter } from '../counter-bits.js';
import { REFCOUNT_TABLE_BYTES_MAX, refcountsPerBlock, writeUInt64 } from '../format.js';
import type { Task } from '../../task.js';
import type { Repair } from '../check.js';
import { ClusterFlag, hex, swap } from './image-references.js';
import type { ImageReferences } from './image-references.js';
import { PAGE_CLUSTERS } from './paged-counters.js';

const TABLE_RESERVED_HIGH = 0xff000000;
const TABLE_RESERVED_LOW = 0x1ff;
/** Field of the refcount table in the header, with its length behind it. */
const HEADER_TABLE_AT = 48;

export class DiskRefcounts {
  readonly #image: ImageReferences;
  readonly #order: number;
  readonly #perBlock: number;
  /** Offsets of the blocks, with 0 for none and what is unusable negative. */
  #blocks: Float64Array = new Float64Array(0);
  readonly #block: Buffer;
  /** Whether the refcounts cannot be put right where they are. */
  mustRebuild = false;
  /** Whether entries of the active tables say wrongly that their cluster is used once, or that it is not. */
  hasWrongCopied = false;
  /** Corruptions that are gone when the refcounts are made anew. */
  #structureCorruptions = 0;
  /** Clusters of the table and the blocks, as they were counted. */
  readonly #ownClusters: number[] = [];

  constructor(image: ImageReferences) {
    this.#image = image;
    this.#order = image.header.refcountOrder;
    this.#perBlock = refcountsPerBlock(image.header);
    this.#block = Buffer.alloc(image.clusterBytes);
  }

  /** Counts the refcount table and its blocks as references, and looks at the table. */
  *count(): Task<void> {
    const image = this.#image;
    const { clusterBytes, report, header } = image;
    const { refcountTableOffset, refcountTableClusters } = header;
    const tableBytes = refcountTableClusters * clusterBytes;
    const before = report.corruptions;
    this.#countOwn(refcountTableOffset, tableBytes, 'header.refcount_table_offset');
    this.#blocks = new Float64Array(tableBytes / 8);
    yield* image.eachEntries(refcountTableOffset, tableBytes / 8, (words, first) => {
      for (let i = 0; i < words.length; i += 2) {
        if ((words[i]! | words[i + 1]!) !== 0) this.#countEntry(first + i / 2, swap(words[i]!), swap(words[i + 1]!));
      }
    });
    if (report.corruptions > before) this.mustRebuild = true;
    this.#structureCorruptions = report.corruptions - before;
  }

  #countEntry(index: number, high: number, low: number): void {
    const { report, counts, clusterBytes, clusterCount } = this.#image;
    const field = `refcount_table[${index}]`;
    const offset = (high & ~TABLE_RESERVED_HIGH) * 2 ** 32 + ((low & ~TABLE_RESERVED_LOW) >>> 0);
    const isAligned = offset % clusterBytes === 0;
    this.#blocks[index] = isAligned ? offset : -1;
    if ((high & TABLE_RESERVED_HIGH) !== 0 || (low & TABLE_RESERVED_LOW) !== 0) {
      report.corruption(field, 'has reserved bits set');
    } else if (!isAligned) {
      report.corruption(field, `is ${offset}, not the start of a cluster`);
    } else if (offset / clusterBytes >= clusterCount) {
      report.corruption(field, `is ${offset}, beyond the end of the file`);
    } else if (offset !== 0) {
      this.#countOwn(offset, clusterBytes, field);
      const references = counts.get(offset / clusterBytes);
      if (references !== 1) report.corruption(field, `is ${hex(offset)}, of which there are ${references} users`);
    }
  }

  #countOwn(offset: number, lengthBytes: number, field: string): void {
    const { clusterBytes } = this.#image;
    for (let at = offset; at < offset + lengthBytes; at += clusterBytes) {
      if (this.#image.reference(at, clusterBytes, 1, field)) this.#ownClusters.push(at / clusterBytes);
    }
  }

  /**
   * Compares all refcounts, and repairs those it may where they are. Notes which are 1.
   * @param repair `none` to look only
   */
  *compare(repair: Repair): Task<void> {
    const image = this.#image;
    const { clusterCount, clusterBytes } = image;
    let highest = -1;
    this.#forgetRefcounts();
    for (let index = 0; index * this.#perBlock < clusterCount; index++) {
      const first = index * this.#perBlock;
      const end = Math.min(first + this.#perBlock, clusterCount);
      const offset = this.#blocks[index] ?? 0;
      if (offset < 0) {
        image.report.error(
          `refcount_table[${index}]`,
          `names no block: ${end - first} clusters are not known`,
          end - first,
        );
        continue;
      }
      const hasBlock = offset > 0;
      if (!hasBlock && image.counts.nextUsed(first) >= end) continue;
      if (hasBlock) yield* image.file.read(offset, this.#block);
      else this.#block.fill(0);
      const compared = this.#compareBlock(first, end, hasBlock ? repair : 'none');
      highest = Math.max(highest, compared.highest);
      if (compared.isChanged) yield* image.file.write(offset, this.#block);
    }
    image.report.imageEndOffset = (Math.max(highest, 0) + 1) * clusterBytes;
  }

  #compareBlock(first: number, end: number, repair: Repair): { highest: number; isChanged: boolean } {
    const { counts, flags } = this.#image;
    let highest = -1;
    let isChanged = false;
    for (let start = first; start < end;) {
      const pageIndex = Math.floor(start / PAGE_CLUSTERS);
      const stop = Math.min(end, (pageIndex + 1) * PAGE_CLUSTERS);
      const references = counts.pages[pageIndex]!;
      const marks = flags.pages[pageIndex]!;
      for (let cluster = start; cluster < stop; cluster++) {
        const at = cluster % PAGE_CLUSTERS;
        let refcount = readCounter(this.#block, cluster - first, this.#order);
        const wanted = references === null ? 0 : references[at]!;
        if (refcount !== 0 || wanted !== 0) highest = cluster;
        if (refcount !== wanted && this.#differs(cluster, refcount, wanted, repair)) {
          writeCounter(this.#block, cluster - first, this.#order, wanted);
          refcount = wanted;
          isChanged = true;
        }
        if (marks !== null && marks[at] !== 0) this.#noteRefcount(marks, at, refcount === 1);
      }
      start = stop;
    }
    return { highest, isChanged };
  }

  #noteRefcount(marks: Uint8Array | Uint16Array | Uint32Array, at: number, isOne: boolean): void {
    if (isOne) marks[at]! |= ClusterFlag.refcountIsOne;
    const wrong = isOne ? ClusterFlag.usedShared : ClusterFlag.usedCopied;
    if ((marks[at]! & wrong) !== 0) this.hasWrongCopied = true;
  }

  /** @returns whether it is to be set to what is wanted */
  #differs(cluster: number, refcount: number, wanted: number, repair: Repair): boolean {
    const { report } = this.#image;
    const field = `refcounts[${cluster}]`;
    const message = `is ${refcount}, the cluster has ${wanted} users`;
    const isLeak = refcount > wanted;
    if (refcount === 0) this.mustRebuild = true;
    if (refcount !== 0 && (isLeak ? repair !== 'none' : repair === 'all')) {
      report.repaired(isLeak ? 'leak' : 'corruption', field, message);
      return true;
    }
    if (isLeak) report.leak(field, message);
    else report.corruption(field, message);
    return false;
  }

  /**
   * Writes new blocks and a new table from the references. What `compare` found is to be taken back: it is gone.
   * Throws BdevError when there is no room.
   */
  *rebuild(): Task<void> {
    const image = this.#image;
    const { counts, clusterBytes, file, report } = image;
    // With the old refcounts still counted as used: they are not written over.
    const place = this.#placeAnew();
    for (const cluster of this.#ownClusters) counts.subtract(cluster, 1);
    const { start, clusters, indices } = place;
    const tableClusters = clusters - indices.length;
    yield* file.grow((start + clusters) * clusterBytes);
    for (let i = 0; i < indices.length; i++) {
      this.#fillBlock(indices[i]!, start, start + clusters);
      yield* file.write((start + tableClusters + i) * clusterBytes, this.#block);
    }
    const table = Buffer.alloc(tableClusters * clusterBytes);
    indices.forEach((index, i) => writeUInt64(table, (start + tableClusters + i) * clusterBytes, index * 8));
    yield* file.write(start * clusterBytes, table);
    yield* file.sync();
    yield* this.#commitTable(start * clusterBytes, tableClusters);
    report.corruptions -= this.#structureCorruptions;
    report.corruptionsFixed += this.#structureCorruptions;
    report.imageEndOffset = Math.max(counts.lastUsed() + 1, start + clusters) * clusterBytes;
    this.#noteRefcounts();
  }

  *#commitTable(offset: number, clusters: number): Task<void> {
    const { file } = this.#image;
    const fields = Buffer.alloc(12);
    writeUInt64(fields, offset, 0);
    fields.writeUInt32BE(clusters, 8);
    yield* file.write(HEADER_TABLE_AT, fields);
    yield* file.sync();
  }

  /** Free clusters in a row for a table and then a block for each part of the file that has anything in it. */
  #placeAnew(): { start: number; clusters: number; indices: number[] } {
    const { counts, clusterBytes } = this.#image;
    const used: number[] = [];
    for (let cluster = counts.nextUsed(0); cluster < counts.clusterCount;) {
      const index = Math.floor(cluster / this.#perBlock);
      used.push(index);
      cluster = counts.nextUsed((index + 1) * this.#perBlock);
    }
    const known = new Set(used);
    for (let clusters = 0; ;) {
      const start = this.#freeRun(clusters);
      const indices = [...used];
      const end = start + clusters;
      for (let i = Math.floor(start / this.#perBlock); i * this.#perBlock < end; i++)
        if (!known.has(i)) indices.push(i);
      const last = indices.reduce((most, index) => Math.max(most, index), 0);
      const tableClusters = Math.ceil(((last + 1) * 8) / clusterBytes);
      if (tableClusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) {
        const message = 'the file is too long for a refcount table';
        throw new BdevError('too-large', 'refcounts', message, 'convert the image to larger clusters');
      }
      const needed = tableClusters + indices.length;
      if (needed <= clusters) return { start, clusters, indices };
      clusters = needed;
    }
  }

  /** The first so many clusters in a row that nothing uses, perhaps beyond the end of the file. */
  #freeRun(clusters: number): number {
    const { counts } = this.#image;
    for (let from = 1; ;) {
      const next = counts.nextUsed(from);
      if (next >= counts.clusterCount || next - from >= clusters) return from;
      from = next + 1;
    }
  }

  #fillBlock(index: number, runStart: number, runEnd: number): void {
    const { counts } = this.#image;
    const first = index * this.#perBlock;
    this.#block.fill(0);
    for (let i = 0; i < this.#perBlock; i++) {
      const cluster = first + i;
      const isOwn = cluster >= runStart && cluster < runEnd;
      const value = isOwn ? 1 : counts.get(cluster);
      if (value !== 0) writeCounter(this.#block, i, this.#order, value);
    }
  }

  #noteRefcounts(): void {
    const { counts, flags } = this.#image;
    this.#forgetRefcounts();
    for (let cluster = flags.nextUsed(0); cluster < flags.clusterCount; cluster = flags.nextUsed(cluster + 1)) {
      const page = flags.pages[Math.floor(cluster / PAGE_CLUSTERS)]!;
      this.#noteRefcount(page, cluster % PAGE_CLUSTERS, counts.get(cluster) === 1);
    }
  }

  #forgetRefcounts(): void {
    this.hasWrongCopied = this.#image.hasWrongCopied;
    for (const page of this.#image.flags.pages) {
      if (page === null) continue;
      for (let i = 0; i < page.length; i++) page[i]! &= ~ClusterFlag.refcountIsOne;
    }
  }
}
