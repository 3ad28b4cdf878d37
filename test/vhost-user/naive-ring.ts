/**
 * A split virtqueue as the text of VIRTIO 1.2 (2.7) has it, device side, with no thought of speed: the model that the real one is
 * compared to. It reads guest memory afresh for every byte, counts with BigInt, and translates address by address.
 */
import type { DriverMemory } from '../frontend/guest-memory.js';

/** [first guest address, length] */
export type NaiveBuffer = readonly [bigint, bigint];

export type NaivePop =
  | { readonly kind: 'none' | 'broken' }
  | {
      readonly kind: 'chain';
      readonly head: number;
      readonly readable: NaiveBuffer[];
      readonly writable: NaiveBuffer[];
    };

export interface NaiveRingPlace {
  readonly size: number;
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

const BROKEN: NaivePop = { kind: 'broken' };

export class NaiveRing {
  readonly inflight = new Set<number>();
  last: number;
  /** The available index when it was last looked at: what was promised once stays promised. */
  #seen: number;
  #usedNext: number;
  #usedPublished: number;
  readonly #memory: DriverMemory;
  readonly #place: NaiveRingPlace;
  readonly #eventIdx: boolean;
  readonly #indirectMax: number;

  constructor(memory: DriverMemory, place: NaiveRingPlace, base: number, eventIdx: boolean, indirectMax: number) {
    this.#memory = memory;
    this.#place = place;
    this.#eventIdx = eventIdx;
    this.#indirectMax = indirectMax;
    this.last = base;
    this.#seen = base;
    this.#usedNext = this.#u16(place.used + 2);
    this.#usedPublished = this.#usedNext;
  }

  pop(): NaivePop {
    if (this.#seen === this.last) {
      const index = this.#u16(this.#place.available + 2);
      if (index === this.last) return { kind: 'none' };
      if (distance(this.last, index) > this.#place.size) return BROKEN;
      this.#seen = index;
    }
    const head = this.#u16(this.#place.available + 4 + 2 * (this.last % this.#place.size));
    if (head >= this.#place.size || this.inflight.has(head)) return BROKEN;
    const buffers = this.#walk(head);
    if (buffers === null) return BROKEN;
    this.inflight.add(head);
    this.last = (this.last + 1) % 65536;
    return { kind: 'chain', head, ...buffers };
  }

  /** Where the entry goes and what it says: [guest address, id, length]. */
  push(head: number, length: number): readonly [number, number, number] {
    this.inflight.delete(head);
    const at = this.#place.used + 4 + 8 * (this.#usedNext % this.#place.size);
    this.#usedNext = (this.#usedNext + 1) % 65536;
    return [at, head, length];
  }

  /** Whether the driver is to be called; the used index is what `usedIndex` says then. */
  publish(): boolean {
    const event = this.#u16(this.#place.available + 4 + 2 * this.#place.size);
    const flags = this.#u16(this.#place.available);
    const count = distance(this.#usedPublished, this.#usedNext);
    let reached = false;
    for (let i = 0; i < count; i++) if ((this.#usedPublished + i) % 65536 === event) reached = true;
    this.#usedPublished = this.#usedNext;
    if (count === 0) return false;
    return this.#eventIdx ? reached : flags % 2 === 0;
  }

  get usedIndex(): number {
    return this.#usedPublished;
  }

  /** Whether there is something to take. */
  get hasWork(): boolean {
    return this.#u16(this.#place.available + 2) !== this.last;
  }

  #walk(head: number): { readable: NaiveBuffer[]; writable: NaiveBuffer[] } | null {
    const readable: NaiveBuffer[] = [];
    const writable: NaiveBuffer[] = [];
    const visited = new Set<string>();
    let total = 0n;
    let table: bigint | null = null;
    let count = this.#place.size;
    let index = head;
    for (;;) {
      const id = `${table ?? 'ring'}:${index}`;
      // In memory that stands still, to come by twice is to come by for ever.
      if (visited.has(id) || visited.size > 100_000) return null;
      visited.add(id);
      const at = table === null ? BigInt(this.#place.descriptors) + 16n * BigInt(index) : table + 16n * BigInt(index);
      const bytes = this.#bytes(at, 16n);
      if (bytes === null) return null;
      const address = bytes.readBigUInt64LE(0);
      const length = BigInt(bytes.readUInt32LE(8));
      const flags = bytes.readUInt16LE(12);
      const next = bytes.readUInt16LE(14);
      const [hasNext, isWritable, isIndirect] = [(flags & 1) !== 0, (flags & 2) !== 0, (flags & 4) !== 0];
      // Beyond what is counted exactly nothing is accepted, not even of no length.
      if (address >= 2n ** 53n) return null;
      if (isIndirect) {
        if (table !== null || hasNext || length === 0n || length % 16n !== 0n) return null;
        if (length > 16n * BigInt(this.#indirectMax) || this.#bytes(address, length) === null) return null;
        table = address;
        count = Number(length / 16n);
        index = 0;
        continue;
      }
      if (!isWritable && writable.length > 0) return null;
      if (length > 0n) {
        total += length;
        if (total > 2n ** 32n || !this.#isMapped(address, length)) return null;
        (isWritable ? writable : readable).push([address, length]);
      }
      if (!hasNext) return { readable, writable };
      if (next >= count) return null;
      index = next;
    }
  }

  #isMapped(address: bigint, length: bigint): boolean {
    let at = address;
    const end = address + length;
    while (at < end) {
      const region = this.#memory.regions.find(
        (r) => at >= BigInt(r.guestAddress) && at < BigInt(r.guestAddress) + BigInt(r.sizeBytes),
      );
      if (region === undefined) return false;
      at = BigInt(region.guestAddress) + BigInt(region.sizeBytes);
    }
    return true;
  }

  #bytes(address: bigint, length: bigint): Buffer | null {
    if (!this.#isMapped(address, length)) return null;
    return Buffer.from(
      Array.from({ length: Number(length) }, (_, i) => this.#memory.bytes(Number(address) + i, 1)[0]!),
    );
  }

  #u16(address: number): number {
    return this.#memory.bytes(address, 2).readUInt16LE(0);
  }
}

/** Entries from one 16-bit index to another. */
function distance(from: number, to: number): number {
  return (to - from + 65536) % 65536;
}
