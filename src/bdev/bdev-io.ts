/**
 * The one request object that travels down a bdev stack and comes back up.
 *
 * Invariants
 * - A BdevIo is created at set-up, pooled by its creator and reused for ever: nothing on its way allocates.
 * - On the way down every layer that wants to see the completion calls `push(owner, frame)`; on the way up
 *   `complete(status)` pops exactly one owner and calls its `onDone`. Pushes and pops balance.
 * - Between `submit` and `onDone` the io belongs to the layer below: the submitter does not touch it.
 * - Data never moves through this object. Segments are arena offsets (see native/arena.ts).
 */

/** Kinds of request. The numbers index the statistics tables. */
export const IoType = {
  read: 0,
  write: 1,
  flush: 2,
  discard: 3,
  writeZeroes: 4,
  /**
   * End, as aborted, whatever waits or is held back; completes when no other I/O of the channel is left. Nothing is submitted
   * until it does.
   */
  reset: 5,
} as const;
export type IoType = (typeof IoType)[keyof typeof IoType];
export const IO_TYPE_COUNT = 6;
export const IO_TYPE_NAMES = ['read', 'write', 'flush', 'discard', 'writeZeroes', 'reset'] as const;

/** Outcome of a request. `again` means out of a resource: the bdev core retries, a guest never sees it. */
export const IoStatus = {
  success: 0,
  ioError: 1,
  notSupported: 2,
  noSpace: 3,
  aborted: 4,
  again: 5,
} as const;
export type IoStatus = (typeof IoStatus)[keyof typeof IoStatus];

/** Bits of `BdevIo.flags`. */
export const IoFlag = {
  /** The write must be on stable storage before it completes (forced unit access). */
  fua: 1,
  /** A writeZeroes may deallocate the range. */
  unmap: 2,
  /** A writeZeroes that takes more than a word to the storage is notSupported: it is not worth writing zeroes. */
  noFallback: 4,
} as const;

/** Whoever pushed itself on the io's completion stack. One class, one `onDone`: keep call sites monomorphic. */
export interface IoOwner {
  /**
   * @param io the request; its status and errno are set
   * @param frame the number given to `push`, handed back
   */
  onDone(io: BdevIo, frame: number): void;
}

/** Deepest completion stack: twice the deepest configurable bdev stack, see registry.ts. */
export const MAX_STACK_FRAMES = 32;

/** A number that V8 cannot hold as a small integer: gives a field double representation from the start. */
const DOUBLE = -0.5;

export class BdevIo {
  type: IoType = IoType.read;
  flags = 0;
  status: IoStatus = IoStatus.success;
  /** Positive errno behind an ioError, 0 if none. */
  errno = 0;
  /** Start of the range on the bdev, a multiple of its block size. */
  offsetBytes = DOUBLE;
  /** Length of the range; for read and write it is the sum of the segments. */
  lengthBytes = DOUBLE;
  segmentCount = 0;
  /** Arena offsets, `segmentCount` valid entries. */
  segmentAddresses: Float64Array;
  /** Lengths in bytes, `segmentCount` valid entries, none is 0. */
  segmentLengths: Float64Array;
  /** Link for the intrusive queue of whichever layer owns the io at the moment. */
  next: BdevIo | null = null;
  /** Free for the creator of the io (an index into its own table, for example). */
  tag = 0;

  /**
   * Room for one double per owner: at index `depth` before its push, and again in its onDone. A double that went through the
   * calls would be boxed, which allocates.
   */
  readonly notes = new Float64Array(MAX_STACK_FRAMES);

  readonly #owners: IoOwner[] = [];
  readonly #frames = new Float64Array(MAX_STACK_FRAMES);
  #depth = 0;

  /** @param segmentCapacity segments that fit without growing; `reserveSegments` grows it */
  constructor(segmentCapacity = 4) {
    this.segmentAddresses = new Float64Array(segmentCapacity);
    this.segmentLengths = new Float64Array(segmentCapacity);
    const none: IoOwner = { onDone: failUnderflow };
    for (let i = 0; i < MAX_STACK_FRAMES; i++) this.#owners.push(none);
  }

  /** Number of owners waiting for the completion. */
  get depth(): number {
    return this.#depth;
  }

