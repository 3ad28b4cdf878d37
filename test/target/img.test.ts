/**
 * Goal: `strata img` speaks as qemu-img does: the same exit codes, the same JSON, the same words. Method: both are run on the same
 * images by the compiled program; then what is ours alone: what is refused, and what is not opened.
 */
import { existsSync, readFileSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';
import { NodeFile } from '../../src/target/img/node-file.js';
import { QemuImg } from '../support/qemu-img.js';
import { STRATA } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

interface Result {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

function img(...args: readonly string[]): Result {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

function json(...args: readonly string[]): unknown {
  const { status, stdout, stderr } = img(...args);
  expect(stderr).toBe('');
  expect(status).toBe(0);
  return JSON.parse(stdout) as unknown;
}

/** Changes 8 bytes of an image. */
function poke(name: string, at: number, value: bigint): void {
  const bytes = readFileSync(qemu.path(name));
  bytes.writeBigUInt64BE(value, at);
  writeFileSync(qemu.path(name), bytes);
}

qemu.run('create', '-q', '-f', 'qcow2', 'base.qcow2', '64M');
qemu.io('base.qcow2', 'write -P 1 0 3M', 'write -c -P 2 8M 1M', 'write -z 20M 1M');
qemu.run('bitmap', '--add', '--enable', '-g', '64k', 'base.qcow2', 'bitmap0');
qemu.run('snapshot', '-c', 'first', 'base.qcow2');
qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'top.qcow2');
qemu.io('top.qcow2', 'write -P 3 1M 100k', 'write -z 8M 64k');
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10,cluster_size=4k', 'old.qcow2', '8M');
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on,lazy_refcounts=on,refcount_bits=64', 'new.qcow2', '8M');
qemu.run('create', '-q', '-f', 'qcow2', '-o', 'data_file=data.raw,data_file_raw=on', 'external.qcow2', '8M');
qemu.run('create', '-q', '-f', 'raw', 'plain.raw', '1M');
qemu.run('create', '-q', '-f', 'qcow2', 'plain.qcow2', '64M');
qemu.io('plain.qcow2', 'write -P 4 1M 3M', 'write -P 5 9M 100k', 'write -z 30M 1M', 'write -P 6 63M 1M');
qemu.run('create', '-q', '-f', 'qcow2', '-b', 'plain.qcow2', '-F', 'qcow2', 'stack.qcow2');
qemu.io('stack.qcow2', 'write -P 3 1M 100k', 'write -z 2M 64k', 'write -P 7 63M 512');
qemu.run('convert', '-O', 'raw', 'plain.qcow2', 'holes.raw');
writeFileSync(qemu.path('odd.raw'), Buffer.alloc(700_001, 7));
qemu.io('external.qcow2', 'write -P 3 1M 100k');
const images = ['base.qcow2', 'top.qcow2', 'old.qcow2', 'new.qcow2', 'external.qcow2'];

describe('strata img info', () => {
  it.each([...images.map((name) => ['qcow2', name]), ['raw', 'plain.raw']])(
    'has the JSON of qemu-img: %s %s',
    (f, name) => {
      expect(json('info', '-f', f, '--output', 'json', name)).toEqual(qemu.info(name));
    },
  );

  it.each(images)('prints what qemu-img prints: %s', (name) => {
    expect(img('info', '-f', 'qcow2', name).stdout).toBe(qemu.run('info', '-f', 'qcow2', name));
  });

  it('shows the whole backing chain, and says when it guessed a format', () => {
    const theirs = JSON.parse(qemu.run('info', '--backing-chain', '--output', 'json', 'top.qcow2')) as object[];
    expect(json('info', '--backing-chain', '-f', 'qcow2', '-o', 'json', 'top.qcow2')).toEqual(theirs);
    expect(img('info', 'top.qcow2').stdout).toContain('file format: qcow2 (guessed from its first bytes)');
  });

  it('opens nothing that an image names, nor a chain that leads out of its folder', () => {
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', '/etc/passwd', '-F', 'raw', 'out.qcow2', '1M');
    expect(json('info', '-o', 'json', 'out.qcow2')).toMatchObject({ 'backing-filename': '/etc/passwd' });
    expect(img('info', '--backing-chain', 'out.qcow2')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('is not beneath') as string,
    });
    symlinkSync('/etc/passwd', qemu.path('link'));
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', 'link', '-F', 'raw', 'linked.qcow2', '1M');
    expect(img('info', '--backing-chain', 'linked.qcow2').stderr).toContain('is not beneath');
    expect(img('info', '--backing-chain', '--backing-folder', '/', 'linked.qcow2').status).toBe(0);
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', 'nbd://host/disk', '-F', 'raw', 'far.qcow2', '1M');
    expect(img('info', '--backing-chain', 'far.qcow2').stderr).toContain('is not the name of a local file');
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', 'tick.qcow2', '-F', 'qcow2', 'tack.qcow2', '1M');
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', 'tack.qcow2', '-F', 'qcow2', 'tick.qcow2', '1M');
    expect(img('info', '--backing-chain', 'tick.qcow2').stderr).toContain('leads back');
  });

  it('names the field of a header that cannot be right', () => {
    writeFileSync(qemu.path('bad.qcow2'), readFileSync(qemu.path('new.qcow2')));
    poke('bad.qcow2', 40, 1n);
    expect(img('info', 'bad.qcow2')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('header.l1_table_offset') as string,
    });
    expect(img('info', 'nowhere.qcow2')).toMatchObject({ status: 1 });
  });
});

