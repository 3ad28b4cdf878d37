/**
 * Which block of the cache's device holds which block of which disk. Everything is kept by place, the number of a block of the device, so the
 * blocks of a segment lie side by side for whoever destages it.
 *
 *     a place      lba 4  next 4  crc 4  volume 1  flags 1      heads: 4 bytes for each two to four places
 *
 * That is 16 bytes for a place at most. A place is found through a table of chains by volume and lba.
 *
 * Invariants
 * - A block of a disk is at one place at most; a place that is not live is in no chain.
 * - What is dirty is live.
 */
const LIVE = 1;
const DIRTY = 2;
/** The place is a hit since the clock's hand came by: two bits. */
const HEAT_SHIFT = 2;
const HEAT_MAX = 3;

/** Disks that share a cache, at most. */
export const CACHE_VOLUMES_MAX = 255;
/** Blocks of a disk at most: 16 TiB. */
export const CACHE_LBA_MAX = 2 ** 32 - 1;
/** Places at most: the chains name them by 32 bits, and 0 is their end. */
export const CACHE_PLACES_MAX = 2 ** 32 - 2;

export class CacheIndex {
  readonly placeCount: number;
  /** Live places, and those of them that are dirty; by volume, too. */
  liveCount = 0;
  dirtyCount = 0;
  readonly liveOf = new Float64Array(CACHE_VOLUMES_MAX + 1);
  readonly dirtyOf = new Float64Array(CACHE_VOLUMES_MAX + 1);
  readonly #lbas: Uint32Array;
  /** A place and 1; 0: the end of the chain. */
  readonly #next: Uint32Array;
  readonly #crcs: Uint32Array;
  readonly #volumes: Uint8Array;
  readonly #flags: Uint8Array;
  readonly #heads: Uint32Array;
  readonly #shift: number;

  constructor(placeCount: number) {
    if (placeCount > CACHE_PLACES_MAX) throw new Error(`cache: ${placeCount} places are too many`);
    this.placeCount = placeCount;
    this.#lbas = new Uint32Array(placeCount);
    this.#next = new Uint32Array(placeCount);
    this.#crcs = new Uint32Array(placeCount);
    this.#volumes = new Uint8Array(placeCount);
    this.#flags = new Uint8Array(placeCount);
    // The largest power of two that is no more than half as many, at least two.
    const headBits = Math.max(1, Math.floor(Math.log2(Math.max(2, placeCount / 2))));
    this.#heads = new Uint32Array(2 ** headBits);
    this.#shift = 32 - headBits;
  }

  /** Memory it takes. */
  get bytes(): number {
    return [this.#lbas, this.#next, this.#crcs, this.#volumes, this.#flags, this.#heads].reduce(
      (sum, { byteLength }) => sum + byteLength,
      0,
    );
  }

  /** Where a block of a disk is, -1 when it is nowhere here. */
  find(volume: number, lba: number): number {
    let link = this.#heads[this.#headOf(volume, lba)]!;
    while (link !== 0) {
      const place = link - 1;
      if (this.#lbas[place] === lba && this.#volumes[place] === volume) return place;
      link = this.#next[place]!;
    }
    return -1;
  }

  /** The block is at this place from here on, which is not live. Returns where it was, -1: nowhere. */
  enter(volume: number, lba: number, place: number, crc: number, isDirty: boolean): number {
    if ((this.#flags[place]! & LIVE) !== 0) throw new Error(`cache: place ${place} is in use`);
    const former = this.remove(volume, lba);
    const head = this.#headOf(volume, lba);
    this.#lbas[place] = lba;
    this.#volumes[place] = volume;
    this.#crcs[place] = crc;
    this.#next[place] = this.#heads[head]!;
    this.#heads[head] = place + 1;
    this.#flags[place] = isDirty ? LIVE | DIRTY : LIVE;
    this.#count(volume, isDirty, 1);
    return former;
  }

  /** Nothing is known of the block any more. Returns where it was, -1: nowhere. */
  remove(volume: number, lba: number): number {
    const head = this.#headOf(volume, lba);
    let before = -1;
    let link = this.#heads[head]!;
    while (link !== 0) {
      const place = link - 1;
      const next = this.#next[place]!;
      if (this.#lbas[place] === lba && this.#volumes[place] === volume) {
        if (before < 0) this.#heads[head] = next;
        else this.#next[before] = next;
        this.#count(volume, this.isDirty(place), -1);
        this.#flags[place] = 0;
        return place;
      }
      before = place;
      link = next;
    }
    return -1;
  }

  isLive(place: number): boolean {
    return (this.#flags[place]! & LIVE) !== 0;
  }

  isDirty(place: number): boolean {
    return (this.#flags[place]! & DIRTY) !== 0;
  }

  /** What is at a live place is in the base by now. */
  clean(place: number): void {
    if (!this.isDirty(place)) return;
    this.#flags[place]! &= ~DIRTY;
    this.dirtyCount--;
    this.dirtyOf[this.#volumes[place]!]!--;
  }

  volumeAt(place: number): number {
    return this.#volumes[place]!;
  }

  lbaAt(place: number): number {
    return this.#lbas[place]!;
  }

  crcAt(place: number): number {
    return this.#crcs[place]!;
  }

  /** 0 to 3: how much a live place was read. */
  heatAt(place: number): number {
    return this.#flags[place]! >> HEAT_SHIFT;
  }

  setHeat(place: number, heat: number): void {
    const kept = this.#flags[place]! & (LIVE | DIRTY);
    this.#flags[place] = kept | (Math.min(heat, HEAT_MAX) << HEAT_SHIFT);
  }

  /** Lengths of all chains, for those who doubt them. */
  chainLengths(): number[] {
    return Array.from(this.#heads, (head) => {
      let length = 0;
      for (let link = head; link !== 0; link = this.#next[link - 1]!) length++;
      return length;
    });
  }

  #count(volume: number, isDirty: boolean, step: number): void {
    this.liveCount += step;
    this.liveOf[volume]! += step;
    if (!isDirty) return;
    this.dirtyCount += step;
    this.dirtyOf[volume]! += step;
  }

  #headOf(volume: number, lba: number): number {
    // Multiplicative hashing: neighbours in a disk are far apart in the table, whatever their distance.
    const mixed = Math.imul((lba ^ Math.imul(volume, 0x9e3779b1)) | 0, 0x85ebca6b);
    return Math.imul(mixed ^ (mixed >>> 15), 0xc2b2ae35) >>> this.#shift;
  }
}
