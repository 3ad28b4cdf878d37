/**
 * Goal: a qcow2 disk is changed while it is in use - snapshots, its size - and no request notices more than a pause; what a snapshot
 * holds is what was written before it, and the image is whole.
 *
 * Method: a disk under random writes on a real reactor; QEMU judges the image and reads the snapshots.
 */
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import type { Request } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';

const DISK_BYTES = 4 * 2 ** 20;
const BLOCK = 4096;
const STEPS_MAX = 100_000;
const KERNEL_WAIT_US = 2_000;

let qemu: QemuImg;
let disk: Disk;
let model: Buffer;
const random = seededRandom(41);

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

function open(options: string): void {
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, 'image', String(DISK_BYTES));
  reopen();
  model = Buffer.alloc(DISK_BYTES);
}

function reopen(): void {
  const file = { ...uringDefaults, name: 'file', path: qemu.path('image') };
  disk = new Disk(new Rig('live'), [file, qcow2On()('disk', 'file')]);
}

/** Writes to some blocks, each of them once. */
function startWrites(count: number): Request[] {
  const blocks = new Set(Array.from({ length: count }, () => random.below(model.length / BLOCK)));
  return [...blocks].map((block) => {
    const data = Buffer.alloc(BLOCK, 1 + random.below(255));
    data.copy(model, block * BLOCK);
    return disk.startWrite(block * BLOCK, data);
  });
}

function write(count: number): void {
  const requests = startWrites(count);
  disk.finish(...requests);
  for (const { status } of requests) expect(status).toBe(IoStatus.success);
  disk.forget();
}

/** Drives the reactor until the operation is over. */
async function operate(operation: string, snapshot = ''): Promise<unknown> {
  let outcome: { readonly value?: unknown; readonly error?: unknown } | null = null;
  const promise = disk.open.bdev.operate!(operation, { snapshot }).then(
    (value: unknown) => (outcome = { value }),
    (error: unknown) => (outcome = { error }),
  );
  for (let steps = 0; outcome === null; steps++) {
    if (steps === STEPS_MAX) throw new Error(`${operation} does not end`);
    if (!disk.rig.step() && disk.rig.ring.inflight > 0) disk.rig.ring.wait(KERNEL_WAIT_US);
    if (steps % 4 === 0) await new Promise(setImmediate);
  }
  await promise;
  const { value, error } = outcome as { readonly value?: unknown; readonly error?: unknown };
  if (error !== undefined) throw error as Error;
  return value;
}

function expectImage(): void {
  expect(qemu.check('image').status).toBe(0);
  qemu.run('convert', '-f', 'qcow2', '-O', 'raw', 'image', 'now.raw');
  expectBytes(readFileSync(qemu.path('now.raw')), model, 'the disk');
}

function expectSnapshot(name: string, expected: Buffer): void {
  qemu.run('convert', '-f', 'qcow2', '-O', 'raw', '-l', `snapshot.name=${name}`, 'image', 'then.raw');
  expectBytes(readFileSync(qemu.path('then.raw')), expected, `the snapshot ${name}`);
}

describe('Snapshots of a disk in use', () => {
  it.each(['cluster_size=64k', 'cluster_size=4k', 'extended_l2=on', 'compat=0.10', 'cluster_size=512,refcount_bits=2'])(
    'hold what was written before them: %s',
    async (options) => {
      open(options);
      write(100);
      const kept = new Map<string, Buffer>();
      for (const name of ['first', 'second']) {
        // Some are under way as it is taken: they are in it, or not, and answered either way.
        const underWay = startWrites(20);
        disk.finish(...underWay);
        kept.set(name, Buffer.from(model));
        await operate('createSnapshot', name);
        write(60);
      }
      const names = (await operate('snapshots')) as { readonly name: string }[];
      expect(names.map(({ name }) => name)).toEqual(['first', 'second']);
      disk.close();
      expectImage();
      for (const [name, expected] of kept) expectSnapshot(name, expected);

      reopen();
      await operate('deleteSnapshot', 'first');
      write(60);
      await operate('applySnapshot', 'second');
      kept.get('second')!.copy(model);
      expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
      disk.forget();
      write(60);
      disk.close();
      expectImage();
      expectSnapshot('second', kept.get('second')!);
    },
  );

  it('are taken under load without an error to anybody', async () => {
    open('cluster_size=64k');
    write(50);
    const taken = operate('createSnapshot', 'busy');
    const requests: Request[] = [];
    for (let i = 0; i < 20; i++) {
      requests.push(...startWrites(5));
      await new Promise(setImmediate);
    }
    await taken;
    disk.finish(...requests);
    for (const { status } of requests) expect(status).toBe(IoStatus.success);
    disk.forget();
    disk.close();
    // Writes to one block at the same time may end in any order: the image is whole, which is what counts here.
    expect(qemu.check('image').status).toBe(0);
  });

  it('that are not there are refused by name', async () => {
    open('cluster_size=64k');
    await expect(operate('deleteSnapshot', 'none')).rejects.toThrow(BdevError);
    await expect(operate('applySnapshot', 'none')).rejects.toThrow(/none/);
    write(10);
    disk.close();
    expectImage();
  });
});

describe('A disk in use', () => {
  it.each(['cluster_size=64k', 'extended_l2=on', 'cluster_size=512'])('grows: %s', (options) => {
    open(options);
    write(50);
    const size = disk.open.bdev.size;
    size.resize(DISK_BYTES * 3);
    model = Buffer.concat([model, Buffer.alloc(DISK_BYTES * 2)]);
    write(100);
    expect(disk.run(IoType.read, DISK_BYTES * 3 - BLOCK, BLOCK)).toBe(IoStatus.success);
    disk.forget();
    expect(() => size.resize(DISK_BYTES)).toThrow(/shrink/);
    disk.close();
    expectImage();
  });
});
