/**
 * Goal: whatever a driver writes into a packed ring, in whatever order, the device takes exactly the lists that the rules allow, with
 * exactly their buffers, or declares the ring broken; and its answers are where the text says.
 *
 * Method: as in hostile-driver.test.ts, with a naive packed ring: positions are plain numbers of descriptors since the start of the
 * first lap, and everything is read afresh, byte by byte.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { INDIRECT_MAX } from '../../src/vhost-user/chain-builder.js';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import { POP_BROKEN, POP_NONE } from '../../src/vhost-user/virtqueue.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import type { PackedDriverQueue } from '../frontend/packed-driver-queue.js';
import { writePackedDescriptor } from '../frontend/packed-driver-queue.js';
import { seed } from '../support/seed.js';
import { RingDevice } from './ring-device.js';

const KIB = 1024;
const SIZE = 6;
const BASE = 2 ** 20;
const SEAM = BASE + 64 * KIB;
const END = SEAM + 8 * KIB;
const regions = [
  { guestAddress: BASE, sizeBytes: SEAM - BASE },
  { guestAddress: SEAM, sizeBytes: END - SEAM, userAddress: 0x5000_0000_0000 },
];
const AVAIL = 1 << 7;
const USED = 1 << 15;
const TABLES = [BASE + 8 * KIB, BASE + 9 * KIB + 4, BASE + 10 * KIB + 1, SEAM - 24, END - 48];

let ring: RingDevice;
const chain = new DescriptorChain();
const seen = { chains: 0, buffers: 0, broken: 0, answers: 0 };

interface Raw {
  readonly address: bigint;
  readonly lengthBytes: number;
  readonly id: number;
  readonly flags: number;
}

type Buffers = readonly (readonly [address: bigint, lengthBytes: bigint])[];

/** The model. */
class NaivePackedRing {
  available: number;
  used: number;
  readonly inflight = new Map<number, { readonly id: number; readonly count: number }>();
  readonly pushed: { readonly id: number; readonly count: number; readonly length: number }[] = [];

  constructor(position: number) {
    this.available = position;
    this.used = position;
  }

  static wrap(position: number): number {
    return Math.floor(position / SIZE) % 2 === 0 ? 1 : 0;
  }

  pop(): 'none' | 'broken' | { id: number; count: number; readable: Buffers; writable: Buffers } {
    const flags = descriptorAt(this.available % SIZE).flags & (AVAIL | USED);
    if (flags !== (NaivePackedRing.wrap(this.available) === 1 ? AVAIL : USED)) return 'none';
    const list: Raw[] = [];
    do {
      if (this.available + list.length - this.used === SIZE) return 'broken';
      list.push(descriptorAt((this.available + list.length) % SIZE));
      const { flags: own } = list.at(-1)!;
      if ((own & 4) !== 0 && (list.length > 1 || (own & 1) !== 0)) return 'broken';
    } while ((list.at(-1)!.flags & 1) !== 0);
    let buffers = list;
    const [first] = list as [Raw];
    if ((first.flags & 4) !== 0) {
      const { address, lengthBytes } = first;
      if (lengthBytes === 0 || lengthBytes % 16 !== 0 || lengthBytes > 16 * INDIRECT_MAX) return 'broken';
      if (!isMapped(address, BigInt(lengthBytes))) return 'broken';
      buffers = Array.from({ length: lengthBytes / 16 }, (_, i) => decode(ring.peek(Number(address) + 16 * i, 16)));
    }
    const readable: [bigint, bigint][] = [];
    const writable: [bigint, bigint][] = [];
    let total = 0n;
    for (const { address, lengthBytes, flags: own } of buffers) {
      const isWritable = (own & 2) !== 0;
      if (address >= 2n ** 53n || (!isWritable && writable.length > 0)) return 'broken';
      if (lengthBytes === 0) continue;
      total += BigInt(lengthBytes);
      if (!isMapped(address, BigInt(lengthBytes))) return 'broken';
      (isWritable ? writable : readable).push([address, BigInt(lengthBytes)]);
    }
    const { id } = list.at(-1)!;
    if (total > 2n ** 32n || [...this.inflight.values()].some((other) => other.id === id)) return 'broken';
    this.available += list.length;
    return { id, count: list.length, readable, writable };
  }
}

function descriptorAt(index: number): Raw {
  return decode(ring.memory.bytes(ring.driver.descriptors + 16 * index, 16));
}

