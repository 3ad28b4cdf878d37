/** Which chunks of a disk have yet to be copied: one bit for each. */

const WORD_BITS = 32;

export class DirtyMap {
  readonly chunkCount: number;
  readonly #words: Uint32Array;
  #dirtyCount: number;

  /** All is dirty. @param chunkCount at most 2^31, which is for the caller to check */
  constructor(chunkCount: number) {
    this.chunkCount = chunkCount;
    this.#dirtyCount = chunkCount;
    this.#words = new Uint32Array(Math.ceil(chunkCount / WORD_BITS)).fill(0xffffffff);
    const rest = chunkCount % WORD_BITS;
    if (rest > 0) this.#words[this.#words.length - 1] = 2 ** rest - 1;
  }

  get dirtyCount(): number {
    return this.#dirtyCount;
  }

  isDirty(chunk: number): boolean {
    return (this.#words[chunk >>> 5]! & (1 << (chunk & 31))) !== 0;
  }

  /** Whether all chunks from `first` to `last` are dirty. */
  areDirty(first: number, last: number): boolean {
    for (let chunk = first; chunk <= last; chunk++) if (!this.isDirty(chunk)) return false;
    return true;
  }

  /** Makes the chunks from `first` to `last` dirty. */
  soil(first: number, last: number): void {
    for (let chunk = first; chunk <= last; chunk++) {
      if (this.isDirty(chunk)) continue;
      this.#words[chunk >>> 5]! |= 1 << (chunk & 31);
      this.#dirtyCount++;
    }
  }

  clean(chunk: number): void {
    if (!this.isDirty(chunk)) return;
    this.#words[chunk >>> 5]! &= ~(1 << (chunk & 31));
    this.#dirtyCount--;
  }

  /** The first dirty chunk from `from` on, else the first of all; -1 when none is. */
  next(from: number): number {
    if (this.#dirtyCount === 0) return -1;
    const words = this.#words;
    const start = from < this.chunkCount ? from : 0;
    let word = start >>> 5;
    let bits = words[word]! & (0xffffffff << (start & 31));
    // Once around, and the first word again for its lower bits.
    for (let left = words.length; left >= 0; left--) {
      if (bits !== 0) return word * WORD_BITS + (31 - Math.clz32(bits & -bits));
      word = word + 1 < words.length ? word + 1 : 0;
      bits = words[word]!;
    }
    return -1;
  }
}
