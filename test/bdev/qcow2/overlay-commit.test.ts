/**
 * Goal: an overlay is committed to its base while its guest writes: both together are the disk throughout, what nobody writes to any
 * more is in the base alone, and whoever relies on the base keeps it from being changed.
 *
 * Method: overlays over bases made by QEMU, committed under random requests that a model follows; QEMU judges both files, and its own
 * commit of a copy is what a commit without load has to come to.
 */
import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { BdevConfig } from '../../../src/bdev/bdev.js';
import { IoFlag, IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { ErrorBdev } from '../../../src/bdev/error/error.js';
import type { Qcow2Config } from '../../../src/bdev/qcow2/qcow2.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import type { Request } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { error, qcow2On, uringDefaults } from '../stacks.js';

const DISK_BYTES = 12 * 2 ** 20;
const UNIT = 65536;
const random = seededRandom(44);

let qemu: QemuImg;

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

const file = (name: string, path = name): BdevConfig & { path: string } => ({
  ...uringDefaults,
  name,
  path: qemu.path(path),
});

function open(options: Partial<Qcow2Config> = {}, ...more: readonly BdevConfig[]): Disk {
  const overlay = qcow2On({ imageDir: qemu.folder, ...options })('disk', 'top');
  return new Disk(new Rig('commit'), [...more, file('top'), overlay]);
}

interface JobFacts {
  readonly state: string;
  readonly doneBytes: number;
  readonly error?: string;
}

function jobOf(disk: Disk): JobFacts {
  return disk.open.bdev.describe()['job'] as JobFacts;
}

/** Runs the job to its end. */
function ended(disk: Disk): JobFacts {
  disk.rig.until(() => jobOf(disk).state !== 'running', 'the end of the commit');
  return jobOf(disk);
}

async function commit(disk: Disk, bytesPerSecond = 0): Promise<JobFacts> {
  await disk.open.bdev.operate!('commit', { bytesPerSecond });
  return ended(disk);
}

interface Base {
  /** `-o` of qemu-img create; null: a raw file. */
  readonly options: string | null;
  readonly sizeBytes: number;
}

const BASE: Base = { options: 'cluster_size=64k', sizeBytes: DISK_BYTES };

/** A base with data, holes and zeroes, and an overlay with each kind of cluster. Returns what the overlay reads as. */
function makeOverlay(options: string, { options: baseOptions, sizeBytes }: Base = BASE): Buffer {
  const below = Buffer.alloc(sizeBytes);
  for (let at = 0; at + 4096 <= sizeBytes; at += 4096)
    if ((at >> 16) % 3 !== 1) below.fill((at >> 12) % 251, at, at + 4096);
  writeFileSync(qemu.path('base'), below);
  if (baseOptions !== null) {
    qemu.run('convert', '-f', 'raw', '-O', 'qcow2', '-c', 'base', 'lowest');
    const behind = baseOptions.includes('encrypt') ? [] : ['-b', 'lowest', '-F', 'qcow2'];
    qemu.run('create', '-q', '-f', 'qcow2', '-o', baseOptions, ...behind, 'base', String(sizeBytes));
    qemu.io('base', 'write -P 2 512k 200k', 'write -P 3 3M 64k');
    qemu.run('snapshot', '-c', 'kept', 'base');
  }
  const format = baseOptions === null ? 'raw' : 'qcow2';
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, '-b', 'base', '-F', format, 'top', String(DISK_BYTES));
  const isV2 = options.includes('0.10');
  qemu.io(
    'top',
    'write -P 4 1500k 100k',
    'write -P 5 2M 1M',
    'write -P 6 4200k 4k',
    ...(isV2 ? [] : ['write -z 5M 256k', 'write -z -u 5400k 192k', 'discard 6M 128k']),
    'write -P 7 7M 1k',
    'write -P 8 11900k 300k',
  );
  const clusterBytes = options.includes('2M') ? '2M' : '64k';
  if (!options.includes('data_file')) qemu.io('top', `write -c -P 9 8M ${clusterBytes}`);
  return contentOf('top');
}

function contentOf(name: string, ...options: readonly string[]): Buffer {
  qemu.run('convert', '-f', 'qcow2', ...options, '-O', 'raw', name, 'read.raw');
  return readFileSync(qemu.path('read.raw'));
}

