/**
 * Goal: wherever a crash or a failure meets the commit of an overlay, overlay and base together are the right disk, both are whole, and
 * the commit can be started again.
 *
 * Method: crash enumeration and failing every request in turn, on tiny images, both of whose files are simulated disks.
 */
import { describe, expect, it } from 'vitest';
import { crashEnumeration } from './crash-enumeration.js';
import { failNth } from './fail-nth.js';
import { commitOperation, expectWhole, newImage, newOverlay, overlayOnBdevStack, overlayStack } from './qcow2.js';
import type { Operation } from './volume.js';

const TIMEOUT_MS = 240_000;
const SECTORS = 8;
const FILE_BYTES = 65536;

const commit = commitOperation('commit', true);
const OPERATIONS: readonly Operation[] = [
  { name: 'write', type: 'write', sector: 1, sectors: 4 },
  { name: 'discard', type: 'discard', sector: 0, sectors: 8 },
  { name: 'flush', type: 'flush' },
  commit,
];
/** The commit is under way while these are done. */
const BESIDE: readonly Operation[] = [
  { name: 'write', type: 'write', sector: 1, sectors: 4 },
  { name: 'write again', type: 'write', sector: 3, sectors: 4 },
  commitOperation('begin to commit', false),
];

const overlay = newOverlay('cluster_size=512', SECTORS, FILE_BYTES);
const base = newImage('cluster_size=1024', SECTORS, FILE_BYTES);
const DISKS = { diskBytes: [FILE_BYTES, FILE_BYTES], images: [overlay, base], sectors: SECTORS };

describe('The commit of an overlay', () => {
  it.each([
    ['a file', overlayStack],
    ['a bdev', overlayOnBdevStack],
  ])('to %s loses nothing in a crash', { timeout: TIMEOUT_MS }, (name, stack) => {
    const limits = { imagesMax: 4, openingsMax: 1, verify: expectWhole };
    const found = crashEnumeration({ ...DISKS, ...limits, stack, operations: OPERATIONS, length: 2 });
    console.log(`${name}: ${JSON.stringify(found)}`);
    expect(found.images).toBeGreaterThan(100);
  });

  it('loses nothing that is written meanwhile', { timeout: TIMEOUT_MS }, () => {
    const limits = { imagesMax: 4, openingsMax: 1, verify: expectWhole };
    const found = crashEnumeration({ ...DISKS, ...limits, stack: overlayStack, operations: BESIDE, length: 3 });
    console.log(JSON.stringify(found));
    expect(found.images).toBeGreaterThan(100);
  });

  it.each([
    ['a file', overlayStack],
    ['a bdev', overlayOnBdevStack],
  ])('to %s loses nothing when a request fails', { timeout: TIMEOUT_MS }, (name, stack) => {
    const [write, discard, flush] = OPERATIONS as readonly [Operation, Operation, Operation];
    const scenario = [write, flush, commit, write, discard, commit];
    const coverage = failNth({ ...DISKS, stack, scenario });
    console.log(`${name}: ${JSON.stringify(coverage)}`);
    expect(coverage.runs).toBeGreaterThan(100);
  });
});
