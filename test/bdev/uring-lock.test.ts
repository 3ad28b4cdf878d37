/**
 * Goal: a disk's file is served by one process at a time; a successor waits for the lock of one that was killed, which the kernel lets
 * go when it is through with that one's last request.
 *
 * Method: another thread holds the lock through an open file of its own, as another process would; it lets go of it while the bdev is
 * being created, or not.
 */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, expect, it } from 'vitest';
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
  check(native.fileLock(fd, 1), 'lock the disk');
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
  check(native.fileLock(fd, 1), 'lock the disk');
  expect(() => rig.open([config])).toThrow('in use by another process');
  native.fileClose(fd);
  rig.open([config]).close();
  rmSync(folder, { recursive: true });
});
