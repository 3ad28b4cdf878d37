/**
 * Host clusters of an image that is written: finding free ones, counting references, making room for more counters.
 *
 * Free clusters are found by a task that runs ahead (`refill`) and leaves a run of them, all of one refcount slice, which is
 * pinned: taking from the run is arithmetic in memory.
 *
 * Invariants
 * - A cluster that is handed out had refcount 0 and was no metadata; it has refcount 1 from then on, in memory, and on disk before
 *   anything on disk points at it (commit.ts).
 * - A refcount is lowered only when nothing on disk points at the cluster by that reference any more (`lower` is called then).
 * - A refcount block or table is on disk before what points at it is written.
 */
import { EIO, ENOSPC } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { IoChannel } from '../bdev.js';
import { OFFSET_LIMIT, REFCOUNT_TABLE_BYTES_MAX, writeUInt64 } from './format.js';
import { badImage } from './image-error.js';
import type { Qcow2Image } from './image.js';
import { refcountAt, setRefcount } from './refcounts.js';
import { SliceCache } from './slice-cache.js';
import { SliceLoader } from './slice-loader.js';
import { startTask } from '../task.js';
import type { Task } from '../task.js';
import { WaitList, sleep } from './wait-list.js';
import type { Sleeper } from './wait-list.js';

/** The file grows by steps that double: by this at first, by that at last. */
const GROW_BYTES_MIN = 2 ** 20;
const GROW_BYTES_MAX = 2 ** 26;
/** Where the header names the refcount table: offset and clusters, 12 bytes. */
const HEADER_REFCOUNT_TABLE = 48;
const DOUBLE = 0.5;

export interface AllocatorOptions {
  readonly image: Qcow2Image;
  readonly reactor: Reactor;
  readonly channel: IoChannel;
  /** From loadRefcountTable. */
  readonly refcountTable: Float64Array;
  readonly cacheSlots: number;
  readonly onCacheFull: () => void;
}

export class Allocator {
  readonly cache: SliceCache;
  readonly loader: SliceLoader;
  /** Answers of `take`: the first cluster; whether what it holds is zeroes. */
  cluster = DOUBLE;
  isZeroed = false;
  readonly #image: Qcow2Image;
  readonly #bytes: Uint8Array;
  #table: Float64Array;
  /** Free clusters at hand: [runStart, runEnd), whose counters are in #runSlot from #runIndex on. */
  #runStart = DOUBLE;
  #runEnd = DOUBLE;
  #runSlot = -1;
  #runIndex = 0;
  /** No cluster below is free, but for those at hand. */
  #scanFrom = DOUBLE;
  /** From here on the file was made by growing it: zeroes. */
  #zeroFrom = Infinity;
  #isRefilling = false;
  /** Clusters of the file that may be handed out: what is allocated ahead is zeroed meanwhile, so nothing may be written there. */
  #usable = DOUBLE;
  /** What the file grows by next; from which cluster on; whether it does. */
  #growBytes = GROW_BYTES_MIN;
  #aheadFrom = Infinity;
  #isGrowing = false;
  readonly #growing = new WaitList();
  readonly #waiters = new WaitList();

  constructor({ image, reactor, channel, refcountTable, cacheSlots, onCacheFull }: AllocatorOptions) {
    const { sliceBytes } = image.geometry;
    this.#image = image;
    this.#table = refcountTable;
    this.cache = new SliceCache(reactor.arena, sliceBytes, cacheSlots);
    this.#bytes = reactor.arena.view8(this.cache.address, cacheSlots * sliceBytes);
    this.loader = new SliceLoader({ cache: this.cache, channel, check: () => true, onFull: onCacheFull });
    this.#runStart = 0;
    this.#runEnd = 0;
    this.#scanFrom = 0;
    this.#usable = this.#fileClusters();
  }

  get isIdle(): boolean {
    return !this.#isRefilling && !this.#isGrowing;
  }

