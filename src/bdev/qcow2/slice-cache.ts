/**
 * A cache of slices of metadata tables (L2 tables, refcount blocks), as they are on disk, in the arena. A slice has a number (its
 * place among all slices of its kind) and a home (where it lies in the file).
 *
 * Invariants
 * - A slice is in at most one slot; a slot that is loading, dirty, being written or pinned is not evicted.
 * - Bytes of a slot are used only when it is valid: it was checked when it was loaded.
 * - Look-ups do not allocate.
 */
import type { Arena } from '../../../native/index.js';

/** Of a slot. */
const VALID = 1;
const LOADING = 2;
const DIRTY = 4;
/** A copy of it is on its way to the file. */
const WRITING = 8;
/** Used since the hand of the clock came by. */
const USED = 16;

export class SliceCache {
  readonly sliceWords: number;
  readonly slotCount: number;
  /** The bytes of all slots, as words. */
  readonly words: Uint32Array;
  /** Arena offset of slot 0. */
  readonly address: number;
  readonly sliceBytes: number;
  /** Slots that are dirty. */
  dirtyCount = 0;
  /** The first `dirtyCount` are those. */
  readonly #dirtySlots: Int32Array;
  readonly #arena: Arena;
  readonly #numbers: Uint32Array;
  readonly #homes: Float64Array;
  readonly #flags: Uint8Array;
  readonly #pins: Uint32Array;
  /** Open addressing: slot + 1 by number, 0 is empty. */
  readonly #table: Int32Array;
  readonly #mask: number;
  #hand = 0;
  #filled = 0;

  /** @param slotCount at least 4 */
  constructor(arena: Arena, sliceBytes: number, slotCount: number) {
    this.#arena = arena;
    this.sliceBytes = sliceBytes;
    this.sliceWords = sliceBytes / 4;
    this.slotCount = slotCount;
    this.address = arena.allocate(slotCount * sliceBytes);
    this.words = arena.view32(this.address, slotCount * this.sliceWords);
    this.#numbers = new Uint32Array(slotCount);
    this.#homes = new Float64Array(slotCount);
    this.#flags = new Uint8Array(slotCount);
    this.#pins = new Uint32Array(slotCount);
    this.#dirtySlots = new Int32Array(slotCount);
    let size = 16;
    while (size < slotCount * 2) size *= 2;
    this.#table = new Int32Array(size);
    this.#mask = size - 1;
  }

  release(): void {
    this.#arena.release(this.address);
  }

  /** Slot of a slice that is valid, else -1. */
  find(number: number): number {
    const table = this.#table;
    for (let at = hash(number) & this.#mask; ; at = (at + 1) & this.#mask) {
      const slot = table[at]! - 1;
      if (slot < 0) return -1;
      if (this.#numbers[slot] === number) {
        const flags = this.#flags[slot]!;
        if ((flags & VALID) === 0) return -1;
        this.#flags[slot] = flags | USED;
        return slot;
      }
    }
  }

