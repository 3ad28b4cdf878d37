/**
 * Goal: whatever a driver writes into its ring, in whatever order, the device takes exactly the chains that the rules allow, with
 * exactly their buffers, or declares the ring broken.
 *
 * Method: fast-check makes up drivers as lists of commands, mostly nearly right, and shrinks those that fail; after each command
 * the real virtqueue is compared to a naive one over the same memory.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import { INDIRECT_MAX } from '../../src/vhost-user/chain-builder.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import { POP_BROKEN, POP_NONE } from '../../src/vhost-user/virtqueue.js';
import { writeDescriptor } from '../frontend/driver-queue.js';
import { seed } from '../support/seed.js';
import { NaiveRing } from './naive-ring.js';
import type { NaiveBuffer } from './naive-ring.js';
import { RingDevice } from './ring-device.js';

const KIB = 1024;
const SIZE = 8;
/** Two regions that meet, a gap, a third. */
const BASE = 2 ** 20;
const SEAM = BASE + 64 * KIB;
const END = SEAM + 8 * KIB;
const FAR = 2 ** 34;
const FAR_END = FAR + 16 * KIB;
const regions = [
  { guestAddress: BASE, sizeBytes: SEAM - BASE },
  { guestAddress: SEAM, sizeBytes: END - SEAM, userAddress: 0x5000_0000_0000 },
  { guestAddress: FAR, sizeBytes: FAR_END - FAR, mmapOffset: 4096 },
];

let ring: RingDevice;

interface RawDescriptor {
  readonly address: bigint;
  readonly lengthBytes: number;
  readonly flags: number;
  readonly next: number;
}

const edge = fc.tuple(fc.constantFrom(BASE, SEAM, END, FAR, FAR_END), fc.integer({ min: -40, max: 40 }));
const address: fc.Arbitrary<bigint> = fc.oneof(
  { weight: 6, arbitrary: fc.integer({ min: BASE + 16 * KIB, max: SEAM - 4 * KIB }).map(BigInt) },
  { weight: 2, arbitrary: fc.integer({ min: SEAM - 600, max: SEAM + 600 }).map(BigInt) },
  { weight: 2, arbitrary: fc.integer({ min: FAR, max: FAR_END - 600 }).map(BigInt) },
  { weight: 1, arbitrary: edge.map(([at, by]) => BigInt(at + by)) },
  { weight: 1, arbitrary: fc.constantFrom(0n, 2n ** 53n - 1n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n) },
);
const lengthBytes = fc.oneof(
  { weight: 8, arbitrary: fc.integer({ min: 1, max: 600 }) },
  { weight: 2, arbitrary: fc.constant(0) },
  { weight: 1, arbitrary: fc.constantFrom(8 * KIB, 72 * KIB, 2 ** 31, 2 ** 32 - 1) },
);
const flags = fc.oneof(
  { weight: 10, arbitrary: fc.constantFrom(0, 1, 1, 1, 2, 3, 3) },
  { weight: 1, arbitrary: fc.constantFrom(4, 5, 6, 7, 0xfff8, 0xffff) },
);
const next = fc.oneof(
  { weight: 10, arbitrary: fc.nat(SIZE - 1) },
  { weight: 1, arbitrary: fc.constantFrom(SIZE, 0xffff) },
);
const descriptor: fc.Arbitrary<RawDescriptor> = fc.record({ address, lengthBytes, flags, next });
/** Where tables lie: aligned, not aligned, over the seam, at an end. */
const tableAddress = fc.constantFrom(BASE + 8 * KIB, BASE + 9 * KIB + 4, BASE + 10 * KIB + 1, SEAM - 24, FAR, END - 48);

/** The two virtqueues; the driver's state is the memory they share. */
interface Pair {
  real: Virtqueue;
  naive: NaiveRing;
  broken: boolean;
}

type Model = Record<string, never>;
type Command = fc.Command<Model, Pair>;
const chain = new DescriptorChain();
const seen = { chains: 0, buffers: 0, broken: 0, calls: 0, published: 0 };

function command(name: string, run: (pair: Pair) => void, check: (pair: Pair) => boolean = () => true): Command {
  return {
    check: () => true,
    run: (_model, pair) => {
      if (check(pair)) run(pair);
    },
    toString: () => name,
  };
}

/** Where the device is to find a guest's buffer, cut where regions meet. */
function expectedSegments(buffers: readonly NaiveBuffer[]): [number, number][] {
  return buffers.flatMap(([start, length]) => {
    const segments: [number, number][] = [];
    for (let at = Number(start), left = Number(length); left > 0;) {
      const region = regions.find((r) => at >= r.guestAddress && at < r.guestAddress + r.sizeBytes)!;
      const part = Math.min(left, region.guestAddress + region.sizeBytes - at);
      const place = ring.guestMemory.translateUser(userAddress(at), 1);
      segments.push([place, part]);
      at += part;
      left -= part;
    }
    return segments;
  });
}

