/**
 * Goal: what commands read and write may be named in all the ways that qemu-img has: as a snapshot, by `--image-opts`, with the passphrase
 * of an encrypted image; and, beyond qemu-img, as a bdev of the daemon's config. Method: the same by qemu-img, compared; then what is
 * refused, by its name.
 */
import { chmodSync, existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { afterAll, describe, expect, it } from 'vitest';
import { QemuImg } from '../support/qemu-img.js';
import { Program, STRATA, until } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

const MIB = 2 ** 20;

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

function done(...args: readonly string[]): string {
  const { status, stdout, stderr } = img(...args);
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  return stdout;
}

function refused(...args: readonly string[]): string {
  const { status, stderr } = img(...args);
  expect(status).toBe(args[0] === 'compare' ? 2 : 1);
  return stderr;
}

/** What the disks of two images hold. */
function expectSame(...args: readonly string[]): void {
  expect(qemu.run('compare', ...args)).toContain('identical');
}

qemu.run('create', '-q', '-f', 'qcow2', 'base.qcow2', '16M');
qemu.io('base.qcow2', 'write -P 1 0 4M', 'write -P 9 12M 1M');
qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'disk.qcow2');
qemu.io('disk.qcow2', 'write -P 2 1M 1M', 'write -c -P 4 6M 64k');
qemu.run('snapshot', '-c', 'first', 'disk.qcow2');
qemu.io('disk.qcow2', 'write -P 3 1M 512k', 'write -z 0 64k', 'write -P 5 8M 64k');
qemu.run('snapshot', '-c', 'second', 'disk.qcow2');
qemu.io('disk.qcow2', 'write -P 6 0 16M');

describe('-l', () => {
  it.each(['first', '2', 'snapshot.id=1', 'snapshot.name=second', 'snapshot.id=1,snapshot.name=first'])(
    'reads the disk as it was: %s',
    (choice) => {
      for (const format of ['raw', 'qcow2']) {
        done('convert', '-l', choice, '-O', format, 'disk.qcow2', 'ours');
        qemu.run('convert', '-l', choice, '-O', 'raw', 'disk.qcow2', 'theirs');
        expectSame('-f', format, '-F', 'raw', 'ours', 'theirs');
      }
      const measured = done('measure', '-l', choice, '-O', 'qcow2', '--output', 'json', 'disk.qcow2');
      const theirs = qemu.run('measure', '-l', choice, '-O', 'qcow2', '--output', 'json', 'disk.qcow2');
      expect(JSON.parse(measured)).toEqual(JSON.parse(theirs));
    },
  );

  it('reads a disk of another size, and the subclusters and external parts of its time', () => {
    qemu.run('create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on,cluster_size=16k', 'grown.qcow2', '4M');
    qemu.io('grown.qcow2', 'write -P 1 1M 1k', 'write -z 2M 2k');
    qemu.run('snapshot', '-c', 'small', 'grown.qcow2');
    qemu.run('convert', '-O', 'raw', 'grown.qcow2', 'then.raw');
    qemu.run('resize', 'grown.qcow2', '8M');
    qemu.io('grown.qcow2', 'write -P 2 0 8M');
    done('convert', '-l', 'small', '-O', 'raw', 'grown.qcow2', 'ours');
    expect(readFileSync(qemu.path('ours')).equals(readFileSync(qemu.path('then.raw')))).toBe(true);
  });

  it('names the snapshots there are when one is not', () => {
    expect(refused('convert', '-l', 'third', '-O', 'raw', 'disk.qcow2', 'none')).toContain('1 (first), 2 (second)');
    expect(refused('convert', '-l', 'snapshot.id=1,snapshot.name=second', 'disk.qcow2', 'none')).toContain('Failed');
    expect(refused('convert', '-l', 'first', '-f', 'raw', 'base.qcow2', 'none')).toContain('Failed to load snapshot');
    expect(existsSync(qemu.path('none'))).toBe(false);
  });
});

