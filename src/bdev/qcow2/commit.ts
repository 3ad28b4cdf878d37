/**
 * Making changed metadata durable, in rounds. This is the one place where L2 tables, the L1 table and refcounts of a disk in use are
 * written.
 *
 *     1  copy what is dirty; write refcounts            3  write L2 slices and L1 entries
 *     2  sync: refcounts, and all data written so far    4  sync
 *
 * What is copied in 1 is what 3 writes: it points only at data that was complete, and refcounts that were raised, before 2. With
 * nothing dirty a round is its first sync.
 *
 * Invariants
 * - A mapping is on disk only when its data and the refcounts of its clusters are (crash: leaks at most, nobody's old data).
 * - References that a change dropped are given up only when the round that wrote the change is over, and all that was in flight by
 *   then is, too: until then nothing else is put there.
 * - A slice whose copy is on its way stays in the cache.
 * - A flush is answered by a round that began after it came. So none begins while one ends: whoever that wakes may write and flush.
 */
import { EIO, native } from '../../../native/index.js';
import type { Timer } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { IoChannel } from '../bdev.js';
import { BdevIo, IoQueue, IoStatus, IoType, statusOfErrno } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import type { Allocator } from './allocator.js';
import type { Qcow2Image } from './image.js';
import type { RestartLog } from './restart-log.js';
import type { SliceCache } from './slice-cache.js';
import { WaitList } from './wait-list.js';

/** Slices that one round writes at most. */
const STAGED_MAX = 1024;
/** Changes that nobody flushes are written after this time. */
const LAZY_US = 5_000_000;
const COPY_DOUBLES = 3;

/** While a round answers, all it had to do is done, but the next one has to wait. */
const Phase = { idle: 0, refcounts: 1, firstSync: 2, mappings: 3, secondSync: 4, answers: 5 } as const;
type Phase = (typeof Phase)[keyof typeof Phase];

/** Kinds of what is staged. */
const Kind = { refcounts: 0, l2: 1, l1: 2 } as const;

export interface CommitOptions {
  readonly image: Qcow2Image;
  readonly allocator: Allocator;
  readonly reactor: Reactor;
  readonly channel: IoChannel;
  /** Of the external data file, which has to be synced, too. */
  readonly dataChannel: IoChannel | null;
  /** A round is over. @param isAll it took all changes of mappings there were when it began, and all is well */
  readonly onRound: (isAll: boolean) => void;
  /** A round begins. */
  readonly onBegin: () => void;
}

export class Committer implements IoOwner, Timer {
  heapIndex = -1;
  dueUs = 0.5;
  /** What is written down until a round has made it durable. */
  log: RestartLog | null = null;
  /** Woken at the end of each round. */
  readonly waiters = new WaitList();
  readonly #options: CommitOptions;
  readonly #unitBytes: number;
  readonly #staging: number;
  readonly #capacity: number;
  readonly #ios: BdevIo[] = [];
  readonly #kinds: Uint8Array;
  /** Slot of a slice, number of a piece of the L1 table. */
  readonly #places: Int32Array;
  readonly #copies: Float64Array;
  readonly #syncs = [new BdevIo(0), new BdevIo(0)];
  /** Pieces of the L1 table that changed. */
  readonly #l1Dirty = new Set<number>();
  #staged = 0;
  #stagedRefcounts = 0;
  #phase: Phase = Phase.idle;
  #outstanding = 0;
  #errno = 0;
  #takesAll = false;
  #isWanted = false;
  /** Flushes that this round answers, and those that came later. */
  #current = new IoQueue();
  #next = new IoQueue();

  constructor(options: CommitOptions) {
    this.#options = options;
    const { image, allocator, reactor } = options;
    const { sliceBytes } = image.geometry;
    this.#capacity = Math.min(STAGED_MAX, allocator.cache.slotCount + image.l2.slotCount);
    this.#staging = reactor.arena.allocate(this.#capacity * sliceBytes);
    this.#unitBytes = image.file.bdev.blockSizeBytes;
    this.#kinds = new Uint8Array(this.#capacity);
    this.#places = new Int32Array(this.#capacity);
    this.#copies = new Float64Array(this.#capacity * COPY_DOUBLES);
  }

  get isDirty(): boolean {
    const { image, allocator } = this.#options;
    return image.l2.dirtyCount > 0 || this.#l1Dirty.size > 0 || allocator.cache.dirtyCount > 0;
  }

  /** Entries of the L1 table wait to be written. */
  get isL1Dirty(): boolean {
    return this.#l1Dirty.size > 0;
  }

