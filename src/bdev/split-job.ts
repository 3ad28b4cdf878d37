/**
 * Carrying out a request that the module cannot take as it is, by child requests that it can.
 *
 *     read, write   pieces within the module's limits; pieces whose memory is misaligned go through a bounce buffer
 *     write + FUA   the pieces, then a flush, where the module has no FUA
 *     writeZeroes   pieces, or writes from a buffer of zeroes where the module cannot zero
 *     discard       pieces
 *
 * Invariants
 * - A parent completes once, after all its children, with the status of the first child that failed; no piece is started after a
 *   failure, and no flush.
 * - Children and bounce buffers are bounded per channel; a job that gets none waits its turn, in order.
 */
import { native } from '../../native/index.js';
import type { BdevChannel } from './bdev-channel.js';
import { BdevIo, IoFlag, IoStatus, IoType } from './bdev-io.js';
import type { IoOwner } from './bdev-io.js';

/** Children in flight per channel. */
const CHILDREN_MAX = 32;
const BOUNCE_BYTES = 128 * 1024;
const ZEROES_BYTES = 128 * 1024;
const COPY_ENTRIES = 128;
const COPY_ENTRY_DOUBLES = 3;
const ECANCELED = 125;

/** A child request with the bounce buffer it may use. */
interface Child {
  readonly io: BdevIo;
  /** Arena offset of its bounce buffer, 0 until first needed. */
  bounceAddress: number;
  bounced: boolean;
  /** Where in the parent it starts. */
  parentOffset: number;
}

/** The jobs of one channel: what they share, and the queue of those that wait for a child. */
export class SplitJobPool {
  readonly channel: BdevChannel;
  /** Requests being taken apart. */
  active = 0;
  readonly #children: Child[] = [];
  readonly #freeChildren: Child[] = [];
  readonly #jobs: SplitJob[] = [];
  readonly #freeJobs: SplitJob[] = [];
  readonly #starved: SplitJob[] = [];
  #zeroes = 0;
  #copyEntries: Float64Array | null = null;

  constructor(channel: BdevChannel) {
    this.channel = channel;
  }

  start(io: BdevIo): void {
    this.active++;
    let job = this.#freeJobs.pop();
    if (job === undefined) {
      job = new SplitJob(this);
      this.#jobs.push(job);
    }
    job.start(io);
  }

