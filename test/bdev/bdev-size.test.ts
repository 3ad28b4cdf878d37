/**
 * Goal: the size of a disk changes only as it may, after its storage and for everybody who has it open; a lock that is held only
 * while a disk is used keeps others out exactly then.
 *
 * Method: the size against a storage that says what it is asked; files and two bdevs on one of them.
 */
import { mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BdevError } from '../../src/bdev/bdev.js';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { BdevSize } from '../../src/bdev/bdev-size.js';
import { IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import { Disk } from '../support/disk.js';
import { Rig } from '../support/rig.js';

const MIB = 2 ** 20;

describe('the size of a disk', () => {
  const make = (bytes = 4096): { size: BdevSize; storage: { bytes: number }; asked: number[] } => {
    const storage = { bytes };
    const asked: number[] = [];
    const size = new BdevSize(512, {
      sizeBytes: () => storage.bytes,
      resize: (wanted) => {
        asked.push(wanted);
        if (wanted > MIB) throw new BdevError('full', 'newSize', 'no room', 'less');
        storage.bytes = wanted;
      },
    });
    return { size, storage, asked };
  };

  it('is that of its storage in whole blocks, and changes with it', () => {
    const { size, storage, asked } = make(5000);
    expect(size.blockCount).toBe(9);
    size.resize(8192);
    expect([size.blockCount, asked]).toEqual([16, [8192]]);
    storage.bytes = 9000;
    expect(size.blockCount).toBe(16);
    size.rescan();
    expect(size.blockCount).toBe(17);
  });

  it('is told to all who watch, once for each change, until they no longer do', () => {
    const { size } = make();
    const seen: string[] = [];
    const both = (): void => void seen.push(`${size.blockCount}`);
    const ends = [size.watch(both), size.watch(both)];
    size.resize(8192);
    size.resize(8192);
    expect(seen).toEqual(['16', '16']);
    ends[0]!();
    size.resize(16384);
    ends[1]!();
    size.resize(32768);
    expect(seen).toEqual(['16', '16', '32']);
  });

  it('shrinks only while nobody has the disk open', () => {
    const { size, storage, asked } = make(8192);
    const end = size.watch(() => undefined);
    expect(() => size.resize(4096)).toThrow('in use with 8192 bytes and cannot shrink to 4096');
    storage.bytes = 4096;
    expect(() => size.rescan()).toThrow('cannot shrink');
    expect([size.blockCount, asked]).toEqual([16, []]);
    end();
    size.rescan();
    expect(size.blockCount).toBe(8);
  });

  it('stays as it is when the storage cannot follow, or the size is none', () => {
    const { size } = make();
    expect(() => size.resize(2 * MIB)).toThrow('no room');
    for (const bytes of [0, -512, 511, 513, NaN, Infinity, 0.5])
      expect(() => size.resize(bytes), `${bytes}`).toThrow(BdevError);
    expect(size.blockCount).toBe(8);
  });
});

describe('a disk on a file', () => {
  let folder: string;
  let path: string;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'strata-size-'));
    path = join(folder, 'disk');
    writeFileSync(path, Buffer.alloc(MIB, 1));
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  const config = (name: string, more: Partial<UringConfig> = {}): UringConfig => ({
    name,
    module: 'uring',
    path,
    readOnly: false,
    create: null,
    blockSizeBytes: 512,
    direct: false,
    iopoll: false,
    fixedBuffers: false,
    lock: true,
    ...more,
  });

  it('grows with its file, and what was written stays', () => {
    const disk = new Disk(new Rig('size'), [config('disk')]);
    const { size } = disk.open.bdev;
    expect(disk.run(IoType.writeZeroes, MIB, 512)).toBe(IoStatus.ioError);
    size.resize(2 * MIB);
    expect(statSync(path).size).toBe(2 * MIB);
    expect(disk.read(MIB - 512, 1024)).toEqual(Buffer.concat([Buffer.alloc(512, 1), Buffer.alloc(512)]));
    disk.write(2 * MIB - 512, Buffer.alloc(512, 3));
    expect(() => size.resize(MIB)).toThrow('cannot shrink');
    truncateSync(path, 3 * MIB);
    size.rescan();
    disk.write(3 * MIB - 512, Buffer.alloc(512, 4));
    disk.close();
  });

  it('is never cut, not even while nobody uses it; one that may only be read is not made longer', () => {
    const rig = new Rig('size');
    const writable = rig.registry.create(config('writable'));
    expect(() => writable.size.resize(MIB / 2)).toThrow('of which none are cut off');
    rig.registry.destroyAll();
    const readOnly = rig.registry.create(config('read-only', { readOnly: true }));
    expect(() => readOnly.size.resize(2 * MIB)).toThrow('open for reading only');
    expect(statSync(path).size).toBe(MIB);
    rig.close();
  });

  it('in memory moves, with requests of the same step in flight', () => {
    const disk = new Disk(new Rig('size'), [
      { name: 'memory', module: 'malloc', sizeBytes: MIB, blockSizeBytes: 512 } as BdevConfig,
    ]);
    const data = Buffer.alloc(4096, 5);
    const write = disk.startWrite(8192, data);
    disk.open.bdev.size.resize(4 * MIB);
    const read = disk.start(IoType.read, 8192, 4096);
    disk.finish(write, read);
    expect(disk.gather(read)).toEqual(data);
    disk.write(4 * MIB - 4096, data);
    expect(disk.read(8192, 4096)).toEqual(data);
    disk.close();
  });

  it('with `lock: running` is open to two, and in use by one at a time; who comes later finds its new size', () => {
    const rig = new Rig('lock');
    const [first, second] = ['first', 'second'].map((name) =>
      rig.registry.create(config(name, { lock: 'running' })),
    ) as [ReturnType<typeof rig.registry.create>, ReturnType<typeof rig.registry.create>];
    expect(first.guard!.acquire()).toBeNull();
    expect(second.guard!.acquire()).toContain('is in use by another process');
    first.size.resize(2 * MIB);
    first.guard!.release();
    expect(second.guard!.acquire()).toBeNull();
    expect(second.size.blockCount).toBe(4096);
    expect(first.guard!.acquire()).toContain('is in use by another process');
    // Others are kept out meanwhile, and let in after.
    expect(() => rig.registry.create(config('third'))).toThrow('in use by another process');
    second.guard!.release();
    rig.registry.create(config('third'));
    expect(first.guard!.acquire()).toContain('in use');
    rig.close();
  });

  it('is guarded through filters', () => {
    const rig = new Rig('lock');
    rig.registry.create(config('file', { lock: 'running' }));
    const filter = rig.registry.create({ name: 'filter', module: 'passthru', base: 'file' } as BdevConfig);
    expect(filter.guard).toBe(rig.registry.get('file')!.guard);
    rig.close();
  });
});
