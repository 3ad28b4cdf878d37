/** A split ring under attack, and the rules that only split rings have, broken. */
import { anyU32, chance, pick } from './boundaries.js';
import { AttackedRing } from './attacked-ring.js';
import type { Offer, RingContext } from './attacked-ring.js';
import { SplitChain } from './split-chain.js';
import type { Check, RequestKind } from './requests.js';

const SIZES = [1, 2, 8, 32, 128, 128, 128, 128] as const;

/** Kinds that break a rule, or may. */
const BROKEN = ['headBeyond', 'nextBeyond', 'loop', 'headTwice', 'indexJump', 'anyDescriptors'] as const;
type Kind = (typeof BROKEN)[number];
const REFUSED = [
  'headBeyond',
  'nextBeyond',
  'loop',
  'nestedIndirect',
  'indirectNext',
  'tableLength',
  'readableLast',
] as const;

export class SplitRing extends AttackedRing<Kind> {
  #nextDescriptor = 0;
  #usedBefore = 0;
  /** By how much the available index is more than was offered. */
  #jump = 0;

  constructor(context: RingContext, index: number) {
    const size = pick(context.random, SIZES);
    const bytes = { descriptors: 16 * size, available: 6 + 2 * size, used: 6 + 8 * size };
    super(context, 'split', index, size, bytes, BROKEN, REFUSED);
  }

  protected override get room(): number {
    return this.size - this.#nextDescriptor;
  }

