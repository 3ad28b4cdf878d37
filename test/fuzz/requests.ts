/**
 * Requests of every kind, as chains for any ring: ones that keep all rules, whose results are known, odd ones, and ones that break a
 * rule that split and packed rings share. Rules of one of them only are broken by split-ring.ts and packed-ring.ts.
 */
import type { Random } from '../../src/poller/clock.js';
import { RequestType, Status } from '../frontend/protocol.js';
import type { BurstMemory } from './burst-memory.js';
import { anyU32, anyU64, chance, pick, words } from './boundaries.js';
import type { Words } from './boundaries.js';
import { INDIRECT, NEXT, WRITE } from './chain.js';
import type { Chain } from './chain.js';
import { Finding } from './finding.js';

const KIB = 1024;

/** Kinds that keep the rules: their results are known. */
export const LAWFUL = ['getId', 'flush', 'read', 'write', 'beyondEnd', 'unsupported'] as const;
/** Kinds that keep the rules in a way no driver would. */
export const ODD = [
  'splitHeader',
  'emptyBuffers',
  'oneBuffer',
  'overSeam',
  'manyPieces',
  'misaligned',
  'oddLength',
  'indirect',
  'misalignedTable',
  'hugeSector',
  'ranges',
  'shortHeader',
] as const;
/** Kinds that break a rule, or may. */
export const BROKEN = [
  'nestedIndirect',
  'indirectNext',
  'directThenIndirect',
  'tableLength',
  'tableOutside',
  'tableAnywhere',
  'readableLast',
  'noStatus',
  'addressBeyond',
  'lengthBeyond',
  'tooLong',
] as const;

type LawfulKind = (typeof LAWFUL)[number];
export type RequestKind = LawfulKind | (typeof ODD)[number] | (typeof BROKEN)[number];

/** Kinds that are nothing without their own table, or without none. */
export const OWN_TABLE: ReadonlySet<RequestKind> = new Set<RequestKind>([
  'indirect',
  'misalignedTable',
  'nestedIndirect',
  'indirectNext',
  'directThenIndirect',
  'tableLength',
  'tableOutside',
  'tableAnywhere',
  'tooLong',
]);

/** Looks at the answer of a request that keeps the rules; null for others. */
export type Check = ((usedBytes: number) => void) | null;

export interface RequestOptions {
  /** Its descriptors go into a table. */
  readonly useTable: boolean;
  /** Descriptors that the ring has left. */
  readonly room: number;
}

export class Requests {
  /** Answers that were checked. */
  checked = 0;
  readonly #memory: BurstMemory;
  readonly #random: Random;
  readonly #target: { readonly serial: string; readonly isReadOnly: boolean };

  constructor(memory: BurstMemory, random: Random, target: { readonly serial: string; readonly isReadOnly: boolean }) {
    this.#memory = memory;
    this.#random = random;
    this.#target = target;
  }

