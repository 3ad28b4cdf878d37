/**
 * Finds out that a disk is read in order, and how far ahead it pays to decompress: 1 cluster at first, twice as many each time, up to a
 * limit. Several readers, each with its own place, are told apart. Clusters are named by their index in the disk.
 *
 *     const ahead = new ReadAhead(8);
 *     if (ahead.onRead(cluster)) for (let c = ahead.from; c < ahead.to; c++) prefetch(c);
 *
 * Nothing here allocates after the construction.
 */

const READERS = 4;

export class ReadAhead {
  /** What to decompress now: clusters [from, to). */
  from = 0;
  to = 0;

  readonly #limit: number;
  /** Of each reader: the cluster it read last, how far was read ahead for it, how far next time, and when it read. */
  readonly #last = new Float64Array(READERS).fill(-2);
  readonly #ahead = new Float64Array(READERS);
  readonly #window = new Int32Array(READERS);
  readonly #turn = new Float64Array(READERS);
  #turns = 0.5;

  /** @param limit most clusters ahead of a reader; 0 switches it off */
  constructor(limit: number) {
    this.#limit = limit;
  }

  /** A cluster is read, whether or not it was decompressed already. Returns whether there is something to decompress. */
  onRead(cluster: number): boolean {
    if (this.#limit === 0) return false;
    const reader = this.#readerAt(cluster);
    this.#turn[reader] = ++this.#turns;
    if (cluster === this.#last[reader]) return false;
    if (cluster !== this.#last[reader]! + 1) {
      this.#last[reader] = cluster;
      this.#ahead[reader] = cluster + 1;
      this.#window[reader] = 1;
      return false;
    }
    this.#last[reader] = cluster;
    const window = this.#window[reader]!;
    const read = Math.max(this.#ahead[reader]!, cluster + 1);
    // Half of the window is left before there is more: decompressing goes on while that half is read.
    if (read - cluster - 1 > window / 2) return false;
    this.from = read;
    this.to = cluster + 1 + window;
    this.#ahead[reader] = this.to;
    this.#window[reader] = Math.min(window * 2, this.#limit);
    return this.to > this.from;
  }

  /** Who goes on here, or else who has not read for longest. */
  #readerAt(cluster: number): number {
    let oldest = 0;
    for (let i = 0; i < READERS; i++) {
      const last = this.#last[i]!;
      if (cluster === last || cluster === last + 1) return i;
      if (this.#turn[i]! < this.#turn[oldest]!) oldest = i;
    }
    return oldest;
  }
}
