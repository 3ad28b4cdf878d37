/**
 * Goal: amend changes images as qemu-img does, refuses what it refuses, and leaves images without a leak. Method: the same change to the
 * same image by both, then the disk, the header and the check of both are compared; passphrases that were added open the image.
 */
import { copyFileSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';
import { QemuImg } from '../support/qemu-img.js';
import { STRATA } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

function specific(name: string): unknown {
  const { 'virtual-size': size, 'format-specific': format } = qemu.info(name);
  return { size, format };
}

/** The same change by both. */
function amendBoth(name: string, options: string): void {
  for (const copy of ['ours.qcow2', 'theirs.qcow2']) copyFileSync(qemu.path(name), qemu.path(copy));
  expect(img('amend', '-o', options, 'ours.qcow2')).toMatchObject({ status: 0, stdout: '', stderr: '' });
  qemu.run('amend', '-f', 'qcow2', '-o', options, 'theirs.qcow2');
  expect(specific('ours.qcow2')).toEqual(specific('theirs.qcow2'));
  expect(qemu.check('ours.qcow2')).toMatchObject({ status: 0, words: '' });
  expect(qemu.run('compare', 'ours.qcow2', 'theirs.qcow2')).toContain('identical');
}

qemu.run('create', '-q', '-f', 'qcow2', 'base.qcow2', '8M');
qemu.io('base.qcow2', 'write -P 7 0 8M');
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', 'plain.qcow2', '8M');
qemu.io('plain.qcow2', 'write -P 1 0 2M', 'write -z 1M 128k', 'write -c -P 2 4M 64k', 'write -z 6M 64k');
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', 'old.qcow2', '8M');
qemu.io('old.qcow2', 'write -P 1 0 2M');
qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'top.qcow2');
qemu.io('top.qcow2', 'write -P 1 1M 1M', 'write -z 1M 128k', 'write -z 6M 64k');
for (const name of ['plain.qcow2', 'old.qcow2']) {
  copyFileSync(qemu.path(name), qemu.path(`kept-${name}`));
  qemu.io(`kept-${name}`, 'discard 0 8M', 'write -P 3 0 1M');
  qemu.run('snapshot', '-c', 'one', `kept-${name}`);
  qemu.io(`kept-${name}`, 'write -P 4 0 512k');
}
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'data_file=data.raw,data_file_raw=on', 'external.qcow2', '4M');

