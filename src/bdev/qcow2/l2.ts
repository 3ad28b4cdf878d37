/**
 * L2 entries: what a piece of the disk is, looked up in a slice of a table. Pure: no I/O is done here.
 *
 *     standard    63 copied (refcount is 1) | 62 compressed (0) | 9..55 host offset | 0 reads as zeroes (not with subclusters)
 *     compressed  62 (1) | x..61 additional sectors of 512 bytes | 0..x-1 host offset in bytes, x = 62 - (cluster_bits - 8)
 *     subclusters a second word: 32..63 subcluster reads as zeroes | 0..31 subcluster is allocated
 *
 * Entries are kept as they are on disk, big endian, in 32-bit words.
 */
import type { Geometry } from './geometry.js';
import { SUBCLUSTERS } from './geometry.js';

/** What a piece of the disk is. */
export const Mapped = {
  /** Whatever the backing file holds, zeroes without one. */
  unallocated: 0,
  zero: 1,
  /** In the file, or in the external data file. */
  data: 2,
  compressed: 3,
} as const;
export type Mapped = (typeof Mapped)[keyof typeof Mapped];

export const ENTRY_COPIED = 0x80000000;
export const ENTRY_COMPRESSED = 0x40000000;
export const ENTRY_ZERO = 1;
const HOST_HIGH_MASK = 0x00ffffff;
const HOST_LOW_MASK = 0xfffffe00;
const WORD = 2 ** 32;
/** Gives a field that changes double representation from the start. */
const DOUBLE = 0.5;
export const SECTOR_BYTES = 512;

/** A look-up: what is asked, and the answer. Made once, used for ever; offsets as arguments of calls would be boxed. */
export class Extent {
  /** Where on the disk. */
  offsetBytes = DOUBLE;
  /** How much is asked for: at least 1. */
  wantedBytes = DOUBLE;
  kind: Mapped = Mapped.unallocated;
  /** Bytes of the same kind; for data they are contiguous in the file, too. */
  lengthBytes = DOUBLE;
  /** Where the first byte lies: data; where the descriptor points: compressed. */
  hostOffset = DOUBLE;
  /** Host cluster of the first byte, -1 when it has none. A zero may have one. */
  hostCluster = DOUBLE;
  /** The refcount of the host cluster is 1: it may be written where it is. */
  isCopied = false;
  /** Bytes in the file that hold the compressed data: up to the end of its last sector. */
  compressedBytes = DOUBLE;
}

export function swap32(word: number): number {
  return ((word << 24) | ((word & 0xff00) << 8) | ((word >>> 8) & 0xff00) | (word >>> 24)) >>> 0;
}

/**
 * Looks up what `extent` asks for.
 * @param words where the slice is, from `base` on; what is beyond it is not looked at
 */