/** Some requests at once, none over another, and a read. */
function use(disk: Disk, model: Buffer): void {
  const part = Math.floor(DISK_BYTES / 4 / UNIT) * UNIT;
  const requests: Request[] = [];
  for (let i = 0; i < 4; i++) {
    const lengthBytes = (1 + random.below(200)) * 512;
    const offset = i * part + random.below((part - lengthBytes) / 512) * 512;
    if (random.below(4) > 0) {
      const data = Buffer.alloc(lengthBytes, 1 + random.below(255));
      requests.push(disk.startWrite(offset, data));
      data.copy(model, offset);
    } else {
      requests.push(disk.start(IoType.writeZeroes, offset, lengthBytes, random.below(2) === 0 ? IoFlag.unmap : 0));
      model.fill(0, offset, offset + lengthBytes);
    }
  }
  if (random.below(5) === 0) requests.push(disk.start(IoType.flush, 0, 0));
  disk.finish(...requests);
  for (const { status } of requests) expect(status).toBe(IoStatus.success);
  const at = random.below(DISK_BYTES / 512 - 80) * 512;
  expectBytes(disk.read(at, 40960), model.subarray(at, at + 40960), `read at ${at}`);
  disk.forget();
}

function expectWhole(model: Buffer, base: Base = BASE): void {
  expect(qemu.check('top').status).toBe(0);
  if (base.options !== null) expect(qemu.check('base').status).toBe(0);
  expectBytes(contentOf('top'), model, 'what QEMU reads');
  writeFileSync(qemu.path('model'), model);
  expect(qemu.try('compare', '-f', 'qcow2', '-F', 'raw', 'top', 'model').status).toBe(0);
}

/** Bytes of the disk that the overlay itself has. */
function heldBytes(): number {
  const parts = JSON.parse(qemu.run('map', '--output', 'json', '-f', 'qcow2', 'top')) as {
    readonly depth: number;
    readonly length: number;
  }[];
  return parts.filter(({ depth }) => depth === 0).reduce((sum, { length }) => sum + length, 0);
}

const PAIRS: readonly (readonly [string, Base])[] = [
  ['cluster_size=64k', BASE],
  ['cluster_size=4k', { options: 'cluster_size=64k', sizeBytes: 10 * 2 ** 20 + 3 * 512 }],
  ['extended_l2=on', { options: 'extended_l2=on,cluster_size=128k', sizeBytes: 16 * 2 ** 20 }],
  ['compat=0.10', { options: 'cluster_size=4k', sizeBytes: 10 * 2 ** 20 }],
  ['cluster_size=2M', { options: null, sizeBytes: DISK_BYTES }],
  ['cluster_size=64k', { options: null, sizeBytes: 3 * 2 ** 20 + 512 }],
  ['data_file=top.data,cluster_size=64k', BASE],
];

