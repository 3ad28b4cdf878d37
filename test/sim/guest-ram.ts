/**
 * Memory of the simulated guest: two regions that meet in guest addresses and nowhere else, and one far away that comes and goes
 * while the guest runs.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { u64 } from '../frontend/protocol.js';

export interface RamRegion {
  readonly fd: number;
  readonly guestAddress: number;
  readonly userAddress: number;
  readonly sizeBytes: number;
  readonly arenaOffset: number;
}

const GUEST_START = 0x1_0000_0000;
/** As the front-end claims to have them mapped. */
const USER_STARTS = [0x7e00_0000_0000, 0x7d00_0000_0000];
const EXTRA_GUEST_START = 0x9_0000_0000;
const EXTRA_USER_START = 0x7f00_0000_0000;
const PAGE_BYTES = 4096;

export class GuestRam {
  /** The one that comes and goes. */
  readonly extra: RamRegion;
  /** It is there. */
  isPlugged = false;
  readonly #fixed: readonly RamRegion[];
  readonly #arena: Arena;
  #free = GUEST_START;
  #freeExtra = EXTRA_GUEST_START;

  constructor(arena: Arena, sizes: readonly number[], extraBytes: number) {
    this.#arena = arena;
    let guestAddress = GUEST_START;
    this.#fixed = sizes.map((bytes, i) => {
      const region = this.#makeRegion(bytes, guestAddress, USER_STARTS[i]!);
      guestAddress += region.sizeBytes;
      return region;
    });
    this.extra = this.#makeRegion(extraBytes, EXTRA_GUEST_START, EXTRA_USER_START);
  }

  /** What the daemon is to know of. */
  get regions(): readonly RamRegion[] {
    return this.isPlugged ? [...this.#fixed, this.extra] : this.#fixed;
  }

  /** Hands out memory, for good. @returns guest address */
  allocate(lengthBytes: number, alignment: number): number {
    const address = Math.ceil(this.#free / alignment) * alignment;
    this.#free = address + lengthBytes;
    return address;
  }

  /** Hands out memory of the extra region. */
  allocateExtra(lengthBytes: number): number {
    const address = this.#freeExtra;
    this.#freeExtra += lengthBytes;
    return address;
  }

  /** A view of a range in one region. */
  view16(address: number, count: number): Uint16Array {
    return this.#arena.view16(this.#offset(address), count);
  }

  view32(address: number, count: number): Uint32Array {
    return this.#arena.view32(this.#offset(address), count);
  }

  write(address: number, bytes: Uint8Array): void {
    this.#pieces(address, bytes.length, (memory, at) => memory.set(bytes.subarray(at, at + memory.length)));
  }

  read(address: number, bytes: Uint8Array): void {
    this.#pieces(address, bytes.length, (memory, at) => bytes.set(memory, at));
  }

  fill(address: number, lengthBytes: number, value: number): void {
    this.#pieces(address, lengthBytes, (memory) => memory.fill(value));
  }

  userAddress(address: number): number {
    const region = this.#region(address);
    return region.userAddress + address - region.guestAddress;
  }

  /** {guest address, size, user address, mmap offset} of a region, as messages carry it. */
  describe(region: RamRegion): Buffer {
    return Buffer.concat([u64(region.guestAddress), u64(region.sizeBytes), u64(region.userAddress), u64(0)]);
  }

  close(): void {
    for (const region of [...this.#fixed, this.extra]) {
      this.#arena.release(region.arenaOffset);
      native.fileClose(region.fd);
    }
  }

  #makeRegion(bytes: number, guestAddress: number, userAddress: number): RamRegion {
    const sizeBytes = Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
    const fd = check(native.memfdCreate('sim-guest', sizeBytes), 'make guest memory');
    return { fd, guestAddress, userAddress, sizeBytes, arenaOffset: this.#arena.mapFile(fd, 0, sizeBytes) };
  }

  #pieces(address: number, lengthBytes: number, use: (memory: Uint8Array, at: number) => void): void {
    for (let at = 0; at < lengthBytes;) {
      const region = this.#region(address + at);
      const length = Math.min(lengthBytes - at, region.guestAddress + region.sizeBytes - address - at);
      use(this.#arena.view8(this.#offset(address + at), length), at);
      at += length;
    }
  }

  #offset(address: number): number {
    const region = this.#region(address);
    return region.arenaOffset + address - region.guestAddress;
  }

  #region(address: number): RamRegion {
    if (address >= EXTRA_GUEST_START) return this.extra;
    const region = this.#fixed.find((r) => address >= r.guestAddress && address < r.guestAddress + r.sizeBytes);
    if (region === undefined) throw new Error(`guest memory: nothing at ${address}`);
    return region;
  }
}
