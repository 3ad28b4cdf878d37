/**
 * The bits of a dirty bitmap in memory, packed as in the image: one for each `2 ** granularityBits` bytes of the disk, the first in
 * the lowest bit of the first byte. A disk of 1 TiB takes 2 MiB at 64 KiB each.
 */
import { BdevError } from '../../bdev.js';

/** As QEMU's: 512 MiB of bits. */
export const BITMAP_BYTES_MAX = 512 * 2 ** 20;

/** Part of a disk. */
export interface DirtyRange {
  readonly offset: number;
  readonly lengthBytes: number;
}

export class BitmapBits {
  readonly sizeBytes: number;
  readonly granularityBits: number;
  readonly count: number;
  /** Bits beyond `count` are 0. */
  bytes: Buffer;

  /** All bits are 0. Throws BdevError when there would be too many. */
  constructor(sizeBytes: number, granularityBits: number) {
    this.sizeBytes = sizeBytes;
    this.granularityBits = granularityBits;
    this.count = Math.ceil(sizeBytes / 2 ** granularityBits);
    const lengthBytes = Math.ceil(this.count / 8);
    if (lengthBytes > BITMAP_BYTES_MAX) {
      const what = `a bitmap of ${2 ** granularityBits} bytes a bit takes ${lengthBytes} bytes for this disk`;
      throw new BdevError('too-large', 'granularity', `${what}, the most is ${BITMAP_BYTES_MAX}`, 'use a coarser one');
    }
    this.bytes = Buffer.alloc(lengthBytes);
  }

  /** Keeps the bits elsewhere from here on. @param bytes as many */
  moveTo(bytes: Buffer): void {
    this.bytes.copy(bytes);
    this.bytes = bytes;
  }

  isDirty(offset: number): boolean {
    const bit = Math.floor(offset / 2 ** this.granularityBits);
    return (this.bytes[bit >>> 3]! & (1 << (bit & 7))) !== 0;
  }

  /** Sets the bits of all that the range touches. */
  set(offset: number, lengthBytes: number): void {
    this.#fill(offset, lengthBytes, true);
  }

  /** Clears the bits of what lies wholly within the range. */
  clear(offset: number, lengthBytes: number): void {
    const granularity = 2 ** this.granularityBits;
    const start = Math.ceil(offset / granularity) * granularity;
    const end = offset + lengthBytes >= this.sizeBytes ? this.sizeBytes : offset + lengthBytes;
    const wholeEnd = end === this.sizeBytes ? end : Math.floor(end / granularity) * granularity;
    if (wholeEnd > start) this.#fill(start, wholeEnd - start, false);
  }

  /** Adds what another bitmap of the same disk has; its granularity may be another. */
  merge(other: BitmapBits): void {
    if (other.granularityBits === this.granularityBits) {
      const length = Math.min(this.bytes.length, other.bytes.length);
      for (let i = 0; i < length; i++) this.bytes[i]! |= other.bytes[i]!;
      this.trim();
      return;
    }
    for (const { offset, lengthBytes } of other.ranges()) this.set(offset, lengthBytes);
  }

  /** A copy for a disk of another size: what is new is clean. Throws BdevError. */
  resized(sizeBytes: number): BitmapBits {
    const other = new BitmapBits(sizeBytes, this.granularityBits);
    this.bytes.copy(other.bytes);
    other.trim();
    return other;
  }

  /** The dirty parts of the disk in order, each as long as can be. */
  *ranges(): Generator<DirtyRange, void, undefined> {
    const granularity = 2 ** this.granularityBits;
    for (let bit = this.#next(0, true); bit < this.count;) {
      const end = this.#next(bit, false);
      const offset = bit * granularity;
      yield { offset, lengthBytes: Math.min(end * granularity, this.sizeBytes) - offset };
      bit = this.#next(end, true);
    }
  }

  /** Bytes of the disk that are dirty. */
  get dirtyBytes(): number {
    let sum = 0;
    for (const { lengthBytes } of this.ranges()) sum += lengthBytes;
    return sum;
  }

  /** The first bit at or after one that is set, or that is not; `count`: none. */
  #next(bit: number, isSet: boolean): number {
    const skipped = isSet ? 0 : 0xff;
    let at = bit;
    while (at < this.count) {
      if (at % 8 === 0 && this.bytes[at >>> 3] === skipped) at += 8;
      else if (((this.bytes[at >>> 3]! >>> (at & 7)) & 1) === (isSet ? 1 : 0)) return at;
      else at++;
    }
    return this.count;
  }

  #fill(offset: number, lengthBytes: number, isSet: boolean): void {
    if (lengthBytes <= 0) return;
    const granularity = 2 ** this.granularityBits;
    const end = Math.min(this.count, Math.ceil((offset + lengthBytes) / granularity));
    for (let bit = Math.floor(offset / granularity); bit < end;) {
      if (bit % 8 === 0 && end - bit >= 8) {
        const bytes = Math.floor((end - bit) / 8);
        this.bytes.fill(isSet ? 0xff : 0, bit / 8, bit / 8 + bytes);
        bit += bytes * 8;
        continue;
      }
      const mask = 1 << (bit & 7);
      this.bytes[bit >>> 3] = isSet ? this.bytes[bit >>> 3]! | mask : this.bytes[bit >>> 3]! & ~mask;
      bit++;
    }
  }

  /** Clears what lies beyond the last bit, as when the bytes were read from an image. */
  trim(): void {
    if (this.count % 8 !== 0) this.bytes[this.bytes.length - 1]! &= (1 << (this.count % 8)) - 1;
  }
}
