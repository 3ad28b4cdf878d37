/**
 * The engine: what serves the disk that an image and its backing chain are.
 *
 * A read or write that lies in one piece in the file goes there as it is, with another offset. Everything else is a RequestJob;
 * what changes the mapping is a Change; what makes changes durable is the Committer.
 *
 * Invariants
 * - Nothing on the way of a mapped request allocates.
 * - Host clusters that lost a reference get it taken away when (1) a round has made that durable and (2) every request that was
 *   under way then is over: requests are counted in two epochs, and an epoch ends when its count is zero.
 * - A damaged image takes no more writes.
 */
import { EIO, EROFS } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { IoChannel } from '../bdev.js';
import { IoQueue, IoStatus, IoType, statusOfErrno } from '../bdev-io.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import type { Allocator } from './allocator.js';
import { BufferPool } from './buffer-pool.js';
import { ChainMap } from './chain-map.js';
import { Change } from './change.js';
import type { Committer } from './commit.js';
import { CompressedReader } from './compressed-reader.js';
import { CryptMethod } from './format.js';
import type { Qcow2Image } from './image.js';
import type { LiveBitmaps } from './live-bitmaps.js';
import { Extent, Mapped } from './l2.js';
import type { Dropped } from './l2.js';
import { JobKind, Piece, RequestJob } from './request-job.js';
import { RecordKind } from './restart-log.js';
import type { RestartLog } from './restart-log.js';
import { newCopyEntries } from './segments.js';
import { nextStep, startTask } from '../task.js';
import type { Task } from '../task.js';
import { WaitList, sleep } from './wait-list.js';
import type { Sleeper } from './wait-list.js';

/** Clusters whose storage is given back by one request. */
const LOWERED_MAX = 4096;
/** Zeroes to write from. */
const ZEROES_BYTES = 64 * 1024;
/** Memory for what is copied around data, at most, but for four buffers. */
const COPY_BYTES_MAX = 16 * 2 ** 20;
/** Gives a field that changes double representation from the start. */
const DOUBLE = 0.5;

/** One image of a chain, or the disk at its end. */
export interface Layer {
  /** Null: a disk without a format. */
  readonly image: Qcow2Image | null;
  /** Where its data lies. */
  readonly channel: IoChannel;
  readonly sizeBytes: number;
}

/** References that were dropped, in the order in which it happened. */
export class DroppedList implements Dropped {
  readonly #pairs: number[] = [];
  #closed = 0;

  get length(): number {
    return this.#pairs.length / 2;
  }

  add(cluster: number, count: number): void {
    const end = this.#pairs.length;
    // What is dropped in a row is one entry, unless that is being made durable.
    const isNext = end > this.#closed && this.#pairs[end - 2]! + this.#pairs[end - 1]! === cluster;
    if (isNext) this.#pairs[end - 1]! += count;
    else this.#pairs.push(cluster, count);
  }

  /** What is here stays as it is. Returns its length. */
  close(): number {
    this.#closed = this.#pairs.length;
    return this.length;
  }

  /** Takes the first `length` away. */
  split(length: number): number[] {
    this.#closed -= length * 2;
    return this.#pairs.splice(0, length * 2);
  }
}

export interface EngineOptions {
  readonly reactor: Reactor;
  /** The image that is served, then what it is backed by. */
  readonly layers: readonly Layer[];
  readonly onDamage: (field: string, problem: string) => void;
  /** Memory for decompressed clusters, and threads that decompress; 0: the reactor does it itself. */
  readonly clusterCacheBytes: number;
  readonly codecThreads: number;
}

