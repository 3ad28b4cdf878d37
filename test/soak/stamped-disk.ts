/**
 * What a disk must hold, block by block, when every sector written says which block and which write it belongs to.
 *
 * Invariants
 * - A block has at most one request in flight, so that its content is never a matter of order.
 * - Each sector of a block holds one of the block's candidates: one, unless a write was cut off. The next read of it settles
 *   which it is; from then on it may not change.
 */
import type { Random } from '../../src/poller/clock.js';

export const BLOCK_BYTES = 4096;
const SECTOR_BYTES = 512;
const SECTORS = BLOCK_BYTES / SECTOR_BYTES;
const MAGIC = 0x7374616d;
/** Sequence number of a block of zeroes. */
export const ZEROES = 0;

/** Content of a block that is legal: sequence numbers. */
type Candidates = readonly number[];

/** The disk holds what it must not. */
export class Corruption extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'Corruption';
  }
}

export class StampedDisk {
  /** Blocks verified so far. */
  verified = 0;
  readonly #blockCount: number;
  readonly #random: Random;
  /** What each sector may hold; blocks that are not here hold zeroes. */
  readonly #content = new Map<number, Candidates[]>();
  readonly #busy = new Set<number>();
  #sequence = ZEROES;

  constructor(blockCount: number, random: Random) {
    this.#blockCount = blockCount;
    this.#random = random;
  }

  /** Takes `count` neighbouring blocks that have nothing in flight. Give them back by one of the functions below. */
  take(count: number): number {
    for (;;) {
      const first = this.#random.below(this.#blockCount - count + 1);
      const blocks = Array.from({ length: count }, (_, i) => first + i);
      if (blocks.some((block) => this.#busy.has(block))) continue;
      for (const block of blocks) this.#busy.add(block);
      return first;
    }
  }

  /** What to write to the blocks, and the number to report it by. */
  stamp(first: number, count: number): { readonly sequence: number; readonly data: Buffer } {
    const sequence = ++this.#sequence;
    const data = Buffer.alloc(count * BLOCK_BYTES);
    for (let at = 0; at < data.length; at += 16) {
      data.writeUInt32LE(MAGIC, at);
      data.writeUInt32LE(first + Math.floor(at / BLOCK_BYTES), at + 4);
      data.writeUInt32LE(sequence, at + 8);
      data.writeUInt32LE(Math.floor(at / SECTOR_BYTES) % SECTORS, at + 12);
    }
    return { sequence, data };
  }

  /** The blocks hold this for certain. */
  wrote(first: number, count: number, sequence: number): void {
    this.#finish(first, count, () => [sequence]);
  }

  /** The blocks hold this, or in part what they held before: nobody heard the end of it. */
  mayHaveWritten(first: number, count: number, sequence: number): void {
    this.#finish(first, count, (before) => [...before, sequence]);
  }

  /** Nothing was changed. */
  untouched(first: number, count: number): void {
    this.#finish(first, count, (before) => before);
  }

  /** The blocks were read: checks every sector. Throws Corruption. */
  read(first: number, data: Buffer): void {
    for (let at = 0; at < data.length; at += BLOCK_BYTES) {
      const block = first + at / BLOCK_BYTES;
      const sectors = this.#sectors(block).map((candidates, sector) => {
        const from = at + sector * SECTOR_BYTES;
        const found = identify(data.subarray(from, from + SECTOR_BYTES), block, sector);
        if (candidates.includes(found)) return [found];
        throw new Corruption(`block ${block}, sector ${sector}: found ${found}, legal are ${candidates.join(', ')}`);
      });
      this.#content.set(block, sectors);
      this.verified++;
    }
    this.untouched(first, data.length / BLOCK_BYTES);
  }

  #sectors(block: number): Candidates[] {
    return this.#content.get(block) ?? Array.from({ length: SECTORS }, () => [ZEROES]);
  }

  #finish(first: number, count: number, change: (before: Candidates) => Candidates): void {
    for (let block = first; block < first + count; block++) {
      this.#content.set(block, this.#sectors(block).map(change));
      this.#busy.delete(block);
    }
  }
}

/** The write a sector stems from. Throws Corruption when it is no whole sector of ours in its right place. */
function identify(sector: Buffer, block: number, index: number): number {
  const sequence = sector.readUInt32LE(0) === MAGIC ? sector.readUInt32LE(8) : ZEROES;
  const expected = sequence === ZEROES ? [0, 0, 0, 0] : [MAGIC, block, sequence, index];
  for (let at = 0; at < SECTOR_BYTES; at += 4) {
    if (sector.readUInt32LE(at) !== expected[(at / 4) % 4]) {
      throw new Corruption(`block ${block}, sector ${index}: foreign bytes ${sector.subarray(0, 16).toString('hex')}`);
    }
  }
  return sequence;
}
