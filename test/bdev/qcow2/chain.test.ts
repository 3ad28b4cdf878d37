/**
 * Goal: a backing chain of any sensible depth reads as QEMU reads it, by as many requests as a short one; and a name in an image leads
 * nowhere that the operator has not allowed.
 *
 * Method: chains made by qemu-img; names put into headers by `rebase -u`, as an attacker would.
 */
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import type { BdevConfig } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { qcow2On, uringDefaults } from '../stacks.js';

const DEPTH = 64;
const CLUSTER = 65536;
const DISK_BYTES = 80 * CLUSTER;

let qemu: QemuImg;

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

function stackOf(name: string, imageDir: string | null = qemu.folder): BdevConfig[] {
  return [
    { ...uringDefaults, name: 'file', path: qemu.path(name) },
    qcow2On({ imageDir })('disk', 'file'),
  ] as BdevConfig[];
}

/** What opening says; null when it opens. */
function problemOf(name: string, imageDir: string | null = qemu.folder): BdevError | null {
  const rig = new Rig('chain');
  try {
    const open = rig.open(stackOf(name, imageDir));
    open.close();
    return null;
  } catch (error) {
    if (error instanceof BdevError) return error;
    throw error;
  } finally {
    rig.close();
  }
}

function create(name: string, backing: string | null, format = 'qcow2'): void {
  qemu.run('create', '-q', '-f', 'qcow2', name, String(DISK_BYTES));
  if (backing !== null) {
    qemu.run('rebase', '-u', '-f', 'qcow2', '-b', backing, '-F', format, name);
  }
}

describe(`A chain of ${DEPTH} images`, () => {
  it('reads as QEMU reads it, and what was found once is found at once', () => {
    for (let i = 0; i < DEPTH; i++) {
      create(`image${i}`, i === 0 ? null : `image${i - 1}`);
      qemu.io(
        `image${i}`,
        `write -P ${i + 1} ${i * CLUSTER} ${CLUSTER}`,
        `write -P ${i + 100} ${(i % 16) * 4096 + 70 * CLUSTER} 4096`,
      );
    }
    const top = `image${DEPTH - 1}`;
    qemu.run('convert', '-f', 'qcow2', '-O', 'raw', top, 'all.raw');
    const expected = readFileSync(qemu.path('all.raw'));
    const disk = new Disk(new Rig('chain'), stackOf(top));
    expectBytes(disk.read(0, DISK_BYTES), expected, 'the disk');
    disk.forget();
    disk.write(CLUSTER + 512, Buffer.alloc(512, 0xee));
    expected.fill(0xee, CLUSTER + 512, CLUSTER + 1024);
    expectBytes(disk.read(0, 4 * CLUSTER), expected.subarray(0, 4 * CLUSTER), 'after a write');
    disk.forget();
    // Each by one request, however deep it lies: nothing of the chain is looked up on the disk again.
    const { ring } = disk.rig;
    let submitted = 0;
    const read = ring.read.bind(ring);
    ring.read = (...args) => {
      submitted++;
      return read(...args);
    };
    for (let i = 2; i < DEPTH; i++) expect(disk.run(IoType.read, i * CLUSTER, 4096)).toBe(IoStatus.success);
    expect(submitted).toBe(DEPTH - 2);
    disk.close();
    expect(qemu.check(top).status).toBe(0);
  });
});

describe('A name in an image', () => {
  it('is not followed when no folder is allowed', () => {
    create('base', null);
    create('top', 'base');
    expect(problemOf('top')).toBeNull();
    expect(problemOf('top', null)).toMatchObject({ code: 'not-allowed', field: 'image_dir' });
  });

  it('leads nowhere outside of the folder', () => {
    mkdirSync(qemu.path('inside'));
    create('secret', null);
    symlinkSync('../secret', qemu.path('inside/link'));
    for (const [i, name] of ['../secret', qemu.path('secret'), 'link', '/etc/passwd', '/proc/self/mem'].entries()) {
      create(`inside/top${i}`, name);
      expect(problemOf(`inside/top${i}`, qemu.path('inside')), name).toMatchObject({ code: 'backing-file' });
    }
  });

  it('is a path, and its format is given', () => {
    create('base', null);
    for (const [i, name] of ['nbd://host/disk', 'json:{"driver":"null-co"}', 'file:base'].entries()) {
      create(`top${i}`, name);
      expect(problemOf(`top${i}`), name).toMatchObject({ code: 'unsupported-image', field: 'header.backing_file' });
    }
    create('guess', 'base');
    const bytes = readFileSync(qemu.path('guess'));
    // The extension with the format becomes one that nobody knows.
    bytes.writeUInt32BE(0x12345678, bytes.indexOf(Buffer.from('e2792aca', 'hex')));
    writeFileSync(qemu.path('guess'), bytes);
    expect(problemOf('guess')).toMatchObject({ code: 'unsupported-image', field: 'header.backing_format' });
    create('other', 'base', 'vmdk');
    expect(problemOf('other')).toMatchObject({ code: 'unsupported-image', field: 'header.backing_format' });
  });

  it('does not lead in a circle, nor to what is no image', () => {
    create('a', 'b');
    create('b', 'a');
    create('self', 'self');
    expect(problemOf('a')).toMatchObject({ code: 'bad-image', field: 'header.backing_file' });
    expect(problemOf('self')).toMatchObject({ code: 'bad-image', field: 'header.backing_file' });
    writeFileSync(qemu.path('text'), Buffer.alloc(4096, 'text'));
    create('top', 'text');
    expect(problemOf('top')).toMatchObject({ code: 'bad-image', field: 'header.magic' });
    create('gone', 'nothing');
    expect(problemOf('gone')).toMatchObject({ code: 'backing-file' });
  });
});