function decode(bytes: Buffer): Raw {
  return {
    address: bytes.readBigUInt64LE(0),
    lengthBytes: bytes.readUInt32LE(8),
    id: bytes.readUInt16LE(12),
    flags: bytes.readUInt16LE(14),
  };
}

/** The two regions meet. */
function isMapped(address: bigint, lengthBytes: bigint): boolean {
  return address >= BigInt(BASE) && address + lengthBytes <= BigInt(END);
}

function expectedSegments(buffers: Buffers): [number, number][] {
  return buffers.flatMap(([address, lengthBytes]) => {
    const [from, to] = [Number(address), Number(address + lengthBytes)];
    const cuts = from < SEAM && to > SEAM ? [from, SEAM, to] : [from, to];
    return cuts.slice(1).map((end, i): [number, number] => {
      const place = ring.guestMemory.translateUser(ring.memory.userAddress(cuts[i]!), 1);
      return [place, end - cuts[i]!];
    });
  });
}

interface Pair {
  real: Virtqueue;
  naive: NaivePackedRing;
  broken: boolean;
}
type Command = fc.Command<Record<string, never>, Pair>;

function command(name: string, run: (pair: Pair) => void): Command {
  return { check: () => true, run: (_model, pair) => run(pair), toString: () => name };
}

const address: fc.Arbitrary<bigint> = fc.oneof(
  { weight: 6, arbitrary: fc.integer({ min: BASE + 16 * KIB, max: SEAM - 4 * KIB }).map(BigInt) },
  { weight: 2, arbitrary: fc.integer({ min: SEAM - 600, max: SEAM + 600 }).map(BigInt) },
  { weight: 1, arbitrary: fc.integer({ min: END - 300, max: END + 40 }).map(BigInt) },
  { weight: 1, arbitrary: fc.constantFrom(0n, 2n ** 53n - 1n, 2n ** 53n, 2n ** 64n - 1n, BigInt(BASE - 1)) },
);
const lengthBytes = fc.oneof(
  { weight: 8, arbitrary: fc.integer({ min: 1, max: 600 }) },
  { weight: 1, arbitrary: fc.constantFrom(0, 72 * KIB, 2 ** 31, 2 ** 32 - 1) },
);
const id = fc.oneof({ weight: 8, arbitrary: fc.nat(2 * SIZE) }, { weight: 1, arbitrary: fc.constant(0xffff) });
const buffer = fc.record({ address, lengthBytes, id, flags: fc.constantFrom(0, 0, 2) });
const anyFlags = fc.oneof(
  { weight: 6, arbitrary: fc.constantFrom(0, 1, 2, 3) },
  { weight: 1, arbitrary: fc.constantFrom(4, 5, 6, 0x7f78) },
);

const pop = command('pop', (pair) => {
  if (pair.broken) return;
  const expected = pair.naive.pop();
  const head = pair.real.pop(chain);
  if (expected === 'none') {
    expect(head).toBe(POP_NONE);
  } else if (expected === 'broken') {
    expect(head).toBe(POP_BROKEN);
    expect(pair.real.fault).not.toBeNull();
    pair.broken = true;
    seen.broken++;
  } else {
    expect(pair.real.fault).toBeNull();
    expect(head).toBeLessThan(SIZE);
    expect(pair.naive.inflight.has(head)).toBe(false);
    pair.naive.inflight.set(head, expected);
    const readable = expectedSegments(expected.readable);
    const all = [...readable, ...expectedSegments(expected.writable)];
    expect([chain.readableCount, chain.count]).toEqual([readable.length, all.length]);
    expect(all.map((_, i) => [chain.addresses[i], chain.lengths[i]])).toEqual(all);
    seen.chains++;
    seen.buffers += all.length;
  }
});

const push = (which: number, length: number): Command =>
  command(`push ${which} ${length}`, ({ real, naive }) => {
    const heads = [...naive.inflight];
    if (heads.length === 0) return;
    const [head, request] = heads[which % heads.length]!;
    real.push(head, length);
    naive.pushed.push({ ...request, length });
    naive.inflight.delete(head);
  });

