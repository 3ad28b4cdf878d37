/**
 * Goal: the index says of each block of each disk where it is, as a model does, in 16 bytes for a block.
 *
 * Method: random entries, removals and look-ups on a small index, beside a Map; the most crowded chains; counts.
 */
import { describe, expect, it } from 'vitest';
import { CacheIndex } from '../../../src/bdev/cache/cache-index.js';
import { seededRandom } from '../../support/seed.js';

interface Entry {
  readonly place: number;
  readonly crc: number;
  isDirty: boolean;
}

describe('The index of a cache', () => {
  it.each([1, 2, 3, 100, 1000])('is as a model is, with %i places', (placeCount) => {
    const random = seededRandom(placeCount);
    const index = new CacheIndex(placeCount);
    const model = new Map<string, Entry>();
    const free = Array.from({ length: placeCount }, (_, place) => place);
    const volumes = [0, 1, 7, 255];
    const lbas = [0, 1, 2, 2 ** 32 - 1, 2 ** 31, ...Array.from({ length: placeCount }, () => random.below(2 ** 30))];
    for (let step = 0; step < 20_000; step++) {
      const volume = volumes[random.below(volumes.length)]!;
      const lba = lbas[random.below(lbas.length)]!;
      const key = `${volume} ${lba}`;
      const known = model.get(key);
      expect(index.find(volume, lba)).toBe(known?.place ?? -1);
      const roll = random.below(10);
      if (roll < 5 && free.length > 0) {
        const place = free.splice(random.below(free.length), 1)[0]!;
        const entry = { place, crc: random.below(2 ** 31), isDirty: random.below(2) === 0 };
        expect(index.enter(volume, lba, place, entry.crc, entry.isDirty)).toBe(known?.place ?? -1);
        if (known !== undefined) free.push(known.place);
        model.set(key, entry);
      } else if (roll < 7) {
        expect(index.remove(volume, lba)).toBe(known?.place ?? -1);
        if (known !== undefined) free.push(known.place);
        model.delete(key);
      } else if (known !== undefined) {
        index.setHeat(known.place, step);
        expect(index.heatAt(known.place)).toBe(Math.min(step, 3));
        if (roll === 9) {
          index.clean(known.place);
          known.isDirty = false;
        }
        expect([index.isLive(known.place), index.isDirty(known.place)]).toEqual([true, known.isDirty]);
        expect([index.volumeAt(known.place), index.lbaAt(known.place)]).toEqual([volume, lba]);
        expect(index.crcAt(known.place)).toBe(known.crc);
      }
    }
    const entries = [...model.values()];
    expect(index.liveCount).toBe(entries.length);
    expect(index.dirtyCount).toBe(entries.filter(({ isDirty }) => isDirty).length);
    for (const volume of volumes) {
      const own = [...model].filter(([key]) => key.startsWith(`${volume} `)).map(([, entry]) => entry);
      expect(index.liveOf[volume]).toBe(own.length);
      expect(index.dirtyOf[volume]).toBe(own.filter(({ isDirty }) => isDirty).length);
    }
    for (const place of free) expect(index.isLive(place)).toBe(false);
  });

  it.each([4096, 5000, 2 ** 20 - 1, 2 ** 20])('takes 16 bytes for a place at most, with %i', (placeCount) => {
    expect(new CacheIndex(placeCount).bytes / placeCount).toBeLessThanOrEqual(16);
  });

  it('finds a block in a few steps, however the blocks lie in their disks', () => {
    const placeCount = 2 ** 16;
    for (const distance of [1, 2, 8, 256, 4096, 65536]) {
      const index = new CacheIndex(placeCount);
      for (let place = 0; place < placeCount; place++) index.enter(place % 3, place * distance, place, 0, false);
      const lengths = index.chainLengths();
      expect(Math.max(...lengths), `distance ${distance}`).toBeLessThan(24);
    }
  });

  it('refuses a place that is in use', () => {
    const index = new CacheIndex(10);
    index.enter(1, 5, 3, 0, false);
    expect(() => index.enter(1, 6, 3, 0, false)).toThrow('in use');
    expect(() => new CacheIndex(2 ** 32)).toThrow('too many');
  });
});
