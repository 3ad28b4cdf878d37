/**
 * Goal: a qcow2 disk is changed while it is in use - snapshots, its size - and no request notices more than a pause; what a snapshot
 * holds is what was written before it, and the image is whole.
 *
 * Method: a disk under random writes on a real reactor; QEMU judges the image and reads the snapshots.
 */
import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { loadBitmap } from '../../../src/bdev/qcow2/edit/bitmaps.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
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
  const params = operation.endsWith('Bitmap') ? { bitmap: snapshot } : { snapshot };
  const promise = disk.open.bdev.operate!(operation, params).then(
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

  it('are complete, or not there, when the disk is closed meanwhile', () => {
    for (const steps of [0, 1, 2, 5, 10, 20]) {
      open('cluster_size=64k');
      write(50);
      void disk.open.bdev.operate!('createSnapshot', { snapshot: 'last' });
      for (let i = 0; i < steps; i++) disk.rig.step();
      disk.close();
      expectSnapshot('last', model);
      expectImage();
    }
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

describe('Dirty bitmaps of a disk in use', () => {
  const load = (image: string, name: string): Buffer => {
    const file = new NodeFile(qemu.path(image), { mode: 'read' });
    try {
      return runTask(loadBitmap(file, name)).bytes;
    } finally {
      file.close();
    }
  };

  it('record what QEMU records, and are whole when the disk is closed', async () => {
    open('cluster_size=64k');
    disk.close();
    qemu.run('bitmap', '--add', '-g', '32768', 'image', 'coarse');
    qemu.run('bitmap', '--add', '-g', '4096', 'image', 'fine');
    qemu.run('bitmap', '--add', '--disable', 'image', 'off');
    copyFileSync(qemu.path('image'), qemu.path('twin'));
    reopen();
    const commands: string[] = [];
    for (let i = 0; i < 30; i++) {
      const offset = random.below(DISK_BYTES / 512 - 64) * 512;
      const length = (1 + random.below(64)) * 512;
      const kind = i % 3;
      if (kind === 0) disk.write(offset, Buffer.alloc(length, 7));
      else disk.run(kind === 1 ? IoType.writeZeroes : IoType.write, offset, length);
      commands.push(kind === 1 ? `write -z ${offset} ${length}` : `write -P 7 ${offset} ${length}`);
      disk.forget();
      // An edit in between changes nothing about it.
      if (i === 10) await operate('createSnapshot', 'between');
    }
    const listed = (await operate('bitmaps')) as Record<string, unknown>[];
    expect(listed.map(({ name, isRecording }) => [name, isRecording])).toEqual([
      ['coarse', true],
      ['fine', true],
      ['off', false],
    ]);
    // While they are in use the image says so.
    expect(JSON.stringify(qemuBitmaps(readFileSync(qemu.path('image'))))).toContain('in-use');
    disk.close();
    qemu.io('twin', ...commands);
    expect(qemu.check('image').status).toBe(0);
    for (const name of ['coarse', 'fine', 'off']) {
      expectBytes(load('image', name), load('twin', name), `the bitmap ${name}`);
    }
    expect(load('image', 'fine').some((byte) => byte !== 0)).toBe(true);
    expect(JSON.stringify(qemuBitmaps(readFileSync(qemu.path('image'))))).not.toContain('in-use');

    reopen();
    await operate('removeBitmap', 'coarse');
    await operate('clearBitmap', 'fine');
    await operate('addBitmap', 'new');
    disk.write(0, Buffer.alloc(4096, 9));
    disk.close();
    const fine = Buffer.alloc(load('image', 'fine').length);
    fine[0] = 1;
    expectBytes(load('image', 'fine'), fine, 'the bitmap fine');
    expect(load('image', 'new')[0]).toBe(1);
    expect(() => load('image', 'coarse')).toThrow(/coarse/);
    expect(qemu.check('image').status).toBe(0);
  });

  /** What QEMU says of the bitmaps of an image, which may be in use. */
  function qemuBitmaps(bytes: Buffer): unknown {
    writeFileSync(qemu.path('copy'), bytes);
    return (qemu.info('copy')['format-specific'] as { data: { bitmaps: unknown } }).data.bitmaps;
  }
});

describe('A disk that is emptied', () => {
  it('gives its storage back, and leaves nothing of it in the image', () => {
    open('cluster_size=64k');
    const before = statSync(qemu.path('image')).blocks;
    for (let at = 0; at < DISK_BYTES; at += 2 ** 20) disk.write(at, Buffer.alloc(2 ** 20, 0x5a));
    disk.run(IoType.flush);
    disk.forget();
    expect(statSync(qemu.path('image')).blocks * 512).toBeGreaterThan(DISK_BYTES);
    disk.run(IoType.discard, 0, DISK_BYTES);
    disk.run(IoType.flush);
    disk.close();
    // Tables are left.
    expect((statSync(qemu.path('image')).blocks - before) * 512).toBeLessThan(512 * 1024);
    model = Buffer.alloc(DISK_BYTES);
    expectImage();
    expect(readFileSync(qemu.path('image')).includes(Buffer.alloc(4096, 0x5a))).toBe(false);
  });
});