describe('--image-opts', () => {
  const opts = 'driver=qcow2,file.driver=file,file.filename=disk.qcow2';

  it('means the same image in every command', () => {
    expect(done('info', '--image-opts', '--output', 'json', opts)).toBe(
      done('info', '-f', 'qcow2', '--output', 'json', 'disk.qcow2'),
    );
    expect(done('check', '--image-opts', opts)).toBe(qemu.run('check', '--image-opts', opts));
    expect(JSON.parse(done('map', '--image-opts', '--output', 'json', opts))).toEqual(
      JSON.parse(qemu.run('map', '--image-opts', '--output', 'json', opts)),
    );
    expect(done('compare', '--image-opts', opts, opts)).toBe('Images are identical.\n');
    done('convert', '--image-opts', '-O', 'raw', opts, 'ours');
    expectSame('-F', 'raw', 'disk.qcow2', 'ours');
    done('dd', '--image-opts', '-O', 'raw', `if=${opts}`, 'of=ours', 'bs=1M', 'skip=1', 'count=2');
    // Version 7.2 counts from the beginning of the disk.
    qemu.run('dd', '--image-opts', '-O', 'raw', `if=${opts}`, 'of=theirs', 'bs=1M', 'skip=1', 'count=3');
    expect(readFileSync(qemu.path('ours')).equals(readFileSync(qemu.path('theirs')))).toBe(true);
    expect(done('measure', '--image-opts', '-O', 'qcow2', opts)).toBe(
      qemu.run('measure', '--image-opts', '-O', 'qcow2', opts),
    );
    expect(done('snapshot', '--image-opts', '-l', opts)).toContain('second');
  });

  it('changes an image by its options, too', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'edit.qcow2', '4M');
    const edit = 'driver=qcow2,file.filename=edit.qcow2';
    done('snapshot', '--image-opts', '-c', 'one', edit);
    done('resize', '-q', '--image-opts', edit, '8M');
    done('bitmap', '--image-opts', '--add', edit, 'bits');
    expect(qemu.info('edit.qcow2')).toMatchObject({ 'virtual-size': 8 * MIB });
    qemu.run('create', '-q', '-f', 'qcow2', '-b', 'edit.qcow2', '-F', 'qcow2', 'above.qcow2');
    qemu.io('above.qcow2', 'write -P 1 0 1M');
    const above = 'driver=qcow2,file.filename=above.qcow2';
    done('commit', '-q', '--image-opts', '-r', '100M', above);
    expectSame('above.qcow2', 'edit.qcow2');
    done('rebase', '--image-opts', '-b', '', above);
    expect(qemu.info('above.qcow2')['backing-filename']).toBeUndefined();
    expectSame('above.qcow2', 'edit.qcow2');
  });

  it('leaves the backing file away, or puts another in its place', () => {
    for (const [name, backing] of [
      ['none', 'backing='],
      ['another', 'backing.driver=raw,backing.file.filename=other.raw'],
    ] as const) {
      writeFileSync(qemu.path('other.raw'), Buffer.alloc(16 * MIB, 7));
      qemu.run('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'top.qcow2');
      qemu.io('top.qcow2', 'write -P 2 1M 1M');
      const text = `driver=qcow2,file.filename=top.qcow2,${backing}`;
      done('convert', '--image-opts', '-O', 'raw', text, `${name}.ours`);
      qemu.run('convert', '--image-opts', '-O', 'raw', text, `${name}.theirs`);
      expectSame('-f', 'raw', '-F', 'raw', `${name}.ours`, `${name}.theirs`);
    }
  });

  it('names the output with --target-image-opts', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'target.qcow2', '16M');
    const target = 'driver=qcow2,file.filename=target.qcow2';
    done('convert', '-n', '--target-image-opts', 'disk.qcow2', target);
    expectSame('disk.qcow2', 'target.qcow2');
    expect(qemu.check('target.qcow2')).toMatchObject({ status: 0 });
    expect(refused('convert', '--target-image-opts', 'disk.qcow2', target)).toContain('requires use of -n flag');
  });

  it('refuses a key that it does not know by its name', () => {
    const cases = [
      ['driver=qcow2,file.filename=disk.qcow2,discard=unmap', "'discard'"],
      ['driver=qcow2,file.driver=nbd,file.filename=disk.qcow2', "'file.driver' is 'nbd'"],
      ['driver=vmdk,file.filename=disk.qcow2', "'driver' is 'vmdk'"],
      ['driver=qcow2,backing.offset=1,backing.file.filename=x,file.filename=disk.qcow2', "'backing.offset'"],
      ['driver=qcow2', 'file.filename'],
      ['driver=qcow2,backing=node0,file.filename=disk.qcow2', "'backing' is 'node0'"],
    ];
    for (const [text, words] of cases) expect(refused('info', '--image-opts', text!)).toContain(words);
    expect(refused('info', '--image-opts', '-f', 'qcow2', 'driver=qcow2')).toContain('mutually exclusive');
  });
});

