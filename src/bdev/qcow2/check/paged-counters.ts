/**
 * A counter for each cluster of a file, most of which are 0 or small: pages are made when something on them is counted, with one byte
 * for each counter, and widened when one does not suffice.
 *
 * Invariant: memory is in proportion to what was counted, and bounded by `PAGED_BYTES_MAX`, however long the file is.
 */
import { BdevError } from '../../bdev.js';

export const PAGE_CLUSTERS = 4096;
/** Of all counters of a check together. 64 TiB in clusters of 64 KiB take 1 GiB. */
export const PAGED_BYTES_MAX = 2 ** 32;

type Page = Uint8Array | Uint16Array | Uint32Array;

export class PagedCounters {
  readonly clusterCount: number;
  /** Where counting stops. */
  readonly max: number;
  /** By `cluster / PAGE_CLUSTERS`; null: all of them are 0. */
  readonly pages: (Page | null)[];
  #bytes = 0;

  constructor(clusterCount: number, max: number) {
    this.clusterCount = clusterCount;
    this.max = max;
    this.pages = new Array<Page | null>(Math.ceil(clusterCount / PAGE_CLUSTERS)).fill(null);
  }

  get(cluster: number): number {
    if (cluster >= this.clusterCount) return 0;
    const page = this.pages[Math.floor(cluster / PAGE_CLUSTERS)]!;
    return page === null ? 0 : page[cluster % PAGE_CLUSTERS]!;
  }

  /** @returns what could not be counted because of `max`. Throws BdevError when there are too many. */
  add(cluster: number, times: number): number {
    const index = Math.floor(cluster / PAGE_CLUSTERS);
    const page = this.pages[index] ?? this.#makePage(index);
    const at = cluster % PAGE_CLUSTERS;
    const wanted = page[at]! + times;
    const value = Math.min(wanted, this.max);
    if (value > capacityOf(page)) this.#widen(index, page, value)[at] = value;
    else page[at] = value;
    return wanted - value;
  }

  /** @param times at most what was counted */
  subtract(cluster: number, times: number): void {
    const page = this.pages[Math.floor(cluster / PAGE_CLUSTERS)]!;
    page[cluster % PAGE_CLUSTERS]! -= times;
  }

  /** Sets bits of a counter. */
  mark(cluster: number, bits: number): void {
    const index = Math.floor(cluster / PAGE_CLUSTERS);
    const page = this.pages[index] ?? this.#makePage(index);
    page[cluster % PAGE_CLUSTERS]! |= bits;
  }

  /** The first counter from here on that is not 0, or `clusterCount`. */
  nextUsed(from: number): number {
    for (let cluster = from; cluster < this.clusterCount;) {
      const page = this.pages[Math.floor(cluster / PAGE_CLUSTERS)]!;
      const end = cluster - (cluster % PAGE_CLUSTERS) + PAGE_CLUSTERS;
      if (page !== null) {
        for (let at = cluster % PAGE_CLUSTERS; at < PAGE_CLUSTERS; at++) {
          if (page[at] !== 0) return end - PAGE_CLUSTERS + at;
        }
      }
      cluster = end;
    }
    return this.clusterCount;
  }

  /** The last counter that is not 0, or -1. */
  lastUsed(): number {
    for (let index = this.pages.length - 1; index >= 0; index--) {
      const page = this.pages[index]!;
      if (page === null) continue;
      for (let at = PAGE_CLUSTERS - 1; at >= 0; at--) if (page[at] !== 0) return index * PAGE_CLUSTERS + at;
    }
    return -1;
  }

  #makePage(index: number): Page {
    this.#take(PAGE_CLUSTERS);
    return (this.pages[index] = new Uint8Array(PAGE_CLUSTERS));
  }

  #widen(index: number, page: Page, value: number): Page {
    const wider = value > 0xffff ? new Uint32Array(PAGE_CLUSTERS) : new Uint16Array(PAGE_CLUSTERS);
    this.#take(wider.byteLength - page.byteLength);
    wider.set(page);
    return (this.pages[index] = wider);
  }

  #take(bytes: number): void {
    this.#bytes += bytes;
    if (this.#bytes > PAGED_BYTES_MAX) {
      const message = `the clusters of the image take more than ${PAGED_BYTES_MAX} bytes to count`;
      throw new BdevError('too-large', 'image', message, 'convert the image to larger clusters');
    }
  }
}

function capacityOf(page: Page): number {
  return 2 ** (8 * page.BYTES_PER_ELEMENT) - 1;
}
