/**
 * The guest's memory: regions mapped into the arena, and translation of guest addresses.
 *
 * Invariants
 * - Regions never overlap, neither in guest nor in user addresses; each lies within its file when it is mapped.
 * - A translation covers every byte of [address, address + length) or fails (CVE-2018-1059).
 * - A translation of a user address keeps its alignment, up to ALIGNMENT_BYTES.
 * - A region is unmapped only when no request points into it: the session drains first.
 */
import type { Arena } from '../../native/index.js';
import type { MemoryRange, MemoryRanges } from '../poller/memory-ranges.js';
import { CHAIN_SEGMENTS_MAX } from './descriptor-chain.js';
import type { DescriptorChain } from './descriptor-chain.js';
import { MEM_SLOTS_MAX, ProtocolError } from './protocol.js';
import type { RegionDescription } from './protocol.js';
import { mapSharedFile } from './shared-mapping.js';

interface Region extends RegionDescription {
  readonly mappingOffset: number;
  /** Arena offset of the region's first byte. */
  readonly arenaOffset: number;
  readonly range: MemoryRange;
}

/** End of the highest region: any address in one, plus the length of any buffer, is an exact number. */
export const ADDRESS_MAX = 2 ** 52;
/** The most that a part of a ring asks for. */
const ALIGNMENT_BYTES = 16;

export class GuestMemory {
  readonly arena: Arena;
  readonly #ranges: MemoryRanges;
  /** Sorted by guest address; the arrays below mirror it. */
  #regions: Region[] = [];
  readonly #starts = new Float64Array(MEM_SLOTS_MAX);
  readonly #ends = new Float64Array(MEM_SLOTS_MAX);
  /** By region: what to add to a guest address of it for the arena offset. */
  readonly shifts = new Float64Array(MEM_SLOTS_MAX);
  #count = 0;
  /** Region of the latest hit: requests come in neighbourhoods. */
  #last = 0;

  constructor(arena: Arena, ranges: MemoryRanges) {
    this.arena = arena;
    this.#ranges = ranges;
  }

  get regionCount(): number {
    return this.#count;
  }

  get sizeBytes(): number {
    return this.#regions.reduce((sum, region) => sum + region.sizeBytes, 0);
  }