export class Engine implements IoOwner {
  readonly reactor: Reactor;
  layers: readonly Layer[];
  readonly top: Qcow2Image;
  readonly dataChannel: IoChannel;
  /** `dataChannel` encrypts and decrypts. */
  readonly isEncrypted: boolean;
  readonly extent = new Extent();
  readonly copyEntries = newCopyEntries();
  readonly dropped = new DroppedList();
  readonly buffers: BufferPool;
  /** Null: the image is only read. */
  allocator: Allocator | null = null;
  committer: Committer | null = null;
  log: RestartLog | null = null;
  bitmaps: LiveBitmaps | null = null;
  isReadOnly = true;
  /**
   * Without a log, what changes the mapping is answered when it is durable, as a guest has to be; who flushes by itself wants it
   * sooner.
   */
  answersWhenDurable = true;
  /** What is known of the chain below; null where it is short. */
  chain: ChainMap | null;
  /** Made when the first compressed cluster is met: few images have any. */
  #compressed: CompressedReader | null = null;
  readonly #options: EngineOptions;
  readonly #zeroExtent = new Extent();
  #backedBytes: number;
  readonly #onDamage: (field: string, problem: string) => void;
  #zeroes = 0;
  readonly #freeJobs: RequestJob[] = [];
  readonly #freePieces: Piece[] = [];
  readonly #freeChanges: Change[] = [];
  readonly #active: Change[] = [];
  readonly #preparing = new Map<number, WaitList>();

  /** Requests under way by epoch. */
  readonly #underWay = new Int32Array(2);
  #epoch = 0;
  #droppedAtBegin = 0;
  /** Dropped, durably; they wait for the epoch to end. */
  #settled: number[][] = [];
  #isSettling = false;
  #isFrozen = false;
  readonly #held = new IoQueue();
  readonly #idle = new WaitList();
  readonly #thaw = new WaitList();
  /** Woken when an epoch has ended. */
  readonly #passed = new WaitList();
  /** The part of the disk in which nothing is written now, [from, to), and what waits for that. */
  #closedFrom = DOUBLE;
  #closedTo = DOUBLE;
  readonly #shutOut = new IoQueue();

  constructor(options: EngineOptions) {
    const { reactor, layers, onDamage } = options;
    this.#options = options;
    this.reactor = reactor;
    this.layers = layers;
    this.top = layers[0]!.image!;
    this.dataChannel = layers[0]!.channel;
    this.isEncrypted = this.top.header.cryptMethod !== CryptMethod.none;
    this.#onDamage = onDamage;
    this.#closedFrom = 0;
    this.#closedTo = 0;
    this.#backedBytes = 0;
    this.chain = null;
    this.#adopt(layers);
    const bufferBytes = 2 * this.top.geometry.clusterBytes;
    this.buffers = new BufferPool(reactor.arena, bufferBytes, Math.max(4, Math.floor(COPY_BYTES_MAX / bufferBytes)));
  }

