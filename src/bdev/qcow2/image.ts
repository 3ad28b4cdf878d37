/**
 * One image file, open: its header, its mapping (L1 table and a cache of L2 slices) and what of the file is metadata. Backing images
 * are read through this alone; what an image that is written needs beside it is in allocator.ts and commit.ts.
 *
 * Invariants
 * - An L1 entry and a valid L2 slice have been checked: what they point at lies at a cluster and is no metadata.
 * - A slice's home follows its table: it is `l1[table] + place in the table`.
 */
import type { Reactor } from '../../poller/reactor.js';
import type { Bdev, IoChannel } from '../bdev.js';
import { ChannelFile } from './channel-file.js';
import { ClusterSet } from './cluster-set.js';
import { decodeHeader, firstClusterBytes, offsetAt } from './format.js';
import type { Qcow2Header } from './format.js';
import { Geometry } from './geometry.js';
import { badImage, unsupportedImage } from './image-error.js';
import { ENTRY_COMPRESSED, Mapped, entryProblem, hostOf, lookUp, swap32 } from './l2.js';
import type { Extent } from './l2.js';
import { SliceCache } from './slice-cache.js';
import { SliceLoader } from './slice-loader.js';
import { decodeBitmaps, decodeSnapshots } from './tables.js';
import type { Bitmap, Snapshot } from './tables.js';
import type { Task } from '../task.js';
import type { Sleeper } from './wait-list.js';

const FIRST_READ_BYTES = 4096;
const L1_PIECE_BYTES = 2 ** 20;
const SLOTS_MIN = 16;
const ENTRY_HIGH_BITS = 0x7f000000;
const ENTRY_LOW_BITS = 0x1ff;

export interface ImageOptions {
  readonly reactor: Reactor;
  readonly base: Bdev;
  readonly channel: IoChannel;
  /** Most memory of the cache of L2 slices. */
  readonly l2CacheBytes: number;
}

/** What an image does when it turns out to be damaged while it is used. */
export type OnDamage = (field: string, problem: string) => void;

export class Qcow2Image {
  readonly file: ChannelFile;
  readonly geometry: Geometry;
  header: Qcow2Header;
  snapshots: readonly Snapshot[] = [];
  bitmaps: readonly Bitmap[] = [];
  /** Offset of the L2 table by L1 index, 0: none. */
  l1: Float64Array = new Float64Array(0);
  /** 1: the L2 table's refcount is 1. */
  l1Copied: Uint8Array = new Uint8Array(0);
  /** Clusters that hold metadata: no data may lie there. */
  readonly metadata = new ClusterSet();
  readonly l2: SliceCache;
  readonly loader: SliceLoader;
  /** Set by the engine. */
  onDamage: OnDamage = () => undefined;
  onCacheFull: () => void = () => undefined;

  constructor(header: Qcow2Header, { reactor, base, channel, l2CacheBytes }: ImageOptions) {
    this.header = header;
    this.geometry = new Geometry(header);
    this.file = new ChannelFile(base, channel, reactor);
    const { sliceBytes, sliceCoverageBytes } = this.geometry;
    const wanted = Math.ceil(header.sizeBytes / sliceCoverageBytes);
    const slots = Math.max(SLOTS_MIN, Math.min(wanted, Math.floor(l2CacheBytes / sliceBytes)));
    this.l2 = new SliceCache(reactor.arena, sliceBytes, slots);
    this.loader = new SliceLoader({
      cache: this.l2,
      channel,
      check: (slot) => this.#checkSlice(slot),
      onFull: () => this.onCacheFull(),
    });
  }

  /** The cache has room for the whole mapping. */
  get isCached(): boolean {
    return this.l2.slotCount * this.geometry.sliceCoverageBytes >= this.header.sizeBytes;
  }

  get sizeBytes(): number {
    return this.header.sizeBytes;
  }

  /**
   * Looks up what the extent asks for, which begins within the disk.
   * @returns false when the slice it lies in has to be loaded first
   */
  find(extent: Extent): boolean {
    const geometry = this.geometry;
    const cluster = Math.floor(extent.offsetBytes * geometry.perClusterByte);
    const number = Math.floor(cluster / geometry.clustersPerSlice);
    const slot = this.l2.find(number);
    if (slot >= 0) {
      lookUp(geometry, this.l2.words, slot * this.l2.sliceWords, extent);
      return true;
    }
    const table = Math.floor(number / geometry.slicesPerTable);
    if (this.l1[table] !== 0) return false;
    const left = (table + 1) * geometry.tableCoverageBytes - extent.offsetBytes;
    extent.kind = Mapped.unallocated;
    extent.hostCluster = -1;
    extent.isCopied = false;
    extent.lengthBytes = Math.min(left, extent.wantedBytes);
    return true;
  }

