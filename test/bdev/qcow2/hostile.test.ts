/**
 * Goal: an image that is damaged or hostile anywhere in its metadata is refused with an error that names the field, or is found out
 * when the damage is met: then that request fails, the image is marked and takes no more writes, and what is not damaged is still
 * read right. Never a crash, a hang, memory or descriptors that stay behind.
 *
 * Method: images made by QEMU, with every field of the metadata set to bad values, one by one, and with bytes changed at random;
 * each is opened, read, written, discarded, flushed and closed.
 */
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { Random } from '../../../src/poller/clock.js';
import { Disk } from '../../support/disk.js';
import type { Request } from '../../support/disk.js';
import { openDescriptors } from '../../support/descriptors.js';
import { Rig } from '../../support/rig.js';
import { seed, seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';
import { headerOf } from './plain-reader.js';
import { ImageFolder, clusterBytesOf, qemuImg, qemuIo } from './qemu-images.js';

const SIZE = 2 ** 20;
const PIECE = 16384;
const MUTATIONS = 250;
const WITHIN = { timeout: 120_000 };
const INCOMPATIBLE_AT = 72;
const CORRUPT = 2;
/** Reactor steps that anything may take. */
const STEPS_MAX = 200_000;

const folder = new ImageFolder();
/** A damaged image keeps the log of its session. */
const memory = mkdtempSync('/dev/shm/strata-test-');
afterAll(() => {
  folder.remove();
  rmSync(memory, { recursive: true });
});

interface Victim {
  readonly options: string;
  readonly bytes: Buffer;
  /** What the disk holds. */
  readonly model: Buffer;
}

/** Data in its first half, a snapshot, a bitmap, compressed clusters, zeroes; the last quarter is free. */
function makeVictim(options: string): Victim {
  const path = folder.of('victim');
  const isV2 = options.includes('compat=0.10');
  qemuImg('create', '-q', '-f', 'qcow2', '-o', options, path, String(SIZE));
  qemuIo(path, 'write -P 1 0 128k', 'write -P 2 300k 60k');
  qemuImg('snapshot', '-c', 'before', path);
  qemuIo(path, 'write -P 3 64k 100k', ...(isV2 ? [] : ['write -z 256k 32k']), 'write -c -P 4 512k 64k');
  if (!isV2) qemuImg('bitmap', '--add', path, 'changes');
  qemuImg('convert', '-f', 'qcow2', '-O', 'raw', path, `${path}.raw`);
  return { options, bytes: readFileSync(path), model: readFileSync(`${path}.raw`) };
}

const VICTIMS = ['cluster_size=4096', 'cluster_size=16384,extended_l2=on', 'compat=0.10'].map(makeVictim);

interface Served {
  /** Why it was not opened. */
  readonly refusal: BdevError | null;
  readonly damage: string | null;
  /** Requests that failed, as ranges of the disk. */
  readonly failures: readonly (readonly [from: number, to: number])[];
  /** Pieces that were read as something else than the model. */
  readonly wrong: readonly number[];
  readonly after: Buffer;
}

/** Opens an image, uses all of its disk, and closes it. Throws when anything stays behind, or for any error that is no BdevError. */
function serve(bytes: Buffer, given: Buffer, use: (disk: Disk, model: Buffer) => Request[]): Served {
  const path = folder.write('served', bytes);
  for (const log of readdirSync(memory)) rmSync(join(memory, log));
  const rig = new Rig('hostile');
  const file = { ...uringDefaults, name: 'file', path, lock: false };
  let disk: Disk;
  try {
    disk = new Disk(rig, [file, qcow2On({ codecThreads: 0, restartDir: memory })('disk', 'file')]);
  } catch (error) {
    if (!(error instanceof BdevError)) throw error;
    rig.close();
    return { refusal: error, damage: null, failures: [], wrong: [], after: readFileSync(path) };
  }
  const model = Buffer.alloc(disk.sizeBytes);
  given.copy(model);
  const requests = use(disk, model);
  const wrong: number[] = [];
  for (let at = 0; at < disk.sizeBytes; at += PIECE) {
    const length = Math.min(PIECE, disk.sizeBytes - at);
    const read = disk.start(IoType.read, at, length);
    finish(disk, [read]);
    requests.push(read);
    if (read.status === IoStatus.success && !disk.gather(read).equals(model.subarray(at, at + length))) wrong.push(at);
    disk.forget();
  }
  const { damage } = disk.open.bdev.describe() as { damage: string | null };
  disk.close();
  const failures = requests
    .filter(({ status }) => status !== IoStatus.success)
    .map(({ io }) => [io.offsetBytes, io.offsetBytes + io.lengthBytes] as const);
  return { refusal: null, damage, failures, wrong, after: readFileSync(path) };
}

function finish(disk: Disk, requests: readonly Request[]): void {
  const start = disk.rig.steps;
  disk.rig.until(
    () => disk.rig.steps - start > STEPS_MAX || requests.every(({ completions }) => completions > 0),
    'requests',
  );
  for (const { completions } of requests) expect(completions).toBe(1);
}

/** Writes to what is free, to what is shared with the snapshot, to what is compressed; zeroes and discards. */
function useAll(disk: Disk, model: Buffer): Request[] {
  const done: Request[] = [];
  const run = (type: IoType, at: number, length: number, value: number): void => {
    if (at + length > disk.sizeBytes) return;
    const data = Buffer.alloc(length, value);
    const request = type === IoType.write ? disk.startWrite(at, data) : disk.start(type, at, length);
    finish(disk, [request]);
    disk.forget();
    done.push(request);
    if (request.status === IoStatus.success) data.copy(model, at);
  };
  run(IoType.write, 800 * 1024, 20 * 1024, 7);
  run(IoType.write, 10 * 1024, 6 * 1024, 8);
  run(IoType.write, 520 * 1024, 512, 9);
  run(IoType.writeZeroes, 320 * 1024, 16 * 1024, 0);
  run(IoType.write, 900 * 1024, 40 * 1024, 10);
  const flush = disk.start(IoType.flush, 0, 0);
  finish(disk, [flush]);
  run(IoType.write, 700 * 1024, 4096, 11);
  return [...done, flush];
}

interface Field {
  readonly name: string;
  readonly at: number;
  readonly bytes: 2 | 4 | 8;
  /** What an error may name. */
  readonly named: RegExp;
  /** What of the disk it is about: it may be read as something else, or not at all. Nothing when left out. */
  readonly about?: readonly [from: number, to: number];
}

const hostAt = (bytes: Buffer, at: number): number => Number(bytes.readBigUInt64BE(at) & 0x00fffffffffffe00n);

function fieldsOf({ bytes, options }: Victim): Field[] {
  const header = headerOf(bytes);
  const clusterBytes = clusterBytesOf(options);
  const entryBytes = options.includes('extended_l2=on') ? 16 : 8;
  const coverage = (clusterBytes / entryBytes) * clusterBytes;
  const any = /./;
  const fields: Field[] = [
    { name: 'version', at: 4, bytes: 4, named: any },
    { name: 'backing_file_offset', at: 8, bytes: 8, named: /backing|extension/ },
    { name: 'backing_file_size', at: 16, bytes: 4, named: /backing/ },
    { name: 'cluster_bits', at: 20, bytes: 4, named: any },
    { name: 'size', at: 24, bytes: 8, named: /size|snapshots|bitmap/ },
    { name: 'crypt_method', at: 32, bytes: 4, named: /crypt_method/ },
    { name: 'l1_size', at: 36, bytes: 4, named: /l1|refcount_table|snapshots|bitmap/ },
    { name: 'l1_table_offset', at: 40, bytes: 8, named: /l1|refcount|snapshots|bitmap/, about: [0, SIZE] },
    { name: 'refcount_table_offset', at: 48, bytes: 8, named: /refcount|l1|snapshots/ },
    { name: 'refcount_table_clusters', at: 56, bytes: 4, named: /refcount|l1|snapshots|bitmap/ },
    { name: 'nb_snapshots', at: 60, bytes: 4, named: /snapshots/ },
    { name: 'snapshots_offset', at: 64, bytes: 8, named: /snapshots/ },
    { name: 'refcount_table[0]', at: header.refcountTableOffset, bytes: 8, named: /refcount/ },
    { name: 'l1[0]', at: header.l1Offset, bytes: 8, named: /l1|refcount|snapshots|bitmap/, about: [0, coverage] },
  ];
  if (header.version === 3) {
    fields.push(
      { name: 'incompatible_features', at: 72, bytes: 8, named: any },
      { name: 'refcount_order', at: 96, bytes: 4, named: /refcount_order/ },
      { name: 'header_length', at: 100, bytes: 4, named: any },
    );
  }
  // Counters of 16 bits: clusters of metadata that are said to be free.
  const counters = hostAt(bytes, header.refcountTableOffset);
  for (const offset of [0, header.l1Offset, header.refcountTableOffset]) {
    const cluster = offset / clusterBytes;
    fields.push({ name: `refcounts[${cluster}]`, at: counters + 2 * cluster, bytes: 2, named: /refcount/ });
  }
  const l2 = hostAt(bytes, header.l1Offset);
  // Data, data that is shared, zeroes or nothing, compressed, free.
  for (const kib of [0, 64, 160, 256, 300, 512, 800]) {
    const cluster = Math.floor((kib * 1024) / clusterBytes);
    const at = l2 + (cluster % (clusterBytes / entryBytes)) * entryBytes;
    const about = [cluster * clusterBytes, (cluster + 1) * clusterBytes] as const;
    fields.push({ name: `l2[${cluster}]`, at, bytes: 8, named: /l2/, about });
    if (entryBytes === 16) fields.push({ name: `l2[${cluster}] bitmap`, at: at + 8, bytes: 8, named: /l2/, about });
  }
  const snapshot = header.snapshotTableOffset;
  fields.push(
    { name: 'snapshots[0].l1_table_offset', at: snapshot, bytes: 8, named: /snapshots|refcount|l1/ },
    { name: 'snapshots[0].l1_size', at: snapshot + 8, bytes: 4, named: /snapshots|refcount|l1/ },
    { name: 'snapshots[0].id_str_size', at: snapshot + 12, bytes: 2, named: /snapshots/ },
    { name: 'snapshots[0].name_size', at: snapshot + 14, bytes: 2, named: /snapshots/ },
    { name: 'snapshots[0].extra_data_size', at: snapshot + 36, bytes: 4, named: /snapshots/ },
  );
  if (header.bitmaps !== null) {
    const extension = bytes.indexOf(Buffer.from('23852875', 'hex')) + 8;
    const { directoryOffset } = header.bitmaps;
    fields.push(
      { name: 'nb_bitmaps', at: extension, bytes: 4, named: /bitmap/ },
      { name: 'bitmap_directory_size', at: extension + 8, bytes: 8, named: /bitmap/ },
      { name: 'bitmap_directory_offset', at: extension + 16, bytes: 8, named: /bitmap/ },
      { name: 'bitmaps[0].bitmap_table_offset', at: directoryOffset, bytes: 8, named: /bitmap|refcount|l1/ },
      { name: 'bitmaps[0].bitmap_table_size', at: directoryOffset + 8, bytes: 4, named: /bitmap/ },
      { name: 'bitmaps[0].type', at: directoryOffset + 16, bytes: 2, named: /bitmap/ },
      { name: 'bitmaps[0].name_size', at: directoryOffset + 18, bytes: 2, named: /bitmap/ },
      { name: 'bitmaps[0].extra_data_size', at: directoryOffset + 20, bytes: 4, named: /bitmap/ },
    );
  }
  return fields;
}

function valuesFor({ bytes: image, options }: Victim, { name, at, bytes }: Field): bigint[] {
  const header = headerOf(image);
  const clusterBytes = BigInt(clusterBytesOf(options));
  const refcountTable = BigInt(header.refcountTableOffset);
  const all = (1n << BigInt(8 * bytes)) - 1n;
  const old = BigInt(`0x${image.subarray(at, at + bytes).toString('hex')}`);
  const common = [0n, 1n, old + 1n, old ^ 512n, old + clusterBytes, all >> 1n, (all >> 1n) + 1n, all, all - 511n];
  const places =
    bytes < 8
      ? []
      : [
          BigInt(header.l1Offset),
          refcountTable,
          BigInt(hostAt(image, header.refcountTableOffset)),
          BigInt(hostAt(image, header.l1Offset)),
          BigInt(header.snapshotTableOffset),
          BigInt(at) - (BigInt(at) % clusterBytes),
          BigInt(image.length) + clusterBytes * 1000n,
        ];
  // Entries of the mapping say more than an offset: copied, compressed.
  const flags = name.startsWith('l1[') ? [0n, 1n << 63n] : /^l2.*]$/.test(name) ? [0n, 1n << 63n, 1n << 62n] : [0n];
  const values = [...common, ...flags.flatMap((flag) => places.map((place) => place | flag))];
  return [...new Set(values.map((value) => value & all))].filter((value) => value !== old);
}

