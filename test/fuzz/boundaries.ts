/** Numbers at which arithmetic goes wrong: what a hostile peer puts where an address, a length or a count belongs. */
import type { Random } from '../../src/poller/clock.js';

/** A u64 as two words, little end first. */
export type Words = readonly [lo: number, hi: number];

const ONES = 0xffffffff;

/** Around 0, 2^31, 2^32, the last exact doubles, the sign bit, and the end. */
const U64: readonly Words[] = [
  [0, 0],
  [1, 0],
  [0xfff, 0],
  [0x1000, 0],
  [0x7fffffff, 0],
  [0x80000000, 0],
  [0xfffff000, 0],
  [ONES, 0],
  [0, 1],
  [1, 1],
  [0, 0x80000],
  [ONES, 0xfffff],
  [0, 0x100000],
  [ONES, 0x1fffff],
  [0, 0x200000],
  [1, 0x200000],
  [ONES, 0x7fffffff],
  [0, 0x80000000],
  [0xfffff000, ONES],
  [0xfffffff0, ONES],
  [ONES, ONES],
];

const U32 = [
  0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x100, 0x3ff, 0x400, 0x401, 0x7fff, 0x8000, 0xfff8, 0xffff, 0x10000, 0xfffff,
];
const U32_LARGE = [0x7fffffff, 0x80000000, 0xfffffe00, 0xfffffff0, 0xfffffffe, ONES];

export function pick<T>(random: Random, values: readonly T[]): T {
  return values[random.below(values.length)]!;
}

/** Whether something of this probability, in percent, happens. */
export function chance(random: Random, percent: number): boolean {
  return random.below(100) < percent;
}

export function anyU32(random: Random): number {
  const kind = random.below(8);
  if (kind < 4) return pick(random, U32);
  if (kind < 6) return pick(random, U32_LARGE);
  return Math.floor(random.next() * 2 ** 32);
}

/** @param near numbers below 2^53 that mean something here: their neighbourhood is visited, too */
export function anyU64(random: Random, near: readonly number[] = []): Words {
  const kind = random.below(8);
  if (kind < 3) return pick(random, U64);
  if (kind < 6 && near.length > 0)
    return words(Math.max(0, pick(random, near) + pick(random, [0, 0, 0, -1, 1, 16, -16, 4096])));
  return [anyU32(random), kind < 7 ? random.below(4) : anyU32(random)];
}

/** A number below 2^53 as two words. */
export function words(value: number): Words {
  return [value % 2 ** 32, Math.floor(value / 2 ** 32)];
}
