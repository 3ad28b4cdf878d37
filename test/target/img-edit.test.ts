/**
 * Goal: the commands of `strata img` that change an image do what qemu-img's do: the same disk, a sound image, the same exit codes.
 * Method: each is run by the compiled program on an image by qemu-img, which says what came of it.
 */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';
import { QemuImg } from '../support/qemu-img.js';
import { STRATA } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

function good(...args: readonly string[]): string {
  const { status, stdout, stderr } = img(...args);
  expect(stderr, args.join(' ')).toBe('');
  expect(status, args.join(' ')).toBe(0);
  return stdout;
}

function same(first: string, second: string): void {
  qemu.run('compare', first, second);
}

function sound(name: string): void {
  expect(qemu.check(name), name).toMatchObject({ status: 0, 'check-errors': 0 });
}

const MIB = 2 ** 20;

/** base <- middle <- top, each with something of its own and something over what is behind it. */
function makeChain(): void {
  qemu.run('create', '-q', '-f', 'qcow2', 'base', '16M');
  qemu.io('base', 'write -P 1 0 4M', 'write -P 1 12M 4M');
  qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'middle');
  qemu.io('middle', 'write -P 2 1M 100k', 'write -z 2M 64k', 'write -c -P 2 5M 1M');
  qemu.run('create', '-q', '-f', 'qcow2', '-b', 'middle', '-F', 'qcow2', 'top', '20M');
  qemu.io('top', 'write -P 3 1M 20k', 'write -P 3 8M 1M', 'write -z 12M 1M', 'write -P 3 19M 512');
  qemu.run('convert', '-O', 'raw', 'top', 'model');
}

describe('strata img snapshot', () => {
  it('takes, lists, brings back and deletes', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'disk', '16M');
    qemu.io('disk', 'write -P 1 0 2M');
    qemu.run('convert', '-O', 'raw', 'disk', 'before');
    good('snapshot', '-c', 'one', 'disk');
    sound('disk');
    expect(good('snapshot', '-l', 'disk')).toBe(qemu.run('snapshot', '-l', 'disk'));
    expect(good('snapshot', 'disk')).toContain('one');
    expect(JSON.parse(good('snapshot', '--output', 'json', 'disk'))).toEqual(qemu.info('disk')['snapshots']);
    qemu.io('disk', 'write -P 2 1M 4M');
    good('snapshot', '-a', 'one', 'disk');
    same('disk', 'before');
    good('snapshot', '-d', '1', 'disk');
    expect(qemu.info('disk')).not.toHaveProperty('snapshots');
    sound('disk');
    expect(img('snapshot', '-d', 'none', 'disk').status).toBe(1);
    expect(img('snapshot', '-d', 'one', '-c', 'two', 'disk').status).toBe(1);
    qemu.run('create', '-q', '-f', 'raw', 'flat', '1M');
    expect(img('snapshot', '-c', 'one', 'flat').status).toBe(1);
  });
});

describe('strata img resize', () => {
  it('gives raw and qcow2 disks another size', () => {
    for (const [format, name] of [
      ['qcow2', 'disk'],
      ['raw', 'flat'],
    ] as const) {
      qemu.run('create', '-q', '-f', format, name, '8M');
      const size = () => qemu.info(name)['virtual-size'];
      expect(good('resize', '-f', format, name, '10M')).toBe('Image resized.\n');
      expect(size()).toBe(10 * MIB);
      good('resize', '-q', '-f', format, name, '+6M');
      expect(size()).toBe(16 * MIB);
      expect(img('resize', '-f', format, name, '4M')).toMatchObject({ status: 1 });
      expect(size()).toBe(16 * MIB);
      good('resize', '-f', format, '--shrink', name, '-12M');
      expect(size()).toBe(4 * MIB);
    }
    sound('disk');
  });

  it('preallocates what is new, and hides what a longer backing file has there', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'disk', '1M');
    good('resize', '--preallocation', 'metadata', 'disk', '9M');
    expect(qemu.check('disk')).toMatchObject({ status: 0, 'allocated-clusters': 128 });
    makeChain();
    qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'short', '13M');
    qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'theirs', '13M');
    good('resize', 'short', '16M');
    qemu.run('resize', 'theirs', '16M');
    same('short', 'theirs');
    sound('short');
  });
});

