/** Buffers of one size in the arena, made when first needed, up to a bound. */
import type { Arena } from '../../../native/index.js';
import { WaitList } from './wait-list.js';

export class BufferPool {
  /** For whom there was none: woken when one comes back. */
  readonly waiters = new WaitList();
  readonly #arena: Arena;
  readonly #bytes: number;
  readonly #max: number;
  readonly #all: number[] = [];
  readonly #free: number[] = [];

  constructor(arena: Arena, bytes: number, max: number) {
    this.#arena = arena;
    this.#bytes = bytes;
    this.#max = max;
  }

  /** Arena offset of a buffer, 0 when all are in use. */
  take(): number {
    const free = this.#free.pop();
    if (free !== undefined) return free;
    if (this.#all.length === this.#max) return 0;
    const address = this.#arena.allocate(this.#bytes);
    this.#all.push(address);
    return address;
  }

  give(address: number): void {
    this.#free.push(address);
    if (!this.waiters.isEmpty) this.waiters.wakeAll(0);
  }

  release(): void {
    for (const address of this.#all) this.#arena.release(address);
  }
}
