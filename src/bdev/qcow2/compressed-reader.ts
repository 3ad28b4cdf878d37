/**
 * Compressed clusters on their way into the cache: read from the file, decompressed by the pool, handed to whoever waits.
 *
 *     look up ── valid: copied at once
 *        │ └── loading: waits
 *        └── missing: read the sectors ── decompress into the slot ── wake all that wait
 *
 * Of a cluster in the middle of nowhere only what is needed is decompressed; of one that is read in order all of it, and the ones after
 * it before they are asked for.
 */
import { EIO } from '../../../native/index.js';
import { BdevIo, IoStatus, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import { BufferPool } from './buffer-pool.js';
import { ClusterCache, SlotState } from './cluster-cache.js';
import { CodecJob, CodecStatus, decompressionOf } from './codec/codec-job.js';
import type { CodecOwner, CodecPool } from './codec/codec-job.js';
import { SyncCodecPool } from './codec/sync-codec-pool.js';
import { shareCodecPool } from './codec/thread-codec-pool.js';
import type { Engine } from './engine.js';
import { CompressionType } from './format.js';
import { Extent, Mapped } from './l2.js';
import { ReadAhead } from './read-ahead.js';
import type { RequestJob } from './request-job.js';
import { WaitList } from './wait-list.js';
import type { Sleeper } from './wait-list.js';

/** Clusters under way at once, and their share of memory. */
const FETCHES_MAX = 64;
const AHEAD_CLUSTERS = 16;
/** What may be read beside the compressed bytes, to whole blocks. */
const EDGES_BYTES = 8192;
const UNIT_BYTES = 4096;

/** One cluster under way. */
class Fetch implements IoOwner, CodecOwner {
  slot = -1;
  readonly waiters = new WaitList();
  readonly io = new BdevIo(1);
  readonly job: CodecJob;
  readonly #reader: CompressedReader;
  buffer = 0.5;

  constructor(reader: CompressedReader) {
    this.#reader = reader;
    this.job = new CodecJob(this);
  }

  onDone(io: BdevIo): void {
    if (io.status === IoStatus.success) this.#reader.decompress(this);
    else this.#reader.end(this, io.errno || EIO);
  }

  onCodecDone(job: CodecJob): void {
    this.#reader.end(this, job.status === CodecStatus.ok ? 0 : EIO);
  }
}

export class CompressedReader {
  readonly #engine: Engine;
  readonly #cache: ClusterCache;
  readonly #pool: CodecPool;
  readonly #buffers: BufferPool;
  readonly #ahead = new ReadAhead(AHEAD_CLUSTERS);
  readonly #extent = new Extent();
  readonly #key = { image: 0, hostOffset: 0.5 };
  readonly #fetches: Fetch[] = [];
  readonly #freeFetches: Fetch[] = [];
  /** Fetch of a slot that is loading. */
  readonly #fetchOf: (Fetch | null)[];
  /** Whoever waits for any fetch to end. */
  readonly #crowd = new WaitList();
  /** For whom the pool had no room. */
  readonly #pending: Fetch[] = [];

  /** @param threads of the process; 0: on the reactor */
  constructor(engine: Engine, cacheBytes: number, threads: number) {
    const { reactor, layers } = engine;
    const clusterBytes = Math.max(...layers.map(({ image }) => image?.geometry.clusterBytes ?? 0));
    this.#engine = engine;
    this.#cache = new ClusterCache(reactor.arena, clusterBytes, cacheBytes);
    this.#pool = threads === 0 ? new SyncCodecPool(reactor) : shareCodecPool(reactor, threads);
    this.#buffers = new BufferPool(reactor.arena, 2 * clusterBytes + EDGES_BYTES, FETCHES_MAX);
    this.#fetchOf = new Array<Fetch | null>(this.#cache.slotCount).fill(null);
  }

  /** Clusters under way: nothing may be closed before they are through. */
  get active(): number {
    return this.#fetches.length - this.#freeFetches.length;
  }

  /**
   * Gives a job the next bytes, which lie in the compressed cluster that was looked up, or puts it to sleep until they are there.
   * @returns whether they were given
   */
  read(layer: number, extent: Extent, job: RequestJob): boolean {
    const { clusterBytes } = this.#engine.layers[layer]!.image!.geometry;
    const cluster = Math.floor(extent.offsetBytes / clusterBytes);
    const inCluster = extent.offsetBytes - cluster * clusterBytes;
    const lengthBytes = extent.lengthBytes;
    const isInOrder = this.#ahead.onRead(cluster);
    const slot = this.#slotFor(layer, extent, inCluster + lengthBytes);
    if (slot >= 0 && this.#fetchOf[slot] === null) {
      if (this.#cache.stateOf(slot) !== SlotState.valid) {
        // It failed as it was submitted.
        job.wakeUp(EIO);
        return false;
      }
      job.deliver(this.#cache.addressOf(slot) + inCluster, lengthBytes);
      if (isInOrder) this.#readAhead(layer, clusterBytes);
      return true;
    }
    if (slot < 0) this.#crowd.add(job);
    else this.#fetchOf[slot]!.waiters.add(job);
    if (isInOrder) this.#readAhead(layer, clusterBytes);
    return false;
  }

  /** The bytes of a cluster have been read. */
  decompress(fetch: Fetch): void {
    if (!this.#pool.submit(fetch.job)) this.#pending.push(fetch);
  }

  end(fetch: Fetch, errno: number): void {
    const { slot, buffer } = fetch;
    if (errno === 0) this.#cache.loaded(slot);
    else this.#cache.failed(slot);
    this.#fetchOf[slot] = null;
    this.#buffers.give(buffer);
    fetch.waiters.wakeAll(errno);
    this.#freeFetches.push(fetch);
    if (!this.#crowd.isEmpty) this.#crowd.wakeAll(0);
    if (this.#pending.length > 0) this.decompress(this.#pending.shift()!);
  }

  /** Woken when a fetch has ended. */
  whenLess(sleeper: Sleeper): void {
    this.#crowd.add(sleeper);
  }

  /** What the images hold may have changed. Nothing is under way. */
  forget(): void {
    this.#engine.layers.forEach((_, layer) => this.#cache.forgetImage(layer));
  }

  /** Nothing is under way. */
  close(): void {
    this.#cache.close();
    this.#pool.close();
    this.#buffers.release();
  }

  /** Slot with the first bytes of a cluster, or where they are on their way to; -1: there is none to be had now. */
  #slotFor(layer: number, extent: Extent, wantedBytes: number): number {
    const key = this.#key;
    const cache = this.#cache;
    const { image } = this.#engine.layers[layer]!;
    const { clusterBytes } = image!.geometry;
    key.image = layer;
    key.hostOffset = extent.hostOffset;
    const isPart = image!.header.compressionType === CompressionType.deflate;
    const wanted = isPart ? Math.min(clusterBytes, Math.ceil(wantedBytes / UNIT_BYTES) * UNIT_BYTES) : clusterBytes;
    let slot = cache.find(key);
    if (slot >= 0) {
      if (cache.stateOf(slot) === SlotState.loading || cache.validBytesOf(slot) >= wanted) return slot;
      // It was asked for again: all of it, this time.
      if (this.#isBusy() || !cache.reload(slot, clusterBytes)) return -1;
      this.#start(layer, extent, slot, clusterBytes);
      return slot;
    }
    if (this.#isBusy()) return -1;
    slot = cache.insert(key, wanted);
    if (slot >= 0) this.#start(layer, extent, slot, wanted);
    return slot;
  }

  #isBusy(): boolean {
    return this.#freeFetches.length === 0 && this.#fetches.length === FETCHES_MAX;
  }

  #start(layer: number, extent: Extent, slot: number, wantedBytes: number): void {
    const { image } = this.#engine.layers[layer]!;
    const { file, header } = image!;
    let fetch = this.#freeFetches.pop();
    if (fetch === undefined) {
      fetch = new Fetch(this);
      this.#fetches.push(fetch);
    }
    fetch.slot = slot;
    fetch.buffer = this.#buffers.take();
    this.#fetchOf[slot] = fetch;
    const block = file.bdev.blockSizeBytes;
    const start = Math.floor(extent.hostOffset / block) * block;
    // The last sector may be beyond the end of the file.
    const end = Math.min(Math.ceil((extent.hostOffset + extent.compressedBytes) / block) * block, file.sizeBytes);
    const { job, io } = fetch;
    job.operation = decompressionOf(header.compressionType);
    job.source = fetch.buffer + (extent.hostOffset - start);
    job.sourceBytes = Math.max(0, end - extent.hostOffset);
    job.destination = this.#cache.addressOf(slot);
    job.capacityBytes = wantedBytes;
    io.prepare(IoType.read, start, Math.max(block, end - start), 0);
    io.addSegment(fetch.buffer, io.lengthBytes);
    io.push(fetch, 0);
    file.channel.submit(io);
  }

  #readAhead(layer: number, clusterBytes: number): void {
    const { from, to } = this.#ahead;
    const { image, sizeBytes } = this.#engine.layers[layer]!;
    const extent = this.#extent;
    const key = this.#key;
    for (let cluster = from; cluster < to && !this.#isBusy(); cluster++) {
      extent.offsetBytes = cluster * clusterBytes;
      extent.wantedBytes = 1;
      if (extent.offsetBytes >= sizeBytes || !image!.find(extent) || extent.kind !== Mapped.compressed) return;
      key.image = layer;
      key.hostOffset = extent.hostOffset;
      if (this.#cache.has(key)) continue;
      const slot = this.#cache.insert(key, clusterBytes);
      if (slot < 0) return;
      this.#start(layer, extent, slot, clusterBytes);
    }
  }
}
