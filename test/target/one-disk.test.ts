/**
 * Goal: `strata-vhost-user-blk` keeps to the conventions by which QEMU's management tools run any vhost-user back-end, and says what is
 * wrong with its arguments.
 *
 * Method: the compiled program is run with real files, sockets and inherited descriptors.
 */
import { readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { check, native } from '../../native/index.js';
import { Frontend } from '../frontend/frontend.js';
import { ONE_DISK, Program, newFolder, runToEnd, until } from './programs.js';

const DESCRIPTOR = new URL('../../packaging/vhost-user/50-strata-vhost-user-blk.json', import.meta.url);
const MIB = 2 ** 20;

/** A folder with a disk file of 1 MiB. */
function newDisk(): { folder: string; file: string; socket: string } {
  const folder = newFolder();
  const file = join(folder, 'disk.img');
  writeFileSync(file, Buffer.alloc(4096, 'first block '));
  truncateSync(file, MIB);
  return { folder, file, socket: join(folder, 'disk.sock') };
}

describe('--print-capabilities', () => {
  it('prints JSON and ends, as the descriptor of the package says', () => {
    const ended = runToEnd(ONE_DISK, ['--print-capabilities'], newFolder());
    expect(ended).toMatchObject({ exitCode: 0, stderr: '' });
    const capabilities = JSON.parse(ended.stdout) as unknown;
    expect(capabilities).toEqual({ type: 'block', features: ['read-only', 'blk-file'] });
    const descriptor = JSON.parse(readFileSync(DESCRIPTOR, 'utf8')) as Record<string, unknown>;
    expect(descriptor).toMatchObject(capabilities as object);
    expect(descriptor['binary']).toMatch(/^\/.*\/strata-vhost-user-blk$/);
    expect(descriptor['description']).toEqual(expect.any(String));
  });
});

describe('arguments that cannot be used', () => {
  const file = ['--blk-file=x'];
  const socket = ['--socket-path=s'];
  it.each([
    ['no socket', file, /exactly one of --socket-path and --fd/],
    ['two sockets', [...file, ...socket, '--fd=3'], /exactly one of --socket-path and --fd/],
    ['no disk', socket, /exactly one of --blk-file and --bdev/],
    ['two disks', [...file, ...socket, '--bdev=null', '--size=1MiB'], /exactly one of --blk-file and --bdev/],
    ['size of a file', [...file, ...socket, '--size=1MiB'], /--bdev and --size go together/],
    ['no size', [...socket, '--bdev=null'], /--bdev and --size go together/],
    ['unit', [...socket, '--bdev=null', '--size=1GB'], /unknown unit: write 1GiB/],
    ['module', [...socket, '--bdev=nul', '--size=1MiB'], /Allowed choices are null, malloc/],
    ['queues', [...file, ...socket, '--num-queues=65'], /from 1 to 64/],
    ['serial', [...file, ...socket, `--serial=${'x'.repeat(21)}`], /at most 20/],
    ['write cache', [...file, ...socket, '--write-cache=maybe'], /Write on or off/],
    ['misspelt option', [...file, ...socket, '--readonly'], /Did you mean --read-only/],
    ['missing file', [...file, ...socket], /--blk-file: .*x does not exist\n {4}-> create it/],
    ['long path', [...file, `--socket-path=/${'x'.repeat(120)}`], /121 bytes long.*\n {4}-> choose a shorter path/],
    ['descriptor that is not open', ['--bdev=null', '--size=1MiB', '--fd=250'], /--fd: .*EBADF\n {4}->/],
  ])('%s', (_name, args, message) => {
    const ended = runToEnd(ONE_DISK, args, newFolder());
    expect(ended.exitCode).toBe(1);
    expect(ended.stdout).toBe('');
    expect(ended.stderr).toMatch(message);
  });
});

describe('--socket-path with --blk-file', () => {
  it('serves the file in the foreground until SIGTERM', async () => {
    const { folder, file, socket } = newDisk();
    const program = await Program.serving(
      ONE_DISK,
      [`--socket-path=${socket}`, `--blk-file=${file}`, '--serial=S-1'],
      folder,
    );
    const frontend = await Frontend.connect(socket);
    expect(await frontend.blkConfig()).toMatchObject({ capacitySectors: 2048, writeback: 1 });
    expect((await frontend.queue.getId()).data.toString()).toMatch(/^S-1\0/);
    expect((await frontend.queue.read(0, 512)).data.toString()).toMatch(/^first block first/);
    expect((await frontend.queue.write(8, Buffer.alloc(4096, 'x'))).status).toBe(0);
    expect((await frontend.queue.flush()).status).toBe(0);
    expect(readFileSync(file).subarray(4096, 4100).toString()).toBe('xxxx');
    frontend.close();
    const ended = await program.stop();
    expect(ended).toMatchObject({ exitCode: 0, stdout: '' });
    expect(statSync(socket, { throwIfNoEntry: false })).toBeUndefined();
  });

  it('refuses writes with --read-only', async () => {
    const { folder, file, socket } = newDisk();
    await Program.serving(ONE_DISK, [`--socket-path=${socket}`, `--blk-file=${file}`, '--read-only'], folder);
    const frontend = await Frontend.connect(socket);
    expect((await frontend.queue.write(0, Buffer.alloc(512, 'x'))).status).toBe(1);
    expect((await frontend.queue.read(0, 512)).data.toString()).toMatch(/^first block/);
    frontend.close();
    expect(readFileSync(file, 'utf8')).toMatch(/^first block/);
  });

  it('takes the limits it is given', async () => {
    const { folder, file, socket } = newDisk();
    const args = [
      '--num-queues=2',
      '--block-size=4096',
      '--write-cache=off',
      '--direct=off',
      '--mode=interrupt',
      '--core=0',
    ];
    await Program.serving(ONE_DISK, [`--socket-path=${socket}`, `--blk-file=${file}`, ...args], folder);
    const frontend = await Frontend.connect(socket);
    expect(await frontend.blkConfig()).toMatchObject({ numQueues: 2, blkSizeBytes: 4096, writeback: 0 });
    frontend.close();
  });

  it('gives each guest its own disk when two run', async () => {
    const one = newDisk();
    const two = newDisk();
    for (const { folder, file, socket } of [one, two]) {
      await Program.serving(ONE_DISK, [`--socket-path=${socket}`, `--blk-file=${file}`], folder);
    }
    const ended = runToEnd(ONE_DISK, ['--socket-path=third.sock', `--blk-file=${one.file}`], one.folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/--blk-file: .*in use by another process\n {4}->/);
  });
});

describe('--bdev', () => {
  it.each(['null', 'malloc'])('serves a %s disk', async (module) => {
    const folder = newFolder();
    const socket = join(folder, 's');
    const args = [`--socket-path=${socket}`, `--bdev=${module}`, '--size=8MiB', '--metrics=127.0.0.1:0'];
    const program = await Program.serving(ONE_DISK, args, folder);
    const frontend = await Frontend.connect(socket);
    expect(await frontend.blkConfig()).toMatchObject({ capacitySectors: 16384, numQueues: 16 });
    expect((await frontend.queue.write(0, Buffer.alloc(512))).status).toBe(0);
    const metrics = await (await fetch(`${await program.url()}/metrics`)).text();
    expect(metrics).toContain('strata_bdev_writes_completed_total{bdev="disk"} 1');
    frontend.close();
  });
});

describe('--fd', () => {
  it('takes a listening socket', async () => {
    const folder = newFolder();
    const socket = join(folder, 'inherited.sock');
    const fd = check(native.socketListen(socket, 0o600), 'listen');
    const program = await Program.serving(ONE_DISK, ['--fd=3', '--bdev=malloc', '--size=1MiB'], folder, { fds: [fd] });
    native.fileClose(fd);
    for (let i = 0; i < 2; i++) {
      const frontend = await Frontend.connect(socket);
      expect((await frontend.queue.write(0, Buffer.alloc(512))).status).toBe(0);
      frontend.close();
    }
    expect((await program.stop()).exitCode).toBe(0);
    // The socket file is its maker's.
    expect(statSync(socket).isSocket()).toBe(true);
  });

  it('takes a connected socket, and ends when the other side leaves', async () => {
    const pair = native.socketPair();
    if (typeof pair === 'number') throw new Error(`socketpair: ${pair}`);
    const [ours, theirs] = pair;
    const program = await Program.serving(ONE_DISK, ['--fd=3', '--bdev=null', '--size=1MiB'], newFolder(), {
      fds: [theirs],
    });
    native.fileClose(theirs);
    expect(await program.logged('front-end connected')).toMatchObject({ pid: process.pid });
    native.fileClose(ours);
    const ended = await program.ended;
    expect(ended.exitCode).toBe(0);
    expect(program.log.some(({ message }) => message === 'the front-end left and no other can come')).toBe(true);
    await until('the last word', () => (program.log.at(-1)?.message === 'stopped' ? true : undefined));
  });
});
