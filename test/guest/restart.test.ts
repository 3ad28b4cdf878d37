/**
 * Daemons are killed and started again under a running guest, again and again, and the guest notices pauses and nothing else.
 *
 * fio writes, verifies and reads in the guest at a steady pace on three disks, while the host kills the daemons at random moments;
 * QEMU connects anew and hands over the region of the requests in flight. On two of the disks writes are held back, so that their
 * answers come far behind those of reads: a back-end without such a region goes on at the wrong place then, and the guest hangs.
 *
 * STRATA_KILLS says how often each daemon is killed; `npm run soak -- --kills 20` runs just this.
 */
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { seed, seededRandom } from '../support/seed.js';
import { isStrata, startDisk } from './backend.js';
import type { Disk, DiskOptions } from './backend.js';
import { bootGuest } from './guest.js';
import { Scope } from './scope.js';
import { kernelComplaints } from './sysfs.js';

const KILLS = Number(process.env['STRATA_KILLS'] ?? 5);
const QUEUES = 2;
/** Of reads and of writes each. */
const DEPTH = 8;
/** Requests per second of reads and of writes, and for how long: QEMU waits for a second before it connects again. */
const RATE = 500;
const SECONDS_PER_KILL = 3;
const BLOCK_KIB = 4;
const GAP_MS = 1000;
const TIMEOUT_MS = 180_000 + KILLS * 30_000;
const SIZE_MIB = Math.ceil((KILLS * SECONDS_PER_KILL * RATE * BLOCK_KIB) / 1024);

const kinds: readonly { readonly packed: boolean; readonly slow: Pick<DiskOptions, 'writeDelayUs'> }[] = [
  { packed: false, slow: {} },
  { packed: false, slow: { writeDelayUs: 5000 } },
  { packed: true, slow: { writeDelayUs: 5000 } },
];

/** Verified writes in one half of a disk beside reads in the other. */
function fio(name: string): string {
  const common = `--filename=/dev/${name} --ioengine=io_uring --direct=1 --iodepth=${DEPTH} --bs=${BLOCK_KIB}k --rate_iops=${RATE}`;
  return [
    `fio --output-format=terse --randseed=${seed}`,
    `--name=written ${common} --size=${SIZE_MIB}m --rw=randwrite --verify=crc32c --do_verify=1 --verify_fatal=1`,
    `--name=read ${common} --size=${SIZE_MIB}m --rw=randread --offset=${SIZE_MIB}m`,
  ].join(' ');
}

describe.runIf(isStrata)(`daemons that are killed ${KILLS} times each`, () => {
  const scope = new Scope();
  afterAll(() => scope.close());

  it(
    'lose nothing, and no request is stuck: split rings, writes held back or not, and packed rings',
    { timeout: TIMEOUT_MS },
    async () => {
      const directory = scope.directory();
      const disks: Disk[] = [];
      for (const [index, { slow }] of kinds.entries()) {
        const path = join(directory, `disk${index}`);
        const sizeBytes = 2 * SIZE_MIB * 2 ** 20;
        disks.push(scope.add(await startDisk({ path, sizeBytes, numQueues: QUEUES, ...slow })));
      }
      const guest = scope.add(
        await bootGuest({
          disks: disks.map((disk, index) => ({
            socketPath: disk.socketPath,
            backend: disk,
            numQueues: QUEUES,
            packed: kinds[index]!.packed,
            reconnectSeconds: 1,
          })),
        }),
      );
      const running = guest.run(
        [
          ...guest.disks.map((name) => `(${fio(name)}) & p${name}=$!`),
          ...guest.disks.map((name) => `wait $p${name} || exit 1`),
        ].join('\n'),
        { timeoutMs: TIMEOUT_MS },
      );
      let hasEnded = false;
      void running.finally(() => (hasEnded = true)).catch(() => undefined);
      const random = seededRandom(1);
      let kills = 0;
      while (kills < KILLS && !hasEnded) {
        await setTimeout(GAP_MS + random.below(GAP_MS));
        for (const disk of disks) await disk.restart();
        kills++;
      }
      const { code, output } = await running;
      expect(code, output).toBe(0);
      expect(kills).toBe(KILLS);
      // Where writes are held back, each kill finds some.
      kinds.forEach(({ slow }, index) => {
        if (slow.writeDelayUs !== undefined) expect(disks[index]!.resubmitted).toBeGreaterThan(KILLS);
      });
      expect(await kernelComplaints(guest)).toBe('');
      await guest.shutdown();
    },
  );
});
