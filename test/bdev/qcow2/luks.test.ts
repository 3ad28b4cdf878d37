/**
 * Goal: images that QEMU encrypted are unlocked and their sectors decrypted, QEMU opens headers that we make and key slots that we add, keys that
 * are removed open nothing, and a hostile header is refused before anything is done by it.
 *
 * Method: images of qemu-img with every cipher and hash there is; sectors are decrypted by jobs and compared with the data that qemu-img was
 * given, and encrypted again and compared with the file.
 */
import { execFileSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GCProfiler } from 'node:v8';
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { CodecJob, CodecOperation, CodecStatus, InlineCodec } from '../../../src/bdev/qcow2/codec/codec-job.js';
import type { CodecOwner, CodecPool } from '../../../src/bdev/qcow2/codec/codec-job.js';
import { SyncCodecPool } from '../../../src/bdev/qcow2/codec/sync-codec-pool.js';
import { ThreadCodecPool } from '../../../src/bdev/qcow2/codec/thread-codec-pool.js';
import { CREATE_DEFAULTS, createImage } from '../../../src/bdev/qcow2/create.js';
import { CryptMethod, clusterBytesOf, decodeHeader, firstClusterBytes } from '../../../src/bdev/qcow2/format.js';
import type { Qcow2Header } from '../../../src/bdev/qcow2/format.js';
import {
  LUKS_DEFAULTS,
  addPassphrase,
  createLuks,
  readLuksHeader,
  removePassphrase,
  unlockLuks,
} from '../../../src/bdev/qcow2/luks.js';
import type { LuksOptions, LuksPlace, UnlockedLuks } from '../../../src/bdev/qcow2/luks.js';
import { inlineKeyWork, iterationsIn } from '../../../src/bdev/qcow2/luks/key-work.js';
import type { KeyWork } from '../../../src/bdev/qcow2/luks/key-work.js';
import {
  LUKS_HEADER_BYTES,
  LUKS_SECTOR_BYTES,
  decodeLuksHeader,
  encodeLuksHeader,
} from '../../../src/bdev/qcow2/luks/luks-format.js';
import { LEGACY_AES, SectorCipher, cipherSpec, legacyKey } from '../../../src/bdev/qcow2/luks/sector-cipher.js';
import { startTask } from '../../../src/bdev/task.js';
import { SystemClock } from '../../../src/poller/clock.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
import { expectBytes } from '../../support/bytes.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { SimClock } from '../../support/sim-clock.js';
import { mixedData } from './compressed-image.js';

// QEMU measures how fast the machine is by keeping it busy, which others may do, too.
vi.setConfig({ testTimeout: 120_000 });
// A sanitizer's runtime, where the tests are run with one, is for this process and not for qemu-img.
delete process.env['LD_PRELOAD'];

const PASSWORD = 'correct horse';
const DISK_BYTES = 512 * 1024;
const MUTANTS = 20_000;

const folder = mkdtempSync(join(tmpdir(), 'strata-luks-'));
afterAll(() => rmSync(folder, { recursive: true }));
const data = mixedData(DISK_BYTES, 1);
const raw = join(folder, 'data.raw');
writeFileSync(raw, data);
const clock = new SystemClock();

const secret = (id: string, text: string): string[] => ['--object', `secret,id=${id},data=${text}`];
const opened = (path: string): string => `driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=${path}`;

const QUICK = 'iter-time=10';
/** QEMU measures for seconds how fast it is, and cannot always: images are made once, and again when it could not. */
const ATTEMPTS = 10;

/** @param options of `qemu-img -o encrypt.*`, without that prefix */
function qemuImage(name: string, format: string, options: readonly string[]): string {
  const path = join(folder, `${name}.qcow2`);
  const all = [`format=${format}`, 'key-secret=s', ...options].map((option) => `encrypt.${option}`);
  qemuImg(['convert', ...secret('s', PASSWORD), '-f', 'raw', '-O', 'qcow2', '-o', all.join(','), raw, path]);
  return path;
}

function qemuImg(args: readonly string[]): void {
  for (let attempt = 1; ; attempt++) {
    try {
      execFileSync('qemu-img', args, { stdio: ['ignore', 'ignore', 'pipe'] });
      return;
    } catch (error) {
      if (attempt === ATTEMPTS || !String(error).includes('accurate CPU usage')) throw error;
    }
  }
}