  /** The sleeper is woken when no search is under way any more. */
  whenIdle(sleeper: Sleeper): void {
    if (this.#isRefilling) this.#waiters.add(sleeper);
    else if (this.#isGrowing) this.#growing.add(sleeper);
    else sleeper.wakeUp(0);
  }

  /** Takes up to `max` clusters that lie together. Returns how many; 0: wait for `refill`. */
  take(max: number): number {
    const left = this.#runEnd - this.#runStart;
    const count = max < left ? max : left;
    if (count === 0) return 0;
    const { refcountBits } = this.#image.geometry;
    const base = this.#runSlot * this.cache.sliceBytes;
    for (let i = 0; i < count; i++) setRefcount(this.#bytes, base, this.#runIndex + i, refcountBits, 1);
    this.cache.markDirty(this.#runSlot);
    this.cluster = this.#runStart;
    this.isZeroed = this.#runStart >= this.#zeroFrom;
    this.#runStart += count;
    this.#runIndex += count;
    if (this.#runStart > this.#zeroFrom) this.#zeroFrom = this.#runStart;
    if (this.#runStart > this.#aheadFrom) this.#growAhead();
    return count;
  }

  /** Looks for free clusters; the sleeper is woken when there are some, or there is no room. */
  refill(sleeper: Sleeper): void {
    this.#waiters.add(sleeper);
    if (this.#isRefilling) return;
    this.#isRefilling = true;
    const end = (errno: number): void => {
      this.#isRefilling = false;
      this.#waiters.wakeAll(errno);
    };
    startTask(
      this.#findRun(),
      () => end(0),
      (error) => end(error instanceof BdevError && error.code === 'no-space' ? ENOSPC : EIO),
    );
  }

  /** One cluster, for metadata. Throws BdevError. */
  *takeOne(): Task<number> {
    while (this.take(1) === 0) {
      const errno = yield* sleep((sleeper) => this.refill(sleeper));
      if (errno !== 0) throw new BdevError('no-space', 'base', `no cluster for metadata: errno ${errno}`, 'make room');
    }
    return this.cluster;
  }

  /** Takes a reference from a cluster. Returns what is left, -1 when there was none: then the image is damaged. Throws BdevError. */
  *lower(cluster: number): Task<number> {
    const value = yield* this.refcount(cluster);
    if (value === 0 || !Number.isSafeInteger(value)) {
      this.#image.onDamage(`refcount of cluster ${cluster}`, `is ${value}, and there is a reference`);
      return -1;
    }
    yield* this.assign(cluster, value - 1);
    return value - 1;
  }

  /** Sets the refcount of a cluster that has a counter. Throws BdevError. */
  *assign(cluster: number, value: number): Task<void> {
    const { refcountBits, refcountsPerSlice } = this.#image.geometry;
    const slot = yield* this.#slice(Math.floor(cluster / refcountsPerSlice));
    if (slot < 0) return;
    setRefcount(this.#bytes, slot * this.cache.sliceBytes, cluster % refcountsPerSlice, refcountBits, value);
    this.cache.markDirty(slot);
    if (value === 0 && cluster < this.#scanFrom) this.#scanFrom = cluster;
  }

  /** The refcount of a cluster. */
  *refcount(cluster: number): Task<number> {
    const { refcountBits, refcountsPerSlice } = this.#image.geometry;
    const slot = yield* this.#slice(Math.floor(cluster / refcountsPerSlice));
    return slot < 0
      ? 0
      : refcountAt(this.#bytes, slot * this.cache.sliceBytes, cluster % refcountsPerSlice, refcountBits);
  }

  /** Begins anew with what is on disk. Nothing is dirty or under way. */
  reset(refcountTable: Float64Array): void {
    this.#dropRun();
    this.cache.clear();
    this.#scanFrom = 0;
    this.#zeroFrom = Infinity;
    this.#aheadFrom = Infinity;
    this.#usable = this.#fileClusters();
    this.#table = refcountTable;
  }

  release(): void {
    this.cache.release();
  }

  #dropRun(): void {
    if (this.#runSlot >= 0) this.cache.unpin(this.#runSlot);
    this.#runSlot = -1;
    this.#runStart = this.#runEnd;
  }

  *#findRun(): Task<void> {
    const { geometry, metadata } = this.#image;
    const { refcountsPerSlice, refcountsPerBlock, refcountBits } = geometry;
    this.#dropRun();
    for (;;) {
      const from = this.#scanFrom;
      const block = Math.floor(from / refcountsPerBlock);
      if (block >= this.#table.length) {
        yield* this.#growTable();
        continue;
      }
      if (this.#table[block] === 0) {
        yield* this.#addBlock(block);
        continue;
      }
      const slot = yield* this.#slice(Math.floor(from / refcountsPerSlice));
      const base = slot * this.cache.sliceBytes;
      // A cluster may have come free below while the slice was loaded.
      if (this.#scanFrom !== from) continue;
      const isFree = (index: number): boolean => refcountAt(this.#bytes, base, index, refcountBits) === 0;
      let index = from % refcountsPerSlice;
      while (index < refcountsPerSlice && !isFree(index)) index++;
      const start = Math.floor(from / refcountsPerSlice) * refcountsPerSlice + index;
      if (index === refcountsPerSlice) {
        this.#scanFrom = start;
        continue;
      }
      let end = index;
      while (end < refcountsPerSlice && isFree(end)) end++;
      const runEnd = yield* this.#makeRoom(start, start + end - index);
      // Making room takes no time where that is a file; elsewhere the slice may be gone.
      if (this.cache.find(Math.floor(start / refcountsPerSlice)) !== slot || this.#scanFrom !== from) continue;
      for (let cluster = start; cluster < runEnd; cluster++) {
        if (!metadata.has(cluster)) continue;
        this.#image.onDamage(`refcount of cluster ${cluster}`, 'is 0, and metadata lies there');
        throw badImage(`refcount of cluster ${cluster}`, 'is 0, and metadata lies there');
      }
      this.cache.pin(slot);
      this.#runSlot = slot;
      this.#runIndex = index;
      this.#runStart = start;
      this.#runEnd = runEnd;
      this.#scanFrom = runEnd;
      return;
    }
  }

  /** Makes the file long enough for clusters [start, end), or for as many as there is room for. Returns the new end. */
  *#makeRoom(start: number, end: number): Task<number> {
    const { file, geometry } = this.#image;
    const { clusterBytes } = geometry;
    if ((start + 1) * clusterBytes > OFFSET_LIMIT) throw noSpace('the largest file there is');
    while (this.#usable <= start) {
      if (this.#isGrowing) yield* sleep((sleeper) => this.#growing.add(sleeper));
      else if (!(yield* this.#grow(start + 1))) throw noSpace(file.bdev.name);
    }
    return Math.min(end, this.#usable);
  }

  #fileClusters(): number {
    return Math.floor(this.#image.file.sizeBytes / this.#image.geometry.clusterBytes);
  }

  /**
   * Makes the file longer by a step, at least to `clusters`, and has its storage allocated: a write that has to allocate is several
   * times as dear. Returns false when that cannot be.
   */
  *#grow(clusters: number): Task<boolean> {
    const { file, geometry } = this.#image;
    const { clusterBytes } = geometry;
    const sizeBytes = file.sizeBytes;
    const least = clusters * clusterBytes;
    const wanted = Math.ceil(Math.max(least, sizeBytes + this.#growBytes) / clusterBytes) * clusterBytes;
    this.#isGrowing = true;
    try {
      if (!(yield* this.#resize(wanted)) && !(yield* this.#resize(least))) return false;
      if (this.#zeroFrom === Infinity) this.#zeroFrom = Math.ceil(sizeBytes / clusterBytes);
      this.#growBytes = Math.min(GROW_BYTES_MAX, this.#growBytes * 2);
      yield* file.allocate(sizeBytes, file.sizeBytes - sizeBytes);
      return true;
    } catch (error) {
      // No storage left, perhaps: whoever writes there will be told.
      if (error instanceof BdevError) return true;
      throw error;
    } finally {
      this.#isGrowing = false;
      this.#usable = this.#fileClusters();
      // The last half of the step is left when the next one begins.
      this.#aheadFrom = this.#fileClusters() - this.#growBytes / 4 / clusterBytes;
      this.#growing.wakeAll(0);
    }
  }

  *#resize(sizeBytes: number): Task<boolean> {
    try {
      yield* this.#image.file.grow(sizeBytes);
      return true;
    } catch (error) {
      if (error instanceof BdevError) return false;
      throw error;
    }
  }

  /** Grows the file before it has to be waited for. */
  #growAhead(): void {
    if (this.#isGrowing || this.#zeroFrom === Infinity) return;
    startTask(
      this.#grow(0),
      () => undefined,
      () => undefined,
    );
  }

  /** Gives back the storage that was allocated ahead. */
  *trim(): Task<void> {
    const { file, geometry } = this.#image;
    if (this.#zeroFrom === Infinity) return;
    const from = this.#zeroFrom * geometry.clusterBytes;
    if (from < file.sizeBytes) yield* file.deallocate(from, file.sizeBytes - from);
  }

  /** A block for counters that have none: the first cluster that it counts is where it lies. */
  *#addBlock(block: number): Task<void> {
    const { geometry, file, metadata, header } = this.#image;
    const { clusterBytes, refcountBits, refcountsPerBlock } = geometry;
    const first = block * refcountsPerBlock;
    let cluster = first;
    while (metadata.has(cluster) && cluster < first + refcountsPerBlock) cluster++;
    if (cluster !== first) {
      this.#image.onDamage(`refcount of cluster ${first}`, 'is 0, and metadata lies there');
      throw badImage(`refcount of cluster ${first}`, 'is 0, and metadata lies there');
    }
    yield* this.#makeRoom(cluster, cluster + 1);
    const bytes = Buffer.alloc(clusterBytes);
    setRefcount(bytes, 0, 0, refcountBits, 1);
    yield* file.write(cluster * clusterBytes, bytes);
    yield* file.sync();
    const entry = Buffer.alloc(8);
    writeUInt64(entry, cluster * clusterBytes, 0);
    yield* file.write(header.refcountTableOffset + block * 8, entry);
    metadata.add(cluster);
    this.#noteUsed(cluster + 1);
    this.#table[block] = cluster * clusterBytes;
  }

  /** A longer refcount table, behind all clusters that have counters, with the blocks that count it. */
  *#growTable(): Task<void> {
    const { geometry, file, metadata } = this.#image;
    const { clusterBytes, refcountBits, refcountsPerBlock } = geometry;
    const perTableCluster = clusterBytes / 8;
    const oldClusters = this.#table.length / perTableCluster;
    const first = this.#table.length * refcountsPerBlock;
    // Half as many again, and at least what the new blocks themselves need.
    let clusters = Math.ceil(oldClusters * 1.5) + 1;
    const blocks = Math.ceil(clusters / (refcountsPerBlock - 1)) + 1;
    while (clusters * perTableCluster < this.#table.length + blocks) clusters++;
    if (clusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) clusters = REFCOUNT_TABLE_BYTES_MAX / clusterBytes;
    if (clusters * perTableCluster < this.#table.length + blocks) throw noSpace('the largest refcount table there is');
    const used = blocks + clusters;
    yield* this.#makeRoomForAll(first, first + used);

    const table = new Float64Array(clusters * perTableCluster);
    table.set(this.#table);
    const block = Buffer.alloc(clusterBytes);
    for (let i = 0; i < blocks; i++) {
      block.fill(0);
      const counted = Math.max(0, Math.min(refcountsPerBlock, used - i * refcountsPerBlock));
      for (let k = 0; k < counted; k++) setRefcount(block, 0, k, refcountBits, 1);
      yield* file.write((first + i) * clusterBytes, block);
      table[this.#table.length + i] = (first + i) * clusterBytes;
    }
    const bytes = Buffer.alloc(clusters * clusterBytes);
    table.forEach((offset, i) => writeUInt64(bytes, offset, i * 8));
    const offset = (first + blocks) * clusterBytes;
    yield* file.write(offset, bytes);
    yield* file.sync();
    const oldFirst = this.#image.header.refcountTableOffset / clusterBytes;
    yield* this.#commitTable(offset, clusters);
    metadata.add(first, used);
    metadata.delete(oldFirst, oldClusters);
    this.#noteUsed(first + used);
    this.#table = table;
    for (let i = 0; i < oldClusters; i++) yield* this.lower(oldFirst + i);
  }

  /** From here on the header names the new table. */
  *#commitTable(offset: number, clusters: number): Task<void> {
    const { file } = this.#image;
    const fields = Buffer.alloc(12);
    writeUInt64(fields, offset, 0);
    fields.writeUInt32BE(clusters, 8);
    yield* file.write(HEADER_REFCOUNT_TABLE, fields);
    yield* file.sync();
    this.#image.header = { ...this.#image.header, refcountTableOffset: offset, refcountTableClusters: clusters };
  }

  *#makeRoomForAll(start: number, end: number): Task<void> {
    for (let at = start; at < end;) at = yield* this.#makeRoom(at, end);
  }

  /** Clusters below have been written to. */
  #noteUsed(end: number): void {
    if (this.#zeroFrom !== Infinity && this.#zeroFrom < end) this.#zeroFrom = end;
  }

  /** Slot of a slice of counters, -1 when they have no block. Throws BdevError. */
  *#slice(number: number): Task<number> {
    const { slicesPerTable, sliceBytes } = this.#image.geometry;
    const block = this.#table[Math.floor(number / slicesPerTable)] ?? 0;
    if (block === 0) return -1;
    const home = block + (number % slicesPerTable) * sliceBytes;
    for (;;) {
      const slot = this.cache.find(number);
      if (slot >= 0) return slot;
      const errno = yield* sleep((sleeper) => this.loader.load(number, home, sleeper));
      if (errno !== 0)
        throw new BdevError('io-error', 'base', `reading refcounts failed: errno ${errno}`, 'look at the device');
    }
  }
}

function noSpace(where: string): BdevError {
  return new BdevError('no-space', 'base', `there is no room for more clusters: ${where} is full`, 'make it larger');
}
