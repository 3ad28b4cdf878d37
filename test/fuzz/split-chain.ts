/** Chains of a split virtqueue, laid out descriptor by descriptor, in the ring or in a table, however wrong. */
import { words } from './boundaries.js';
import type { Words } from './boundaries.js';

export const NEXT = 1;
export const WRITE = 2;
export const INDIRECT = 4;

/** The ring a chain is laid out in. */
export interface ChainQueue {
  readonly size: number;
  /** Offset of the descriptor table in the control region. */
  readonly descriptorsAt: number;
  nextDescriptor: number;
}

/** Where descriptors and tables go: offsets are those of the control region. */
export interface ChainPlace {
  readonly controlAddress: number;
  /** Writes a descriptor, at an offset that may be misaligned. */
  writeDescriptor(at: number, address: Words, length: number, flags: number, next: number): void;
  /** The descriptor of an indirect table: it makes nothing writable, whatever its flags say. */
  writeTableHolder(at: number, address: Words, length: number, flags: number, next: number): void;
  /** Begins a table; `growTable` makes room for its entries. Returns its offset. */
  beginTable(shift: number): number;
  growTable(): void;
}

/** Longest table that is laid out. */
const TABLE_ENTRIES = 920;

/** Writes the descriptors of one chain, in the ring or in a table. */
export class SplitChain {
  /** First descriptor in the ring; -1 while there is none. */
  head = -1;
  /** First and latest descriptor of the table at hand, the ring or an indirect one. */
  first = 0;
  last = 0;
  /** Offered instead of the head. */
  forcedHead: number | undefined;
  /** How many times more it is offered. */
  again = 0;
  writableBytes = 0;
  readonly #place: ChainPlace;
  readonly #queue: ChainQueue;
  #tableAt = -1;
  #tableCount = 0;
  #tableHolder = -1;
  #tableFlags = 0;
  #tableNext = 0;
  #tableLength: number | undefined;
  #lastAt = -1;
  #lastWords: Words = [0, 0];
  #lastLength = 0;
  #lastFlags = 0;

  constructor(place: ChainPlace, queue: ChainQueue) {
    this.#place = place;
    this.#queue = queue;
  }

  readable(guestAddress: number, length: number): void {
    this.add(words(guestAddress), length, 0);
  }

  /** As `readable`, where nothing writable came before. */
  readableAfter(guestAddress: number, length: number): void {
    if (this.writableBytes === 0) this.readable(guestAddress, length);
  }

  writable(guestAddress: number, length: number): void {
    this.add(words(guestAddress), length, WRITE);
  }

  /** Adds a descriptor, linked from the one before. */
  add(address: Words, length: number, flags: number): void {
    if ((flags & WRITE) !== 0) this.writableBytes += length;
    const index = this.#next();
    if (index < 0) return;
    this.linkTo(index);
    this.#write(index, address, length, flags);
  }

  /** Adds a descriptor with these flags and this next, in the ring. */
  raw(address: Words, length: number, flags: number, next: number): void {
    const index = this.#next();
    if (index < 0) return;
    if (this.head < 0) this.head = index;
    this.#place.writeDescriptor(this.#queue.descriptorsAt + 16 * index, address, length, flags, next);
  }

  /** Lets the latest descriptor go on at `next`. */
  linkTo(next: number): void {
    if (this.#lastAt < 0) return;
    this.#place.writeDescriptor(this.#lastAt, this.#lastWords, this.#lastLength, this.#lastFlags | NEXT, next);
  }

  /**
   * What follows goes into an indirect table.
   * @param flags of the descriptor that refers to it, beside INDIRECT
   * @param lengthBytes said of it, if not what it has
   */
  table(flags = 0, shift = 0, next = 0, lengthBytes?: number): void {
    const index = this.#next();
    if (index < 0) return;
    this.linkTo(index);
    if (this.head < 0) this.head = index;
    this.#tableHolder = index;
    this.#tableFlags = flags;
    this.#tableNext = next;
    this.#tableLength = lengthBytes;
    this.#tableAt = this.#place.beginTable(shift);
    this.#tableCount = 0;
    this.#lastAt = -1;
    this.#describeTable();
  }

  #next(): number {
    if (this.#tableAt >= 0) {
      if (this.#tableCount === TABLE_ENTRIES) return -1;
      this.#place.growTable();
      return this.#tableCount++;
    }
    return this.#queue.nextDescriptor < this.#queue.size ? this.#queue.nextDescriptor++ : -1;
  }

  #write(index: number, address: Words, length: number, flags: number): void {
    const isFirst = this.#lastAt < 0;
    if (this.head < 0) this.head = index;
    if (isFirst) this.first = index;
    this.last = index;
    this.#lastAt = (this.#tableAt >= 0 ? this.#tableAt : this.#queue.descriptorsAt) + 16 * index;
    this.#lastWords = address;
    this.#lastLength = length;
    this.#lastFlags = flags;
    this.#place.writeDescriptor(this.#lastAt, address, length, flags, 0);
    if (this.#tableAt >= 0) this.#describeTable();
  }

  #describeTable(): void {
    const at = this.#queue.descriptorsAt + 16 * this.#tableHolder;
    const address = words(this.#place.controlAddress + this.#tableAt);
    const length = this.#tableLength ?? 16 * this.#tableCount;
    // WRITE means nothing here: the table is not to be written.
    this.#place.writeTableHolder(at, address, length, INDIRECT | this.#tableFlags, this.#tableNext);
  }
}