  /** A request of any type, which keeps the rules as far as a header goes. */
  any(chain: Chain): void {
    chain.readable(this.#header(), 16);
    this.#dataAndStatus(chain);
  }

  /** A header alone. */
  headerOf(chain: Chain, length = 16): void {
    chain.readable(this.#header(), length);
  }

  /** Descriptors for a chain. Returns how to look at the answer, undefined when there is no room for it. */
  layOut(chain: Chain, kind: RequestKind, options: RequestOptions): Check | undefined {
    const random = this.#random;
    const memory = this.#memory;
    const { useTable, room } = options;
    if (useTable && !OWN_TABLE.has(kind)) chain.beginTable();
    switch (kind) {
      case 'getId':
        return this.#getId(chain);
      case 'flush':
      case 'unsupported':
      case 'beyondEnd':
      case 'write':
      case 'read':
        return this.#plain(chain, kind);
      case 'splitHeader': {
        if (room < 6 && !useTable) return undefined;
        const header = this.#header();
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
        chain.add(anyU64(random, memory.memory.edges), 0, 0);
        chain.readable(this.#header(), 16);
        chain.add(anyU64(random, memory.memory.edges), 0, 0);
        chain.add(anyU64(random, memory.memory.edges), 0, WRITE);
        this.#dataAndStatus(chain);
        if (chance(random, 50)) chain.add([0, 0], 0, WRITE);
        return null;
      case 'oneBuffer':
        // Header and data to be read in one, data to be written and status in another.
        chain.readable(this.#header(), 16 + 512 * random.below(4));
        chain.writable(memory.hostilePlace(2048), 1 + 512 * random.below(4));
        return null;
      case 'overSeam':
        chain.readable(memory.header(RequestType.read, this.#sector()), 16);
        chain.writable(memory.memory.right.guestAddress - 1 - random.below(2048), 512 * (1 + random.below(8)));
        chain.writable(memory.hostilePlace(1), 1);
        return null;
      case 'manyPieces': {
        const pieces = useTable ? pick(random, [16, 100, 900]) : Math.min(room - 2, 16);
        if (pieces < 1) return undefined;
        chain.readable(memory.header(RequestType.read, this.#sector()), 16);
        for (let i = 0; i < pieces; i++) chain.writable(memory.hostilePlace(8), pick(random, [1, 1, 2, 3, 7, 8]));
        chain.writable(memory.hostilePlace(1), 1);
        return null;
      }
      case 'misaligned':
        chain.readable(memory.header(this.#anyType(), this.#sector(), 1 + random.below(15)), 16);
        chain.writable(memory.hostilePlace(4096) + 1 + random.below(600), 512);
        chain.writable(memory.hostilePlace(1), 1);
        return null;
      case 'oddLength':
        chain.readable(memory.header(RequestType.read, this.#sector()), 16);
        chain.writable(memory.hostilePlace(4096), 1 + random.below(4095));
        chain.writable(memory.hostilePlace(1), 1);
        return null;
      case 'indirect':
        chain.beginTable({ flags: chance(random, 50) ? WRITE : 0 });
        this.any(chain);
        return null;
      case 'misalignedTable':
        chain.beginTable({ shift: 1 + random.below(15) });
        this.any(chain);
        return null;
      case 'hugeSector':
        chain.readable(memory.header(this.#anyType(), anyU64(random)), 16);
        this.#dataAndStatus(chain);
        return null;
      case 'ranges':
        this.#ranges(chain);
        return null;
      case 'shortHeader':
        this.headerOf(chain, random.below(16));
        this.#dataAndStatus(chain);
        return null;
      case 'directThenIndirect':
        if (room < 2) return undefined;
        this.headerOf(chain);
        chain.beginTable();
        this.#dataAndStatus(chain);
        return null;
      default:
        this.#breakRule(chain, kind);
        return null;
    }
  }

  #getId(chain: Chain): Check | undefined {
    const memory = this.#memory;
    chain.readable(memory.header(RequestType.getId, [0, 0]), 16);
    const data = memory.lawfulPlace(20);
    const status = memory.lawfulPlace(1);
    if (data < 0 || status < 0) return undefined;
    chain.writable(data, 20);
    chain.writable(status, 1);
    return this.#answer(status, Status.ok, 21, () => {
      const serial = memory.result(data, 20).toString('latin1').replace(/\0+$/, '');
      if (serial !== this.#target.serial) throw new Finding('answer', `serial ${JSON.stringify(serial)}`);
    });
  }

  #plain(chain: Chain, kind: Exclude<LawfulKind, 'getId'>): Check | undefined {
    const random = this.#random;
    const memory = this.#memory;
    const type = {
      flush: RequestType.flush,
      unsupported: pick(random, [2, 3, 5, 7, 9, 12, 14, 26, 0x7fffffff]),
      beyondEnd: RequestType.read,
      write: RequestType.write,
      read: RequestType.read,
    }[kind];
    const isBeyond = kind === 'beyondEnd';
    const sector: Words = isBeyond ? [random.below(2 ** 31), 1 + random.below(2 ** 31)] : this.#sector();
    chain.readable(memory.header(type, sector), 16);
    const bytes = 512 * (1 + random.below(4));
    const isRead = kind === 'read' || isBeyond;
    if (kind === 'write') chain.readable(memory.data(512), bytes);
    if (isRead) {
      const data = memory.lawfulPlace(bytes);
      if (data < 0) return undefined;
      chain.writable(data, bytes);
    }
    const status = memory.lawfulPlace(1);
    if (status < 0) return undefined;
    chain.writable(status, 1);
    if (isBeyond || (kind === 'write' && this.#target.isReadOnly)) return this.#answer(status, Status.ioError, 1);
    if (kind === 'unsupported') return this.#answer(status, Status.unsupported, 1);
    return this.#answer(status, Status.ok, isRead ? bytes + 1 : 1);
  }

  #ranges(chain: Chain): void {
    const random = this.#random;
    const header = this.#memory.header(pick(random, [RequestType.discard, RequestType.writeZeroes]), [0, 0]);
    const count = pick(random, [0, 1, 1, 2, 16, 17]);
    for (let i = 0; i < count; i++) {
      const [lo, hi] = chance(random, 70) ? this.#sector() : anyU64(random);
      const sectors = chance(random, 70) ? random.below(64) : anyU32(random);
      this.#memory.addToHeader([lo, hi, sectors, pick(random, [0, 0, 0, 1, 2, 0xffffffff])]);
    }
    chain.readable(header, 16 * (1 + count) - pick(random, [0, 0, 0, 1, 8]));
    chain.writable(this.#memory.hostilePlace(1), 1);
  }

  #breakRule(chain: Chain, kind: Exclude<(typeof BROKEN)[number], 'directThenIndirect'>): void {
    const random = this.#random;
    const memory = this.#memory;
    switch (kind) {
      case 'nestedIndirect':
        chain.beginTable();
        this.headerOf(chain);
        chain.add(words(memory.tables), 16 * (1 + random.below(4)), INDIRECT);
        chain.writableBytes = NaN;
        return;
      case 'indirectNext':
        chain.beginTable({ flags: NEXT, next: random.below(32) });
        this.any(chain);
        return;
      case 'tableLength': {
        const lengths = [0, 1, 8, 15, 17, 31, 16 * 1025, 16 * 65536, 0x7ffffff0, 0xfffffff0, 0xffffffff];
        chain.beginTable({ lengthBytes: pick(random, lengths) });
        this.any(chain);
        chain.writableBytes = NaN;
        return;
      }
      case 'tableOutside':
        chain.add(memory.strayAddress(), 16 * (1 + random.below(8)), INDIRECT);
        chain.writableBytes = NaN;
        return;
      case 'tableAnywhere':
        chain.add(words(memory.headersOrData()), 16 * (1 + random.below(64)), INDIRECT);
        chain.writableBytes = NaN;
        return;
      case 'readableLast':
        chain.writable(memory.hostilePlace(16), 16);
        this.headerOf(chain);
        return;
      case 'noStatus':
        this.headerOf(chain);
        if (chance(random, 50)) chain.add([0, 0], 0, WRITE);
        return;
      case 'addressBeyond':
        this.headerOf(chain);
        chain.add(memory.strayAddress(), pick(random, [1, 512, 4096]), pick(random, [0, WRITE]));
        chain.writable(memory.hostilePlace(1), 1);
        return;
      case 'lengthBeyond': {
        this.headerOf(chain);
        const { control, right, short } = memory.memory;
        const region = pick(random, [control, right, short]);
        const into = random.below(region.sizeBytes);
        const left = region.sizeBytes - into;
        const length = pick(random, [left, left + 1, left + 4096, left + 64 * KIB, 0x7fffffff, 0xffffffff]);
        // The control region is nobody's to write.
        chain.add(words(region.guestAddress + into), length, region === control ? 0 : WRITE);
        chain.writable(memory.hostilePlace(1), 1);
        return;
      }
      case 'tooLong': {
        // In a table, every entry a whole region: 2^32 bytes and more.
        chain.beginTable();
        this.headerOf(chain);
        const { guestAddress, sizeBytes } = memory.memory.right;
        for (let i = 0; i < 40; i++) chain.writable(guestAddress, sizeBytes);
        chain.add(words(guestAddress), pick(random, [0xffffffff, 0x80000000, sizeBytes]), WRITE);
        return;
      }
    }
  }

  #dataAndStatus(chain: Chain): void {
    const random = this.#random;
    if (chance(random, 30)) chain.readableAfter(this.#memory.data(1), 512);
    if (chance(random, 60)) chain.writable(this.#memory.hostilePlace(4096), pick(random, [512, 512, 1024, 4096]));
    chain.writable(this.#memory.hostilePlace(1), 1);
  }

  #header(): number {
    return this.#memory.header(this.#anyType(), this.#sector());
  }

  #anyType(): number {
    return pick(this.#random, [0, 0, 1, 1, 4, 8, 11, 13, 0x80000000, 0x80000001, 2, 0xffffffff]);
  }

  /** On the disk, of the smallest there is. */
  #sector(): Words {
    return [this.#random.below(8192), 0];
  }

  #answer(place: number, expected: number, usedBytes: number, more?: () => void): Check {
    return (used) => {
      const status = this.#memory.result(place, 1)[0];
      if (status !== expected) throw new Finding('answer', `status ${status} instead of ${expected}`);
      if (used !== usedBytes) throw new Finding('answer', `a used length of ${used} instead of ${usedBytes}`);
      more?.();
      this.checked++;
    };
  }
}