describe('strata img amend', () => {
  it.each([
    ['plain.qcow2', 'compat=0.10'],
    ['top.qcow2', 'compat=v2'],
    ['old.qcow2', 'compat=1.1'],
    ['kept-old.qcow2', 'compat=v3'],
    ['old.qcow2', 'compat=1.1,lazy_refcounts=on,refcount_bits=64'],
    ['plain.qcow2', 'lazy_refcounts=on'],
    ['top.qcow2', 'refcount_bits=1'],
    ['plain.qcow2', 'refcount_bits=32'],
    ['kept-old.qcow2', 'compat=1.1,refcount_bits=2'],
    ['top.qcow2', 'size=16M'],
    ['plain.qcow2', 'size=3M'],
    ['top.qcow2', 'backing_file=base.qcow2,backing_fmt=qcow2'],
  ])('changes %s as qemu-img does: %s', amendBoth);

  it('lets go of a raw data file, and names another', () => {
    for (const copy of ['ours.qcow2', 'theirs.qcow2']) copyFileSync(qemu.path('external.qcow2'), qemu.path(copy));
    copyFileSync(qemu.path('data.raw'), qemu.path('moved.raw'));
    const options = 'data_file=moved.raw,data_file_raw=off';
    expect(img('amend', '-o', options, 'ours.qcow2').status).toBe(0);
    qemu.run('amend', '-o', options, 'theirs.qcow2');
    expect(specific('ours.qcow2')).toEqual(specific('theirs.qcow2'));
  });

  it('gives up bitmaps with version 2, without a leak', () => {
    copyFileSync(qemu.path('plain.qcow2'), qemu.path('ours.qcow2'));
    qemu.run('bitmap', '--add', 'ours.qcow2', 'daily');
    qemu.io('ours.qcow2', 'write -P 1 0 64k');
    expect(img('amend', '-p', '-o', 'compat=0.10', 'ours.qcow2').stderr).toContain('(100.00/100%)');
    expect(qemu.check('ours.qcow2')).toMatchObject({ status: 0, words: '' });
  });

  it.each([
    ['plain.qcow2', 'cluster_size=64k', "Invalid parameter 'cluster_size'"],
    ['plain.qcow2', 'compat=2', 'Unknown compatibility level 2'],
    ['plain.qcow2', 'compat=0.10,lazy_refcounts=on', 'Lazy refcounts only supported'],
    ['plain.qcow2', 'compat=0.10,refcount_bits=8', 'Refcount widths other than 16 bits require'],
    ['kept-plain.qcow2', 'refcount_bits=1', 'Cannot decrease refcount entry width to this value'],
    ['plain.qcow2', 'refcount_bits=3', 'power of two'],
    ['plain.qcow2', 'data_file=x', 'data-file can only be set for images that use an external data file'],
    ['plain.qcow2', 'data_file_raw=on', 'data-file-raw cannot be set on existing images'],
    ['plain.qcow2', 'backing_file=base.qcow2', 'Cannot amend the backing file'],
    ['plain.qcow2', 'encrypt.state=active', "Can't amend encryption options - encryption not present"],
    ['external.qcow2', 'compat=0.10', 'Cannot downgrade an image with'],
  ])('refuses for %s what qemu-img refuses: %s', (name, options, words) => {
    copyFileSync(qemu.path(name), qemu.path('ours.qcow2'));
    const before = specific('ours.qcow2');
    const ours = img('amend', '-o', options, 'ours.qcow2');
    const theirs = qemu.try('amend', '-o', options, 'ours.qcow2');
    expect(ours).toMatchObject({ status: theirs.status, stderr: expect.stringContaining(words) as string });
    expect(specific('ours.qcow2')).toEqual(before);
    expect(qemu.check('ours.qcow2').status).toBe(0);
  });

  it('needs options, and an image that has some', () => {
    expect(img('amend', 'plain.qcow2')).toMatchObject({ status: 1 });
    expect(img('amend', '-f', 'raw', '-o', 'size=1M', 'plain.qcow2')).toMatchObject({ status: 1 });
    expect(img('amend', '-o', 'help')).toMatchObject({
      status: 0,
      stdout: expect.stringContaining('compat=') as string,
    });
  });

  it('adds passphrases and erases them, but for the last', () => {
    for (const [name, text] of Object.entries({ first: 'sesame', second: 'barley' })) {
      writeFileSync(qemu.path(name), text, { mode: 0o600 });
    }
    const secrets = ['--object', 'secret,id=a,file=first', '--object', 'secret,id=b,file=second'] as const;
    const create = 'encrypt.format=luks,encrypt.key-secret=a,encrypt.iter-time=10';
    expect(img('create', '-q', ...secrets, '-f', 'qcow2', '-o', create, 'locked.qcow2', '1M').status).toBe(0);
    const locked = (id: string): string => `driver=qcow2,encrypt.key-secret=${id},file.filename=locked.qcow2`;
    const amend = (id: string, options: string) => img('amend', ...secrets, '--image-opts', '-o', options, locked(id));
    const opens = (id: string): boolean => qemu.try('map', ...secrets, '--image-opts', locked(id)).status === 0;
    expect(amend('a', 'encrypt.state=active').stderr).toContain("'new-secret' is required");
    expect(amend('a', 'encrypt.state=inactive,encrypt.old-secret=a').stderr).toContain('last passphrase');
    expect(amend('a', 'encrypt.state=active,encrypt.new-secret=b,encrypt.iter-time=10').status).toBe(0);
    expect([opens('a'), opens('b')]).toEqual([true, true]);
    expect(amend('b', 'encrypt.state=inactive,encrypt.old-secret=a').status).toBe(0);
    expect([opens('a'), opens('b')]).toEqual([false, true]);
    expect(amend('b', 'encrypt.state=inactive,encrypt.keyslot=1').stderr).toContain('last passphrase');
    expect(amend('b', 'encrypt.state=inactive,encrypt.keyslot=0').stderr).toContain('already erased');
  });
});
