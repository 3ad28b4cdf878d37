/**
 * Goal: after a crash at any request of the device a volume holds what it may, whatever the device made of what was not synced.
 *
 * Method: crash enumeration over the leaf and over what the core makes of a module's limits.
 */
import { describe, expect, it } from 'vitest';
import { CRASH_CASES } from './cases.js';
import { crashEnumeration } from './crash-enumeration.js';

const TIMEOUT_MS = 240_000;

describe('After a crash anywhere', () => {
  // `npm run sim -- --crashes 4` tries four operations on each.
  it.each(CRASH_CASES)('$name: holds what it may', { timeout: TIMEOUT_MS }, ({ name, ...options }) => {
    const one = crashEnumeration(options);
    const together = crashEnumeration({ ...options, length: 2, together: true, imagesMax: 16 });
    console.log(`${name}: ${JSON.stringify(one)}, together ${JSON.stringify(together)}`);
    expect(one.sequences).toBe(options.length === 2 ? 7 + 7 ** 2 : 7 + 7 ** 2 + 7 ** 3);
    expect(one.images).toBeGreaterThan(500);
    expect(together.images).toBeGreaterThan(500);
  });
});
