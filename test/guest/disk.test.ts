/**
 * What a guest is told about its disk, and that the disk keeps to it: size, serial, limits, features, write cache,
 * read-only, and space given back to the host.
 *
 * One guest with an ordinary disk, one whose front-end hides CONFIG_WCE, and a read-only one.
 */
import { createHash, randomBytes } from 'node:crypto';
import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { isStrata, startDisk, type Disk } from './backend.js';
import { fioVerify } from './fio.js';
import { bootGuest, type Guest } from './guest.js';
import { Scope } from './scope.js';
import { diskFacts, Feature, flushCount, kernelComplaints } from './sysfs.js';

const MIB = 2 ** 20;
/** No multiple of anything but the sector. */
const SIZE_BYTES = 300 * MIB + 5 * 512;
const READ_ONLY_BYTES = 16 * MIB;
const SERIAL = 'strata-guest-0123456';

describe('a guest sees its disk', () => {
  const scope = new Scope();
  let ordinary: Disk;
  let hiddenWce: Disk;
  let readOnly: Disk;
  let guest: Guest;
  let ordinaryName: string;
  let hiddenWceName: string;
  let readOnlyName: string;

  beforeAll(async () => {
    const directory = scope.directory();
    const readOnlyPath = join(directory, 'read-only');
    writeFileSync(readOnlyPath, randomBytes(READ_ONLY_BYTES));
    ordinary = scope.add(await startDisk({ path: join(directory, 'a'), sizeBytes: SIZE_BYTES, serial: SERIAL }));
    hiddenWce = scope.add(await startDisk({ path: join(directory, 'b'), sizeBytes: SIZE_BYTES }));
    readOnly = scope.add(await startDisk({ path: readOnlyPath, readOnly: true }));
    guest = scope.add(
      await bootGuest({
        disks: [
          { socketPath: ordinary.socketPath, backend: ordinary },
          { socketPath: hiddenWce.socketPath, backend: hiddenWce, configWce: false },
          { socketPath: readOnly.socketPath, backend: readOnly },
        ],
      }),
    );
    [ordinaryName, hiddenWceName, readOnlyName] = guest.disks as [string, string, string];
  });
  afterAll(() => scope.close());

  it('with its size, serial and features', async () => {
    const { sizeBytes, serial, readOnly, queues, features } = await diskFacts(guest, ordinaryName);
    expect({ sizeBytes, readOnly, queues }).toEqual({ sizeBytes: SIZE_BYTES, readOnly: false, queues: 1 });
    if (isStrata) expect(serial).toBe(SERIAL);
    for (const name of ['version1', 'flush', 'configWce', 'discard', 'writeZeroes', 'segMax', 'blockSize'] as const) {
      expect(features.has(Feature[name]), name).toBe(true);
    }
    // These belong to the vhost-user connection, or to other disks.
    for (const name of ['protocolFeatures', 'readOnly', 'multiQueue'] as const) {
      expect(features.has(Feature[name]), name).toBe(false);
    }
  });

  it('with limits that let large requests through', async () => {
    const { limits } = await diskFacts(guest, ordinaryName);
    expect(limits.logical_block_size).toBe(512);
    expect([512, 4096]).toContain(limits.physical_block_size);
    expect(limits.minimum_io_size).toBeGreaterThanOrEqual(limits.physical_block_size);
    expect(limits.max_segments).toBeGreaterThanOrEqual(64);
    if (isStrata) expect(limits.max_segment_size).toBeGreaterThanOrEqual(64 * 1024);
    // The kernel's own default, unless the disk asks for less.
    expect(limits.max_sectors_kb).toBeGreaterThanOrEqual(1280);
    expect(limits.discard_max_bytes).toBeGreaterThanOrEqual(MIB);
    expect(limits.max_discard_segments).toBeGreaterThanOrEqual(1);
    expect(limits.discard_granularity).toBeGreaterThanOrEqual(512);
    expect(limits.write_zeroes_max_bytes).toBeGreaterThanOrEqual(MIB);
  });

  it('as a write-back cache that it flushes, by default and with CONFIG_WCE hidden', async () => {
    const hidden = await diskFacts(guest, hiddenWceName);
    expect(hidden.features.has(Feature.configWce)).toBe(false);
    expect(hidden.features.has(Feature.flush)).toBe(true);
    expect(hidden.writeCache).toBe('write back');
    expect(await flushesOfOneSync(guest, hiddenWceName)).toBe(1);

    if (!isStrata) return;
    expect((await diskFacts(guest, ordinaryName)).writeCache).toBe('write back');
    expect(await flushesOfOneSync(guest, ordinaryName)).toBe(1);
  });

  it('and may switch the write cache off and on', async () => {
    await guest.sh(`echo 'write through' > /sys/block/${ordinaryName}/cache_type`);
    expect((await diskFacts(guest, ordinaryName)).writeCache).toBe('write through');
    expect(await flushesOfOneSync(guest, ordinaryName)).toBe(0);
    await fioVerify(guest, ordinaryName, { sizeMib: 16 });

    await guest.sh(`echo 'write back' > /sys/block/${ordinaryName}/cache_type`);
    expect((await diskFacts(guest, ordinaryName)).writeCache).toBe('write back');
    expect(await flushesOfOneSync(guest, ordinaryName)).toBe(1);
  });

  it('and gets random writes of 4 to 64 KiB back intact', async () => {
    await fioVerify(guest, ordinaryName, { sizeMib: 256, depth: 32 });
  });

  it('reads its last sector and nothing beyond', async () => {
    const last = SIZE_BYTES / 512 - 1;
    await guest.sh(
      `printf '%0512d' 7 | dd of=/dev/${ordinaryName} bs=512 seek=${last} oflag=direct 2>/dev/null
       [ "$(dd if=/dev/${ordinaryName} bs=512 skip=${last} iflag=direct 2>/dev/null | wc -c)" = 512 ]`,
    );
    expect(readRange(ordinary.path, last * 512, 1024).toString('latin1')).toBe('7'.padStart(512, '0'));
  });

  it('read-only: it reads every byte and can change none', async () => {
    const content = readFileSync(readOnly.path);
    const { readOnly: isReadOnly, features, sizeBytes } = await diskFacts(guest, readOnlyName);
    expect({ isReadOnly, sizeBytes }).toEqual({ isReadOnly: true, sizeBytes: READ_ONLY_BYTES });
    expect(features.has(Feature.readOnly)).toBe(true);

    expect(await guest.sh(`md5sum < /dev/${readOnlyName}`)).toContain(md5(content));
    for (const attempt of [
      `dd if=/dev/zero of=/dev/${readOnlyName} bs=4096 count=1 conv=fsync,notrunc`,
      `mkfs.ext4 -q -F /dev/${readOnlyName}`,
      `blkdiscard -f /dev/${readOnlyName}`,
      `blkdiscard -f -z /dev/${readOnlyName}`,
    ]) {
      const { code, output } = await guest.run(attempt);
      expect(code, `${attempt}\n${output}`).not.toBe(0);
    }
    expect(md5(readFileSync(readOnly.path))).toBe(md5(content));
  });

  it('gives space back to the host by discard and by punching holes, and zeroes what it is told to', async () => {
    const write = (offsetMib: number, lengthMib: number): Promise<string> =>
      guest.sh(
        `dd if=/dev/urandom of=/dev/${ordinaryName} bs=1M seek=${offsetMib} count=${lengthMib} conv=fsync,notrunc`,
      );
    await guest.sh(`blkdiscard -f /dev/${ordinaryName}`);
    const emptyBytes = ordinary.allocatedBytes;
    expect(emptyBytes).toBeLessThan(MIB);
    await write(0, 48);
    expect(ordinary.allocatedBytes).toBeGreaterThanOrEqual(48 * MIB);
    const kept = readRange(ordinary.path, 31 * MIB, MIB);

    await guest.sh(`blkdiscard -o 0 -l ${16 * MIB} /dev/${ordinaryName}`);
    expect(ordinary.allocatedBytes).toBeLessThan(33 * MIB);
    // WRITE_ZEROES with the unmap flag.
    await guest.sh(`fallocate --punch-hole -o ${16 * MIB} -l ${15 * MIB} /dev/${ordinaryName}`);
    expect(ordinary.allocatedBytes).toBeLessThan(18 * MIB);
    // WRITE_ZEROES without it: the guest keeps the right to its space.
    const beforeZeroesBytes = ordinary.allocatedBytes;
    await guest.sh(`blkdiscard -z -o ${32 * MIB} -l ${15 * MIB} /dev/${ordinaryName}`);
    expect(ordinary.allocatedBytes).toBeLessThanOrEqual(beforeZeroesBytes);

    const zeroedRanges: [offsetMib: number, lengthMib: number][] = [
      [0, 31],
      [32, 15],
    ];
    for (const [offsetMib, lengthMib] of zeroedRanges) {
      expect(isZero(readRange(ordinary.path, offsetMib * MIB, lengthMib * MIB))).toBe(true);
      const zeroes = md5(Buffer.alloc(lengthMib * MIB));
      const seen = `dd if=/dev/${ordinaryName} bs=1M skip=${offsetMib} count=${lengthMib} iflag=direct 2>/dev/null | md5sum`;
      expect(await guest.sh(seen)).toContain(zeroes);
    }
    // The neighbours are untouched.
    expect(readRange(ordinary.path, 31 * MIB, MIB).equals(kept)).toBe(true);
    expect(isZero(readRange(ordinary.path, 47 * MIB, MIB))).toBe(false);
  });

  it('and the daemons end by SIGTERM when it has gone', async () => {
    expect(await kernelComplaints(guest)).toBe('');
    await guest.shutdown();
    for (const disk of [ordinary, hiddenWce, readOnly]) {
      expect(await disk.stop(), disk.log).toEqual({ code: 0, signal: null });
    }
  });
});

/** FLUSH requests that one buffered write with its fsync costs. */
async function flushesOfOneSync(guest: Guest, disk: string): Promise<number> {
  const before = await flushCount(guest, disk);
  await guest.sh(`dd if=/dev/zero of=/dev/${disk} bs=4096 count=1 conv=fsync,notrunc`);
  return (await flushCount(guest, disk)) - before;
}

function readRange(path: string, offsetBytes: number, lengthBytes: number): Buffer {
  const buffer = Buffer.alloc(lengthBytes);
  const fd = openSync(path, 'r');
  try {
    return buffer.subarray(0, readSync(fd, buffer, 0, lengthBytes, offsetBytes));
  } finally {
    closeSync(fd);
  }
}

function isZero(bytes: Buffer): boolean {
  return bytes.equals(Buffer.alloc(bytes.length));
}

function md5(bytes: Buffer): string {
  return createHash('md5').update(bytes).digest('hex');
}
