/**
 * Goal: whichever request of the device fails, what was answered is safe, nothing hangs or leaks, and the volume works on.
 *
 * Method: the fail-Nth harness over the leaf and over what the core makes of a module's limits.
 */
import { describe, expect, it } from 'vitest';
import * as make from '../bdev/stacks.js';
import { OPERATIONS } from './crash-enumeration.js';
import { failNth } from './fail-nth.js';
import { over } from './stacks.js';
import type { Operation } from './volume.js';

const TIMEOUT_MS = 120_000;
const DISK = { diskBytes: [65536], sectors: 128 };

/** Small requests, a large one of each kind, and all of it read. */
const scenario: readonly Operation[] = [
  ...OPERATIONS,
  { name: 'write much', type: 'write', sector: 0, sectors: 100 },
  { name: 'write much through', type: 'write', sector: 20, sectors: 100, fua: true, shiftBytes: 3 },
  { name: 'zero much', type: 'writeZeroes', sector: 50, sectors: 50 },
  { name: 'discard much', type: 'discard', sector: 100, sectors: 28 },
  { name: 'flush', type: 'flush' },
  { name: 'read all', type: 'read', sector: 0, sectors: 128, shiftBytes: 3 },
];

const pieces = { maxTransferBytes: 8192, maxDiscardBytes: 8192, maxWriteZeroesBytes: 8192 };

describe('When one request of the device fails', () => {
  it.each([
    ['a file', over()],
    ['passthru over a file', over(make.passthru)],
    ['split requests', over(make.limited(pieces))],
    ['bounce buffers', over(make.limited({ ...pieces, memoryAlignmentBytes: 512 }))],
    ['FUA by a flush', over(make.limited(pieces, ['fua']))],
    ['zeroes by writes', over(make.limited(pieces, ['writeZeroes']))],
  ])('%s keeps what was answered', { timeout: TIMEOUT_MS }, (_name, stack) => {
    for (const together of [false, true]) {
      const coverage = failNth({ ...DISK, stack, scenario, together });
      expect(coverage.runs).toBeGreaterThan(50);
      expect(coverage.failures).toBeGreaterThan(50);
    }
  });
});