let original: string | null = null;
/** A copy of an image that QEMU encrypted as it does by default. */
function defaultImage(name: string): string {
  original ??= qemuImage('original', 'luks', [QUICK]);
  const path = join(folder, `${name}.qcow2`);
  copyFileSync(original, path);
  return path;
}

/** What is on the disk, as QEMU reads it. Throws when QEMU does not open it. */
function qemuRead(path: string, password: string): Buffer {
  const out = join(folder, 'read.raw');
  const args = [...secret('s', password), '--image-opts', opened(path), '-O', 'raw', out];
  execFileSync('qemu-img', ['convert', ...args], { stdio: ['ignore', 'ignore', 'pipe'] });
  return readFileSync(out);
}

function headerOf(path: string): Qcow2Header {
  const file = readFileSync(path);
  return decodeHeader(file.subarray(0, firstClusterBytes(file)), file.length);
}

/** Runs something over the file of an image. */
function withImage<T>(path: string, then: (file: NodeFile, place: LuksPlace) => T): T {
  const file = new NodeFile(path, { mode: 'write' });
  try {
    return then(file, headerOf(path).luksHeader!);
  } finally {
    file.close();
  }
}

function unlock(path: string, password: string): UnlockedLuks {
  return withImage(path, (file, place) => runTask(unlockLuks(file, place, Buffer.from(password), inlineKeyWork)));
}

/** Host offset of each data cluster that has one, by its offset in the disk. */
function dataClusters(path: string): Map<number, number> {
  const header = headerOf(path);
  const file = readFileSync(path);
  const clusterBytes = clusterBytesOf(header);
  const found = new Map<number, number>();
  const hostOffset = (at: number): number => Number(file.readBigUInt64BE(at) & 0x00fffffffffffe00n);
  for (let offset = 0; offset < header.sizeBytes; offset += clusterBytes) {
    const index = offset / clusterBytes;
    const table = hostOffset(header.l1Offset + Math.floor(index / (clusterBytes / 8)) * 8);
    const host = table === 0 ? 0 : hostOffset(table + (index % (clusterBytes / 8)) * 8);
    if (host !== 0) found.set(offset, host);
  }
  return found;
}

class Bench implements CodecOwner {
  readonly rig = new Rig('luks');
  readonly memory = this.rig.arena.allocate(4 * DISK_BYTES);
  done = 0;

  onCodecDone(): void {
    this.done++;
  }

  run(pool: CodecPool, operation: CodecOperation, cipher: SectorCipher, source: Buffer, sector: number): Buffer {
    const bytes = Buffer.from(this.rig.arena.buffer, this.memory, 4 * DISK_BYTES);
    source.copy(bytes);
    const job = new CodecJob(this);
    Object.assign(job, { operation, cipher: cipher.handle, sector, source: this.memory, sourceBytes: source.length });
    // In place, and to somewhere else.
    const to = operation === CodecOperation.encrypt ? 0 : 2 * DISK_BYTES;
    Object.assign(job, { destination: this.memory + to, capacityBytes: source.length });
    const before = this.done;
    pool.submit(job);
    while (this.done === before) this.rig.step();
    expect(job.status).toBe(CodecStatus.ok);
    expect(job.producedBytes).toBe(source.length);
    return Buffer.from(bytes.subarray(to, to + source.length));
  }

  close(): void {
    this.rig.arena.release(this.memory);
    this.rig.close();
  }
}

let bench: Bench;
beforeEach(() => (bench = new Bench()));
afterEach(() => bench.close());

/** Decrypts all data clusters of an image of `data`, and encrypts them again. */
function expectSectors(path: string, cipher: SectorCipher, sectorOf: (disk: number, host: number) => number): void {
  const file = readFileSync(path);
  const clusterBytes = clusterBytesOf(headerOf(path));
  const clusters = dataClusters(path);
  expect(clusters.size).toBeGreaterThan(DISK_BYTES / clusterBytes / 2);
  for (const make of [() => new SyncCodecPool(bench.rig.reactor), () => new ThreadCodecPool(bench.rig.reactor, 2)]) {
    const pool = make();
    for (const [disk, host] of clusters) {
      const encrypted = Buffer.from(file.subarray(host, host + clusterBytes));
      const expected = Buffer.from(data.subarray(disk, disk + clusterBytes));
      const sector = sectorOf(disk, host);
      const plain = bench.run(pool, CodecOperation.decrypt, cipher, encrypted, sector);
      expectBytes(plain, expected, `the cluster at ${disk}`);
      expectBytes(bench.run(pool, CodecOperation.encrypt, cipher, plain, sector), encrypted, `its place, ${host}`);
    }
    pool.close();
  }
}