  /** Number of the slice that maps a byte of the disk. */
  sliceOf(offset: number): number {
    return Math.floor(offset / this.geometry.sliceCoverageBytes);
  }

  tableOf(offset: number): number {
    return Math.floor(offset / this.geometry.tableCoverageBytes);
  }

  /** Starts to load the slice that maps a byte, whose table exists. */
  loadSlice(offset: number, sleeper: Sleeper): void {
    const number = this.sliceOf(offset);
    this.loader.load(number, this.homeOf(number), sleeper);
  }

  homeOf(number: number): number {
    const { slicesPerTable, sliceBytes } = this.geometry;
    const table = Math.floor(number / slicesPerTable);
    return this.l1[table]! + (number - table * slicesPerTable) * sliceBytes;
  }

  release(): void {
    this.l2.release();
  }

  /** Reads the L1 table, the snapshots and the bitmaps that the header names. Throws BdevError. */
  *load(): Task<void> {
    const { header, geometry, file } = this;
    const { clusterBytes } = geometry;
    const fileBytes = this.#fileBytes();
    this.metadata.clear();
    this.metadata.add(0);
    const addTable = (field: string, offset: number, bytes: number): void => {
      const first = offset / clusterBytes;
      const count = Math.ceil(bytes / clusterBytes);
      for (let cluster = first; cluster < first + count; cluster++) {
        if (this.metadata.has(cluster)) throw badImage(field, `is ${offset}, where other metadata lies`);
      }
      if (count > 0) this.metadata.add(first, count);
    };
    addTable('header.l1_table_offset', header.l1Offset, header.l1Entries * 8);
    addTable('header.refcount_table_offset', header.refcountTableOffset, header.refcountTableClusters * clusterBytes);
    if (header.luksHeader !== null) addTable('luks.offset', header.luksHeader.offset, header.luksHeader.lengthBytes);
    yield* this.#loadL1(fileBytes);
    if (header.snapshotCount > 0) {
      const left = file.sizeBytes - header.snapshotTableOffset;
      // Entries are of any length: as much is read as they can take, a bounded number of times.
      let tableBytes = 0;
      let wanted = Math.min(left, header.snapshotCount * 1024);
      for (;;) {
        const bytes = Buffer.alloc(wanted);
        yield* file.read(header.snapshotTableOffset, bytes);
        const isAll = wanted === left || wanted >= 65 * 2 ** 20;
        try {
          const found = decodeSnapshots(bytes, header, fileBytes);
          this.snapshots = found.snapshots;
          tableBytes = found.bytes;
          break;
        } catch (error) {
          if (isAll) throw error;
          wanted = Math.min(left, wanted * 4, 65 * 2 ** 20);
        }
      }
      addTable('header.snapshots_offset', header.snapshotTableOffset, tableBytes);
      this.snapshots.forEach(({ l1Offset, l1Entries }, i) =>
        addTable(`snapshots[${i}].l1_table_offset`, l1Offset, l1Entries * 8),
      );
    } else {
      this.snapshots = [];
    }
    this.bitmaps = [];
    if (header.bitmaps !== null) {
      const { directoryOffset, directoryBytes, count } = header.bitmaps;
      addTable('bitmaps.bitmap_directory_offset', directoryOffset, directoryBytes);
      const bytes = Buffer.alloc(directoryBytes);
      yield* file.read(directoryOffset, bytes);
      this.bitmaps = decodeBitmaps(bytes, count, header, fileBytes);
      this.bitmaps.forEach(({ tableOffset, tableEntries }, i) =>
        addTable(`bitmaps[${i}].bitmap_table_offset`, tableOffset, tableEntries * 8),
      );
    }
  }

