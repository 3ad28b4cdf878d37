/**
 * What changes under a running guest reaches it: a disk grown while it is mounted, and memory plugged in while the disk is busy.
 */
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { isStrata, startDisk } from './backend.js';
import { fioVerify } from './fio.js';
import { bootGuest } from './guest.js';
import { Scope } from './scope.js';
import { diskFacts, kernelComplaints } from './sysfs.js';

const MIB = 2 ** 20;
const BEFORE_MIB = 128;
const AFTER_MIB = 384;
/** Of a single step, on a busy machine. */
const TIMEOUT_MS = 180_000;

describe.runIf(isStrata)('a running guest', () => {
  const scope = new Scope();
  afterAll(() => scope.close());

  it('sees its mounted disk grow, and grows its file system on it', async () => {
    const path = join(scope.directory(), 'disk');
    const disk = scope.add(await startDisk({ path, sizeBytes: BEFORE_MIB * MIB, numQueues: 2, rpc: true }));
    const guest = scope.add(
      await bootGuest({ disks: [{ socketPath: disk.socketPath, backend: disk, numQueues: 2 }], memoryMib: 512 }),
    );
    const name = guest.disks[0]!;
    await guest.sh(
      `mkfs.ext4 -q /dev/${name}; mkdir /tmp/m; mount /dev/${name} /tmp/m
       dd if=/dev/urandom of=/tmp/m/old bs=1M count=32 2>/dev/null; md5sum /tmp/m/old > /tmp/old.md5; sync
       (while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/tmp/m/busy bs=64k count=64 conv=fsync || touch /tmp/failed; done; touch /tmp/stopped) > /dev/null 2>&1 &`,
      { timeoutMs: TIMEOUT_MS },
    );
    await expect(disk.rpc('bdev_resize', { name: 'disk', new_size: `${BEFORE_MIB / 2}MiB` })).rejects.toThrow(
      'cannot shrink',
    );
    expect(await disk.rpc('bdev_resize', { name: 'disk', new_size: `${AFTER_MIB}MiB` })).toBe(true);
    const deadline = performance.now() + TIMEOUT_MS;
    while ((await diskFacts(guest, name)).sizeBytes !== AFTER_MIB * MIB && performance.now() < deadline)
      await setTimeout(50);
    expect((await diskFacts(guest, name)).sizeBytes).toBe(AFTER_MIB * MIB);

    await guest.sh(
      `resize2fs /dev/${name} 2>/dev/null
       [ "$(df -m /tmp/m | awk 'NR == 2 {print $2}')" -gt ${AFTER_MIB - 100} ]
       dd if=/dev/urandom of=/tmp/m/new bs=1M count=128 2>/dev/null; md5sum /tmp/m/new > /tmp/new.md5
       touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done; sync; echo 3 > /proc/sys/vm/drop_caches
       md5sum -c /tmp/old.md5 /tmp/new.md5; [ ! -e /tmp/failed ]
       umount /tmp/m; e2fsck -fn /dev/${name}`,
      { timeoutMs: TIMEOUT_MS },
    );
    expect(await kernelComplaints(guest)).toBe('');
    await guest.shutdown();
    expect(await disk.stop(), disk.log).toEqual({ code: 0, signal: null });
  });

  it('does its I/O in memory that was plugged in meanwhile', async () => {
    const path = join(scope.directory(), 'disk');
    const disk = scope.add(await startDisk({ path, sizeBytes: 256 * MIB, numQueues: 2, rpc: true }));
    const guest = scope.add(
      await bootGuest({
        disks: [{ socketPath: disk.socketPath, backend: disk, numQueues: 2 }],
        memoryMib: 512,
        maxMemoryMib: 2048,
      }),
    );
    const name = guest.disks[0]!;
    const memory = async (): Promise<number> => {
      const [{ guest_memory_bytes: bytes }] = (await disk.rpc('vhost_get_controllers')) as [
        { guest_memory_bytes: number },
      ];
      return bytes / MIB;
    };
    expect(await memory()).toBe(512);
    await guest.sh('echo online > /sys/devices/system/memory/auto_online_blocks');
    const before = Number(await guest.sh(`awk '/MemTotal/ {print $2}' /proc/meminfo`));
    const busy = fioVerify(guest, name, { sizeMib: 96, jobs: 2 });
    await setTimeout(300);
    await guest.qmp('object-add', { 'qom-type': 'memory-backend-memfd', id: 'more', size: 1024 * MIB, share: true });
    await guest.qmp('device_add', { driver: 'pc-dimm', id: 'dimm', memdev: 'more' });
    await busy;
    expect(await memory()).toBe(1536);
    const after = Number(await guest.sh(`awk '/MemTotal/ {print $2}' /proc/meminfo`));
    expect(after - before).toBeGreaterThan(900 * 1024);
    // More than was free before: much of it must lie in what is new.
    await guest.sh(
      `mount -o remount,size=900m /dev/shm
       dd if=/dev/zero of=/dev/shm/fill bs=1M count=600 2>/dev/null
       dd if=/dev/urandom of=/dev/${name} bs=1M count=96 conv=fsync 2>/dev/null
       md5sum < /dev/${name} > /tmp/cached.md5; echo 3 > /proc/sys/vm/drop_caches
       [ "$(md5sum < /dev/${name})" = "$(cat /tmp/cached.md5)" ]`,
      { timeoutMs: TIMEOUT_MS },
    );
    await fioVerify(guest, name, { sizeMib: 96, jobs: 2, seed: 2 });
    expect(await kernelComplaints(guest)).toBe('');
    await guest.shutdown();
  });
});
