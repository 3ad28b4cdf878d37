/**
 * Goal: our check says of an image what qemu-img check says, and what it repairs is right to QEMU, with the data as before.
 * Method: images of every kind by qemu-img and qemu-io, whole, then changed at one known place after the other; both checkers look at
 * each, then ours repairs it and both look again.
 */
import { copyFileSync, readFileSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { checkImage, readHeader } from '../../../src/bdev/qcow2/check.js';
import type { CheckReport, Repair } from '../../../src/bdev/qcow2/check.js';
import type { Qcow2Header } from '../../../src/bdev/qcow2/format.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
import { QemuImg } from '../../support/qemu-img.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

function ourCheck(name: string, repair: Repair = 'none'): CheckReport {
  const file = new NodeFile(qemu.path(name), { mode: repair === 'none' ? 'read' : 'write' });
  try {
    return runTask(checkImage(file, { repair }));
  } finally {
    file.close();
  }
}

/** Our numbers by qemu-img's names, and its own, both without those that are 0. */
function numbers(name: string): { ours: object; theirs: object } {
  const report = ourCheck(name);
  const theirs = qemu.check(name);
  const ours = {
    status: exitCode(report),
    corruptions: report.corruptions,
    leaks: report.leaks,
    'check-errors': report.checkErrors,
    'image-end-offset': report.imageEndOffset,
    'total-clusters': report.totalClusters,
    'allocated-clusters': report.allocatedClusters,
    'fragmented-clusters': report.fragmentedClusters,
    'compressed-clusters': report.compressedClusters,
  };
  const withoutZeroes = (all: object): object =>
    Object.fromEntries(
      Object.entries(all).filter(([key, value]) => value !== 0 && !['words', 'filename', 'format'].includes(key)),
    );
  return { ours: withoutZeroes(ours), theirs: withoutZeroes(theirs) };
}

function exitCode({ corruptions, leaks, checkErrors }: CheckReport): number {
  return checkErrors > 0 ? 1 : corruptions > 0 ? 2 : leaks > 0 ? 3 : 0;
}

function headerOf(name: string): Qcow2Header {
  const file = new NodeFile(qemu.path(name), { mode: 'read' });
  try {
    return runTask(readHeader(file));
  } finally {
    file.close();
  }
}

/** An image with something of everything that its options allow. */
function makeRich(name: string, options: string, size = '64M'): void {
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, name, size);
  const isV2 = options.includes('compat=0.10');
  const compressed = options.includes('preallocation') ? '' : ' -c';
  const isSingle = options.includes('refcount_bits=1,') || options.endsWith('refcount_bits=1');
  qemu.io(name, 'write -P 1 0 3M', 'write -P 2 40M 1M', 'write -P 3 20M 300k', 'discard 21M 1M', 'write -z 50M 1M');
  if (!isV2) qemu.run('bitmap', '--add', '--enable', '-g', '64k', name, 'bitmap0');
  if (!isSingle) qemu.run('snapshot', '-c', 'first', name);
  qemu.io(name, 'write -P 4 1M 200k', `write${compressed} -P 5 30M 2M`, 'write -P 6 60M 512');
  if (!isSingle) qemu.run('snapshot', '-c', 'second', name);
  qemu.io(name, 'write -P 8 30M 100k', 'discard 40M 512k', `write${compressed} -P 9 8M 2M`);
}

const kinds: [string, string][] = [
  ['plain', ''],
  ['v2', 'compat=0.10'],
  ['small', 'cluster_size=512'],
  ['large', 'cluster_size=2M'],
  ['wide', 'refcount_bits=64'],
  ['narrow', 'refcount_bits=8'],
  ['single', 'refcount_bits=1'],
  ['extended', 'extended_l2=on'],
  ['extended16', 'extended_l2=on,cluster_size=16k'],
  ['zstd', 'compression_type=zstd'],
  ['lazy', 'lazy_refcounts=on'],
  ['preallocated', 'preallocation=metadata'],
];
for (const [name, options] of kinds) makeRich(name, options === '' ? 'lazy_refcounts=off' : options);

