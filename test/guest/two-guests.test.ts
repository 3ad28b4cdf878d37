/**
 * Two guests work on two disks at once, and neither sees anything of the other. One of them has 4 GiB, so that its
 * memory is shared as two regions, the second one above 4 GiB.
 */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { startDisk } from './backend.js';
import { fioVerify } from './fio.js';
import { bootGuest, type Guest } from './guest.js';
import { Scope } from './scope.js';
import { kernelComplaints } from './sysfs.js';

const SIZE_MIB = 256;

describe('two guests at once', () => {
  const scope = new Scope();
  let guests: Guest[];

  beforeAll(async () => {
    const directory = scope.directory();
    guests = await Promise.all(
      [768, 4096].map(async (memoryMib) => {
        const path = join(directory, `disk${memoryMib}`);
        const disk = scope.add(await startDisk({ path, sizeBytes: SIZE_MIB * 2 ** 20 }));
        return scope.add(await bootGuest({ disks: [{ socketPath: disk.socketPath, backend: disk }], memoryMib }));
      }),
    );
  });
  afterAll(() => scope.close());

  it('one of which has memory on both sides of 4 GiB', async () => {
    const regions = await Promise.all(guests.map((guest) => guest.sh('grep "System RAM" /proc/iomem')));
    const [below, both] = regions.map((lines) => /^1[0-9a-f]{8}-/m.test(lines));
    expect({ below, both }).toEqual({ below: false, both: true });
  });

  it('get their own data back, pass after pass', async () => {
    const passes = async (guest: Guest, index: number): Promise<void> => {
      for (let pass = 0; pass < 2; pass++) {
        await fioVerify(guest, guest.disks[0]!, { sizeMib: SIZE_MIB, depth: 32, seed: 100 * index + pass });
      }
    };
    await Promise.all(guests.map(passes));
  });

  it('and part without a complaint', async () => {
    for (const guest of guests) {
      expect(await kernelComplaints(guest)).toBe('');
      await guest.shutdown();
    }
  });
});