function userAddress(guestAddress: number): number {
  return ring.memory.userAddress(guestAddress);
}

function restart(pair: Pair, base: number): void {
  const { driver, memory } = ring;
  pair.real = ring.makeVirtqueue(base);
  pair.naive = new NaiveRing(memory, driver, base, driver.eventIdx, INDIRECT_MAX);
  pair.broken = false;
}

const pop = command(
  'pop',
  (pair) => {
    const expected = pair.naive.pop();
    const head = pair.real.pop(chain);
    switch (expected.kind) {
      case 'none':
        expect(head).toBe(POP_NONE);
        break;
      case 'broken':
        expect(head).toBe(POP_BROKEN);
        expect(pair.real.fault).not.toBeNull();
        pair.broken = true;
        seen.broken++;
        break;
      case 'chain': {
        expect(pair.real.fault).toBeNull();
        expect(head).toBe(expected.head);
        const readable = expectedSegments(expected.readable);
        const all = [...readable, ...expectedSegments(expected.writable)];
        expect([chain.readableCount, chain.count]).toEqual([readable.length, all.length]);
        expect(all.map((_, i) => [chain.addresses[i], chain.lengths[i]])).toEqual(all);
        const sum = (buffers: readonly NaiveBuffer[]): number =>
          buffers.reduce((n, [, length]) => n + Number(length), 0);
        expect([chain.readableBytes, chain.writableBytes]).toEqual([sum(expected.readable), sum(expected.writable)]);
        seen.chains++;
        seen.buffers += all.length;
      }
    }
    expect(pair.real.nextAvailable).toBe(pair.naive.last);
  },
  (pair) => !pair.broken,
);

const push = (which: number, length: number): Command =>
  command(`push ${which} ${length}`, (pair) => {
    const heads = [...pair.naive.inflight];
    if (heads.length === 0) return;
    const head = heads[which % heads.length]!;
    const [at, id, written] = pair.naive.push(head, length);
    pair.real.push(head, length);
    const entry = ring.memory.bytes(at, 8);
    expect([entry.readUInt32LE(0), entry.readUInt32LE(4)]).toEqual([id, written]);
  });

const publish = (event: number, noInterrupt: number): Command =>
  command(`publish, event ${event}, flags ${noInterrupt}`, (pair) => {
    const { driver } = ring;
    driver.availableBytes.writeUInt16LE((pair.naive.usedIndex + event) & 0xffff, 4 + 2 * SIZE);
    driver.availableBytes.writeUInt16LE(noInterrupt, 0);
    const expected = pair.naive.publish();
    expect(pair.real.publish()).toBe(expected);
    expect(driver.deviceUsedIndex).toBe(pair.naive.usedIndex);
    seen.published++;
    if (expected) seen.calls++;
  });

const setNotification = (on: boolean): Command =>
  command(`setNotification ${on}`, (pair) => {
    const { usedBytes, eventIdx } = ring.driver;
    expect(pair.real.setNotification(on)).toBe(on && pair.naive.hasWork);
    if (!eventIdx) expect(usedBytes.readUInt16LE(0)).toBe(on ? 0 : 1);
    else if (on) expect(usedBytes.readUInt16LE(4 + 8 * SIZE)).toBe(pair.naive.last);
  });

const writeOne = (index: number, raw: RawDescriptor): Command =>
  command(`descriptor ${index} ${show(raw)}`, () => ring.driver.writeDescriptor(index, raw));

const writeTable = (index: number, at: number, raws: readonly RawDescriptor[], extraFlags: number): Command =>
  command(`descriptor ${index}: table at ${at} of ${raws.map(show).join(', ')}`, () => {
    raws.forEach((raw, i) => {
      const bytes = Buffer.alloc(16);
      // Mostly a list that ends where the table does.
      writeDescriptor(bytes, { ...raw, next: raw.next === index ? raw.next : i + 1 });
      // A table may reach beyond memory; what is written may not.
      if (at >= FAR || at + 16 * (i + 1) <= END) ring.poke(at + 16 * i, bytes);
    });
    ring.driver.writeDescriptor(index, { address: at, lengthBytes: 16 * raws.length, flags: 4 | extraFlags });
  });

const offer = (heads: readonly number[]): Command =>
  command(`offer ${heads.join(' ')}`, () => {
    const { availableBytes } = ring.driver;
    let index = availableBytes.readUInt16LE(2);
    for (const head of heads) {
      availableBytes.writeUInt16LE(head, 4 + 2 * (index % SIZE));
      index = (index + 1) & 0xffff;
    }
    availableBytes.writeUInt16LE(index, 2);
  });

const jump = (by: number): Command =>
  command(`index += ${by}`, () => {
    const { availableBytes } = ring.driver;
    availableBytes.writeUInt16LE((availableBytes.readUInt16LE(2) + by) & 0xffff, 2);
  });