export function lookUp(geometry: Geometry, words: Uint32Array, base: number, extent: Extent): void {
  const { clusterBytes, entryWords } = geometry;
  const lengthBytes = extent.wantedBytes;
  const cluster = Math.floor(extent.offsetBytes * geometry.perClusterByte);
  const inCluster = extent.offsetBytes - cluster * clusterBytes;
  let index = cluster % geometry.clustersPerSlice;
  let at = base + index * entryWords;
  const high = swap32(words[at]!);
  const low = swap32(words[at + 1]!);
  if ((high & ENTRY_COMPRESSED) !== 0) {
    readDescriptor(geometry, high, low, extent);
    extent.lengthBytes = Math.min(lengthBytes, clusterBytes - inCluster);
    return;
  }
  const host = (high & HOST_HIGH_MASK) * WORD + ((low & HOST_LOW_MASK) >>> 0);
  extent.isCopied = (high & ENTRY_COPIED) !== 0;
  const hasHost = host !== 0 || (geometry.hasExternalData && extent.isCopied);
  extent.hostCluster = hasHost ? host : -1;
  extent.hostOffset = host + inCluster;
  const kind = geometry.isExtended ? kindOfUnit(geometry, words, at, inCluster, hasHost) : kindOf(low, hasHost);
  extent.kind = kind;
  let found = geometry.isExtended ? unitsAlike(geometry, words, at, inCluster, kind) : clusterBytes - inCluster;
  // What follows in the slice and is of the same kind, and where that matters next to it.
  let nextHost = host + clusterBytes;
  let isWhole = found === clusterBytes - inCluster;
  while (isWhole && found < lengthBytes && ++index < geometry.clustersPerSlice) {
    at += entryWords;
    const nextHigh = swap32(words[at]!);
    const nextLow = swap32(words[at + 1]!);
    if ((nextHigh & ENTRY_COMPRESSED) !== 0 || ((nextHigh & ENTRY_COPIED) !== 0) !== extent.isCopied) break;
    const itsHost = (nextHigh & HOST_HIGH_MASK) * WORD + ((nextLow & HOST_LOW_MASK) >>> 0);
    if (hasHost ? itsHost !== nextHost : itsHost !== 0) break;
    nextHost += clusterBytes;
    if (geometry.isExtended) {
      if (kindOfUnit(geometry, words, at, 0, hasHost) !== kind) break;
      const more = unitsAlike(geometry, words, at, 0, kind);
      found += more;
      isWhole = more === clusterBytes;
    } else {
      if (kindOf(nextLow, hasHost) !== kind) break;
      found += clusterBytes;
    }
  }
  extent.lengthBytes = Math.min(found, lengthBytes);
}

function kindOf(low: number, hasHost: boolean): Mapped {
  if ((low & ENTRY_ZERO) !== 0) return Mapped.zero;
  return hasHost ? Mapped.data : Mapped.unallocated;
}

function kindOfUnit(geometry: Geometry, words: Uint32Array, at: number, inCluster: number, hasHost: boolean): Mapped {
  const bit = 1 << Math.floor(inCluster / geometry.unitBytes);
  if ((swap32(words[at + 2]!) & bit) !== 0) return Mapped.zero;
  return hasHost && (swap32(words[at + 3]!) & bit) !== 0 ? Mapped.data : Mapped.unallocated;
}

/** Bytes from `inCluster` to the end of the subclusters that are of the same kind. */
function unitsAlike(geometry: Geometry, words: Uint32Array, at: number, inCluster: number, kind: Mapped): number {
  const { unitBytes } = geometry;
  const zeroes = swap32(words[at + 2]!);
  const allocated = swap32(words[at + 3]!);
  let unit = Math.floor(inCluster / unitBytes);
  while (++unit < SUBCLUSTERS) {
    const bit = 1 << unit;
    const its = (zeroes & bit) !== 0 ? Mapped.zero : (allocated & bit) !== 0 ? Mapped.data : Mapped.unallocated;
    if (its !== kind) break;
  }
  return unit * unitBytes - inCluster;
}

function readDescriptor(geometry: Geometry, high: number, low: number, extent: Extent): void {
  // The offset has 49 to 61 bits, of which 32 are in the low word.
  const offsetBits = geometry.compressedOffsetBits - 32;
  const payload = high & 0x3fffffff;
  const offset = (payload & (2 ** offsetBits - 1)) * WORD + low;
  const sectors = (payload >>> offsetBits) + 1;
  extent.kind = Mapped.compressed;
  extent.isCopied = false;
  extent.hostCluster = -1;
  extent.hostOffset = offset;
  extent.compressedBytes = sectors * SECTOR_BYTES - (offset % SECTOR_BYTES);
}

/** What one entry says of its host clusters, for whoever changes or checks it. */
export function hostOf(words: Uint32Array, at: number): number {
  return (swap32(words[at]!) & HOST_HIGH_MASK) * WORD + ((swap32(words[at + 1]!) & HOST_LOW_MASK) >>> 0);
}

/**
 * Writes an entry for a host cluster of its own, or for none.
 * @param host 0: none
 */
