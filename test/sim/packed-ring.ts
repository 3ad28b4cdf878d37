/** The driver's side of a packed virtqueue (VIRTIO 1.2, 2.8). A request's id is its buffer id. */
import { DESCRIPTOR_BYTES, DescriptorFlag } from '../frontend/protocol.js';
import type { DriverRing, Piece, RingParts } from './driver-ring.js';
import type { GuestRam } from './guest-ram.js';

const AVAIL = 1 << 7;
const USED = 1 << 15;
const Event = { enable: 0, disable: 1, descriptor: 2 } as const;
const EVENT_BYTES = 4;
/** Both positions at the start of the first lap, whose wrap counters are 1. */
const BASE_AT_START = 0x8000_8000;
/** Ids are spread over all 16 bits: a device may make nothing of them. */
const ID_STEP = 251;

/** A place in the ring, with the lap's wrap counter. */
interface Position {
  index: number;
  wrap: number;
}

export class PackedRing implements DriverRing {
  readonly size: number;
  readonly parts: RingParts;
  usedId = 0;
  usedBytes = 0;
  base = BASE_AT_START;
  readonly #ram: GuestRam;
  readonly #eventIdx: boolean;
  readonly #descriptors: Uint32Array;
  /** {u16 offset and wrap, u16 flags}: ours, and the device's. */
  readonly #driverEvent: Uint16Array;
  readonly #deviceEvent: Uint16Array;
  readonly #freeIds: number[] = [];
  /** Descriptors in the ring by id. */
  readonly #lengths = new Map<number, number>();
  #free = 0;
  #available: Position = { index: 0, wrap: 1 };
  #published: Position = { index: 0, wrap: 1 };
  #used: Position = { index: 0, wrap: 1 };

  constructor(ram: GuestRam, size: number, eventIdx: boolean) {
    this.size = size;
    this.#ram = ram;
    this.#eventIdx = eventIdx;
    const descriptors = ram.allocate(size * DESCRIPTOR_BYTES, 16);
    const available = ram.allocate(EVENT_BYTES, 4);
    const used = ram.allocate(EVENT_BYTES, 4);
    this.parts = { descriptors, available, used };
    this.#descriptors = ram.view32(descriptors, size * 4);
    this.#driverEvent = ram.view16(available, 2);
    this.#deviceEvent = ram.view16(used, 2);
    this.reset();
  }

  reset(): void {
    this.#descriptors.fill(0);
    this.#driverEvent.fill(0);
    this.#deviceEvent.fill(0);
    this.#lengths.clear();
    this.#freeIds.length = 0;
    for (let i = 0; i < this.size; i++) this.#freeIds.push((i * ID_STEP + 7) & 0xffff);
    this.#free = this.size;
    for (const position of [this.#available, this.#published, this.#used])
      Object.assign(position, { index: 0, wrap: 1 });
    this.base = BASE_AT_START;
  }

  stoppedAt(base: number): boolean {
    this.base = base;
    return (base & 0xffff) === base >>> 16;
  }

  add(pieces: readonly Piece[], tabledFrom: number, tableAddress: number): number {
    const direct = Math.min(tabledFrom, pieces.length);
    const isTabled = direct < pieces.length;
    const count = direct + (isTabled ? 1 : 0);
    if (count > this.#free) return -1;
    const id = this.#freeIds.shift()!;
    this.#free -= count;
    this.#lengths.set(id, count);
    if (isTabled) this.#writeTable(pieces.slice(direct), tableAddress);
    const lengthBytes = (pieces.length - direct) * DESCRIPTOR_BYTES;
    for (let i = 0; i < count; i++) {
      const isTable = i === direct;
      const piece = isTable ? { address: tableAddress, lengthBytes, writable: false } : pieces[i]!;
      const flags =
        (isTable ? DescriptorFlag.indirect : 0) |
        (i + 1 < count ? DescriptorFlag.next : 0) |
        (this.#available.wrap === 1 ? AVAIL : USED);
      describe(this.#descriptors, this.#available.index, piece, id, flags);
      this.#advance(this.#available, 1);
    }
    return id;
  }

  publish(): boolean {
    const before = { ...this.#published };
    Object.assign(this.#published, this.#available);
    const [place, flags] = this.#deviceEvent as unknown as [number, number];
    if ((flags & 3) !== Event.descriptor || !this.#eventIdx) return (flags & 3) !== Event.disable;
    // Is the descriptor that the device waits for among those made available?
    for (; before.index !== this.#available.index || before.wrap !== this.#available.wrap; this.#advance(before, 1)) {
      if (before.index === (place & 0x7fff) && before.wrap === place >>> 15) return true;
    }
    return false;
  }

  get hasUsed(): boolean {
    const flags = this.#descriptors[this.#used.index * 4 + 3]! >>> 16;
    return (flags & (AVAIL | USED)) === (this.#used.wrap === 1 ? AVAIL | USED : 0);
  }

  takeUsed(): boolean {
    if (!this.hasUsed) return false;
    const at = this.#used.index * 4;
    this.usedId = this.#descriptors[at + 3]! & 0xffff;
    this.usedBytes = this.#descriptors[at + 2]!;
    const count = this.#lengths.get(this.usedId);
    // An id that is not in flight: the caller will find that out.
    if (count === undefined) return true;
    this.#lengths.delete(this.usedId);
    this.#freeIds.push(this.usedId);
    this.#free += count;
    this.#advance(this.#used, count);
    return true;
  }

  wantCalls(on: boolean): void {
    const { index, wrap } = this.#used;
    this.#driverEvent[0] = index | (wrap << 15);
    this.#driverEvent[1] = !on ? Event.disable : this.#eventIdx ? Event.descriptor : Event.enable;
  }

  #advance(position: Position, by: number): void {
    position.index += by;
    if (position.index < this.size) return;
    position.index -= this.size;
    position.wrap ^= 1;
  }

  #writeTable(pieces: readonly Piece[], address: number): void {
    const words = new Uint32Array(pieces.length * 4);
    pieces.forEach((piece, i) => describe(words, i, piece, 0, 0));
    this.#ram.write(address, new Uint8Array(words.buffer));
  }
}

function describe(words: Uint32Array, index: number, piece: Piece, id: number, flags: number): void {
  const at = index * 4;
  words[at] = piece.address;
  words[at + 1] = piece.address / 2 ** 32;
  words[at + 2] = piece.lengthBytes;
  words[at + 3] = id + (flags | (piece.writable ? DescriptorFlag.write : 0)) * 2 ** 16;
}