  #adopt(layers: readonly Layer[]): void {
    this.layers = layers;
    this.#backedBytes = layers.length > 1 ? layers[1]!.sizeBytes : 0;
    this.chain = layers.length > 2 ? new ChainMap(this.top.sizeBytes, this.top.geometry.clusterBytes) : null;
    for (const { image } of layers) {
      if (image === null) continue;
      image.onDamage = (field, problem) => this.damaged(field, problem);
      image.onCacheFull = () => this.committer?.request();
    }
  }

  submit(io: BdevIo): void {
    if (this.#isFrozen) {
      this.#held.append(io);
      return;
    }
    if (io.offsetBytes < this.#closedTo && this.#isShutOut(io)) {
      this.#shutOut.append(io);
      return;
    }
    if (this.bitmaps !== null && io.type !== IoType.read && io.type !== IoType.flush) this.bitmaps.mark(io);
    if (io.type <= IoType.write) {
      if (!this.#forward(io)) this.startJob(io);
    } else if (io.type === IoType.flush) {
      this.#flush(io);
    } else {
      this.startJob(io);
    }
  }

  /** Hands a request on that lies in one piece. Returns false when it does not. */
  #forward(io: BdevIo): boolean {
    const extent = this.extent;
    extent.offsetBytes = io.offsetBytes;
    extent.wantedBytes = io.lengthBytes;
    if (!this.top.find(extent) || extent.kind !== Mapped.data || extent.lengthBytes < io.lengthBytes) return false;
    if (io.type === IoType.write && (!extent.isCopied || this.isReadOnly || this.isUnsettled(io))) return false;
    io.notes[io.depth] = io.offsetBytes;
    io.push(this, this.#epoch);
    this.#underWay[this.#epoch]!++;
    io.offsetBytes = extent.hostOffset;
    this.dataChannel.submit(io);
    return true;
  }

  /**
   * Whether the mapping of these bytes would be lost if this process were killed: without a log, what goes by it is answered when it is
   * in the file, whoever made it.
   */
  isUnsettled({ offsetBytes }: { readonly offsetBytes: number }): boolean {
    if (this.log !== null || this.committer === null || !this.answersWhenDurable) return false;
    const slot = this.top.l2.find(this.top.sliceOf(offsetBytes));
    return this.committer.isL1Dirty || (slot >= 0 && !this.top.l2.isSettled(slot));
  }

  onDone(io: BdevIo, epoch: number): void {
    io.offsetBytes = io.notes[io.depth]!;
    this.#leave(epoch);
    io.complete(io.status, io.errno);
  }

  // ---- for jobs and changes ----

  /** Copies the range of a request up from below, where the image holds nothing. The engine is not frozen. */
  populate(io: BdevIo): void {
    this.#takeJob().start(io, JobKind.populate);
  }

  /**
   * Has the image hold nothing of the range of a request any more, whole clusters: what lies below shows there. The engine is not
   * frozen, and nobody writes there.
   */
  letGo(io: BdevIo): void {
    this.#takeJob().start(io, JobKind.letGo);
  }

  /** What the image stands on from here on: the same contents, wherever the image holds nothing. The engine is frozen. */
  standOn(below: readonly Layer[]): void {
    this.#compressed?.close();
    this.#compressed = null;
    this.#adopt([this.layers[0]!, ...below]);
  }

  /** What lies below has become longer. */
  noteBelow(): void {
    this.#backedBytes = this.layers[1]!.sizeBytes;
  }

  /** Waits until nobody writes to a part of the disk; who wants to waits until `reopen`. One part at a time. */
  *closeOff(offset: number, lengthBytes: number): Task<void> {
    this.#closedFrom = offset;
    this.#closedTo = offset + lengthBytes;
    // Requests that were under way before, as an epoch of their own: with nothing to be given up in its end.
    const mark: number[] = [];
    this.#settled.push(mark);
    this.#settle();
    while (this.#settled.includes(mark)) yield* sleep((sleeper) => this.#passed.add(sleeper));
  }

  reopen(): void {
    this.#closedFrom = 0;
    this.#closedTo = 0;
    for (let left = this.#shutOut.length; left > 0; left--) this.submit(this.#shutOut.shift()!);
  }

  #isShutOut({ type, offsetBytes, lengthBytes }: BdevIo): boolean {
    return type !== IoType.read && type !== IoType.flush && offsetBytes + lengthBytes > this.#closedFrom;
  }

  /** Waits until requests are taken. */
  *thawed(): Task<void> {
    while (this.#isFrozen) yield* sleep((sleeper) => this.#thaw.add(sleeper));
  }

  /** Takes a request apart that reads the disk as it is now; also from within a change. */
  startJob(io: BdevIo): void {
    this.#takeJob().start(io, JobKind.request);
  }

  #takeJob(): RequestJob {
    const job = this.#freeJobs.pop() ?? new RequestJob(this);
    job.epoch = this.#epoch;
    this.#underWay[this.#epoch]!++;
    return job;
  }

  endJob(job: RequestJob, io: BdevIo, errno: number): void {
    const { hasChanged, epoch } = job;
    this.#freeJobs.push(job);
    // Who waits for this may take the job for one of its own.
    this.#leave(epoch);
    // Without a log that outlives this process a change is answered when it is in the file.
    if (hasChanged && errno === 0 && this.log === null && this.answersWhenDurable) this.committer!.flush(io);
    else io.complete(statusOfErrno(errno), errno);
  }

  /** Whether changes have to wait until the log has room for `records` more; the sleeper is woken at the end of a round. */
  isLogFull(records: number, sleeper: Sleeper): boolean {
    if (this.log === null || this.log.room >= records) return false;
    this.committer!.waiters.add(sleeper);
    this.committer!.request();
    return true;
  }

  /** Waits until the log has room for a record. Throws BdevError. */
  *roomInLog(): Task<void> {
    while (this.log !== null && this.log.room < 1) {
      this.committer!.request();
      const errno = yield* sleep((sleeper) => this.committer!.waiters.add(sleeper));
      if (errno !== 0)
        throw new BdevError('io-error', 'base', `metadata cannot be written: errno ${errno}`, 'look at the device');
    }
  }

  takePiece(): Piece {
    return this.#freePieces.pop() ?? new Piece(this);
  }

  recyclePiece(piece: Piece): void {
    this.#freePieces.push(piece);
  }

  takeChange(): Change {
    return this.#freeChanges.pop() ?? new Change(this);
  }

  recycle(change: Change): void {
    this.#freeChanges.push(change);
  }

  activate(change: Change): void {
    this.#active.push(change);
  }

  deactivate(change: Change): void {
    const last = this.#active.pop()!;
    if (last !== change) this.#active[this.#active.indexOf(change)] = last;
  }

  /** The change with the lowest of these clusters, or null. */
  conflictWith(first: number, count: number): Change | null {
    let found: Change | null = null;
    for (let i = 0; i < this.#active.length; i++) {
      const change = this.#active[i]!;
      if (change.firstCluster >= first + count || change.firstCluster + change.count <= first) continue;
      if (found === null || change.firstCluster < found.firstCluster) found = change;
    }
    return found;
  }

  /**
   * First layer below the top that may have something of the piece of the disk that is looked up. Finds out more of it, as far as that
   * takes no reading, and cuts what is asked for to the piece.
   */
  skipLayers(position: number): number {
    const chain = this.chain!;
    const { layers, extent } = this;
    const piece = chain.pieceOf(position);
    const end = chain.startOf(piece + 1);
    if (position + extent.wantedBytes > end) extent.wantedBytes = end - position;
    const known = chain.layerOf(piece);
    let layer = known;
    const looked = this.#zeroExtent;
    while (layer < layers.length) {
      const { image, sizeBytes } = layers[layer]!;
      looked.offsetBytes = chain.startOf(piece);
      looked.wantedBytes = end - looked.offsetBytes;
      // What reaches beyond a layer is zeroes there, whatever lies below it.
      if (image === null || end > sizeBytes || !image.find(looked)) break;
      if (looked.kind !== Mapped.unallocated || looked.lengthBytes < looked.wantedBytes) break;
      layer++;
    }
    if (layer > known) chain.note(piece, layer);
    return layer;
  }

  /** Whether something lies below this byte. */
  isBacked(offset: number): boolean {
    return offset < this.#backedBytes;
  }

  /** Whether a range of one slice, which is loaded, reads as zeroes as far as the mapping says. */
  readsAsZeroes(offset: number, lengthBytes: number): boolean {
    const extent = this.#zeroExtent;
    const end = offset + lengthBytes;
    for (let at = offset; at < end; at += extent.lengthBytes) {
      extent.offsetBytes = at;
      extent.wantedBytes = end - at;
      if (at >= this.top.sizeBytes) return true;
      if (!this.top.find(extent)) return false;
      if (extent.kind === Mapped.zero) continue;
      if (extent.kind !== Mapped.unallocated || this.isBacked(at)) return false;
    }
    return true;
  }

  /** Adds zeroes to what is written. */
  addZeroes(io: BdevIo, lengthBytes: number): void {
    if (this.#zeroes === 0) this.#zeroes = this.reactor.arena.allocate(ZEROES_BYTES);
    for (let left = lengthBytes; left > 0; left -= ZEROES_BYTES) {
      io.addSegment(this.#zeroes, left < ZEROES_BYTES ? left : ZEROES_BYTES);
    }
  }

  /** A mapping was changed in memory. */
  noteChange(): void {
    this.committer!.noteChange();
  }

  /** Sees to it that an L2 table is there, and no snapshot's; the sleeper is woken then. */
  prepareTable(table: number, sleeper: Sleeper): void {
    const others = this.#preparing.get(table);
    if (others !== undefined) {
      others.add(sleeper);
      return;
    }
    const waiters = new WaitList();
    waiters.add(sleeper);
    this.#preparing.set(table, waiters);
    const end = (errno: number): void => {
      this.#preparing.delete(table);
      waiters.wakeAll(errno);
    };
    startTask(
      this.#makeTable(table),
      () => end(0),
      (error) => end(errnoOf(error)),
    );
  }

  get codecThreads(): number {
    return this.#options.codecThreads;
  }

  get compressed(): CompressedReader {
    const { clusterCacheBytes, codecThreads } = this.#options;
    return (this.#compressed ??= new CompressedReader(this, clusterCacheBytes, codecThreads));
  }

  /** Compressed clusters may be elsewhere now. */
  forgetCompressed(): void {
    this.#compressed?.forget();
  }

  // ---- metadata ----

  *#makeTable(table: number): Task<void> {
    const { top } = this;
    const { clusterBytes } = top.geometry;
    const old = top.l1[table]!;
    const cluster = yield* this.allocator!.takeOne();
    const isZeroed = this.allocator!.isZeroed;
    const offset = cluster * clusterBytes;
    // Zeroes where there was none; otherwise the one that a snapshot has, too. In the cache nothing of it is dirty.
    if (old !== 0 || !isZeroed) {
      const bytes = Buffer.alloc(clusterBytes);
      if (old !== 0) yield* top.file.read(old, bytes);
      yield* top.file.write(offset, bytes);
    }
    yield* this.roomInLog();
    if (this.log !== null) {
      this.log.first = table;
      this.log.value.fill(0);
      this.log.value[0] = Math.floor(offset / 2 ** 32);
      this.log.value[1] = offset % 2 ** 32;
      this.log.append(RecordKind.table, 1);
    }
    this.enterTable(table, offset);
  }

  /** From here on the L1 table names this table. */
  enterTable(table: number, offset: number): void {
    const { top } = this;
    const { clusterBytes, slicesPerTable, sliceBytes } = top.geometry;
    const old = top.l1[table]!;
    top.metadata.add(offset / clusterBytes);
    top.l1[table] = offset;
    top.l1Copied[table] = 1;
    for (let i = 0; i < slicesPerTable; i++) {
      const slot = top.l2.slotOf(table * slicesPerTable + i);
      if (slot >= 0) top.l2.setHome(slot, offset + i * sliceBytes);
    }
    if (old !== 0 && old !== offset) this.dropped.add(old / clusterBytes, 1);
    this.committer!.markL1(table);
  }

  /** A round of the committer begins: what was dropped by now is durable when it ends. */
  onRoundBegin(): void {
    this.#droppedAtBegin = this.dropped.close();
  }

  onRound(isAll: boolean): void {
    if (isAll && this.#droppedAtBegin > 0) this.#settled.push(this.dropped.split(this.#droppedAtBegin));
    this.#droppedAtBegin = 0;
    this.#settle();
  }

  #settle(): void {
    if (this.#isSettling || this.#settled.length === 0) return;
    this.#isSettling = true;
    this.#epoch ^= 1;
    if (this.#underWay[this.#epoch ^ 1] === 0) this.#lowerSettled();
  }

  #leave(epoch: number): void {
    if (--this.#underWay[epoch]! > 0) return;
    if (this.#isSettling && epoch !== this.#epoch) this.#lowerSettled();
    if (!this.#idle.isEmpty && this.#underWay[0] === 0 && this.#underWay[1] === 0) this.#idle.wakeAll(0);
  }

  /** The epoch that was is over: nothing refers to those clusters any more. */
  #lowerSettled(): void {
    const pairs = this.#settled.shift()!;
    const end = (): void => {
      this.#isSettling = false;
      this.#settle();
      this.#passed.wakeAll(0);
      if (!this.#isSettling) this.#idle.wakeAll(0);
    };
    // What could not be lowered is leaked, which a check finds and repairs.
    startTask(this.#lower(pairs), end, end);
  }

  *#lower(pairs: readonly number[]): Task<void> {
    for (let i = 0; i < pairs.length; i += 2) {
      const end = pairs[i]! + pairs[i + 1]!;
      for (let first = pairs[i]!; first < end;)
        first = yield* this.#lowerSome(first, Math.min(end, first + LOWERED_MAX));
    }
  }

  /** Takes a reference from clusters that lie together; storage of those that are free then is given back. Returns their end. */
  *#lowerSome(first: number, end: number): Task<number> {
    const allocator = this.allocator!;
    const { file, geometry } = this.top;
    let alone = first;
    while (alone < end && (yield* allocator.refcount(alone)) === 1) alone++;
    // As long as they are counted, nobody takes them.
    if (alone > first) yield* file.deallocate(first * geometry.clusterBytes, (alone - first) * geometry.clusterBytes);
    const lowered = Math.max(alone, first + 1);
    for (let cluster = first; cluster < lowered; cluster++) {
      yield* this.roomInLog();
      const value = yield* allocator.lower(cluster);
      if (this.log === null || value < 0) continue;
      this.log.first = cluster;
      this.log.value.fill(0);
      this.log.value[0] = Math.floor(value / 2 ** 32);
      this.log.value[1] = value % 2 ** 32;
      this.log.append(RecordKind.refcount, 1);
    }
    return lowered;
  }

  #flush(io: BdevIo): void {
    if (this.committer === null) io.complete(IoStatus.success, 0);
    else if (this.isReadOnly) io.complete(IoStatus.ioError, EROFS);
    else this.committer.flush(io);
  }

  /** Something of the image is not as it must be: it takes no more writes. */
  damaged(field: string, problem: string): void {
    this.isReadOnly = true;
    this.#onDamage(field, problem);
  }

  // ---- standing still ----

  /** Holds new requests back and waits until none is under way. */
  *freeze(): Task<void> {
    this.#isFrozen = true;
    while (this.#underWay[0]! > 0 || this.#underWay[1]! > 0) yield* sleep((sleeper) => this.#idle.add(sleeper));
    yield* this.quiet();
  }

  /** Waits until nothing is read ahead any more. */
  *quiet(): Task<void> {
    const compressed = this.#compressed;
    if (compressed === null) return;
    while (compressed.active > 0) yield* sleep((sleeper) => compressed.whenLess(sleeper));
    // It is its pool that calls here, which may be closed next.
    yield* nextStep(this.reactor);
  }

  thaw(): void {
    this.#isFrozen = false;
    for (let left = this.#held.length; left > 0; left--) this.submit(this.#held.shift()!);
    this.#thaw.wakeAll(0);
  }

  /** Writes everything, until nothing is left to be written or lowered. The engine is frozen. Throws BdevError. */
  *settleAll(flush: () => Task<void>): Task<void> {
    const { committer, allocator } = this;
    if (committer === null || allocator === null) return;
    for (;;) {
      while (this.#isSettling || !allocator.isIdle) yield* sleep((sleeper) => this.#whenIdle(sleeper));
      if (!committer.isDirty && this.dropped.length === 0 && this.#settled.length === 0 && committer.isIdle) return;
      yield* flush();
    }
  }

  #whenIdle(sleeper: Sleeper): void {
    if (this.#isSettling) this.#idle.add(sleeper);
    else this.allocator!.whenIdle(sleeper);
  }

  release(): void {
    this.#compressed?.close();
    this.buffers.release();
    if (this.#zeroes !== 0) this.reactor.arena.release(this.#zeroes);
  }
}

function errnoOf(error: unknown): number {
  const code = (error as { readonly code?: unknown }).code;
  return code === 'no-space' ? 28 : EIO;
}