/** What is wrong with how a damaged image was served, in words. */
function complaints(served: Served, field: Field, isV3: boolean): string[] {
  const { refusal, damage, failures, wrong, after } = served;
  if (refusal !== null)
    return field.named.test(refusal.field) ? [] : [`refused for ${refusal.field}: ${refusal.message}`];
  const [from, to] = field.about ?? [0, 0];
  const isElsewhere = (start: number, end: number): boolean => end <= from || start >= to;
  const found = wrong.filter((at) => isElsewhere(at, at + PIECE)).map((at) => `wrong data at ${at}`);
  // What does not decompress is no damage of the image's metadata.
  const unexplained = failures.filter(([start, end]) => isElsewhere(start, end));
  if (unexplained.length > 0 && damage === null)
    found.push(`${unexplained.length} requests failed, and it does not say why`);
  if (damage !== null && isV3 && (after[INCOMPATIBLE_AT + 7]! & CORRUPT) === 0) found.push(`not marked: ${damage}`);
  return found;
}

it.each(VICTIMS.map((victim) => [victim.options, victim] as const))(
  'every field of %s with a bad value is refused or found out',
  WITHIN,
  (_options, victim) => {
    const isV3 = !victim.options.includes('0.10');
    const found: string[] = [];
    // What all disks share is made by now.
    serve(victim.bytes, victim.model, useAll);
    const descriptors = openDescriptors().length;
    const counts = { refused: 0, foundOut: 0, harmless: 0 };
    for (const field of fieldsOf(victim)) {
      for (const value of valuesFor(victim, field)) {
        const bytes = Buffer.from(victim.bytes);
        bytes.write(value.toString(16).padStart(field.bytes * 2, '0'), field.at, 'hex');
        let words: string[];
        try {
          const served = serve(bytes, victim.model, useAll);
          words = complaints(served, field, isV3);
          if (served.refusal !== null) counts.refused++;
          else if (served.damage !== null) counts.foundOut++;
          else counts.harmless++;
        } catch (error) {
          words = [(error as Error).stack ?? String(error)];
        }
        found.push(...words.slice(0, 2).map((text) => `${field.name} = 0x${value.toString(16)}: ${text}`));
      }
    }
    console.log(`${victim.options}: ${JSON.stringify(counts)}`);
    expect(found).toEqual([]);
    expect(openDescriptors()).toHaveLength(descriptors);
    expect(counts.refused).toBeGreaterThan(50);
    expect(counts.foundOut).toBeGreaterThan(10);
  },
);

