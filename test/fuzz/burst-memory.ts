/**
 * What lies where in guest memory during one burst of a ring attack, and which of it the device may write.
 *
 *     control  slot of each ring | indirect tables | request headers | data to be read
 *     left     results of requests that keep the rules, one beside the other | buffers that hostile requests share
 *     right, short               buffers that hostile requests share
 */
import type { Random } from '../../src/poller/clock.js';
import { STATUS_UNANSWERED } from '../frontend/protocol.js';
import { CONTROL_BYTES } from './attack-memory.js';
import type { AttackMemory } from './attack-memory.js';
import { anyU32, anyU64, chance, pick, words } from './boundaries.js';
import type { Words } from './boundaries.js';

const KIB = 1024;
export const QUEUES = 8;
export const RING_SLOT_BYTES = 8 * KIB;
export const TABLES_AT = QUEUES * RING_SLOT_BYTES;
export const HEADERS_AT = 160 * KIB;
const DATA_AT = 192 * KIB;
const DATA_BYTES = 32 * KIB;
/** Room that any chain finds at most. */
const CHAIN_TABLE_BYTES = 16 * KIB;
const CHAIN_HEADER_BYTES = 512;
const LAWFUL_BYTES = 32 * KIB;

/**
 * - `known`: nothing makes the device write to rings, tables or results of others: all of it is checked.
 * - `tracked`: as `known`, but a hostile in-flight region says where rings go on: what the device makes of them nobody knows.
 * - `wild`: descriptors lead anywhere, rings and tables included. The guards alone are checked.
 * - `race`: memory changes below the device. The guards alone are checked.
 */
export type BurstMode = 'known' | 'tracked' | 'wild' | 'race';

export class BurstMemory {
  readonly memory: AttackMemory;
  mode: BurstMode = 'known';
  readonly #random: Random;
  #tableAt = TABLES_AT;
  #headerAt = HEADERS_AT;
  #lawfulAt = 0;
  /** Guest ranges that descriptors make writable, as start, length. */
  #writable: number[] = [];

  constructor(memory: AttackMemory, random: Random) {
    this.memory = memory;
    this.#random = random;
  }

