/**
 * Goal: a disk's file is served by one process at a time; a successor waits for the lock of one that was killed, which the kernel lets
 * go when it is through with that one's last request. QEMU and we keep out of each other's way as two QEMUs do.
 *
 * Method: another thread holds the lock through an open file of its own, as another process would; it lets go of it while the bdev is
 * being created, or not. The real qemu-img and qemu-io come while the disk is in use, and the other way round.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { O_RDWR, check, native } from '../../native/index.js';
import type { UringConfig } from '../../src/bdev/uring/uring-file.js';
import { Rig } from '../support/rig.js';

const folder = mkdtempSync(join(tmpdir(), 'strata-lock-'));
const path = join(folder, 'disk');
writeFileSync(path, '');
truncateSync(path, 2 ** 20);

const config: UringConfig = {
  name: 'disk',
  module: 'uring',
  path,
  readOnly: false,
  create: null,
  blockSizeBytes: null,
  direct: false,
  iopoll: false,
  fixedBuffers: false,
  lock: true,
};

let rig: Rig;
afterEach(() => rig.close());
afterAll(() => rmSync(folder, { recursive: true }));

/** Closes a descriptor after a while: the creation of a bdev keeps this thread busy until then. */
const RELEASER = `
const { closeSync } = require('node:fs');
const { workerData: { fd, afterMs } } = require('node:worker_threads');
Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, afterMs);
closeSync(fd);
`;

it('a lock that is let go a little later is waited for', async () => {
  rig = new Rig('lock');
  const fd = check(native.fileOpen(path, O_RDWR, 0), 'open the disk');
  check(native.fileLock(fd, 1, 0, 0), 'lock the disk');
  const worker = new Worker(RELEASER, { eval: true, trackUnmanagedFds: false, workerData: { fd, afterMs: 100 } });
  await new Promise((resolve) => worker.once('online', resolve));
  const open = rig.open([config]);
  expect(open.bdev.blockCount * open.bdev.blockSizeBytes).toBe(2 ** 20);
  open.close();
  await worker.terminate();
});

it('one that stays is an error that says so, and the next attempt finds it gone', () => {
  rig = new Rig('lock');
  const fd = check(native.fileOpen(path, O_RDWR, 0), 'open the disk');
  check(native.fileLock(fd, 1, 0, 0), 'lock the disk');
  expect(() => rig.open([config])).toThrow('in use by another process');
  native.fileClose(fd);
  rig.open([config]).close();
});

describe('QEMU', () => {
  // Who reads a raw image with QEMU does not mind writers.
  const image = join(folder, 'image');
  beforeAll(() => {
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1M']);
  });

  const qemuIo = (...args: string[]): string => {
    const { status, stderr, stdout } = spawnSync('qemu-io', ['-f', 'qcow2', ...args, image], { encoding: 'utf8' });
    return status === 0 ? 'fine' : stdout + stderr;
  };

  it.each([
    ['written to', false],
    ['read only', true],
  ])('keeps off a disk in use as off a disk of its own: one that is %s', (_, readOnly) => {
    rig = new Rig('lock');
    const mode: UringConfig = { ...config, path: image, readOnly };
    const open = rig.open([mode]);
    const outcomes = [
      qemuIo('-r', '-U', '-c', 'read 0 512'),
      qemuIo('-r', '-c', 'read 0 512'),
      qemuIo('-c', 'write 0 512'),
    ];
    open.close();
    rig.registry.destroyAll();
    expect(outcomes[0]).toBe('fine');
    expect(outcomes[1]).toContain(readOnly ? 'fine' : 'Failed to get shared "write" lock');
    expect(outcomes[2]).toContain('Failed to get "write" lock');
    expect(qemuIo('-c', 'write 0 512')).toBe('fine');
  });

  it.each([
    ['writes', [], ['in use by another process', 'in use by another process']],
    ['reads', ['-r'], ['in use by another process', 'fine']],
    ['looks only', ['-r', '-U'], ['fine', 'fine']],
  ])('has the disk: it %s', async (_, options, [writing, reading]) => {
    rig = new Rig('lock');
    const child = spawn('qemu-io', [...options, '-f', 'qcow2', image]);
    // It has the file open when it answers.
    child.stdin.write('length\n');
    await once(child.stdout, 'data');
    const attempt = (readOnly: boolean): string => {
      try {
        const mode: UringConfig = { ...config, path: image, readOnly };
        rig.open([mode]).close();
        rig.registry.destroyAll();
        return 'fine';
      } catch (error) {
        return (error as Error).message;
      }
    };
    expect(attempt(false)).toContain(writing);
    expect(attempt(true)).toContain(reading);
    child.stdin.end('quit\n');
    await once(child, 'close');
    expect(attempt(false)).toBe('fine');
  });
});
