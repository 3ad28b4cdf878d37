/**
 * Goal: the lesser options of convert do what those of qemu-img do: bitmaps, a rate, cache modes, faults that are passed over. Method: the same
 * by both, compared.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { afterAll, describe, expect, it } from 'vitest';
import { QemuImg } from '../support/qemu-img.js';
import { STRATA } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

const MIB = 2 ** 20;

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

function done(...args: readonly string[]): void {
  const { status, stderr } = img(...args);
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
}

function refused(...args: readonly string[]): string {
  const { status, stderr } = img(...args);
  expect(status).toBe(1);
  return stderr;
}

function expectSame(...args: readonly string[]): void {
  expect(qemu.run('compare', ...args)).toContain('identical');
}

qemu.run('create', '-q', '-f', 'qcow2', 'base.qcow2', '16M');
qemu.io('base.qcow2', 'write -P 1 0 4M', 'write -P 9 12M 1M');

describe('strata img convert', () => {
  writeFileSync(qemu.path('rate.raw'), randomFillSync(Buffer.alloc(4 * MIB)));

  it('copies bitmaps, and refuses or leaves out those left in use', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'marked.qcow2', '8M');
    qemu.run('bitmap', '--add', '-g', '64k', 'marked.qcow2', 'daily');
    qemu.io('marked.qcow2', 'write -P 1 1M 128k', 'write -P 2 7M 1M');
    qemu.run('bitmap', '--add', '--disable', '-g', '32k', 'marked.qcow2', 'weekly');
    for (const args of [[], ['-c'], ['-o', 'cluster_size=4k']]) {
      done('convert', '--bitmaps', ...args, '-O', 'qcow2', 'marked.qcow2', 'ours');
      qemu.run('convert', '--bitmaps', ...args, '-O', 'qcow2', 'marked.qcow2', 'theirs');
      const bitmaps = (name: string): unknown =>
        (qemu.info(name)['format-specific'] as { data: { bitmaps: unknown } }).data.bitmaps;
      expect(bitmaps('ours')).toEqual(bitmaps('theirs'));
      expect(qemu.check('ours').status).toBe(0);
    }
    expect(refused('convert', '--bitmaps', '-O', 'raw', 'marked.qcow2', 'none')).toContain('no bitmaps');
    expect(refused('convert', '--skip-broken-bitmaps', 'marked.qcow2', 'none')).toContain('requires --bitmaps');
    expect(existsSync(qemu.path('none'))).toBe(false);
  });

  it('keeps to a rate', () => {
    const begin = performance.now();
    done('convert', '-r', '4M', '-f', 'raw', '-O', 'raw', 'rate.raw', 'ours');
    expect(performance.now() - begin).toBeGreaterThan(700);
    expectSame('-f', 'raw', '-F', 'raw', 'rate.raw', 'ours');
  });

  it('takes -T, -C and what qemu-img refuses together with it', () => {
    done('convert', '-T', 'none', '-C', '-O', 'raw', 'base.qcow2', 'ours');
    expectSame('-F', 'raw', 'base.qcow2', 'ours');
    for (const args of [
      ['-C', '-S', '4k'],
      ['-C', '-c', '-O', 'qcow2'],
    ]) {
      const theirs = qemu
        .try('convert', ...args, 'base.qcow2', 'none')
        .stderr.trim()
        .replace('qemu-img: ', '');
      expect(refused('convert', ...args, 'base.qcow2', 'none')).toContain(theirs);
    }
  });

  it('goes on over what cannot be read with --salvage, and says what; compare ends with the code of qemu-img', () => {
    writeFileSync(
      qemu.path('faulty.yaml'),
      `controllers: [{ name: vm1, bdev: bad, socket: vm1.sock }]
bdevs:
  - { name: file, module: uring, path: rate.raw, direct: false }
  - { name: bad, module: error, base: file, rules: [{ type: read, action: fail, from_offset: 1049088, to_offset: 1050112 }] }
`,
    );
    const config = ['--config', 'faulty.yaml'] as const;
    expect(refused('convert', ...config, '-O', 'raw', 'bdev:bad', 'none')).toContain('read at');
    expect(img('compare', ...config, 'bdev:bad', 'rate.raw').status).toBe(4);
    writeFileSync(qemu.path('faults'), '[inject-error]\nevent = "read_aio"\nerrno = "5"\n');
    qemu.run('convert', '-f', 'raw', '-O', 'qcow2', 'rate.raw', 'rate.qcow2');
    const bad =
      'driver=qcow2,file.driver=blkdebug,file.config=faults,file.image.driver=file,file.image.filename=rate.qcow2';
    expect(qemu.try('compare', '--image-opts', bad, 'driver=raw,file.filename=rate.raw').status).toBe(4);
    const { status, stderr } = img('convert', ...config, '--salvage', '-O', 'raw', 'bdev:bad', 'ours');
    expect(status).toBe(0);
    expect(stderr.match(/error while reading offset \d+/g)).toEqual([
      'error while reading offset 1049088',
      'error while reading offset 1049600',
    ]);
    const wanted = readFileSync(qemu.path('rate.raw')).fill(0, 1049088, 1050112);
    expect(readFileSync(qemu.path('ours')).equals(wanted)).toBe(true);
  });
});