  begin(mode: BurstMode): void {
    this.mode = mode;
    // What an earlier burst left would lead chains that go astray to memory that nobody may write any more.
    this.memory.u8.fill(0, TABLES_AT, this.#tableAt);
    this.#tableAt = TABLES_AT;
    this.#headerAt = HEADERS_AT;
    this.#lawfulAt = 0;
    this.#writable = [];
  }

  /** What is laid out is what has to be there, but for what descriptors make writable. */
  snapshot(): void {
    this.memory.snapshot();
    for (let i = 0; i < this.#writable.length; i += 2) this.memory.allow(this.#writable[i]!, this.#writable[i + 1]!);
  }

  get isKnown(): boolean {
    return this.mode === 'known';
  }

  /** Descriptors lead to no memory that others rely on. */
  get isCareful(): boolean {
    return this.mode === 'known' || this.mode === 'tracked';
  }

  /** Whether there is room for another chain, whichever it is. */
  get hasRoom(): boolean {
    return HEADERS_AT - this.#tableAt > CHAIN_TABLE_BYTES && DATA_AT - this.#headerAt > CHAIN_HEADER_BYTES;
  }

  // ---- Places, as guest addresses

  /** A table's, of so many descriptors. @returns its offset in the control region */
  placeTable(count: number, shift: number): number {
    const at = Math.ceil(this.#tableAt / 16) * 16 + shift;
    this.#tableAt = at + 16 * count;
    return at;
  }

  /** A new request header. */
  header(type: number, [lo, hi]: Words, shift = 0): number {
    const at = this.#headerAt + shift;
    this.#headerAt += shift === 0 ? 16 : 32;
    this.writeWords(at, [type, 0, lo, hi]);
    return this.memory.control.guestAddress + at;
  }

  /** Four words behind the latest header. */
  addToHeader(fields: readonly [number, number, number, number]): void {
    this.writeWords(this.#headerAt, fields);
    this.#headerAt += 16;
  }

  /** Data for the device to read. */
  data(alignment: number): number {
    return this.memory.control.guestAddress + DATA_AT + alignment * this.#random.below(DATA_BYTES / alignment);
  }

  /** The first table. */
  get tables(): number {
    return this.memory.control.guestAddress + TABLES_AT;
  }

  /** Where there are headers and data: bytes nobody meant to be descriptors. */
  headersOrData(): number {
    return this.memory.control.guestAddress + HEADERS_AT + this.#random.below(CONTROL_BYTES - HEADERS_AT);
  }

  /** Memory that nothing else in this burst is to be written to; -1 when there is no more. */
  lawfulPlace(lengthBytes: number): number {
    const at = this.#lawfulAt;
    if (at + lengthBytes > LAWFUL_BYTES) return -1;
    this.#lawfulAt += lengthBytes;
    const { left } = this.memory;
    left.live.fill(STATUS_UNANSWERED, at, at + lengthBytes);
    return left.guestAddress + at;
  }

  /** The bytes at a lawful place. */
  result(place: number, lengthBytes: number): Buffer {
    const { left } = this.memory;
    return left.live.subarray(place - left.guestAddress, place - left.guestAddress + lengthBytes);
  }

  /** Memory that hostile requests share; wild ones go for the rings and tables. */
  hostilePlace(lengthBytes: number): number {
    const random = this.#random;
    const { left, right, short, control } = this.memory;
    if (this.mode === 'wild' && chance(random, 40)) {
      return control.guestAddress + random.below(CONTROL_BYTES - lengthBytes);
    }
    switch (random.below(3)) {
      case 0:
        return left.guestAddress + LAWFUL_BYTES + random.below(left.sizeBytes - LAWFUL_BYTES - lengthBytes);
      case 1:
        return right.guestAddress + random.below(right.sizeBytes - lengthBytes);
      default: {
        // Up to the last byte.
        const last = short.sizeBytes - lengthBytes;
        return short.guestAddress + (chance(random, 30) ? last : random.below(last));
      }
    }
  }

  /**
   * Anywhere for a descriptor to lead. While more than the guards is checked, not to what other chains rely on: the device may rightly write
   * there, or find a table of somebody's descriptors there and carry them out. No memory lies right before either, so a range
   * that begins outside does not reach it.
   */
  strayAddress(): Words {
    const { control, left, edges } = this.memory;
    for (;;) {
      const address = anyU64(this.#random, edges);
      const at = address[0] + address[1] * 2 ** 32;
      const isReliedOn =
        (at >= control.guestAddress && at < control.guestAddress + control.sizeBytes) ||
        (at >= left.guestAddress && at < left.guestAddress + LAWFUL_BYTES);
      if (!this.isCareful || !isReliedOn) return address;
    }
  }

  /** An address with a length: a place with as much as there may be, or anything. */
  anyBuffer(): { readonly address: Words; readonly length: number } {
    const random = this.#random;
    if (chance(random, 60)) return { address: words(this.hostilePlace(4096)), length: random.below(4096) };
    return { address: this.strayAddress(), length: anyU32(random) };
  }

  // ---- Access

  /** The device may write this guest range. */
  makeWritable([lo, hi]: Words, lengthBytes: number): void {
    this.#writable.push(lo + hi * 2 ** 32, lengthBytes);
  }

  /** Writes words at an offset of the control region that may be misaligned. */
  writeWords(at: number, fields: readonly number[]): void {
    const { u8, u32 } = this.memory;
    if ((at & 3) === 0) {
      fields.forEach((word, i) => (u32[(at >>> 2) + i] = word));
      return;
    }
    fields.forEach((word, i) => {
      for (let k = 0; k < 4; k++) u8[at + 4 * i + k] = word >>> (8 * k);
    });
  }

  writeHalf(at: number, value: number): void {
    this.memory.u16[at >>> 1] = value;
  }

  /** Changes a word of a table or header while the device runs. */
  meddle(): void {
    const random = this.#random;
    if (chance(random, 50)) this.memory.poke32((TABLES_AT >>> 2) + random.below(4096), anyU32(random));
    else this.memory.poke32((HEADERS_AT >>> 2) + random.below(4096), pick(random, [0, 1, 4, 8, 11, 13]));
  }
}
