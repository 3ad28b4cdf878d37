/**
 * The dirty bitmaps of an image in use: what is written is marked in memory, and stored when the disk is closed. Meanwhile the image
 * says that they are in use, so that a bitmap which missed something is never taken for whole.
 *
 * Invariants
 * - A range is marked before a request for it is submitted.
 * - In the image they are marked as in use, durably, before the first request.
 */
import type { BdevIo } from '../bdev-io.js';
import type { BitmapBits } from './edit/bitmap-bits.js';
import { loadBitmap, markBitmapsInUse, storeBitmaps } from './edit/bitmaps.js';
import { Autoclear } from './format.js';
import type { Qcow2Header } from './format.js';
import type { ImageFile } from './image-file.js';
import { BitmapFlag } from './tables.js';
import type { Bitmap } from './tables.js';
import type { Task } from './task.js';

export class LiveBitmaps {
  readonly #bits: Map<string, BitmapBits>;
  readonly #all: readonly BitmapBits[];

  private constructor(bits: Map<string, BitmapBits>) {
    this.#bits = bits;
    this.#all = [...bits.values()];
  }

  /** Takes those into use that record writes and are whole; null when there is none. Throws BdevError. */
  static *open(file: ImageFile, header: Qcow2Header, bitmaps: readonly Bitmap[]): Task<LiveBitmaps | null> {
    if ((header.autoclear & Autoclear.bitmaps) === 0n) return null;
    const names = bitmaps
      .filter(({ flags }) => (flags & BitmapFlag.auto) !== 0 && (flags & BitmapFlag.inUse) === 0)
      .map(({ name }) => name);
    if (names.length === 0) return null;
    const bits = new Map<string, BitmapBits>();
    for (const name of names) bits.set(name, yield* loadBitmap(file, name));
    yield* markBitmapsInUse(file, names);
    return new LiveBitmaps(bits);
  }

  get names(): readonly string[] {
    return [...this.#bits.keys()];
  }

  get(name: string): BitmapBits | undefined {
    return this.#bits.get(name);
  }

  /** The range of a request is going to change. */
  mark(io: BdevIo): void {
    for (let i = 0; i < this.#all.length; i++) this.#all[i]!.set(io.offsetBytes, io.lengthBytes);
  }

  /** They are whole in the image then, and not in use. Throws BdevError. */
  *store(file: ImageFile): Task<void> {
    yield* storeBitmaps(file, this.#bits);
  }
}
