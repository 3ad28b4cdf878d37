/**
 * A script of requests carried out by us and by qemu-io on twin images, and what must be the same after it: contents, what of them is
 * where, and an image without an error or a leak. Cases are plain data, so that fast-check can shrink them.
 */
import fc from 'fast-check';
import { expect } from 'vitest';
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import type { BdevConfig } from '../../../src/bdev/bdev.js';
import { IoFlag, IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { Disk } from '../../support/disk.js';
import type { Request } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import type { UringConfig } from '../../../src/bdev/uring/uring.js';
import { entriesOf } from '../../../src/target/img/map.js';
import type { MapEntry } from '../../../src/target/img/map.js';
import { closeChain, openChain } from '../../../src/target/img/open-chain.js';
import { qcow2On, uringDefaults } from '../stacks.js';

const SECTOR = 512;

export interface ImageCase {
  readonly compat: '0.10' | '1.1';
  readonly clusterBytes: number;
  readonly refcountBits: number;
  readonly isExtended: boolean;
  readonly compression: 'zlib' | 'zstd';
  readonly preallocation: 'off' | 'metadata' | 'falloc' | 'full';
  readonly sectors: number;
  readonly backing: { readonly format: 'raw' | 'qcow2'; readonly sectors: number } | null;
  /** Files named by the image are opened as it names them, or given as bdevs. */
  readonly isNamed: boolean;
  readonly dataFile: 'none' | 'plain' | 'raw';
  /** Taken after `before`. */
  readonly hasSnapshot: boolean;
}

export interface Step {
  readonly type: 'write' | 'zero' | 'zeroUnmap' | 'discard' | 'flush' | 'compress' | 'read';
  /** Parts of the disk, of 1000. */
  readonly start: number;
  readonly length: number;
  /** To whole clusters. */
  readonly isAligned: boolean;
  readonly pattern: number;
}

export interface DifferentialCase {
  readonly image: ImageCase;
  /** By qemu-io, to both. */
  readonly before: readonly Step[];
  /** By us to one, by qemu-io to the other. */
  readonly steps: readonly Step[];
  /** Requests that do not touch one another are made at once. */
  readonly together: boolean;
}

const image: fc.Arbitrary<ImageCase> = fc
  .record({
    compat: fc.constantFrom('0.10' as const, '1.1' as const, '1.1' as const, '1.1' as const),
    clusterBytes: fc.constantFrom(512, 1024, 4096, 16384, 65536, 65536, 2 ** 18, 2 ** 21),
    refcountBits: fc.constantFrom(1, 2, 4, 8, 16, 16, 16, 32, 64),
    isExtended: fc.boolean(),
    compression: fc.constantFrom('zlib' as const, 'zstd' as const),
    preallocation: fc.constantFrom(
      'off' as const,
      'off' as const,
      'off' as const,
      'metadata' as const,
      'falloc' as const,
      'full' as const,
    ),
    sectors: fc.integer({ min: 1, max: 8000 }),
    backing: fc.option(
      fc.record({
        format: fc.constantFrom('raw' as const, 'qcow2' as const),
        sectors: fc.integer({ min: 1, max: 9000 }),
      }),
      { freq: 2 },
    ),
    isNamed: fc.boolean(),
    dataFile: fc.constantFrom('none' as const, 'none' as const, 'none' as const, 'plain' as const, 'raw' as const),
    hasSnapshot: fc.boolean(),
  })
  .map((raw) => {
    const isV2 = raw.compat === '0.10';
    const dataFile = isV2 ? ('none' as const) : raw.dataFile;
    // A counter of one bit cannot count a snapshot.
    const hasSnapshot = raw.hasSnapshot && dataFile === 'none' && (isV2 || raw.refcountBits > 1);
    const backing = dataFile === 'raw' ? null : raw.backing;
    return {
      ...raw,
      refcountBits: isV2 ? 16 : raw.refcountBits,
      isExtended: raw.isExtended && !isV2 && raw.clusterBytes >= 16384,
      compression: isV2 ? ('zlib' as const) : raw.compression,
      dataFile,
      backing,
      preallocation: backing === null ? raw.preallocation : ('off' as const),
      sectors: raw.clusterBytes < 4096 ? Math.ceil(raw.sectors / 4) : raw.sectors,
      hasSnapshot,
    };
  });

const step = (types: readonly Step['type'][]): fc.Arbitrary<Step> =>
  fc.record({
    type: fc.constantFrom(...types),
    start: fc.integer({ min: 0, max: 999 }),
    length: fc.oneof(fc.integer({ min: 0, max: 20 }), fc.integer({ min: 0, max: 400 })),
    isAligned: fc.boolean(),
    pattern: fc.integer({ min: 1, max: 255 }),
  });

const script = (types: readonly Step['type'][]): fc.Arbitrary<Step[]> =>
  fc.array(step(types), { minLength: 1, maxLength: 25 });

export const differentialCase: fc.Arbitrary<DifferentialCase> = fc.record({
  image,
  before: fc.array(step(['write', 'write', 'zero', 'discard', 'compress']), { maxLength: 8 }),
  steps: fc.oneof(
    { weight: 4, arbitrary: script(['write', 'write', 'write', 'zero', 'zeroUnmap', 'discard', 'flush', 'read']) },
    { weight: 1, arbitrary: script(['write', 'write', 'write', 'flush', 'read']) },
  ),
  together: fc.boolean(),
});

/** A step as sectors of the disk. */
interface Range {
  readonly offset: number;
  readonly length: number;
}

function rangeOf({ start, length, isAligned, type }: Step, { sectors, clusterBytes, isExtended }: ImageCase): Range {
  const sizeBytes = sectors * SECTOR;
  // Compressed writes are whole clusters, and QEMU discards none of their parts.
  const unit = isAligned || type === 'compress' || (type === 'discard' && isExtended) ? clusterBytes : SECTOR;
  const first = Math.floor(((start / 1000) * sizeBytes) / unit) * unit;
  const end = Math.min(sizeBytes, first + Math.max(1, Math.ceil(((length / 1000) * sizeBytes) / unit)) * unit);
  return { offset: first, length: type === 'compress' ? Math.min(clusterBytes, end - first) : end - first };
}

function qemuCommand(action: Step, range: Range): string {
  const where = `${range.offset} ${range.length}`;
  switch (action.type) {
    case 'write':
      return `write -P ${action.pattern} ${where}`;
    case 'zero':
      return `write -z ${where}`;
    case 'zeroUnmap':
      return `write -z -u ${where}`;
    case 'discard':
      return `discard ${where}`;
    case 'compress':
      return `write -c -P ${action.pattern} ${where}`;
    case 'flush':
      return 'flush';
    case 'read':
      return `read ${where}`;
  }
}

/** Throws when we and QEMU come to different things. */
export function runDifferential({ image: options, before, steps, together }: DifferentialCase): void {
  const qemu = new QemuImg();
  try {
    makeImages(qemu, options, before);
    // Now and then QEMU 7.2 itself damages an image with compressed clusters of 512 bytes.
    fc.pre(qemu.check('theirs').status === 0);
    const { data } = qemu.info('theirs')['format-specific'] as { readonly data: { readonly corrupt?: boolean } };
    fc.pre(data.corrupt !== true);
    copyFileSync(qemu.path('theirs'), qemu.path('ours'));
    if (options.dataFile !== 'none') {
      copyFileSync(qemu.path('theirs.data'), qemu.path('ours.data'));
      qemu.run('amend', '-f', 'qcow2', '-o', 'data_file=ours.data', 'ours');
    }
    perform(qemu, options, steps, together);
    qemu.io('theirs', ...steps.map((action) => qemuCommand(action, rangeOf(action, options))), 'flush');
    expectSame(qemu);
    // What QEMU made of it we read as QEMU does.
    expectSameBytes(qemu, options);
    // How zeroes and discarded clusters are kept is up to each, and whether subclusters that hold nothing are copied.
    const isOfBoth = !options.isExtended && steps.every(({ type }) => ['write', 'flush', 'read'].includes(type));
    expectSameMap(qemu, isOfBoth);
  } finally {
    qemu.remove();
  }
}

function makeImages(qemu: QemuImg, options: ImageCase, before: readonly Step[]): void {
  const { backing, compat, clusterBytes, refcountBits, isExtended, compression, preallocation, sectors } = options;
  const words = [`compat=${compat}`, `cluster_size=${clusterBytes}`, `preallocation=${preallocation}`];
  if (compat === '1.1') {
    words.push(
      `refcount_bits=${refcountBits}`,
      `extended_l2=${isExtended ? 'on' : 'off'}`,
      `compression_type=${compression}`,
    );
  }
  if (options.dataFile !== 'none') {
    words.push('data_file=theirs.data', `data_file_raw=${options.dataFile === 'raw' ? 'on' : 'off'}`);
  }
  if (backing !== null) makeBacking(qemu, backing.format, backing.sectors);
  const below = backing === null ? [] : ['-b', 'below', '-F', backing.format];
  qemu.run('create', '-q', '-f', 'qcow2', '-o', words.join(), ...below, 'theirs', String(sectors * SECTOR));
  // QEMU refuses to compress what is there already.
  if (before.length > 0) qemu.tryIo('theirs', ...before.map((action) => qemuCommand(action, rangeOf(action, options))));
  // A counter may be too narrow for it.
  if (options.hasSnapshot) qemu.try('snapshot', '-c', 'before', 'theirs');
}

function makeBacking(qemu: QemuImg, format: 'raw' | 'qcow2', sectors: number): void {
  const bytes = Buffer.alloc(sectors * SECTOR);
  // Data and holes in turn.
  for (let at = 0; at < sectors; at++) if (at % 97 < 60) bytes.fill((at % 255) + 1, at * SECTOR, (at + 1) * SECTOR);
  writeFileSync(qemu.path('below.raw'), bytes);
  if (format === 'raw') copyFileSync(qemu.path('below.raw'), qemu.path('below'));
  else qemu.run('convert', '-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=4096', 'below.raw', 'below');
}

/** The bdevs of an image, and what it is backed by. */
function stackOf(qemu: QemuImg, options: ImageCase, name: string, readOnly: boolean): BdevConfig[] {
  const { backing, dataFile, isNamed } = options;
  const file = (fileName: string, bdev: string, isReadOnly: boolean): UringConfig => ({
    ...uringDefaults,
    name: bdev,
    path: qemu.path(fileName),
    readOnly: isReadOnly,
  });
  const image = file(name, 'file', readOnly);
  if (isNamed) return [image, qcow2On({ readOnly, imageDir: qemu.folder })('disk', 'file')];
  const configs: BdevConfig[] = dataFile === 'none' ? [] : [file(`${name}.data`, 'data', readOnly)];
  if (backing !== null) {
    configs.push(file('below', 'below', true));
    if (backing.format === 'qcow2') configs.push(qcow2On({ readOnly: true })('belowImage', 'below'));
  }
  const below = backing === null ? null : configs.at(-1)!.name;
  const data = dataFile === 'none' ? null : 'data';
  return [...configs, image, qcow2On({ backing: below, dataFile: data, readOnly })('disk', 'file')];
}

function perform(qemu: QemuImg, options: ImageCase, steps: readonly Step[], together: boolean): void {
  const disk = new Disk(new Rig('differential'), stackOf(qemu, options, 'ours', false));
  let underWay: { readonly request: Request; readonly range: Range }[] = [];
  const finish = (): void => {
    disk.finish(...underWay.map(({ request }) => request));
    for (const { request } of underWay) {
      if (request.status !== IoStatus.success)
        throw new Error(`request of type ${request.io.type}: errno ${request.errno}`);
    }
    underWay = [];
    disk.forget();
  };
  for (const action of steps) {
    const range = rangeOf(action, options);
    const overlaps = underWay.some(
      ({ range: other }) => other.offset < range.offset + range.length && range.offset < other.offset + other.length,
    );
    if (!together || overlaps) finish();
    underWay.push({ request: submit(disk, action, range), range });
  }
  finish();
  disk.close();
}

function submit(disk: Disk, { type, pattern }: Step, { offset, length }: Range): Request {
  switch (type) {
    case 'write':
    case 'compress':
      return disk.startWrite(offset, Buffer.alloc(length, pattern));
    case 'zero':
      return disk.start(IoType.writeZeroes, offset, length);
    case 'zeroUnmap':
      return disk.start(IoType.writeZeroes, offset, length, IoFlag.unmap);
    case 'discard':
      return disk.start(IoType.discard, offset, length);
    case 'flush':
      return disk.start(IoType.flush, 0, 0);
    case 'read':
      return disk.start(IoType.read, offset, length);
  }
}

function expectSame(qemu: QemuImg): void {
  for (const name of ['ours', 'theirs']) {
    const report = qemu.check(name);
    if (report.status !== 0) throw new Error(`qemu-img check of ${name}: ${JSON.stringify(report)}`);
  }
  const compared = qemu.try('compare', '-f', 'qcow2', '-F', 'qcow2', 'ours', 'theirs');
  if (compared.status !== 0) throw new Error(`qemu-img compare: ${compared.stdout}${compared.stderr}`);
}

function expectSameBytes(qemu: QemuImg, options: ImageCase): void {
  for (const name of ['ours', 'theirs']) {
    qemu.run('convert', '-f', 'qcow2', '-O', 'raw', name, `${name}.raw`);
    const expected = readFileSync(qemu.path(`${name}.raw`));
    const disk = new Disk(new Rig('differential'), stackOf(qemu, options, name, true));
    const found = disk.read(0, disk.sizeBytes);
    disk.close();
    const at = found.findIndex((byte, i) => byte !== expected[i]);
    if (at >= 0 || found.length !== expected.length) {
      throw new Error(`${name}: byte ${at} is ${found[at]}, QEMU reads ${expected[at]}`);
    }
  }
}

function expectSameMap(qemu: QemuImg, isOfBoth: boolean): void {
  const [ours, theirs] = ['ours', 'theirs'].map((name) => {
    const expected = JSON.parse(qemu.run('map', '-f', 'qcow2', '--output', 'json', name)) as MapEntry[];
    const chain = openChain({ path: qemu.path(name), format: 'qcow2' });
    const found = [...entriesOf(chain, { start: 0 })];
    closeChain(chain);
    expect(found, `the map of ${name}`).toEqual(asFarAsMapped(expected));
    return found.map(({ start, length, depth, zero }) => ({ start, length, depth, zero }));
  });
  if (isOfBoth) expect(joined(ours!), 'the map of both').toEqual(joined(theirs!));
}

/** In images that look preallocated QEMU also says which mapped clusters are holes of the file: data and zero. */
function asFarAsMapped(entries: readonly MapEntry[]): MapEntry[] {
  const result: MapEntry[] = [];
  for (const entry of entries) {
    const mapped = { ...entry, zero: entry.zero && !entry.data };
    const last = result.at(-1);
    const isNext =
      last?.data === true && mapped.data && last.depth === mapped.depth && last.offset! + last.length === mapped.offset;
    if (isNext) last.length += mapped.length;
    else result.push(mapped);
  }
  return result;
}

type Visible = Pick<MapEntry, 'start' | 'length' | 'depth' | 'zero'>;

/** Neighbours that only lie elsewhere are one. */
function joined(entries: readonly Visible[]): Visible[] {
  const result: Visible[] = [];
  for (const entry of entries) {
    const last = result.at(-1);
    if (last?.depth === entry.depth && last.zero === entry.zero)
      result[result.length - 1] = { ...last, length: last.length + entry.length };
    else result.push(entry);
  }
  return result;
}
