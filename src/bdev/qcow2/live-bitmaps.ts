/**
 * The dirty bitmaps of an image in use: what is written is marked in memory, and stored when the disk is closed. Meanwhile the image
 * says that they are in use, so that a bitmap which missed something is never taken for whole; what outlives a kill is in bitmap-file.ts.
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
import type { Task } from '../task.js';

export class LiveBitmaps {
  readonly #bits: Map<string, BitmapBits>;
  readonly #all: readonly BitmapBits[];
  /** Those that the image does not say are in use. */
  readonly #unmarked: readonly string[];

  private constructor(bits: Map<string, BitmapBits>, unmarked: readonly string[]) {
    this.#bits = bits;
    this.#unmarked = unmarked;
    this.#all = [...bits.values()];
  }

  /**
   * Loads those that record writes and are whole, which are still to be marked; null when there is none.
   * @param left bits that a process which was killed left of bitmaps in use. Throws BdevError
   */
  static *load(
    file: ImageFile,
    header: Qcow2Header,
    bitmaps: readonly Bitmap[],
    left: ReadonlyMap<string, BitmapBits> = new Map(),
  ): Task<LiveBitmaps | null> {
    if ((header.autoclear & Autoclear.bitmaps) === 0n) return null;
    const bits = new Map<string, BitmapBits>();
    const unmarked: string[] = [];
    for (const { name, flags, granularityBits } of bitmaps) {
      if ((flags & BitmapFlag.auto) === 0) continue;
      if ((flags & BitmapFlag.inUse) === 0) {
        bits.set(name, yield* loadBitmap(file, name));
        unmarked.push(name);
        continue;
      }
      const kept = left.get(name);
      if (kept?.sizeBytes === header.sizeBytes && kept.granularityBits === granularityBits) bits.set(name, kept);
    }
    return bits.size === 0 ? null : new LiveBitmaps(bits, unmarked);
  }

  /** Says in the image that they are in use, durably: before the first request. Throws BdevError. */
  *markInUse(file: ImageFile): Task<void> {
    if (this.#unmarked.length > 0) yield* markBitmapsInUse(file, this.#unmarked);
  }

  get bits(): ReadonlyMap<string, BitmapBits> {
    return this.#bits;
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