  /** Slot of a slice that is being loaded, else -1. */
  findLoading(number: number): number {
    const slot = this.slotOf(number);
    return slot >= 0 && (this.#flags[slot]! & LOADING) !== 0 ? slot : -1;
  }

  /** Takes a slot for a slice that is in none, to be loaded into; -1 when all are in use. */
  take(number: number, home: number): number {
    const slot = this.#filled < this.slotCount ? this.#filled++ : this.#evict();
    if (slot < 0) return -1;
    this.#numbers[slot] = number;
    this.#homes[slot] = home;
    this.#flags[slot] = LOADING;
    this.#insert(number, slot);
    return slot;
  }

  /** The slot has been filled. */
  loaded(slot: number): void {
    this.#flags[slot] = VALID | USED;
  }

  /** The slot could not be filled. */
  drop(slot: number): void {
    this.#remove(this.#numbers[slot]!);
    this.#flags[slot] = 0;
    // An empty slot is the first that is taken: the hand passes it.
    this.#hand = slot;
  }

  numberOf(slot: number): number {
    return this.#numbers[slot]!;
  }

  homeOf(slot: number): number {
    return this.#homes[slot]!;
  }

  setHome(slot: number, home: number): void {
    this.#homes[slot] = home;
  }

  /** First word of a slot. */
  wordsOf(slot: number): number {
    return slot * this.sliceWords;
  }

  addressOf(slot: number): number {
    return this.address + slot * this.sliceBytes;
  }

  pin(slot: number): void {
    this.#pins[slot]!++;
  }

  unpin(slot: number): void {
    this.#pins[slot]!--;
  }

  isDirty(slot: number): boolean {
    return (this.#flags[slot]! & DIRTY) !== 0;
  }

  /** Whether what a slot holds is in the file. */
  isSettled(slot: number): boolean {
    return (this.#flags[slot]! & (DIRTY | WRITING)) === 0;
  }

  markDirty(slot: number): void {
    const flags = this.#flags[slot]!;
    if ((flags & DIRTY) === 0) this.#dirtySlots[this.dirtyCount++] = slot;
    this.#flags[slot] = flags | DIRTY;
  }

  /** Takes a dirty slot, whose contents are copied now to be written; -1 when there is none. */
  beginWrite(): number {
    if (this.dirtyCount === 0) return -1;
    const slot = this.#dirtySlots[--this.dirtyCount]!;
    this.#flags[slot] = (this.#flags[slot]! & ~DIRTY) | WRITING;
    return slot;
  }

  /** @param isWritten false: it has to be written again */
  endWrite(slot: number, isWritten: boolean): void {
    this.#flags[slot]! &= ~WRITING;
    if (!isWritten) this.markDirty(slot);
  }

  /** Forgets everything. Nothing is loading, dirty, being written or pinned. */
  clear(): void {
    this.#table.fill(0);
    this.#flags.fill(0);
    this.#filled = 0;
    this.#hand = 0;
  }

  /** Slot of a slice, valid or not, else -1. */
  slotOf(number: number): number {
    for (let at = hash(number) & this.#mask; ; at = (at + 1) & this.#mask) {
      const slot = this.#table[at]! - 1;
      if (slot < 0 || this.#numbers[slot] === number) return slot;
    }
  }

  #evict(): number {
    // Twice around: the first may do no more than clear marks of use.
    for (let left = 2 * this.slotCount; left > 0; left--) {
      const slot = this.#hand;
      this.#hand = slot + 1 === this.slotCount ? 0 : slot + 1;
      const flags = this.#flags[slot]!;
      if ((flags & (LOADING | DIRTY | WRITING)) !== 0 || this.#pins[slot]! > 0) continue;
      if ((flags & USED) !== 0) {
        this.#flags[slot] = flags & ~USED;
        continue;
      }
      if ((flags & VALID) !== 0) this.#remove(this.#numbers[slot]!);
      return slot;
    }
    return -1;
  }

  #insert(number: number, slot: number): void {
    let at = hash(number) & this.#mask;
    while (this.#table[at] !== 0) at = (at + 1) & this.#mask;
    this.#table[at] = slot + 1;
  }

  #remove(number: number): void {
    const table = this.#table;
    let at = hash(number) & this.#mask;
    while (this.#numbers[table[at]! - 1] !== number) at = (at + 1) & this.#mask;
    // Entries behind it that were pushed on by it move up.
    for (let next = (at + 1) & this.#mask; table[next] !== 0; next = (next + 1) & this.#mask) {
      const wanted = hash(this.#numbers[table[next]! - 1]!) & this.#mask;
      if (((next - wanted) & this.#mask) >= ((next - at) & this.#mask)) {
        table[at] = table[next]!;
        at = next;
      }
    }
    table[at] = 0;
  }
}

function hash(number: number): number {
  const mixed = Math.imul(number, 0x9e3779b1);
  return (mixed ^ (mixed >>> 15)) >>> 0;
}
