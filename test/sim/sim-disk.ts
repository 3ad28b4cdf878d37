/**
 * A disk with a volatile write cache. `view` is what a read sees. A write that was not synced may, when the power goes, be kept or
 * lost, alone or with others, whole or cut at 512 bytes, in any order.
 *
 * Invariants
 * - A sync covers what was completed before it began. What was in flight then it may cover or not.
 * - On one sector a write that is durable is never undone by an older one.
 */
import type { SeededRandom } from '../../src/poller/clock.js';

export const SECTOR_BYTES = 512;

/** A write, discard or zeroing that took effect and is not durable as a whole. */
export interface DirtyWrite {
  /** Of its effect, counted from 1. */
  readonly order: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** Copy of the data; null for zeroes. */
  readonly bytes: Uint8Array | null;
  /** Its completion was posted: the next sync covers it. */
  completed: boolean;
}

/** A sync under way: what it will cover. */
export interface Sync {
  readonly writes: readonly DirtyWrite[];
  readonly fileBytes: number;
}

/** The file on a disk, where it is shorter than its room and grows: its length is durable with a sync, as data is. */
export interface SimFile {
  readonly sizeBytes: () => number;
  readonly truncate: (sizeBytes: number) => void;
}

export class SimDisk {
  readonly sizeBytes: number;
  readonly view: Uint8Array;
  /** The file system below can zero a range. */
  canZeroRange = true;
  readonly #file: SimFile | null;
  #durableFileBytes: number;
  /** Nothing was ever written from here on. */
  #usedBytes = 0;
  readonly #durable: Uint8Array;
  /** By sector, the order of the write whose bytes are durable. */
  readonly #durableOrder: Float64Array;
  #dirty: DirtyWrite[] = [];
  #effects = 0;

  constructor(sizeBytes: number, image?: Uint8Array, file: SimFile | null = null) {
    this.sizeBytes = sizeBytes;
    this.#file = file;
    this.#durableFileBytes = this.fileBytes;
    this.view = new Uint8Array(sizeBytes);
    this.#durable = new Uint8Array(sizeBytes);
    this.#durableOrder = new Float64Array(sizeBytes / SECTOR_BYTES);
    if (image === undefined) return;
    this.view.set(image);
    this.#durable.set(image);
    this.#usedBytes = image.length;
  }

  /** Length of what lies on the disk. */
  get fileBytes(): number {
    return this.#file?.sizeBytes() ?? this.sizeBytes;
  }

  get dirtyWrites(): readonly DirtyWrite[] {
    return this.#dirty;
  }

  /** A write takes effect, its bytes as they are now; null writes zeroes. */
  write(offsetBytes: number, lengthBytes: number, bytes: Uint8Array | null): DirtyWrite {
    const copy = bytes === null ? null : bytes.slice(0, lengthBytes);
    const write = { order: ++this.#effects, offsetBytes, lengthBytes, bytes: copy, completed: false };
    if (copy === null) this.view.fill(0, offsetBytes, offsetBytes + lengthBytes);
    else this.view.set(copy, offsetBytes);
    this.#dirty.push(write);
    this.#usedBytes = Math.max(this.#usedBytes, offsetBytes + lengthBytes);
    return write;
  }

  /** @param random decides on what has taken effect but is not completed */
  beginSync(random: SeededRandom): Sync {
    const writes = this.#dirty.filter((write) => write.completed || random.below(2) === 0);
    return { writes, fileBytes: this.fileBytes };
  }

  endSync(sync: Sync): void {
    this.#durableFileBytes = Math.max(this.#durableFileBytes, sync.fileBytes);
    this.#hardenAll(sync.writes);
  }

  /** A write that asked for it is durable by itself. */
  harden(write: DirtyWrite): void {
    this.#hardenAll([write]);
  }

  /** The power goes: decides on every dirty write, and starts anew with what is left. */
  powerCut(random: SeededRandom): void {
    const image = this.#durable;
    const dirty = this.#dirty;
    // Most is found out by losing everything.
    const style = random.below(6);
    // Shuffled, so that of two writes either may have come last; in order in every second run.
    const ordered = [...dirty];
    if (random.below(2) === 0) shuffle(ordered, random);
    const keepPercent = [0, 0, 0, 100, 50, random.below(101)][style]!;
    for (const write of ordered) {
      if (random.below(100) >= keepPercent) continue;
      const sectors = write.lengthBytes / SECTOR_BYTES;
      const isTorn = style >= 4 && random.below(3) === 0;
      const kept = isTorn ? random.below(sectors + 1) : sectors;
      const isScattered = isTorn && random.below(2) === 0;
      for (let i = 0; i < sectors; i++) {
        if (isScattered ? random.below(2) === 0 : i >= kept) continue;
        this.#placeSector(image, write, i);
      }
    }
    if (this.#file !== null && random.below(2) === 0) {
      image.fill(0, this.#durableFileBytes, this.#usedBytes);
      this.#file.truncate(this.#durableFileBytes);
    }
    this.#durableFileBytes = this.fileBytes;
    this.#restart();
  }

  /** By sector that is not settled: what it may hold after a power cut, the durable contents first. For enumeration. */
  unsettled(): Map<number, Uint8Array[]> {
    const bySector = new Map<number, Uint8Array[]>();
    for (const write of this.#dirty) {
      for (let i = 0; i < write.lengthBytes / SECTOR_BYTES; i++) {
        const sector = write.offsetBytes / SECTOR_BYTES + i;
        if (write.order <= this.#durableOrder[sector]!) continue;
        const at = sector * SECTOR_BYTES;
        const candidates = bySector.get(sector) ?? [this.#durable.slice(at, at + SECTOR_BYTES)];
        candidates.push(write.bytes?.slice(i * SECTOR_BYTES, (i + 1) * SECTOR_BYTES) ?? new Uint8Array(SECTOR_BYTES));
        bySector.set(sector, candidates);
      }
    }
    return bySector;
  }

  /** A copy of what is durable. */
  durableImage(): Uint8Array {
    return this.#durable.slice();
  }

  #hardenAll(writes: readonly DirtyWrite[]): void {
    for (const write of writes) this.#harden(write);
    this.#dirty = this.#dirty.filter((write) => !writes.includes(write));
  }

  #harden(write: DirtyWrite): void {
    const first = write.offsetBytes / SECTOR_BYTES;
    for (let i = 0; i < write.lengthBytes / SECTOR_BYTES; i++) {
      if (write.order <= this.#durableOrder[first + i]!) continue;
      this.#placeSector(this.#durable, write, i);
      this.#durableOrder[first + i] = write.order;
    }
  }

  /** Puts one sector of a write into an image, unless a newer one is durable there. */
  #placeSector(image: Uint8Array, write: DirtyWrite, index: number): void {
    const sector = write.offsetBytes / SECTOR_BYTES + index;
    if (write.order < this.#durableOrder[sector]!) return;
    const at = sector * SECTOR_BYTES;
    if (write.bytes === null) image.fill(0, at, at + SECTOR_BYTES);
    else image.set(write.bytes.subarray(index * SECTOR_BYTES, (index + 1) * SECTOR_BYTES), at);
  }

  #restart(): void {
    this.view.set(this.#durable.subarray(0, this.#usedBytes));
    this.#durableOrder.fill(this.#effects);
    this.#dirty = [];
  }
}

export function shuffle<T>(items: T[], random: SeededRandom): void {
  for (let i = items.length - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [items[i], items[j]] = [items[j]!, items[i]!];
  }
}
