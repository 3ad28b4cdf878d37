/**
 * Goal: the byte-crunching leaves agree with slow and plain code, at all small lengths, places and alignments.
 *
 * Method: exhaustive where it is small, random elsewhere.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Arena, native } from '../../native/index.js';
import { seed } from '../support/seed.js';

const arena = new Arena(2 ** 33);
const BYTES = 2 ** 20;
const memory = arena.allocate(BYTES);
const base = arena.baseAddress + memory;
const bytes = arena.view8(memory, BYTES);

describe('copyList', () => {
  /** Entries as offsets into `memory`; a source of -1 stands for zeroes. */
  function run(entries: [destination: number, source: number, length: number][]): void {
    const list = new Float64Array(Math.max(512, entries.length * 3));
    entries.forEach(([destination, source, length], i) =>
      list.set([base + destination, source < 0 ? 0 : base + source, length], i * 3),
    );
    native.copyList(list, entries.length);
  }

  it('copies, zeroes, and does nothing for an empty list or length', () => {
    bytes.fill(7, 0, 100);
    bytes.set([1, 2, 3, 4], 200);
    run([
      [0, 200, 4],
      [10, -1, 5],
      [20, 200, 0],
    ]);
    expect([...bytes.subarray(0, 22)]).toEqual([1, 2, 3, 4, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7]);
    run([]);
  });

  it('runs its entries in order', () => {
    bytes.fill(0, 0, 4096);
    bytes[0] = 99;
    run(Array.from({ length: 1000 }, (_, i) => [i + 1, i, 1]));
    expect(bytes.subarray(0, 1001).every((byte) => byte === 99)).toBe(true);
  });

  it('agrees with a model, also where source and destination overlap', () => {
    const entry = fc.tuple(fc.nat(3000), fc.oneof(fc.constant(-1), fc.nat(3000)), fc.nat(1096));
    fc.assert(
      fc.property(fc.array(entry, { maxLength: 30 }), fc.integer(), (entries, start) => {
        const model = new Uint8Array(4096).map((_, i) => (i * 31 + start) & 0xff);
        bytes.set(model);
        for (const [destination, source, length] of entries) {
          if (source < 0) model.fill(0, destination, destination + length);
          else model.copyWithin(destination, source, source + length);
        }
        run(entries);
        expect(Buffer.compare(bytes.subarray(0, 4096), model)).toBe(0);
      }),
      { seed },
    );
  });

  it('copies beyond 4 GiB', () => {
    const far = arena.allocate(5 * 2 ** 30);
    const place = far + 5 * 2 ** 30 - 8;
    bytes.set([5, 6, 7, 8]);
    run([[place - memory, 0, 4]]);
    expect([...arena.view8(place, 4)]).toEqual([5, 6, 7, 8]);
    arena.release(far);
  });
});

describe('isZero', () => {
  it('notices a single byte, at every place of every small length and alignment', () => {
    for (let start = 0; start < 18; start++) {
      for (let length = 0; length <= 70; length++) {
        // What lies beside the range does not count.
        bytes.fill(0xff, 0, 128);
        bytes.fill(0, start, start + length);
        expect(native.isZero(base + start, length)).toBe(true);
        for (let at = start; at < start + length; at++) {
          bytes[at] = 1;
          if (native.isZero(base + start, length)) expect.fail(`byte ${at - start} of ${length} from ${start}`);
          bytes[at] = 0;
        }
      }
    }
  });

  it('notices a single bit of large ranges', () => {
    for (const length of [4095, 4096, 4097, 65536, BYTES - 1]) {
      bytes.fill(0);
      expect(native.isZero(base, length)).toBe(true);
      for (const at of [0, 1, 15, 16, 17, length >> 1, length - 17, length - 16, length - 2, length - 1]) {
        bytes[at] = 0x80;
        expect(native.isZero(base, length)).toBe(false);
        bytes[at] = 0;
      }
    }
  });
});

describe('crc32c', () => {
  const TABLE = Array.from({ length: 256 }, (_, byte) => {
    let crc = byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc & 1) === 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
    return crc;
  });

  function slow(seed: number, data: Uint8Array): number {
    let crc = ~seed;
    for (const byte of data) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 0xff]!;
    return ~crc >>> 0;
  }

  function of(data: Uint8Array, seed = 0, place = 0): number {
    bytes.set(data, place);
    return native.crc32c(seed, base + place, data.length);
  }

  it('gives the published values', () => {
    // RFC 3720, appendix B.4, and the check value of the CRC catalogues.
    expect(of(Buffer.from('123456789'))).toBe(0xe3069283);
    expect(of(new Uint8Array(32))).toBe(0x8a9136aa);
    expect(of(new Uint8Array(32).fill(0xff))).toBe(0x62a8ab43);
    expect(of(Uint8Array.from({ length: 32 }, (_, i) => i))).toBe(0x46dd794e);
    expect(of(Uint8Array.from({ length: 32 }, (_, i) => 31 - i))).toBe(0x113fdb5c);
    expect(of(new Uint8Array(0))).toBe(0);
  });

  it('agrees with the slow way, at any place and from any seed', () => {
    const data = fc.uint8Array({ maxLength: 300 });
    fc.assert(
      fc.property(data, fc.nat(16), fc.integer({ min: 0, max: 0xffffffff }), (data, place, start) => {
        expect(of(data, start, place)).toBe(slow(start, data));
      }),
      { seed, numRuns: 500 },
    );
  });

  it('may be continued', () => {
    const data = Uint8Array.from({ length: 1000 }, (_, i) => (i * 7) & 0xff);
    for (const cut of [0, 1, 7, 8, 9, 500, 999, 1000]) {
      expect(of(data.subarray(cut), of(data.subarray(0, cut)))).toBe(slow(0, data));
    }
  });
});