  takeChild(): Child | null {
    const child = this.#freeChildren.pop();
    if (child !== undefined) return child;
    if (this.#children.length === CHILDREN_MAX) return null;
    const made: Child = { io: new BdevIo(16), bounceAddress: 0, bounced: false, parentOffset: -0.5 };
    made.io.tag = this.#children.length;
    this.#children.push(made);
    return made;
  }

  childOf(io: BdevIo): Child {
    return this.#children[io.tag]!;
  }

  giveChild(child: Child): void {
    this.#freeChildren.push(child);
  }

  /** The job got no child: it goes on when one comes free. */
  starve(job: SplitJob): void {
    this.#starved.push(job);
  }

  feed(): void {
    while (this.#starved.length > 0 && (this.#freeChildren.length > 0 || this.#children.length < CHILDREN_MAX)) {
      this.#starved.shift()!.advance();
    }
  }

  /** Lets every request that is being taken apart end, as aborted, when its children that are below have. */
  abort(): void {
    for (const job of this.#jobs) job.fail(IoStatus.aborted, ECANCELED);
    // These may have no child that would end them.
    for (let left = this.#starved.length; left > 0; left--) this.#starved.shift()!.advance();
  }

  done(job: SplitJob, parent: BdevIo, status: IoStatus, errno: number): void {
    this.active--;
    this.#freeJobs.push(job);
    this.channel.finish(parent, status, errno);
  }

  bounceOf(child: Child): number {
    if (child.bounceAddress === 0) child.bounceAddress = this.channel.reactor.arena.allocate(BOUNCE_BYTES);
    return child.bounceAddress;
  }

  /** ZEROES_BYTES of zeroes: fresh anonymous memory that nobody writes. */
  zeroes(): number {
    if (this.#zeroes === 0) this.#zeroes = this.channel.reactor.arena.allocate(ZEROES_BYTES);
    return this.#zeroes;
  }

  /** Copies between the parent's segments, from `parentOffset` on, and a flat buffer. */
  copy(parent: BdevIo, parentOffset: number, flat: number, lengthBytes: number, toFlat: boolean): void {
    const arena = this.channel.reactor.arena;
    const entries = (this.#copyEntries ??= new Float64Array(COPY_ENTRIES * COPY_ENTRY_DOUBLES));
    const base = arena.baseAddress;
    let skip = parentOffset;
    let left = lengthBytes;
    let at = base + flat;
    let count = 0;
    for (let i = 0; left > 0; i++) {
      const length = parent.segmentLengths[i]!;
      if (skip >= length) {
        skip -= length;
        continue;
      }
      const part = Math.min(length - skip, left);
      const memory = base + parent.segmentAddresses[i]! + skip;
      entries[count * COPY_ENTRY_DOUBLES] = toFlat ? at : memory;
      entries[count * COPY_ENTRY_DOUBLES + 1] = toFlat ? memory : at;
      entries[count * COPY_ENTRY_DOUBLES + 2] = part;
      skip = 0;
      left -= part;
      at += part;
      if (++count === COPY_ENTRIES || left === 0) {
        native.copyList(entries, count);
        count = 0;
      }
    }
  }

  release(): void {
    const arena = this.channel.reactor.arena;
    for (const child of this.#children) if (child.bounceAddress !== 0) arena.release(child.bounceAddress);
    if (this.#zeroes !== 0) arena.release(this.#zeroes);
  }
}

class SplitJob implements IoOwner {
  readonly #pool: SplitJobPool;
  #parent: BdevIo | null = null;
  /** Bytes of the parent handed out to children so far. */
  #started = -0.5;
  #outstanding = 0;
  #status: IoStatus = IoStatus.success;
  #errno = 0;
  #flushDue = false;
  #advancing = false;
  #starving = false;
  #emulateZeroes = false;
  // Where the next piece starts in the parent's segments.
  #segment = 0;
  #segmentOffset = -0.5;

  constructor(pool: SplitJobPool) {
    this.#pool = pool;
  }

  start(parent: BdevIo): void {
    const bdev = this.#pool.channel.bdev;
    this.#parent = parent;
    this.#started = 0;
    this.#outstanding = 0;
    this.#status = IoStatus.success;
    this.#errno = 0;
    this.#segment = 0;
    this.#segmentOffset = 0;
    const fua = (parent.flags & IoFlag.fua) !== 0;
    this.#emulateZeroes = parent.type === IoType.writeZeroes && !bdev.supports(IoType.writeZeroes);
    if (this.#emulateZeroes && this.#mayNotWrite()) this.fail(IoStatus.notSupported, 0);
    this.#flushDue = fua && !this.#nativeFua(parent.type) && bdev.supports(IoType.flush);
    this.advance();
  }

  /** Starts as many children as there are pieces and free children. */
  advance(): void {
    const parent = this.#parent!;
    this.#starving = false;
    this.#advancing = true;
    while (this.#status === IoStatus.success && this.#started < parent.lengthBytes) {
      const child = this.#pool.takeChild();
      if (child === null) {
        this.#starving = true;
        this.#pool.starve(this);
        break;
      }
      this.#buildPiece(parent, child);
      this.#outstanding++;
      child.io.push(this, 0);
      this.#pool.channel.submitChild(child.io);
    }
    this.#advancing = false;
    this.#settle();
  }

  /** No more pieces; the first failure is the parent's. */
  fail(status: IoStatus, errno: number): void {
    if (this.#status !== IoStatus.success) return;
    this.#status = status;
    this.#errno = errno;
  }

  onDone(io: BdevIo): void {
    const child = this.#pool.childOf(io);
    if (io.status === IoStatus.notSupported && io.type === IoType.writeZeroes && !this.#mayNotWrite()) {
      // The module found out that the file below cannot: write zeroes over the whole range instead.
      if (!this.#emulateZeroes) this.#started = 0;
      this.#emulateZeroes = true;
    } else if (io.status !== IoStatus.success) {
      this.fail(io.status, io.errno);
    } else if (child.bounced && io.type === IoType.read) {
      this.#pool.copy(this.#parent!, child.parentOffset, child.bounceAddress, io.lengthBytes, false);
    }
    this.#pool.giveChild(child);
    this.#outstanding--;
    if (!this.#advancing) {
      if (this.#emulateZeroes && this.#parent !== null && !this.#starving) this.advance();
      else this.#settle();
    }
    this.#pool.feed();
  }

  /** After any change: flush if that is what is left, complete if nothing is. */
  #settle(): void {
    const parent = this.#parent;
    if (parent === null || this.#outstanding > 0) return;
    if (this.#status === IoStatus.success) {
      if (this.#started < parent.lengthBytes) return;
      if (this.#flushDue) {
        const child = this.#pool.takeChild();
        if (child === null) {
          if (!this.#starving) this.#pool.starve(this);
          this.#starving = true;
          return;
        }
        this.#flushDue = false;
        child.bounced = false;
        child.io.prepare(IoType.flush, 0, 0, 0);
        child.io.push(this, 0);
        this.#outstanding++;
        this.#pool.channel.submitChild(child.io);
        return;
      }
    }
    if (this.#starving) return;
    this.#parent = null;
    this.#pool.done(this, parent, this.#status, this.#errno);
  }

  #mayNotWrite(): boolean {
    return (this.#parent!.flags & IoFlag.noFallback) !== 0;
  }

  #nativeFua(type: IoType): boolean {
    const bdev = this.#pool.channel.bdev;
    return bdev.supportsFua && type === IoType.write;
  }

  #buildPiece(parent: BdevIo, child: Child): void {
    const { bdev } = this.#pool.channel;
    const offset = parent.offsetBytes + this.#started;
    const left = parent.lengthBytes - this.#started;
    child.bounced = false;
    child.parentOffset = this.#started;
    switch (parent.type) {
      case IoType.discard:
      case IoType.writeZeroes: {
        if (this.#emulateZeroes) {
          this.#buildZeroWrite(parent, child, offset, left);
          return;
        }
        const limits = bdev.limits;
        const max = parent.type === IoType.discard ? limits.maxDiscardBytes : limits.maxWriteZeroesBytes;
        const length = Math.min(left, max || Infinity);
        child.io.prepare(parent.type, offset, length, parent.flags & IoFlag.unmap);
        this.#started += length;
        return;
      }
      default:
        this.#buildTransfer(parent, child, offset, left);
    }
  }

  #childFlags(parent: BdevIo): number {
    return this.#flushDue || !this.#pool.channel.bdev.supportsFua ? 0 : parent.flags & IoFlag.fua;
  }

  #buildZeroWrite(parent: BdevIo, child: Child, offset: number, left: number): void {
    const length = Math.min(left, ZEROES_BYTES, this.#roomAt(offset));
    child.io.prepare(IoType.write, offset, length, this.#childFlags(parent));
    child.io.addSegment(this.#pool.zeroes(), length);
    this.#started += length;
  }

  /** Longest read or write that may start at `offset`. */
  #roomAt(offset: number): number {
    const limits = this.#pool.channel.bdev.limits;
    const max = limits.maxTransferBytes || Infinity;
    if (limits.boundaryBytes === 0) return max;
    return Math.min(max, limits.boundaryBytes - (offset % limits.boundaryBytes));
  }

  #buildTransfer(parent: BdevIo, child: Child, offset: number, left: number): void {
    const { limits, blockSizeBytes } = this.#pool.channel.bdev;
    const room = Math.min(left, this.#roomAt(offset));
    const memoryMask = limits.memoryAlignmentBytes - 1;
    const io = child.io;
    io.prepare(parent.type, offset, room, this.#childFlags(parent));

    // Gather segments as they are, until one is misaligned or there are too many.
    const maxSegments = limits.maxSegments || Infinity;
    let segment = this.#segment;
    let skip = this.#segmentOffset;
    let gathered = 0;
    while (gathered < room && io.segmentCount < maxSegments) {
      const address = parent.segmentAddresses[segment]! + skip;
      const part = Math.min(parent.segmentLengths[segment]! - skip, room - gathered);
      if (((address | part) & memoryMask) !== 0) break;
      io.addSegment(address, part);
      gathered += part;
      skip = 0;
      segment++;
    }
    const whole = Math.floor(gathered / blockSizeBytes) * blockSizeBytes;
    if (whole > 0) {
      this.#trim(io, gathered - whole);
      io.lengthBytes = whole;
    } else {
      // Not one whole block without a misaligned segment: through a bounce buffer.
      const length = Math.min(room, BOUNCE_BYTES);
      io.prepare(parent.type, offset, length, this.#childFlags(parent));
      io.addSegment(this.#pool.bounceOf(child), length);
      child.bounced = true;
      if (parent.type === IoType.write) {
        this.#pool.copy(parent, this.#started, child.bounceAddress, length, true);
      }
    }
    this.#skipSegments(parent, io.lengthBytes);
    this.#started += io.lengthBytes;
  }

  /** Takes `excess` bytes off the end of the child's segments. */
  #trim(io: BdevIo, excess: number): void {
    while (excess > 0) {
      const last = io.segmentCount - 1;
      const length = io.segmentLengths[last]!;
      if (length > excess) {
        io.segmentLengths[last] = length - excess;
        return;
      }
      io.segmentCount = last;
      excess -= length;
    }
  }

  #skipSegments(parent: BdevIo, lengthBytes: number): void {
    let left = lengthBytes;
    while (left > 0) {
      const rest = parent.segmentLengths[this.#segment]! - this.#segmentOffset;
      if (rest > left) {
        this.#segmentOffset += left;
        return;
      }
      left -= rest;
      this.#segment++;
      this.#segmentOffset = 0;
    }
  }
}
