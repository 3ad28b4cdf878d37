/**
 * Requests in flight of one packed ring, written down in shared memory (vhost-user.rst, "Inflight I/O tracking"):
 *
 *      0 u64 features    8 u16 version    10 u16 desc_num    12 u16 free_head    14 u16 old_free_head
 *     16 u16 used_idx    18 u16 old_used_idx    20 u8 used_wrap_counter    21 u8 old_used_wrap_counter    padding to 32
 *     32 desc_num entries {u8 inflight, u8, u16 next, u16 last, u16 num, u64 counter, u16 id, u16 flags, u32 len, u64 addr}
 *
 * Entries hold copies of the descriptors of each request: in the ring they are overwritten by the answers of requests that came later.
 * Those not in use form a list from free_head on.
 *
 *     a request is taken     copies to the first free entries; num, last, counter, inflight = 1 in the first; free_head | old_free_head
 *     its answer is written  next of its last = free_head, free_head = its first, used position
 *                            | the flags in the ring |
 *                            inflight = 0, old_free_head = free_head, old used position
 *
 * The bar marks the store that decides. Invariants
 * - Between any two of these stores the process may die, and `recover` finds exactly the requests that were taken and whose answer
 *   the driver cannot see. For that, both used positions with their wrap counters are one store of 64 bits, and answers are written one
 *   by one: of a batch in which only the first was missing, the others would be seen as soon as something else was answered.
 * - While the ring runs nothing is read from the region: the front-end may write to it. What `recover` reads it reads once.
 */
import type { Arena } from '../../native/index.js';
import { INFLIGHT_MISFIT, INFLIGHT_VERSION, InflightAt } from './inflight-region.js';

const HEADER_BYTES = 32;
const ENTRY_BYTES = 32;
const ENTRY_HALVES = ENTRY_BYTES / 2;
const ENTRY_WORDS = ENTRY_BYTES / 4;
// In the header.
const FREE_HEAD_AT = 12;
const OLD_FREE_HEAD_AT = 14;
const POSITIONS_AT = 16;
// In an entry.
const NEXT_AT = 2;
const LAST_AT = 4;
const NUM_AT = 6;
const COUNTER_AT = 8;
const ID_AT = 16;
const LENGTH_AT = 20;
const ADDRESS_AT = 24;
const DESC_WORDS = 4;

const DESC_AVAIL = 1 << 7;
const DESC_USED = 1 << 15;
export const DESC_AVAIL_USED = DESC_AVAIL | DESC_USED;

/** AVAIL and USED as the driver sets them in what it makes available; the device sets both to the wrap counter (2.8.1). */
export function availableFlags(wrap: number): number {
  return wrap === 1 ? DESC_AVAIL : DESC_USED;
}

const NO_TABLE = new Float64Array(0);
const pair = new Float64Array(1);
const pairHalves = new Uint16Array(pair.buffer);

/** Where a ring goes on. */
export interface PackedPosition {
  readonly index: number;
  readonly wrap: number;
}

/** A request that was in flight. */
export interface RecoveredRequest {
  /** Its first entry. */
  readonly entry: number;
  /** Number of descriptors. */
  readonly count: number;
  /** Those descriptors as the ring had them, four words each. */
  readonly words: Uint32Array;
}

export interface PackedRecovery {
  /** Why the ring cannot go on, or null. */
  readonly fault: string | null;
  /** In the order in which they were taken. */
  readonly requests: readonly RecoveredRequest[];
  readonly available: PackedPosition;
  readonly used: PackedPosition;
}

export class PackedInflight {
  readonly #u8: Uint8Array;
  readonly #u16: Uint16Array;
  readonly #u32: Uint32Array;
  readonly #positions: Float64Array;
  /**
   * {used_idx, old_used_idx, both wrap counters} as they go to the region, by the old place (index, from the ring's size on in laps of
   * wrap counter 1): while one descriptor is answered, and when both are alike. Tables, as to put the words together takes longer.
   */
  #moving = NO_TABLE;
  #settled = NO_TABLE;
  /** Where the used ring is: an index of the tables. */
  #place = 0;
  #ringSize = 0;
  readonly #entries: number;
  // Our own copies of what the region holds, by entry.
  readonly #next: Uint16Array;
  readonly #last: Uint16Array;
  #freeHead = 0;
  #counterLo = 0;
  #counterHi = 0;

  /** @param place arena offset of the queue's part of the region @param entries its number of entries */
  constructor(arena: Arena, place: number, entries: number) {
    const bytes = HEADER_BYTES + ENTRY_BYTES * entries;
    this.#u8 = arena.view8(place, bytes);
    this.#u16 = arena.view16(place, bytes / 2);
    this.#u32 = arena.view32(place, bytes / 4);
    this.#positions = arena.viewF64(place + POSITIONS_AT, 1);
    this.#entries = entries;
    this.#next = new Uint16Array(new ArrayBuffer(entries * 2));
    this.#last = new Uint16Array(new ArrayBuffer(entries * 2));
  }