/** As after SET_VRING_BASE: nothing is in flight, the available index is where the device is. */
const startAnew = (base: number): Command =>
  command(`restart at ${base}`, (pair) => {
    const from = pair.broken ? base : pair.naive.last;
    for (const head of [...pair.naive.inflight]) {
      pair.naive.push(head, 0);
      pair.real.push(head, 0);
    }
    pair.naive.publish();
    pair.real.publish();
    if (pair.broken) ring.driver.availableBytes.writeUInt16LE(base, 2);
    restart(pair, from);
  });

function show(raw: RawDescriptor): string {
  return `{${raw.address} ${raw.lengthBytes} ${raw.flags} ${raw.next}}`;
}

/** A request as a driver makes it that keeps the rules: the other commands wreck it, or do not. */
const lawful = (index: number, parts: readonly RawDescriptor[]): Command =>
  command(`lawful ${index} of ${parts.map(show).join(', ')}`, () => {
    const sorted = parts.map((part) => ({ ...part, flags: part.flags & 2 })).sort((a, b) => a.flags - b.flags);
    sorted.forEach((part, i) => {
      const isLast = i === sorted.length - 1;
      const at = (index + i) % SIZE;
      ring.driver.writeDescriptor(at, isLast ? part : { ...part, flags: part.flags | 1, next: (at + 1) % SIZE });
    });
    const { availableBytes } = ring.driver;
    const published = availableBytes.readUInt16LE(2);
    availableBytes.writeUInt16LE(index, 4 + 2 * (published % SIZE));
    availableBytes.writeUInt16LE((published + 1) & 0xffff, 2);
  });

const index = fc.nat(SIZE - 1);
const commands = fc.commands<Model, Pair>(
  [
    fc.constant(pop),
    fc.constant(pop),
    fc.constant(pop),
    fc.tuple(index, fc.array(descriptor, { minLength: 1, maxLength: 4 })).map(([i, parts]) => lawful(i, parts)),
    fc.tuple(index, fc.array(descriptor, { minLength: 1, maxLength: 4 })).map(([i, parts]) => lawful(i, parts)),
    fc.tuple(index, descriptor).map(([i, raw]) => writeOne(i, raw)),
    fc
      .tuple(index, tableAddress, fc.array(descriptor, { minLength: 1, maxLength: 4 }), fc.constantFrom(0, 0, 2, 1))
      .map(([i, at, raws, extra]) => writeTable(i, at, raws, extra)),
    fc
      .array(fc.oneof({ weight: 12, arbitrary: index }, { weight: 1, arbitrary: fc.nat(0xffff) }), {
        minLength: 1,
        maxLength: 3,
      })
      .map(offer),
    fc
      .oneof({ weight: 1, arbitrary: fc.constantFrom(-1, 7, 8, 9, 0x8000) }, { weight: 3, arbitrary: fc.constant(0) })
      .map(jump),
    fc.tuple(fc.nat(7), fc.nat(2 ** 31)).map(([which, length]) => push(which, length)),
    fc.tuple(fc.nat(7), fc.nat(2 ** 31)).map(([which, length]) => push(which, length)),
    fc.tuple(fc.integer({ min: -2, max: 4 }), fc.nat(1)).map(([event, noInterrupt]) => publish(event, noInterrupt)),
    fc.boolean().map(setNotification),
    fc.constantFrom(0, 5, 0xfffe).map(startAnew),
  ],
  { maxCommands: 120, size: 'max' },
);

describe.each([true, false])('a hostile driver (event index: %s)', (eventIdx) => {
  beforeAll(() => {
    ring = new RingDevice({ queueSize: SIZE, regions, eventIdx });
    Object.assign(seen, { chains: 0, buffers: 0, broken: 0, calls: 0, published: 0 });
  });
  afterAll(() => {
    ring.restart();
    ring.close();
  });

  it('gets from the virtqueue what it gets from the naive one', () => {
    const property = fc.property(fc.nat(0xffff), commands, (base, list) => {
      ring.memory.bytes(ring.driver.descriptors, 16 * SIZE).fill(0);
      ring.driver.availableBytes.fill(0);
      ring.driver.usedBytes.fill(0);
      ring.driver.availableBytes.writeUInt16LE(base, 2);
      ring.driver.usedBytes.writeUInt16LE((base + 3) & 0xffff, 2);
      const pair = {} as Pair;
      restart(pair, base);
      fc.modelRun(() => ({ model: {}, real: pair }), list);
    });
    fc.assert(property, { numRuns: 1500, seed });
    // The drivers were neither all saints nor all vandals.
    expect(seen.chains).toBeGreaterThan(1000);
    expect(seen.buffers).toBeGreaterThan(1000);
    expect(seen.broken).toBeGreaterThan(500);
    expect(seen.published).toBeGreaterThan(1000);
    expect(seen.calls).toBeGreaterThan(20);
  });
});
