/**
 * What a guest was told is durable survives `kill -9` of the daemon.
 *
 * 400 random writes, each followed by an fsync and each block filled with its own offset; the daemon is killed as soon
 * as the guest has its last answer, and the host looks for all 400 in the file. The guest sees a write-back cache and
 * flushes it, with CONFIG_WCE and without, or writes through, by its own choice or the disk's, and never sends a FLUSH.
 */
import { closeSync, openSync, readSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { isStrata, startDisk, type Disk } from './backend.js';
import { bootGuest, type Guest } from './guest.js';
import { Scope } from './scope.js';
import { diskFacts, flushCount } from './sysfs.js';

const WRITES = 400;
const BLOCK_BYTES = 4096;
const AREA_OFFSET_BYTES = 2 ** 20;

// QEMU's storage daemon calls its cache write-through to a guest that may configure it.
const views = [
  { view: 'by default', configWce: true, writeCache: true, choice: undefined, flushed: isStrata },
  { view: 'with CONFIG_WCE hidden', configWce: false, writeCache: true, choice: undefined, flushed: true },
  { view: 'written through, as the disk says', configWce: true, writeCache: false, choice: undefined, flushed: false },
  { view: 'written through by choice', configWce: true, writeCache: true, choice: 'write through', flushed: false },
] as const;

describe('every fsynced write survives kill -9 of the daemon', () => {
  const scope = new Scope();
  const disks: Disk[] = [];
  let guest: Guest;

  beforeAll(async () => {
    const directory = scope.directory();
    for (const [index, { writeCache }] of views.entries()) {
      const path = join(directory, `disk${index}`);
      disks.push(scope.add(await startDisk({ path, sizeBytes: 64 * 2 ** 20, writeCache })));
    }
    guest = scope.add(
      await bootGuest({
        disks: disks.map((disk, index) => ({
          socketPath: disk.socketPath,
          backend: disk,
          configWce: views[index]!.configWce,
        })),
      }),
    );
  });
  afterAll(() => scope.close());

  for (const [index, { view, choice, flushed }] of views.entries()) {
    it(view, async () => {
      const disk = disks[index]!;
      const name = guest.disks[index]!;
      if (choice !== undefined) await guest.sh(`echo '${choice}' > /sys/block/${name}/cache_type`);
      expect((await diskFacts(guest, name)).writeCache).toBe(flushed ? 'write back' : 'write through');
      expect(stampedBlocks(disk.path)).toBe(0);

      const flushesBefore = await flushCount(guest, name);
      await guest.sh(
        `fio --name=stamp --filename=/dev/${name} --rw=randwrite --bs=${BLOCK_BYTES} --offset=${AREA_OFFSET_BYTES} \\
         --size=${WRITES * BLOCK_BYTES} --ioengine=psync --fsync=1 --end_fsync=1 \\
         --verify=pattern --verify_pattern=%o --do_verify=0`,
      );
      const flushes = (await flushCount(guest, name)) - flushesBefore;
      await disk.kill('SIGKILL');

      expect(stampedBlocks(disk.path)).toBe(WRITES);
      if (flushed) expect(flushes).toBeGreaterThanOrEqual(WRITES);
      else expect(flushes).toBe(0);
    });
  }
});

/** Blocks of the area that hold their own offset, in every 64-bit word. */
function stampedBlocks(path: string): number {
  const area = new BigUint64Array((WRITES * BLOCK_BYTES) / 8);
  const fd = openSync(path, 'r');
  try {
    readSync(fd, area, 0, area.byteLength, AREA_OFFSET_BYTES);
  } finally {
    closeSync(fd);
  }
  const wordsPerBlock = BLOCK_BYTES / 8;
  let stamped = 0;
  for (let block = 0; block < WRITES; block++) {
    const offset = BigInt(AREA_OFFSET_BYTES + block * BLOCK_BYTES);
    if (area.subarray(block * wordsPerBlock, (block + 1) * wordsPerBlock).every((word) => word === offset)) stamped++;
  }
  return stamped;
}
