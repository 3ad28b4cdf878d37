/**
 * Goal: what an in-flight region says of a packed ring is no list that the device could leave: requests are written down in entries that
 * there are, each in one of its own, or the ring is broken from the start.
 *
 * Method: regions as the device leaves them with requests in flight, in which any fields were made wrong; from each a device recovers
 * and takes as much as its ring holds.
 */
import { describe, expect, it } from 'vitest';
import { Arena } from '../../native/index.js';
import { PackedInflight } from '../../src/vhost-user/packed-inflight.js';
import { seededRandom } from '../support/seed.js';

const SIZE = 8;
const ENTRIES = 10;
const REGION_BYTES = 32 + 32 * ENTRIES;
const FREE_HEAD = 12;
const OLD_FREE_HEAD = 14;
const MISFIT = 'the in-flight region does not fit the ring';
const START = { index: 0, wrap: 1 };
const next = (entry: number): number => 32 + 32 * entry + 2;

const arena = new Arena(2 ** 31);
const place = arena.allocate(4096);
const bytes = Buffer.from(arena.buffer, place, REGION_BYTES);

/** A ring whose oldest descriptor is available, as far as anybody looks. */
function recovered(): { inflight: PackedInflight; recovery: ReturnType<PackedInflight['recover']> } {
  const inflight = new PackedInflight(arena, place, ENTRIES);
  return { inflight, recovery: inflight.recover(SIZE, () => 1 << 7, START, START) };
}

/** A region that a device leaves that took so many requests of a descriptor or two. Returns how many descriptors those were. */
function leave(requests: number): number {
  bytes.fill(0);
  const { inflight } = recovered();
  const words = new Uint32Array(8);
  let descriptors = 0;
  for (let i = 0; i < requests; i++) {
    const count = 1 + (i & 1);
    words[4 * count - 1] = i;
    inflight.take(words, count);
    descriptors += count;
  }
  return descriptors;
}

describe('a packed ring that recovers from a region', () => {
  it('goes on where it was', () => {
    const descriptors = leave(3);
    const { inflight, recovery } = recovered();
    expect(recovery).toMatchObject({ fault: null, available: { index: descriptors, wrap: 1 }, used: START });
    expect(recovery!.requests.map(({ entry, count }) => [entry, count])).toEqual([
      [0, 1],
      [1, 2],
      [3, 1],
    ]);
    expect(inflight.take(new Uint32Array(4), 1)).toBe(4);
  });

  it.each([
    ['that loops', () => bytes.writeUInt16LE(5, next(7))],
    ['that ends early', () => bytes.writeUInt16LE(ENTRIES, next(7))],
    ['that leads outside', () => bytes.writeUInt16LE(0xffff, next(6))],
    ['that is empty', () => [FREE_HEAD, OLD_FREE_HEAD].forEach((at) => bytes.writeUInt16LE(ENTRIES, at))],
    ['that begins outside', () => [FREE_HEAD, OLD_FREE_HEAD].forEach((at) => bytes.writeUInt16LE(0xffff, at))],
    ['in which a request lies', () => [FREE_HEAD, OLD_FREE_HEAD].forEach((at) => bytes.writeUInt16LE(2, at))],
  ])('is broken by a free list %s', (_what, spoil) => {
    leave(3);
    spoil();
    expect(recovered().recovery?.fault).toBe(MISFIT);
  });

  it('writes down each request in entries of its own, whatever the region holds', () => {
    const random = seededRandom(1);
    let recoveries = 0;
    for (let round = 0; round < 20_000; round++) {
      leave(random.below(6));
      for (let wrong = random.below(4); wrong > 0; wrong--) {
        const at = FREE_HEAD + 2 * random.below((REGION_BYTES - FREE_HEAD) / 2);
        bytes.writeUInt16LE([random.below(ENTRIES), ENTRIES, random.below(65536)][random.below(3)]!, at);
      }
      const { inflight, recovery } = recovered();
      if (recovery === null || recovery.fault !== null) continue;
      recoveries++;
      const entries = recovery.requests.map(({ entry }) => entry);
      let descriptors = recovery.requests.reduce((sum, { count }) => sum + count, 0);
      for (; descriptors < SIZE; descriptors++) entries.push(inflight.take(new Uint32Array(4), 1));
      expect(
        entries.every((entry) => entry < ENTRIES),
        `round ${round}: ${entries.join(' ')}`,
      ).toBe(true);
      expect(new Set(entries).size, `round ${round}: ${entries.join(' ')}`).toBe(entries.length);
    }
    expect(recoveries).toBeGreaterThan(1000);
  });
});