  /** Makes room for `count` segments. Allocates when it has to grow, which a steady load never does. */
  reserveSegments(count: number): void {
    if (count <= this.segmentAddresses.length) return;
    let capacity = this.segmentAddresses.length;
    while (capacity < count) capacity *= 2;
    const addresses = new Float64Array(capacity);
    const lengths = new Float64Array(capacity);
    addresses.set(this.segmentAddresses);
    lengths.set(this.segmentLengths);
    this.segmentAddresses = addresses;
    this.segmentLengths = lengths;
  }

  /** Sets everything but the segments. */
  prepare(type: IoType, offsetBytes: number, lengthBytes: number, flags: number): void {
    this.type = type;
    this.flags = flags;
    this.status = IoStatus.success;
    this.errno = 0;
    this.offsetBytes = offsetBytes;
    this.lengthBytes = lengthBytes;
    this.segmentCount = 0;
  }

  /** Adds a segment at the end; joins it to the last one when the two are adjacent. */
  addSegment(address: number, lengthBytes: number): void {
    const count = this.segmentCount;
    if (count > 0) {
      const last = count - 1;
      if (this.segmentAddresses[last]! + this.segmentLengths[last]! === address) {
        this.segmentLengths[last]! += lengthBytes;
        return;
      }
      if (count === this.segmentAddresses.length) this.reserveSegments(count + 1);
    }
    this.segmentAddresses[count] = address;
    this.segmentLengths[count] = lengthBytes;
    this.segmentCount = count + 1;
  }

  /**
   * On the way down: `owner.onDone(io, frame)` will be called when the layer below is done.
   * @param frame a small integer; for anything else there are `notes`
   */
  push(owner: IoOwner, frame: number): void {
    const depth = this.#depth;
    if (depth === MAX_STACK_FRAMES) failOverflow();
    this.#owners[depth] = owner;
    this.#frames[depth] = frame;
    this.#depth = depth + 1;
  }

  /** Takes back the latest push, for a layer that answers by itself. Returns its frame. */
  pop(): number {
    const depth = this.#depth - 1;
    if (depth < 0) failUnderflow();
    this.#depth = depth;
    return this.#frames[depth]!;
  }

  /** On the way up: records the outcome and hands the io to the owner pushed last. */
  complete(status: IoStatus, errno: number): void {
    this.status = status;
    this.errno = errno;
    const depth = this.#depth - 1;
    if (depth < 0) failUnderflow();
    this.#depth = depth;
    this.#owners[depth]!.onDone(this, this.#frames[depth]!);
  }
}

function failOverflow(): never {
  throw new Error('BdevIo: completion stack overflow: the bdev stack is deeper than the registry allows');
}

function failUnderflow(): never {
  throw new Error('BdevIo: completed once more than it was pushed');
}

/** Intrusive first-in first-out queue of ios: no allocation. */
export class IoQueue {
  #head: BdevIo | null = null;
  #tail: BdevIo | null = null;
  #length = 0;

  get length(): number {
    return this.#length;
  }

  get head(): BdevIo | null {
    return this.#head;
  }

  append(io: BdevIo): void {
    io.next = null;
    if (this.#tail === null) this.#head = io;
    else this.#tail.next = io;
    this.#tail = io;
    this.#length++;
  }

  prepend(io: BdevIo): void {
    io.next = this.#head;
    this.#head = io;
    this.#tail ??= io;
    this.#length++;
  }

  shift(): BdevIo | null {
    const io = this.#head;
    if (io === null) return null;
    this.#head = io.next;
    if (this.#head === null) this.#tail = null;
    io.next = null;
    this.#length--;
    return io;
  }

  /** Takes one out that is in it: for those near the head. */
  remove(io: BdevIo): void {
    if (io === this.#head) {
      this.shift();
      return;
    }
    let before = this.#head!;
    while (before.next !== io) before = before.next!;
    before.next = io.next;
    if (this.#tail === io) this.#tail = before;
    io.next = null;
    this.#length--;
  }
}

/** A filter's answer to "what became of the io below": an errno as the status a bdev reports. */
export function statusOfErrno(errno: number): IoStatus {
  switch (errno) {
    case 0:
      return IoStatus.success;
    case 11: // EAGAIN
    case 12: // ENOMEM
      return IoStatus.again;
    case 28: // ENOSPC
    case 122: // EDQUOT
      return IoStatus.noSpace;
    case 95: // EOPNOTSUPP
      return IoStatus.notSupported;
    case 125: // ECANCELED
      return IoStatus.aborted;
    default:
      return IoStatus.ioError;
  }
}
