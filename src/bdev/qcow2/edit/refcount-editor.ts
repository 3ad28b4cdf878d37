/**
 * The refcounts of an image while it is edited. What is changed is a copy: a block that changes moves to a free cluster, and so
 * does the refcount table. The image's own counters stay as they are until a header that points at the new table is written, so
 * there is one moment at which all of them change, and no order to keep between raising and lowering.
 *
 * Invariants
 * - A cluster is handed out only when it is free in the image as it is and as it will be, and no known metadata lies there:
 *   nothing that the image uses is ever written to, even if its refcounts lie.
 * - Blocks are held in about BLOCK_BYTES_HELD_MAX bytes: more only while one range is counted or changed blocks are moved.
 * - The new table covers its own clusters and those of its blocks.
 */
import { BdevError } from '../../bdev.js';
import { counterMax, readCounter, writeCounter } from '../counter-bits.js';
import { REFCOUNT_TABLE_BYTES_MAX, clusterBytesOf, refcountsPerBlock, writeUInt64 } from '../format.js';
import type { Qcow2Header } from '../format.js';
import { badImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import type { Task } from '../../task.js';
import type { ClusterRanges } from './cluster-ranges.js';
import { writeAt } from './file-access.js';

const BLOCK_BYTES_HELD_MAX = 64 * 2 ** 20;

interface Block {
  readonly index: number;
  /** Counters as they will be. */
  bytes: Buffer;
  /** Counters as they are in the image; the same buffer while nothing is changed. */
  base: Buffer;
  /** Not yet written to where it is going to be. */
  isDirty: boolean;
}

export class RefcountEditor {
  /** Largest value of a counter; what is beyond 2^32 is taken for damage. */
  readonly max: number;
  readonly #file: ImageFile;
  readonly #header: Qcow2Header;
  readonly #metadata: ClusterRanges;
  readonly #clusterBytes: number;
  readonly #perBlock: number;
  readonly #tableEntriesMax: number;
  /** Offsets of the blocks, in the image and as they will be; the second is at least as long. */
  readonly #oldTable: Float64Array;
  #table: Float64Array;
  /** In the order of their last use. */
  readonly #blocks = new Map<number, Block>();
  readonly #blocksMax: number;
  #last: Block | null = null;
  /** Blocks that changed and have no new cluster yet. */
  readonly #unmoved: number[] = [];
  readonly #moved = new Set<number>();
  #isMoving = false;
  /** No cluster before it is free. */
  #hint = 0;
  /** Nor any run of several before this one. */
  #runHint = 0;

  private constructor(
    file: ImageFile,
    header: Qcow2Header,
    metadata: ClusterRanges,
    table: Float64Array,
    heldBytesMax: number,
  ) {
    this.#file = file;
    this.#header = header;
    this.#metadata = metadata;
    this.max = counterMax(header.refcountOrder);
    this.#clusterBytes = clusterBytesOf(header);
    this.#perBlock = refcountsPerBlock(header);
    this.#tableEntriesMax = REFCOUNT_TABLE_BYTES_MAX / 8;
    this.#oldTable = table;
    this.#table = table.slice();
    this.#blocksMax = Math.max(2, Math.floor(heldBytesMax / (2 * this.#clusterBytes)));
  }

  /**
   * Loads the refcount table.
   * @param metadata where no cluster may be handed out; the table and its blocks are added to it
   * @param heldBytesMax bound on the blocks that are held. Throws BdevError.
   */
  static *open(
    file: ImageFile,
    header: Qcow2Header,
    metadata: ClusterRanges,
    heldBytesMax = BLOCK_BYTES_HELD_MAX,
  ): Task<RefcountEditor> {
    const clusterBytes = clusterBytesOf(header);
    const bytes = Buffer.alloc(header.refcountTableClusters * clusterBytes);
    yield* file.read(header.refcountTableOffset, bytes);
    metadata.add(header.refcountTableOffset / clusterBytes, header.refcountTableClusters);
    const table = new Float64Array(bytes.length / 8);
    for (let i = 0; i < table.length; i++) {
      const high = bytes.readUInt32BE(i * 8);
      const low = bytes.readUInt32BE(i * 8 + 4);
      const offset = high * 2 ** 32 + low;
      if (offset === 0) continue;
      const field = `refcount_table[${i}]`;
      if (offset % clusterBytes !== 0) throw badImage(field, `is ${offset}, not the start of a cluster`);
      if (offset >= file.sizeBytes) throw badImage(field, `is ${offset}, beyond the end of the file`);
      metadata.add(offset / clusterBytes, 1);
      table[i] = offset;
    }
    return new RefcountEditor(file, header, metadata, table, heldBytesMax);
  }

  /** How often a cluster is used. */
  *get(cluster: number): Task<number> {
    const known = this.peek(cluster);
    if (known >= 0) return known;
    yield* this.#trim();
    yield* this.#load(Math.floor(cluster / this.#perBlock));
    return this.peek(cluster);
  }

  /** As `get`, without waiting: -1 when the counter is not in memory. */
  peek(cluster: number): number {
    const index = Math.floor(cluster / this.#perBlock);
    const block = this.#last?.index === index ? this.#last : this.#cached(index);
    if (block !== null) return readCounter(block.bytes, cluster % this.#perBlock, this.#header.refcountOrder);
    return this.#offsetOf(index) === 0 ? 0 : -1;
  }

  /** One more user, or several, of clusters that are in use. Throws BdevError. */
  *raise(first: number, count: number, by = 1): Task<void> {
    yield* this.#change(first, count, by);
  }

  /** One user less, or several less. Throws BdevError. */
  *lower(first: number, count: number, by = 1): Task<void> {
    yield* this.#change(first, count, -by);
  }

  /** Takes clusters that follow one another, each with a refcount of 1, and returns the first. Throws BdevError. */
  *allocate(count: number): Task<number> {
    yield* this.#trim();
    const first = yield* this.#findFree(count);
    const taken = this.#metadata.find(first, first + count);
    if (taken >= 0) {
      const offset = taken * this.#clusterBytes;
      throw badImage('refcounts', `say that the cluster at ${offset} is free, but metadata lies there`);
    }
    for (let done = 0; done < count;) {
      const cluster = first + done;
      const start = cluster % this.#perBlock;
      const end = Math.min(this.#perBlock, start + count - done);
      const block = yield* this.#forChange(Math.floor(cluster / this.#perBlock));
      for (let i = start; i < end; i++) writeCounter(block.bytes, i, this.#header.refcountOrder, 1);
      done += end - start;
    }
    if (count === 1) this.#hint = first + 1;
    else this.#runHint = first + count;
    return first;
  }

  /**
   * Writes the new blocks and the new table to free clusters; nothing more can be changed then.
   * @returns the fields of a header that makes them the image's. Throws BdevError.
   */
  *finish(): Task<Pick<Qcow2Header, 'refcountTableOffset' | 'refcountTableClusters'>> {
    const { refcountTableOffset, refcountTableClusters } = this.#header;
    yield* this.#moveChanged();
    if (this.#moved.size === 0) return { refcountTableOffset, refcountTableClusters };
    yield* this.lower(refcountTableOffset / this.#clusterBytes, refcountTableClusters);
    let clusters = refcountTableClusters;
    let first = -1;
    for (;;) {
      first = yield* this.allocate(clusters);
      yield* this.#moveChanged();
      const needed = this.#tableClustersNeeded();
      if (needed <= clusters) break;
      // What the table took made it outgrow itself.
      yield* this.lower(first, clusters);
      this.#runHint = 0;
      clusters = needed;
    }
    for (const block of this.#blocks.values()) yield* this.#write(block);
    const bytes = Buffer.alloc(clusters * this.#clusterBytes);
    this.#table.forEach((offset, i) => {
      if (offset !== 0) writeUInt64(bytes, offset, i * 8);
    });
    yield* writeAt(this.#file, first * this.#clusterBytes, bytes);
    return { refcountTableOffset: first * this.#clusterBytes, refcountTableClusters: clusters };
  }

  /** After `finish`: the clusters that were in use before and are not any more, in runs. */
  *eachFreed(visit: (first: number, count: number) => Task<void>): Task<void> {
    const order = this.#header.refcountOrder;
    let first = 0;
    let count = 0;
    for (const index of [...this.#moved].sort((a, b) => a - b)) {
      yield* this.#trim();
      const { bytes, base } = this.#cached(index) ?? (yield* this.#load(index));
      for (let i = 0; i < this.#perBlock; i++) {
        if (readCounter(bytes, i, order) !== 0 || readCounter(base, i, order) === 0) continue;
        const cluster = index * this.#perBlock + i;
        if (cluster !== first + count) {
          if (count > 0) yield* visit(first, count);
          first = cluster;
          count = 0;
        }
        count++;
      }
    }
    if (count > 0) yield* visit(first, count);
  }

  /** The last cluster that is in use, or -1. */
  *last(): Task<number> {
    for (let index = this.#table.length - 1; index >= 0; index--) {
      if (this.#offsetOf(index) === 0) continue;
      yield* this.#trim();
      const { bytes } = this.#cached(index) ?? (yield* this.#load(index));
      for (let i = this.#perBlock - 1; i >= 0; i--) {
        if (readCounter(bytes, i, this.#header.refcountOrder) > 0) return index * this.#perBlock + i;
      }
    }
    return -1;
  }

  #tableClustersNeeded(): number {
    let entries = this.#table.length;
    while (entries > 0 && this.#table[entries - 1] === 0) entries--;
    return Math.ceil((entries * 8) / this.#clusterBytes);
  }

  /** As `raise` (1) or `lower` (-1), without waiting: false when the counters are not in memory. Throws BdevError. */
  changeNow(first: number, count: number, by: number): boolean {
    const index = Math.floor(first / this.#perBlock);
    const start = first - index * this.#perBlock;
    if (start + count > this.#perBlock) return false;
    const block = this.#cached(index);
    if (block === null) return false;
    this.#markChanged(block);
    this.#add(block, start, start + count, by);
    return true;
  }

  *#change(first: number, count: number, by: number): Task<void> {
    for (let done = 0; done < count;) {
      yield* this.#trim();
      const cluster = first + done;
      const start = cluster % this.#perBlock;
      const end = Math.min(this.#perBlock, start + count - done);
      const index = Math.floor(cluster / this.#perBlock);
      if (this.#offsetOf(index) === 0 && this.#cached(index) === null) throw this.#notCounted(cluster);
      this.#add(yield* this.#forChange(index), start, end, by);
      done += end - start;
    }
  }

  #add(block: Block, start: number, end: number, by: number): void {
    const order = this.#header.refcountOrder;
    for (let i = start; i < end; i++) {
      const before = readCounter(block.bytes, i, order);
      const after = before + by;
      if (before === 0 || after < 0) throw this.#notCounted(block.index * this.#perBlock + i);
      if (before > this.max) throw badImage('refcounts', `hold ${before}, more than there can be`);
      if (after > this.max) throw this.#tooMany(block.index * this.#perBlock + i);
      writeCounter(block.bytes, i, order, after);
    }
  }

  #notCounted(cluster: number): BdevError {
    return badImage('refcounts', `count fewer users of the cluster at ${cluster * this.#clusterBytes} than it has`);
  }

  #tooMany(cluster: number): BdevError {
    const bits = 2 ** this.#header.refcountOrder;
    return new BdevError(
      'too-many-references',
      'header.refcount_order',
      `the cluster at ${cluster * this.#clusterBytes} cannot have ${this.max + 1} users: refcounts have ${bits} bits`,
      'convert the image to one with wider refcounts (refcount_bits=16), or delete snapshots',
    );
  }

  /** The first of so many clusters that are free before and after the edit. */
  *#findFree(count: number): Task<number> {
    let cluster = count === 1 ? this.#hint : Math.max(this.#hint, this.#runHint);
    let run = 0;
    while (run < count) {
      const index = Math.floor(cluster / this.#perBlock);
      const end = Math.min((index + 1) * this.#perBlock, cluster + count - run);
      if (index >= this.#tableEntriesMax) throw this.#tooLarge();
      if (this.#offsetOf(index) === 0 && this.#cached(index) === null) {
        run += end - cluster;
        cluster = end;
        continue;
      }
      const { bytes, base } = this.#cached(index) ?? (yield* this.#load(index));
      const order = this.#header.refcountOrder;
      for (; cluster < end; cluster++) {
        const i = cluster % this.#perBlock;
        run = readCounter(bytes, i, order) === 0 && readCounter(base, i, order) === 0 ? run + 1 : 0;
      }
    }
    return cluster - count;
  }

  #tooLarge(): BdevError {
    return new BdevError(
      'too-large',
      'header.refcount_table_clusters',
      `the image cannot grow: its refcount table would be larger than ${REFCOUNT_TABLE_BYTES_MAX} bytes`,
      'convert the image to one with larger clusters',
    );
  }

  /** A block that may be changed: from now on a copy, which needs a cluster. */
  *#forChange(index: number): Task<Block> {
    if (index >= this.#tableEntriesMax) throw this.#tooLarge();
    const block = this.#cached(index) ?? (yield* this.#load(index));
    this.#markChanged(block);
    return block;
  }

  #markChanged(block: Block): void {
    if (block.base === block.bytes) block.bytes = Buffer.from(block.base);
    block.isDirty = true;
    if (this.#moved.has(block.index)) return;
    this.#moved.add(block.index);
    this.#unmoved.push(block.index);
  }

  /** Gives changed blocks their new clusters, which may change more blocks. */
  *#moveChanged(): Task<void> {
    this.#isMoving = true;
    for (let index = this.#unmoved.pop(); index !== undefined; index = this.#unmoved.pop()) {
      const cluster = yield* this.allocate(1);
      if (index >= this.#table.length) {
        const longer = new Float64Array(Math.min(this.#tableEntriesMax, Math.max(index + 1, this.#table.length * 2)));
        longer.set(this.#table);
        this.#table = longer;
      }
      this.#table[index] = cluster * this.#clusterBytes;
      const old = this.#oldTable[index] ?? 0;
      if (old !== 0) yield* this.lower(old / this.#clusterBytes, 1);
    }
    this.#isMoving = false;
  }

  #cached(index: number): Block | null {
    if (this.#last?.index === index) return this.#last;
    const block = this.#blocks.get(index);
    if (block === undefined) return null;
    this.#blocks.delete(index);
    this.#blocks.set(index, block);
    this.#last = block;
    return block;
  }

  #offsetOf(index: number): number {
    return index < this.#table.length ? this.#table[index]! : 0;
  }

  *#load(index: number): Task<Block> {
    const old = this.#oldTable[index] ?? 0;
    const offset = this.#offsetOf(index);
    const base = Buffer.alloc(this.#clusterBytes);
    if (old !== 0) yield* this.#file.read(old, base);
    let bytes = base;
    if (offset !== old && offset !== 0) {
      bytes = Buffer.alloc(this.#clusterBytes);
      yield* this.#file.read(offset, bytes);
    }
    const block: Block = { index, bytes, base, isDirty: false };
    this.#blocks.set(index, block);
    this.#last = block;
    return block;
  }

  /**
   * Writes back and forgets the blocks that were not used for longest, where there are too many. Never while clusters are looked for
   * or blocks are moved: both would see what it takes.
   */
  *#trim(): Task<void> {
    if (this.#blocks.size < this.#blocksMax || this.#isMoving) return;
    yield* this.#moveChanged();
    this.#last = null;
    for (const [index, block] of this.#blocks) {
      if (this.#blocks.size <= this.#blocksMax / 2) return;
      yield* this.#write(block);
      this.#blocks.delete(index);
    }
  }

  *#write(block: Block): Task<void> {
    if (!block.isDirty) return;
    yield* writeAt(this.#file, this.#offsetOf(block.index), block.bytes);
    block.isDirty = false;
  }
}
