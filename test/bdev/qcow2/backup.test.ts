/**
 * Goal: a backup holds the disk as it was at one moment, however busy the disk is meanwhile; an incremental one holds what was written
 * since, on top of the one before; and one that fails loses nothing of what the next one needs.
 *
 * Method: backups to a file while a guest writes, compared with a model of that moment.
 */
import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { BdevConfig } from '../../../src/bdev/bdev.js';
import type { ErrorBdev } from '../../../src/bdev/error/error.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { error, qcow2On, uringDefaults } from '../stacks.js';

const DISK_BYTES = 8 * 2 ** 20;
const random = seededRandom(43);

let qemu: QemuImg;
let disk: Disk;
let model: Buffer;

beforeEach(() => {
  qemu = new QemuImg();
  qemu.run('create', '-q', '-f', 'qcow2', 'image', String(DISK_BYTES));
  qemu.run('bitmap', '--add', '-g', '65536', 'image', 'changes');
  // What the target held before does not matter.
  writeFileSync(qemu.path('target'), Buffer.alloc(DISK_BYTES, 0xee));
  writeFileSync(qemu.path('small'), '');
  truncateSync(qemu.path('small'), DISK_BYTES / 2);
  model = Buffer.alloc(DISK_BYTES);
  const file = (name: string): BdevConfig & { path: string } => ({ ...uringDefaults, name, path: qemu.path(name) });
  disk = new Disk(new Rig('backup'), [
    file('target'),
    error()('failing', 'target'),
    file('small'),
    file('image'),
    qcow2On()('disk', 'image'),
  ]);
});

afterEach(() => {
  qemu.remove();
});

function write(count: number): void {
  for (let i = 0; i < count; i++) {
    const offset = random.below(DISK_BYTES / 512 - 40) * 512;
    const data = Buffer.alloc((1 + random.below(39)) * 512, 1 + random.below(255));
    disk.write(offset, data);
    data.copy(model, offset);
    disk.forget();
  }
}

interface JobFacts {
  readonly state: string;
  readonly error?: string;
}

const jobOf = (): JobFacts => disk.open.bdev.describe()['job'] as JobFacts;

/** Backs up while the guest goes on; returns how it ended, and the disk at the moment it was asked for. */
async function backUp(bitmap: string | null): Promise<{ readonly job: JobFacts; readonly moment: Buffer }> {
  const moment = Buffer.from(model);
  await disk.open.bdev.operate!('backup', { target: 'failing', ...(bitmap === null ? {} : { bitmap }) });
  while (jobOf().state === 'running') write(1);
  return { job: jobOf(), moment };
}

const target = (): Buffer => readFileSync(qemu.path('target'));
const inject = (...rules: Parameters<ErrorBdev['setRules']>[0]): void =>
  (disk.rig.registry.get('failing') as ErrorBdev).setRules(rules);

describe('A backup of a disk in use', () => {
  it('holds one moment; the next one adds what was written since', async () => {
    write(60);
    const full = await backUp(null);
    expect(full.job.state).toBe('done');
    expectBytes(target(), full.moment, 'the full backup');
    // All that was written since the bitmap was made: more than is needed.
    const first = await backUp('changes');
    expectBytes(target(), first.moment, 'the first incremental backup');
    write(10);
    const second = await backUp('changes');
    expect(second.job.state).toBe('done');
    expectBytes(target(), second.moment, 'the second incremental backup');
    disk.close();
    expect(qemu.check('image').status).toBe(0);
    expect(qemu.run('snapshot', '-l', 'image')).not.toContain('strata-backup');
  });

  it('that fails gives back what the bitmap had', async () => {
    write(40);
    await backUp(null);
    write(40);
    inject({ type: 'write', action: 'fail', first: 2, count: 1 });
    const failed = await backUp('changes');
    expect(failed.job).toMatchObject({ state: 'failed' });
    expect(failed.job.error).toMatch(/write/);
    inject();
    const again = await backUp('changes');
    expect(again.job.state).toBe('done');
    expectBytes(target(), again.moment, 'the backup after it');
    disk.close();
    expect(qemu.check('image').status).toBe(0);
  });

  it('is refused where it cannot be', async () => {
    const operate = (params: Record<string, unknown>): Promise<unknown> => disk.open.bdev.operate!('backup', params);
    await expect(operate({ target: 'small' })).rejects.toMatchObject({ code: 'too-small', field: 'target' });
    await expect(operate({ target: 'nothing' })).rejects.toMatchObject({ code: 'no-such-bdev', field: 'target' });
    await expect(operate({ target: 'image' })).rejects.toMatchObject({ code: 'claimed' });
    await expect(operate({ target: 'failing', bitmap: 'none' })).rejects.toMatchObject({ code: 'no-such-bitmap' });
    write(5);
    expect((await backUp(null)).job.state).toBe('done');
    disk.close();
  });
});
