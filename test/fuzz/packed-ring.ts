/**
 * A packed ring under attack, and the rules that only packed rings have, broken.
 *
 * It begins anywhere, in either lap, with nothing in flight or with what nobody knows: then its used place is before its available one.
 */
import { anyU32, chance, pick } from './boundaries.js';
import { AttackedRing } from './attacked-ring.js';
import type { Offer, RingContext } from './attacked-ring.js';
import { WRITE } from './chain.js';
import { AVAIL, PackedChain, USED, advance, availableIn, usedIn } from './packed-chain.js';
import type { Position } from './packed-chain.js';
import type { Check, RequestKind } from './requests.js';

const SIZES = [1, 2, 3, 7, 31, 100, 127, 128, 200, 255, 256] as const;
/** Longer than what a hostile in-flight region has in flight, and a list. */
const TRACKED_SIZE_MIN = 100;
const EVENT_DESC = 2;
const MARKS = [0, AVAIL, USED, AVAIL | USED] as const;

/** Kinds that break a rule, or may. */
const BROKEN = ['idTwice', 'endless', 'openEnd', 'anyMarks', 'anyDescriptors'] as const;
type Kind = (typeof BROKEN)[number];
const REFUSED = ['endless', 'openEnd', 'indirectNext', 'directThenIndirect', 'tableLength', 'readableLast'] as const;

export class PackedRing extends AttackedRing<Kind> {
  #available: Position = { index: 0, wrap: 1 };
  #used: Position = { index: 0, wrap: 1 };
  /** Descriptors between the two: taken before, and never answered. */
  #before = 0;
  /** Descriptors offered. */
  #filled = 0;
  /** Its places are beyond it: the device does not start it. */
  #isBeyond = false;
  /** They are further apart than it is long: the device takes nothing from it. */
  #isAstray = false;
  #idStep = 1;
  #idFirst = 0;

  constructor(context: RingContext, index: number) {
    const size = pick(context.random, SIZES);
    super(context, 'packed', index, size, { descriptors: 16 * size, available: 4, used: 4 }, BROKEN, REFUSED);
  }

  protected override get room(): number {
    return this.size - this.#filled - (this.#isAstray ? 0 : this.#before);
  }

