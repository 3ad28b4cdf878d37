/**
 * The size of a disk, which may change while it is open. A leaf makes it; a filter hands on its base's, so that the whole
 * stack is of one size at any moment.
 *
 * Invariants
 * - A disk that somebody has open never shrinks: no request that was within it is beyond it later.
 * - The size is changed after the storage behind it: what is shown can be read and written.
 * - While somebody has pinned it, it does not change.
 */
import { BdevError } from './bdev.js';

/** What a leaf knows of its storage. Both throw BdevError. */
export interface Storage {
  /** Bytes there are by now. */
  sizeBytes(): number;
  /** Makes room for a disk of this size, whole blocks. */
  resize(sizeBytes: number): void;
}

export class BdevSize {
  readonly #blockSizeBytes: number;
  readonly #storage: Storage;
  readonly #watchers = new Set<() => void>();
  /** Why it may not change at the moment. */
  readonly #pins = new Set<{ readonly reason: string }>();
  #blockCount: number;

  constructor(blockSizeBytes: number, storage: Storage) {
    this.#blockSizeBytes = blockSizeBytes;
    this.#storage = storage;
    this.#blockCount = Math.floor(storage.sizeBytes() / blockSizeBytes);
  }

  get blockCount(): number {
    return this.#blockCount;
  }

  /** Whoever has the disk open is told of each change. Returns what ends that. */
  watch(onChange: () => void): () => void {
    // A function of its own: the same one may be handed in twice.
    const watcher = (): void => onChange();
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  /** Keeps the size as it is. @param reason what goes on, as `disk is mirrored` @returns what ends that */
  pin(reason: string): () => void {
    const pin = { reason };
    this.#pins.add(pin);
    return () => this.#pins.delete(pin);
  }

  /** Changes the storage and the size. Throws BdevError, and leaves everything as it was. */
  resize(sizeBytes: number): void {
    const unit = this.#blockSizeBytes;
    if (sizeBytes < unit || sizeBytes % unit !== 0) {
      throw new BdevError(
        'bad-size',
        'newSize',
        `${sizeBytes} bytes are no whole number of blocks of ${unit}`,
        `choose a multiple of ${unit}`,
      );
    }
    this.#refuseShrinking(sizeBytes / unit);
    this.#refusePinned(sizeBytes / unit);
    this.#storage.resize(sizeBytes);
    this.#set(sizeBytes / unit);
  }

  /** Takes up the size that the storage has by now. Throws BdevError, and leaves everything as it was. */
  rescan(): void {
    const blockCount = Math.floor(this.#storage.sizeBytes() / this.#blockSizeBytes);
    this.#refuseShrinking(blockCount);
    this.#refusePinned(blockCount);
    this.#set(blockCount);
  }

  #refusePinned(blockCount: number): void {
    if (blockCount === this.#blockCount || this.#pins.size === 0) return;
    const reasons = [...this.#pins].map(({ reason }) => reason).join(', ');
    throw new BdevError('busy', 'newSize', `the size cannot change now: ${reasons}`, 'try again when that is over');
  }

  #refuseShrinking(blockCount: number): void {
    if (blockCount >= this.#blockCount || this.#watchers.size === 0) return;
    const [from, to] = [this.#blockCount, blockCount].map((count) => count * this.#blockSizeBytes);
    throw new BdevError(
      'shrinks',
      'newSize',
      `the disk is in use with ${from} bytes and cannot shrink to ${to}`,
      'choose a larger size, or stop the daemon and shrink it then',
    );
  }

  #set(blockCount: number): void {
    if (blockCount === this.#blockCount) return;
    this.#blockCount = blockCount;
    for (const watcher of this.#watchers) watcher();
  }
}