describe('checkImage on whole images', () => {
  it.each(kinds)('counts what qemu-img counts: %s (%s)', (name) => {
    const { ours, theirs } = numbers(name);
    expect(ours).toEqual(theirs);
    expect(theirs).not.toHaveProperty('corruptions');
  });

  it('counts the clusters of a LUKS header', () => {
    const secret = ['--object', 'secret,id=key,data=secret'];
    const options = 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100';
    const create = ['create', '-q', ...secret, '-f', 'qcow2', '-o', options, 'luks', '16M'];
    // QEMU measures the processor, and gives up when that is too short to be measured.
    for (let tries = 0; qemu.try(...create).status !== 0; tries++) expect(tries).toBeLessThan(10);
    expect(ourCheck('luks')).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
  });

  it('follows an external data file', () => {
    qemu.run('create', '-q', '-f', 'qcow2', '-o', 'data_file=external.raw', 'external', '16M');
    qemu.io('external', 'write -P 1 0 3M', 'write -z 1M 1M', 'discard 2M 64k');
    const { ours, theirs } = numbers('external');
    expect(ours).toEqual(theirs);
  });
});

/** A change of the image's bytes, by what is where in it. */
interface Poke {
  readonly name: string;
  poke(image: PokedImage): void;
  /** Whether data may be gone, or the damage beyond repair. */
  readonly isLost?: boolean;
  /** Our count may differ, only the verdict has to agree. */
  readonly isVerdictOnly?: boolean;
}

class PokedImage {
  readonly header: Qcow2Header;
  readonly bytes: Buffer;
  readonly #file: NodeFile;
  readonly clusterBytes: number;

  constructor(name: string) {
    this.header = headerOf(name);
    this.clusterBytes = 2 ** this.header.clusterBits;
    this.bytes = readFileSync(qemu.path(name));
    this.#file = new NodeFile(qemu.path(name), { mode: 'write' });
  }

  close(): void {
    this.#file.close();
  }

  u64(at: number): bigint {
    return this.bytes.readBigUInt64BE(at);
  }

  put64(at: number, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(value);
    this.#file.writeNow(at, bytes);
  }

  put(at: number, bytes: Buffer): void {
    this.#file.writeNow(at, bytes);
  }

  /** Where the first entry of the active L1 is that names a table, and the table. */
  get l1At(): number {
    for (let i = 0; i < this.header.l1Entries; i++) {
      if (this.u64(this.header.l1Offset + i * 8) !== 0n) return this.header.l1Offset + i * 8;
    }
    throw new Error('the image is empty');
  }

  get l2Offset(): number {
    return Number(this.u64(this.l1At) & 0x00fffffffffffe00n);
  }

  /** Where the first entry is in it that is as wanted. */
  l2At(wanted: (entry: bigint) => boolean): number {
    const step = (this.header.incompatible & 16n) === 0n ? 8 : 16;
    for (let at = this.l2Offset; at < this.l2Offset + this.clusterBytes; at += step) {
      if (wanted(this.u64(at))) return at;
    }
    throw new Error('there is no such entry');
  }

  get copiedAt(): number {
    return this.l2At(
      (entry) => (entry & 0xc000000000000000n) === 0x8000000000000000n && (entry & 0x00fffffffffffe00n) !== 0n,
    );
  }

  /** Where the entry of the first refcount block is. */
  get tableAt(): number {
    return this.header.refcountTableOffset;
  }

  /** Where the refcount of 16 bits of a cluster is. */
  refcountAt(cluster: number): number {
    return Number(this.u64(this.tableAt)) + cluster * 2;
  }
}

const MASK = 0x00fffffffffffe00n;
const COPIED = 1n << 63n;