describe('encrypted images', () => {
  writeFileSync(qemu.path('key'), 'sesame', { mode: 0o600 });
  writeFileSync(qemu.path('wrong'), 'barley', { mode: 0o600 });
  const secret = ['--object', 'secret,id=k,file=key'] as const;
  const create = 'encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10';
  const opts = 'driver=qcow2,encrypt.key-secret=k,file.filename=locked.qcow2';
  // qemu-img gives up where it cannot measure how long a passphrase takes.
  done('create', '-q', ...secret, '-f', 'qcow2', '-o', create, 'locked.qcow2', '8M');
  writeFileSync(qemu.path('plain.raw'), randomFillSync(Buffer.alloc(3 * MIB)));
  qemu.run('convert', '-n', ...secret, '--target-image-opts', '-f', 'raw', 'plain.raw', opts);

  it('are read with their passphrase', () => {
    done('convert', ...secret, '--image-opts', '-O', 'raw', opts, 'ours');
    qemu.run('convert', ...secret, '--image-opts', '-O', 'raw', opts, 'theirs');
    expect(readFileSync(qemu.path('ours')).equals(readFileSync(qemu.path('theirs')))).toBe(true);
    const plain = 'driver=raw,file.filename=plain.raw';
    expect(img('compare', ...secret, '--image-opts', opts, plain)).toMatchObject({
      status: 0,
      stdout: expect.stringContaining('Images are identical.') as string,
    });
    done('dd', ...secret, '--image-opts', '-O', 'raw', `if=${opts}`, 'of=part', 'bs=1M', 'skip=1', 'count=1');
    expect(readFileSync(qemu.path('part')).equals(readFileSync(qemu.path('plain.raw')).subarray(MIB, 2 * MIB))).toBe(
      true,
    );
    expect(done('check', ...secret, '--image-opts', opts)).toBe(qemu.run('check', ...secret, '--image-opts', opts));
    expect(JSON.parse(done('map', ...secret, '--image-opts', '--output', 'json', opts))).toEqual(
      JSON.parse(qemu.run('map', ...secret, '--image-opts', '--output', 'json', opts)),
    );
  });

  it('are made and written by convert, and passwords that do not fit are refused', () => {
    done('convert', ...secret, '-O', 'qcow2', '-o', create, 'disk.qcow2', 'new.qcow2');
    const made = 'driver=qcow2,encrypt.key-secret=k,file.filename=new.qcow2';
    const disk = 'driver=qcow2,file.filename=disk.qcow2';
    expectSame(...secret, '--image-opts', made, disk);
    expect(qemu.info('new.qcow2')).toMatchObject({ encrypted: true });
    expect(qemu.check('new.qcow2').status).toBe(qemu.check('locked.qcow2').status);
    expect(readFileSync(qemu.path('new.qcow2')).includes(Buffer.alloc(4096, 6))).toBe(false);
    done('convert', ...secret, '-n', '--target-image-opts', 'base.qcow2', made);
    expectSame(...secret, '--image-opts', made, 'driver=qcow2,file.filename=base.qcow2');
    const wrong = ['--object', 'secret,id=k,file=wrong'] as const;
    expect(refused('convert', ...wrong, '--image-opts', '-O', 'raw', opts, 'none')).toContain('passphrase');
    expect(refused('convert', '-O', 'raw', 'locked.qcow2', 'none')).toContain('encrypt.key-secret');
    expect(refused('convert', '--image-opts', '-O', 'raw', opts, 'none')).toContain("No secret with id 'k'");
    expect(
      refused('info', ...secret, '--image-opts', 'driver=qcow2,encrypt.key-secret=k,file.filename=base.qcow2'),
    ).toContain('not encrypted');
    expect(refused('convert', '-c', ...secret, '-O', 'qcow2', '-o', create, 'disk.qcow2', 'none')).toContain(
      'encryption',
    );
    expect(existsSync(qemu.path('none'))).toBe(false);
  });
});