describe('strata img check', () => {
  it.each(images)('has the JSON and the words of qemu-img: %s', (name) => {
    expect(json('check', '--output', 'json', name)).toEqual(JSON.parse(qemu.run('check', '--output', 'json', name)));
    expect(img('check', name).stdout).toBe(qemu.run('check', name));
  });

  it('exits as qemu-img does for leaks, corruption, repairs and formats without checks', () => {
    const header = readFileSync(qemu.path('top.qcow2'));
    const l1Offset = Number(header.readBigUInt64BE(40));
    const l2Offset = Number(header.readBigUInt64BE(l1Offset) & 0x00fffffffffffe00n);
    const cases: [string, bigint, number][] = [
      ['leak.qcow2', 0n, 3],
      ['corrupt.qcow2', 1n << 40n, 2],
    ];
    for (const [name, value, status] of cases) {
      writeFileSync(qemu.path(name), header);
      poke(name, l2Offset + 16 * 8, value);
      expect(qemu.try('check', name).status, name).toBe(status);
      const { stdout, ...ours } = img('check', '--output', 'json', name);
      expect(ours.status, name).toBe(status);
      expect(JSON.parse(stdout), name).toEqual(JSON.parse(qemu.try('check', '--output', 'json', name).stdout));
    }
    const repaired = img('check', '-r', 'leaks', 'leak.qcow2');
    expect(repaired).toMatchObject({ status: 0, stdout: expect.stringContaining('1 leaked clusters') as string });
    expect(qemu.try('check', 'leak.qcow2').status).toBe(0);
    expect(img('check', '-q', 'leak.qcow2')).toMatchObject({ status: 0, stdout: '', stderr: '' });
    expect(img('check', '-f', 'raw', 'plain.raw').status).toBe(qemu.try('check', '-f', 'raw', 'plain.raw').status);
    expect(img('check', 'nowhere.qcow2').status).toBe(qemu.try('check', 'nowhere.qcow2').status);
    expect(img('check', '-r', 'some', 'leak.qcow2').status).toBe(1);
    expect(img('check', '-p', 'leak.qcow2').stderr).toContain('(100.00/100%)');
  });
});

