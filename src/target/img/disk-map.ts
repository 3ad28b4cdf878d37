/**
 * What each part of a disk is, read from the tables of its image and of the images behind it, without their data.
 *
 * Invariants
 * - A table is used after all of its entries were looked at.
 * - What lies beyond the end of a backing image reads as zeroes.
 */
import { ENXIO, SEEK_DATA, SEEK_HOLE, native } from '../../../native/index.js';
import { Geometry } from '../../bdev/qcow2/geometry.js';
import { badImage } from '../../bdev/qcow2/image-error.js';
import { Extent, Mapped, SECTOR_BYTES, entryProblem, lookUp } from '../../bdev/qcow2/l2.js';
import type { OpenImage } from './open-image.js';

/** A part of the disk that is all of one kind. */
export interface DiskExtent {
  readonly start: number;
  readonly lengthBytes: number;
  /** `unallocated` holds nothing in any image of the chain: it reads as zeroes. */
  readonly kind: 'data' | 'compressed' | 'zero' | 'unallocated';
  /** Which image of the chain it is found in, 0 the first; the last one that reaches so far for what is nowhere. */
  readonly depth: number;
  /** Where its data is in the file of that image, or would be; null when it has no place or is compressed. */
  readonly hostOffset: number | null;
}

const OFFSET_HIGH = 0x00ffffff;
const OFFSET_LOW = 0xfffffe00;
const KINDS = {
  [Mapped.unallocated]: 'unallocated',
  [Mapped.zero]: 'zero',
  [Mapped.data]: 'data',
  [Mapped.compressed]: 'compressed',
} as const;

/** One image of a chain. */
class Layer {
  readonly image: OpenImage;
  readonly geometry: Geometry | null;
  readonly #l1: Buffer;
  #words = new Uint32Array(0);
  #loaded = -1;
  readonly #extent = new Extent();

