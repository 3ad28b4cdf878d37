/**
 * Rings for crash tests: a driver that can be copied, on a few KiB of memory that can be copied too, so that a test can stop the
 * world at any store of the device and go on from there as often as it likes. Guest memory and in-flight region lie side by side.
 *
 * A request is a chain of one to three buffers; the address of the first names the request.
 */
import { Arena } from '../../native/index.js';
import type { GuestMemory } from '../../src/vhost-user/guest-memory.js';
import { PackedInflight } from '../../src/vhost-user/packed-inflight.js';
import { PackedVirtqueue } from '../../src/vhost-user/packed-virtqueue.js';
import { SplitInflight } from '../../src/vhost-user/split-inflight.js';
import { SplitVirtqueue } from '../../src/vhost-user/split-virtqueue.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import { watchedMemory } from './watched-memory.js';
import type { Watcher } from './watched-memory.js';

export const RING_SIZE = 8;
const DATA_ADDRESS = 0x10_0000;
const NAMES = 4096;
const PIECE_BYTES = 16;
const NEXT = 1;

// In bytes from the start.
const AVAILABLE_AT = 0x400;
const USED_AT = 0x500;
const REGION_AT = 0x800;
export const WORLD_BYTES = 0x1000;

/** A request that the device has not answered, as far as the driver has seen. */
export interface Offered {
  readonly name: number;
  readonly descriptors: readonly number[];
}

/** All that the driver knows, plain data. */
export interface DriverState {
  /** By head, or by buffer id; in the order in which they were offered. */
  outstanding: Map<number, Offered>;
  /** Names, each as often as it was answered. */
  answered: number[];
  nextName: number;
  available: number;
  used: number;
}

function copyOf(state: DriverState): DriverState {
  return { ...state, outstanding: new Map(state.outstanding), answered: [...state.answered] };
}

let arena: Arena | undefined;

export abstract class CrashRing {
  state: DriverState = { outstanding: new Map(), answered: [], nextName: 0, available: 0, used: 0 };
  protected readonly bytes: Buffer;
  protected readonly at: number;
  protected readonly memory: GuestMemory;

  constructor() {
    arena ??= new Arena(2 ** 31);
    const shared = arena;
    this.at = shared.allocate(WORLD_BYTES);
    this.bytes = Buffer.from(shared.buffer, this.at, WORLD_BYTES);
    // Names are all that is ever done with data, so every address is one of memory.
    this.memory = {
      arena: shared,
      place: () => true,
    } as unknown as GuestMemory;
  }

  /** Device on the memory as it is, told where to go on as QEMU tells it after the one before died. */
  abstract start(watcher?: Watcher): Virtqueue;
  /** Makes one more request available. False when there is no room. */
  abstract offer(pieces: number): boolean;
  /** Takes what the device answered. */
  abstract takeUsed(): void;

  /** What a chain is, by the address of its first buffer. */
  static nameOf(address: number): number {
    return (address - DATA_ADDRESS) / PIECE_BYTES;
  }

  copy(): { bytes: Buffer; state: DriverState } {
    return { bytes: Buffer.from(this.bytes), state: copyOf(this.state) };
  }

  restore(copy: { bytes: Buffer; state: DriverState }): void {
    copy.bytes.copy(this.bytes);
    this.state = copyOf(copy.state);
  }

  close(): void {
    arena!.release(this.at);
  }

  protected watched(watcher: Watcher | undefined): GuestMemory {
    return watcher === undefined ? this.memory : watchedMemory(this.memory, watcher);
  }

  protected get regionAt(): number {
    return this.at + REGION_AT;
  }

  protected address(name: number): number {
    return DATA_ADDRESS + (name % NAMES) * PIECE_BYTES;
  }
}

