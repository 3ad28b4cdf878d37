/**
 * Requests in flight of one split ring, written down in shared memory (vhost-user.rst, "Inflight I/O tracking"):
 *
 *      0 u64 features    8 u16 version    10 u16 desc_num    12 u16 last_batch_head    14 u16 used_idx
 *     16 desc_num entries, one for each descriptor {u8 inflight, 5 bytes, u16 next, u64 counter}; only those of heads mean something
 *
 *     a request is taken       counter, inflight = 1
 *     it is pushed             next = last_batch_head, last_batch_head = head
 *     the batch is published   used->idx | inflight = 0 for each of the batch, used_idx = used->idx
 *
 * Invariants
 * - Between any two of these stores the process may die, and `recover` finds exactly the requests that were taken and whose used
 *   entry the driver cannot see. The store of used->idx is the moment at which a batch is answered.
 * - While the ring runs nothing is read from the region: the front-end may write to it. What `recover` reads it reads once.
 */
import type { Arena } from '../../native/index.js';
import { INFLIGHT_MISFIT, INFLIGHT_VERSION, InflightAt } from './inflight-region.js';

const HEADER_BYTES = 16;
const ENTRY_BYTES = 16;
// Offsets in the header, and in an entry.
const LAST_BATCH_HEAD_AT = 12;
const USED_IDX_AT = 14;
const NEXT_AT = 6;
const COUNTER_AT = 8;

export interface SplitRecovery {
  /** Why the ring cannot go on, or null. */
  readonly fault: string | null;
  /** Heads in flight, in the order in which they were taken. */
  readonly heads: readonly number[];
  /** Where the available ring goes on. */
  readonly nextAvailable: number;
}

export class SplitInflight {
  readonly #u8: Uint8Array;
  readonly #u16: Uint16Array;
  readonly #u32: Uint32Array;
  readonly #entries: number;
  /** Heads pushed since the last publish. */
  readonly #batch: Uint16Array;
  #batchCount = 0;
  #lastBatchHead = 0;
  // Two words of 32 bits, so that neither is ever a double.
  #counterLo = 0;
  #counterHi = 0;

  /** @param place arena offset of the queue's part of the region @param entries its number of entries */
  constructor(arena: Arena, place: number, entries: number) {
    const bytes = HEADER_BYTES + ENTRY_BYTES * entries;
    this.#u8 = arena.view8(place, bytes);
    this.#u16 = arena.view16(place, bytes / 2);
    this.#u32 = arena.view32(place, bytes / 4);
    this.#entries = entries;
    this.#batch = new Uint16Array(new ArrayBuffer(entries * 2));
  }

  /**
   * Puts the region in order and finds out what was in flight. Null when the ring cannot be tracked: in a ring that starts anew with
   * its indices apart, where it would go on could not be told from the used index later.
   * @param usedIdx of the used ring @param base next available index, which counts for a new region only
   */
  recover(ringSize: number, usedIdx: number, base: number): SplitRecovery | null {
    if (this.#u16[InflightAt.version / 2] !== INFLIGHT_VERSION) {
      if (base !== usedIdx) return null;
      this.#format(usedIdx);
      return { fault: null, heads: [], nextAvailable: base };
    }
    const fault = this.#settleLastBatch(ringSize, usedIdx);
    if (fault !== null) return { fault, heads: [], nextAvailable: usedIdx };
    const found: { head: number; hi: number; lo: number }[] = [];
    for (let head = 0; head < this.#entries; head++) {
      const at = HEADER_BYTES + head * ENTRY_BYTES;
      if (this.#u8[at] === 0) continue;
      if (head >= ringSize) return { fault: INFLIGHT_MISFIT, heads: [], nextAvailable: usedIdx };
      found.push({ head, lo: this.#u32[(at + COUNTER_AT) / 4]!, hi: this.#u32[(at + COUNTER_AT) / 4 + 1]! });
    }
    found.sort((a, b) => a.hi - b.hi || a.lo - b.lo);
    const newest = found.at(-1);
    if (newest !== undefined) {
      this.#counterLo = newest.lo | 0;
      this.#counterHi = newest.hi | 0;
      this.#count();
    }
    const heads = found.map(({ head }) => head);
    return { fault: null, heads, nextAvailable: (usedIdx + heads.length) & 0xffff };
  }

  /** A request was taken from the available ring. */
  take(head: number): void {
    const at = HEADER_BYTES + head * ENTRY_BYTES;
    this.#u32[(at + COUNTER_AT) >> 2] = this.#counterLo;
    this.#u32[(at + COUNTER_AT + 4) >> 2] = this.#counterHi;
    this.#u8[at] = 1;
    this.#count();
  }

  /** A request was answered; the driver does not see it yet. It comes once for each `take`. */
  push(head: number): void {
    this.#u16[(HEADER_BYTES + head * ENTRY_BYTES + NEXT_AT) >> 1] = this.#lastBatchHead;
    this.#u16[LAST_BATCH_HEAD_AT >> 1] = head;
    this.#lastBatchHead = head;
    this.#batch[this.#batchCount++] = head;
  }

  /**
   * used->idx was stored: the driver sees what was pushed. @param inflight marks of the virtqueue by head: those of the batch are
   * taken away
   */
  published(usedIdx: number, inflight: Uint8Array): void {
    const count = this.#batchCount;
    for (let i = 0; i < count; i++) {
      const head = this.#batch[i]!;
      this.#u8[HEADER_BYTES + head * ENTRY_BYTES] = 0;
      inflight[head] = 0;
    }
    this.#u16[USED_IDX_AT >> 1] = usedIdx;
    this.#batchCount = 0;
  }

  #count(): void {
    this.#counterLo = (this.#counterLo + 1) | 0;
    if (this.#counterLo === 0) this.#counterHi = (this.#counterHi + 1) | 0;
  }

  /** The version comes last: until then the region is a new one. */
  #format(usedIdx: number): void {
    for (let i = 0; i < this.#u32.length; i++) this.#u32[i] = 0;
    this.#u16[InflightAt.descNum / 2] = this.#entries;
    this.#u16[USED_IDX_AT / 2] = usedIdx;
    this.#u16[InflightAt.version / 2] = INFLIGHT_VERSION;
  }

  /** Entries of a batch that the driver has seen may still be marked as in flight: they are not. Returns a fault or null. */
  #settleLastBatch(ringSize: number, usedIdx: number): string | null {
    const batch = (usedIdx - this.#u16[USED_IDX_AT / 2]!) & 0xffff;
    if (batch > ringSize) return INFLIGHT_MISFIT;
    let head = this.#u16[LAST_BATCH_HEAD_AT / 2]!;
    this.#lastBatchHead = head;
    for (let i = 0; i < batch; i++) {
      if (head >= ringSize) return INFLIGHT_MISFIT;
      this.#u8[HEADER_BYTES + head * ENTRY_BYTES] = 0;
      head = this.#u16[(HEADER_BYTES + head * ENTRY_BYTES + NEXT_AT) / 2]!;
    }
    this.#u16[USED_IDX_AT / 2] = usedIdx;
    return null;
  }
}
