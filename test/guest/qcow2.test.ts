/**
 * A guest whose root file system is an overlay over a compressed image: it boots, works while its daemon is killed again and again and
 * while snapshots are taken, is killed itself, and comes back with a clean file system and everything that it was told is durable.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { isStrata, startDisk } from './backend.js';
import type { Disk } from './backend.js';
import { bootGuest } from './guest.js';
import type { Guest } from './guest.js';
import { makeRootDisk } from './root-disk.js';
import { Scope } from './scope.js';
import { kernelComplaints } from './sysfs.js';

const KILLS = 3;
const SNAPSHOTS = 2;
const FILES_MAX = 2000;
const TIMEOUT_MS = 300_000;

/** Files of its own name over and over, each synced before it is named in the list, which is synced, too. */
const WORK = `
mkdir -p /files && : >/files/list
i=0
while [ $i -lt ${FILES_MAX} ]; do
  seq $i $((i + 500)) >/files/file$i && sync /files/file$i && sha1sum /files/file$i >>/files/list && sync /files/list || exit 1
  [ $((i % 7)) -ne 3 ] || rm -f /files/extra && dd if=/dev/urandom of=/files/extra bs=64k count=8 2>/dev/null
  i=$((i + 1))
  echo $i >/dev/ttyS0
done`;

describe.runIf(isStrata)('a root file system on an overlay over a compressed image', () => {
  const scope = new Scope();
  afterAll(() => scope.close());

  const boot = async (disk: Disk): Promise<Guest> =>
    scope.add(
      await bootGuest({
        disks: [{ socketPath: disk.socketPath, backend: disk, reconnectSeconds: 1 }],
        rootOnDisk: true,
      }),
    );

  it('survives the death of its daemon and its own', { timeout: TIMEOUT_MS }, async () => {
    const directory = scope.directory();
    const [raw, base, overlay] = ['root.img', 'base.qcow2', 'overlay.qcow2'].map((name) => join(directory, name)) as [
      string,
      string,
      string,
    ];
    makeRootDisk(raw);
    execFileSync('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', raw, base]);
    rmSync(raw);
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', overlay]);
    const disk = scope.add(await startDisk({ path: overlay, isQcow2: true, rpc: true }));
    const guest = await boot(disk);
    expect((await guest.sh('grep " / " /proc/mounts')).trim()).toMatch(/^\S+ \/ ext4 /m);

    const work = guest.run(WORK, { timeoutMs: TIMEOUT_MS }).catch(() => null);
    for (let i = 0; i < KILLS; i++) {
      await setTimeout(2500);
      await disk.restart();
      if (i < SNAPSHOTS) await disk.rpc('bdev_qcow2_snapshot_create', { name: 'image', snapshot: `s${i}` });
    }
    await setTimeout(3000);
    // The power goes: the guest is gone in the middle of its work.
    await guest[Symbol.asyncDispose]();
    await work;

    const again = await boot(disk);
    // Something was done, and after the last kill, too.
    const count = Number((await again.sh('wc -l </files/list')).trim());
    expect(count).toBeGreaterThan(20);
    // The last line may be of a list that was not synced.
    await again.sh('head -n -1 /files/list | sha1sum -c - >/tmp/checked 2>&1 || { cat /tmp/checked; exit 1; }', {
      timeoutMs: TIMEOUT_MS,
    });
    expect(await kernelComplaints(again)).toBe('');
    await again.sh('sync; mount -o remount,ro /');
    expect(await again.sh('e2fsck -fn /dev/vda 2>&1')).not.toMatch(/error/i);
    await again.shutdown();
    const end = await disk.stop();
    expect(end.code).toBe(0);
    const report = spawnSync('qemu-img', ['check', overlay], { encoding: 'utf8' });
    // What was in flight when the daemon was killed may have left clusters that nobody uses.
    expect([0, 3], report.stdout + report.stderr).toContain(report.status);
    const list = execFileSync('qemu-img', ['snapshot', '-l', overlay], { encoding: 'utf8' });
    for (let i = 0; i < SNAPSHOTS; i++) expect(list).toContain(`s${i}`);
  });
});