describe('bdev:NAME', () => {
  chmodSync(qemu.path('key'), 0o600);
  writeFileSync(
    qemu.path('daemon.yaml'),
    `controllers: [{ name: vm1, bdev: slow, socket: vm1.sock }]
bdevs:
  - { name: file, module: uring, path: disk.qcow2, direct: false }
  - { name: image, module: qcow2, base: file, image_dir: ., restart_dir: null }
  - { name: slow, module: qos, base: image, total_iops: 100000 }
  - { name: locked-file, module: uring, path: locked.qcow2, direct: false }
  - { name: locked, module: qcow2, base: locked-file, key_file: key, restart_dir: null }
  - { name: out, module: uring, path: out.raw, create: 16MiB, direct: false }
  - { name: memory, module: malloc, size: 1MiB }
`,
  );
  const config = ['--config', 'daemon.yaml'] as const;

  it('is read and written with its whole stack', () => {
    done('convert', ...config, '-O', 'qcow2', 'bdev:slow', 'ours');
    expectSame('disk.qcow2', 'ours');
    done('convert', ...config, 'disk.qcow2', 'bdev:out');
    expectSame('-F', 'raw', 'disk.qcow2', 'out.raw');
    expect(done('compare', ...config, 'bdev:slow', 'bdev:out')).toBe('Images are identical.\n');
    expect(img('compare', ...config, 'bdev:slow', 'base.qcow2').status).toBe(1);
    done('dd', ...config, '-O', 'raw', 'if=bdev:locked', 'of=part', 'bs=1M', 'count=3');
    expect(readFileSync(qemu.path('part')).equals(readFileSync(qemu.path('plain.raw')))).toBe(true);
    expect(JSON.parse(done('info', ...config, '--output', 'json', 'bdev:slow'))).toMatchObject({
      name: 'slow',
      module: 'qos',
      'virtual-size': 16 * MIB,
    });
    expect(qemu.check('disk.qcow2').status).toBe(0);
  });

  it('does not change what it only reads', () => {
    const before = statSync(qemu.path('disk.qcow2')).mtimeMs;
    done('convert', ...config, '-O', 'raw', 'bdev:image', 'ours');
    expect(statSync(qemu.path('disk.qcow2')).mtimeMs).toBe(before);
  });

  it('is refused while a daemon serves it, and is there again afterwards', async () => {
    const daemon = new Program(STRATA, ['serve', '--config', 'daemon.yaml', '--metrics', 'off'], qemu.folder);
    await until('the socket', () => (existsSync(qemu.path('vm1.sock')) ? true : undefined));
    for (const words of [
      ['bdev:slow', 'none'],
      ['base.qcow2', 'bdev:out'],
    ]) {
      expect(refused('convert', ...config, '-O', 'raw', ...words)).toContain('in use by another process');
    }
    await daemon.stop('SIGTERM');
    done('convert', ...config, '-O', 'raw', 'bdev:slow', 'ours');
    expect(existsSync(qemu.path('none'))).toBe(false);
  });

  it('refuses what is not there, too small, or meant otherwise', () => {
    expect(refused('convert', ...config, 'bdev:nowhere', 'none')).toContain('there are: file, image, slow');
    expect(refused('convert', 'bdev:slow', 'none')).toContain('--config');
    expect(refused('convert', ...config, 'disk.qcow2', 'bdev:memory')).toContain('use a larger target');
    expect(refused('convert', ...config, '-c', 'disk.qcow2', 'bdev:out')).toContain('not compressed');
    writeFileSync(qemu.path('bad.yaml'), 'bdevs: [{ name: x, module: nothing }]\n');
    expect(refused('compare', '--config', 'bad.yaml', 'bdev:x', 'disk.qcow2')).toContain('bad.yaml');
  });
});