  *#loadL1(fileBytes: number): Task<void> {
    const { header, geometry, file, metadata } = this;
    this.l1 = new Float64Array(header.l1Entries);
    this.l1Copied = new Uint8Array(header.l1Entries);
    const piece = Buffer.alloc(Math.min(L1_PIECE_BYTES, header.l1Entries * 8));
    for (let first = 0; first < header.l1Entries; first += piece.length / 8) {
      const bytes = piece.subarray(0, Math.min(piece.length, (header.l1Entries - first) * 8));
      yield* file.read(header.l1Offset + first * 8, bytes);
      for (let at = 0; at < bytes.length; at += 8) {
        const high = bytes.readUInt32BE(at);
        const low = bytes.readUInt32BE(at + 4);
        if (high === 0 && low === 0) continue;
        const index = first + at / 8;
        const field = `l1[${index}]`;
        if ((high & ENTRY_HIGH_BITS) !== 0 || (low & ENTRY_LOW_BITS) !== 0) throw badImage(field, 'has reserved bits');
        const offset = (high & 0xffffff) * 2 ** 32 + low;
        if (offset % geometry.clusterBytes !== 0) throw badImage(field, `is ${offset}, not the start of a cluster`);
        if (offset >= fileBytes) throw badImage(field, `is ${offset}, beyond the end of the file`);
        if (offset === 0) throw badImage(field, 'has no offset and bit 63');
        const cluster = offset / geometry.clusterBytes;
        if (metadata.has(cluster)) throw badImage(field, `is ${offset}, where other metadata lies`);
        this.l1[index] = offset;
        this.l1Copied[index] = high >>> 31;
      }
    }
    // Known only now: tables that several entries share are one another's overlap, too.
    for (const offset of this.l1) {
      if (offset === 0) continue;
      const cluster = offset / geometry.clusterBytes;
      if (metadata.has(cluster)) throw badImage('l1', `names the table at ${offset} twice`);
      metadata.add(cluster);
    }
  }

  #fileBytes(): number {
    return Math.ceil(this.file.sizeBytes / this.geometry.clusterBytes) * this.geometry.clusterBytes;
  }

  #checkSlice(slot: number): boolean {
    const { geometry, metadata } = this;
    const { words } = this.l2;
    const base = this.l2.wordsOf(slot);
    for (let i = 0; i < geometry.clustersPerSlice; i++) {
      const at = base + i * geometry.entryWords;
      if (words[at] === 0 && words[at + 1] === 0) {
        if (!geometry.isExtended || words[at + 3] === 0) continue;
      }
      let problem = entryProblem(geometry, words, at);
      if (problem === null && !geometry.hasExternalData && (swap32(words[at]!) & ENTRY_COMPRESSED) === 0) {
        const host = hostOf(words, at);
        if (host !== 0 && metadata.has(host / geometry.clusterBytes))
          problem = `points at ${host}, where metadata lies`;
      }
      if (problem !== null) {
        const cluster = this.l2.numberOf(slot) * geometry.clustersPerSlice + i;
        this.onDamage(`l2 entry of cluster ${cluster}`, problem);
        return false;
      }
    }
    return true;
  }
}

/** Reads the header of the image on a bdev. Throws BdevError. */
export function* readHeader(file: ChannelFile): Task<Qcow2Header> {
  if (file.sizeBytes < 512) throw badImage('header', 'is cut off');
  const start = Buffer.alloc(FIRST_READ_BYTES);
  yield* file.read(0, start);
  const bytes = Buffer.alloc(Math.min(firstClusterBytes(start), file.sizeBytes));
  yield* file.read(0, bytes);
  const clusterBytes = firstClusterBytes(start);
  const header = decodeHeader(bytes, Math.ceil(file.sizeBytes / clusterBytes) * clusterBytes);
  if (clusterBytes < file.bdev.blockSizeBytes) {
    throw unsupportedImage(
      'header.cluster_bits',
      `is ${header.clusterBits}, its clusters are smaller than the blocks of ${file.bdev.blockSizeBytes} bytes below`,
      'set `direct: false` on the bdev below, or convert the image',
    );
  }
  return header;
}

/** The refcount table. @returns offset of the refcount block by index, 0: none. Throws BdevError. */
export function* loadRefcountTable(image: Qcow2Image): Task<Float64Array> {
  const { header, geometry, file, metadata } = image;
  const entries = (header.refcountTableClusters * geometry.clusterBytes) / 8;
  const table = new Float64Array(entries);
  const bytes = Buffer.alloc(entries * 8);
  yield* file.read(header.refcountTableOffset, bytes);
  const blocks: number[] = [];
  for (let i = 0; i < entries; i++) {
    if (bytes.readUInt32BE(i * 8) === 0 && bytes.readUInt32BE(i * 8 + 4) === 0) continue;
    const field = `refcount_table[${i}]`;
    const offset = offsetAt(bytes, i * 8, field);
    if (offset % geometry.clusterBytes !== 0) throw badImage(field, `is ${offset}, not the start of a cluster`);
    if (offset >= file.sizeBytes) throw badImage(field, `is ${offset}, beyond the end of the file`);
    const cluster = offset / geometry.clusterBytes;
    if (metadata.has(cluster)) throw badImage(field, `is ${offset}, where other metadata lies`);
    metadata.add(cluster);
    blocks.push(cluster);
    table[i] = offset;
  }
  return table;
}
