/**
 * One ring of a ring attack: it is filled with chains, and looked at after the device had it. What split and packed rings have in
 * common; how they tell what was taken and answered is theirs.
 */
import type { Random } from '../../src/poller/clock.js';
import { CONTROL_BYTES } from './attack-memory.js';
import type { SessionFeatures } from './attack-session.js';
import { QUEUES, RING_SLOT_BYTES } from './burst-memory.js';
import type { BurstMemory } from './burst-memory.js';
import { chance, pick } from './boundaries.js';
import { Finding } from './finding.js';
import { BROKEN, LAWFUL, ODD, OWN_TABLE } from './requests.js';
import type { Check, RequestKind, Requests } from './requests.js';

/** In the slot of a ring. */
const AVAILABLE_AT = RING_SLOT_BYTES / 2;
const USED_AT = (RING_SLOT_BYTES * 3) / 4;
const PER_RING_MAX = 100;
/** Of a ring that may go on anywhere: most are not looked at. */
const PER_TRACKED_RING_MAX = 10;
/** Kinds that a device has to take. What an empty buffer says of its place may be no address at all. */
const KEEPS_RULES = [...LAWFUL, ...ODD].filter((kind) => kind !== 'emptyBuffers');

/** Of the three parts of a ring; in a packed one the last two are the driver's and the device's event suppression. */
export interface RingParts {
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

/** A chain that was offered. */
export interface Offer {
  readonly kind: string;
  /** What the used entry calls it: its head, or its buffer id. */
  readonly id: number;
  /** Descriptors that it takes of a packed ring; NaN: nobody knows, or more than there are. */
  readonly count: number;
  /** Bytes the device may write by it at most; NaN: nobody knows. */
  readonly writableBytes: number;
  readonly check: Check;
}

export interface RingCounters {
  /** Offers that the device took or broke the ring at, by ring and kind. */
  readonly kinds: Record<string, number>;
  cases: number;
  /** Requests that kept the rules and whose results were checked. */
  lawful: number;
  bursts: number;
}

export function newRingCounters(): RingCounters {
  return { kinds: {}, cases: 0, lawful: 0, bursts: 0 };
}

/** What the rings of an attack have in common. */
export interface RingContext {
  readonly memory: BurstMemory;
  readonly requests: Requests;
  readonly random: Random;
  readonly counters: RingCounters;
  readonly features: SessionFeatures;
}

export abstract class AttackedRing<Kind extends string> {
  readonly index: number;
  readonly size: number;
  /** Of its parts in the control region. */
  readonly at: RingParts;
  /** What the device is told of that: as it is, or somewhere the ring cannot lie. */
  readonly told: RingParts;
  /** Where the device is to go on, for SET_VRING_BASE. */
  base = 0;
  /** Entries that the in-flight region in force has for it. */
  trackedMax = Infinity;
  protected offers: Offer[] = [];
  /** Nothing more is to be offered: what was last takes up what is left, or more. */
  protected isClosed = false;
  protected readonly memory: BurstMemory;
  protected readonly requests: Requests;
  protected readonly random: Random;
  protected readonly features: SessionFeatures;
  readonly #counters: RingCounters;
  readonly #name: 'split' | 'packed';
  /** Kinds that break a rule of this kind of ring. */
  readonly #broken: readonly Kind[];
  /** Kinds of which no device makes anything. */
  readonly #refused: readonly string[];

  /** @param bytes sizes of its parts */
  constructor(
    context: RingContext,
    name: 'split' | 'packed',
    index: number,
    size: number,
    bytes: RingParts,
    broken: readonly Kind[],
    refused: readonly (Kind | RequestKind)[],
  ) {
    this.memory = context.memory;
    this.requests = context.requests;
    this.random = context.random;
    this.features = context.features;
    this.#counters = context.counters;
    this.#name = name;
    this.#broken = broken;
    this.#refused = refused;
    this.index = index;
    this.size = size;
    const slot = (index % QUEUES) * RING_SLOT_BYTES;
    this.at = { descriptors: slot, available: slot + AVAILABLE_AT, used: slot + USED_AT };
    this.told = this.at;
    if (name === 'packed' && chance(this.random, 1)) {
      this.told = { ...this.at, available: this.at.available + 2 };
    } else if (chance(this.random, 3)) {
      const part = pick(this.random, ['descriptors', 'available', 'used'] as const);
      // The last bytes of it are beyond the region, or all are.
      const at = CONTROL_BYTES - bytes[part] + pick(this.random, [16, bytes[part] + 16]);
      this.told = { ...this.at, [part]: Math.ceil(at / 16) * 16 };
    }
  }

  /** It lies where no ring can, or has no room in the in-flight region: the device does not start it. */
  get isAbsent(): boolean {
    return this.told !== this.at || this.size > this.trackedMax;
  }

  /** Descriptors that are free. */
  protected abstract get room(): number;

