/**
 * Goal: a snapshot of an image is a disk of its own that is only read: of an image in a file, and of one that is served and changes
 * meanwhile, which keeps the snapshot.
 *
 * Method: images with snapshots made by QEMU, or by us under load, whose contents QEMU tells (`qemu-img convert -l`).
 */
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { BdevConfig, BdevError } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { Qcow2Config } from '../../../src/bdev/qcow2/qcow2.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';
import { randomWrites } from './qemu-images.js';

const DISK_BYTES = 4 * 2 ** 20;
const STEPS_MAX = 100_000;
const KERNEL_WAIT_US = 2_000;
const random = seededRandom(45);

let qemu: QemuImg;

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

const file = (): BdevConfig & { path: string } => ({ ...uringDefaults, name: 'file', path: qemu.path('image') });

function snapshotOf(snapshot: string, options: Partial<Qcow2Config> = {}, base = 'file'): Qcow2Config {
  return qcow2On({ imageDir: qemu.folder, snapshot, ...options })('then', base) as Qcow2Config;
}

/** What QEMU reads of a snapshot, which it shows at the size of the disk. */
function contentOf(snapshot: string, lengthBytes = DISK_BYTES): Buffer {
  qemu.run('convert', '-f', 'qcow2', '-l', `snapshot.name=${snapshot}`, '-O', 'raw', 'image', 'then.raw');
  return readFileSync(qemu.path('then.raw')).subarray(0, lengthBytes);
}

/** An image with two snapshots, of different sizes where the format keeps those, on a backing file. */
function makeImage(options: string): number {
  qemu.run('create', '-q', '-f', 'qcow2', 'below', String(DISK_BYTES));
  qemu.io('below', 'write -P 17 0 2M', 'write -P 18 3M 100k');
  const overlay = ['-b', 'below', '-F', 'qcow2', 'image', String(DISK_BYTES)];
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, ...overlay);
  // A compressed write to what is allocated is refused, which is fine.
  const write = (): unknown => qemu.tryIo('image', ...randomWrites(random, DISK_BYTES, 12, options));
  write();
  qemu.run('snapshot', '-c', 'before', 'image');
  write();
  const isV2 = options.includes('0.10');
  const sizeBytes = DISK_BYTES + (isV2 ? 0 : 65536);
  if (!isV2) qemu.run('resize', '-q', '-f', 'qcow2', 'image', String(sizeBytes));
  qemu.run('snapshot', '-c', 'after', 'image');
  write();
  return sizeBytes;
}

/** The error of whoever cannot create a bdev. */
function refusal(create: () => unknown): BdevError {
  try {
    create();
  } catch (error) {
    return error as BdevError;
  }
  throw new Error('it was created');
}

describe('A snapshot of an image in a file', () => {
  it.each(['cluster_size=65536', 'cluster_size=512', 'cluster_size=16384,extended_l2=on', 'compat=0.10'])(
    'reads as QEMU reads it, at the size it had: %s',
    (options) => {
      const laterBytes = makeImage(options);
      for (const [wanted, name, sizeBytes] of [
        ['before', 'before', DISK_BYTES],
        ['2', 'after', laterBytes],
      ] as const) {
        const expected = contentOf(name, sizeBytes);
        const disk = new Disk(new Rig('snapshot'), [file(), snapshotOf(wanted)]);
        expect(disk.sizeBytes).toBe(sizeBytes);
        expect(disk.open.bdev.readOnly).toBe(true);
        expect(disk.open.bdev.describe()).toMatchObject({ base: 'file', snapshot: { name } });
        expectBytes(disk.read(0, sizeBytes), expected, name);
        expect(disk.run(IoType.flush)).toBe(IoStatus.success);
        expect(disk.run(IoType.writeZeroes, 0, 4096)).not.toBe(IoStatus.success);
        disk.close();
      }
    },
  );

  it('that is not there is refused with those that are, and nothing stays open', () => {
    makeImage('cluster_size=65536');
    const rig = new Rig('snapshot');
    rig.registry.create(file());
    const error = refusal(() => rig.registry.create(snapshotOf('beforehand')));
    expect(error).toMatchObject({ code: 'no-such-snapshot' });
    expect(error.hint).toMatch(/1 \(before\), 2 \(after\)/);
    rig.close();
  });

  it('keeps others from writing to the image, and is refused when somebody does', () => {
    makeImage('cluster_size=65536');
    const rig = new Rig('snapshot');
    const whole = qcow2On({ imageDir: qemu.folder })('disk', 'file');
    rig.registry.create(file());
    rig.registry.create(snapshotOf('before'));
    expect(refusal(() => rig.registry.create(whole))).toMatchObject({ code: 'claimed' });
    rig.registry.destroy('then');
    rig.registry.create(whole);
    expect(refusal(() => rig.registry.create(snapshotOf('before')))).toMatchObject({ code: 'claimed' });
    rig.close();
  });

  it('lies beneath what stands on it', () => {
    makeImage('cluster_size=65536');
    qemu.run('create', '-q', '-f', 'qcow2', 'top', String(DISK_BYTES));
    const top = { ...uringDefaults, name: 'top-file', path: qemu.path('top') };
    const overlay = qcow2On({ backing: 'then' })('disk', 'top-file');
    const model = Buffer.from(contentOf('before'));
    const disk = new Disk(new Rig('snapshot'), [file(), snapshotOf('before'), top, overlay]);
    disk.write(512, Buffer.alloc(1024, 1));
    model.fill(1, 512, 1536);
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk on the snapshot');
    disk.close();
  });
});

