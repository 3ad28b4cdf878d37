/**
 * Goal: an overlay takes over all that lies below it while its guest writes, reads the same throughout, and needs nothing below in the end.
 *
 * Method: overlays over chains made by QEMU, streamed under random writes that a model follows; QEMU reads the result alone.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { IoStatus } from '../../../src/bdev/bdev-io.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';

const DISK_BYTES = 12 * 2 ** 20;
const BELOW_BYTES = 10 * 2 ** 20;
const random = seededRandom(42);

let qemu: QemuImg;

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

function open(): Disk {
  const file = { ...uringDefaults, name: 'file', path: qemu.path('top') };
  return new Disk(new Rig('stream'), [file, qcow2On({ imageDir: qemu.folder })('disk', 'file')]);
}

function jobOf(disk: Disk): { readonly state: string; readonly doneBytes: number; readonly error?: string } {
  return disk.open.bdev.describe()['job'] as { readonly state: string; readonly doneBytes: number };
}

/** A base with data, holes and zeroes, an image on it, and an overlay; and what they read as. */
function makeChain(options: string): Buffer {
  const below = Buffer.alloc(BELOW_BYTES);
  for (let at = 0; at < BELOW_BYTES; at += 4096) if ((at >> 16) % 3 !== 1) below.fill((at >> 12) % 251, at, at + 4096);
  writeFileSync(qemu.path('base.raw'), below);
  qemu.run('convert', '-f', 'raw', '-O', 'qcow2', '-c', 'base.raw', 'base');
  qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'middle', String(DISK_BYTES));
  qemu.io('middle', 'write -P 3 1M 300k', 'write -z 2M 128k');
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, '-b', 'middle', '-F', 'qcow2', 'top', String(DISK_BYTES));
  qemu.io('top', 'write -P 4 1500k 100k');
  qemu.run('convert', '-f', 'qcow2', '-O', 'raw', 'top', 'before.raw');
  return readFileSync(qemu.path('before.raw'));
}

/** Writes somewhere, and reads somewhere. */
function use(disk: Disk, model: Buffer): void {
  const offset = random.below(DISK_BYTES / 512 - 40) * 512;
  const data = Buffer.alloc((1 + random.below(39)) * 512, 1 + random.below(255));
  disk.write(offset, data);
  data.copy(model, offset);
  const at = random.below(DISK_BYTES / 512 - 40) * 512;
  expectBytes(disk.read(at, 20480), model.subarray(at, at + 20480), `read at ${at}`);
  disk.forget();
}

describe('A stream', () => {
  it.each(['cluster_size=64k', 'cluster_size=4k', 'extended_l2=on', 'compat=0.10'])(
    'leaves an overlay that needs nothing below it: %s',
    async (options) => {
      const model = makeChain(options);
      const disk = open();
      await disk.open.bdev.operate!('stream', {});
      await expect(disk.open.bdev.operate!('stream', {})).rejects.toThrow(/job/);
      for (let steps = 0; jobOf(disk).state === 'running'; steps++) {
        if (steps < 150) use(disk, model);
        else disk.rig.until(() => jobOf(disk).state !== 'running', 'the end of the stream');
      }
      expect(jobOf(disk)).toMatchObject({ state: 'done', doneBytes: DISK_BYTES });
      for (let i = 0; i < 20; i++) use(disk, model);
      expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
      disk.close();
      for (const name of ['base', 'base.raw', 'middle']) rmSync(qemu.path(name));
      expect(qemu.check('top').status).toBe(0);
      expect(qemu.info('top')).not.toHaveProperty('backing-filename');
      qemu.run('convert', '-f', 'qcow2', '-O', 'raw', 'top', 'after.raw');
      expectBytes(readFileSync(qemu.path('after.raw')), model, 'what QEMU reads');
    },
  );

  it('that is cancelled leaves an overlay, and goes on when it is started again', async () => {
    const model = makeChain('cluster_size=64k');
    const disk = open();
    await disk.open.bdev.operate!('stream', { bytesPerSecond: 2 ** 22 });
    disk.rig.until(() => jobOf(disk).doneBytes > 0, 'the first step');
    expect(jobOf(disk)).toMatchObject({ state: 'running', doneBytes: 2 ** 22 });
    await disk.open.bdev.operate!('cancelJob', {});
    disk.rig.until(() => jobOf(disk).state !== 'running', 'the end of the stream');
    expect(jobOf(disk).state).toBe('cancelled');
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.forget();
    await disk.open.bdev.operate!('stream', {});
    disk.rig.until(() => jobOf(disk).state !== 'running', 'the end of the stream');
    expect(jobOf(disk).state).toBe('done');
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.close();
    expect(qemu.check('top').status).toBe(0);
  });

  it('is refused when the image has snapshots, which show what lies below', async () => {
    makeChain('cluster_size=64k');
    qemu.run('snapshot', '-c', 'then', 'top');
    const disk = open();
    await expect(disk.open.bdev.operate!('stream', {})).rejects.toMatchObject({ code: 'has-snapshots' });
    disk.close();
    qemu.run('snapshot', '-d', 'then', 'top');
    const again = open();
    await again.open.bdev.operate!('stream', { bytesPerSecond: 1 });
    await expect(again.open.bdev.operate!('createSnapshot', { snapshot: 'now' })).rejects.toThrow(/stream/);
    again.close();
  });

  it('does not keep a disk from being closed', async () => {
    makeChain('cluster_size=64k');
    const disk = open();
    // Slow enough never to end.
    await disk.open.bdev.operate!('stream', { bytesPerSecond: 1 });
    disk.rig.until(() => jobOf(disk).doneBytes > 0, 'the first step');
    expect(disk.run(0, 0, 4096)).toBe(IoStatus.success);
    disk.close();
    expect(qemu.check('top').status).toBe(0);
    expect(qemu.info('top')).toHaveProperty('backing-filename', 'middle');
  });
});