describe('an image that QEMU encrypted', () => {
  it.each([
    ['by default', () => defaultImage('kind')],
    [
      'in mode cbc, with essiv and sha1',
      () =>
        qemuImage('kind', 'luks', [
          'cipher-mode=cbc',
          'ivgen-alg=essiv',
          'ivgen-hash-alg=sha256',
          'hash-alg=sha1',
          QUICK,
        ]),
    ],
  ])('is unlocked and decrypted: %s', (_, make) => {
    const path = make();
    const { spec, masterKey, slot } = unlock(path, PASSWORD);
    expect(slot).toBe(0);
    const cipher = new SectorCipher(spec, masterKey);
    // The key is copied: what was given may be wiped.
    masterKey.fill(0);
    expectSectors(path, cipher, (_, host) => host / LUKS_SECTOR_BYTES);
    cipher.close();
  });

  it('before there was LUKS is decrypted, by the sectors of the guest', () => {
    const path = qemuImage('legacy', 'aes', []);
    expect(headerOf(path).cryptMethod).toBe(CryptMethod.aes);
    const cipher = new SectorCipher(LEGACY_AES, legacyKey(Buffer.from(PASSWORD)));
    expectSectors(path, cipher, (disk) => disk / LUKS_SECTOR_BYTES);
    cipher.close();
  });

  it('stays locked for any other passphrase', () => {
    const path = defaultImage('locked');
    for (const wrong of ['', 'correct hors', `${PASSWORD}\n`]) {
      expect(() => unlock(path, wrong)).toThrow(expect.objectContaining({ code: 'wrong-passphrase' }));
    }
  });

  it('has its sectors numbered with 64 bits, or 32 of them, as its vectors say', () => {
    const pool = new SyncCodecPool(bench.rig.reactor);
    const key = Buffer.from(randomFillSync(new Uint8Array(32)));
    const plain64 = new SectorCipher(cipherSpec('aes', 'cbc-plain64', 32), key);
    const plain = new SectorCipher(cipherSpec('aes', 'cbc-plain', 32), key);
    const encrypt = (cipher: SectorCipher, sector: number): string =>
      bench.run(pool, CodecOperation.encrypt, cipher, Buffer.alloc(512), sector).toString('hex');
    const far = 2 ** 32 + 5;
    expect(encrypt(plain, far)).toBe(encrypt(plain, 5));
    expect(encrypt(plain64, far)).not.toBe(encrypt(plain64, 5));
    expect(encrypt(plain64, 5)).toBe(encrypt(plain, 5));
    // One job over the border is as two.
    const across = bench.run(pool, CodecOperation.encrypt, plain64, Buffer.alloc(1024), 2 ** 32 - 1);
    expect(across.subarray(512).toString('hex')).toBe(encrypt(plain64, 2 ** 32));
    plain.close();
    plain64.close();
    pool.close();
  });

  it('is unlocked on threads of Node, while others go on', async () => {
    const path = defaultImage('threads');
    const file = new NodeFile(path, { mode: 'read' });
    let turns = 0;
    let isOver = false;
    const turn = (): void => {
      turns++;
      if (!isOver) setImmediate(turn);
    };
    turn();
    const { masterKey } = await new Promise<UnlockedLuks>((resolve, reject) =>
      startTask(unlockLuks(file, headerOf(path).luksHeader!, Buffer.from(PASSWORD)), resolve, reject),
    );
    isOver = true;
    file.close();
    expect(masterKey.equals(unlock(path, PASSWORD).masterKey)).toBe(true);
    // At each derivation, and each time that some stripes are through.
    expect(turns).toBeGreaterThan(20);
  });
});