describe('A snapshot of an image that is served', () => {
  it.each(['cluster_size=65536', 'cluster_size=4096', 'cluster_size=16384,extended_l2=on'])(
    'stays as it is while the disk changes, and is not deleted: %s',
    async (options) => {
      makeImage(options);
      const kept = Buffer.from(contentOf('before'));
      const disk = new Disk(new Rig('snapshot'), [file(), qcow2On({ imageDir: qemu.folder })('disk', 'file')]);
      const { registry } = disk.rig;
      registry.create(snapshotOf('before', {}, 'disk'));
      const then = registry.open('then', null, 'test');
      const read = (): Buffer => {
        const request = disk.prepare(IoType.read, 0, DISK_BYTES);
        request.io.push(request, 0);
        then.channel.submit(request.io);
        disk.finish(request);
        expect(request.status).toBe(IoStatus.success);
        return disk.gather(request);
      };
      expectBytes(read(), kept, 'the snapshot');
      disk.forget();
      for (let round = 0; round < 3; round++) {
        for (let i = 0; i < 20; i++) {
          disk.write(random.below(DISK_BYTES / 4096 - 8) * 4096, Buffer.alloc(8 * 4096, 1 + random.below(255)));
        }
        disk.run(IoType.discard, random.below(32) * 65536, 65536);
        disk.forget();
        await operate(disk, 'createSnapshot', `round ${round}`);
        if (round > 0) await operate(disk, 'deleteSnapshot', `round ${round - 1}`);
        expectBytes(read(), kept, `the snapshot after round ${round}`);
        disk.forget();
      }
      for (const name of ['before', '1']) {
        await expect(operate(disk, 'deleteSnapshot', name)).rejects.toMatchObject({ code: 'in-use' });
      }
      expect(refusal(() => registry.destroy('disk'))).toMatchObject({ code: 'in-use' });
      await operate(disk, 'applySnapshot', 'after');
      expectBytes(read(), kept, 'the snapshot when another one was applied');
      then.close();
      registry.destroy('then');
      await operate(disk, 'deleteSnapshot', 'before');
      disk.close();
      expect(qemu.check('image').status).toBe(0);
    },
  );
});

/** Drives the reactor until an operation on a snapshot is over. */
async function operate(disk: Disk, operation: string, snapshot: string): Promise<void> {
  let isOver = false;
  const end = (): void => void (isOver = true);
  const promise = disk.open.bdev.operate!(operation, { snapshot });
  promise.then(end, end);
  for (let steps = 0; !isOver; steps++) {
    if (steps === STEPS_MAX) throw new Error(`${operation} does not end`);
    if (!disk.rig.step() && disk.rig.ring.inflight > 0) disk.rig.ring.wait(KERNEL_WAIT_US);
    if (steps % 4 === 0) await new Promise(setImmediate);
  }
  await promise;
}