it('metadata with bytes changed at random does no harm to the process', WITHIN, () => {
  const random = seededRandom(18);
  const counts = { refused: 0, foundOut: 0, harmless: 0 };
  serve(VICTIMS[0]!.bytes, VICTIMS[0]!.model, useAll);
  const descriptors = openDescriptors().length;
  for (let n = 0; n < MUTATIONS; n++) {
    const victim = VICTIMS[random.below(VICTIMS.length)]!;
    const bytes = Buffer.from(victim.bytes);
    const places = placesOf(victim);
    for (let left = random.below(4); left >= 0; left--) {
      const at = Math.min(
        bytes.length - 1,
        places[random.below(places.length)]! + random.below(random.below(2) === 0 ? 16 : 160),
      );
      bytes[at] = random.below(2) === 0 ? random.below(256) : bytes[at]! ^ (1 << random.below(8));
    }
    try {
      const { refusal, damage } = serve(bytes, victim.model, (disk) => useAtRandom(disk, random));
      if (refusal !== null) expect(refusal.field).not.toBe('');
      counts[refusal !== null ? 'refused' : damage !== null ? 'foundOut' : 'harmless']++;
    } catch (error) {
      throw new Error(`STRATA_SEED=${seed}, case ${n}, ${victim.options}`, { cause: error });
    }
  }
  console.log(JSON.stringify(counts));
  expect(openDescriptors()).toHaveLength(descriptors);
  for (const count of Object.values(counts)) expect(count).toBeGreaterThan(0);
});

