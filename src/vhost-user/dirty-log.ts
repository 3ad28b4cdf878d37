/**
 * The dirty log of a live migration: a bitmap in memory of the front-end's with one bit for each 4 KiB page of guest-physical
 * addresses, from address 0 on. While it is in force, every page of the guest that we write to is marked in it.
 *
 *     page = address / 4096          log[page / 8] |= 1 << page % 8          (vhost-user.rst, "Migration")
 *
 * Invariants
 * - A page is marked after it was written to. The front-end clears the bit first and copies the page then, so whatever it
 *   copied too early is marked, and copied, again.
 * - Nothing is written beyond the bitmap: a page that it does not cover is an overrun, which ends the session (CVE-2019-14835).
 */
import { native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import type { GuestMemory } from './guest-memory.js';
import { LOG_BYTES_MAX, ProtocolError } from './protocol.js';
import { mapSharedFile } from './shared-mapping.js';
import type { SharedMapping } from './shared-mapping.js';

const PAGE_BYTES = 4096;
const PAGES_PER_BYTE = 8;

export class DirtyLog {
  /** Called at each page that the log does not cover; nothing was marked. */
  onOverrun: (guestAddress: number) => void = () => undefined;
  /** Raised after marking, unless negative: stays the session's. */
  signalFd = -1;

  readonly #memory: GuestMemory;
  readonly #arena: Arena;
  readonly #range: SharedMapping;
  readonly #bytes: Uint8Array;
  readonly #markRange = (guestAddress: number, lengthBytes: number): void => this.mark(guestAddress, lengthBytes);
  #isMarked = false;

  /**
   * Maps the log, which lies in a regular file of the front-end's. The descriptor stays the caller's.
   * Throws ProtocolError for what the front-end did wrong, SystemError when mapping fails.
   */
  constructor(memory: GuestMemory, fd: number, sizeBytes: number, offsetBytes: number) {
    if (sizeBytes === 0 || sizeBytes > LOG_BYTES_MAX) throw new ProtocolError(`a dirty log of ${sizeBytes} bytes`);
    this.#memory = memory;
    this.#arena = memory.arena;
    this.#range = mapSharedFile(memory.arena, fd, offsetBytes, sizeBytes, 'the dirty log');
    this.#bytes = memory.arena.view8(this.#range.arenaOffset, sizeBytes);
  }

  /** Marks the pages of a range of guest-physical addresses, which was written to. */
  mark(guestAddress: number, lengthBytes: number): void {
    const last = Math.floor((guestAddress + lengthBytes - 1) / PAGE_BYTES);
    let page = Math.floor(guestAddress / PAGE_BYTES);
    if (last >= this.#bytes.length * PAGES_PER_BYTE) {
      this.onOverrun(last * PAGE_BYTES);
      return;
    }
    while (page <= last) {
      const at = Math.floor(page / PAGES_PER_BYTE);
      const from = page - at * PAGES_PER_BYTE;
      const to = Math.min(PAGES_PER_BYTE, last + 1 - at * PAGES_PER_BYTE);
      // Unconditional: its fence keeps what was written to the page ahead of the bit.
      Atomics.or(this.#bytes, at, (1 << to) - (1 << from));
      page += to - from;
    }
    this.#isMarked = true;
  }

  /** As `mark`, for a place in the arena where guest memory is mapped. */
  markArena(arenaOffset: number, lengthBytes: number): void {
    this.#memory.visitGuestRanges(arenaOffset, lengthBytes, this.#markRange);
  }

  /** Tells the front-end, if it asked for that, when something was marked since the last time. */
  signal(): void {
    if (!this.#isMarked) return;
    this.#isMarked = false;
    if (this.signalFd >= 0) native.eventfdSignal(this.signalFd);
  }

  /** Whether an arena offset lies in the log. */
  holds(arenaOffset: number): boolean {
    const { arenaOffset: start } = this.#range;
    return arenaOffset >= start && arenaOffset < start + this.#bytes.length;
  }

  /** Unmaps it. */
  close(): void {
    this.#arena.release(this.#range.mappingOffset);
  }
}

/** Where a ring logs what the device writes to it. */
export class RingLog {
  readonly #log: DirtyLog;
  readonly #usedAddress: number;

  /** @param usedAddress guest address at which the used ring is logged, from SET_VRING_ADDR; may lie outside of guest memory */
  constructor(log: DirtyLog, usedAddress: number) {
    this.#log = log;
    this.#usedAddress = usedAddress;
  }

  /** Marks what was written to a used ring. @param offsetBytes from its start */
  markUsed(offsetBytes: number, lengthBytes: number): void {
    this.#log.mark(this.#usedAddress + offsetBytes, lengthBytes);
  }

  /** Marks what was written to a part of a packed ring, where it lies: no address is given for its descriptors. */
  markPlace(arenaOffset: number, lengthBytes: number): void {
    this.#log.markArena(arenaOffset, lengthBytes);
  }
}
