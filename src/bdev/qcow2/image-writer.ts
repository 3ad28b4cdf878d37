/**
 * Writes a new image front to back, from data that comes in the order of the disk or nearly so:
 *
 *     (header) │ data, compressed clusters byte after byte, and each L2 table when its part of the disk is done │ L1 │ refcounts │ header
 *
 * Nothing is read back and nothing is written twice, so no table is cached and no refcount is kept up to date on the way.
 *
 * Invariants
 * - A cluster of the file is taken once, in order; its count says how many things lie in it: what is compressed counts in each cluster
 *   that it touches.
 * - The header is written last: what is cut off before is no image.
 * - Memory: a buffer, the L1 table, 2 bytes for each cluster of the file, and the L2 tables of what is not settled.
 */
import assert from 'node:assert/strict';
import { BdevError } from '../bdev.js';
import { counterMax, writeCounter } from './counter-bits.js';
import { checkCreateOptions, featuresOf, newHeader, refcountClusters } from './create.js';
import type { CreateOptions } from './create.js';
import {
  REFCOUNT_TABLE_BYTES_MAX,
  encodeHeader,
  l1EntriesFor,
  l2CoverageBytes,
  l2EntryBytes,
  refcountsPerBlock,
  writeUInt64,
} from './format.js';
import type { ImageFile } from './image-file.js';
import type { Task } from '../task.js';

const SECTOR_BYTES = 512;
const STAGE_BYTES_MIN = 2 ** 20;
const COUNTERS_FIRST = 2 ** 16;
/** Before the tables of what is saved. */
const SAVED_NUMBERS = 5;
/** Upper words of entries. */
const COPIED = 0x80000000;
const COMPRESSED = 0x40000000;
/** Lower words: the zero bit; with extended L2 entries, all subclusters allocated, or (the upper word) all zero. */
const ZERO = 1;
const ALL = 0xffffffff;

export class ImageWriter {
  readonly clusterBytes: number;
  readonly #file: ImageFile;
  readonly #options: CreateOptions;
  readonly #coverageBytes: number;
  readonly #entryBytes: number;
  /** Bits of the offset in a compressed cluster's entry. */
  readonly #offsetBits: number;
  readonly #countMax: number;
  readonly #l1: Buffer;
  /** L2 tables that are not written yet, by their index. */
  readonly #tables = new Map<number, Buffer>();
  #settled = 0;
  #counts = new Uint16Array(COUNTERS_FIRST);
  /** First cluster of the file that is not taken. */
  #end = 1;
  /** Compressed clusters that are not written yet: clusters in a row, the last of which may have room. */
  readonly #stage: Buffer;
  #stageCluster = 0;
  #stageFill = 0;

  /**
   * @param file empty
   * @param options without preallocation, external data file and encryption. Throws BdevError.
   */
  constructor(file: ImageFile, options: CreateOptions) {
    checkCreateOptions(options);
    assert(options.preallocation === 'off' && options.dataFile === null && options.luksHeader === undefined);
    const features = featuresOf(options);
    this.#file = file;
    this.#options = options;
    this.clusterBytes = 2 ** options.clusterBits;
    this.#coverageBytes = l2CoverageBytes(features);
    this.#entryBytes = l2EntryBytes(features);
    this.#offsetBits = 62 - (options.clusterBits - 8);
    this.#countMax = Math.min(counterMax(options.refcountOrder), 0xffff);
    this.#l1 = Buffer.alloc(l1EntriesFor(features, options.sizeBytes) * 8);
    this.#stage = Buffer.alloc(Math.max(STAGE_BYTES_MIN, 2 * this.clusterBytes));
    this.#counts[0] = 1;
    // Names that do not fit are found before there is any data.
    newHeader(options, { tableStart: 1, tableClusters: 1, luksStart: 0, l1Start: 1, l1Entries: 1 });
  }

