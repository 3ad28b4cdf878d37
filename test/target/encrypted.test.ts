/**
 * Goal: the daemon serves an encrypted image with a key file, beside other disks or isolated, also when the isolated process is started again;
 * a key that does not fit is a problem of the config; the passphrase is in no log, page or memory.
 *
 * Method: the compiled daemon on images of `strata img create`, which qemu-img reads afterwards; memory is searched in /proc.
 */
import { spawnSync } from 'node:child_process';
import { closeSync, openSync, readFileSync, readSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { Status } from '../frontend/protocol.js';
import { Program, STRATA, newFolder, runToEnd, writeConfig } from './programs.js';

const PASSPHRASE = 'seven wet umbrellas on a shelf';
const TIMEOUT_MS = 60_000;
const DATA = Buffer.alloc(65536, 'a marker of sixteen bytes or so ');

const config = (isolate: boolean, keyFile = 'key'): string => `
bdevs:
  - {name: plain, module: malloc, size: 1MiB}
  - {name: file, module: uring, path: disk.qcow2}
  - {name: disk, module: qcow2, base: file, key_file: ${keyFile}}
controllers:
  - {name: vm, bdev: disk, socket: vm.sock, isolate: ${isolate}}
  - {name: other, bdev: plain, socket: other.sock}
metrics: {listen: '127.0.0.1:0'}
log: {format: json}
`;

function newDisk(): string {
  const folder = newFolder();
  writeFileSync(join(folder, 'key'), PASSPHRASE, { mode: 0o600 });
  const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=20';
  const args = [
    'img',
    'create',
    '-q',
    '-f',
    'qcow2',
    '--object',
    'secret,id=s,file=key',
    '-o',
    options,
    'disk.qcow2',
    '8M',
  ];
  expect(runToEnd(STRATA, args, folder)).toMatchObject({ exitCode: 0, stderr: '' });
  return folder;
}

/** Whether a process has these bytes in memory that it may write to. */
function hasInMemory(pid: number, bytes: Buffer): boolean {
  const fd = openSync(`/proc/${pid}/mem`, 'r');
  try {
    for (const line of readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n')) {
      const [, from, to] = /^([0-9a-f]+)-([0-9a-f]+) rw/.exec(line) ?? [];
      if (from === undefined) continue;
      const start = parseInt(from, 16);
      const length = parseInt(to!, 16) - start;
      // Address space that is reserved, and nothing else, is larger.
      if (length > 2 ** 28) continue;
      const region = Buffer.alloc(length);
      try {
        readSync(fd, region, 0, length, start);
      } catch {
        continue;
      }
      if (region.includes(bytes)) return true;
    }
    return false;
  } finally {
    closeSync(fd);
  }
}

function childrenOf(pid: number): number[] {
  return readdirSync(`/proc/${pid}/task`).flatMap((task) =>
    readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').trim().split(' ').filter(Boolean).map(Number),
  );
}

describe('A daemon with an encrypted image', () => {
  it.each([false, true])('serves it, isolated: %s', { timeout: TIMEOUT_MS }, async (isolate) => {
    const folder = newDisk();
    const program = await Program.serving(STRATA, ['serve', '--config', writeConfig(folder, config(isolate))], folder);
    let frontend = await Frontend.connect(join(folder, 'vm.sock'));
    expect((await frontend.queue.write(8, DATA)).status).toBe(Status.ok);
    expect((await frontend.queue.read(8, DATA.length)).data).toEqual(DATA);
    if (isolate) {
      process.kill(childrenOf(program.pid)[0]!, 'SIGKILL');
      await program.logged('an isolated disk is served again');
      frontend.close();
      frontend = await Frontend.connect(join(folder, 'vm.sock'));
      expect((await frontend.queue.read(8, DATA.length)).data).toEqual(DATA);
    }
    const secret = Buffer.from(PASSPHRASE);
    expect(hasInMemory(program.pid, Buffer.from('disk.qcow2'))).toBe(true);
    for (const pid of [program.pid, ...childrenOf(program.pid)]) expect(hasInMemory(pid, secret)).toBe(false);
    const page = await (await fetch(`${await program.url()}/metrics`)).text();
    frontend.close();
    const { exitCode, stdout, stderr } = await program.stop();
    expect(exitCode).toBe(0);
    for (const text of [stdout, stderr, page]) expect(text).not.toContain(PASSPHRASE);
    expect(readFileSync(join(folder, 'disk.qcow2')).includes(DATA.subarray(0, 32))).toBe(false);
    const image = 'driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=disk.qcow2';
    const args = ['convert', '--object', 'secret,id=s,file=key', '--image-opts', image, '-O', 'raw', 'disk.raw'];
    expect(spawnSync('qemu-img', args, { cwd: folder, encoding: 'utf8' })).toMatchObject({ status: 0 });
    expect(readFileSync(join(folder, 'disk.raw')).subarray(4096, 4096 + DATA.length)).toEqual(DATA);
  });

  it('does not start with a key that does not fit, and names the field', { timeout: TIMEOUT_MS }, () => {
    const folder = newDisk();
    writeFileSync(join(folder, 'wrong'), `${PASSPHRASE}\n`, { mode: 0o600 });
    writeFileSync(join(folder, 'open'), PASSPHRASE, { mode: 0o644 });
    const refusal = (keyFile: string): string => {
      const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, config(false, keyFile))], folder);
      expect(ended.exitCode).toBe(1);
      expect(ended.stderr).not.toContain(PASSPHRASE);
      return ended.stderr;
    };
    expect(refusal('wrong')).toMatch(/bdevs\[2\]\.key_file: .*opens no key slot[^]*a line break at its end counts/);
    expect(refusal('open')).toMatch(/bdevs\[2\]\.key_file: .*has mode 0644[^]*-> run `chmod 600 /);
    expect(refusal('none')).toMatch(/bdevs\[2\]\.key_file: .*ENOENT/);
  });
});
