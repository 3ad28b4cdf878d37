/** A set of clusters of a file, as a bitmap in chunks: small for what lies together, whatever the size of the file. */

const CHUNK_BITS = 15;
const CHUNK_CLUSTERS = 2 ** CHUNK_BITS;

export class ClusterSet {
  readonly #chunks = new Map<number, Uint32Array>();
  #lastKey = -1;
  #lastChunk: Uint32Array | undefined = undefined;

  has(cluster: number): boolean {
    const chunk = this.#chunk(Math.floor(cluster / CHUNK_CLUSTERS));
    const bit = cluster % CHUNK_CLUSTERS;
    return chunk !== undefined && ((chunk[bit >>> 5]! >>> (bit & 31)) & 1) !== 0;
  }

  add(first: number, count = 1): void {
    for (let cluster = first; cluster < first + count; cluster++) {
      const key = Math.floor(cluster / CHUNK_CLUSTERS);
      let chunk = this.#chunk(key);
      if (chunk === undefined) {
        chunk = new Uint32Array(CHUNK_CLUSTERS / 32);
        this.#chunks.set(key, chunk);
        this.#lastChunk = chunk;
      }
      const bit = cluster % CHUNK_CLUSTERS;
      chunk[bit >>> 5]! |= 1 << (bit & 31);
    }
  }

  delete(first: number, count = 1): void {
    for (let cluster = first; cluster < first + count; cluster++) {
      const chunk = this.#chunk(Math.floor(cluster / CHUNK_CLUSTERS));
      const bit = cluster % CHUNK_CLUSTERS;
      if (chunk !== undefined) chunk[bit >>> 5]! &= ~(1 << (bit & 31));
    }
  }

  clear(): void {
    this.#chunks.clear();
    this.#lastKey = -1;
    this.#lastChunk = undefined;
  }

  #chunk(key: number): Uint32Array | undefined {
    if (key !== this.#lastKey) {
      this.#lastKey = key;
      this.#lastChunk = this.#chunks.get(key);
    }
    return this.#lastChunk;
  }
}
