/**
 * Collects the buffers of one request into a `DescriptorChain`: what split and packed rings have in common once they have found a
 * descriptor. In which order descriptors come, and how many they may be, is the ring's business.
 *
 * Addresses go through the arrays of the chain: as arguments of calls they would be boxed.
 */
import type { Arena } from '../../native/index.js';
import { WINDOW_MASK, WINDOW_SCALE } from '../../native/index.js';
import { CHAIN_SEGMENTS_MAX } from './descriptor-chain.js';
import type { DescriptorChain } from './descriptor-chain.js';
import type { GuestMemory } from './guest-memory.js';

export const DESC_BYTES = 16;
export const DESC_WORDS = 4;

/** Longest indirect table whatever the ring's size: seg_max buffers, a header and a status must fit (VIRTIO 1.2, 5.2.4). */
export const INDIRECT_MAX = 1024;
/** Total length of a chain (2.7.4.1, 2.8.4.1). */
const CHAIN_BYTES_MAX = 2 ** 32;
/** The upper word of an address below 2^53. */
const ADDRESS_HI_MAX = 0x1fffff;

export class ChainBuilder {
  /** Why the ring is broken, or null. */
  fault: string | null = null;
  /** The indirect table last opened: its words, the one it begins at, and its number of descriptors. */
  table: Uint32Array;
  tableBase = 0;
  tableSize = 0;

  readonly #memory: GuestMemory;
  readonly #arena: Arena;
  readonly #indirect: boolean;
  /** Words of an indirect table that could not be read in place. */
  readonly #copy = new Uint32Array(new ArrayBuffer(INDIRECT_MAX * DESC_BYTES));

  /** @param indirect whether indirect descriptors were negotiated */
  constructor(memory: GuestMemory, indirect: boolean) {
    this.#memory = memory;
    this.#arena = memory.arena;
    this.#indirect = indirect;
    this.table = this.#copy;
  }

  /** Always false, for the caller to pass on. */
  fail(fault: string): false {
    this.fault = fault;
    return false;
  }

  /** Adds the buffer of the descriptor at word `at`, each word of which is read once. False when it breaks a rule. */
  add(chain: DescriptorChain, words: Uint32Array, at: number, isWritable: boolean): boolean {
    const count = chain.count;
    const lo = words[at]!;
    const hi = words[at + 1]!;
    const length = words[at + 2]!;
    if (hi > ADDRESS_HI_MAX) return this.fail('a descriptor address is beyond 2^53');
    chain.addresses[count] = lo + hi * 2 ** 32;
    chain.lengths[count] = length;
    if (isWritable) {
      chain.writableBytes += length;
      if (length > 0) chain.count = count + 1;
      return true;
    }
    if (count > chain.readableCount) return this.fail('a readable buffer after a writable one');
    chain.readableBytes += length;
    if (length > 0) chain.readableCount = chain.count = count + 1;
    return true;
  }

  /** Finds the indirect table that the descriptor at word `at` points to. False when it breaks a rule. */
  openTable(chain: DescriptorChain, words: Uint32Array, at: number): boolean {
    const lo = words[at]!;
    const hi = words[at + 1]!;
    const length = words[at + 2]!;
    if (hi > ADDRESS_HI_MAX) return this.fail('a descriptor address is beyond 2^53');
    if (!this.#indirect) return this.fail('an indirect descriptor without the feature');
    if (length === 0 || length % DESC_BYTES !== 0) return this.fail('an indirect table of a broken length');
    this.tableSize = length / DESC_BYTES;
    if (this.tableSize > INDIRECT_MAX) return this.fail('an indirect table is too long');
    // The next entry of the chain is free: the table is no buffer itself.
    chain.addresses[chain.count] = lo + hi * 2 ** 32;
    chain.lengths[chain.count] = length;
    return this.#findTable(chain, chain.count) || this.fail('an indirect table is outside guest memory');
  }

  /** Every descriptor has been added: finds where the buffers lie. False when they break a rule. */
  finish(chain: DescriptorChain): boolean {
    if (chain.readableBytes + chain.writableBytes > CHAIN_BYTES_MAX)
      return this.fail('a chain is longer than 2^32 bytes');
    if (this.#memory.place(chain)) return true;
    const isFull = chain.count === CHAIN_SEGMENTS_MAX;
    return this.fail(isFull ? 'a chain has too many pieces' : 'a buffer is outside guest memory');
  }

  /** @param at entry of the chain that describes the table */
  #findTable(chain: DescriptorChain, at: number): boolean {
    const length = chain.lengths[at]!;
    const region = this.#memory.regionOf(chain, at);
    if (region >= 0) {
      const place = chain.addresses[at]! + this.#memory.shifts[region]!;
      if ((place & 3) === 0 && (place & WINDOW_MASK) + length <= WINDOW_MASK) {
        this.table = this.#arena.u32[(place * WINDOW_SCALE) | 0]!;
        this.tableBase = (place & WINDOW_MASK) >>> 2;
        return true;
      }
    }
    this.table = this.#copy;
    this.tableBase = 0;
    return this.#copyTable(chain.addresses[at]!, length);
  }

  /** Copies an indirect table that is misaligned, or spans regions. */
  #copyTable(address: number, length: number): boolean {
    const bytes = new Uint8Array(this.#copy.buffer);
    for (let done = 0; done < length;) {
      const part = Math.min(length - done, this.#memory.contiguousAt(address + done));
      if (part === 0) return false;
      const place = this.#memory.translate(address + done, part);
      bytes.set(this.#arena.view8(place, part), done);
      done += part;
    }
    return true;
  }
}