  /** Clears it and chooses where it begins. */
  protected abstract begin(): void;

  /** Lays out a chain of one of the common kinds. Returns false when there is no room for it. */
  protected abstract offerRequest(kind: RequestKind, useTable: boolean): boolean;

  /** Lays out a chain that breaks a rule of this kind of ring. Returns false when there is no room for it. */
  protected abstract offerBroken(kind: Kind, useTable: boolean): boolean;

  /** Makes available what was offered. */
  protected abstract end(): void;

  /** Changes a few words of it while the device runs. */
  abstract meddle(): void;

  /** Has what the device may always write of it forgiven, after the memory's snapshot. */
  abstract allow(): void;

  /** Where its used ring is: an index, that of a packed ring with its wrap counter in bit 15. */
  abstract get usedPlace(): number;

  /** Checks what the device has made of it. Throws Finding. @param nextBase where it has stopped */
  abstract look(nextBase: number, isBroken: boolean): void;

  /** As `look`, when a hostile in-flight region was said where it goes on. */
  lookTracked(nextBase: number): void {
    if (this.isAbsent) this.checkAbsent(nextBase);
    this.#counters.cases++;
  }

  fill(): void {
    const { random } = this;
    this.offers = [];
    this.isClosed = false;
    this.begin();
    const isTracked = this.memory.mode === 'tracked';
    const count = Math.min(this.room, 1 + random.below(isTracked ? PER_TRACKED_RING_MAX : PER_RING_MAX));
    // How likely each is to break the ring differs from ring to ring: what is behind the break is not looked at.
    const badness = isTracked ? 0 : pick(random, [0, 1, 3, 20]);
    while (this.offers.length < count && !this.isClosed && this.memory.hasRoom) {
      // Most need three descriptors; a ring of one or two takes them in a table.
      const useTable = this.features.indirect && (this.room < 4 || chance(random, 25));
      if (!this.#offer(badness, useTable)) break;
    }
    this.end();
  }

  #offer(badness: number, useTable: boolean): boolean {
    const { random } = this;
    if (this.room < 1) return false;
    const isBroken = chance(random, badness);
    const own = random.below(BROKEN.length + this.#broken.length) - BROKEN.length;
    if (isBroken && own >= 0) return this.offerBroken(this.#broken[own]!, useTable);
    if (!useTable && this.room < 3) return false;
    const kind = pick(random, isBroken ? BROKEN : chance(random, 15) ? LAWFUL : ODD);
    return this.offerRequest(kind, useTable);
  }

  protected checkAbsent(nextBase: number, isBroken = false): void {
    if (nextBase !== this.base || isBroken) {
      this.fail(
        `is at 0x${nextBase.toString(16)} instead of 0x${this.base.toString(16)}, and cannot have been started`,
      );
    }
  }

  /** A ring is broken by a chain that breaks a rule, or may. @param taken chains */
  protected checkBreak(taken: number): void {
    // A request without a status is taken first.
    const last = this.offers.slice(Math.max(0, taken - 1), taken + 1);
    const rules: readonly string[] = KEEPS_RULES.filter((kind) => this.features.indirect || !OWN_TABLE.has(kind));
    if (last.every(({ kind }) => rules.includes(kind))) {
      this.fail(`was broken at ${last.map(({ kind }) => kind).join(' or ')}`);
    }
  }

  /** What cannot be carried out by any reading of the rules is not taken. */
  protected checkTaken(offers: readonly Offer[]): void {
    const wrong = offers.find(({ kind }) => this.#refused.includes(kind));
    if (wrong !== undefined) this.fail(`${wrong.kind} was taken`);
  }

  /** Counts what the device took, and what it broke the ring at. */
  protected count(offers: readonly Offer[]): void {
    const counters = this.#counters;
    for (const { kind, check } of offers) {
      const name = `${this.#name} ${kind}`;
      counters.kinds[name] = (counters.kinds[name] ?? 0) + 1;
      if (check === null) counters.cases++;
    }
  }

  /** Takes the request that a used entry names out of those in flight, and looks at its answer. Undefined when there is none. */
  protected answered(open: Offer[], id: number, length: number): Offer | undefined {
    const which = open.findIndex((offer) => offer.id === id);
    if (which < 0) return undefined;
    const [offer] = open.splice(which, 1);
    const { kind, writableBytes, check } = offer!;
    if (length > writableBytes) {
      throw new Finding('memory', `${kind}: used length ${length}, writable are ${writableBytes}`);
    }
    check?.(length);
    return offer;
  }

  /** Throws when a request was forgotten that keeps the rules. @param open taken, and not answered */
  protected noneLost(open: readonly Offer[]): void {
    const lost = open.find(({ check }) => check !== null);
    if (lost !== undefined) this.fail(`${lost.kind} was taken and never answered`);
  }

  protected fail(what: string): never {
    throw new Finding('answer', `${this.#name} ring ${this.index}: ${what}`);
  }
}
