/**
 * Goal: the arena hands out ranges that do not overlap, takes them back whole, maps files so that both sides see each other's
 * writes, and reaches every byte of its range through its windows.
 *
 * Method: small arenas for the bookkeeping, a large one with sparse memfds for what lies beyond 2, 4 and 8 GiB.
 */
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import {
  ARENA_WINDOW_BYTES,
  Arena,
  SystemError,
  WINDOW_MASK,
  WINDOW_SCALE,
  check,
  native,
} from '../../native/index.js';
import { seed } from '../support/seed.js';

const GIB = 2 ** 30;
const PAGE = 4096;

/** Large enough for the largest of guests here; costs no memory. */
const large = new Arena(64 * GIB);
const descriptors: number[] = [];

function memfd(sizeBytes: number): number {
  const fd = check(native.memfdCreate('test', sizeBytes), 'create a memfd');
  descriptors.push(fd);
  return fd;
}

afterAll(() => {
  for (const fd of descriptors) native.fileClose(fd);
});

const byteAt = (arena: Arena, offset: number): number => arena.u8[(offset * WINDOW_SCALE) | 0]![offset & WINDOW_MASK]!;
const wordAt = (arena: Arena, offset: number): number =>
  arena.u32[(offset * WINDOW_SCALE) | 0]![(offset & WINDOW_MASK) >>> 2]!;

function setByte(arena: Arena, offset: number, value: number): void {
  arena.u8[(offset * WINDOW_SCALE) | 0]![offset & WINDOW_MASK] = value;
}

function setWord(arena: Arena, offset: number, value: number): void {
  arena.u32[(offset * WINDOW_SCALE) | 0]![(offset & WINDOW_MASK) >>> 2] = value;
}

describe('handing out', () => {
  it('gives zeroed memory in whole pages, never offset 0', () => {
    const arena = new Arena(ARENA_WINDOW_BYTES);
    const offset = arena.allocate(5000);
    expect(offset).toBeGreaterThan(0);
    expect(offset % PAGE).toBe(0);
    expect(arena.usedBytes).toBe(2 * PAGE);
    expect(arena.view8(offset, 2 * PAGE).every((byte) => byte === 0)).toBe(true);
  });

  it('gives zeroes again after a release', () => {
    const arena = new Arena(ARENA_WINDOW_BYTES);
    const offset = arena.allocate(PAGE);
    arena.view8(offset, PAGE).fill(1);
    arena.release(offset);
    expect(arena.allocate(PAGE)).toBe(offset);
    expect(arena.view8(offset, PAGE).every((byte) => byte === 0)).toBe(true);
  });

  it('keeps to an alignment', () => {
    const arena = new Arena(4 * GIB);
    arena.allocate(PAGE);
    for (const alignment of [PAGE, 2 ** 21, GIB]) {
      const offset = arena.allocate(PAGE, alignment);
      expect(offset % alignment).toBe(0);
      expect((arena.baseAddress + offset) % alignment).toBe(0);
    }
  });

  it('joins neighbours that are given back, in any order', () => {
    const whole = ARENA_WINDOW_BYTES - PAGE;
    const part = Math.floor(whole / 5 / PAGE) * PAGE;
    const orders = [
      [0, 1, 2, 3, 4],
      [4, 3, 2, 1, 0],
      [0, 2, 4, 1, 3],
      [1, 3, 2, 0, 4],
    ];
    for (const order of orders) {
      const arena = new Arena(ARENA_WINDOW_BYTES);
      const offsets = order.map(() => arena.allocate(part));
      for (const i of order) arena.release(offsets[i]!);
      expect(arena.usedBytes).toBe(0);
      // Only an unbroken rest has room for it.
      arena.release(arena.allocate(whole));
    }
  });

  it('says ENOMEM when there is no room, and goes on', () => {
    const arena = new Arena(ARENA_WINDOW_BYTES);
    const offset = arena.allocate(GIB);
    expect(() => arena.allocate(GIB)).toThrow(SystemError);
    expect(() => arena.allocate(GIB)).toThrow('ENOMEM');
    expect(arena.usedBytes).toBe(GIB);
    arena.release(offset);
    arena.release(arena.allocate(GIB));
  });

  it('refuses to take back what is not handed out', () => {
    const arena = new Arena(ARENA_WINDOW_BYTES);
    const offset = arena.allocate(2 * PAGE);
    expect(() => arena.release(offset + PAGE)).toThrow('not in use');
    arena.release(offset);
    expect(() => arena.release(offset)).toThrow('not in use');
  });

  it('never overlaps, whatever is taken and given back', () => {
    const step = fc.record({ pages: fc.integer({ min: 1, max: 50 }), shift: fc.nat(4), release: fc.option(fc.nat()) });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const arena = new Arena(ARENA_WINDOW_BYTES);
        const held: { offset: number; end: number }[] = [];
        for (const { pages, shift, release } of steps) {
          if (release !== null && held.length > 0) {
            arena.release(held.splice(release % held.length, 1)[0]!.offset);
            continue;
          }
          const alignment = PAGE << shift;
          const offset = arena.allocate(pages * PAGE, alignment);
          const end = offset + pages * PAGE;
          expect(offset % alignment).toBe(0);
          expect(end).toBeLessThanOrEqual(arena.sizeBytes);
          for (const other of held) expect(end <= other.offset || other.end <= offset).toBe(true);
          held.push({ offset, end });
        }
        expect(arena.usedBytes).toBe(held.reduce((sum, { offset, end }) => sum + end - offset, 0));
        for (const { offset } of held) arena.release(offset);
        arena.release(arena.allocate(arena.sizeBytes - PAGE));
      }),
      { seed, numRuns: 50 },
    );
  });
});

