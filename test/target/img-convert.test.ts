/**
 * Goal: what `strata img convert` writes front to back is the disk it was made from, in an image that has nothing wrong, packed as
 * qemu-img packs it. Method: a disk with text, noise, zeroes and an end within a cluster is converted with every kind of option, beside
 * qemu-img; then what is refused, and an end by a signal.
 */
import { existsSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { afterAll, describe, expect, it } from 'vitest';
import { QemuImg } from '../support/qemu-img.js';
import { Program, STRATA, until } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

const MIB = 2 ** 20;
const SIZE = 12 * MIB + 3 * 512;

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

/** Converts, and expects the same disk in a sound image. */
function convert(source: string, ...args: readonly string[]) {
  expect(img('convert', '-O', 'qcow2', ...args, source, 'made')).toMatchObject({ status: 0, stdout: '', stderr: '' });
  qemu.run('compare', source, 'made');
  const check = qemu.check('made');
  expect(check).toMatchObject({ status: 0, words: '' });
  return check;
}

const disk = Buffer.alloc(SIZE);
for (let at = 0; at < 2 * MIB; at += 16) disk.write(`line ${String(at).padStart(10)}\n`, at);
randomFillSync(disk, 3 * MIB, MIB);
// By turns what gets smaller and what does not, in units of 64k and of 4k.
for (let at = 5 * MIB; at < 6 * MIB; at += 131072) randomFillSync(disk, at, 65536).fill('ab', at + 65536, at + 131072);
for (let at = 7 * MIB; at < 7.5 * MIB; at += 8192) randomFillSync(disk, at, 4096).fill('cd', at + 4096, at + 8192);
disk.fill(7, SIZE - 5000);
writeFileSync(qemu.path('disk.raw'), disk);
qemu.run('convert', '-O', 'qcow2', 'disk.raw', 'disk.qcow2');

describe('strata img convert -c', () => {
  it.each([
    'cluster_size=4k',
    'cluster_size=64k',
    'cluster_size=2M',
    'compat=0.10',
    'cluster_size=4k,compression_type=zstd',
    'compression_type=zstd',
    'cluster_size=2M,compression_type=zstd',
    'extended_l2=on,compression_type=zstd',
  ])('packs as qemu-img does: %s', (options) => {
    const ours = convert('disk.raw', '-c', '-o', options);
    qemu.run('convert', '-c', '-O', 'qcow2', '-o', options, 'disk.raw', 'theirs');
    const theirs = qemu.check('theirs');
    expect(ours['compressed-clusters']).toBe(theirs['compressed-clusters']);
    expect(ours['allocated-clusters']).toBe(theirs['allocated-clusters']);
    expect(statSync(qemu.path('made')).size).toBeLessThan(statSync(qemu.path('theirs')).size + 3 * MIB);
    expect(img('check', 'made').status).toBe(0);
    expect(qemu.info('made')).toMatchObject({ 'virtual-size': SIZE });
  });

  it.each([1, 8, 64])('counts what shares a cluster of the file, as far as %i bits reach', (bits) => {
    expect(convert('disk.raw', '-c', '-o', `cluster_size=64k,refcount_bits=${bits}`)['leaks']).toBeUndefined();
  });

  it('makes the same image in every run, and with -W one of the same clusters', () => {
    const first = convert('disk.qcow2', '-c', '-m', '3');
    const size = statSync(qemu.path('made')).size;
    expect(convert('disk.qcow2', '-c', '-m', '1')).toEqual(first);
    expect(statSync(qemu.path('made')).size).toBe(size);
    const other = convert('disk.qcow2', '-c', '-W', '-m', '16', '-t', 'writeback', '-o', 'cluster_size=4k');
    expect(other['compressed-clusters']).toBeGreaterThan(0);
  });

  it('stores zeroes, too, with -S 0', () => {
    const check = convert('disk.raw', '-c', '-S', '0');
    expect(check['allocated-clusters']).toBe(Math.ceil(SIZE / 65536));
  });

  it.each(['compat=1.1', 'compat=0.10', 'cluster_size=4k', 'cluster_size=128k,extended_l2=on'])(
    'compresses what differs from a backing file, and hides it with zeroes: %s',
    (options) => {
      qemu.run('create', '-q', '-f', 'qcow2', '-b', 'disk.qcow2', '-F', 'qcow2', 'top.qcow2');
      qemu.io('top.qcow2', 'write -P 3 1M 100k', 'write -z 3M 256k', 'write -P 0 5M 64k', 'write -P 9 8M 64k');
      for (const compress of [['-c'], []]) {
        const check = convert('top.qcow2', ...compress, '-o', options, '-B', 'disk.qcow2', '-F', 'qcow2');
        expect(qemu.info('made')).toMatchObject({ 'backing-filename': 'disk.qcow2' });
        expect(check['allocated-clusters']).toBeLessThan(SIZE / 4096 / 4);
      }
    },
  );

  it('refuses what cannot be compressed, and leaves the output alone', () => {
    writeFileSync(qemu.path('kept'), 'here');
    const refused = [
      ['-O', 'raw'],
      ['-O', 'qcow2', '-n'],
      ['-O', 'qcow2', '-o', 'preallocation=metadata'],
      ['-O', 'qcow2', '-o', 'data_file=other'],
      ['-O', 'qcow2', '-o', 'cluster_size=4M'],
    ];
    for (const args of refused) {
      expect(img('convert', '-c', ...args, 'disk.raw', 'kept')).toMatchObject({ status: 1 });
    }
    expect(statSync(qemu.path('kept')).size).toBe(4);
  });
});

describe('strata img convert', () => {
  it.each([
    ['-o', 'cluster_size=512'],
    ['-o', 'refcount_bits=1'],
    ['-o', 'extended_l2=on', '-m', '16'],
    ['-S', '1M', '-W'],
    ['-S', '0'],
  ])('writes a new image in order: %s %s', (...args) => {
    const check = convert('disk.raw', ...args);
    expect(check['compressed-clusters'] ?? 0).toBe(0);
  });

  it('makes an image of a disk without bytes', () => {
    writeFileSync(qemu.path('empty.raw'), '');
    for (const args of [[], ['-c']]) convert('empty.raw', ...args);
  });

  it('removes what it has begun when a signal ends it', async () => {
    writeFileSync(qemu.path('vast.raw'), '');
    truncateSync(qemu.path('vast.raw'), 2 ** 40);
    const args = ['img', 'convert', '-c', '-S', '0', '-O', 'qcow2', 'vast.raw', 'begun'];
    const program = new Program(STRATA, args, qemu.folder);
    await until('the output', () => (existsSync(qemu.path('begun')) ? true : undefined));
    expect(await program.stop('SIGINT')).toMatchObject({ exitCode: null, signal: 'SIGINT' });
    expect(existsSync(qemu.path('begun'))).toBe(false);
  });
});
