/**
 * Goal: after a crash at any request a qcow2 disk holds what it may, and its image is whole: no mapping without a refcount.
 *
 * Method: crash enumeration on tiny images, and failing every request in turn.
 */
import { describe, expect, it } from 'vitest';
import { Oracle } from '../sim/oracle.js';
import { SimDisk } from '../sim/sim-disk.js';
import { crashEnumeration, OPERATIONS } from './crash-enumeration.js';
import { failNth } from './fail-nth.js';
import { SimLife, SimMachine } from './sim-machine.js';
import { Volume } from './volume.js';
import type { Operation } from './volume.js';
import { encryptedStack, expectWhole, newEncryptedImage, newImage, qcow2Stack, qcow2WithoutLog } from './qcow2.js';

const TIMEOUT_MS = 240_000;
const SECTORS = 8;
const FILE_BYTES = 32768;

const IMAGES = [
  ['clusters of 512', newImage('cluster_size=512', SECTORS, FILE_BYTES), qcow2Stack],
  ['clusters of 4096, full', newImage('cluster_size=4096', SECTORS, 65536, 'write -P 0 0 4096'), qcow2Stack],
  ['encrypted clusters of 1024', newEncryptedImage(10, SECTORS, FILE_BYTES), encryptedStack],
] as const;

describe('After a crash anywhere a qcow2 disk', () => {
  it.each(IMAGES)('of %s holds what it may', { timeout: TIMEOUT_MS }, (name, image, stack) => {
    const options = { diskBytes: [image.length], images: [image], stack, sectors: SECTORS };
    const one = crashEnumeration({ ...options, length: 2, imagesMax: 16, openingsMax: 3, verify: expectWhole });
    console.log(`${name}: ${JSON.stringify(one)}`);
    expect(one.images).toBeGreaterThan(100);
  });
});

describe('Without a log a qcow2 disk', () => {
  it.each(IMAGES.slice(0, 2))(
    'of %s answers nothing that a kill would undo',
    { timeout: TIMEOUT_MS },
    (name, image) => {
      const options = { diskBytes: [image.length], images: [image], stack: qcow2WithoutLog, sectors: SECTORS };
      const limits = { length: 2, imagesMax: 4, openingsMax: 1, together: true };
      const one = crashEnumeration({ ...options, ...limits, verify: expectWhole });
      console.log(`${name}: ${JSON.stringify(one)}`);
      expect(one.images).toBeGreaterThan(50);
    },
  );
});

describe('The log of a qcow2 disk that was killed', () => {
  it('is void when the image is written to without one', () => {
    const machine = new SimMachine([new SimDisk(FILE_BYTES, newImage('cluster_size=512', SECTORS, FILE_BYTES))]);
    const oracle = new Oracle(SECTORS);
    const [write, elsewhere] = OPERATIONS as readonly [Operation, Operation];
    const first = new SimLife(machine, qcow2Stack, { seed: 1 });
    new Volume(first, oracle).run(write);
    first.kill();
    const second = new SimLife(machine, qcow2WithoutLog, { seed: 1 });
    new Volume(second, oracle).run(elsewhere, write);
    second.close();
    const third = new SimLife(machine, qcow2Stack, { seed: 1 });
    // Throws where it is not what was written last.
    new Volume(third, oracle).run({ name: 'read', type: 'read', sector: 0, sectors: SECTORS });
    third.close();
    expectWhole(machine.disks.map(({ view }) => view));
    machine.close();
  });
});

describe('When one request of the file fails a qcow2 disk', () => {
  it.each(IMAGES)('of %s keeps what was answered', { timeout: TIMEOUT_MS }, (name, image, stack) => {
    for (const together of [false, true]) {
      const coverage = failNth({
        diskBytes: [image.length],
        images: [image],
        stack,
        sectors: SECTORS,
        scenario: [...OPERATIONS, { name: 'flush', type: 'flush' }],
        together,
      });
      console.log(`${name}: ${JSON.stringify(coverage)}`);
      expect(coverage.failures).toBeGreaterThan(10);
    }
  });
});