describe('A commit', () => {
  it.each(PAIRS)('keeps the disk as its guest wrote it, and both images whole: %s on %j', async (options, base) => {
    const model = makeOverlay(options, base);
    const kept = base.options === null ? null : contentOf('base', '-l', 'snapshot.name=kept');
    const disk = open();
    for (let i = 0; i < 5; i++) use(disk, model);
    await disk.open.bdev.operate!('commit', {});
    await expect(disk.open.bdev.operate!('commit', {})).rejects.toThrow(/job/);
    for (let steps = 0; jobOf(disk).state === 'running'; steps++) {
      if (steps < 150) use(disk, model);
      else ended(disk);
    }
    expect(jobOf(disk)).toMatchObject({ state: 'done', doneBytes: DISK_BYTES });
    for (let i = 0; i < 10; i++) use(disk, model);
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.forget();
    // And once more, with nobody writing.
    expect((await commit(disk)).state).toBe('done');
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk after the second commit');
    disk.close();
    expectWhole(model, base);
    expect(heldBytes()).toBe(0);
    if (kept === null) return;
    // QEMU shows a snapshot at the size of the disk.
    const now = contentOf('base', '-l', 'snapshot.name=kept').subarray(0, kept.length);
    expectBytes(now, kept, 'the snapshot of the base');
  });

  it.each(['cluster_size=64k', 'extended_l2=on'])("comes to what QEMU's comes to: %s", async (options) => {
    const model = makeOverlay(options, { ...BASE, sizeBytes: 9 * 2 ** 20 });
    for (const name of ['base', 'top']) copyFileSync(qemu.path(name), qemu.path(`${name}-of-qemu`));
    qemu.run('rebase', '-u', '-b', 'base-of-qemu', '-F', 'qcow2', 'top-of-qemu');
    qemu.run('commit', '-q', 'top-of-qemu');
    const disk = open();
    expect((await commit(disk)).state).toBe('done');
    disk.close();
    expectWhole(model);
    expect(qemu.try('compare', '-f', 'qcow2', '-F', 'qcow2', 'base', 'base-of-qemu').status).toBe(0);
    expect(qemu.try('compare', '-f', 'qcow2', '-F', 'qcow2', 'top', 'top-of-qemu').status).toBe(0);
    expect(statSync(qemu.path('top')).blocks).toBeLessThan(2 * statSync(qemu.path('top-of-qemu')).blocks + 64);
  });

  it('that is cancelled leaves the disk as it was, and goes on when it is started again', async () => {
    const model = makeOverlay('cluster_size=64k');
    const disk = open();
    await disk.open.bdev.operate!('commit', { bytesPerSecond: 2 ** 20 });
    disk.rig.until(() => jobOf(disk).doneBytes > 2 ** 20, 'the first part');
    await disk.open.bdev.operate!('cancelJob', {});
    expect(ended(disk).state).toBe('cancelled');
    for (let i = 0; i < 10; i++) use(disk, model);
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.forget();
    expect((await commit(disk)).state).toBe('done');
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.close();
    expectWhole(model);
    expect(heldBytes()).toBe(0);
  });

  it('does not keep a disk from being closed', async () => {
    const model = makeOverlay('cluster_size=64k');
    const disk = open();
    await disk.open.bdev.operate!('commit', { bytesPerSecond: 1 });
    disk.rig.until(() => jobOf(disk).doneBytes > 0, 'the first part');
    disk.close();
    expectWhole(model);
    expect(heldBytes()).toBeGreaterThan(0);
  });

  it('leaves the bitmaps of the overlay as they are, and records in those of the base', async () => {
    makeOverlay('cluster_size=64k');
    for (const name of ['base', 'top']) qemu.run('bitmap', '--add', '-g', '65536', name, 'changes');
    qemu.io('top', 'write -P 1 9M 64k');
    const model = contentOf('top');
    const disk = open();
    const dirty = async (): Promise<unknown> => await disk.open.bdev.operate!('bitmaps', {});
    const before = await dirty();
    expect(before).toMatchObject([{ name: 'changes', isRecording: true, dirtyBytes: UNIT }]);
    expect((await commit(disk)).state).toBe('done');
    expect(await dirty()).toEqual(before);
    disk.close();
    expectWhole(model);
    const serveBase = new Disk(new Rig('base'), [file('base'), qcow2On({ imageDir: qemu.folder })('disk', 'base')]);
    const [bitmap] = (await serveBase.open.bdev.operate!('bitmaps', {})) as { dirtyBytes: number }[];
    expect(bitmap!.dirtyBytes).toBeGreaterThan(2 ** 20);
    serveBase.close();
  });

  it('goes to a bdev that the config names', async () => {
    const model = makeOverlay('cluster_size=64k');
    const below = [file('base-file', 'base'), qcow2On({ imageDir: qemu.folder })('below', 'base-file')] as const;
    const disk = open({ backing: 'below' }, ...below);
    expect((await commit(disk)).state).toBe('done');
    for (let i = 0; i < 5; i++) use(disk, model);
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.forget();
    expect((await commit(disk)).state).toBe('done');
    disk.close();
    expectWhole(model);
    expect(heldBytes()).toBe(0);
  });
});