const pokes: Poke[] = [
  {
    name: 'a refcount too high: a leak',
    poke: (image) =>
      image.put(image.refcountAt(Number(image.u64(image.copiedAt) & MASK) / image.clusterBytes), Buffer.from([0, 5])),
  },
  {
    name: 'a refcount of a cluster that nobody uses',
    poke: (image) => {
      const cluster = Math.ceil(image.bytes.length / image.clusterBytes);
      image.put(cluster * image.clusterBytes, Buffer.alloc(image.clusterBytes));
      image.put(image.refcountAt(cluster), Buffer.from([0, 1]));
    },
  },
  {
    name: 'a refcount of 0: refcounts are made anew',
    poke: (image) =>
      image.put(image.refcountAt(Number(image.u64(image.copiedAt) & MASK) / image.clusterBytes), Buffer.from([0, 0])),
  },
  { name: 'a refcount of the header of 0', poke: (image) => image.put(image.refcountAt(0), Buffer.from([0, 0])) },
  {
    name: 'an L2 entry without its copied bit',
    poke: (image) => image.put64(image.copiedAt, image.u64(image.copiedAt) & ~COPIED),
  },
  {
    name: 'an L1 entry without its copied bit',
    poke: (image) => image.put64(image.l1At, image.u64(image.l1At) ^ COPIED),
  },
  {
    name: 'an L2 entry that is gone: a leak',
    poke: (image) => image.put64(image.copiedAt, 0n),
    isLost: true,
  },
  {
    name: 'an L2 entry with reserved bits',
    poke: (image) => image.put64(image.copiedAt, image.u64(image.copiedAt) | (0x2an << 1n)),
    isLost: true,
  },
  {
    name: 'an L2 entry that is not the start of a cluster',
    poke: (image) => image.put64(image.copiedAt, image.u64(image.copiedAt) | 0x200n),
    isLost: true,
  },
  {
    name: 'an L2 entry beyond the end of the file',
    poke: (image) => image.put64(image.copiedAt, COPIED | 0x0000700000000000n),
    isLost: true,
  },
  {
    name: 'an L2 entry beyond 2^53',
    poke: (image) => image.put64(image.copiedAt, COPIED | 0x00fffffffffe0000n),
    isLost: true,
  },
  {
    name: 'two L2 entries of one cluster',
    poke: (image) => image.put64(image.copiedAt + 8, image.u64(image.copiedAt)),
    isLost: true,
  },
  {
    name: 'an L2 entry that names the L1 table',
    poke: (image) => image.put64(image.copiedAt, COPIED | BigInt(image.header.l1Offset)),
    isLost: true,
  },
  {
    name: 'an L2 entry that names a refcount block',
    poke: (image) => image.put64(image.copiedAt, COPIED | image.u64(image.tableAt)),
    isLost: true,
  },
  {
    name: 'a preallocated zero cluster that is not the start of one',
    poke: (image) => image.put64(image.copiedAt, image.u64(image.copiedAt) | 0x201n),
    isLost: true,
  },
  {
    name: 'a compressed cluster with a copied bit',
    poke: (image) => {
      const at = image.l2At((entry) => (entry & (1n << 62n)) !== 0n);
      image.put64(at, image.u64(at) | COPIED);
    },
    isLost: true,
  },
  {
    name: 'a compressed cluster beyond the end of the file',
    poke: (image) => {
      const at = image.l2At((entry) => (entry & (1n << 62n)) !== 0n);
      image.put64(at, image.u64(at) | (1n << 50n));
    },
    isLost: true,
  },
  {
    name: 'an L1 entry with reserved bits',
    poke: (image) => image.put64(image.l1At, image.u64(image.l1At) | 1n),
    isLost: true,
  },
  {
    name: 'an L1 entry that is not the start of a cluster',
    poke: (image) => image.put64(image.l1At, image.u64(image.l1At) | 0x200n),
    isLost: true,
    isVerdictOnly: true,
  },
  {
    name: 'an L1 entry beyond the end of the file',
    poke: (image) => image.put64(image.l1At, COPIED | 0x0000700000000000n),
    isLost: true,
  },
  { name: 'an L1 entry that is gone', poke: (image) => image.put64(image.l1At, 0n), isLost: true },
  {
    name: 'a refcount table entry with reserved bits',
    poke: (image) => image.put64(image.tableAt, image.u64(image.tableAt) | 1n),
  },
  {
    name: 'a refcount table entry that is not the start of a cluster',
    poke: (image) => image.put64(image.tableAt, image.u64(image.tableAt) | 0x200n),
  },
  {
    name: 'a refcount table entry beyond the end of the file',
    poke: (image) => image.put64(image.tableAt, 0x0000700000000000n),
  },
  {
    name: 'a refcount table entry that names the header',
    poke: (image) => image.put64(image.tableAt, BigInt(image.header.l1Offset)),
  },
  { name: 'a refcount table of zeroes', poke: (image) => image.put(image.tableAt, Buffer.alloc(image.clusterBytes)) },
  {
    name: 'a refcount table of ones',
    poke: (image) => image.put(image.tableAt, Buffer.alloc(image.clusterBytes, 0xff)),
  },
  { name: 'no refcount table', poke: (image) => image.put(56, Buffer.alloc(4)) },
  { name: 'a refcount table elsewhere', poke: (image) => image.put64(48, BigInt(image.l2Offset)) },
  {
    name: 'a refcount block of zeroes',
    poke: (image) => image.put(image.refcountAt(0), Buffer.alloc(image.clusterBytes)),
  },
  { name: 'refcounts of any value', poke: (image) => image.put(image.refcountAt(1), Buffer.alloc(40, 0x03)) },
  { name: 'a dirty image', poke: (image) => image.put64(72, image.u64(72) | 1n) },
  { name: 'a corrupt image', poke: (image) => image.put64(72, image.u64(72) | 2n) },
  { name: 'bitmaps that somebody wrote past', poke: (image) => image.put64(88, 0n) },
  { name: 'an autoclear bit that nobody knows', poke: (image) => image.put64(88, image.u64(88) | (1n << 40n)) },
  {
    name: 'a snapshot whose L1 is not the start of a cluster',
    poke: (image) =>
      image.put64(image.header.snapshotTableOffset, image.u64(image.header.snapshotTableOffset) | 0x200n),
    isLost: true,
  },
  {
    name: 'a snapshot whose L1 is too large',
    poke: (image) => image.put(image.header.snapshotTableOffset + 8, Buffer.from([0, 0x40, 0, 1])),
    isLost: true,
    isVerdictOnly: true,
  },
];

