/** The driver's side of a split virtqueue (VIRTIO 1.2, 2.7). */
import { DESCRIPTOR_BYTES, DescriptorFlag } from '../frontend/protocol.js';
import type { DriverRing, Piece, RingParts } from './driver-ring.js';
import type { GuestRam } from './guest-ram.js';

const NO_INTERRUPT = 1;
const NO_NOTIFY = 1;
/** An event index this far ahead asks for no call in practice. */
const FAR_AHEAD = 0x7fff;

export class SplitRing implements DriverRing {
  readonly size: number;
  readonly parts: RingParts;
  usedId = 0;
  usedBytes = 0;
  readonly #ram: GuestRam;
  readonly #eventIdx: boolean;
  readonly #table: Uint32Array;
  readonly #available: Uint16Array;
  readonly #used: Uint16Array;
  readonly #usedEntries: Uint32Array;
  readonly #free: number[] = [];
  /** Descriptors of a chain, by its head. */
  readonly #chains = new Map<number, number[]>();
  #availableIndex = 0;
  #publishedIndex = 0;
  #usedIndex = 0;

  constructor(ram: GuestRam, size: number, eventIdx: boolean) {
    this.size = size;
    this.#ram = ram;
    this.#eventIdx = eventIdx;
    const descriptors = ram.allocate(size * DESCRIPTOR_BYTES, 16);
    const available = ram.allocate(6 + 2 * size, 2);
    const used = ram.allocate(6 + 8 * size, 4);
    this.parts = { descriptors, available, used };
    this.#table = ram.view32(descriptors, size * 4);
    this.#available = ram.view16(available, 3 + size);
    this.#used = ram.view16(used, 3 + 4 * size);
    this.#usedEntries = ram.view32(used + 4, 2 * size);
    this.reset();
  }

  /** A ring whose requests have all been answered goes on where the used ring ends. */
  get base(): number {
    return this.#used[1]!;
  }

  stoppedAt(base: number): boolean {
    return base === this.base;
  }

  reset(): void {
    this.#table.fill(0);
    this.#available.fill(0);
    this.#used.fill(0);
    this.#chains.clear();
    this.#free.length = 0;
    for (let i = this.size - 1; i >= 0; i--) this.#free.push(i);
    this.#availableIndex = 0;
    this.#publishedIndex = 0;
    this.#usedIndex = 0;
  }

  add(pieces: readonly Piece[], tabledFrom: number, tableAddress: number): number {
    const direct = Math.min(tabledFrom, pieces.length);
    const isTabled = direct < pieces.length;
    const count = direct + (isTabled ? 1 : 0);
    if (count > this.#free.length) return -1;
    const chain = this.#free.splice(-count).reverse();
    chain.forEach((descriptor, i) => {
      const next = i + 1 < count ? chain[i + 1]! : -1;
      if (i < direct) {
        describe(this.#table, descriptor, pieces[i]!, next);
      } else {
        const lengthBytes = (pieces.length - direct) * DESCRIPTOR_BYTES;
        describe(this.#table, descriptor, { address: tableAddress, lengthBytes, writable: false }, -1);
        this.#table[descriptor * 4 + 3]! |= DescriptorFlag.indirect;
      }
    });
    if (isTabled) this.#writeTable(pieces.slice(direct), tableAddress);
    const head = chain[0]!;
    this.#chains.set(head, chain);
    this.#available[2 + (this.#availableIndex & (this.size - 1))] = head;
    this.#availableIndex = (this.#availableIndex + 1) & 0xffff;
    return head;
  }

  publish(): boolean {
    const before = this.#publishedIndex;
    const now = this.#availableIndex;
    this.#publishedIndex = now;
    this.#available[1] = now;
    if (!this.#eventIdx) return (this.#used[0]! & NO_NOTIFY) === 0;
    const event = this.#used[2 + 4 * this.size]!;
    return ((now - event - 1) & 0xffff) < ((now - before) & 0xffff);
  }

  get hasUsed(): boolean {
    return this.#used[1] !== this.#usedIndex;
  }

  takeUsed(): boolean {
    if (!this.hasUsed) return false;
    const at = (this.#usedIndex & (this.size - 1)) * 2;
    this.usedId = this.#usedEntries[at]!;
    this.usedBytes = this.#usedEntries[at + 1]!;
    this.#usedIndex = (this.#usedIndex + 1) & 0xffff;
    const chain = this.#chains.get(this.usedId);
    if (chain === undefined) return true;
    this.#chains.delete(this.usedId);
    this.#free.push(...chain.reverse());
    return true;
  }

  wantCalls(on: boolean): void {
    if (this.#eventIdx) this.#available[2 + this.size] = on ? this.#usedIndex : this.#usedIndex + FAR_AHEAD;
    else this.#available[0] = on ? 0 : NO_INTERRUPT;
  }

  #writeTable(pieces: readonly Piece[], address: number): void {
    const words = new Uint32Array(pieces.length * 4);
    pieces.forEach((piece, i) => describe(words, i, piece, i + 1 < pieces.length ? i + 1 : -1));
    this.#ram.write(address, new Uint8Array(words.buffer));
  }
}

function describe(words: Uint32Array, index: number, piece: Piece, next: number): void {
  const at = index * 4;
  const flags = (next >= 0 ? DescriptorFlag.next : 0) | (piece.writable ? DescriptorFlag.write : 0);
  words[at] = piece.address;
  words[at + 1] = piece.address / 2 ** 32;
  words[at + 2] = piece.lengthBytes;
  words[at + 3] = flags | (next >= 0 ? next << 16 : 0);
}
