/**
 * Goal: nothing of a file that ends within a block is out of reach: its last block is shown whole, zeroes behind the end.
 *
 * Method: files of odd sizes, read and written buffered and direct.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { IoType } from '../../src/bdev/bdev-io.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { Disk } from '../support/disk.js';
import { Rig } from '../support/rig.js';
import { uringFile } from './stacks.js';

describe('A file that ends within a block', () => {
  it.each([
    [1, false],
    [1000, false],
    [4097, false],
    [1, true],
    [1000, true],
    [4097, true],
  ])('of %i bytes is read whole, direct: %s', (bytes, direct) => {
    const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const path = join(folder, 'disk');
    const data = fresh(bytes);
    writeFileSync(path, data);
    const stack = uringFile({ direct });
    const [config] = stack.configs;
    const disk = new Disk(new Rig('tail'), [{ ...config!, path } as typeof config & { path: string }]);
    const block = disk.open.bdev.blockSizeBytes;
    const whole = Math.ceil(bytes / block) * block;
    expect(disk.open.bdev.blockCount * block).toBe(whole);
    const expected = Buffer.concat([data, Buffer.alloc(whole - bytes)]);
    expectBytes(disk.read(0, whole), expected, 'the whole file');
    expectBytes(disk.read(whole - block, block), expected.subarray(whole - block), 'its last block');
    // Beyond the last block is beyond the disk.
    const beyond = disk.start(IoType.read, whole, block);
    disk.finish(beyond);
    expect(beyond.errno).toBe(22);
    const last = fresh(block);
    disk.write(whole - block, last);
    disk.close();
    expectBytes(readFileSync(path), Buffer.concat([data.subarray(0, whole - block), last]), 'the file');
    stack.release();
    rmSync(folder, { recursive: true });
  });
});