describe('strata img bitmap', () => {
  it('carries out its actions in order', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'disk', '16M');
    const bitmaps = () => (qemu.info('disk')['format-specific'] as { data: { bitmaps?: object[] } }).data.bitmaps ?? [];
    good('bitmap', '--add', '-g', '128k', 'disk', 'one');
    good('bitmap', '--add', '--disable', 'disk', 'two');
    expect(bitmaps()).toEqual([
      { flags: ['auto'], name: 'one', granularity: 131072 },
      { flags: [], name: 'two', granularity: 65536 },
    ]);
    qemu.io('disk', 'write 1M 1M');
    good('bitmap', '--enable', '--merge', 'one', 'disk', 'two');
    good('bitmap', '--clear', '--disable', 'disk', 'one');
    expect(bitmaps()).toMatchObject([{ flags: [] }, { flags: ['auto'] }]);
    sound('disk');
    qemu.run('create', '-q', '-f', 'qcow2', 'other', '16M');
    qemu.run('bitmap', '--add', 'other', 'three');
    good('bitmap', '--merge', 'three', '-b', 'other', '-F', 'qcow2', 'disk', 'two');
    good('bitmap', '--remove', 'disk', 'one');
    good('bitmap', '--remove', 'disk', 'two');
    expect(bitmaps()).toEqual([]);
    sound('disk');
    expect(img('bitmap', 'disk', 'one').status).toBe(1);
    expect(img('bitmap', '--remove', 'disk', 'one').status).toBe(1);
  });
});

describe('strata img rebase', () => {
  it.each([
    ['onto the one behind it', 'base', 'qcow2'],
    ['onto nothing', '', ''],
    ['onto another one', 'other', 'raw'],
  ])('keeps the disk: %s', (_, name, format) => {
    makeChain();
    writeFileSync(qemu.path('other'), Buffer.alloc(20 * MIB, 9));
    good('rebase', '-b', name, ...(format === '' ? [] : ['-F', format]), 'top');
    expect(qemu.info('top')['backing-filename']).toBe(name === '' ? undefined : name);
    same('top', 'model');
    sound('top');
  });

  it('changes only the name with -u, and needs a format', () => {
    makeChain();
    good('rebase', '-u', '-b', 'nowhere', '-F', 'raw', 'top');
    expect(qemu.info('top')).toMatchObject({ 'backing-filename': 'nowhere', 'backing-filename-format': 'raw' });
    expect(img('rebase', '-u', '-b', 'base', 'top').status).toBe(1);
    makeChain();
    expect(img('rebase', '-b', 'top', '-F', 'qcow2', 'middle')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('is behind') as string,
    });
    same('top', 'model');
  });
});

describe('strata img commit', () => {
  it('moves the contents to the backing file and empties the image', () => {
    makeChain();
    expect(good('commit', 'top')).toBe('Image committed.\n');
    for (const name of ['top', 'middle']) {
      same(name, 'model');
      sound(name);
    }
    expect(qemu.check('top')).not.toHaveProperty('allocated-clusters');
  });

  it('leaves the image with -d, and commits further down with -b', () => {
    makeChain();
    const before = readFileSync(qemu.path('top'));
    good('commit', '-d', 'top');
    expect(readFileSync(qemu.path('top')).equals(before)).toBe(true);
    same('middle', 'model');
    makeChain();
    good('commit', '-q', '-b', 'base', 'top');
    same('base', 'model');
    sound('base');
    expect(img('commit', '-b', 'model', 'top').status).toBe(1);
  });

  it('does not empty an image that has snapshots', () => {
    makeChain();
    qemu.run('snapshot', '-c', 'one', 'top');
    copyFileSync(qemu.path('middle'), qemu.path('kept'));
    expect(img('commit', 'top').status).toBe(1);
    same('middle', 'kept');
    good('commit', '-d', 'top');
    same('middle', 'model');
  });
});

describe('an image whose daemon was killed', () => {
  it('is not written to before the daemon had it again, or its last writes are given up', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'disk', '1M');
    const bytes = readFileSync(qemu.path('disk'));
    // The number of a session.
    bytes.writeUInt32BE(77, 88);
    writeFileSync(qemu.path('disk'), bytes);
    for (const args of [
      ['check', '-r', 'all', 'disk'],
      ['snapshot', '-c', 'one', 'disk'],
      ['resize', 'disk', '2M'],
    ]) {
      expect(img(...args), args[0]).toMatchObject({
        status: 1,
        stderr: expect.stringContaining('--discard-session') as string,
      });
    }
    expect(readFileSync(qemu.path('disk')).equals(bytes)).toBe(true);
    expect(img('info', 'disk')).toMatchObject({ status: 0, stderr: expect.stringContaining('warning') as string });
    good('check', '-r', 'all', '--discard-session', 'disk');
    expect(readFileSync(qemu.path('disk')).readUInt32BE(88)).toBe(0);
  });
});