describe('strata img create', () => {
  it('makes an image with the words of qemu-img', () => {
    const options = [
      '-f',
      'qcow2',
      '-o',
      'cluster_size=128k,extended_l2=on,compression_type=zstd',
      'made.qcow2',
      '1.5G',
    ];
    const { status, stdout } = img('create', ...options);
    expect(status).toBe(0);
    const ours = qemu.info('made.qcow2');
    expect(qemu.run('create', ...options)).toBe(stdout);
    expect({ ...qemu.info('made.qcow2'), 'actual-size': 0 }).toEqual({ ...ours, 'actual-size': 0 });
  });

  it('takes the size of the backing file, which has to have a format', () => {
    expect(img('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'over.qcow2')).toMatchObject({
      status: 0,
      stdout: '',
    });
    expect(qemu.info('over.qcow2')).toMatchObject({ 'virtual-size': 64 * 2 ** 20 });
    expect(img('create', '-f', 'qcow2', '-b', 'base.qcow2', 'bare.qcow2').status).toBe(1);
    expect(img('create', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', './base.qcow2').stderr).toContain(
      'same file',
    );
    expect(qemu.check('base.qcow2').status).toBe(0);
    expect(existsSync(qemu.path('bare.qcow2'))).toBe(false);
    expect(img('create', '-q', '-f', 'qcow2', '-u', '-b', 'none', '-F', 'raw', 'unsafe.qcow2', '1M').status).toBe(0);
  });

  it('makes raw images and data files', () => {
    expect(img('create', 'new.raw', '5M').stdout).toBe("Formatting 'new.raw', fmt=raw size=5242880\n");
    expect(statSync(qemu.path('new.raw')).size).toBe(5 * 2 ** 20);
    expect(img('create', '-q', '-f', 'qcow2', '-o', 'data_file=d.raw', 'd.qcow2', '2M').status).toBe(0);
    qemu.io('d.qcow2', 'write -P 1 1M 64k');
    expect(qemu.check('d.qcow2').status).toBe(0);
    expect(statSync(qemu.path('d.raw')).size).toBe(2 * 2 ** 20);
  });

  it('encrypts, with a passphrase from a file, so that QEMU opens it', () => {
    writeFileSync(qemu.path('passphrase'), 'a secret');
    const options = 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,encrypt.cipher-alg=aes-128';
    const args = ['create', '-q', '-f', 'qcow2', '--object', 'secret,id=key,file=passphrase', '-o', options];
    expect(img(...args, 'locked.qcow2', '4M')).toMatchObject({ status: 0, stderr: '' });
    expect(json('info', '-f', 'qcow2', '--output', 'json', 'locked.qcow2')).toEqual(qemu.info('locked.qcow2'));
    expect(img('info', '-f', 'qcow2', 'locked.qcow2').stdout).toBe(qemu.run('info', 'locked.qcow2'));
    const image = 'driver=qcow2,file.filename=locked.qcow2,encrypt.key-secret=key';
    const write = ['--object', 'secret,id=key,file=passphrase', '--image-opts', image, '-c', 'write -P 3 1M 64k'];
    expect(spawnSync('qemu-io', [...write, '-c', 'read -P 3 1M 64k'], { cwd: qemu.folder }).status).toBe(0);
    expect(img('check', 'locked.qcow2').status).toBe(0);
    const visible = args.map((arg) => arg.replace('file=passphrase', 'data=secret'));
    expect(img(...visible, 'x.qcow2', '4M')).toMatchObject({ status: 1 });
    expect(existsSync(qemu.path('x.qcow2'))).toBe(false);
  });

  it('names the option that there is not', () => {
    expect(img('create', '-f', 'qcow2', '-o', 'cluster_size=100000', 'x.qcow2', '1M').stderr).toContain('cluster_size');
    expect(img('create', '-f', 'qcow2', '-o', 'colour=red', 'x.qcow2', '1M').stderr).toContain("'colour'");
    expect(img('create', '-f', 'vmdk', 'x.vmdk', '1M').stderr).toContain("'vmdk'");
    expect(img('create', '-f', 'qcow2', 'x.qcow2').stderr).toContain('size');
    expect(img('create', '-f', 'qcow2', 'x.qcow2', 'huge').stderr).toContain('huge');
    expect(img('create', '-f', 'qcow2', '-o', 'help').stdout).toContain('lazy_refcounts=<on/off>');
    expect(existsSync(qemu.path('x.qcow2'))).toBe(false);
  });

  it('leaves a file alone that another process writes to', () => {
    expect(img('create', '-q', '-f', 'qcow2', 'used.qcow2', '1M').status).toBe(0);
    const before = readFileSync(qemu.path('used.qcow2'));
    const file = new NodeFile(qemu.path('used.qcow2'), { mode: 'write' });
    for (const args of [
      ['create', '-f', 'qcow2', 'used.qcow2', '2M'],
      ['check', '-r', 'all', 'used.qcow2'],
      ['info', 'used.qcow2'],
    ]) {
      expect(img(...args)).toMatchObject({ status: 1, stderr: expect.stringContaining('in use') as string });
    }
    expect(img('info', '-U', 'used.qcow2').status).toBe(0);
    file.close();
    expect(readFileSync(qemu.path('used.qcow2')).equals(before)).toBe(true);
  });
});

describe('strata img measure', () => {
  it.each([
    ['--size', '1T'],
    ['--size', '10G', '-o', 'cluster_size=2M'],
    ['--size', '10G', '-o', 'extended_l2=on,refcount_bits=64'],
    ['--size', '10G', '-o', 'preallocation=full'],
    ['-o', 'cluster_size=512', 'old.qcow2'],
    ['base.qcow2'],
    ['top.qcow2'],
    ['-o', 'cluster_size=2M', 'top.qcow2'],
  ])('says what qemu-img says: %s %s %s', (...args) => {
    for (const output of ['human', 'json']) {
      const all = ['measure', '-O', 'qcow2', '--output', output, ...args.filter((arg) => arg !== undefined)];
      const theirs = qemu.run(...all);
      const ours = img(...all).stdout;
      if (output === 'json') expect(JSON.parse(ours)).toEqual(JSON.parse(theirs));
      else expect(ours).toBe(theirs);
    }
  });
});

describe('strata img map', () => {
  it.each(['base.qcow2', 'top.qcow2', 'old.qcow2', 'new.qcow2', 'holes.raw'])(
    'has the JSON of qemu-img: %s',
    (name) => {
      for (const range of [[], ['-s', '1M', '-l', '20M'], ['-s', '3000k', '-l', '1k']]) {
        const theirs = JSON.parse(qemu.run('map', '--output', 'json', ...range, name)) as unknown;
        expect(json('map', '--output', 'json', ...range, name), range.join(' ')).toEqual(theirs);
      }
    },
  );

  it('prints the table of qemu-img, and says when there is more than fits it', () => {
    expect(img('map', 'plain.qcow2').stdout).toBe(qemu.run('map', 'plain.qcow2'));
    expect(img('map', 'base.qcow2')).toMatchObject({
      status: qemu.try('map', 'base.qcow2').status,
      stderr: expect.stringContaining('compressed clusters') as string,
    });
  });
});

describe('strata img compare', () => {
  it('exits with 0 for the same disk, 1 for another one, 2 when it cannot tell', () => {
    qemu.run('convert', '-O', 'raw', 'plain.qcow2', 'copy.raw');
    qemu.run('convert', '-O', 'raw', 'plain.qcow2', 'other.raw');
    const other = readFileSync(qemu.path('other.raw'));
    other[5 * 2 ** 20 + 700] = 1;
    writeFileSync(qemu.path('other.raw'), other);
    writeFileSync(qemu.path('longer.raw'), Buffer.concat([readFileSync(qemu.path('copy.raw')), Buffer.alloc(3000)]));
    writeFileSync(qemu.path('marked.raw'), Buffer.concat([readFileSync(qemu.path('copy.raw')), Buffer.from('mark')]));
    const cases: string[][] = [
      ['plain.qcow2', 'copy.raw'],
      ['plain.qcow2', 'other.raw'],
      ['copy.raw', 'other.raw'],
      ['plain.qcow2', 'longer.raw'],
      ['longer.raw', 'plain.qcow2'],
      ['plain.qcow2', 'marked.raw'],
      ['-s', 'plain.qcow2', 'longer.raw'],
      ['-s', 'plain.qcow2', 'plain.qcow2'],
      ['-q', 'plain.qcow2', 'other.raw'],
      ['stack.qcow2', 'stack.qcow2'],
      ['top.qcow2', 'top.qcow2'],
      ['plain.qcow2', 'nowhere'],
    ];
    for (const args of cases) {
      const ours = img('compare', ...args);
      const theirs = qemu.try('compare', ...args);
      expect(ours.status, args.join(' ')).toBe(theirs.status);
      if (theirs.status !== 2) expect(ours.stdout, args.join(' ')).toBe(theirs.stdout);
    }
  });
});

describe('strata img convert', () => {
  const same = (first: string, second: string) => qemu.run('compare', first, second);

  it.each([
    ['raw', '', 'plain.qcow2'],
    ['raw', '', 'stack.qcow2'],
    ['raw', '', 'top.qcow2'],
    ['raw', '', 'odd.raw'],
    ['raw', '', 'external.qcow2'],
    ['qcow2', 'data_file=made.raw', 'plain.qcow2'],
    ['qcow2', '', 'plain.qcow2'],
    ['qcow2', '', 'holes.raw'],
    ['qcow2', '', 'odd.raw'],
    ['qcow2', 'compat=0.10', 'plain.qcow2'],
    ['qcow2', 'cluster_size=512', 'plain.qcow2'],
    ['qcow2', 'cluster_size=2M', 'plain.qcow2'],
    ['qcow2', 'extended_l2=on', 'stack.qcow2'],
    ['qcow2', 'refcount_bits=1', 'plain.qcow2'],
    ['qcow2', 'preallocation=metadata', 'plain.qcow2'],
  ])('makes %s %s of %s', (format, options, source) => {
    const more = options === '' ? [] : ['-o', options];
    expect(img('convert', '-O', format, ...more, source, 'made')).toMatchObject({ status: 0, stdout: '', stderr: '' });
    same(source, 'made');
    if (format === 'qcow2') expect(qemu.check('made')).toMatchObject({ status: 0 });
    // No more space than what is in it, and what preallocation asks for.
    if (options === '') expect(statSync(qemu.path('made')).blocks * 512).toBeLessThan(10 * 2 ** 20);
  });

  it('copies what differs from the backing file', () => {
    expect(img('convert', '-O', 'qcow2', '-B', 'plain.qcow2', '-F', 'qcow2', 'stack.qcow2', 'thin.qcow2').status).toBe(
      0,
    );
    expect(qemu.info('thin.qcow2')).toMatchObject({ 'backing-filename': 'plain.qcow2' });
    same('stack.qcow2', 'thin.qcow2');
    expect(qemu.check('thin.qcow2')).toMatchObject({ status: 0, 'allocated-clusters': 3 });
  });

  it('writes zeroes over what is there with -n, and shows how far it is', () => {
    writeFileSync(qemu.path('used.raw'), Buffer.alloc(64 * 2 ** 20, 0xff));
    const { status, stderr } = img('convert', '-n', '-p', '-O', 'raw', 'plain.qcow2', 'used.raw');
    expect(status).toBe(0);
    expect(stderr).toContain('(100.00/100%)');
    same('plain.qcow2', 'used.raw');
    expect(img('convert', '-n', '-O', 'raw', 'plain.qcow2', 'plain.raw')).toMatchObject({ status: 1 });
  });

  it('refuses to write to where it reads from', () => {
    expect(img('convert', '-O', 'qcow2', 'top.qcow2', './base.qcow2')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('is the source') as string,
    });
    expect(qemu.check('base.qcow2').status).toBe(0);
  });

  it('copies a part with dd', () => {
    expect(img('dd', '-O', 'raw', 'if=plain.qcow2', 'of=part.raw', 'bs=1M', 'skip=2', 'count=9').status).toBe(0);
    qemu.run('dd', '-O', 'raw', 'if=plain.qcow2', 'of=theirs.raw', 'bs=1M', 'skip=2', 'count=11');
    const theirs = readFileSync(qemu.path('theirs.raw'));
    const ours = readFileSync(qemu.path('part.raw'));
    expect(ours.length).toBe(9 * 2 ** 20);
    expect(ours.equals(theirs.subarray(0, ours.length))).toBe(true);
    expect(img('dd', 'if=plain.qcow2').status).toBe(1);
    expect(img('dd', 'if=plain.qcow2', 'of=x', 'seek=1').status).toBe(1);
  });
});