  get isIdle(): boolean {
    return this.#phase === Phase.idle || this.#phase === Phase.answers;
  }

  /** Answers the io when all that completed before is durable. */
  flush(io: BdevIo): void {
    this.#next.append(io);
    this.#begin();
  }

  /** A round is wanted soon: the caches fill up, or references wait to be dropped. */
  request(): void {
    if (this.#phase !== Phase.idle) {
      this.#isWanted = true;
      return;
    }
    this.#begin();
  }

  /** A mapping was changed: it is written at the latest after a while. */
  noteChange(): void {
    const { log } = this;
    const { image, reactor } = this.#options;
    if (this.heapIndex < 0) reactor.schedule(this, LAZY_US);
    const isCrowded = !image.isCached && image.l2.dirtyCount * 2 > image.l2.slotCount;
    if (isCrowded || (log !== null && log.isFilling)) this.request();
  }

  /** An entry of the L1 table was changed. */
  markL1(index: number): void {
    this.#l1Dirty.add(Math.floor((index * 8) / this.#unitBytes));
    this.noteChange();
  }

  onTimer(): void {
    if (this.isDirty) this.request();
  }

  /** Nothing is under way. */
  release(): void {
    const { reactor } = this.#options;
    this.#isWanted = false;
    reactor.cancel(this);
    reactor.arena.release(this.#staging);
  }

  #begin(): void {
    if (this.#phase !== Phase.idle) return;
    this.#options.onBegin();
    const flushes = this.#current;
    this.#current = this.#next;
    this.#next = flushes;
    this.#isWanted = false;
    this.#errno = 0;
    this.#stage();
    this.#enter(Phase.refcounts);
  }

  onDone(io: BdevIo): void {
    if (io.status !== IoStatus.success) this.#errno ||= io.errno || EIO;
    if (--this.#outstanding > 0) return;
    if (this.#errno !== 0) this.#end();
    else this.#enter((this.#phase + 1) as Phase);
  }

  /** Does what a phase is for; goes on to the next one when that is nothing. */
  #enter(phase: Phase): void {
    this.#phase = phase;
    // Held until all is submitted: what completes at once must not end the phase.
    this.#outstanding = 1;
    const hasMappings = this.#staged > this.#stagedRefcounts;
    switch (phase) {
      case Phase.refcounts:
        this.#write(0, this.#stagedRefcounts);
        break;
      case Phase.firstSync:
        this.#sync();
        break;
      case Phase.mappings:
        if (!hasMappings) {
          this.#outstanding = 0;
          this.#end();
          return;
        }
        this.#write(this.#stagedRefcounts, this.#staged);
        break;
      case Phase.secondSync:
        this.#sync();
        break;
      default:
        this.#outstanding = 0;
        this.#end();
        return;
    }
    if (--this.#outstanding > 0) return;
    if (this.#errno !== 0) this.#end();
    else this.#enter((phase + 1) as Phase);
  }

  /** Copies what is dirty. Mappings only when all refcounts have found room. */
  #stage(): void {
    const { image, allocator, reactor } = this.#options;
    this.#staged = 0;
    this.#copy(allocator.cache, Kind.refcounts);
    this.#stagedRefcounts = this.#staged;
    if (allocator.cache.dirtyCount === 0) {
      this.#copy(image.l2, Kind.l2);
      for (const unit of this.#l1Dirty) {
        if (this.#staged === this.#capacity) break;
        this.#l1Dirty.delete(unit);
        this.#kinds[this.#staged] = Kind.l1;
        this.#places[this.#staged] = unit;
        this.#encodeL1(unit, this.#addressOf(this.#staged++));
      }
    }
    this.#takesAll = !this.isDirty;
    if (this.#takesAll) this.log?.stage();
    else this.#isWanted = true;
    if (this.#staged > 0 && this.heapIndex >= 0 && this.#takesAll) reactor.cancel(this);
  }

  /** Copies what is dirty of a cache, in the order of the file. */
  #copy(cache: SliceCache, kind: number): void {
    const { baseAddress } = this.#options.reactor.arena;
    const first = this.#staged;
    for (let slot = 0; this.#staged < this.#capacity && slot >= 0;) {
      slot = cache.beginWrite();
      if (slot >= 0) this.#places[this.#staged++] = slot;
    }
    const places = this.#places.subarray(first, this.#staged);
    if (places.length > 1) places.sort((a, b) => cache.homeOf(a) - cache.homeOf(b));
    for (let i = 0; i < places.length; i++) {
      const entry = i * COPY_DOUBLES;
      this.#kinds[first + i] = kind;
      this.#copies[entry] = baseAddress + this.#addressOf(first + i);
      this.#copies[entry + 1] = baseAddress + cache.addressOf(places[i]!);
      this.#copies[entry + 2] = cache.sliceBytes;
    }
    if (places.length > 0) native.copyList(this.#copies, places.length);
  }

  #encodeL1(unit: number, address: number): void {
    const { image, reactor } = this.#options;
    const bytes = Buffer.from(reactor.arena.buffer, address, this.#unitBytes);
    bytes.fill(0);
    const first = (unit * this.#unitBytes) / 8;
    const end = Math.min(image.l1.length, first + this.#unitBytes / 8);
    for (let index = first; index < end; index++) {
      const offset = image.l1[index]!;
      const copied = image.l1Copied[index]! * 2 ** 31;
      bytes.writeUInt32BE(Math.floor(offset / 2 ** 32) + copied, (index - first) * 8);
      bytes.writeUInt32BE(offset % 2 ** 32, (index - first) * 8 + 4);
    }
  }

  /** Writes staged pieces; those that lie together in the file by one request. */
  #write(from: number, to: number): void {
    const { image, channel } = this.#options;
    const { sliceBytes } = image.geometry;
    for (let i = from; i < to;) {
      const kind = this.#kinds[i];
      const home = this.#homeOf(i);
      let count = 1;
      if (kind !== Kind.l1) {
        while (
          i + count < to &&
          this.#kinds[i + count] === kind &&
          this.#homeOf(i + count) === home + count * sliceBytes
        ) {
          count++;
        }
      }
      const io = (this.#ios[i] ??= new BdevIo(1));
      const lengthBytes = kind === Kind.l1 ? this.#unitBytes : count * sliceBytes;
      io.prepare(IoType.write, home, lengthBytes, 0);
      io.addSegment(this.#addressOf(i), lengthBytes);
      io.push(this, 0);
      this.#outstanding++;
      i += count;
      channel.submit(io);
    }
  }

  #homeOf(staged: number): number {
    const { image, allocator } = this.#options;
    const place = this.#places[staged]!;
    switch (this.#kinds[staged]) {
      case Kind.refcounts:
        return allocator.cache.homeOf(place);
      case Kind.l2:
        return image.l2.homeOf(place);
      default:
        return image.header.l1Offset + place * this.#unitBytes;
    }
  }

  #sync(): void {
    const { channel, dataChannel } = this.#options;
    this.#submitSync(0, channel);
    if (dataChannel !== null) this.#submitSync(1, dataChannel);
  }

  #submitSync(index: number, channel: IoChannel): void {
    const io = this.#syncs[index]!;
    io.prepare(IoType.flush, 0, 0, 0);
    io.push(this, 0);
    this.#outstanding++;
    channel.submit(io);
  }

  #end(): void {
    const { log } = this;
    const { image, allocator, onRound } = this.#options;
    const isOk = this.#errno === 0;
    for (let i = 0; i < this.#staged; i++) {
      const place = this.#places[i]!;
      if (this.#kinds[i] === Kind.refcounts) allocator.cache.endWrite(place, isOk);
      else if (this.#kinds[i] === Kind.l2) image.l2.endWrite(place, isOk);
      else if (!isOk) this.#l1Dirty.add(place);
    }
    this.#staged = 0;
    // Before anything that was waiting for the round can change what the log says.
    if (isOk && this.#takesAll) log?.commit();
    if (isOk) onRound(this.#takesAll);
    if (!this.waiters.isEmpty) this.waiters.wakeAll(this.#errno);
    image.loader.onRoom();
    allocator.loader.onRoom();
    this.#phase = Phase.answers;
    const status = statusOfErrno(this.#errno);
    const flushes = this.#current;
    // A flush is answered when all that was dirty has been written: it goes into the next round where this one was too small.
    if (isOk && !this.#takesAll) {
      for (let io = flushes.shift(); io !== null; io = flushes.shift()) this.#next.append(io);
    } else {
      for (let left = flushes.length; left > 0; left--) flushes.shift()!.complete(status, this.#errno);
      if (!isOk) this.noteChange();
    }
    this.#phase = Phase.idle;
    if (this.#next.length > 0 || (this.#isWanted && isOk)) this.#begin();
  }

  #addressOf(staged: number): number {
    return this.#staging + staged * this.#options.image.geometry.sliceBytes;
  }
}
