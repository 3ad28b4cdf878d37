/**
 * Decompressed clusters, kept in the reactor's memory and found by the image and the place in its file where they are compressed.
 * Of fixed size; its pages are taken as they are first used.
 *
 *     insert ──► loading ── loaded ──► valid ──► evicted by `insert`, when nobody has it pinned
 *                  │  ▲                 │
 *            failed│  └──── reload ─────┘ when more bytes of it are wanted than are there
 *                  ▼
 *                free
 *
 * Who waits for a cluster that is being loaded is the caller's affair. Nothing here allocates after the construction.
 *
 * Invariants
 * - A slot that is loading or pinned keeps its memory, also when it is forgotten meanwhile: it is free when the last user is through.
 * - In the table is each slot that holds a cluster and was not forgotten, once.
 * - The memory of a slot is written to while it is loading only.
 */
import assert from 'node:assert/strict';
import { HUGE_PAGE_BYTES } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';

export const CLUSTER_CACHE_BYTES_DEFAULT = 64 * 2 ** 20;
/** Enough for the requests in flight of a busy disk to have one each. */
const SLOTS_MIN = 8;

/** An object, as large numbers are boxed when they are arguments of a call. */
export interface ClusterKey {
  /** Small number of the image, the caller's choice. */
  readonly image: number;
  /** Host offset of the compressed data. */
  readonly hostOffset: number;
}

export const SlotState = { free: 0, loading: 1, valid: 2 } as const;
export type SlotState = (typeof SlotState)[keyof typeof SlotState];

const NONE = -1;

export class ClusterCache {
  readonly slotCount: number;
  /** Look-ups that found their cluster, and that did not. */
  hits = 0;
  misses = 0;

  readonly #arena: Arena;
  readonly #clusterBytes: number;
  /** Arena offset; NONE before the first cluster. */
  #memory = NONE;
  readonly #states: Uint8Array;
  readonly #validBytes: Int32Array;
  readonly #pins: Int32Array;
  /** Looked up since the clock's hand passed. */
  readonly #isUsed: Uint8Array;
  /** No longer in the table. */
  readonly #isForgotten: Uint8Array;
  readonly #images: Int32Array;
  readonly #hostOffsets: Float64Array;
  /** First slot of each chain, and the next one of each slot; free slots are a chain, too. */
  readonly #table: Int32Array;
  readonly #next: Int32Array;
  #firstFree: number;
  #hand = 0;

  /** @param sizeBytes of the whole; rounded to a number of clusters */
  constructor(arena: Arena, clusterBytes: number, sizeBytes = CLUSTER_CACHE_BYTES_DEFAULT) {
    this.#arena = arena;
    this.#clusterBytes = clusterBytes;
    const count = Math.max(SLOTS_MIN, Math.floor(sizeBytes / clusterBytes));
    this.slotCount = count;
    this.#states = new Uint8Array(count);
    this.#validBytes = new Int32Array(count);
    this.#pins = new Int32Array(count);
    this.#isUsed = new Uint8Array(count);
    this.#isForgotten = new Uint8Array(count);
    this.#images = new Int32Array(count);
    this.#hostOffsets = new Float64Array(count);
    this.#table = new Int32Array(2 ** Math.ceil(Math.log2(count))).fill(NONE);
    this.#next = Int32Array.from({ length: count }, (_, slot) => (slot + 1 < count ? slot + 1 : NONE));
    this.#firstFree = 0;
  }

  stateOf(slot: number): SlotState {
    return this.#states[slot] as SlotState;
  }

  /** Bytes from the start of the cluster that are there; of a slot that is loading, those that will be. */
  validBytesOf(slot: number): number {
    return this.#validBytes[slot]!;
  }

  /** Arena offset of the cluster. */
  addressOf(slot: number): number {
    return this.#memory + slot * this.#clusterBytes;
  }

  /** Returns the slot of a cluster, loading or valid, or -1. */
  find(key: ClusterKey): number {
    const slot = this.#lookUp(key);
    if (slot === NONE) {
      this.misses++;
      return NONE;
    }
    this.hits++;
    this.#isUsed[slot] = 1;
    return slot;
  }

  /** Whether a cluster is here or on its way. Says nothing about its use: for reading ahead. */
  has(key: ClusterKey): boolean {
    return this.#lookUp(key) !== NONE;
  }