function poked(name: string, poke: Poke): string {
  copyFileSync(qemu.path(name), qemu.path('poked'));
  const image = new PokedImage('poked');
  try {
    poke.poke(image);
  } finally {
    image.close();
  }
  return 'poked';
}

describe.each(['plain', 'lazy'])('checkImage on damaged images: %s', (base) => {
  it.each(pokes)('agrees with qemu-img on $name', (poke) => {
    poked(base, poke);
    const { ours, theirs } = numbers('poked');
    if (poke.isVerdictOnly === true)
      expect((ours as { status: number }).status).toBe((theirs as { status: number }).status);
    else expect(ours).toEqual(theirs);
  });

  it.each(pokes)('repairs $name', (poke) => {
    const { status } = qemu.check(poked(base, poke));
    const fixed = ourCheck('poked', 'all');
    const after = qemu.check('poked');
    copyFileSync(qemu.path('poked'), qemu.path('ours'));
    copyFileSync(qemu.path(poked(base, poke)), qemu.path('theirs'));
    qemu.try('check', '-r', 'all', 'theirs');
    const judged = qemu.check('theirs');
    // What QEMU cannot repair may stay as it is.
    if (judged.status === 0) expect(after).toMatchObject({ status: 0 });
    if (poke.isLost !== true) {
      expect(after).toMatchObject({ status: 0 });
      expect(fixed.corruptionsFixed + fixed.leaksFixed > 0).toBe(status !== 0);
      expect(ourCheck('ours')).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
      expect(headerOf('ours').incompatible & 3n).toBe(0n);
      qemu.run('compare', '-f', 'qcow2', '-F', 'qcow2', 'ours', base);
    }
  });
});

describe('checkImage where qemu-img gives up or looks away', () => {
  it('says which entry of a bitmap table is none', () => {
    poked('plain', {
      name: 'bitmap',
      poke: (image) => image.put64(Number(image.u64(image.header.bitmaps!.directoryOffset)), 0xffn << 56n),
    });
    expect(qemu.check('poked')).toMatchObject({ status: 1 });
    const report = ourCheck('poked');
    expect(report).toMatchObject({ corruptions: 1, checkErrors: 0 });
    expect(report.findings).toContainEqual(
      expect.objectContaining({
        kind: 'corruption',
        field: 'bitmap "bitmap0"[0]',
        message: 'is no entry of a bitmap table',
      }),
    );
  });

  it('finds an L1 table that is used for data, also where the refcount says so', () => {
    poked('plain', {
      name: 'overlap',
      poke: (image) => {
        image.put64(image.copiedAt, BigInt(image.header.l1Offset));
        image.put(image.refcountAt(image.header.l1Offset / image.clusterBytes), Buffer.from([0, 2]));
      },
    });
    qemu.try('check', '-r', 'leaks', 'poked');
    expect(qemu.check('poked')).toMatchObject({ status: 0 });
    const report = ourCheck('poked');
    expect(report.findings.map(({ field }) => field)).toContain('header.l1_table_offset');
    expect(exitCode(report)).toBe(2);
  });

  it('leaves refcounts alone that have to be made anew when only leaks may be repaired', () => {
    poked('plain', { name: 'none', poke: (image) => image.put(image.refcountAt(0), Buffer.from([0, 0])) });
    const before = readFileSync(qemu.path('poked'));
    expect(exitCode(ourCheck('poked', 'leaks'))).toBe(1);
    expect(readFileSync(qemu.path('poked')).equals(before)).toBe(true);
  });
});

