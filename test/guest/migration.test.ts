/**
 * A guest moves from one QEMU to another, and from one daemon to another on the same file, while it works on its disk.
 *
 * What the device writes into guest memory only its dirty log tells QEMU of. So the guest reads data into its page cache after QEMU
 * has copied all of memory once, and migration cannot complete meanwhile, as the guest writes to memory faster than QEMU may send
 * it. fio writes and verifies on another part of the disk all the while. When the guest has moved and not yet run, its memory is
 * compared, page by page, with what it was; then it runs, and what it reads from its page cache and from its disk has to be right.
 */
import { createHash, randomBytes } from 'node:crypto';
import { closeSync, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { isStrata, startDisk } from './backend.js';
import type { Disk } from './backend.js';
import { bootGuest } from './guest.js';
import type { Guest } from './guest.js';
import { Scope } from './scope.js';
import { kernelComplaints } from './sysfs.js';

const MIB = 2 ** 20;
const CACHED_MIB = 32;
const WRITTEN_MIB = 48;
const DISK_BYTES = 256 * MIB;
/**
 * Not a multiple of 256 KiB: in that case QEMU before 9.0, where it emulates the processor, forgets pages that the guest itself writes
 * to (fixed by its commit 03bfc2188f), and whichever disk it has, the guest is not the same on the other side.
 */
const MEMORY_MIB = 512 + 8 / 1024;
/** What QEMU may send in a second while the migration is not to complete: of what the guest overwrites without a pause, eight times as much. */
const BANDWIDTH = 64 * MIB;
const NOISE_MIB = 8;
/** Of a single step, on a busy machine. */
const TIMEOUT_MS = 180_000;

describe.runIf(isStrata)('a guest that is migrated', () => {
  const scope = new Scope();
  afterAll(() => scope.close());

  it.each(['split', 'packed'] as const)(
    'with %s rings while it reads, writes and verifies finds all as it was',
    async (rings) => {
      const isPacked = rings === 'packed';
      const directory = scope.directory();
      const path = join(directory, 'disk');
      const source = scope.add(await startDisk({ path, sizeBytes: DISK_BYTES, numQueues: 2, lockWhileRunning: true }));
      const content = randomBytes(CACHED_MIB * MIB);
      writeAt(path, content);
      const guest = scope.add(await boot(source, { isPacked }));
      const disk = guest.disks[0]!;

      // Both daemons have the file open from here on.
      const target = scope.add(
        await startDisk({ path, socketPath: join(directory, 'target.sock'), numQueues: 2, lockWhileRunning: true }),
      );
      const incomingPath = join(directory, 'incoming');
      const moved = scope.add(await boot(target, { isPacked, incomingPath }));

      await guest.sh(
        // The page cache of a device goes with its last user.
        `(sleep 100000 < /dev/${disk}) > /dev/null 2>&1 &
         (code=0; while [ $code = 0 ] && [ ! -e /tmp/quiet ]; do ${fio(disk)}; code=$?; done; echo $code > /tmp/fio.code) > /dev/null 2>&1 &
         dd if=/dev/urandom of=/tmp/noise bs=1M count=${NOISE_MIB}
         (while [ ! -e /tmp/quiet ]; do dd if=/tmp/noise of=/tmp/busy bs=1M conv=notrunc; done) > /dev/null 2>&1 &`,
      );
      await guest.qmp('migrate-set-parameters', { 'max-bandwidth': BANDWIDTH, 'downtime-limit': 1 });
      // Logging is switched on, off and on again.
      await guest.qmp('migrate', { uri: 'exec:cat > /dev/null' });
      await firstPass(guest);
      await guest.qmp('migrate_cancel');
      await until(guest, (status) => status === 'cancelled');
      await guest.qmp('migrate', { uri: `unix:${incomingPath}` });
      await firstPass(guest);
      const checksum = createHash('md5').update(content).digest('hex');
      expect(await guest.sh(cached(disk), { timeoutMs: TIMEOUT_MS })).toContain(checksum);
      expect((await guest.migration()).status).toBe('active');
      await guest.qmp('migrate-set-parameters', { 'max-bandwidth': 10_000 * MIB, 'downtime-limit': 2000 });
      await guest.migrated(moved, TIMEOUT_MS);
      expect(guest.differingPages(moved)).toEqual([]);
      await moved.resume();
      await guest.kill();

      const { output } = await moved.run(
        'touch /tmp/quiet; while [ ! -s /tmp/fio.code ]; do sleep 0.2; done; cat /tmp/fio.log /tmp/fio.code',
        { timeoutMs: TIMEOUT_MS },
      );
      expect(output.trim().split('\n').at(-1), output).toBe('0');
      const sectorsBefore = await sectorsRead(moved, disk);
      expect(await moved.sh(cached(disk), { timeoutMs: TIMEOUT_MS })).toContain(checksum);
      expect(await sectorsRead(moved, disk)).toBe(sectorsBefore);
      // From the disk itself, through the new daemon.
      expect(await moved.sh(`echo 3 > /proc/sys/vm/drop_caches; ${cached(disk)}`)).toContain(checksum);
      expect(await kernelComplaints(moved)).toBe('');
      await moved.shutdown();
      expect(await source.stop(), source.log).toEqual({ code: 0, signal: null });
      expect(await target.stop(), target.log).toEqual({ code: 0, signal: null });
    },
  );

  it('to a daemon that cannot have the file waits for it, and harms nothing', async () => {
    const directory = scope.directory();
    const path = join(directory, 'disk');
    const first = scope.add(await startDisk({ path, sizeBytes: 16 * MIB, lockWhileRunning: true }));
    const guest = scope.add(await boot(first));
    const second = scope.add(
      await startDisk({ path, socketPath: join(directory, 'second.sock'), lockWhileRunning: true }),
    );
    // Not a migration but a mistake: two guests on one file. The second waits for its disk, in vain.
    const booting = boot(second).then((other) => scope.add(other));
    booting.catch(() => undefined);
    const deadline = performance.now() + TIMEOUT_MS;
    while (!second.log.includes('rings wait for the disk') && performance.now() < deadline) await setTimeout(50);
    expect(second.log).toContain('is in use by another process');
    await guest.sh(`dd if=/dev/zero of=/dev/${guest.disks[0]} bs=1M count=4 oflag=direct`);
    await guest.shutdown();
    // Now it is free.
    const other = await booting;
    await other.sh(`dd if=/dev/${other.disks[0]} of=/dev/null bs=1M count=4 iflag=direct`);
    await other.shutdown();
  });
});

interface BootOptions {
  readonly isPacked?: boolean;
  readonly incomingPath?: string;
}

function boot(disk: Disk, { isPacked = false, incomingPath }: BootOptions = {}): Promise<Guest> {
  return bootGuest({
    disks: [{ socketPath: disk.socketPath, backend: disk, numQueues: 2, packed: isPacked }],
    memoryMib: MEMORY_MIB,
    ...(incomingPath === undefined ? {} : { incomingPath }),
  });
}

/** Writes to the other part of the disk, and verifies it; leaves the page cache alone. */
function fio(disk: string): string {
  return (
    `fio --name=work --filename=/dev/${disk} --ioengine=io_uring --direct=1 --iodepth=8 --bsrange=4k-64k --rw=randwrite ` +
    `--offset=${CACHED_MIB}m --size=${WRITTEN_MIB}m --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=64 ` +
    `--time_based=1 --runtime=10 --rate=4m --invalidate=0 --output=/tmp/fio.log`
  );
}

/** Reads the part of the disk that is to be in the page cache, and prints its checksum. */
function cached(disk: string): string {
  return `dd if=/dev/${disk} bs=1M count=${CACHED_MIB} 2>/dev/null | md5sum`;
}

/** What the guest's kernel has read of the disk so far. */
async function sectorsRead(guest: Guest, disk: string): Promise<number> {
  return Number(await guest.sh(`awk '{print $3}' /sys/block/${disk}/stat`));
}

/** Waits until QEMU has sent all of memory once. */
async function firstPass(guest: Guest): Promise<void> {
  await until(guest, (status, passes) => {
    if (status === 'completed' || status === 'failed') throw new Error(`the migration is ${status} and was to go on`);
    return passes >= 2;
  });
}

async function until(guest: Guest, isReached: (status: string | undefined, passes: number) => boolean): Promise<void> {
  const deadline = performance.now() + TIMEOUT_MS;
  for (;;) {
    const { status, ram } = await guest.migration();
    if (isReached(status, ram?.['dirty-sync-count'] ?? 0)) return;
    if (performance.now() > deadline) throw new Error(`the migration is still ${status}`);
    await setTimeout(20);
  }
}

function writeAt(path: string, bytes: Buffer): void {
  const fd = openSync(path, 'r+');
  try {
    writeSync(fd, bytes, 0, bytes.length, 0);
  } finally {
    closeSync(fd);
  }
}