  /** All that is known of an image that is not complete, so that another writer goes on with it. */
  save(): Buffer {
    const numbers = Buffer.alloc(SAVED_NUMBERS * 8);
    const tables = [...this.#tables];
    [this.#settled, this.#end, this.#stageCluster, this.#stageFill, tables.length].forEach((value, i) => {
      numbers.writeDoubleLE(value, i * 8);
    });
    const indices = Buffer.alloc(tables.length * 8);
    tables.forEach(([index], i) => indices.writeDoubleLE(index, i * 8));
    const counts = Buffer.from(this.#counts.buffer, 0, this.#end * 2);
    const stage = this.#stage.subarray(0, this.#stageFill);
    return Buffer.concat([numbers, this.#l1, counts, stage, indices, ...tables.map(([, table]) => table)]);
  }

  /**
   * Goes on with an image that another writer began with the same options; the file is cut off there by the caller.
   * @param saved what `save` said, and what was synced then
   * @returns how long the file is to be
   */
  restore(saved: Buffer): number {
    const [settled, end, stageCluster, stageFill, tables] = Array.from({ length: SAVED_NUMBERS }, (_, i) =>
      saved.readDoubleLE(i * 8),
    ) as [number, number, number, number, number];
    let at = SAVED_NUMBERS * 8;
    const next = (lengthBytes: number): Buffer => {
      assert(at + lengthBytes <= saved.length, 'a state that was saved whole');
      at += lengthBytes;
      return saved.subarray(at - lengthBytes, at);
    };
    next(this.#l1.length).copy(this.#l1);
    this.#settled = settled;
    this.#end = end;
    this.#counts = new Uint16Array(Math.max(COUNTERS_FIRST, end));
    next(end * 2).copy(Buffer.from(this.#counts.buffer));
    this.#stageCluster = stageCluster;
    this.#stageFill = stageFill;
    next(stageFill).copy(this.#stage);
    const indices = next(tables * 8);
    for (let i = 0; i < tables; i++) {
      this.#tables.set(indices.readDoubleLE(i * 8), Buffer.from(next(this.clusterBytes)));
    }
    return end * this.clusterBytes;
  }

  /** Stores clusters as they are. @param bytes whole clusters, padded behind the end of the disk. Throws BdevError. */
  *writePlain(diskOffset: number, bytes: Uint8Array): Task<void> {
    const { clusterBytes } = this;
    const first = this.#take(bytes.length / clusterBytes);
    for (let at = 0; at < bytes.length; at += clusterBytes) {
      const hostOffset = first * clusterBytes + at;
      this.#setEntry(diskOffset + at, COPIED + Math.floor(hostOffset / 2 ** 32), hostOffset % 2 ** 32, 0, ALL);
    }
    yield* this.#write(first * clusterBytes, bytes);
  }

  /** Stores one cluster. @param bytes what it was compressed to, less than a cluster. Throws BdevError. */
  *writeCompressed(diskOffset: number, bytes: Uint8Array): Task<void> {
    const { clusterBytes } = this;
    const lengthBytes = bytes.length;
    assert(lengthBytes > 0 && lengthBytes < clusterBytes);
    if (!this.#fitsStage(lengthBytes)) yield* this.#startStage();
    if (this.#stageFill + lengthBytes > this.#stage.length) yield* this.#shiftStage();
    const hostOffset = this.#stageCluster * clusterBytes + this.#stageFill;
    const last = Math.floor((hostOffset + lengthBytes - 1) / clusterBytes);
    for (let cluster = Math.floor(hostOffset / clusterBytes); cluster <= last; cluster++) {
      if (cluster === this.#end) this.#take(1);
      else this.#counts[cluster]!++;
    }
    this.#stage.set(bytes, this.#stageFill);
    this.#stageFill += lengthBytes;
    const sectors = Math.floor((hostOffset + lengthBytes - 1) / SECTOR_BYTES) - Math.floor(hostOffset / SECTOR_BYTES);
    const high = COMPRESSED + sectors * 2 ** (this.#offsetBits - 32) + Math.floor(hostOffset / 2 ** 32);
    this.#setEntry(diskOffset, high, hostOffset % 2 ** 32, 0, 0);
  }

  /** Has a cluster read as zeroes although something is behind it. Version 3. */
  setZero(diskOffset: number): void {
    assert(this.#options.version === 3);
    this.#setEntry(diskOffset, 0, this.#entryBytes === 8 ? ZERO : 0, ALL, 0);
  }

  /** Nothing more comes for what is before an offset of the disk. Throws BdevError. */
  *settle(diskOffset: number): Task<void> {
    const before = Math.floor(diskOffset / this.#coverageBytes);
    if (before === this.#settled) return;
    this.#settled = before;
    for (const index of [...this.#tables.keys()].sort((a, b) => a - b)) {
      if (index < before) yield* this.#writeTable(index);
    }
  }

  /** Completes the image. @param isDurable whether it is synced. Throws BdevError. */
  *finish(isDurable: boolean): Task<void> {
    const { clusterBytes } = this;
    yield* this.settle(Infinity);
    yield* this.#flushStage();
    const l1Start = this.#take(Math.ceil(this.#l1.length / clusterBytes));
    const features = featuresOf(this.#options);
    const { blocks, tableClusters } = refcountClusters(this.#end, features);
    if (tableClusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) {
      const message = `the refcount table of an image of ${this.#end} clusters would be too large`;
      throw new BdevError('bad-option', 'size', message, 'choose a larger cluster_size, or fewer refcount_bits');
    }
    const tableStart = this.#take(tableClusters);
    const blockStart = this.#take(blocks);
    yield* this.#write(l1Start * clusterBytes, padded(this.#l1, clusterBytes));
    yield* this.#writeRefcounts(tableStart, tableClusters, blockStart, blocks);
    const l1Entries = this.#l1.length / 8;
    const header = newHeader(this.#options, { tableStart, tableClusters, luksStart: 0, l1Start, l1Entries });
    if (isDurable) yield* this.#file.sync();
    yield* this.#write(0, encodeHeader(header));
    if (isDurable) yield* this.#file.sync();
  }

  *#writeRefcounts(tableStart: number, tableClusters: number, blockStart: number, blocks: number): Task<void> {
    const { clusterBytes } = this;
    const table = Buffer.alloc(tableClusters * clusterBytes);
    const perBlock = refcountsPerBlock(featuresOf(this.#options));
    const bytes = Buffer.alloc(clusterBytes);
    for (let block = 0; block < blocks; block++) {
      const hostOffset = (blockStart + block) * clusterBytes;
      writeUInt64(table, hostOffset, block * 8);
      bytes.fill(0);
      const first = block * perBlock;
      const count = Math.min(perBlock, this.#end - first);
      for (let i = 0; i < count; i++) writeCounter(bytes, i, this.#options.refcountOrder, this.#counts[first + i]!);
      yield* this.#write(hostOffset, bytes);
    }
    yield* this.#write(tableStart * clusterBytes, table);
  }

  *#writeTable(index: number): Task<void> {
    const hostOffset = this.#take(1) * this.clusterBytes;
    this.#l1.writeUInt32BE(COPIED + Math.floor(hostOffset / 2 ** 32), index * 8);
    this.#l1.writeUInt32BE(hostOffset % 2 ** 32, index * 8 + 4);
    yield* this.#write(hostOffset, this.#tables.get(index)!);
    this.#tables.delete(index);
  }

  /** @param zeroes and @param allocated bits of subclusters, where the image has them */
  #setEntry(diskOffset: number, high: number, low: number, zeroes: number, allocated: number): void {
    const index = Math.floor(diskOffset / this.#coverageBytes);
    assert(index >= this.#settled, 'settled before it was complete');
    let table = this.#tables.get(index);
    if (table === undefined) {
      table = Buffer.alloc(this.clusterBytes);
      this.#tables.set(index, table);
    }
    const at = ((diskOffset - index * this.#coverageBytes) / this.clusterBytes) * this.#entryBytes;
    table.writeUInt32BE(high, at);
    table.writeUInt32BE(low, at + 4);
    if (this.#entryBytes === 8) return;
    table.writeUInt32BE(zeroes, at + 8);
    table.writeUInt32BE(allocated, at + 12);
  }

  /** Takes the next clusters, each with a count of 1. Returns the first. */
  #take(clusters: number): number {
    const first = this.#end;
    this.#end += clusters;
    if (this.#end > this.#counts.length) {
      const wider = new Uint16Array(Math.max(this.#end, this.#counts.length * 2));
      wider.set(this.#counts);
      this.#counts = wider;
    }
    this.#counts.fill(1, first, this.#end);
    return first;
  }

  /** Whether what is staged can go on: within its last cluster, if that may be counted once more, and into the next of the file. */
  #fitsStage(lengthBytes: number): boolean {
    const used = Math.ceil(this.#stageFill / this.clusterBytes);
    if (used === 0) return false;
    const room = used * this.clusterBytes - this.#stageFill;
    if (room > 0 && this.#counts[this.#stageCluster + used - 1]! >= this.#countMax) return false;
    return lengthBytes <= room || this.#stageCluster + used === this.#end;
  }

  *#startStage(): Task<void> {
    yield* this.#flushStage();
    this.#stageCluster = this.#end;
  }

  /** Writes all that is staged; the end of its last cluster stays zero. */
  *#flushStage(): Task<void> {
    const lengthBytes = Math.ceil(this.#stageFill / this.clusterBytes) * this.clusterBytes;
    if (lengthBytes === 0) return;
    this.#stage.fill(0, this.#stageFill, lengthBytes);
    yield* this.#write(this.#stageCluster * this.clusterBytes, this.#stage.subarray(0, lengthBytes));
    this.#stageFill = 0;
  }

  /** Writes the clusters that are full. */
  *#shiftStage(): Task<void> {
    const clusters = Math.floor(this.#stageFill / this.clusterBytes);
    const fullBytes = clusters * this.clusterBytes;
    yield* this.#write(this.#stageCluster * this.clusterBytes, this.#stage.subarray(0, fullBytes));
    this.#stage.copyWithin(0, fullBytes, this.#stageFill);
    this.#stageCluster += clusters;
    this.#stageFill -= fullBytes;
  }

  *#write(offset: number, bytes: Uint8Array): Task<void> {
    if (this.#file.growsByWriting !== true) yield* this.#file.grow(offset + bytes.length);
    yield* this.#file.write(offset, bytes);
  }
}

function padded(bytes: Buffer, unitBytes: number): Buffer {
  const missing = Math.ceil(bytes.length / unitBytes) * unitBytes - bytes.length;
  return missing === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(missing)]);
}
