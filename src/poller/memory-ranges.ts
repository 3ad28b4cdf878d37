/**
 * Ranges of the arena that requests will point into for a long time (guest memory), announced by whoever maps them, for
 * whoever can make use of knowing them early (fixed buffers). Control path only.
 */
export interface MemoryRange {
  /** Arena offset. */
  readonly address: number;
  readonly lengthBytes: number;
}

export interface MemoryListener {
  onMemoryAdded(range: MemoryRange): void;
  /** No request points into the range any more. */
  onMemoryRemoved(range: MemoryRange): void;
}

export class MemoryRanges {
  readonly #ranges = new Set<MemoryRange>();
  readonly #listeners = new Set<MemoryListener>();

  add(range: MemoryRange): void {
    this.#ranges.add(range);
    for (const listener of this.#listeners) listener.onMemoryAdded(range);
  }

  remove(range: MemoryRange): void {
    this.#ranges.delete(range);
    for (const listener of this.#listeners) listener.onMemoryRemoved(range);
  }

  /** The listener is told of the ranges there are, and of every change from now on. */
  subscribe(listener: MemoryListener): void {
    this.#listeners.add(listener);
    for (const range of this.#ranges) listener.onMemoryAdded(range);
  }

  unsubscribe(listener: MemoryListener): void {
    this.#listeners.delete(listener);
  }
}
