/** Sets of clusters as sorted ranges: where the metadata of an image lies. */

/** Ranges are gathered, then asked. */
export class ClusterRanges {
  #bounds = new Float64Array(64);
  #count = 0;
  #isSorted = true;

  add(first: number, count: number): void {
    if (count <= 0) return;
    if (this.#count * 2 === this.#bounds.length) {
      const larger = new Float64Array(this.#bounds.length * 2);
      larger.set(this.#bounds);
      this.#bounds = larger;
    }
    this.#bounds[this.#count * 2] = first;
    this.#bounds[this.#count * 2 + 1] = first + count;
    this.#count++;
    this.#isSorted = false;
  }

  /** The first cluster at or after `first` of those before `end` that is in the set, or -1. */
  find(first: number, end: number): number {
    if (!this.#isSorted) this.#sort();
    // The first range that ends after `first`: ranges do not overlap, so their ends are sorted as well.
    let low = 0;
    let high = this.#count;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.#bounds[middle * 2 + 1]! > first) high = middle;
      else low = middle + 1;
    }
    if (low === this.#count) return -1;
    const start = this.#bounds[low * 2]!;
    return start < end ? Math.max(start, first) : -1;
  }

  #sort(): void {
    const starts = this.#bounds.slice(0, this.#count * 2).filter((_, i) => i % 2 === 0);
    const ends = this.#bounds.slice(0, this.#count * 2).filter((_, i) => i % 2 === 1);
    // Sorted apart from one another they bound the same set, as when brackets are matched.
    starts.sort();
    ends.sort();
    let merged = 0;
    for (let i = 0, from = 0; i < this.#count; i++) {
      if (i + 1 < this.#count && starts[i + 1]! <= ends[i]!) continue;
      this.#bounds[merged * 2] = starts[from]!;
      this.#bounds[merged * 2 + 1] = ends[i]!;
      merged++;
      from = i + 1;
    }
    this.#count = merged;
    this.#isSorted = true;
  }
}