describe('checkImage on hostile images', () => {
  /** Fields of the header with values that they may not have, and the name in the message. */
  const fields: [string, number, Buffer][] = [
    ['header.magic', 0, Buffer.from('QFI!')],
    ['header.version', 4, Buffer.from([0, 0, 0, 4])],
    ['header.backing_file_offset', 8, Buffer.from([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 9])],
    ['header.cluster_bits', 20, Buffer.from([0, 0, 0, 8])],
    ['header.cluster_bits', 20, Buffer.from([0, 0, 0, 63])],
    ['header.size', 24, Buffer.from([0, 0x10, 0, 0, 0, 0, 0, 0])],
    ['header.size', 24, Buffer.from([0xff, 0, 0, 0, 0, 0, 0, 0])],
    ['header.crypt_method', 32, Buffer.from([0, 0, 0, 3])],
    ['header.l1_size', 36, Buffer.from([0xff, 0xff, 0xff, 0xff])],
    ['header.l1_size', 36, Buffer.from([0, 0, 0, 0])],
    ['header.l1_table_offset', 40, Buffer.from([0, 0, 0, 0, 0, 3, 0, 1])],
    ['header.l1_table_offset', 40, Buffer.from([0xff, 0, 0, 0, 0, 3, 0, 0])],
    ['header.refcount_table_offset', 48, Buffer.from([0, 0, 0, 0, 0, 1, 2, 0])],
    ['header.refcount_table_clusters', 56, Buffer.from([0xff, 0xff, 0xff, 0xff])],
    ['header.nb_snapshots', 60, Buffer.from([0, 1, 0, 1])],
    ['header.snapshots_offset', 64, Buffer.from([0, 0, 0, 0, 0, 3, 0, 1])],
    ['header.incompatible_features', 72, Buffer.from([0, 0, 0, 0, 0, 0, 0, 0x80])],
    ['header.refcount_order', 96, Buffer.from([0, 0, 0, 7])],
    ['header.header_length', 100, Buffer.from([0, 0, 0, 103])],
    ['header.compression_type', 104, Buffer.from([9])],
  ];

  it.each(fields)('names %s at %i', (field, at, bytes) => {
    poked('plain', { name: field, poke: (image) => image.put(at, bytes) });
    expect(() => ourCheck('poked')).toThrow(expect.objectContaining({ field }));
  });

  it('ends at any number anywhere in the metadata', () => {
    const image = readFileSync(qemu.path('plain'));
    const { clusterBits, l1Offset, refcountTableOffset, snapshotTableOffset, bitmaps } = headerOf('plain');
    const places = [8, 24, 36, 40, 48, 56, 60, 64, 112, 120, l1Offset, refcountTableOffset, snapshotTableOffset];
    places.push(
      snapshotTableOffset + 8,
      snapshotTableOffset + 32,
      bitmaps!.directoryOffset,
      bitmaps!.directoryOffset + 8,
    );
    const values = [
      0xffffffffffffffffn,
      0x7fffffffffffffffn,
      1n << 32n,
      0x00ffffffffff0000n,
      0x100000001n,
      BigInt(2 ** clusterBits),
    ];
    for (const at of places) {
      for (const value of values) {
        poked('plain', { name: '', poke: (poking) => poking.put64(at, value) });
        try {
          const report = ourCheck('poked');
          expect(report.findings.length).toBeLessThanOrEqual(1000);
          ourCheck('poked', 'all');
        } catch (error) {
          expect(error, `${value} at ${at}`).toMatchObject({ name: 'BdevError' });
        }
      }
    }
    expect(image.length).toBeGreaterThan(0);
  });

  it('walks a table that all entries of a large L1 name only once', () => {
    qemu.run('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=2M', 'bomb', '4096T');
    qemu.io('bomb', 'write -P 1 0 2M');
    const image = new PokedImage('bomb');
    const { l1Entries, l1Offset } = image.header;
    const l1 = Buffer.alloc(l1Entries * 8);
    for (let at = 0; at < l1.length; at += 8) l1.writeBigUInt64BE(image.u64(image.l1At), at);
    image.put(l1Offset, l1);
    image.close();
    const report = ourCheck('bomb');
    // The table and its one cluster have 8192 users, not 1.
    expect(report).toMatchObject({ corruptions: 2, leaks: 0, checkErrors: 0, allocatedClusters: l1Entries });
  });
});
