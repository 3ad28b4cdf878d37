/**
 * Goal: a guest that truncates its memory under the daemon does not kill it: an access beyond the end of the file reads zeroes, is
 * counted, and everything else goes on.
 *
 * Method: memfds truncated after they were mapped, accessed from TypeScript and from native code.
 */
import { beforeEach, describe, expect, it } from 'vitest';
import { Arena, check, native } from '../../native/index.js';

const PAGE = 4096;
const PAGES = 16;

const arena = new Arena(2 ** 34);
let fd: number;
let offset: number;
let faults: number;

/** A region of PAGES pages full of 0xff, of which only the first is left. */
beforeEach(() => {
  fd = check(native.memfdCreate('guest', PAGES * PAGE), 'create a memfd');
  offset = arena.mapFile(fd, 0, PAGES * PAGE);
  arena.view8(offset, PAGES * PAGE).fill(0xff);
  check(native.fileTruncate(fd, PAGE), 'truncate');
  faults = arena.faults;
  return () => {
    arena.release(offset);
    native.fileClose(fd);
  };
});

const newFaults = (): number => arena.faults - faults;

describe('an access beyond the end of a truncated file', () => {
  it('reads zeroes and is counted, once per page', () => {
    const bytes = arena.view8(offset, PAGES * PAGE);
    expect(bytes[0]).toBe(0xff);
    expect(newFaults()).toBe(0);
    expect(bytes[PAGE]).toBe(0);
    expect(newFaults()).toBe(1);
    expect(arena.lastFaultOffset).toBe(offset + PAGE);
    expect(bytes[PAGE + 100]).toBe(0);
    expect(newFaults()).toBe(1);
    expect(bytes[5 * PAGE + 7]).toBe(0);
    expect(newFaults()).toBe(2);
    expect(arena.lastFaultOffset).toBe(offset + 5 * PAGE + 7);
  });

  it('may write, to nobody but itself', () => {
    const bytes = arena.view8(offset, PAGES * PAGE);
    bytes[3 * PAGE] = 42;
    expect(bytes[3 * PAGE]).toBe(42);
    expect(newFaults()).toBe(1);
    expect(native.fileStat(fd)).toMatchObject({ sizeBytes: PAGE });
  });

  it('in the middle of a copy list lets the rest of the list be done', () => {
    const target = arena.allocate(PAGES * PAGE);
    arena.view8(target, PAGES * PAGE).fill(0x11);
    const base = arena.baseAddress;
    const list = new Float64Array(512);
    list.set([base + target, base + offset, 4 * PAGE]);
    list.set([base + offset + 8 * PAGE, 0, PAGE], 3);
    list.set([base + target + 8 * PAGE, base + offset, PAGE], 6);
    native.copyList(list, 3);
    const copy = arena.view8(target, PAGES * PAGE);
    expect(copy.subarray(0, PAGE).every((byte) => byte === 0xff)).toBe(true);
    expect(copy.subarray(PAGE, 4 * PAGE).every((byte) => byte === 0)).toBe(true);
    expect(copy.subarray(4 * PAGE, 8 * PAGE).every((byte) => byte === 0x11)).toBe(true);
    expect(copy.subarray(8 * PAGE, 9 * PAGE).every((byte) => byte === 0xff)).toBe(true);
    expect(newFaults()).toBe(4);
    arena.release(target);
  });

  it('by the other native leaves is caught too', () => {
    const address = arena.baseAddress + offset + 2 * PAGE;
    expect(native.isZero(address, PAGE)).toBe(true);
    expect(native.crc32c(0, address + PAGE, 9)).toBe(native.crc32c(0, address, 9));
    expect(newFaults()).toBe(2);
  });

  it('by a system call is its failure, not a fault', () => {
    const EFAULT = 14;
    const other = check(native.memfdCreate('other', PAGE), 'create a memfd');
    expect(native.fileRead(other, arena.baseAddress + offset + 2 * PAGE, PAGE, 0)).toBe(-EFAULT);
    expect(newFaults()).toBe(0);
    native.fileClose(other);
  });

  it('is counted by the arena it lies in, and no other', () => {
    const other = new Arena(2 ** 31);
    expect(arena.view8(offset, PAGES * PAGE)[PAGE]).toBe(0);
    expect(other.faults).toBe(0);
    expect(newFaults()).toBe(1);
  });

  it('happens many times without harm', () => {
    for (let round = 0; round < 50; round++) {
      check(native.fileTruncate(fd, PAGES * PAGE), 'grow');
      const again = arena.mapFile(fd, 0, PAGES * PAGE);
      check(native.fileTruncate(fd, 0), 'truncate');
      const bytes = arena.view8(again, PAGES * PAGE);
      for (let page = 0; page < PAGES; page++) expect(bytes[page * PAGE]).toBe(0);
      arena.release(again);
    }
    expect(newFaults()).toBe(50 * PAGES);
  });
});