const publish = command('publish', ({ real, naive }) => {
  const before = Array.from({ length: SIZE }, (_, i) => descriptorAt(i));
  real.publish();
  for (const { id: own, count, length } of naive.pushed.splice(0)) {
    const at = naive.used % SIZE;
    const lap = NaivePackedRing.wrap(naive.used) === 1 ? AVAIL | USED : 0;
    before[at] = { ...before[at]!, lengthBytes: length, id: own, flags: lap | (length > 0 ? 2 : 0) };
    naive.used += count;
    seen.answers++;
  }
  // The answers are where they have to be, and nothing else has changed.
  expect(Array.from({ length: SIZE }, (_, i) => descriptorAt(i))).toEqual(before);
});

const writeOne = (index: number, raw: Raw, flags: number, lap: number): Command =>
  command(`descriptor ${index}`, () => write(index, { ...raw, flags: flags | lap }));

/** A list as a driver makes it that keeps the rules, at the device's place: other commands wreck it, or do not. */
const lawful = (parts: readonly Raw[]): Command =>
  command(`lawful of ${parts.length}`, ({ naive }) => {
    const sorted = [...parts].sort((a, b) => a.flags - b.flags);
    sorted.forEach((part, i) => {
      const position = naive.available + i;
      const available = NaivePackedRing.wrap(position) === 1 ? AVAIL : USED;
      write(position % SIZE, { ...part, flags: part.flags | available | (i === sorted.length - 1 ? 0 : 1) });
    });
  });

const tabled = (at: number, parts: readonly Raw[], own: Raw, extraFlags: number): Command =>
  command(`table at ${at} of ${parts.length}`, ({ naive }) => {
    parts.forEach((part, i) => {
      if (at + 16 * (i + 1) > END) return;
      const bytes = Buffer.alloc(16);
      writePackedDescriptor(bytes, { ...part, flags: part.flags | 0xff01 });
      ring.poke(at + 16 * i, bytes);
    });
    const available = NaivePackedRing.wrap(naive.available) === 1 ? AVAIL : USED;
    const flags = 4 | extraFlags | available;
    write(naive.available % SIZE, { address: BigInt(at), lengthBytes: 16 * parts.length, id: own.id, flags });
  });

function write(index: number, raw: Raw): void {
  (ring.driver as PackedDriverQueue).writePacked(index, raw);
}

function restart(pair: Pair, position: number): void {
  const wrap = NaivePackedRing.wrap(position);
  (ring.driver as PackedDriverQueue).startAt({ index: position % SIZE, wrap });
  pair.real = ring.makeVirtqueue(ring.driver.base);
  pair.naive = new NaivePackedRing(position);
  pair.broken = false;
}

const parts = fc.array(buffer, { minLength: 1, maxLength: 4 });
const commands = fc.commands<Record<string, never>, Pair>(
  [
    fc.constant(pop),
    fc.constant(pop),
    parts.map(lawful),
    parts.map(lawful),
    fc.tuple(fc.constantFrom(...TABLES), parts, buffer, fc.constantFrom(0, 0, 0, 1, 2)).map((args) => tabled(...args)),
    fc
      .tuple(fc.nat(SIZE - 1), buffer, anyFlags, fc.constantFrom(0, AVAIL, USED, AVAIL | USED))
      .map((args) => writeOne(...args)),
    fc.tuple(fc.nat(7), fc.nat(2 ** 31)).map((args) => push(...args)),
    fc.tuple(fc.nat(7), fc.nat(1)).map((args) => push(...args)),
    fc.constant(publish),
    fc
      .constantFrom(0, 5, SIZE + 2)
      .map((position) => command(`restart at ${position}`, (pair) => restart(pair, position))),
  ],
  { maxCommands: 120, size: 'max' },
);

describe('a hostile driver of a packed ring', () => {
  beforeAll(() => {
    ring = new RingDevice({ packed: true, queueSize: SIZE, regions });
  });
  afterAll(() => {
    ring.restart();
    ring.close();
  });

  it('gets from the virtqueue what it gets from the naive one', () => {
    const property = fc.property(fc.nat(4 * SIZE), commands, (position, list) => {
      const pair = {} as Pair;
      restart(pair, position);
      fc.modelRun(() => ({ model: {}, real: pair }), list);
    });
    fc.assert(property, { numRuns: 1500, seed });
    expect(seen.chains).toBeGreaterThan(1000);
    expect(seen.buffers).toBeGreaterThan(1000);
    expect(seen.broken).toBeGreaterThan(500);
    expect(seen.answers).toBeGreaterThan(300);
  });
});
