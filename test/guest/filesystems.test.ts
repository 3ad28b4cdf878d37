/**
 * ext4 and xfs, on a disk each: 200 MB of files with checksums, a clean fsck, space given back by fstrim. Then the
 * guest is killed while it writes, and a second guest, on the same daemons, replays the journals and finds every file
 * that was fsynced before, whole.
 */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { startDisk, type Disk } from './backend.js';
import { bootGuest, type Guest } from './guest.js';
import { Scope } from './scope.js';
import { kernelComplaints } from './sysfs.js';

const MIB = 2 ** 20;
const SIZE_BYTES = 1024 * MIB;
const LARGE_FILES = 50;
const LARGE_MIB = 4;
const SMALL_FILES = 200;
const SYNCED_ROUNDS = 6;
const FILES_PER_ROUND = 5;

const filesystems = [
  { type: 'ext4', make: 'mkfs.ext4 -q', check: 'e2fsck -fn', replayed: 'recovery complete' },
  { type: 'xfs', make: 'mkfs.xfs -q', check: 'xfs_repair -n', replayed: 'Ending recovery' },
].map((filesystem, index) => ({ ...filesystem, index, mountPoint: `/mnt/${filesystem.type}` }));

type Filesystem = (typeof filesystems)[number];

describe('file systems of a guest', () => {
  const scope = new Scope();
  const disks: Disk[] = [];
  /** Checksums of the files that must be there, by file system. */
  const sums = new Map<string, string>();
  let guest: Guest;

  const boot = async (): Promise<void> => {
    guest = scope.add(
      await bootGuest({ disks: disks.map((disk) => ({ socketPath: disk.socketPath, backend: disk })) }),
    );
    await guest.sh(filesystems.map(({ mountPoint }) => `mkdir ${mountPoint}`).join('\n'));
  };
  const device = ({ index }: Filesystem): string => `/dev/${guest.disks[index]}`;
  const mount = (filesystem: Filesystem): Promise<string> =>
    guest.sh(`mount -t ${filesystem.type} ${device(filesystem)} ${filesystem.mountPoint}`);
  /** Unmounts and has the file system's own checker find no fault. */
  const unmountAndCheck = async (filesystem: Filesystem): Promise<void> => {
    await guest.sh(`umount ${filesystem.mountPoint}`);
    const { code, output } = await guest.run(`${filesystem.check} ${device(filesystem)}`);
    expect(code, output).toBe(0);
  };

  beforeAll(async () => {
    const directory = scope.directory();
    for (const { type } of filesystems) {
      disks.push(scope.add(await startDisk({ path: join(directory, type), sizeBytes: SIZE_BYTES })));
    }
    await boot();
  });
  afterAll(() => scope.close());

  for (const filesystem of filesystems) {
    it(`${filesystem.type} keeps 200 MB of files and passes its check`, async () => {
      await guest.sh(`${filesystem.make} ${device(filesystem)}`);
      await mount(filesystem);
      await guest.sh(writeFiles(`${filesystem.mountPoint}/kept`), { timeoutMs: 180_000 });
      const written = await checksums(guest, `${filesystem.mountPoint}/kept`);
      expect(written.trimEnd().split('\n')).toHaveLength(LARGE_FILES + SMALL_FILES);
      await unmountAndCheck(filesystem);

      // Nothing is cached after the unmount: this reads the disk.
      await mount(filesystem);
      expect(await checksums(guest, `${filesystem.mountPoint}/kept`)).toBe(written);
    });
  }

  for (const filesystem of filesystems) {
    it(`${filesystem.type} gives the space of deleted files back by fstrim`, async () => {
      const { mountPoint, index, type } = filesystem;
      const disk = disks[index]!;
      const beforeBytes = disk.allocatedBytes;
      expect(beforeBytes).toBeGreaterThan(200 * MIB);
      // Half of the large files.
      await guest.sh(`rm ${mountPoint}/kept/*/large*[02468]\nsync -f ${mountPoint}\nfstrim ${mountPoint}`);
      expect(disk.allocatedBytes).toBeLessThan(beforeBytes - (LARGE_FILES / 2 - 1) * LARGE_MIB * MIB);
      await unmountAndCheck(filesystem);
      await mount(filesystem);
      sums.set(type, await checksums(guest, `${mountPoint}/kept`));
    });
  }

  it('are whole again after the guest was killed while it wrote', async () => {
    for (const { mountPoint } of filesystems) await guest.sh(keepWriting(`${mountPoint}/unsynced`));
    const synced = new Map<string, string[]>();
    for (let round = 0; round < SYNCED_ROUNDS; round++) {
      for (const { type, mountPoint } of filesystems) {
        const lines = synced.get(type) ?? [];
        synced.set(type, [...lines, await guest.sh(writeSynced(`${mountPoint}/synced${round}`))]);
      }
    }
    for (const { mountPoint } of filesystems) {
      expect(Number(await guest.sh(`ls ${mountPoint}/unsynced | wc -l`)), 'files written meanwhile').toBeGreaterThan(0);
    }
    await guest.kill();

    await boot();
    for (const filesystem of filesystems) {
      const { type, mountPoint, replayed } = filesystem;
      await mount(filesystem);
      expect(await guest.sh('dmesg')).toContain(`(${guest.disks[filesystem.index]}): ${replayed}`);
      expect(await checksums(guest, `${mountPoint}/kept`)).toBe(sums.get(type));
      for (const [round, expected] of (synced.get(type) ?? []).entries()) {
        expect(await checksums(guest, `${mountPoint}/synced${round}`)).toBe(expected);
      }
      await unmountAndCheck(filesystem);
    }
    expect(await kernelComplaints(guest)).toBe('');
    await guest.shutdown();
  });
});

/** Large files and small ones of growing size, each with other content, in eight directories. */
function writeFiles(directory: string): string {
  return `
    mkdir ${directory}
    cd ${directory}
    mkdir 0 1 2 3 4 5 6 7
    head -c ${LARGE_MIB * MIB} /dev/urandom > /tmp/random
    i=0
    while [ $i -lt ${LARGE_FILES} ]; do
      { echo "large $i"; cat /tmp/random; } > $((i % 8))/large$i
      i=$((i + 1))
    done
    i=0
    while [ $i -lt ${SMALL_FILES} ]; do
      { echo "small $i"; head -c $((i * 97)) /tmp/random; } > $((i % 8))/small$i
      i=$((i + 1))
    done`;
}

/** Writes files and fsyncs each with its directory; prints what \`checksums\` must print of them ever after. */
function writeSynced(directory: string): string {
  return `
    mkdir ${directory}
    cd ${directory}
    i=0
    while [ $i -lt ${FILES_PER_ROUND} ]; do
      { echo "${directory} $i"; head -c $((i * 50000 + 1000)) /tmp/random; } > $i
      sync $i
      i=$((i + 1))
    done
    sync . ..
    ${CHECKSUMS}`;
}

/** Creates, grows and deletes files until the guest dies. */
function keepWriting(directory: string): string {
  return `
    mkdir ${directory}
    cd ${directory}
    {
      i=0
      while true; do
        head -c 300000 /tmp/random > file$i
        cat file$i >> grown$((i % 7))
        [ $((i % 3)) = 0 ] || rm file$i
        [ $((i % 50)) != 0 ] || rm -f grown*
        i=$((i + 1))
      done
    } >/dev/null 2>&1 &`;
}

const CHECKSUMS = 'find . -type f | sort | xargs md5sum';

function checksums(guest: Guest, directory: string): Promise<string> {
  return guest.sh(`cd ${directory}\n${CHECKSUMS}`, { timeoutMs: 120_000 });
}
