/** Lists of descriptors in a packed virtqueue. */
import { Chain, NEXT } from './chain.js';

export const AVAIL = 1 << 7;
export const USED = 1 << 15;

/** A place in the ring, and the wrap counter of the lap it is passed in. */
export interface Position {
  readonly index: number;
  readonly wrap: number;
}

/** The place so many descriptors later, fewer than two laps. */
export function advance({ index, wrap }: Position, count: number, size: number): Position {
  const laps = Math.floor((index + count) / size);
  return { index: index + count - laps * size, wrap: wrap ^ (laps & 1) };
}

/** AVAIL and USED as the driver sets them in that lap. */
export function availableIn(wrap: number): number {
  return wrap === 1 ? AVAIL : USED;
}

/** As the device sets them. */
export function usedIn(wrap: number): number {
  return wrap === 1 ? AVAIL | USED : 0;
}

export class PackedChain extends Chain {
  /** The last descriptor has NEXT, too. */
  isOpen = false;
  /** AVAIL and USED of each descriptor, if not as they have to be. */
  marks: (() => number) | null = null;

  /**
   * Writes it to the ring from a place on.
   * @param descriptorsAt where the ring has its descriptors, in the control region
   * @param anyId of descriptors whose id means nothing
   */
  writeTo(descriptorsAt: number, size: number, from: Position, id: number, anyId: () => number): void {
    const inRing = this.table === null ? this.ring : [...this.ring, this.writeTable(this.table)];
    inRing.forEach((descriptor, i) => {
      const { index, wrap } = advance(from, i, size);
      const isLast = i === inRing.length - 1;
      const marks = this.marks === null ? availableIn(wrap) : this.marks();
      const next = isLast && !this.isOpen ? 0 : NEXT;
      const word = (isLast ? id : anyId()) | ((descriptor.flags | next | marks) << 16);
      this.write(descriptorsAt + 16 * index, descriptor, word >>> 0);
    });
  }

  protected override tableWord(_index: number, flags: number): number {
    return flags << 16;
  }
}