  protected override begin(): void {
    const { random, memory, at, size } = this;
    this.#chooseBase();
    this.#filled = 0;
    // As the laps so far have left it.
    const { index, wrap } = this.#available;
    for (let slot = 0; slot < size; slot++) {
      const marks = usedIn(slot < index ? wrap : wrap ^ 1);
      memory.writeWords(at.descriptors + 16 * slot, [0, 0, 0, (marks << 16) >>> 0]);
    }
    memory.writeWords(at.available, [this.#anyEvent()]);
    memory.writeWords(at.used, [anyU32(random)]);
    this.#idStep = pick(random, [1, 1, 251, 0xffff]);
    this.#idFirst = pick(random, [0, 0, size, 0xffff, random.below(65536)]);
    // Where the device goes on is not known, so a list may be found to begin anywhere, but none may reach what was answered.
    if (memory.mode === 'tracked' && size < TRACKED_SIZE_MIN) this.isClosed = true;
    else if (this.room === 0) this.#endless();
  }

  protected override offerRequest(kind: RequestKind, useTable: boolean): boolean {
    const chain = new PackedChain(this.memory, this.room);
    const check = this.requests.layOut(chain, kind, { useTable, room: this.room });
    return check !== undefined && this.#offer(kind, chain, check);
  }

  protected override offerBroken(kind: Kind, useTable: boolean): boolean {
    const { random, requests, offers } = this;
    if (kind === 'endless') return this.#endless();
    if (kind === 'idTwice' && offers.length === 0) return false;
    if (!useTable && this.room < 3) return false;
    const chain = new PackedChain(this.memory, this.room);
    if (kind === 'anyDescriptors') return this.#anyDescriptors(chain);
    if (useTable) chain.beginTable();
    requests.any(chain);
    switch (kind) {
      case 'idTwice':
        return this.#offer(kind, chain, null, { id: pick(random, offers).id });
      case 'openEnd':
        // It goes on in a descriptor that was not made available and holds nothing.
        if (this.room <= chain.ringCount) return false;
        chain.isOpen = true;
        this.isClosed = true;
        return this.#offer(kind, chain, null, { count: NaN });
      case 'anyMarks':
        chain.marks = () => pick(random, MARKS);
        return this.#offer(kind, chain, null);
    }
  }

  protected override end(): void {
    // The flags of each chain make it available.
  }

  override meddle(): void {
    const { random, at, size } = this;
    const { memory } = this.memory;
    const slot = random.below(size);
    switch (random.below(5)) {
      case 0:
        memory.poke32((at.descriptors >>> 2) + 4 * slot + random.below(4), anyU32(random));
        return;
      case 1:
        memory.poke16((at.descriptors >>> 1) + 8 * slot + 7, random.below(8) | pick(random, MARKS));
        return;
      case 2:
        memory.poke16((at.descriptors >>> 1) + 8 * slot + 6, this.#id(random.below(size)));
        return;
      default:
        memory.poke32(at.available >>> 2, this.#anyEvent());
    }
  }

  override allow(): void {
    // Descriptors that are overwritten by answers are allowed once it is known which those are.
    if (this.memory.mode === 'tracked') this.#allow(this.at.descriptors, 16 * this.size);
    if (!this.isAbsent && !this.#isBeyond) this.#allow(this.at.used, 4);
  }

  override get usedPlace(): number {
    return this.#used.index | (this.#used.wrap << 15);
  }

  override look(nextBase: number, isBroken: boolean): void {
    const { offers } = this;
    if (this.isAbsent || this.#isAstray) {
      this.checkAbsent(nextBase, isBroken && (this.isAbsent || this.#isBeyond));
      return;
    }
    const { available, used } = positionsOf(nextBase);
    const taken = this.#distance(this.#available, available);
    const isKnown = this.memory.isKnown;
    let count = 0;
    let descriptors = 0;
    while (count < offers.length && descriptors < taken) descriptors += offers[count++]!.count;
    // What broke the ring was looked at, too.
    this.count(offers.slice(0, descriptors > taken ? count : count + 1));
    if (!isKnown) return;
    if (taken < 0 || taken > this.size - this.#before) this.fail(`${taken} descriptors taken`);
    const isTail = Number.isNaN(descriptors) && offers.at(-1)!.kind === 'anyDescriptors';
    if (!isTail && descriptors !== taken) {
      this.fail(
        `${taken} descriptors taken from ${hex(this.base)} on, which are not ${count} of ${offers.length} chains`,
      );
    }
    if (isBroken) this.checkBreak(count);
    this.checkTaken(offers.slice(0, count));
    const answered = this.#distance(this.#used, used);
    if (answered > this.#before + taken) this.fail(`${answered} descriptors used of ${taken} taken`);
    this.#lookAtAnswers(offers.slice(0, isTail ? count - 1 : count), answered, isTail);
    const event = this.features.eventIdx ? ((nextBase & 0xffff) | (EVENT_DESC << 16)) >>> 0 : 0;
    const [said] = this.memory.memory.u32.subarray(this.at.used >>> 2);
    if (said !== event) this.fail(`stopped at ${hex(nextBase)}, it asks for kicks by ${hex(said!)}`);
  }

  /** @param isTail behind `open` were descriptors of which nobody knows how many chains they are */
  #lookAtAnswers(open: Offer[], descriptors: number, isTail: boolean): void {
    const { u32 } = this.memory.memory;
    let place = this.#used;
    for (let done = 0; done < descriptors;) {
      const at = this.at.descriptors + 16 * place.index;
      const length = u32[(at >>> 2) + 2]!;
      const word = u32[(at >>> 2) + 3]!;
      const id = word & 0xffff;
      const offer = this.answered(open, id, length);
      if (offer === undefined) {
        if (!isTail) this.fail(`used ${id}, which is not in flight`);
        this.#allow(this.at.descriptors, 16 * this.size);
        return;
      }
      const flags = usedIn(place.wrap) | (length > 0 ? WRITE : 0);
      if (word >>> 16 !== flags)
        this.fail(`an answer at ${place.index} with flags ${hex(word >>> 16)}, not ${hex(flags)}`);
      this.#allow(at + 8, 8);
      done += offer.count;
      place = advance(place, offer.count, this.size);
      if (done > descriptors) this.fail(`${descriptors} descriptors used, which are not those of whole chains`);
    }
    this.noneLost(open);
  }

  // ---- Places

  /** Anywhere; mostly where a device would go on. */
  #chooseBase(): void {
    const { random, size } = this;
    const used = { index: random.below(size), wrap: random.below(2) };
    const ahead = chance(random, 80) ? 0 : random.below(size + 1);
    this.base = baseOf(advance(used, ahead, size), used);
    if (chance(random, 4)) {
      const half = (): number =>
        pick(random, [random.below(size), size, 0x7fff, anyU32(random) & 0x7fff]) | (random.below(2) << 15);
      this.base = (half() | (half() << 16)) >>> 0;
    }
    const positions = positionsOf(this.base);
    this.#before = this.#distance(positions.used, positions.available);
    this.#isBeyond = positions.available.index >= size || positions.used.index >= size;
    this.#isAstray = this.#isBeyond || this.#before < 0 || this.#before > size;
    this.#available = { ...positions.available, index: positions.available.index % size };
    this.#used = positions.used;
  }

  #distance(from: Position, to: Position): number {
    return to.index - from.index + (from.wrap === to.wrap ? 0 : this.size);
  }

  #allow(at: number, lengthBytes: number): void {
    this.memory.memory.allow(this.memory.memory.control.guestAddress + at, lengthBytes);
  }

  // ---- Offers

  #id(number: number): number {
    return (this.#idFirst + number * this.#idStep) & 0xffff;
  }

  /** The driver's event suppression: sensible or not. */
  #anyEvent(): number {
    const { random, size } = this;
    if (chance(random, 30)) return anyU32(random);
    return random.below(size) | (random.below(2) << 15) | (random.below(4) << 16);
  }

  #offer(
    kind: string,
    chain: PackedChain,
    check: Check,
    { id = this.#id(this.offers.length), count = chain.ringCount } = {},
  ): boolean {
    const from = advance(this.#available, this.#filled, this.size);
    chain.writeTo(this.at.descriptors, this.size, from, id, () => this.random.below(65536));
    this.#filled += chain.ringCount;
    this.offers.push({ kind, id, count, writableBytes: chain.writableBytes, check });
    return true;
  }

  /** A list that goes round for ever, or that is longer than what is free; in an empty ring, as answers would end it. */
  #endless(): boolean {
    const { random, size } = this;
    if (this.offers.length > 0) return false;
    const chain = new PackedChain(this.memory, size);
    const isRound = this.#before === 0 || this.#isAstray || chance(random, 50);
    const count = isRound ? size : this.room + 1 + random.below(this.#before);
    for (let i = 1; i < count; i++) chain.readable(this.memory.data(1), chance(random, 50) ? 0 : 16);
    chain.writable(this.memory.hostilePlace(1), 1);
    chain.isOpen = isRound;
    this.isClosed = true;
    return this.#offer('endless', chain, null, { count: NaN });
  }

  /** Whatever flags, lengths, addresses and ids: as many chains as it happens to be. They end in a descriptor that holds nothing. */
  #anyDescriptors(chain: PackedChain): boolean {
    const { random } = this;
    const count = 1 + random.below(6);
    if (this.room <= count) return false;
    for (let i = 0; i < count; i++) {
      const { address, length } = this.memory.anyBuffer();
      const { wrap } = advance(this.#available, this.#filled + i, this.size);
      const marks = chance(random, 80) ? availableIn(wrap) : pick(random, MARKS);
      const flags = random.below(8) | marks | (chance(random, 10) ? anyU32(random) & 0x7f78 : 0);
      const id = chance(random, 50) ? this.#id(random.below(this.size)) : random.below(65536);
      chain.addRaw(address, length, flags, (id | (flags << 16)) >>> 0);
    }
    this.isClosed = true;
    return this.#offer('anyDescriptors', chain, null, { count: NaN });
  }
}

/** As SET_VRING_BASE has them. */
function baseOf(available: Position, used: Position): number {
  return (available.index | (available.wrap << 15) | (used.index << 16) | (used.wrap << 31)) >>> 0;
}

function positionsOf(base: number): { readonly available: Position; readonly used: Position } {
  return {
    available: { index: base & 0x7fff, wrap: (base >>> 15) & 1 },
    used: { index: (base >>> 16) & 0x7fff, wrap: base >>> 31 },
  };
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