  /**
   * Arena offset of a guest range, or -1 when any byte of it is not in one region. A range over adjacent regions is
   * to be taken in steps: see `contiguousAt`.
   */
  translate(guestAddress: number, lengthBytes: number): number {
    let at = this.#last;
    if (!(guestAddress >= this.#starts[at]! && guestAddress < this.#ends[at]!)) {
      at = this.#find(guestAddress);
      if (at < 0) return -1;
      this.#last = at;
    }
    if (guestAddress + lengthBytes > this.#ends[at]!) return -1;
    return guestAddress + this.shifts[at]!;
  }

  /** The region that holds all of entry `at` of a chain whose addresses are still the guest's, or -1. */
  regionOf(chain: DescriptorChain, at: number): number {
    const address = chain.addresses[at]!;
    const end = address + chain.lengths[at]!;
    const last = this.#last;
    if (address >= this.#starts[last]! && end <= this.#ends[last]!) return last;
    let low = 0;
    let high = this.#count - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      if (address < this.#starts[middle]!) high = middle - 1;
      else if (address >= this.#ends[middle]!) low = middle + 1;
      else {
        this.#last = middle;
        return end <= this.#ends[middle]! ? middle : -1;
      }
    }
    return -1;
  }

  /**
   * Turns the guest addresses of a chain into arena offsets; a buffer that spans regions becomes several. False when a
   * buffer is outside of guest memory, or there are more pieces than a chain holds.
   */
  place(chain: DescriptorChain): boolean {
    const { addresses } = chain;
    for (let i = 0; i < chain.count; i++) {
      const region = this.regionOf(chain, i);
      if (region < 0 && !this.#cut(chain, i)) return false;
      addresses[i]! += this.shifts[this.#last]!;
    }
    return true;
  }

  /** Cuts entry `at` of the chain where its region ends. `#last` is that region then. */
  #cut(chain: DescriptorChain, at: number): boolean {
    const { addresses, lengths } = chain;
    const part = this.contiguousAt(addresses[at]!);
    if (part === 0 || chain.count === CHAIN_SEGMENTS_MAX) return false;
    addresses.copyWithin(at + 1, at, chain.count);
    lengths.copyWithin(at + 1, at, chain.count);
    addresses[at + 1]! += part;
    lengths[at + 1]! -= part;
    lengths[at] = part;
    if (at < chain.readableCount) chain.readableCount++;
    chain.count++;
    return this.regionOf(chain, at) >= 0;
  }

  /** Bytes from a guest address to the end of its region; 0 when it is in none. */
  contiguousAt(guestAddress: number): number {
    const at = this.#find(guestAddress);
    return at < 0 ? 0 : this.#ends[at]! - guestAddress;
  }

  /** Arena offset of a range of the front-end's own addresses (where rings are), or -1. Control path. */
  translateUser(userAddress: number, lengthBytes: number): number {
    for (const region of this.#regions) {
      const into = userAddress - region.userAddress;
      if (into >= 0 && into + lengthBytes <= region.sizeBytes) return region.arenaOffset + into;
    }
    return -1;
  }

  /** Whether an arena offset lies in a region. */
  holds(arenaOffset: number): boolean {
    return this.#regionAt(arenaOffset) !== undefined;
  }

  /**
   * Calls `visit` with the guest ranges that an arena range is: one, unless regions happen to meet in the arena. For the
   * dirty log only: it looks through the regions.
   */
  visitGuestRanges(
    arenaOffset: number,
    lengthBytes: number,
    visit: (guestAddress: number, lengthBytes: number) => void,
  ): void {
    while (lengthBytes > 0) {
      const region = this.#regionAt(arenaOffset);
      if (region === undefined) throw new Error(`nothing of the guest is at ${arenaOffset}`);
      const into = arenaOffset - region.arenaOffset;
      const part = Math.min(lengthBytes, region.sizeBytes - into);
      visit(region.guestAddress + into, part);
      arenaOffset += part;
      lengthBytes -= part;
    }
  }

  /**
   * Maps a region. The descriptor is the caller's to close, before or after.
   * Throws ProtocolError for what the front-end did wrong, SystemError when mapping fails.
   */
  add(description: RegionDescription, fd: number): void {
    if (this.#count === MEM_SLOTS_MAX) throw new ProtocolError(`more than ${MEM_SLOTS_MAX} memory regions`);
    this.#checkPlace(description);
    const { sizeBytes, mmapOffset } = description;
    const { mappingOffset, arenaOffset } = mapSharedFile(this.arena, fd, mmapOffset, sizeBytes, 'a memory region');
    const range = { address: arenaOffset, lengthBytes: sizeBytes };
    this.#regions.push({ ...description, mappingOffset, arenaOffset, range });
    this.#mirror();
    this.#ranges.add(range);
  }

  /** Whether `remove` would find it. */
  has(description: RegionDescription): boolean {
    return this.#match(description) >= 0;
  }

  /** Unmaps the region with these addresses and this size. */
  remove(description: RegionDescription): void {
    const at = this.#match(description);
    if (at < 0) throw new ProtocolError('removal of a memory region that is not there');
    this.#unmap(this.#regions[at]!);
    this.#regions.splice(at, 1);
    this.#mirror();
  }

  clear(): void {
    for (const region of this.#regions) this.#unmap(region);
    this.#regions = [];
    this.#mirror();
  }

  #regionAt(arenaOffset: number): Region | undefined {
    return this.#regions.find((r) => arenaOffset >= r.arenaOffset && arenaOffset < r.arenaOffset + r.sizeBytes);
  }

  #match(description: RegionDescription): number {
    return this.#regions.findIndex(
      (r) =>
        r.guestAddress === description.guestAddress &&
        r.userAddress === description.userAddress &&
        r.sizeBytes === description.sizeBytes,
    );
  }

  #unmap(region: Region): void {
    this.#ranges.remove(region.range);
    this.arena.release(region.mappingOffset);
  }

  #checkPlace({ guestAddress, sizeBytes, userAddress, mmapOffset }: RegionDescription): void {
    if (sizeBytes === 0) throw new ProtocolError('a memory region is empty');
    for (const start of [guestAddress, userAddress, mmapOffset]) {
      if (start + sizeBytes > ADDRESS_MAX) throw new ProtocolError('a memory region ends beyond 2^52');
    }
    if ((userAddress - mmapOffset) % ALIGNMENT_BYTES !== 0) {
      throw new ProtocolError('a memory region is aligned otherwise in its file than at its user address');
    }
    for (const other of this.#regions) {
      if (overlap(guestAddress, sizeBytes, other.guestAddress, other.sizeBytes)) {
        throw new ProtocolError('memory regions overlap in guest addresses');
      }
      if (overlap(userAddress, sizeBytes, other.userAddress, other.sizeBytes)) {
        throw new ProtocolError('memory regions overlap in user addresses');
      }
    }
  }

  #mirror(): void {
    this.#regions.sort((a, b) => a.guestAddress - b.guestAddress);
    this.#regions.forEach((region, i) => {
      this.#starts[i] = region.guestAddress;
      this.#ends[i] = region.guestAddress + region.sizeBytes;
      this.shifts[i] = region.arenaOffset - region.guestAddress;
    });
    this.#count = this.#regions.length;
    // An empty slot matches no address.
    this.#starts.fill(Infinity, this.#count);
    this.#ends.fill(-Infinity, this.#count);
    this.#last = 0;
  }

  /** Index of the region that holds an address, or -1. */
  #find(guestAddress: number): number {
    let low = 0;
    let high = this.#count - 1;
    while (low <= high) {
      const middle = (low + high) >>> 1;
      if (guestAddress < this.#starts[middle]!) high = middle - 1;
      else if (guestAddress >= this.#ends[middle]!) low = middle + 1;
      else return middle;
    }
    return -1;
  }
}

function overlap(aStart: number, aLength: number, bStart: number, bLength: number): boolean {
  return aStart < bStart + bLength && bStart < aStart + aLength;
}