  /**
   * Puts the region in order and finds out what was in flight. Null when the ring cannot be tracked: in a ring that starts anew with
   * its positions apart, where it would go on could not be told from the used position later.
   * @param flagsAt reads the flags of a descriptor of the ring
   * @param available @param used where to go on, which counts for a new region only
   */
  recover(
    ringSize: number,
    flagsAt: (index: number) => number,
    available: PackedPosition,
    used: PackedPosition,
  ): PackedRecovery | null {
    this.#makeTables(ringSize);
    if (this.#u16[InflightAt.version / 2] !== INFLIGHT_VERSION) {
      if (available.index !== used.index || available.wrap !== used.wrap) return null;
      this.#format(used);
      return { fault: null, requests: [], available, used };
    }
    const misfit = { fault: INFLIGHT_MISFIT, requests: [], available, used };
    const settled = this.#settle(ringSize, flagsAt);
    if (settled === null) return misfit;
    const belongs = this.#clearFree();
    if (belongs === null) return misfit;
    const requests = this.#readRequests(ringSize, belongs);
    // Every entry is free or in flight: else the free list ends while there is room in the ring.
    if (requests === null || belongs.includes(0)) return misfit;
    const taken = settled.index + requests.reduce((sum, { count }) => sum + count, 0);
    return {
      fault: null,
      requests,
      used: settled,
      available: taken < ringSize ? { ...settled, index: taken } : { index: taken - ringSize, wrap: settled.wrap ^ 1 },
    };
  }

  /** A request was taken: copies its descriptors. There is room for them. @returns its first entry */
  take(words: Uint32Array, count: number): number {
    const u32 = this.#u32;
    const first = this.#freeHead;
    let entry = first;
    let last = first;
    for (let from = 0; from < count * DESC_WORDS; from += DESC_WORDS) {
      const at = HEADER_BYTES / 4 + entry * ENTRY_WORDS;
      // Buffer id and flags lie in one word, here as in the ring.
      u32[at + ID_AT / 4] = words[from + 3]!;
      u32[at + LENGTH_AT / 4] = words[from + 2]!;
      u32[at + ADDRESS_AT / 4] = words[from]!;
      u32[at + ADDRESS_AT / 4 + 1] = words[from + 1]!;
      last = entry;
      entry = this.#next[entry]!;
    }
    this.#last[first] = last;
    const at = HEADER_BYTES / 4 + first * ENTRY_WORDS;
    // With its number, which follows it.
    u32[at + LAST_AT / 4] = last | (count << 16);
    u32[at + COUNTER_AT / 4] = this.#counterLo;
    u32[at + COUNTER_AT / 4 + 1] = this.#counterHi;
    this.#u8[HEADER_BYTES + first * ENTRY_BYTES] = 1;
    this.#freeHead = entry;
    // Both heads of the free list at once.
    u32[FREE_HEAD_AT / 4] = entry | (entry << 16);
    this.#count();
    return first;
  }

  /** The answer of a request is about to be written. @param count its descriptors @param index @param wrap the place behind them */
  answer(entry: number, count: number, index: number, wrap: number): void {
    const last = this.#last[entry]!;
    this.#next[last] = this.#freeHead;
    this.#u16[(HEADER_BYTES >> 1) + last * ENTRY_HALVES + (NEXT_AT >> 1)] = this.#freeHead;
    this.#freeHead = entry;
    this.#u16[FREE_HEAD_AT >> 1] = entry;
    const before = this.#place;
    const after = wrap === 0 ? index : index + this.#ringSize;
    this.#positions[0] = count === 1 ? this.#moving[before]! : this.#word(after, before);
    this.#place = after;
  }

  /** The answer was written: the driver can see it. */
  answered(entry: number): void {
    this.#u8[HEADER_BYTES + entry * ENTRY_BYTES] = 0;
    this.#u16[OLD_FREE_HEAD_AT >> 1] = entry;
    this.#positions[0] = this.#settled[this.#place]!;
  }

  #count(): void {
    this.#counterLo = (this.#counterLo + 1) | 0;
    if (this.#counterLo === 0) this.#counterHi = (this.#counterHi + 1) | 0;
  }

