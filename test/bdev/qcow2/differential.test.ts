/**
 * Goal: whatever is done to an image by us is what QEMU would have made of it, and the image is whole.
 *
 * Method: random images and scripts, by us and by qemu-io; see differential.ts. STRATA_CASES sets how many.
 */
import fc from 'fast-check';
import { describe, it } from 'vitest';
import { seed } from '../../support/seed.js';
import { differentialCase, runDifferential } from './differential.js';

const CASES = Number(process.env['STRATA_CASES'] ?? 40);

describe('A script of requests', () => {
  it(`comes to the same by us and by QEMU, in ${CASES} cases`, { timeout: 60_000 + CASES * 2000 }, () => {
    fc.assert(fc.property(differentialCase, runDifferential), { seed, numRuns: CASES });
  });
});