export class SplitCrashRing extends CrashRing {
  #free(): number[] {
    const taken = new Set([...this.state.outstanding.values()].flatMap(({ descriptors }) => descriptors));
    return Array.from({ length: RING_SIZE }, (_, i) => i).filter((i) => !taken.has(i));
  }

  start(watcher?: Watcher): Virtqueue {
    const memory = this.watched(watcher);
    const tracking = new SplitInflight(memory.arena, this.regionAt, RING_SIZE);
    const place = {
      size: RING_SIZE,
      descriptors: this.at,
      available: this.at + AVAILABLE_AT,
      used: this.at + USED_AT,
    };
    return new SplitVirtqueue(memory, place, this.bytes.readUInt16LE(USED_AT + 2), false, false, tracking);
  }

  offer(pieces: number): boolean {
    const descriptors = this.#free().slice(0, pieces);
    if (descriptors.length < pieces) return false;
    const name = this.state.nextName++ % NAMES;
    descriptors.forEach((index, i) => {
      const isLast = i === pieces - 1;
      this.bytes.writeBigUInt64LE(BigInt(this.address(name) + i), 16 * index);
      this.bytes.writeUInt32LE(1, 16 * index + 8);
      this.bytes.writeUInt16LE(isLast ? 0 : NEXT, 16 * index + 12);
      this.bytes.writeUInt16LE(isLast ? 0 : descriptors[i + 1]!, 16 * index + 14);
    });
    const head = descriptors[0]!;
    this.bytes.writeUInt16LE(head, AVAILABLE_AT + 4 + 2 * (this.state.available % RING_SIZE));
    this.state.available = (this.state.available + 1) & 0xffff;
    this.bytes.writeUInt16LE(this.state.available, AVAILABLE_AT + 2);
    this.state.outstanding.set(head, { name, descriptors });
    return true;
  }

  takeUsed(): void {
    while (this.bytes.readUInt16LE(USED_AT + 2) !== this.state.used) {
      const head = this.bytes.readUInt32LE(USED_AT + 4 + 8 * (this.state.used % RING_SIZE));
      const request = this.state.outstanding.get(head);
      if (request === undefined) throw new Error(`the device used ${head}, which is not in flight`);
      this.state.outstanding.delete(head);
      this.state.answered.push(request.name);
      this.state.used = (this.state.used + 1) & 0xffff;
    }
  }
}

const DRIVER_EVENT_AT = AVAILABLE_AT;
const DEVICE_EVENT_AT = USED_AT;
const AVAIL = 1 << 7;
const USED = 1 << 15;
const LAP_MASK = 0xffff;

/** Positions count descriptors from the start of the ring, through 16 bits: the ring's size divides that. */
export class PackedCrashRing extends CrashRing {
  start(watcher?: Watcher): Virtqueue {
    const memory = this.watched(watcher);
    const tracking = new PackedInflight(memory.arena, this.regionAt, RING_SIZE);
    const place = {
      size: RING_SIZE,
      descriptors: this.at,
      available: this.at + DRIVER_EVENT_AT,
      used: this.at + DEVICE_EVENT_AT,
    };
    // QEMU knows no better after the device has died: what it was told first, both at 0 with their wrap counters at 1.
    return new PackedVirtqueue(memory, place, 0x8000_8000, false, true, tracking);
  }

  offer(pieces: number): boolean {
    const { outstanding, available, used } = this.state;
    if (((available - used) & LAP_MASK) + pieces > RING_SIZE) return false;
    let id = 0;
    // Any 16 bits will do.
    while (outstanding.has(idOf(id))) id++;
    const name = this.state.nextName++ % NAMES;
    const descriptors = Array.from({ length: pieces }, (_, i) => (available + i) & LAP_MASK);
    // The first is made available last.
    for (const [i, position] of [...descriptors.entries()].reverse()) {
      const at = 16 * (position % RING_SIZE);
      const wrap = wrapOf(position);
      this.bytes.writeBigUInt64LE(BigInt(this.address(name) + i), at);
      this.bytes.writeUInt32LE(1, at + 8);
      this.bytes.writeUInt16LE(i === pieces - 1 ? idOf(id) : 0, at + 12);
      this.bytes.writeUInt16LE((wrap === 1 ? AVAIL : USED) | (i === pieces - 1 ? 0 : NEXT), at + 14);
    }
    this.state.available = (available + pieces) & LAP_MASK;
    outstanding.set(idOf(id), { name, descriptors });
    return true;
  }

  takeUsed(): void {
    for (;;) {
      const at = 16 * (this.state.used % RING_SIZE);
      const flags = this.bytes.readUInt16LE(at + 14) & (AVAIL | USED);
      if (flags !== (wrapOf(this.state.used) === 1 ? AVAIL | USED : 0)) return;
      const id = this.bytes.readUInt16LE(at + 12);
      const request = this.state.outstanding.get(id);
      if (request === undefined) throw new Error(`the device used ${id}, which is not in flight`);
      this.state.outstanding.delete(id);
      this.state.answered.push(request.name);
      this.state.used = (this.state.used + request.descriptors.length) & LAP_MASK;
    }
  }
}

function wrapOf(position: number): number {
  return Math.floor(position / RING_SIZE) % 2 === 0 ? 1 : 0;
}

function idOf(i: number): number {
  return (i * 257) & 0xffff;
}