  protected override begin(): void {
    const { random, memory, at, size } = this;
    memory.memory.u8.fill(0, at.descriptors, at.descriptors + 16 * size);
    this.#nextDescriptor = 0;
    this.#jump = 0;
    this.base = pick(random, [0, 1, 0x7fff, 0xfff0, 0xffff, random.below(65536)]);
    this.#usedBefore = chance(random, 50) ? this.base : random.below(65536);
    memory.writeHalf(at.used + 2, this.#usedBefore);
    memory.writeHalf(at.available, random.below(2));
    memory.writeHalf(at.available + 4 + 2 * size, random.below(65536));
  }

  protected override offerRequest(kind: RequestKind, useTable: boolean): boolean {
    const chain = new SplitChain(this.memory, this.room);
    const check = this.requests.layOut(chain, kind, { useTable, room: this.room });
    return check !== undefined && this.#offer(kind, chain, check);
  }

  protected override offerBroken(kind: Kind, useTable: boolean): boolean {
    const { random, requests, size, offers } = this;
    if (kind === 'headBeyond') return this.#offerHead(kind, pick(random, [size, size + 1, 0x7fff, 0x8000, 0xffff]));
    if (kind === 'headTwice' && offers.length > 0 && chance(random, 70)) {
      return this.#offerHead(kind, pick(random, offers).id);
    }
    if (!useTable && this.room < 3) return false;
    const chain = new SplitChain(this.memory, this.room);
    if (kind === 'anyDescriptors') return this.#anyDescriptors(chain);
    if (useTable) chain.beginTable();
    switch (kind) {
      case 'nextBeyond':
        requests.headerOf(chain);
        chain.goesOnAt = pick(random, [useTable ? 3 : size, 0x7fff, 0xffff]);
        return this.#offer(kind, chain, null);
      case 'loop':
        requests.headerOf(chain, chance(random, 50) ? 16 : 0);
        chain.writable(this.memory.hostilePlace(16), chance(random, 50) ? 16 : 0);
        chain.goesOnAt = chance(random, 50) ? 'first' : 'last';
        chain.writableBytes = NaN;
        return this.#offer(kind, chain, null);
      case 'headTwice':
        requests.any(chain);
        this.#offer(kind, chain, null);
        for (let more = 1 + random.below(3); more > 0; more--) this.#offerHead(kind, this.offers.at(-1)!.id);
        return true;
      case 'indexJump':
        requests.any(chain);
        this.#jump = pick(random, [-1, size + 1, size + 2, 0x7fff, 0x8000, 0xffff]);
        this.isClosed = true;
        return this.#offer(kind, chain, null);
    }
  }

  protected override end(): void {
    const { memory, at, base, size, offers } = this;
    offers.forEach(({ id }, i) => memory.writeHalf(at.available + 4 + 2 * ((base + i) & (size - 1)), id));
    memory.writeHalf(at.available + 2, (base + offers.length + this.#jump) & 0xffff);
  }

  override meddle(): void {
    const { random, at, size, base } = this;
    const { memory } = this.memory;
    switch (random.below(4)) {
      case 0:
        memory.poke32((at.descriptors >>> 2) + random.below(size * 4), anyU32(random));
        return;
      case 1:
        memory.poke16((at.descriptors >>> 1) + random.below(size) * 8 + 6 + random.below(2), random.below(8));
        return;
      case 2:
        memory.poke16((at.available >>> 1) + 2 + random.below(size), random.below(size + 1));
        return;
      default:
        memory.poke16((at.available >>> 1) + 1, (base + random.below(size + 1)) & 0xffff);
    }
  }

  override allow(): void {
    if (this.isAbsent) return;
    this.memory.memory.allow(this.memory.memory.control.guestAddress + this.at.used, 6 + 8 * this.size);
  }

  override get usedPlace(): number {
    return this.#usedBefore;
  }

  override look(nextBase: number, isBroken: boolean): void {
    const { offers, at, size, base } = this;
    const { isKnown } = this.memory;
    if (this.isAbsent) {
      this.checkAbsent(nextBase, isBroken);
      return;
    }
    const taken = (nextBase - base) & 0xffff;
    const isJump = offers.at(-1)?.kind === 'indexJump';
    if (isKnown && taken > offers.length && !isJump) {
      this.fail(`is at ${nextBase}: ${taken} taken of ${offers.length}`);
    }
    // What broke the ring was looked at, too.
    this.count(isJump && taken === 0 ? offers.slice(-1) : offers.slice(0, taken + 1));
    if (!isKnown) return;
    // Heads that are offered twice may be more than there are: the index jumps, too.
    if (isBroken && !isJump && offers.length <= size) this.checkBreak(taken);
    const { u16, u32 } = this.memory.memory;
    const used = (u16[(at.used + 2) >>> 1]! - this.#usedBefore) & 0xffff;
    if (used > taken) this.fail(`${used} used of ${taken} taken`);
    const open: Offer[] = offers.slice(0, Math.min(taken, offers.length));
    this.checkTaken(open);
    for (let i = 0; i < used; i++) {
      const entry = (at.used + 4 + 8 * ((this.#usedBefore + i) & (size - 1))) >>> 2;
      const id = u32[entry]!;
      if (this.answered(open, id, u32[entry + 1]!) === undefined) this.fail(`used ${id}, which is not in flight`);
    }
    this.noneLost(open);
  }

  #offer(kind: string, chain: SplitChain, check: Check): boolean {
    const id = this.#nextDescriptor;
    chain.writeTo(this.at.descriptors, id);
    this.#nextDescriptor += chain.ringCount;
    this.offers.push({ kind, id, count: 1, writableBytes: chain.writableBytes, check });
    return true;
  }

  /** Offers a head that was offered before, or that there is none of. */
  #offerHead(kind: Kind, id: number): true {
    this.offers.push({ kind, id, count: 1, writableBytes: NaN, check: null });
    return true;
  }

  /** Whatever flags, lengths and addresses; other chains of this ring are to be what they are. */
  #anyDescriptors(chain: SplitChain): boolean {
    const { random, size } = this;
    const count = 1 + random.below(Math.min(6, this.room));
    const first = this.#nextDescriptor;
    for (let i = 0; i < count; i++) {
      const { address, length } = this.memory.anyBuffer();
      const flags = random.below(8) | (chance(random, 10) ? anyU32(random) & 0xfff8 : 0);
      const next = chance(random, 80) ? first + random.below(count) : pick(random, [size, 0xffff]);
      chain.addRaw(address, length, flags, (flags | (next << 16)) >>> 0);
    }
    return this.#offer('anyDescriptors', chain, null);
  }
}
