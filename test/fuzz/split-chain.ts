/** Chains of a split virtqueue. */
import { Chain, NEXT } from './chain.js';

export class SplitChain extends Chain {
  /** Where the last descriptor of the ring or table goes on: at that index, or at the first or last of the chain. */
  goesOnAt: number | 'first' | 'last' | null = null;
  #first = 0;

  /**
   * Writes it to the descriptors of the ring from `first` on.
   * @param descriptorsAt where the ring has its descriptors, in the control region
   */
  writeTo(descriptorsAt: number, first: number): void {
    const isTable = this.table !== null;
    const inRing = this.table === null ? this.ring : [...this.ring, this.writeTable(this.table)];
    this.#first = first;
    inRing.forEach((descriptor, i) => {
      const index = first + i;
      const isLast = i === inRing.length - 1;
      const end = isTable
        ? descriptor.flags | ((this.tableOptions.next ?? 0) << 16)
        : this.#end(index, descriptor.flags);
      const last = isLast ? end : descriptor.flags | NEXT | ((index + 1) << 16);
      this.write(descriptorsAt + 16 * index, descriptor, last);
    });
  }

  protected override tableWord(index: number, flags: number): number {
    this.#first = 0;
    return index < this.table!.length - 1 ? flags | NEXT | ((index + 1) << 16) : this.#end(index, flags);
  }

  /** The last word of the last descriptor. */
  #end(index: number, flags: number): number {
    const at = this.goesOnAt;
    if (at === null) return flags;
    return flags | NEXT | ((at === 'first' ? this.#first : at === 'last' ? index : at) << 16);
  }
}