/** Makes an image with a header of ours. */
function ourImage(name: string, options: LuksOptions): string {
  const path = join(folder, `${name}.qcow2`);
  const { bytes, unlocked } = runTask(createLuks(options, Buffer.from(PASSWORD), clock, inlineKeyWork));
  const file = new NodeFile(path, { mode: 'create' });
  runTask(createImage(file, { ...CREATE_DEFAULTS, sizeBytes: DISK_BYTES, luksHeader: bytes }));
  file.close();
  expect(unlock(path, PASSWORD).masterKey.equals(unlocked.masterKey)).toBe(true);
  return path;
}

describe('an image that we encrypted', () => {
  it.each([
    ['as QEMU does by default', {}],
    ['aes-128, mode xts, plain, sha512', { cipherAlg: 'aes-128', ivgenAlg: 'plain', hashAlg: 'sha512' }],
    ['aes-256, mode xts, essiv, sha384', { ivgenAlg: 'essiv', hashAlg: 'sha384' }],
    ['aes-256, mode cbc, essiv, sha1', { cipherMode: 'cbc', ivgenAlg: 'essiv', hashAlg: 'sha1' }],
    ['aes-128, mode cbc, plain64, ripemd160', { cipherAlg: 'aes-128', cipherMode: 'cbc', hashAlg: 'ripemd160' }],
  ])('is opened and written by QEMU: %s', (_, options) => {
    const path = ourImage('ours', { ...LUKS_DEFAULTS, ...options, iterTimeMs: 10 });
    const args = [...secret('s', PASSWORD), '--image-opts', opened(path)];
    execFileSync('qemu-img', [
      'convert',
      '-n',
      '-f',
      'raw',
      ...secret('s', PASSWORD),
      '--target-image-opts',
      raw,
      opened(path),
    ]);
    expect(execFileSync('qemu-img', ['check', ...args], { encoding: 'utf8' })).toContain('No errors');
    const { spec, masterKey } = unlock(path, PASSWORD);
    const cipher = new SectorCipher(spec, masterKey);
    expectSectors(path, cipher, (_, host) => host / LUKS_SECTOR_BYTES);
    cipher.close();
  });

  it.each([
    [0.4, 2000, 5_000_000],
    [0.4, 10, 25_000],
    [0.4, 1, 2_500],
    [40, 10, 1_000],
    [0.0001, 60_000, 100_000_000],
  ])('takes as long to try a passphrase as was asked for: %d us a round, %d ms', (roundUs, ms, expected) => {
    const simulated = new SimClock();
    const work: KeyWork = {
      ...inlineKeyWork,
      *pbkdf2(_secret, _salt, iterations, keyBytes) {
        simulated.advance(iterations * roundUs);
        return Buffer.alloc(keyBytes);
      },
    };
    const iterations = runTask(iterationsIn(ms, 'sha256', 64, work, simulated));
    expect(iterations / expected).toBeCloseTo(1, 2);
  });

  it.each([
    ['cipher-alg', { cipherAlg: 'serpent-256' }],
    ['cipher-alg', { cipherAlg: 'aes-192' }],
    ['cipher-mode', { cipherMode: 'ecb' }],
    ['ivgen-alg', { ivgenAlg: 'zero' }],
    ['ivgen-hash-alg', { ivgenAlg: 'essiv', ivgenHashAlg: 'sha1' }],
    ['hash-alg', { hashAlg: 'md5' }],
    ['iter-time', { iterTimeMs: 0 }],
    ['iter-time', { iterTimeMs: NaN }],
  ])('is not made with an unknown encrypt.%s: %o', (option, options) => {
    const task = createLuks({ ...LUKS_DEFAULTS, ...options }, Buffer.from(PASSWORD), clock, inlineKeyWork);
    expect(() => runTask(task)).toThrow(expect.objectContaining({ code: 'bad-option', field: `encrypt.${option}` }));
  });
});