/** Where metadata lies. */
function placesOf({ bytes }: Victim): number[] {
  const { l1Offset, refcountTableOffset, snapshotTableOffset, bitmaps } = headerOf(bytes);
  const tables = [0, l1Offset, refcountTableOffset, snapshotTableOffset, bitmaps?.directoryOffset ?? 0];
  return [...tables, hostAt(bytes, l1Offset), hostAt(bytes, l1Offset), hostAt(bytes, refcountTableOffset)];
}

/** Several requests at a time. */
function useAtRandom(disk: Disk, random: Random): Request[] {
  const done: Request[] = [];
  const sectors = disk.sizeBytes / 512;
  for (let round = 0; round < 6; round++) {
    const together = Array.from({ length: 4 }, () => {
      const type = [IoType.read, IoType.write, IoType.write, IoType.writeZeroes, IoType.discard, IoType.flush][
        random.below(6)
      ]!;
      if (type === IoType.flush) return disk.start(type, 0, 0);
      const at = random.below(sectors) * 512;
      const length = Math.min(disk.sizeBytes - at, 512 * (1 + random.below(100)));
      return type === IoType.write ? disk.startWrite(at, Buffer.alloc(length, 99)) : disk.start(type, at, length);
    });
    finish(disk, together);
    disk.forget();
    done.push(...together);
  }
  return done;
}
