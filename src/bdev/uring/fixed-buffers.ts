/**
 * Guest memory registered with io_uring as fixed buffers, in chunks of at most 1 GiB (the kernel's bound). Registration pins
 * the pages; where it fails (memlock limit, no memory) requests go without.
 */
import type { MemoryListener, MemoryRange, MemoryRanges } from '../../poller/memory-ranges.js';
import type { Ring, RingRange } from '../../poller/ring.js';

const CHUNK_BYTES = 2 ** 30;

interface Chunk {
  readonly range: MemoryRange;
  readonly start: number;
  readonly end: number;
  readonly index: number;
}

export class FixedBuffers implements MemoryListener {
  readonly #memory: MemoryRanges;
  readonly #ring: Ring;
  #chunks: Chunk[] = [];

  constructor(memory: MemoryRanges, ring: Ring) {
    this.#memory = memory;
    this.#ring = ring;
    memory.subscribe(this);
  }

  get registeredBytes(): number {
    return this.#chunks.reduce((sum, chunk) => sum + chunk.end - chunk.start, 0);
  }

  /** Index of the fixed buffer that holds the whole range, or -1. */
  find(range: RingRange): number {
    const { address, lengthBytes } = range;
    const chunks = this.#chunks;
    for (let i = 0; i < chunks.length; i++) {
      const chunk = chunks[i]!;
      if (address >= chunk.start && address + lengthBytes <= chunk.end) return chunk.index;
    }
    return -1;
  }

  onMemoryAdded(range: MemoryRange): void {
    for (let start = range.address; start < range.address + range.lengthBytes; start += CHUNK_BYTES) {
      const end = Math.min(start + CHUNK_BYTES, range.address + range.lengthBytes);
      const index = this.#ring.registerBuffer(start, end - start);
      if (index < 0) return;
      this.#chunks.push({ range, start, end, index });
    }
  }

  onMemoryRemoved(range: MemoryRange): void {
    for (const chunk of this.#chunks) if (chunk.range === range) this.#ring.unregisterBuffer(chunk.index);
    this.#chunks = this.#chunks.filter((chunk) => chunk.range !== range);
  }

  close(): void {
    this.#memory.unsubscribe(this);
    for (const chunk of this.#chunks) this.#ring.unregisterBuffer(chunk.index);
    this.#chunks = [];
  }
}
