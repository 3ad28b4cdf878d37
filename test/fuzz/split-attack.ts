/**
 * Attacks on split virtqueues: chains that keep all rules, ones that are odd, and ones that break them, offered side by side on several
 * queues. What the device makes of them is checked against what each chain allows.
 *
 * A burst: fill rings, start them, let the device have at them, perhaps change memory under it, stop them, look.
 */
import type { Random } from '../../src/poller/clock.js';
import { RequestType, Status, STATUS_UNANSWERED } from '../frontend/protocol.js';
import { CONTROL_BYTES } from './attack-memory.js';
import type { AttackMemory } from './attack-memory.js';
import { anyU32, anyU64, chance, pick, words } from './boundaries.js';
import type { Words } from './boundaries.js';
import { Finding } from './finding.js';
import { INDIRECT, NEXT, SplitChain, WRITE } from './split-chain.js';
import type { ChainPlace } from './split-chain.js';
import type { AttackSession, SessionFeatures } from './attack-session.js';

const KIB = 1024;
export const QUEUES = 8;
const SIZES = [1, 2, 8, 32, 128, 128, 128, 128] as const;
/** Control region: rings of all queues, then indirect tables, headers, data to read. */
const RING_SLOT_BYTES = 8 * KIB;
const TABLES_AT = QUEUES * RING_SLOT_BYTES;
const HEADERS_AT = 160 * KIB;
const DATA_AT = 192 * KIB;
/** Room that any chain finds at most. */
const CHAIN_TABLE_BYTES = 16 * KIB;
const CHAIN_HEADER_BYTES = 512;
/** In the slot of a ring. */
const AVAILABLE_AT = 4 * KIB;
const USED_AT = 6 * KIB;
/** What is written by requests that keep the rules lies in the first half of `left`, one beside the other. */
const LAWFUL_BYTES = 32 * KIB;
const PER_QUEUE_MAX = 100;

/** A chain that was offered. */
interface Offer {
  readonly kind: Kind;
  readonly head: number;
  /** Bytes the device may write by it at most; NaN: nobody knows. */
  readonly writableBytes: number;
  /** Looks at the answer of one that keeps the rules; null for the others. */
  readonly check: ((usedBytes: number) => void) | null;
}

interface QueueState {
  readonly index: number;
  size: number;
  /** Of the parts, in the control region. */
  descriptorsAt: number;
  availableAt: number;
  usedAt: number;
  base: number;
  usedBefore: number;
  offers: Offer[];
  nextDescriptor: number;
}

type Kind = (typeof KINDS)[number];

/** Kinds that keep the rules: their results are known. */
const LAWFUL = ['getId', 'flush', 'read', 'write', 'beyondEnd', 'unsupported'] as const;
/** Kinds that keep the rules in a way no driver would. */
const ODD = [
  'splitHeader',
  'emptyBuffers',
  'oneBuffer',
  'overSeam',
  'manyPieces',
  'misaligned',
  'oddLength',
  'indirect',
  'directThenIndirect',
  'misalignedTable',
  'hugeSector',
  'ranges',
  'shortHeader',
] as const;
/** Kinds that break a rule, or may. */
const BROKEN = [
  'headBeyond',
  'nextBeyond',
  'loop',
  'nestedIndirect',
  'indirectNext',
  'tableLength',
  'tableOutside',
  'tableAnywhere',
  'readableLast',
  'noStatus',
  'addressBeyond',
  'lengthBeyond',
  'tooLong',
  'headTwice',
  'indexJump',
  'anyDescriptors',
] as const;
export const KINDS = [...LAWFUL, ...ODD, ...BROKEN] as const;

export interface RingCounters {
  /** Offers that the device took or broke the ring at, by kind. */
  readonly kinds: Record<Kind, number>;
  cases: number;
  /** Requests that kept the rules and whose results were checked. */
  lawful: number;
  bursts: number;
}

export function newRingCounters(): RingCounters {
  const kinds = Object.fromEntries(KINDS.map((kind) => [kind, 0])) as Record<Kind, number>;
  return { kinds, cases: 0, lawful: 0, bursts: 0 };
}

