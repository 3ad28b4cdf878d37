/**
 * Every way a guest may be told to drive the rings: split or packed, one or four queues, indirect descriptors, EVENT_IDX.
 *
 * One guest with a disk for each of the combinations checks what it negotiated and has fio verify the data.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { join } from 'node:path';
import { isStrata, startDisk } from './backend.js';
import { fioVerify } from './fio.js';
import { bootGuest, type Guest } from './guest.js';
import { Scope } from './scope.js';
import { diskFacts, Feature, kernelComplaints } from './sysfs.js';

const SIZE_BYTES = 128 * 2 ** 20;
const PROCESSORS = 4;

const split = [1, PROCESSORS].flatMap((numQueues) =>
  [true, false].flatMap((indirect) =>
    [true, false].map((eventIdx) => ({ packed: false, numQueues, indirect, eventIdx })),
  ),
);
// QEMU's storage daemon has split rings only.
const packed = isStrata
  ? [
      { packed: true, numQueues: PROCESSORS, indirect: true, eventIdx: true },
      { packed: true, numQueues: 1, indirect: false, eventIdx: false },
    ]
  : [];
const combinations = [...split, ...packed];

describe('a guest drives its rings', () => {
  const scope = new Scope();
  let guest: Guest;

  beforeAll(async () => {
    const directory = scope.directory();
    const disks = await Promise.all(
      combinations.map(async (combination, index) => {
        const path = join(directory, `disk${index}`);
        const disk = await startDisk({ path, sizeBytes: SIZE_BYTES, numQueues: combination.numQueues });
        scope.add(disk);
        return { socketPath: disk.socketPath, backend: disk, ...combination };
      }),
    );
    guest = scope.add(await bootGuest({ disks, smp: PROCESSORS }));
  });
  afterAll(() => scope.close());

  for (const [index, { packed, numQueues, indirect, eventIdx }] of combinations.entries()) {
    const title = `${packed ? 'packed' : 'split'}, with ${numQueues} queue(s), indirect ${onOff(indirect)}, event index ${onOff(eventIdx)}`;
    it(title, async () => {
      const disk = guest.disks[index]!;
      const { queues, features } = await diskFacts(guest, disk);
      expect(queues).toBe(numQueues);
      expect(features.has(Feature.ringPacked)).toBe(packed);
      expect(features.has(Feature.multiQueue)).toBe(numQueues > 1);
      expect(features.has(Feature.indirect)).toBe(indirect);
      expect(features.has(Feature.eventIdx)).toBe(eventIdx);

      await fioVerify(guest, disk, { sizeMib: 96, jobs: numQueues, seed: index + 1 });
      expect(await idleQueues(guest, disk)).toEqual([]);
    });
  }

  it('and its kernel has nothing to complain about', async () => {
    expect(await kernelComplaints(guest)).toBe('');
    await guest.shutdown();
  });
});

function onOff(value: boolean): string {
  return value ? 'on' : 'off';
}

/** Interrupt lines of a disk's queues that never fired. */
async function idleQueues(guest: Guest, disk: string): Promise<string[]> {
  const device = (await guest.sh(`basename $(readlink -f /sys/block/${disk}/device)`)).trim();
  const lines = (await guest.sh(`grep ' ${device}-req' /proc/interrupts`)).trim().split('\n');
  return lines.filter((line) => {
    // "28:  0  17  0  0  PCI-MSI ... virtio1-req.0": the number of the line, then a count per processor.
    const counts = line
      .trim()
      .split(/\s+/)
      .slice(1, 1 + PROCESSORS);
    return counts.every((count) => Number(count) === 0);
  });
}