export function writeEntry(words: Uint32Array, at: number, host: number, isCopied: boolean, isZero: boolean): void {
  words[at] = swap32(((isCopied ? ENTRY_COPIED : 0) | Math.floor(host / WORD)) >>> 0);
  words[at + 1] = swap32(((host % WORD) | (isZero ? ENTRY_ZERO : 0)) >>> 0);
}

/** Bits of the subclusters that a range of a cluster touches. */
export function unitBits(geometry: Geometry, inCluster: number, lengthBytes: number): number {
  const from = Math.floor(inCluster / geometry.unitBytes);
  const to = Math.ceil((inCluster + lengthBytes) / geometry.unitBytes);
  const width = to - from;
  return width >= SUBCLUSTERS ? 0xffffffff : (((1 << width) - 1) << from) >>> 0;
}

/** Marks subclusters as allocated, or as zero, or as neither. */
export function writeUnits(words: Uint32Array, at: number, bits: number, kind: Mapped): void {
  const allocated = swap32(words[at + 3]!);
  const zeroes = swap32(words[at + 2]!);
  words[at + 3] = swap32((kind === Mapped.data ? allocated | bits : allocated & ~bits) >>> 0);
  words[at + 2] = swap32((kind === Mapped.zero ? zeroes | bits : zeroes & ~bits) >>> 0);
}

/**
 * Why an entry of an image cannot be used, or null. What it points at is checked by whoever knows the file.
 */
export function entryProblem(geometry: Geometry, words: Uint32Array, at: number): string | null {
  const high = swap32(words[at]!);
  const low = swap32(words[at + 1]!);
  if ((high & ENTRY_COMPRESSED) !== 0) {
    if (geometry.hasExternalData) return 'is compressed, with an external data file';
    if ((high & ENTRY_COPIED) !== 0) return 'is compressed and has bit 63';
    if (geometry.isExtended && (words[at + 2] !== 0 || words[at + 3] !== 0)) return 'is compressed and has subclusters';
    return null;
  }
  const host = hostOf(words, at);
  if (host % geometry.clusterBytes !== 0) return `points at ${host}, not the start of a cluster`;
  if ((high & HOST_HIGH_MASK) > 0x1fffff) return 'points beyond 2^53';
  if ((low & ENTRY_ZERO) !== 0) {
    if (geometry.version < 3) return 'reads as zeroes, in an image of version 2';
    if (geometry.isExtended) return 'has bit 0, with subclusters';
  }
  if (geometry.isExtended) {
    if ((words[at + 2]! & words[at + 3]!) !== 0) return 'has subclusters that are allocated and read as zeroes';
    if (host === 0 && words[at + 3] !== 0 && !(geometry.hasExternalData && (high & ENTRY_COPIED) !== 0)) {
      return 'has subclusters that are allocated, and no host cluster';
    }
  }
  return null;
}

/** Takes note of clusters that lost a reference. */
export interface Dropped {
  add(cluster: number, count: number): void;
}

/** Tells which host clusters an entry refers to. */
export function readHosts(geometry: Geometry, words: Uint32Array, at: number, dropped: Dropped): void {
  if (geometry.hasExternalData) return;
  const high = swap32(words[at]!);
  if ((high & ENTRY_COMPRESSED) === 0) {
    const host = hostOf(words, at);
    if (host !== 0) dropped.add(host / geometry.clusterBytes, 1);
    return;
  }
  const offsetBits = geometry.compressedOffsetBits - 32;
  const payload = high & 0x3fffffff;
  const offset = (payload & (2 ** offsetBits - 1)) * WORD + swap32(words[at + 1]!);
  const end = Math.floor(offset / SECTOR_BYTES) * SECTOR_BYTES + ((payload >>> offsetBits) + 1) * SECTOR_BYTES;
  const first = Math.floor(offset / geometry.clusterBytes);
  dropped.add(first, Math.ceil(end / geometry.clusterBytes) - first);
}
