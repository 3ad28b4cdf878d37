/**
 * Memory of a guest: regions backed by memfds of their own, mapped into an arena, with three addresses for each byte as
 * in a real virtual machine: the guest's (in descriptors), the front-end's (in ring addresses and the memory table), and
 * ours (an arena offset). No two of them are alike, so that a mix-up shows.
 *
 * Invariant: a range is handed out at most once until it is freed.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { u64 } from './protocol.js';

export interface RegionOptions {
  readonly guestAddress: number;
  readonly sizeBytes: number;
  /** Where the front-end claims to have it mapped. */
  readonly userAddress?: number;
  /** Where in its memfd the region begins. */
  readonly mmapOffset?: number;
}

const PAGE_BYTES = 4096;
const USER_ADDRESS_OF_GUEST_ADDRESS_0 = 0x7e00_0000_0000;
const MIB = 2 ** 20;

/** Two regions: rings live in the low one, data beyond 4 GiB, at an offset in its file. */
export const DEFAULT_REGIONS: readonly RegionOptions[] = [
  { guestAddress: MIB, sizeBytes: 4 * MIB },
  { guestAddress: 0x1_4000_0000, sizeBytes: 32 * MIB, mmapOffset: 16 * PAGE_BYTES },
];

export class Region {
  readonly guestAddress: number;
  readonly sizeBytes: number;
  readonly userAddress: number;
  readonly mmapOffset: number;
  /** memfd of mmapOffset + sizeBytes. */
  readonly fd: number;
  readonly arenaOffset: number;
  readonly #arena: Arena;
  /** Free ranges, by address, never adjacent: [from, to). */
  #free: { from: number; to: number }[];
  readonly #used = new Map<number, number>();

  constructor(arena: Arena, options: RegionOptions) {
    this.guestAddress = options.guestAddress;
    this.sizeBytes = options.sizeBytes;
    this.userAddress = options.userAddress ?? USER_ADDRESS_OF_GUEST_ADDRESS_0 + options.guestAddress;
    this.mmapOffset = options.mmapOffset ?? 0;
    this.#arena = arena;
    this.fd = check(native.memfdCreate('guest', this.mmapOffset + this.sizeBytes), 'make guest memory');
    this.arenaOffset = arena.mapFile(this.fd, this.mmapOffset, this.sizeBytes);
    this.#free = [{ from: this.guestAddress, to: this.guestAddress + this.sizeBytes }];
  }

  contains(guestAddress: number, lengthBytes: number): boolean {
    return guestAddress >= this.guestAddress && guestAddress + lengthBytes <= this.guestAddress + this.sizeBytes;
  }

  /** {guest address, size, user address, mmap offset} as messages carry it. */
  describe(): Buffer {
    return Buffer.concat([u64(this.guestAddress), u64(this.sizeBytes), u64(this.userAddress), u64(this.mmapOffset)]);
  }

  /** @returns guest address, or -1 when there is no room */
  allocate(lengthBytes: number, alignmentBytes: number): number {
    for (const [i, range] of this.#free.entries()) {
      const from = Math.ceil(range.from / alignmentBytes) * alignmentBytes;
      const to = from + lengthBytes;
      if (to > range.to) continue;
      const rest = [
        { from: range.from, to: from },
        { from: to, to: range.to },
      ];
      this.#free.splice(i, 1, ...rest.filter((r) => r.from < r.to));
      this.#used.set(from, to);
      return from;
    }
    return -1;
  }

  free(guestAddress: number): void {
    const to = this.#used.get(guestAddress);
    if (to === undefined) throw new Error(`guest memory: ${guestAddress} is not in use`);
    this.#used.delete(guestAddress);
    const sorted = [...this.#free, { from: guestAddress, to }].sort((a, b) => a.from - b.from);
    this.#free = sorted.reduce<{ from: number; to: number }[]>((merged, range) => {
      const last = merged.at(-1);
      if (last?.to === range.from) last.to = range.to;
      else merged.push(range);
      return merged;
    }, []);
  }

  close(): void {
    this.#arena.release(this.arenaOffset);
    native.fileClose(this.fd);
  }
}

export class DriverMemory {
  readonly arena: Arena;
  /** Those of the start, and those added since. */
  regions: readonly Region[];
  /** Where rings go unless told otherwise: the first region. */
  readonly ringRegion: Region;
  /** Where data goes unless told otherwise: the last region of the start. */
  readonly dataRegion: Region;

  constructor(arena: Arena, regions: readonly RegionOptions[] = DEFAULT_REGIONS) {
    this.arena = arena;
    this.regions = regions.map((options) => new Region(arena, options));
    this.ringRegion = this.regions[0]!;
    this.dataRegion = this.regions.at(-1)!;
  }

  /** @returns guest address. Throws when there is no room. */
  allocate(lengthBytes: number, alignmentBytes = 16, region = this.dataRegion): number {
    const address = region.allocate(Math.max(1, lengthBytes), alignmentBytes);
    if (address < 0) throw new Error(`guest memory: no room for ${lengthBytes} bytes`);
    return address;
  }

  free(guestAddress: number): void {
    this.#region(guestAddress, 1).free(guestAddress);
  }

  /** The bytes at a guest address, live. */
  bytes(guestAddress: number, lengthBytes: number): Buffer {
    return Buffer.from(this.arena.buffer, this.arenaOffset(guestAddress, lengthBytes), lengthBytes);
  }

  arenaOffset(guestAddress: number, lengthBytes = 1): number {
    const region = this.#region(guestAddress, lengthBytes);
    return region.arenaOffset + guestAddress - region.guestAddress;
  }

  userAddress(guestAddress: number): number {
    const region = this.#region(guestAddress, 1);
    return region.userAddress + guestAddress - region.guestAddress;
  }

  /** Address in this process. */
  absoluteAddress(guestAddress: number, lengthBytes = 1): number {
    return this.arena.baseAddress + this.arenaOffset(guestAddress, lengthBytes);
  }

  addRegion(options: RegionOptions): Region {
    const region = new Region(this.arena, options);
    this.regions = [...this.regions, region];
    return region;
  }

  /** Unmaps a region that nothing of is in use. The back-end has to be told apart from this. */
  removeRegion(region: Region): void {
    this.regions = this.regions.filter((other) => other !== region);
    region.close();
  }

  /** Afterwards every access by address throws. */
  close(): void {
    for (const region of this.regions) region.close();
    this.regions = [];
  }

  #region(guestAddress: number, lengthBytes: number): Region {
    const region = this.regions.find((r) => r.contains(guestAddress, lengthBytes));
    if (region === undefined) throw new Error(`guest memory: nothing at ${guestAddress} (${lengthBytes} bytes)`);
    return region;
  }
}