  constructor(image: OpenImage, l1?: { readonly offset: number; readonly entries: number }) {
    this.image = image;
    const { header, file } = image;
    this.geometry = header === null ? null : new Geometry(header);
    this.#l1 = Buffer.alloc((l1?.entries ?? header?.l1Entries ?? 0) * 8);
    if (header !== null) file.readNow(l1?.offset ?? header.l1Offset, this.#l1);
  }

  /** What there is at an offset, for at most so many bytes. Throws BdevError. */
  at(offset: number, wanted: number): Omit<DiskExtent, 'start' | 'depth'> {
    const { geometry } = this;
    const { sizeBytes } = this.image;
    const most = Math.min(wanted, sizeBytes - offset);
    if (geometry === null) return this.#rawAt(offset, most);
    const tableIndex = Math.floor(offset / geometry.tableCoverageBytes);
    const table = this.#tableOffset(tableIndex);
    if (table === 0) {
      const end = (tableIndex + 1) * geometry.tableCoverageBytes;
      return { lengthBytes: Math.min(most, end - offset), kind: 'unallocated', hostOffset: null };
    }
    const slice = Math.floor(offset / geometry.sliceCoverageBytes);
    this.#load(slice, table + (slice % geometry.slicesPerTable) * geometry.sliceBytes);
    const extent = this.#extent;
    extent.offsetBytes = offset;
    extent.wantedBytes = Math.min(most, (slice + 1) * geometry.sliceCoverageBytes - offset);
    lookUp(geometry, this.#words, 0, extent);
    const { kind, lengthBytes, hostOffset } = extent;
    // A zero cluster at 0 has no place, while data may lie there, in an external file.
    const isPlainZero = kind === Mapped.zero && !geometry.isExtended && hostOffset < geometry.clusterBytes;
    const hasHost = kind !== Mapped.compressed && extent.hostCluster >= 0 && !isPlainZero;
    const alikeBytes = isPlainZero ? Math.min(lengthBytes, geometry.clusterBytes - hostOffset) : lengthBytes;
    return { kind: KINDS[kind], lengthBytes: alikeBytes, hostOffset: hasHost ? hostOffset : null };
  }

  /** Data, or a hole that the file system knows of. */
  #rawAt(offset: number, most: number): Omit<DiskExtent, 'start' | 'depth'> {
    const { fd, isDevice } = this.image.file;
    const data = isDevice ? offset : native.fileSeek(fd, offset, SEEK_DATA);
    if (data === -ENXIO || data > offset) {
      const lengthBytes = data === -ENXIO ? most : Math.min(most, data - offset);
      return { lengthBytes, kind: 'zero', hostOffset: offset };
    }
    const hole = isDevice ? -1 : native.fileSeek(fd, offset, SEEK_HOLE);
    return { lengthBytes: hole <= offset ? most : Math.min(most, hole - offset), kind: 'data', hostOffset: offset };
  }

  #tableOffset(index: number): number {
    const at = index * 8;
    if (at >= this.#l1.length) return 0;
    const high = this.#l1.readUInt32BE(at) & OFFSET_HIGH;
    const offset = high * 2 ** 32 + ((this.#l1.readUInt32BE(at + 4) & OFFSET_LOW) >>> 0);
    const { clusterBytes } = this.geometry!;
    if (offset % clusterBytes !== 0 || offset + clusterBytes > this.image.file.sizeBytes + clusterBytes) {
      throw badImage(`l1[${index}]`, `is ${offset}, which is no table of the file`);
    }
    return offset;
  }

  #load(slice: number, offset: number): void {
    if (slice === this.#loaded) return;
    const geometry = this.geometry!;
    if (this.#words.length === 0) this.#words = new Uint32Array(geometry.sliceBytes / 4);
    this.#loaded = -1;
    this.image.file.readNow(offset, new Uint8Array(this.#words.buffer));
    for (let at = 0; at < this.#words.length; at += geometry.entryWords) {
      if ((this.#words[at]! | this.#words[at + 1]!) === 0 && geometry.entryWords === 2) continue;
      const problem = entryProblem(geometry, this.#words, at);
      if (problem !== null)
        throw badImage(`l2[${slice * geometry.clustersPerSlice + at / geometry.entryWords}]`, problem);
    }
    this.#loaded = slice;
  }
}

export interface MapRange {
  readonly start?: number;
  readonly lengthBytes?: number;
  /** L1 table to read the first image by, as that of a snapshot. */
  readonly l1?: { readonly offset: number; readonly entries: number };
}

/**
 * The extents of a disk in order, of which neighbours may be alike.
 * @param chain the image and those behind it. Throws BdevError.
 */
export function* mapDisk(chain: readonly OpenImage[], range: MapRange = {}): Generator<DiskExtent> {
  const layers = chain.map((image, i) => new Layer(image, i === 0 ? range.l1 : undefined));
  const start = Math.min(range.start ?? 0, chain[0]!.sizeBytes);
  const end = Math.min(start + (range.lengthBytes ?? Infinity), chain[0]!.sizeBytes);
  for (let offset = start; offset < end;) {
    let wanted = end - offset;
    for (let depth = 0; depth < layers.length; depth++) {
      const found = layers[depth]!.at(offset, wanted);
      wanted = found.lengthBytes;
      const below = layers[depth + 1]?.image.sizeBytes ?? 0;
      if (found.kind === 'unallocated' && offset < below) continue;
      yield { ...found, start: offset, depth };
      break;
    }
    offset += wanted;
  }
}

/** Extents in whole sectors: a raw file may end within one, which is then all data. */
export function* wholeSectors(extents: Iterable<DiskExtent>): Generator<DiskExtent> {
  let at: number | null = null;
  for (const extent of extents) {
    const start: number = at ?? extent.start;
    const end = Math.ceil((extent.start + extent.lengthBytes) / SECTOR_BYTES) * SECTOR_BYTES;
    at = Math.max(start, end);
    if (end > start) yield { ...extent, start, lengthBytes: end - start };
  }
}
