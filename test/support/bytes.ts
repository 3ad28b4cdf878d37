/** Contents for tests: bytes to write, ways to cut them up, and a comparison that says where they differ. */
import assert from 'node:assert/strict';
import type { Layout } from './disk.js';
import { seededRandom } from './seed.js';

const random = seededRandom(1);

/** Bytes that occur nowhere else. */
export function fresh(lengthBytes: number): Buffer {
  const words = new Uint32Array(Math.ceil(lengthBytes / 4));
  let word = random.below(2 ** 32);
  for (let i = 0; i < words.length; i++) {
    word = (Math.imul(word, 1664525) + 1013904223) >>> 0;
    words[i] = word;
  }
  return Buffer.from(words.buffer, 0, lengthBytes);
}

/** Cuts a request into at most `count` pieces. @param unit lengths and gaps are multiples of it */
export function cut(lengthBytes: number, count: number, unit: number): Layout {
  const marks = new Set<number>();
  for (let i = 1; i < count; i++) marks.add(random.below(lengthBytes / unit) * unit);
  marks.delete(0);
  const ends = [...marks, lengthBytes].sort((a, b) => a - b);
  const lengths = ends.map((end, i) => end - (ends[i - 1] ?? 0));
  return { lengths, gaps: [1, 2, 3, 5, 7].map((n) => n * unit) };
}

/** As assert.deepEqual, without printing megabytes. */
export function expectBytes(actual: Buffer, expected: Buffer, what: string): void {
  if (actual.equals(expected)) return;
  const at = actual.findIndex((byte, i) => byte !== expected[i]);
  const show = (bytes: Buffer): string => bytes.subarray(at, at + 16).toString('hex');
  assert.fail(`${what}: differs from byte ${at} of ${expected.length}: ${show(actual)}, expected ${show(expected)}`);
}