export class SplitAttack implements ChainPlace {
  readonly #memory: AttackMemory;
  readonly #random: Random;
  readonly #session: AttackSession;
  readonly #counters: RingCounters;
  readonly #hasIndirect: boolean;
  readonly #isReadOnly: boolean;
  readonly #serial: string;
  readonly #queues: QueueState[] = [];
  #tableAt = TABLES_AT;
  #headerAt = HEADERS_AT;
  #lawfulAt = 0;
  /** Descriptors of this burst lead anywhere, rings and tables included. */
  #isWild = false;
  /** Nothing makes the device write to rings, tables or results of others: all of it can be checked, not the guards alone. */
  #isKnown = false;

  constructor(
    session: AttackSession,
    features: SessionFeatures,
    target: { readonly serial: string; readonly isReadOnly: boolean },
    random: Random,
    counters: RingCounters,
  ) {
    this.#session = session;
    this.#memory = session.memory;
    this.#random = random;
    this.#counters = counters;
    this.#hasIndirect = features.indirect;
    this.#isReadOnly = target.isReadOnly;
    this.#serial = target.serial;
    for (let index = 0; index < QUEUES; index++) {
      const size = pick(random, SIZES);
      const slot = index * RING_SLOT_BYTES;
      const descriptorsAt = slot;
      this.#queues.push({
        index,
        size,
        descriptorsAt,
        availableAt: slot + AVAILABLE_AT,
        usedAt: slot + USED_AT,
        base: 0,
        usedBefore: 0,
        offers: [],
        nextDescriptor: 0,
      });
      const guest = session.memory.control.guestAddress;
      const place = { descriptors: guest + slot, available: guest + slot + AVAILABLE_AT, used: guest + slot + USED_AT };
      session.describeRing(index, size, place);
      if (features.protocol) session.enable(index);
    }
  }

  /** One burst on all queues. Returns false when the session is over. */
  burst(): boolean {
    const random = this.#random;
    const mode = random.below(10);
    const isRace = mode === 0;
    this.#isWild = mode === 1;
    this.#isKnown = mode > 1;
    this.#fill();
    const memory = this.#memory;
    memory.snapshot();
    this.#allowUsedRings();
    for (const [address, length] of this.#writable) memory.allow(address, length);
    for (const queue of this.#queues) this.#session.start(queue.index, queue.base);
    if (!this.#session.barrier(isRace ? () => this.#meddle() : undefined)) return this.#endedEarly();
    if (isRace) for (let i = 0; i < 200; i++) this.#meddle();
    const bases = this.#session.stop(this.#queues.map(({ index }) => index));
    if (bases === undefined) return this.#endedEarly();
    this.#queues.forEach((queue, i) => this.#look(queue, bases[i]!));
    memory.verify(!this.#isKnown);
    this.#counters.bursts++;
    return true;
  }

  /** A session whose memory is whole ends only when the front-end says so. */
  #endedEarly(): boolean {
    throw new Finding('answer', 'the device ended a session for what its guest did');
  }

  // ---- Filling

  #writable: [number, number][] = [];

  #fill(): void {
    const random = this.#random;
    // What an earlier burst left would lead chains that go astray to memory that nobody may write any more.
    this.#memory.u8.fill(0, TABLES_AT, this.#tableAt);
    this.#tableAt = TABLES_AT;
    this.#headerAt = HEADERS_AT;
    this.#lawfulAt = 0;
    this.#writable = [];
    for (const queue of this.#queues) {
      this.#memory.u8.fill(0, queue.descriptorsAt, queue.descriptorsAt + 16 * queue.size);
      queue.offers = [];
      queue.nextDescriptor = 0;
      queue.base = pick(random, [0, 1, 0x7fff, 0xfff0, 0xffff, random.below(65536)]);
      queue.usedBefore = chance(random, 50) ? queue.base : random.below(65536);
      this.#u16(queue.usedAt + 2, queue.usedBefore);
      this.#u16(queue.availableAt, random.below(2));
      this.#u16(queue.availableAt + 4 + 2 * queue.size, random.below(65536));
      const count = Math.min(queue.size, 1 + random.below(PER_QUEUE_MAX));
      let jump = 0;
      // How likely each is to break the ring differs from ring to ring: what is behind the break is not looked at.
      const badness = pick(random, [0, 1, 3, 20]);
      while (queue.offers.length < count) {
        const kind = this.#nextKind(badness);
        const before = queue.offers.length;
        if (!this.#offer(queue, kind)) break;
        if (kind === 'indexJump') jump = pick(random, [-1, queue.size + 1, queue.size + 2, 0x7fff, 0x8000, 0xffff]);
        if (queue.offers.length === before || jump !== 0) break;
      }
      queue.offers.forEach(({ head }, i) => {
        this.#u16(queue.availableAt + 4 + 2 * ((queue.base + i) & (queue.size - 1)), head);
      });
      this.#u16(queue.availableAt + 2, (queue.base + queue.offers.length + jump) & 0xffff);
    }
  }

  #nextKind(badness: number): Kind {
    const random = this.#random;
    if (chance(random, badness)) return pick(random, BROKEN);
    return chance(random, 15) ? pick(random, LAWFUL) : pick(random, ODD);
  }

  /** Lays out a chain of this kind and notes it as offered. Returns false when the ring has no room for it. */
  #offer(queue: QueueState, kind: Kind): boolean {
    const chain = new SplitChain(this, queue);
    const check = this.#layOut(queue, chain, kind);
    if (check === undefined) return false;
    const head = chain.forcedHead ?? chain.head;
    if (head < 0) return false;
    queue.offers.push({ kind, head, writableBytes: chain.writableBytes, check });
    for (let i = 0; i < chain.again; i++) queue.offers.push({ kind, head, writableBytes: NaN, check: null });
    return true;
  }

  /** Returns what to check of the answer: null for nothing, undefined when there is no room. */
  #layOut(queue: QueueState, chain: SplitChain, kind: Kind): Offer['check'] | undefined {
    const random = this.#random;
    const room = queue.size - queue.nextDescriptor;
    const hasRoom = HEADERS_AT - this.#tableAt > CHAIN_TABLE_BYTES && DATA_AT - this.#headerAt > CHAIN_HEADER_BYTES;
    if (room < 1 || !hasRoom) return undefined;
    // Most need three descriptors; a ring of one or two takes them in a table.
    const useTable = this.#hasIndirect && (room < 4 || chance(random, 25));
    if (!useTable && room < 3 && kind !== 'headBeyond' && kind !== 'headTwice') return undefined;
    switch (kind) {
      case 'getId': {
        if (useTable) chain.table();
        chain.readable(this.#header(RequestType.getId, [0, 0]), 16);
        const data = this.#lawfulPlace(20);
        const status = this.#lawfulPlace(1);
        if (data < 0 || status < 0) return undefined;
        chain.writable(data, 20);
        chain.writable(status, 1);
        return this.#answer(status, Status.ok, 21, () => this.#checkSerial(data));
      }
      case 'flush':
      case 'unsupported':
      case 'beyondEnd':
      case 'write':
      case 'read':
        return this.#plain(chain, kind, useTable);
      case 'splitHeader': {
        if (room < 6 && !useTable) return undefined;
        if (useTable) chain.table();
        const header = this.#header(this.#anyType(), this.#sector());
        let at = 0;
        for (let parts = 1 + random.below(3); parts > 0 && at < 16; parts--) {
          const length = parts === 1 ? 16 - at : 1 + random.below(16 - at);
          chain.readable(header + at, length);
          at += length;
        }
        this.#dataAndStatus(chain);
        return null;
      }
      case 'emptyBuffers':
        if (room < 8 && !useTable) return undefined;
        if (useTable) chain.table();
        chain.add(anyU64(random, this.#memory.edges), 0, 0);
        chain.readable(this.#header(this.#anyType(), this.#sector()), 16);
        chain.add(anyU64(random, this.#memory.edges), 0, 0);
        chain.add(anyU64(random, this.#memory.edges), 0, WRITE);
        this.#dataAndStatus(chain);
        if (chance(random, 50)) chain.add([0, 0], 0, WRITE);
        return null;
      case 'oneBuffer': {
        // Header and data to be read in one, data to be written and status in another.
        if (useTable) chain.table();
        const header = this.#header(this.#anyType(), this.#sector());
        chain.readable(header, 16 + 512 * random.below(4));
        chain.writable(this.#hostilePlace(1), 1 + 512 * random.below(4));
        return null;
      }
      case 'overSeam': {
        if (useTable) chain.table();
        chain.readable(this.#header(RequestType.read, this.#sector()), 16);
        const seam = this.#memory.right.guestAddress;
        chain.writable(seam - 1 - random.below(2048), 512 * (1 + random.below(8)));
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      }
      case 'manyPieces': {
        if (useTable) chain.table();
        const pieces = useTable ? pick(random, [16, 100, 900]) : Math.min(room - 2, 16);
        if (pieces < 1) return undefined;
        chain.readable(this.#header(RequestType.read, this.#sector()), 16);
        for (let i = 0; i < pieces; i++) chain.writable(this.#hostilePlace(8), pick(random, [1, 1, 2, 3, 7, 8]));
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      }
      case 'misaligned':
        if (useTable) chain.table();
        chain.readable(this.#header(this.#anyType(), this.#sector(), 1 + random.below(15)), 16);
        chain.writable(this.#hostilePlace(4096) + 1 + random.below(600), 512);
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      case 'oddLength':
        if (useTable) chain.table();
        chain.readable(this.#header(RequestType.read, this.#sector()), 16);
        chain.writable(this.#hostilePlace(4096), 1 + random.below(4095));
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      case 'indirect':
        chain.table(chance(random, 50) ? WRITE : 0);
        chain.readable(this.#header(this.#anyType(), this.#sector()), 16);
        this.#dataAndStatus(chain);
        return null;
      case 'directThenIndirect':
        if (room < 3) return undefined;
        chain.readable(this.#header(this.#anyType(), this.#sector()), 16);
        chain.table();
        this.#dataAndStatus(chain);
        return null;
      case 'misalignedTable':
        chain.table(0, 1 + random.below(15));
        chain.readable(this.#header(this.#anyType(), this.#sector()), 16);
        this.#dataAndStatus(chain);
        return null;
      case 'hugeSector':
        if (useTable) chain.table();
        chain.readable(this.#header(this.#anyType(), anyU64(random)), 16);
        this.#dataAndStatus(chain);
        return null;
      case 'ranges':
        return this.#ranges(chain, useTable);
      case 'shortHeader':
        if (useTable) chain.table();
        chain.readable(this.#header(this.#anyType(), this.#sector()), random.below(16));
        this.#dataAndStatus(chain);
        return null;
      default:
        return this.#breakRule(queue, chain, kind, useTable);
    }
  }

  #plain(
    chain: SplitChain,
    kind: 'flush' | 'unsupported' | 'beyondEnd' | 'write' | 'read',
    useTable: boolean,
  ): Offer['check'] | undefined {
    const random = this.#random;
    if (useTable) chain.table();
    const type = {
      flush: RequestType.flush,
      unsupported: pick(random, [2, 3, 5, 7, 9, 12, 14, 26, 0x7fffffff]),
      beyondEnd: RequestType.read,
      write: RequestType.write,
      read: RequestType.read,
    }[kind];
    const isBeyond = kind === 'beyondEnd';
    chain.readable(
      this.#header(type, isBeyond ? [random.below(2 ** 31), 1 + random.below(2 ** 31)] : this.#sector()),
      16,
    );
    const bytes = 512 * (1 + random.below(4));
    const isRead = kind === 'read' || isBeyond;
    if (kind === 'write') chain.readable(this.#memory.control.guestAddress + DATA_AT + 512 * random.below(64), bytes);
    if (isRead) {
      const data = this.#lawfulPlace(bytes);
      if (data < 0) return undefined;
      chain.writable(data, bytes);
    }
    const status = this.#lawfulPlace(1);
    if (status < 0) return undefined;
    chain.writable(status, 1);
    if (isBeyond || (kind === 'write' && this.#isReadOnly)) return this.#answer(status, Status.ioError, 1);
    if (kind === 'unsupported') return this.#answer(status, Status.unsupported, 1);
    return this.#answer(status, Status.ok, isRead ? bytes + 1 : 1);
  }

  #ranges(chain: SplitChain, useTable: boolean): Offer['check'] | undefined {
    const random = this.#random;
    if (useTable) chain.table();
    const type = pick(random, [RequestType.discard, RequestType.writeZeroes]);
    const at = this.#headerAt;
    this.#header(type, [0, 0]);
    const count = pick(random, [0, 1, 1, 2, 16, 17]);
    for (let i = 0; i < count; i++) {
      const sector = chance(random, 70) ? this.#sector() : anyU64(random);
      this.#u32(this.#headerAt, sector[0]);
      this.#u32(this.#headerAt + 4, sector[1]);
      this.#u32(this.#headerAt + 8, chance(random, 70) ? random.below(64) : anyU32(random));
      this.#u32(this.#headerAt + 12, pick(random, [0, 0, 0, 1, 2, 0xffffffff]));
      this.#headerAt += 16;
    }
    const bytes = this.#headerAt - at - pick(random, [0, 0, 0, 1, 8]);
    chain.readable(this.#memory.control.guestAddress + at, bytes);
    chain.writable(this.#hostilePlace(1), 1);
    return null;
  }

  #breakRule(queue: QueueState, chain: SplitChain, kind: Kind, useTable: boolean): Offer['check'] | undefined {
    const random = this.#random;
    const { size } = queue;
    const room = size - queue.nextDescriptor;
    const header = (): number => this.#header(this.#anyType(), this.#sector());
    switch (kind) {
      case 'headBeyond':
        chain.forcedHead = pick(random, [size, size + 1, 0x7fff, 0x8000, 0xffff]);
        return null;
      case 'nextBeyond':
        if (useTable) chain.table();
        chain.readable(header(), 16);
        chain.linkTo(pick(random, [useTable ? 3 : size, 0x7fff, 0xffff]));
        return null;
      case 'loop':
        if (useTable) chain.table();
        chain.readable(header(), chance(random, 50) ? 16 : 0);
        chain.writable(this.#hostilePlace(16), chance(random, 50) ? 16 : 0);
        chain.linkTo(chance(random, 50) ? chain.first : chain.last);
        chain.writableBytes = NaN;
        return null;
      case 'nestedIndirect':
        chain.table();
        chain.readable(header(), 16);
        chain.add(words(this.#memory.control.guestAddress + TABLES_AT), 16 * (1 + random.below(4)), INDIRECT);
        chain.writableBytes = NaN;
        return null;
      case 'indirectNext':
        chain.table(NEXT, 0, chance(random, 50) ? queue.nextDescriptor : random.below(size));
        chain.readable(header(), 16);
        this.#dataAndStatus(chain);
        return null;
      case 'tableLength':
        chain.table(
          0,
          0,
          0,
          pick(random, [0, 1, 8, 15, 17, 31, 16 * 1025, 16 * 65536, 0x7ffffff0, 0xfffffff0, 0xffffffff]),
        );
        chain.readable(header(), 16);
        this.#dataAndStatus(chain);
        chain.writableBytes = NaN;
        return null;
      case 'tableOutside':
        chain.add(this.#strayAddress(), 16 * (1 + random.below(8)), INDIRECT);
        chain.writableBytes = NaN;
        return null;
      case 'tableAnywhere':
        // Where there are headers, data, rings: bytes nobody meant to be descriptors.
        chain.add(
          words(this.#memory.control.guestAddress + HEADERS_AT + random.below(CONTROL_BYTES - HEADERS_AT)),
          16 * (1 + random.below(64)),
          INDIRECT,
        );
        chain.writableBytes = NaN;
        return null;
      case 'readableLast':
        if (useTable) chain.table();
        chain.writable(this.#hostilePlace(16), 16);
        chain.readable(header(), 16);
        return null;
      case 'noStatus':
        if (useTable) chain.table();
        chain.readable(header(), 16);
        if (chance(random, 50)) chain.add([0, 0], 0, WRITE);
        return null;
      case 'addressBeyond': {
        if (useTable) chain.table();
        chain.readable(header(), 16);
        const address = this.#strayAddress();
        const length = pick(random, [1, 512, 4096]);
        chain.add(address, length, pick(random, [0, WRITE]));
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      }
      case 'lengthBeyond': {
        if (useTable) chain.table();
        chain.readable(header(), 16);
        const { control, right, short } = this.#memory;
        const region = pick(random, [control, right, short]);
        const into = random.below(region.sizeBytes);
        const left = region.sizeBytes - into;
        const length = pick(random, [left, left + 1, left + 4096, left + 64 * KIB, 0x7fffffff, 0xffffffff]);
        // The control region is nobody's to write.
        chain.add(words(region.guestAddress + into), length, region === control ? 0 : WRITE);
        chain.writable(this.#hostilePlace(1), 1);
        return null;
      }
      case 'tooLong': {
        // In a table, every entry a whole region: 2^32 bytes and more.
        chain.table();
        chain.readable(header(), 16);
        const { guestAddress, sizeBytes } = this.#memory.right;
        for (let i = 0; i < 40; i++) chain.writable(guestAddress, sizeBytes);
        chain.add(words(guestAddress), pick(random, [0xffffffff, 0x80000000, sizeBytes]), WRITE);
        return null;
      }
      case 'headTwice':
        if (queue.offers.length > 0 && chance(random, 70)) {
          chain.forcedHead = pick(random, queue.offers).head;
          chain.writableBytes = NaN;
          return null;
        }
        if (useTable) chain.table();
        else if (queue.size - queue.nextDescriptor < 3) return undefined;
        chain.readable(header(), 16);
        this.#dataAndStatus(chain);
        chain.again = 1 + random.below(3);
        return null;
      case 'indexJump':
        if (useTable) chain.table();
        chain.readable(header(), 16);
        this.#dataAndStatus(chain);
        return null;
      default: {
        // Whatever flags, lengths and addresses.
        const count = 1 + random.below(Math.min(6, room));
        const first = queue.nextDescriptor;
        for (let i = 0; i < count; i++) {
          const isPlace = chance(random, 60);
          const address = isPlace ? words(this.#hostilePlace(4096)) : this.#strayAddress();
          const length = isPlace ? random.below(4096) : anyU32(random);
          chain.raw(
            address,
            length,
            random.below(8) | (chance(random, 10) ? anyU32(random) & 0xfff8 : 0),
            // Other chains of this ring are to be what they are.
            chance(random, 80) ? first + random.below(count) : pick(random, [size, 0xffff]),
          );
        }
        chain.writableBytes = NaN;
        return null;
      }
    }
  }

  #dataAndStatus(chain: SplitChain): void {
    const random = this.#random;
    if (chance(random, 30))
      chain.readableAfter(this.#memory.control.guestAddress + DATA_AT + random.below(32 * KIB), 512);
    if (chance(random, 60)) chain.writable(this.#hostilePlace(4096), pick(random, [512, 512, 1024, 4096]));
    chain.writable(this.#hostilePlace(1), 1);
  }

  #anyType(): number {
    return pick(this.#random, [0, 0, 1, 1, 4, 8, 11, 13, 0x80000000, 0x80000001, 2, 0xffffffff]);
  }

  /** On the disk, of the smallest there is. */
  #sector(): Words {
    return [this.#random.below(8192), 0];
  }

  /** Writes a request header. Returns its guest address. */
  #header(type: number, [lo, hi]: Words, shift = 0): number {
    const { control, u8 } = this.#memory;
    const at = this.#headerAt + shift;
    this.#headerAt += shift === 0 ? 16 : 32;
    if (shift === 0) {
      this.#u32(at, type);
      this.#u32(at + 4, 0);
      this.#u32(at + 8, lo);
      this.#u32(at + 12, hi);
    } else {
      [type, 0, lo, hi].forEach((word, i) => {
        for (let k = 0; k < 4; k++) u8[at + 4 * i + k] = word >>> (8 * k);
      });
    }
    return control.guestAddress + at;
  }

  /** Memory that nothing else in this burst is to be written to; -1 when there is no more. */
  #lawfulPlace(lengthBytes: number): number {
    const at = this.#lawfulAt;
    if (at + lengthBytes > LAWFUL_BYTES) return -1;
    this.#lawfulAt += lengthBytes;
    const { left } = this.#memory;
    left.live.fill(STATUS_UNANSWERED, at, at + lengthBytes);
    return left.guestAddress + at;
  }

  /** Memory that hostile requests share; wild ones go for the rings and tables. */
  #hostilePlace(lengthBytes: number): number {
    const random = this.#random;
    const { left, right, short, control } = this.#memory;
    if (this.#isWild && chance(random, 40)) return control.guestAddress + random.below(CONTROL_BYTES - lengthBytes);
    switch (random.below(3)) {
      case 0:
        return left.guestAddress + LAWFUL_BYTES + random.below(left.sizeBytes - LAWFUL_BYTES - lengthBytes);
      case 1:
        return right.guestAddress + random.below(right.sizeBytes - lengthBytes);
      default:
        // Up to the last byte.
        return (
          short.guestAddress +
          (chance(random, 30) ? short.sizeBytes - lengthBytes : random.below(short.sizeBytes - lengthBytes))
        );
    }
  }

  /**
   * Anywhere for a descriptor to lead. While results are checked, not to what other chains rely on: the device may rightly write
   * there, or find a table of somebody's descriptors there and carry them out. No memory lies right before either, so a range
   * that begins outside does not reach it.
   */
  #strayAddress(): Words {
    const { control, left, edges } = this.#memory;
    for (;;) {
      const address = anyU64(this.#random, edges);
      const at = address[0] + address[1] * 2 ** 32;
      const isReliedOn =
        (at >= control.guestAddress && at < control.guestAddress + control.sizeBytes) ||
        (at >= left.guestAddress && at < left.guestAddress + LAWFUL_BYTES);
      if (!this.#isKnown || !isReliedOn) return address;
    }
  }

  #answer(status: number, expected: number, usedBytes: number, more?: () => void): Offer['check'] {
    const { left } = this.#memory;
    const at = status - left.guestAddress;
    return (used) => {
      if (left.live[at] !== expected) throw new Finding('answer', `status ${left.live[at]} instead of ${expected}`);
      if (used !== usedBytes) throw new Finding('answer', `a used length of ${used} instead of ${usedBytes}`);
      more?.();
      this.#counters.lawful++;
    };
  }

  #checkSerial(data: number): void {
    const { left } = this.#memory;
    const at = data - left.guestAddress;
    const serial = left.live.toString('latin1', at, at + 20).replace(/\0+$/, '');
    if (serial !== this.#serial) throw new Finding('answer', `serial ${JSON.stringify(serial)}`);
  }

  // ---- While it runs

  /** Changes a few words of what the device is looking at. */
  #meddle(): void {
    const random = this.#random;
    const queue = pick(random, this.#queues);
    const memory = this.#memory;
    switch (random.below(6)) {
      case 0:
        memory.poke32((queue.descriptorsAt >>> 2) + random.below(queue.size * 4), anyU32(random));
        return;
      case 1:
        memory.poke16(
          (queue.descriptorsAt >>> 1) + random.below(queue.size) * 8 + 6 + random.below(2),
          random.below(8),
        );
        return;
      case 2:
        memory.poke16((queue.availableAt >>> 1) + 2 + random.below(queue.size), random.below(queue.size + 1));
        return;
      case 3:
        memory.poke16((queue.availableAt >>> 1) + 1, (queue.base + random.below(queue.size + 1)) & 0xffff);
        return;
      case 4:
        memory.poke32((TABLES_AT >>> 2) + random.below(4096), anyU32(random));
        return;
      default:
        memory.poke32((HEADERS_AT >>> 2) + random.below(4096), pick(random, [0, 1, 4, 8, 11, 13]));
    }
  }

  // ---- Looking

  #allowUsedRings(): void {
    const { guestAddress } = this.#memory.control;
    for (const { usedAt, size } of this.#queues) this.#memory.allow(guestAddress + usedAt, 6 + 8 * size);
  }

  #look(queue: QueueState, nextBase: number): void {
    const { u16, u32 } = this.#memory;
    const { offers, size } = queue;
    const taken = (nextBase - queue.base) & 0xffff;
    const counters = this.#counters;
    const isKnown = this.#isKnown;
    if (isKnown && taken > offers.length && offers.at(-1)?.kind !== 'indexJump') {
      throw new Finding('answer', `ring ${queue.index} is at ${nextBase}: ${taken} taken of ${offers.length}`);
    }
    // What broke the ring was looked at, too.
    const isJump = taken === 0 && offers.at(-1)?.kind === 'indexJump';
    for (const { kind, check } of isJump ? offers.slice(-1) : offers.slice(0, taken + 1)) {
      counters.kinds[kind]++;
      if (check === null) counters.cases++;
    }
    if (!isKnown) return;
    const used = (u16[(queue.usedAt + 2) >>> 1]! - queue.usedBefore) & 0xffff;
    if (used > taken) throw new Finding('answer', `ring ${queue.index}: ${used} used of ${taken} taken`);
    const open = offers.slice(0, Math.min(taken, offers.length));
    for (let i = 0; i < used; i++) {
      const at = (queue.usedAt + 4 + 8 * ((queue.usedBefore + i) & (size - 1))) >>> 2;
      const id = u32[at]!;
      const length = u32[at + 1]!;
      const which = open.findIndex(({ head }) => head === id);
      if (which < 0) throw new Finding('answer', `ring ${queue.index}: used ${id}, which is not in flight`);
      const [offer] = open.splice(which, 1);
      if (length > offer!.writableBytes) {
        throw new Finding('memory', `${offer!.kind}: used length ${length}, writable are ${offer!.writableBytes}`);
      }
      offer!.check?.(length);
    }
    const lost = open.filter(({ check }) => check !== null);
    if (lost.length > 0)
      throw new Finding('answer', `ring ${queue.index}: ${lost[0]!.kind} was taken and never answered`);
  }

  // ---- Access

  #u16(at: number, value: number): void {
    this.#memory.u16[at >>> 1] = value;
  }

  #u32(at: number, value: number): void {
    this.#memory.u32[at >>> 2] = value;
  }

  // ---- For SplitChain

  writeDescriptor(at: number, [lo, hi]: Words, length: number, flags: number, next: number): void {
    if ((flags & WRITE) !== 0) this.#writable.push([lo + hi * 2 ** 32, length]);
    if ((at & 3) === 0) {
      this.#u32(at, lo);
      this.#u32(at + 4, hi);
      this.#u32(at + 8, length);
      this.#u32(at + 12, flags | (next << 16));
      return;
    }
    const { u8 } = this.#memory;
    [lo, hi, length, flags | (next << 16)].forEach((word, i) => {
      for (let k = 0; k < 4; k++) u8[at + 4 * i + k] = word >>> (8 * k);
    });
  }

  writeTableHolder(at: number, [lo, hi]: Words, length: number, flags: number, next: number): void {
    this.#u32(at, lo);
    this.#u32(at + 4, hi);
    this.#u32(at + 8, length);
    this.#u32(at + 12, flags | (next << 16));
  }

  beginTable(shift: number): number {
    const at = Math.ceil(this.#tableAt / 16) * 16 + shift;
    this.#tableAt = at;
    return at;
  }

  growTable(): void {
    this.#tableAt += 16;
  }

  get controlAddress(): number {
    return this.#memory.control.guestAddress;
  }
}