describe('A commit is refused', () => {
  const refused = async (disk: Disk, code: string, words: RegExp): Promise<void> => {
    const problem = disk.open.bdev.operate!('commit', {});
    await expect(problem).rejects.toMatchObject({ code });
    await expect(problem).rejects.toThrow(words);
  };

  it('where nothing lies below', async () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'top', '1M');
    const disk = open();
    await refused(disk, 'no-backing', /nothing below/);
    disk.close();
  });

  it('when the overlay has snapshots, which show the base, too; and none is taken meanwhile', async () => {
    makeOverlay('cluster_size=64k');
    const model = contentOf('top');
    qemu.run('snapshot', '-c', 'then', 'top');
    let disk = open();
    await refused(disk, 'has-snapshots', /then/);
    disk.close();
    qemu.run('snapshot', '-d', 'then', 'top');
    disk = open();
    await disk.open.bdev.operate!('commit', { bytesPerSecond: 1 });
    for (const operation of ['createSnapshot', 'applySnapshot']) {
      await expect(disk.open.bdev.operate!(operation, { snapshot: 'now' })).rejects.toMatchObject({ code: 'busy' });
    }
    disk.close();
    expectWhole(model);
  });

  it('while another disk stands on the base', async () => {
    const model = makeOverlay('cluster_size=64k');
    qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'sibling', String(DISK_BYTES));
    const before = readFileSync(qemu.path('base'));
    const sibling = qcow2On({ imageDir: qemu.folder })('other', 'sibling');
    const disk = open({}, file('sibling'), sibling);
    const job = await commit(disk);
    expect(job.state).toBe('failed');
    expect(job.error).toMatch(/base is in use/);
    use(disk, model);
    disk.rig.registry.destroy('other');
    expectBytes(readFileSync(qemu.path('base')), before, 'the base');
    // Whoever was in the way is gone.
    expect((await commit(disk)).state).toBe('done');
    use(disk, model);
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.close();
    expectWhole(model);
  });

  it('when the base is damaged or not whole, encrypted, or named by two disks', async () => {
    makeOverlay('cluster_size=64k');
    const intact = readFileSync(qemu.path('base'));
    for (const [bit, words] of [
      [1, /dirty/],
      [2, /corrupt/],
    ] as const) {
      const marked = Buffer.from(intact);
      marked[79]! |= bit;
      writeFileSync(qemu.path('base'), marked);
      const disk = open();
      await disk.open.bdev.operate!('commit', {});
      expect(ended(disk)).toMatchObject({ state: 'failed', error: expect.stringMatching(words) as string });
      disk.close();
      expectBytes(readFileSync(qemu.path('base')), marked, 'the base');
    }
    writeFileSync(qemu.path('base'), intact);
    qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'sibling', String(DISK_BYTES));
    const both = [
      file('base-file', 'base'),
      qcow2On({ imageDir: qemu.folder })('below', 'base-file'),
      file('sibling'),
      qcow2On({ backing: 'below' })('other', 'sibling'),
    ] as const;
    const disk = open({ backing: 'below' }, ...both);
    await refused(disk, 'claimed', /other/);
    disk.close();
    const small = [file('base-file', 'base'), qcow2On({ imageDir: qemu.folder })('below', 'base-file')] as const;
    qemu.run('resize', '-q', '-f', 'qcow2', 'top', '13M');
    const larger = open({ backing: 'below' }, ...small);
    await refused(larger, 'too-small', /smaller/);
    larger.close();
  });
});

describe('A commit that fails', () => {
  it.each(['write', 'flush'] as const)('in a %s of the base loses nothing, and works when that does', async (type) => {
    const base = { options: null, sizeBytes: DISK_BYTES };
    const model = makeOverlay('cluster_size=64k', base);
    const disk = open({ backing: 'failing' }, file('base'), error()('failing', 'base'));
    const failing = disk.rig.registry.get('failing') as ErrorBdev;
    failing.setRules([{ type, action: 'fail', first: 2, count: 1 }]);
    const job = await commit(disk);
    expect(job.state).toBe('failed');
    expect(job.error).toContain(type);
    for (let i = 0; i < 5; i++) use(disk, model);
    failing.setRules([]);
    expect((await commit(disk)).state).toBe('done');
    expectBytes(disk.read(0, DISK_BYTES), model, 'the disk');
    disk.close();
    expectWhole(model, base);
    expect(heldBytes()).toBe(0);
  });
});