describe('passphrases', () => {
  const add = (path: string, by: string, password: string): number =>
    withImage(path, (file, place) => {
      const unlocked = runTask(unlockLuks(file, place, Buffer.from(by), inlineKeyWork));
      return runTask(addPassphrase(file, place, unlocked, Buffer.from(password), 10, clock, inlineKeyWork));
    });
  const remove = (path: string, password: string): void =>
    withImage(path, (file, place) => {
      const unlocked = runTask(unlockLuks(file, place, Buffer.from(password), inlineKeyWork));
      runTask(removePassphrase(file, place, unlocked));
    });

  it('that we add open the image for QEMU, and those that we remove do not', () => {
    const path = defaultImage('slots');
    expect(add(path, PASSWORD, 'second')).toBe(1);
    expectBytes(qemuRead(path, 'second'), data, 'the disk');
    remove(path, PASSWORD);
    expect(() => qemuRead(path, PASSWORD)).toThrow('Invalid password');
    expect(() => unlock(path, PASSWORD)).toThrow(expect.objectContaining({ code: 'wrong-passphrase' }));
    expectBytes(qemuRead(path, 'second'), data, 'the disk');
    expect(unlock(path, 'second').slot).toBe(1);
    expect(add(path, 'second', 'third')).toBe(0);
    expectBytes(qemuRead(path, 'third'), data, 'the disk');
  });

  it('that are removed leave nothing of their key behind', () => {
    const path = ourImage('gone', { ...LUKS_DEFAULTS, iterTimeMs: 1 });
    add(path, PASSWORD, 'second');
    const material = (): Buffer =>
      withImage(path, (file, place) => {
        const { slots } = runTask(readLuksHeader(file, place));
        const bytes = Buffer.alloc(256_000);
        file.readNow(place.offset + slots[1]!.materialSector * LUKS_SECTOR_BYTES, bytes);
        return bytes;
      });
    const before = material();
    remove(path, 'second');
    const after = material();
    const kept = before.filter((byte, i) => byte === after[i]).length;
    // As many as are the same by chance.
    expect(kept).toBeLessThan(before.length / 100);
  });

  it('that QEMU adds open the image for us', () => {
    const path = ourImage('amended', { ...LUKS_DEFAULTS, iterTimeMs: 1 });
    const options = 'encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=5,encrypt.iter-time=10';
    const args = [...secret('s', PASSWORD), ...secret('n', 'new'), '--image-opts', opened(path), '-o', options];
    qemuImg(['amend', ...args]);
    expect(unlock(path, 'new').slot).toBe(5);
  });

  it('are eight at most, and one at least', () => {
    const path = ourImage('full', { ...LUKS_DEFAULTS, iterTimeMs: 1 });
    expect(() => remove(path, PASSWORD)).toThrow(expect.objectContaining({ code: 'last-passphrase' }));
    for (let slot = 1; slot < 8; slot++) expect(add(path, PASSWORD, `number ${slot}`)).toBe(slot);
    expect(() => add(path, PASSWORD, 'one more')).toThrow(expect.objectContaining({ code: 'no-room' }));
    expect(unlock(path, 'number 7').slot).toBe(7);
  });
});

