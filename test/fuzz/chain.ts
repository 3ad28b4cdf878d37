/**
 * A chain of descriptors, in the ring or in a table, however wrong: collected descriptor by descriptor, written when it is whole. How the
 * descriptors of a chain are joined is what split and packed rings differ in.
 */
import type { BurstMemory } from './burst-memory.js';
import { words } from './boundaries.js';
import type { Words } from './boundaries.js';

export const NEXT = 1;
export const WRITE = 2;
export const INDIRECT = 4;

/** Longest table that is laid out. */
const TABLE_ENTRIES = 920;

export interface Descriptor {
  readonly address: Words;
  readonly length: number;
  readonly flags: number;
  /** Its last word, when it is not to be joined to others. */
  readonly raw?: number;
}

/** What an indirect table's own descriptor says. */
export interface TableOptions {
  /** Beside INDIRECT. */
  readonly flags?: number;
  /** `next` of a split ring. */
  readonly next?: number;
  /** Where the table lies, from the next multiple of 16. */
  readonly shift?: number;
  /** Said of it, if not what it has. */
  readonly lengthBytes?: number;
}

export abstract class Chain {
  /** Bytes the device may write by it at most; NaN: nobody knows. */
  writableBytes = 0;
  /** In the ring, in order; that of the table is added at the end. */
  protected readonly ring: Descriptor[] = [];
  protected table: Descriptor[] | null = null;
  protected readonly memory: BurstMemory;
  protected tableOptions: TableOptions = {};
  readonly #room: number;

  /** @param room descriptors that the ring has left: what is beyond it is dropped */
  constructor(memory: BurstMemory, room: number) {
    this.memory = memory;
    this.#room = room;
  }

  /** What was added last goes into the ring, or a table. */
  get #entries(): Descriptor[] {
    return this.table ?? this.ring;
  }

  get #isFull(): boolean {
    return this.table === null ? this.ring.length >= this.#room : this.table.length >= TABLE_ENTRIES;
  }

  /** Descriptors that it takes of the ring. */
  get ringCount(): number {
    return this.ring.length + (this.table === null ? 0 : 1);
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

  add(address: Words, length: number, flags: number): void {
    if ((flags & WRITE) !== 0) this.writableBytes += length;
    if (!this.#isFull) this.#entries.push({ address, length, flags });
  }

  /** Adds a descriptor that ends in this word, whatever it makes of the chain. @param flags those of the word */
  addRaw(address: Words, length: number, flags: number, raw: number): void {
    this.writableBytes = NaN;
    if (!this.#isFull) this.#entries.push({ address, length, flags, raw });
  }

  /** What follows goes into an indirect table. */
  beginTable(options: TableOptions = {}): void {
    if (this.#isFull || this.table !== null) return;
    this.table = [];
    this.tableOptions = options;
  }

  /** The last word of a table's descriptor. */
  protected abstract tableWord(index: number, flags: number): number;

  /** Writes the table. @returns the descriptor that refers to it */
  protected writeTable(entries: readonly Descriptor[]): Descriptor {
    const { flags = 0, shift = 0, lengthBytes = 16 * entries.length } = this.tableOptions;
    const at = this.memory.placeTable(entries.length, shift);
    entries.forEach((entry, i) => this.write(at + 16 * i, entry, this.tableWord(i, entry.flags)));
    // WRITE means nothing here: the table is not to be written.
    const address = words(this.memory.memory.control.guestAddress + at);
    return { address, length: lengthBytes, flags: INDIRECT | flags };
  }

  /** Writes a descriptor, and lets the device write what it says. @param at offset in the control region */
  protected write(at: number, { address, length, flags, raw }: Descriptor, last: number): void {
    const isTable = (flags & INDIRECT) !== 0 && raw === undefined;
    if ((flags & WRITE) !== 0 && !isTable) this.memory.makeWritable(address, length);
    this.memory.writeWords(at, [...address, length, raw ?? last]);
  }
}
