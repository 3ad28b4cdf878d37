/**
 * One change, or one flush, on both legs of a mirror. What is written goes through memory of its own, in pieces: a guest may change its
 * buffer while a write is under way, and then each leg would get something else.
 *
 * Invariants
 * - The request is answered once, when both legs have it; when the target is given up, as soon as the source has it.
 * - It is answered as the source says. A piece that either leg did not do ends it, and its range is to be copied again.
 * - It is used again only when neither leg has anything of it.
 */
import { native } from '../../../native/index.js';
import { BdevIo, IoFlag, IoStatus, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import type { MirrorChannel } from './mirror-channel.js';

const PIECE_BYTES = 128 * 1024;
const COPY_ENTRIES = 128;
const COPY_ENTRY_DOUBLES = 3;
const ECANCELED = 125;
const SOURCE = 0;
const TARGET = 1;
/** Gives a field that changes double representation from the start. */
const DOUBLE = 0.5;

/** Shared by all, which copy one after the other. */
const copyEntries = new Float64Array(COPY_ENTRIES * COPY_ENTRY_DOUBLES);

export class BothLegs implements IoOwner {
  /** The range of what is under way, for those that ask whether it overlaps theirs; both 0 for a flush. */
  startBytes = DOUBLE;
  endBytes = DOUBLE;
  /** Null when it has been answered. */
  parent: BdevIo | null = null;
  readonly #channel: MirrorChannel;
  readonly #source = new BdevIo();
  readonly #target = new BdevIo();
  /** Arena offset of PIECE_BYTES, 0 until first needed. */
  #memory = 0;
  /** Bytes of the parent that were handed out, where its next segment is, and how much of that is done. */
  #started = DOUBLE;
  #segment = 0;
  #segmentSkip = DOUBLE;
  #sourcePending = false;
  #targetPending = false;
  #isAdvancing = false;
  #isInUse = false;
  #status: IoStatus = IoStatus.success;
  #errno = 0;

  constructor(channel: MirrorChannel) {
    this.#channel = channel;
    this.startBytes = 0;
    this.endBytes = 0;
  }

  /** Nothing of it is under way. */
  get #isIdle(): boolean {
    return this.parent === null && !this.#sourcePending && !this.#targetPending;
  }

  start(parent: BdevIo): void {
    this.#isInUse = true;
    this.parent = parent;
    this.startBytes = parent.offsetBytes;
    this.endBytes = parent.offsetBytes + parent.lengthBytes;
    this.#started = 0;
    this.#segment = 0;
    this.#segmentSkip = 0;
    this.#status = IoStatus.success;
    this.#errno = 0;
    this.advance();
  }

  /** After any change: goes on, or answers. */
  advance(): void {
    // A leg that is done at once does not go deeper.
    if (this.#isAdvancing) return;
    this.#isAdvancing = true;
    while (this.parent !== null && !this.#sourcePending && !(this.#targetPending && this.#channel.usesTarget)) {
      if (this.#isDone()) this.#answer();
      else this.#submitPiece();
    }
    this.#isAdvancing = false;
    if (!this.#isInUse || !this.#isIdle) return;
    this.#isInUse = false;
    this.#channel.freed(this);
  }

  onDone(io: BdevIo, leg: number): void {
    if (leg === SOURCE) {
      this.#sourcePending = false;
      if (io.status !== IoStatus.success) this.#fail(io.status, io.errno);
    } else {
      this.#targetPending = false;
      // One that was ended by a reset has not failed: what the legs hold there is found out by copying it.
      if (io.status === IoStatus.aborted) this.#channel.isInDoubt(this);
      else if (io.status !== IoStatus.success) this.#channel.targetFailed(io);
    }
    this.advance();
  }

  release(): void {
    if (this.#memory !== 0) this.#channel.arena.release(this.#memory);
    this.#memory = 0;
  }

  #fail(status: IoStatus, errno: number): void {
    if (this.#status === IoStatus.success) {
      this.#status = status;
      this.#errno = errno;
    }
    this.#channel.isInDoubt(this);
  }

  #isDone(): boolean {
    if (this.#status !== IoStatus.success) return true;
    const { type, lengthBytes } = this.parent!;
    // What has no length has one piece.
    return type === IoType.write ? this.#started >= lengthBytes : this.#started > 0;
  }

  #answer(): void {
    const parent = this.parent!;
    this.parent = null;
    this.#channel.ended(this, parent, this.#status, this.#errno);
  }

  #submitPiece(): void {
    const parent = this.parent!;
    const { type, offsetBytes, flags } = parent;
    if (this.#channel.isResetting && type !== IoType.reset) {
      // Nothing is submitted until that is over.
      this.#fail(IoStatus.aborted, ECANCELED);
      return;
    }
    // What was given up may still be read from the memory: then the rest goes without.
    const isLingering = this.#targetPending;
    const toTarget = this.#channel.usesTarget && !isLingering;
    let offset = offsetBytes;
    let length = parent.lengthBytes;
    if (type === IoType.write) {
      offset += this.#started;
      length = Math.min(length - this.#started, PIECE_BYTES);
    }
    this.#source.prepare(type, offset, length, flags);
    // Whether zeroes are worth writing is decided by the source.
    if (toTarget) this.#target.prepare(type, offset, length, flags & ~IoFlag.noFallback);
    if (type === IoType.write) this.#addData(parent, length, toTarget);
    this.#started += type === IoType.write ? length : 1;
    this.#sourcePending = true;
    this.#targetPending = toTarget || isLingering;
    this.#source.push(this, SOURCE);
    if (toTarget) {
      this.#target.push(this, TARGET);
      this.#channel.target.submit(this.#target);
    }
    this.#channel.source.submit(this.#source);
  }

  #addData(parent: BdevIo, length: number, toTarget: boolean): void {
    if (!toTarget) {
      this.#addSegments(parent, length);
      return;
    }
    if (this.#memory === 0) this.#memory = this.#channel.arena.allocate(PIECE_BYTES);
    this.#copy(parent, length);
    this.#source.addSegment(this.#memory, length);
    this.#target.addSegment(this.#memory, length);
  }

  /** The parent's own memory, for the source alone. */
  #addSegments(parent: BdevIo, length: number): void {
    let left = length;
    while (left > 0) {
      const part = Math.min(parent.segmentLengths[this.#segment]! - this.#segmentSkip, left);
      this.#source.addSegment(parent.segmentAddresses[this.#segment]! + this.#segmentSkip, part);
      this.#skip(parent, part);
      left -= part;
    }
  }

  #copy(parent: BdevIo, length: number): void {
    const base = this.#channel.arena.baseAddress;
    let left = length;
    let at = base + this.#memory;
    let count = 0;
    while (left > 0) {
      const part = Math.min(parent.segmentLengths[this.#segment]! - this.#segmentSkip, left);
      const entry = count * COPY_ENTRY_DOUBLES;
      copyEntries[entry] = at;
      copyEntries[entry + 1] = base + parent.segmentAddresses[this.#segment]! + this.#segmentSkip;
      copyEntries[entry + 2] = part;
      this.#skip(parent, part);
      left -= part;
      at += part;
      if (++count === COPY_ENTRIES || left === 0) {
        native.copyList(copyEntries, count);
        count = 0;
      }
    }
  }

  #skip(parent: BdevIo, bytes: number): void {
    this.#segmentSkip += bytes;
    if (this.#segmentSkip < parent.segmentLengths[this.#segment]!) return;
    this.#segment++;
    this.#segmentSkip = 0;
  }
}