  /** Both places with their wrap counters in one double. The upper 16 bits are 0: it is no NaN. */
  #word(used: number, old: number): number {
    const size = this.#ringSize;
    const [usedWrap, oldWrap] = [used < size ? 0 : 1, old < size ? 0 : 1];
    pairHalves[0] = used - usedWrap * size;
    pairHalves[1] = old - oldWrap * size;
    pairHalves[2] = usedWrap | (oldWrap << 8);
    return pair[0]!;
  }

  #makeTables(ringSize: number): void {
    this.#ringSize = ringSize;
    const places = Array.from({ length: 2 * ringSize }, (_, place) => place);
    this.#settled = Float64Array.from(places, (place) => this.#word(place, place));
    this.#moving = Float64Array.from(places, (place) => this.#word((place + 1) % (2 * ringSize), place));
  }

  /** Makes both places in the region this one. */
  #storePosition({ index, wrap }: PackedPosition): void {
    this.#place = wrap === 0 ? index : index + this.#ringSize;
    this.#positions[0] = this.#settled[this.#place]!;
  }

  /** The version comes last: until then the region is a new one. */
  #format(used: PackedPosition): void {
    for (let i = 0; i < this.#u32.length; i++) this.#u32[i] = 0;
    for (let entry = 0; entry < this.#entries; entry++) {
      this.#next[entry] = entry + 1;
      this.#u16[HEADER_BYTES / 2 + entry * ENTRY_HALVES + NEXT_AT / 2] = entry + 1;
    }
    this.#u16[InflightAt.descNum / 2] = this.#entries;
    this.#storePosition(used);
    this.#u16[InflightAt.version / 2] = INFLIGHT_VERSION;
  }

  /** Brings the answer to its end that was being written, or takes it back. Returns where the used ring goes on, or null. */
  #settle(ringSize: number, flagsAt: (index: number) => number): PackedPosition | null {
    const [usedIndex, oldIndex] = [this.#u16[POSITIONS_AT / 2]!, this.#u16[POSITIONS_AT / 2 + 1]!];
    const [usedWrap, oldWrap] = [this.#u8[POSITIONS_AT + 4]!, this.#u8[POSITIONS_AT + 5]!];
    const freeHead = this.#u16[FREE_HEAD_AT / 2]!;
    const oldFreeHead = this.#u16[OLD_FREE_HEAD_AT / 2]!;
    if (usedIndex >= ringSize || oldIndex >= ringSize || usedWrap > 1 || oldWrap > 1) return null;
    const isUnderWay = usedIndex !== oldIndex || usedWrap !== oldWrap;
    // Still as the driver made it available, or used, or even made available once more.
    if (isUnderWay && flagsAt(oldIndex) !== availableFlags(oldWrap)) {
      this.#freeHead = freeHead;
      this.#u16[OLD_FREE_HEAD_AT / 2] = freeHead;
      this.#storePosition({ index: usedIndex, wrap: usedWrap });
      return { index: usedIndex, wrap: usedWrap };
    }
    this.#storePosition({ index: oldIndex, wrap: oldWrap });
    this.#freeHead = oldFreeHead;
    this.#u16[FREE_HEAD_AT / 2] = oldFreeHead;
    return { index: oldIndex, wrap: oldWrap };
  }

  /** What is free is not in flight, whatever its mark says. Returns which entries those are, or null when the list is no list. */
  #clearFree(): Uint8Array | null {
    const isFree = new Uint8Array(this.#entries);
    for (let entry = 0; entry < this.#entries; entry++) {
      this.#next[entry] = this.#u16[HEADER_BYTES / 2 + entry * ENTRY_HALVES + NEXT_AT / 2]!;
    }
    for (let entry = this.#freeHead; entry < this.#entries; entry = this.#next[entry]!) {
      if (isFree[entry] !== 0) return null;
      isFree[entry] = 1;
      this.#u8[HEADER_BYTES + entry * ENTRY_BYTES] = 0;
    }
    return isFree;
  }

  /** @param taken entries that belong to something; those of requests are added */
  #readRequests(ringSize: number, taken: Uint8Array): RecoveredRequest[] | null {
    const found: (RecoveredRequest & { readonly hi: number; readonly lo: number })[] = [];
    let descriptors = 0;
    for (let first = 0; first < this.#entries; first++) {
      if (taken[first] !== 0 || this.#u8[HEADER_BYTES + first * ENTRY_BYTES] === 0) continue;
      const half = HEADER_BYTES / 2 + first * ENTRY_HALVES;
      const count = this.#u16[half + NUM_AT / 2]!;
      descriptors += count;
      if (count === 0 || descriptors > ringSize) return null;
      const words = new Uint32Array(count * DESC_WORDS);
      for (let i = 0, entry = first; i < count; i++, entry = this.#next[entry]!) {
        if (entry >= this.#entries || taken[entry] !== 0) return null;
        taken[entry] = 1;
        const at = HEADER_BYTES / 4 + entry * ENTRY_WORDS;
        words[i * DESC_WORDS] = this.#u32[at + ADDRESS_AT / 4]!;
        words[i * DESC_WORDS + 1] = this.#u32[at + ADDRESS_AT / 4 + 1]!;
        words[i * DESC_WORDS + 2] = this.#u32[at + LENGTH_AT / 4]!;
        words[i * DESC_WORDS + 3] = this.#u32[at + ID_AT / 4]!;
        this.#last[first] = entry;
      }
      const counter = (half + COUNTER_AT / 2) / 2;
      found.push({ entry: first, count, words, lo: this.#u32[counter]!, hi: this.#u32[counter + 1]! });
    }
    found.sort((a, b) => a.hi - b.hi || a.lo - b.lo);
    const newest = found.at(-1);
    if (newest !== undefined) {
      this.#counterLo = newest.lo | 0;
      this.#counterHi = newest.hi | 0;
      this.#count();
    }
    return found;
  }
}