describe('a hostile header', () => {
  const made = runTask(createLuks({ ...LUKS_DEFAULTS, iterTimeMs: 1 }, Buffer.from(PASSWORD), clock, inlineKeyWork));
  const good = made.bytes.subarray(0, LUKS_HEADER_BYTES);
  const decode = (change: (bytes: Buffer) => void, placeBytes = made.bytes.length): void => {
    const bytes = Buffer.from(good);
    change(bytes);
    decodeLuksHeader(bytes, placeBytes);
  };

  it('is read and written back as it was when it is none', () => {
    expect(encodeLuksHeader(decodeLuksHeader(good, made.bytes.length)).equals(good)).toBe(true);
  });

  it.each([
    ['luks.length', () => undefined, 591],
    ['luks.magic', (b: Buffer) => b.writeUInt8(0, 0)],
    ['luks.version', (b: Buffer) => b.writeUInt16BE(2, 6)],
    ['luks.cipher_name', (b: Buffer) => b.writeUInt8(7, 8)],
    ['luks.key_bytes', (b: Buffer) => b.writeUInt32BE(0, 108)],
    ['luks.key_bytes', (b: Buffer) => b.writeUInt32BE(2 ** 31, 108)],
    ['luks.mk_digest_iter', (b: Buffer) => b.writeUInt32BE(0, 164)],
    ['luks.mk_digest_iter', (b: Buffer) => b.writeUInt32BE(2 ** 32 - 1, 164)],
    ['luks.key_slots[0].active', (b: Buffer) => b.writeUInt32BE(1, 208)],
    ['luks.key_slots[0].iterations', (b: Buffer) => b.writeUInt32BE(2 ** 32 - 1, 212)],
    ['luks.key_slots[0].stripes', (b: Buffer) => b.writeUInt32BE(2 ** 32 - 1, 208 + 44)],
    ['luks.key_slots[0].key_offset', (b: Buffer) => b.writeUInt32BE(1, 208 + 40)],
    ['luks.key_slots[7].key_offset', (b: Buffer) => b.writeUInt32BE(2 ** 32 - 1, 208 + 7 * 48 + 40)],
    ['luks.key_slots[7].key_offset', () => undefined, 2_000_000],
    // Over another one's key.
    ['luks.key_slots[2].key_offset', (b: Buffer) => b.writeUInt32BE(8 + 504 + 100, 208 + 2 * 48 + 40)],
  ] as const)('is refused for %s', (field, change, placeBytes?: number) => {
    expect(() => decode(change, placeBytes)).toThrow(expect.objectContaining({ field }));
  });

  it.each([
    ['serpent', 'xts-plain64', 64],
    ['twofish', 'xts-plain64', 64],
    ['aes', 'ctr-plain64', 32],
    ['aes', 'xts-plain64', 48],
    ['aes', 'cbc-plain64', 24],
    ['aes', 'cbc-essiv', 32],
    ['aes', 'cbc-plain:sha256', 32],
    ['aes', 'cbc-essiv:sha1', 32],
    ['aes', 'cbc-essiv:none', 32],
    ['aes', 'cbc-plain', 8],
  ])('is refused for a cipher that there is not: %s-%s with %i bytes', (cipher, mode, keyBytes) => {
    expect(() => cipherSpec(cipher, mode, keyBytes)).toThrow(expect.objectContaining({ code: 'unsupported-image' }));
  });

  it('is decoded or refused, whatever is in it', () => {
    const random = seededRandom(2);
    let decoded = 0;
    for (let i = 0; i < MUTANTS; i++) {
      const bytes = Buffer.from(good);
      for (let flips = 1 + random.below(6); flips > 0; flips--) bytes[random.below(bytes.length)] = random.below(256);
      try {
        const header = decodeLuksHeader(bytes, made.bytes.length);
        decoded++;
        cipherSpec(header.cipherName, header.cipherMode, header.keyBytes);
      } catch (error) {
        if (!(error instanceof BdevError)) throw error;
      }
    }
    expect(decoded).toBeGreaterThan(MUTANTS / 100);
  });
});

describe('encrypting a sector', () => {
  it('allocates nothing', () => {
    const cipher = new SectorCipher(
      cipherSpec('aes', 'xts-plain64', 64),
      Buffer.from(randomFillSync(new Uint8Array(64))),
    );
    const codec = new InlineCodec(bench.rig.arena);
    const job = new CodecJob(bench);
    job.operation = CodecOperation.encrypt;
    job.cipher = cipher.handle;
    job.source = bench.memory;
    job.destination = bench.memory;
    job.sourceBytes = 512;
    job.capacityBytes = 512;
    const JOBS = 20_000;
    const bytesPerJob = (): number => {
      const profiler = new GCProfiler();
      profiler.start();
      const before = process.memoryUsage().heapUsed;
      for (let i = 0; i < JOBS; i++) {
        job.sector = 2 ** 33 + i;
        codec.run(job);
      }
      const grown = process.memoryUsage().heapUsed - before;
      return profiler.stop().statistics.length > 0 ? Infinity : grown / JOBS;
    };
    let least = Infinity;
    for (let round = 0; round < 15 && least > 2; round++) least = Math.min(least, bytesPerJob());
    expect(least).toBeLessThan(2);
    codec.close();
    cipher.close();
  });

  it('refuses what is no sector, and a key of the wrong length', () => {
    const cipher = new SectorCipher(LEGACY_AES, Buffer.alloc(16, 1));
    const codec = new InlineCodec(bench.rig.arena);
    const job = new CodecJob(bench);
    const range = { source: bench.memory, destination: bench.memory, cipher: cipher.handle };
    Object.assign(job, { operation: CodecOperation.encrypt, ...range, sourceBytes: 500, capacityBytes: 512 });
    codec.run(job);
    expect(job.status).toBe(CodecStatus.tooLong);
    Object.assign(job, { sourceBytes: 1024, capacityBytes: 512 });
    codec.run(job);
    expect(job.status).toBe(CodecStatus.tooLong);
    codec.close();
    cipher.close();
    expect(() => new SectorCipher(LEGACY_AES, Buffer.alloc(15))).toThrow('EINVAL');
  });
});
