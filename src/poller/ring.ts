/**
 * The face of io_uring towards everything above: storage modules and the reactor see this, the kernel's ring
 * (uring.ts) and a simulated one stand behind it.
 *
 * Use: `attach` an op object once at set-up, which gives it a slot; queue requests with that slot; each completion
 * calls the op's `onCompletion`. At most one one-shot request per slot is in flight, so a slot is the request's identity.
 * Nothing here allocates per request. A queued request reaches the kernel at the next `enter` or `wait`.
 */
import type { Arena } from '../../native/index.js';

export interface RingOp {
  /**
   * @param result as the system call would return: >= 0 or -errno
   * @param flags CQE flags; RING_CQE_MORE set when a multishot request lives on
   */
  onCompletion(result: number, flags: number): void;
}

/** A multishot request stays armed. */
export const RING_CQE_MORE = 2;

/** A file as the ring knows it: an index into its registered file table. */
export type RingFile = number;

/** What a transfer moves. An object, as large numbers are boxed, which allocates, when they are arguments of a call. */
export interface RingRange {
  /** Arena offset of the memory. */
  readonly address: number;
  readonly lengthBytes: number;
  /** Where in the file. */
  readonly offsetBytes: number;
}

export interface Ring {
  readonly arena: Arena;
  /** One-shot requests queued or in flight (polls not counted). */
  readonly inflight: number;
  /** Gives `op` a slot. Control path. */
  attach(op: RingOp): number;
  /** Frees the slot; completions still to come are dropped. Control path. */
  detach(slot: number): void;
  /** Registers an open descriptor; the caller keeps it open meanwhile. Control path. Throws when the table is full. */
  registerFile(fd: number): RingFile;
  unregisterFile(file: RingFile): void;

  // Each returns false when the queue is full: the caller reports `again`. Nothing is kept of `range`.
  /** One contiguous buffer. @param rwFlags RWF_* bits */
  read(slot: number, file: RingFile, range: RingRange, rwFlags: number): boolean;
  write(slot: number, file: RingFile, range: RingRange, rwFlags: number): boolean;
  /** @param range whose address is that of `count` struct iovec, which hold absolute addresses (`arena.baseAddress` + offset) */
  readv(slot: number, file: RingFile, range: RingRange, count: number, rwFlags: number): boolean;
  writev(slot: number, file: RingFile, range: RingRange, count: number, rwFlags: number): boolean;
  /** @param bufferIndex a buffer registered with `registerBuffer` that holds the whole range */
  readFixed(slot: number, file: RingFile, range: RingRange, bufferIndex: number): boolean;
  writeFixed(slot: number, file: RingFile, range: RingRange, rwFlags: number, bufferIndex: number): boolean;
  fdatasync(slot: number, file: RingFile): boolean;
  /** @param range whose address says nothing */
  fallocate(slot: number, file: RingFile, range: RingRange, mode: number): boolean;
  /** Multishot poll of a raw descriptor for the poll(2) `events`; completes at each wake-up. */
  poll(slot: number, fd: number, events: number): boolean;
  /** Ends the poll of a slot. Its op gets a last completion with -ECANCELED. */
  cancelPoll(slot: number): boolean;

  /** Registers arena range as a fixed buffer (pins its pages). Returns its index or -errno. Control path. */
  registerBuffer(address: number, lengthBytes: number): number;
  unregisterBuffer(index: number): void;

  /** Hands queued requests to the kernel and lets it post what is done; never sleeps. */
  enter(): void;
  /** As `enter`, then sleeps until a completion comes or `timeoutUs` (an integer) passes. Returns whether one is there. */
  wait(timeoutUs: number): boolean;
  /** Delivers posted completions. Returns how many. */
  reap(): number;
  close(): void;
}
