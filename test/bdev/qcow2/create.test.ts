/**
 * Goal: an image that we make is one that QEMU would have made. Method: for every option and many of their combinations an image by
 * `createImage` and one by qemu-img: the same words of `qemu-img info`, a clean check by both checkers, the same data.
 */
import { mkdirSync, statSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { checkImage } from '../../../src/bdev/qcow2/check.js';
import { CREATE_DEFAULTS, createImage, preallocateSpace } from '../../../src/bdev/qcow2/create.js';
import type { CreateOptions } from '../../../src/bdev/qcow2/create.js';
import { CompressionType } from '../../../src/bdev/qcow2/format.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
import { QemuImg } from '../../support/qemu-img.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());
mkdirSync(qemu.path('ours'));
mkdirSync(qemu.path('theirs'));

const MIB = 2 ** 20;

function make(name: string, options: Partial<CreateOptions> & { readonly sizeBytes: number }): void {
  const file = new NodeFile(qemu.path(name), { mode: 'create' });
  try {
    runTask(createImage(file, { ...CREATE_DEFAULTS, ...options }));
  } finally {
    file.close();
  }
}

function ourCheck(name: string) {
  const file = new NodeFile(qemu.path(name), { mode: 'read' });
  try {
    return runTask(checkImage(file, { repair: 'none' }));
  } finally {
    file.close();
  }
}

/** All words of an option as qemu-img takes it. */
function words(options: Partial<CreateOptions>): string {
  const all = { ...CREATE_DEFAULTS, ...options };
  const onOff = (value: boolean) => (value ? 'on' : 'off');
  return [
    `compat=${all.version === 2 ? '0.10' : '1.1'}`,
    `cluster_size=${2 ** all.clusterBits}`,
    `refcount_bits=${2 ** all.refcountOrder}`,
    `lazy_refcounts=${onOff(all.lazyRefcounts)}`,
    `extended_l2=${onOff(all.extendedL2)}`,
    `compression_type=${all.compressionType === CompressionType.zstd ? 'zstd' : 'zlib'}`,
    `preallocation=${all.preallocation}`,
    ...(all.dataFile === null ? [] : [`data_file=${all.dataFile}`, `data_file_raw=${onOff(all.dataFileRaw)}`]),
  ].join(',');
}

type Case = Partial<CreateOptions> & { readonly sizeBytes: number };

const sizes: Case[] = [0, 512, 65536, 5 * MIB + 512, 64 * 2 ** 30].map((sizeBytes) => ({ sizeBytes }));
const clusterSizes: Case[] = [9, 10, 12, 14, 16, 18, 21].flatMap((clusterBits) => [
  { clusterBits, sizeBytes: 33 * MIB },
  { clusterBits, sizeBytes: 33 * MIB, preallocation: 'metadata' },
]);
const refcountWidths: Case[] = [0, 1, 2, 3, 4, 5, 6].flatMap((refcountOrder) => [
  { refcountOrder, sizeBytes: 33 * MIB },
  { refcountOrder, sizeBytes: 9 * MIB, clusterBits: 9, preallocation: 'metadata' },
]);
const preallocations: Case[] = (['off', 'metadata', 'falloc', 'full'] as const).flatMap((preallocation) => [
  { preallocation, sizeBytes: 5 * MIB },
  { preallocation, sizeBytes: 5 * MIB, extendedL2: true, clusterBits: 14 },
  { preallocation, sizeBytes: 5 * MIB, version: 2 },
]);
const features: Case[] = [
  { sizeBytes: MIB, version: 2 },
  { sizeBytes: MIB, lazyRefcounts: true },
  { sizeBytes: MIB, extendedL2: true },
  { sizeBytes: MIB, extendedL2: true, clusterBits: 21 },
  { sizeBytes: MIB, compressionType: CompressionType.zstd },
  { sizeBytes: MIB, compressionType: CompressionType.zstd, lazyRefcounts: true, extendedL2: true, refcountOrder: 6 },
];

describe('createImage', () => {
  it.each([...sizes, ...clusterSizes, ...refcountWidths, ...preallocations, ...features])(
    'makes what qemu-img makes of %o',
    (options) => {
      make('ours/image', options);
      qemu.run('create', '-q', '-f', 'qcow2', '-o', words(options), 'theirs/image', String(options.sizeBytes));
      const place = { filename: '', 'actual-size': 0 };
      expect({ ...qemu.info('ours/image'), ...place }).toEqual({ ...qemu.info('theirs/image'), ...place });
      for (const name of ['ours/image', 'theirs/image']) {
        const theirCheck = qemu.check(name);
        expect(theirCheck, name).toMatchObject({ status: 0, 'check-errors': 0 });
        expect(ourCheck(name), name).toMatchObject({
          corruptions: 0,
          leaks: 0,
          checkErrors: 0,
          imageEndOffset: theirCheck['image-end-offset'],
          totalClusters: theirCheck['total-clusters'] ?? 0,
          allocatedClusters: theirCheck['allocated-clusters'] ?? 0,
          fragmentedClusters: theirCheck['fragmented-clusters'] ?? 0,
        });
      }
      qemu.run('compare', '-f', 'qcow2', '-F', 'qcow2', 'ours/image', 'theirs/image');
    },
  );

  it('names backing file and format, and reads through them', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'ours/base', '4M');
    qemu.io('ours/base', 'write -P 7 1M 64k');
    const backing = { backingFile: 'base', backingFormat: 'qcow2' };
    make('ours/top', { sizeBytes: 4 * MIB, ...backing });
    make('ours/extended', { sizeBytes: 4 * MIB, ...backing, extendedL2: true, preallocation: 'metadata' });
    for (const name of ['ours/top', 'ours/extended']) {
      expect(qemu.info(name)).toMatchObject({ 'backing-filename': 'base', 'backing-filename-format': 'qcow2' });
      qemu.run('compare', '-f', 'qcow2', '-F', 'qcow2', name, 'ours/base');
      expect(qemu.check(name).status).toBe(0);
    }
  });

  it.each([false, true])('puts the data into another file, raw %s', (dataFileRaw) => {
    const sizeBytes = 3 * MIB;
    const data = new NodeFile(qemu.path('data'), { mode: 'create' });
    runTask(data.grow(sizeBytes));
    runTask(preallocateSpace(data, 0, sizeBytes, 'full'));
    data.close();
    make('image', { sizeBytes, dataFile: 'data', dataFileRaw });
    qemu.run(
      'create',
      '-q',
      '-f',
      'qcow2',
      '-o',
      words({ dataFile: 'theirs-data', dataFileRaw }),
      'theirs-image',
      String(sizeBytes),
    );
    const specific = (name: string) => (qemu.info(name)['format-specific'] as { data: object }).data;
    expect({ ...specific('image'), 'data-file': '' }).toEqual({ ...specific('theirs-image'), 'data-file': '' });
    expect(qemu.check('image')).toMatchObject({ status: 0, 'check-errors': 0 });
    expect(ourCheck('image').allocatedClusters).toBe(dataFileRaw ? 48 : 0);
    qemu.io('image', 'write -P 5 1M 64k', 'read -P 5 1M 64k');
    expect(qemu.check('image').status).toBe(0);
  });

  it('lays a LUKS header out in clusters of its own', () => {
    const luksHeader = Buffer.alloc(100_000, 0x4c);
    make('ours/luks', { sizeBytes: MIB, luksHeader });
    const file = new NodeFile(qemu.path('ours/luks'), { mode: 'read' });
    const there = Buffer.alloc(luksHeader.length);
    runTask(file.read(3 * 65536, there));
    expect(there.equals(luksHeader)).toBe(true);
    file.close();
    expect(ourCheck('ours/luks')).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
    expect(ourCheck('ours/luks').imageEndOffset).toBe(6 * 65536);
  });

  it('makes the largest disks: an L1 table of 32 MiB, and a TiB of preallocated metadata', () => {
    make('ours/wide', { sizeBytes: 2 ** 37, clusterBits: 9 });
    expect(ourCheck('ours/wide')).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
    expect(qemu.check('ours/wide').status).toBe(0);
    make('ours/long', { sizeBytes: 2 ** 40, preallocation: 'metadata' });
    const report = ourCheck('ours/long');
    expect(report).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0, allocatedClusters: 2 ** 24 });
    expect(statSync(qemu.path('ours/long')).blocks * 512).toBeLessThan(200 * MIB);
    expect(() => make('ours/wider', { sizeBytes: 2 ** 38, clusterBits: 9 })).toThrow(/too large for clusters of 512/);
  });

  it('says which option does not go with another', () => {
    const bad: [Partial<CreateOptions>, string][] = [
      [{ version: 2, lazyRefcounts: true }, 'lazy_refcounts'],
      [{ version: 2, refcountOrder: 3 }, 'refcount_bits'],
      [{ version: 2, extendedL2: true }, 'extended_l2'],
      [{ version: 2, compressionType: CompressionType.zstd }, 'compression_type'],
      [{ version: 2, dataFile: 'x' }, 'data_file'],
      [{ extendedL2: true, clusterBits: 13 }, 'cluster_size'],
      [{ clusterBits: 8 }, 'cluster_size'],
      [{ clusterBits: 22 }, 'cluster_size'],
      [{ dataFileRaw: true }, 'data_file_raw'],
      [{ dataFile: 'x', dataFileRaw: true, backingFile: 'y' }, 'backing_file'],
      [{ backingFile: 'y', preallocation: 'metadata' }, 'preallocation'],
      [{ backingFile: 'y'.repeat(600), clusterBits: 9 }, 'backing_file'],
    ];
    for (const [options, field] of bad) {
      expect(() => make('ours/bad', { sizeBytes: MIB, ...options }), JSON.stringify(options)).toThrow(
        expect.objectContaining({ code: 'bad-option', field }),
      );
    }
  });
});