  /**
   * Makes room for a cluster that is not here. Its slot is loading until `loaded` or `failed`.
   * @param wantedBytes of the cluster, from its start
   * @returns its slot, or -1 when all are loading or pinned: the cluster is then to be read without the cache, or later.
   */
  insert(key: ClusterKey, wantedBytes: number): number {
    if (this.#lookUp(key) !== NONE) assert.fail('a cluster is inserted that is here');
    const slot = this.#firstFree !== NONE ? this.#takeFree() : this.#evict();
    if (slot === NONE) return NONE;
    this.#memory = this.#memory === NONE ? this.#allocate() : this.#memory;
    this.#images[slot] = key.image;
    this.#hostOffsets[slot] = key.hostOffset;
    this.#states[slot] = SlotState.loading;
    this.#validBytes[slot] = wantedBytes;
    // Looked up once is no reason to stay: a cluster that is read through once goes before one that is read again and again.
    this.#isUsed[slot] = 0;
    this.#isForgotten[slot] = 0;
    const chain = this.#chainOf(key.image, key.hostOffset);
    this.#next[slot] = this.#table[chain]!;
    this.#table[chain] = slot;
    return slot;
  }

  /** More of a valid cluster is wanted: it is loading again. Returns false while it is pinned. */
  reload(slot: number, wantedBytes: number): boolean {
    this.#expect(slot, SlotState.valid);
    if (this.#pins[slot]! > 0) return false;
    this.#states[slot] = SlotState.loading;
    this.#validBytes[slot] = wantedBytes;
    return true;
  }

  /** The bytes that were wanted are there. Whoever copies them later has pinned the slot before. */
  loaded(slot: number): void {
    this.#expect(slot, SlotState.loading);
    this.#states[slot] = SlotState.valid;
    this.#freeIfUnwanted(slot);
  }

  /** They are not, and will not be. */
  failed(slot: number): void {
    this.#expect(slot, SlotState.loading);
    this.#states[slot] = SlotState.valid;
    this.#forget(slot);
  }

  /** Keeps a slot as it is, as long as somebody copies from it. */
  pin(slot: number): void {
    this.#pins[slot]!++;
  }

  unpin(slot: number): void {
    if (this.#pins[slot] === 0) assert.fail('a slot is unpinned that is not pinned');
    this.#pins[slot]!--;
    this.#freeIfUnwanted(slot);
  }

  /** What is compressed there is no more, or is something else. What is being loaded reaches who waits for it, and nobody after. */
  forget(key: ClusterKey): void {
    const slot = this.#lookUp(key);
    if (slot !== NONE) this.#forget(slot);
  }

  /** All clusters of an image. Control path. */
  forgetImage(image: number): void {
    for (let slot = 0; slot < this.slotCount; slot++) {
      const isHeld = this.#states[slot] !== SlotState.free && this.#isForgotten[slot] === 0;
      if (isHeld && this.#images[slot] === image) this.#forget(slot);
    }
  }

  /** Control path. Nothing may be loading or pinned. */
  close(): void {
    for (let slot = 0; slot < this.slotCount; slot++) {
      assert(this.#states[slot] !== SlotState.loading && this.#pins[slot] === 0, 'a cluster is in use');
    }
    if (this.#memory !== NONE) this.#arena.release(this.#memory);
    this.#memory = NONE;
  }

  /** `assert` itself takes its arguments as an array, which would be allocated. */
  #expect(slot: number, state: SlotState): void {
    if (this.#states[slot] !== state) assert.fail(`a slot is in state ${this.#states[slot]}, not ${state}`);
  }

  #lookUp(key: ClusterKey): number {
    const { image, hostOffset } = key;
    let slot = this.#table[this.#chainOf(image, hostOffset)]!;
    while (slot !== NONE && (this.#hostOffsets[slot] !== hostOffset || this.#images[slot] !== image)) {
      slot = this.#next[slot]!;
    }
    return slot;
  }

  #chainOf(image: number, hostOffset: number): number {
    // Compressed data begins at any byte, so all bits of the offset count.
    const low = hostOffset | 0;
    const high = (hostOffset / 2 ** 32) | 0;
    let hash = Math.imul(low ^ Math.imul(high, 0x27d4eb2f) ^ Math.imul(image, 0x165667b1), 0x9e3779b1 | 0);
    hash ^= hash >>> 15;
    return hash & (this.#table.length - 1);
  }

  /** Second chance: a slot that was looked up since the hand passed is passed once more. */
  #evict(): number {
    const { slotCount } = this;
    for (let left = 2 * slotCount; left > 0; left--) {
      const slot = this.#hand;
      this.#hand = slot + 1 === slotCount ? 0 : slot + 1;
      if (this.#states[slot] !== SlotState.valid || this.#pins[slot]! > 0) continue;
      if (this.#isUsed[slot] !== 0) {
        this.#isUsed[slot] = 0;
        continue;
      }
      this.#unlink(slot);
      return slot;
    }
    return NONE;
  }

  #forget(slot: number): void {
    this.#unlink(slot);
    this.#isForgotten[slot] = 1;
    this.#freeIfUnwanted(slot);
  }

  #freeIfUnwanted(slot: number): void {
    if (this.#isForgotten[slot] === 0 || this.#states[slot] === SlotState.loading || this.#pins[slot]! > 0) return;
    this.#states[slot] = SlotState.free;
    this.#isForgotten[slot] = 0;
    this.#next[slot] = this.#firstFree;
    this.#firstFree = slot;
  }

  #takeFree(): number {
    const slot = this.#firstFree;
    this.#firstFree = this.#next[slot]!;
    return slot;
  }

  /** Takes a slot out of the table, where it is, unless it was forgotten before. */
  #unlink(slot: number): void {
    if (this.#isForgotten[slot] !== 0) return;
    const chain = this.#chainOf(this.#images[slot]!, this.#hostOffsets[slot]!);
    let at = this.#table[chain]!;
    if (at === slot) {
      this.#table[chain] = this.#next[slot]!;
      return;
    }
    while (this.#next[at] !== slot) at = this.#next[at]!;
    this.#next[at] = this.#next[slot]!;
  }

  #allocate(): number {
    return this.#arena.allocate(this.slotCount * this.#clusterBytes, HUGE_PAGE_BYTES);
  }
}