describe('a mapped file', () => {
  it('is seen both ways', () => {
    const fd = memfd(3 * PAGE);
    const offset = large.mapFile(fd, PAGE, 2 * PAGE);
    const scratch = large.allocate(PAGE);
    setByte(large, offset + 10, 77);
    expect(native.fileRead(fd, large.baseAddress + scratch, 1, PAGE + 10)).toBe(1);
    expect(byteAt(large, scratch)).toBe(77);
    setByte(large, scratch, 88);
    expect(native.fileWrite(fd, large.baseAddress + scratch, 1, 3 * PAGE - 1)).toBe(1);
    expect(byteAt(large, offset + 2 * PAGE - 1)).toBe(88);
    large.release(offset);
    large.release(scratch);
  });

  it('may be mapped twice, as two regions of one memory', () => {
    const fd = memfd(2 * PAGE);
    const one = large.mapFile(fd, 0, 2 * PAGE);
    const two = large.mapFile(fd, PAGE, PAGE);
    setWord(large, one + PAGE + 8, 0xdeadbeef);
    expect(wordAt(large, two + 8)).toBe(0xdeadbeef);
    large.release(one);
    expect(wordAt(large, two + 8)).toBe(0xdeadbeef);
    large.release(two);
  });

  it('that cannot be mapped leaves nothing in use', () => {
    const before = large.usedBytes;
    expect(() => large.mapFile(-1, 0, PAGE)).toThrow('EBADF');
    expect(() => large.mapFile(memfd(PAGE), 1, PAGE)).toThrow('EINVAL');
    expect(large.usedBytes).toBe(before);
  });

  it('is gone after its release, and the file stays', () => {
    const fd = memfd(PAGE);
    const offset = large.mapFile(fd, 0, PAGE);
    setByte(large, offset, 5);
    large.release(offset);
    const again = large.mapFile(fd, 0, PAGE);
    expect(byteAt(large, again)).toBe(5);
    large.release(again);
  });
});

describe('windows', () => {
  it('reach both ends of a region of 9 GiB, and every boundary within it', () => {
    const size = 9 * GIB;
    const fd = memfd(size);
    const offset = large.mapFile(fd, 0, size, GIB);
    const places = [0, 2, 4, 6, 8].flatMap((n) => [n * GIB - 4, n * GIB]).filter((at) => at >= 0);
    places.push(size - 4);
    // Places in the file, and places where windows meet.
    const windows = [1, 2, 3, 4].map((n) => n * ARENA_WINDOW_BYTES - offset).flatMap((at) => [at - 4, at]);
    const all = [...new Set([...places, ...windows])].filter((at) => at >= 0 && at + 4 <= size);
    all.forEach((at, i) => setWord(large, offset + at, 0x80000000 + i));
    const scratch = large.allocate(PAGE);
    all.forEach((at, i) => {
      expect(wordAt(large, offset + at)).toBe(0x80000000 + i);
      expect(native.fileRead(fd, large.baseAddress + scratch, 4, at)).toBe(4);
      expect(wordAt(large, scratch)).toBe(0x80000000 + i);
    });
    large.release(scratch);
    large.release(offset);
  });

  it('show several regions beyond 4 GiB, each its own file', () => {
    const filler = large.allocate(5 * GIB);
    const fds = [memfd(3 * GIB), memfd(3 * GIB), memfd(PAGE)];
    const regions = [
      large.mapFile(fds[0]!, 0, 3 * GIB),
      large.mapFile(fds[1]!, GIB, 2 * GIB),
      large.mapFile(fds[2]!, 0, PAGE),
    ];
    for (const region of regions) expect(region).toBeGreaterThan(4 * GIB);
    regions.forEach((region, i) => setWord(large, region + 4, 1000 + i));
    regions.forEach((region, i) => expect(wordAt(large, region + 4)).toBe(1000 + i));
    const scratch = large.allocate(PAGE);
    [0, GIB, 0].forEach((fileOffset, i) => {
      native.fileRead(fds[i]!, large.baseAddress + scratch, 4, fileOffset + 4);
      expect(wordAt(large, scratch)).toBe(1000 + i);
    });
    for (const offset of [...regions, scratch, filler]) large.release(offset);
  });

  it('of all widths show the same memory', () => {
    const offset = large.allocate(PAGE);
    setWord(large, offset, 0x04030201);
    const half = large.u16[(offset * WINDOW_SCALE) | 0]![(offset & WINDOW_MASK) >>> 1];
    expect(half).toBe(0x0201);
    expect(byteAt(large, offset + 3)).toBe(4);
    expect([...large.view8(offset, 4)]).toEqual([1, 2, 3, 4]);
    expect(large.view16(offset, 2)[1]).toBe(0x0403);
    expect(large.view32(offset, 1)[0]).toBe(0x04030201);
    large.viewF64(offset + 8, 1)[0] = 1.5;
    expect(wordAt(large, offset + 12)).toBe(0x3ff80000);
    large.release(offset);
  });
});
