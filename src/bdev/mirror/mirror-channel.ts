/**
 * What a consumer's requests go through while its disk is mirrored: on to the source, and what changes the disk to the target as well.
 *
 * The disk is divided into chunks. A dirty chunk has yet to be copied, so changes to it go to the source alone; what changes a clean one
 * goes to both legs. Reads are the source's business.
 *
 * Invariants
 * - A clean chunk holds the same on both legs whenever no change to it is under way.
 * - While a chunk is copied no change to it is under way: those before it are waited for, those after it wait.
 * - Changes that overlap and are both on both legs take turns: in whichever order a leg carried them out, the other did so too.
 * - A discard leaves to each leg what is read there afterwards, so only the source gets it, and what it names is copied again.
 * - A change that waits is never overtaken by one that overlaps it, and at most SCAN_MAX of those that wait are looked at at a time.
 * - Nothing here allocates at steady state.
 */
import type { Arena } from '../../../native/index.js';
import type { IoChannel } from '../bdev.js';
import { IoQueue, IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import type { Wait, Waiter } from '../task.js';
import { BothLegs } from './both-legs.js';
import type { DirtyMap } from './dirty-map.js';

/** Changes and flushes that may be on both legs at once: bounds the memory for their data. */
const BOTH_MAX = 64;
const SCAN_MAX = 64;
/** Changes under way are counted by chunk, in slots that chunks share: a wrong neighbour costs a wait, nothing else. */
const SLOTS = 4096;
const ECANCELED = 125;

export interface MirrorChannelOptions {
  readonly arena: Arena;
  readonly source: IoChannel;
  readonly target: IoChannel;
  readonly map: DirtyMap;
  readonly chunkBytes: number;
  readonly blockSizeBytes: number;
  /** The size of the source, which does not change meanwhile. */
  readonly sizeBytes: number;
  /** The target cannot be written any more. Called in the middle of a completion. */
  readonly onTargetFailure: (io: BdevIo) => void;
  /** Something has to be copied again. Called in the middle of a request. */
  readonly onSoiled: () => void;
}

export class MirrorChannel implements IoChannel, IoOwner {
  readonly arena: Arena;
  readonly source: IoChannel;
  readonly target: IoChannel;
  /** False when the target has been given up: then everything is the source's. */
  usesTarget = true;
  isResetting = false;
  readonly #options: MirrorChannelOptions;
  readonly #map: DirtyMap;
  readonly #chunkBytes: number;
  readonly #blockMask: number;
  readonly #sizeBytes: number;
  /** Requests that wait for a chunk, for one they overlap, or for a free BothLegs. */
  readonly #waiting = new IoQueue();
  /** Requests that came while everything is held. */
  readonly #held = new IoQueue();
  #isHolding = false;
  readonly #both: BothLegs[] = [];
  readonly #freeBoth: BothLegs[] = [];
  /** Changes under way, by slot. */
  readonly #changes = new Uint32Array(SLOTS);
  #changeCount = 0;
  /** Slot of the chunk being copied, -1 for none; and who waits for the changes to it. */
  #lockedSlot = -1;
  #copier: Waiter | null = null;
  #isMovingOn = false;

  constructor(options: MirrorChannelOptions) {
    this.#options = options;
    this.arena = options.arena;
    this.source = options.source;
    this.target = options.target;
    this.#map = options.map;
    this.#chunkBytes = options.chunkBytes;
    this.#blockMask = options.blockSizeBytes - 1;
    this.#sizeBytes = options.sizeBytes;
  }

  /** Whether nothing is under way on its own account; reads are not counted. */
  get isQuiet(): boolean {
    return this.#changeCount === 0 && this.#waiting.length === 0 && this.#freeBoth.length === this.#both.length;
  }

  submit(io: BdevIo): void {
    if (this.#isHolding && io.type !== IoType.reset) {
      this.#held.append(io);
      return;
    }
    switch (io.type) {
      case IoType.read:
        this.source.submit(io);
        return;
      case IoType.flush:
        this.#submitOrWait(io);
        return;
      case IoType.reset:
        this.#reset(io);
        return;
      case IoType.write:
      case IoType.discard:
      case IoType.writeZeroes:
        if (this.#isLegal(io)) this.#submitOrWait(io);
        else this.source.submit(io);
        return;
    }
  }

  /** A change that went to the source alone is done. */
  onDone(io: BdevIo): void {
    if (io.type !== IoType.flush) this.#count(io, -1);
    io.complete(io.status, io.errno);
    this.#moveOn();
  }

  /** Releases the memory. Nothing is under way. */
  close(): void {
    if (!this.isQuiet) throw new Error('mirror: closed with I/O in flight');
    for (const both of this.#both) both.release();
  }

  // ---- For the mirror

  /** Lets no request through until `release`. */
  hold(): void {
    this.#isHolding = true;
  }

  /** Lets requests through again, those that were held first. @param channel where they go */
  release(channel: IoChannel): void {
    this.#isHolding = false;
    for (let left = this.#held.length; left > 0; left--) {
      const io = this.#held.shift();
      // One that ended the mirror at once has let all others through.
      if (io === null) return;
      channel.submit(io);
    }
  }

  /** Gives the target up: what is under way there is waited for by nobody. */
  detach(): void {
    if (!this.usesTarget) return;
    this.usesTarget = false;
    this.unlock();
    this.#wakeCopier();
    // Answering may start others: only those that are there now.
    const count = this.#both.length;
    for (let i = 0; i < count; i++) this.#both[i]!.advance();
    this.#moveOn();
  }

  /** Waits until no change to a chunk is under way, and lets none begin until `unlock`. */
  lock(chunk: number): Wait {
    return {
      begin: (waiter) => {
        this.#lockedSlot = chunk % SLOTS;
        this.#copier = waiter;
        this.#wakeCopier();
      },
    };
  }

  unlock(): void {
    if (this.#lockedSlot < 0) return;
    this.#lockedSlot = -1;
    this.#moveOn();
  }

  // ---- For BothLegs

  /** What the legs hold where this request is may differ. */
  isInDoubt(both: BothLegs): void {
    if (both.endBytes > both.startBytes) this.#soil(both.startBytes, both.endBytes);
  }

  targetFailed(io: BdevIo): void {
    if (this.usesTarget) this.#options.onTargetFailure(io);
  }

  /** The request is to be answered. */
  ended(both: BothLegs, parent: BdevIo, status: IoStatus, errno: number): void {
    if (parent.type === IoType.reset) this.isResetting = false;
    else if (parent.type !== IoType.flush) this.#count(parent, -1);
    both.startBytes = 0;
    both.endBytes = 0;
    parent.complete(status, errno);
  }

  /** Neither leg has anything of it any more. */
  freed(both: BothLegs): void {
    this.#freeBoth.push(both);
    this.#moveOn();
  }

  // ---- Requests

  #isLegal({ offsetBytes, lengthBytes }: BdevIo): boolean {
    if (((offsetBytes | lengthBytes) & this.#blockMask) !== 0 || !(offsetBytes >= 0)) return false;
    return lengthBytes > 0 && offsetBytes + lengthBytes <= this.#sizeBytes;
  }

  #submitOrWait(io: BdevIo): void {
    if (this.#overlapsWaiting(io, null) || !this.#mayStart(io)) this.#waiting.append(io);
    else this.#start(io);
  }

  #mayStart(io: BdevIo): boolean {
    if (!this.usesTarget) return true;
    if (io.type === IoType.flush) return this.#hasFreeBoth();
    const first = this.#firstChunk(io);
    const last = this.#lastChunk(io);
    const span = last - first;
    if (this.#lockedSlot >= 0 && (this.#lockedSlot - (first % SLOTS) + SLOTS) % SLOTS <= span) return false;
    if (io.type !== IoType.discard && this.#map.areDirty(first, last)) return true;
    return this.#overlapsNone(io) && (io.type === IoType.discard || this.#hasFreeBoth());
  }

  /** Whether nothing on both legs overlaps. */
  #overlapsNone(io: BdevIo): boolean {
    const start = io.offsetBytes;
    const end = start + io.lengthBytes;
    for (let i = 0; i < this.#both.length; i++) {
      const both = this.#both[i]!;
      if (both.startBytes < end && start < both.endBytes) return false;
    }
    return true;
  }

  /** Whether one of the first that wait overlaps, up to `before`. */
  #overlapsWaiting(io: BdevIo, before: BdevIo | null): boolean {
    if (this.#waiting.length > SCAN_MAX && before === null) return true;
    const start = io.offsetBytes;
    const end = start + io.lengthBytes;
    for (let other = this.#waiting.head; other !== null && other !== before; other = other.next) {
      if (other.offsetBytes < end && start < other.offsetBytes + other.lengthBytes) return true;
    }
    return false;
  }

  #hasFreeBoth(): boolean {
    return this.#freeBoth.length > 0 || this.#both.length < BOTH_MAX;
  }

  #start(io: BdevIo): void {
    if (io.type !== IoType.flush) this.#count(io, 1);
    if (this.usesTarget && (io.type === IoType.flush || !this.#isForSource(io))) {
      this.#takeBoth().start(io);
      return;
    }
    if (io.type === IoType.discard && this.usesTarget) this.#soil(io.offsetBytes, io.offsetBytes + io.lengthBytes);
    io.push(this, 0);
    this.source.submit(io);
  }

  #isForSource(io: BdevIo): boolean {
    return io.type === IoType.discard || this.#map.areDirty(this.#firstChunk(io), this.#lastChunk(io));
  }

  #takeBoth(): BothLegs {
    const free = this.#freeBoth.pop();
    if (free !== undefined) return free;
    const made = new BothLegs(this);
    this.#both.push(made);
    return made;
  }

  #soil(startBytes: number, endBytes: number): void {
    this.#map.soil(Math.floor(startBytes / this.#chunkBytes), Math.floor((endBytes - 1) / this.#chunkBytes));
    this.#options.onSoiled();
  }

  /** @param step 1 for a change that begins, -1 for one that is over */
  #count(io: BdevIo, step: number): void {
    const last = this.#lastChunk(io);
    for (let chunk = this.#firstChunk(io); chunk <= last; chunk++) this.#changes[chunk % SLOTS]! += step;
    this.#changeCount += step;
    if (step < 0) this.#wakeCopier();
  }

  #wakeCopier(): void {
    const copier = this.#copier;
    if (copier === null || (this.#lockedSlot >= 0 && this.#changes[this.#lockedSlot]! > 0)) return;
    this.#copier = null;
    copier.wake();
  }

  /** Starts what has waited long enough, in order. */
  #moveOn(): void {
    if (this.#isMovingOn) return;
    this.#isMovingOn = true;
    for (let io = this.#nextWaiting(); io !== null; io = this.#nextWaiting()) {
      this.#waiting.remove(io);
      this.#start(io);
    }
    this.#isMovingOn = false;
  }

  /** The first of those that wait which may start, and overlaps none before it. */
  #nextWaiting(): BdevIo | null {
    let seen = 0;
    for (let io = this.#waiting.head; io !== null && seen < SCAN_MAX; io = io.next, seen++) {
      if (this.#mayStart(io) && !this.#overlapsWaiting(io, io)) return io;
    }
    return null;
  }

  #reset(io: BdevIo): void {
    this.isResetting = true;
    this.#abort(this.#waiting);
    this.#abort(this.#held);
    this.#takeBoth().start(io);
  }

  #abort(queue: IoQueue): void {
    for (let left = queue.length; left > 0; left--) queue.shift()!.complete(IoStatus.aborted, ECANCELED);
  }

  #firstChunk(io: BdevIo): number {
    return Math.floor(io.offsetBytes / this.#chunkBytes) | 0;
  }

  #lastChunk(io: BdevIo): number {
    return Math.floor((io.offsetBytes + io.lengthBytes - 1) / this.#chunkBytes) | 0;
  }
}
