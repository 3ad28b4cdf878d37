/**
 * Goal: an encrypted image is a disk like any other, QEMU reads what we write to it and we what QEMU writes, and nothing that a guest writes
 * is in the file as it was written.
 *
 * Method: one script of random requests on an encrypted image and on a twin without encryption, whose contents qemu-img compares; a marker
 * that is written in every way there is and looked for in the files; and every mistake that one can make with a key.
 */
import { chmodSync, readFileSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import type { BdevConfig } from '../../../src/bdev/bdev.js';
import { IoFlag, IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { CREATE_DEFAULTS, createImage } from '../../../src/bdev/qcow2/create.js';
import type { CreateOptions } from '../../../src/bdev/qcow2/create.js';
import { LUKS_DEFAULTS, createLuks } from '../../../src/bdev/qcow2/luks.js';
import type { LuksOptions } from '../../../src/bdev/qcow2/luks.js';
import { inlineKeyWork } from '../../../src/bdev/qcow2/luks/key-work.js';
import type { Qcow2Config } from '../../../src/bdev/qcow2/qcow2.js';
import type { MallocConfig } from '../../../src/bdev/malloc/malloc.js';
import type { UringConfig } from '../../../src/bdev/uring/uring.js';
import { SystemClock } from '../../../src/poller/clock.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
import { expectBytes } from '../../support/bytes.js';
import { Disk } from '../../support/disk.js';
import type { Layout, Request } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';

// QEMU measures how fast the machine is by keeping it busy, which others may do, too.
vi.setConfig({ testTimeout: 120_000 });

const PASSWORD = 'correct horse battery';
const DISK_BYTES = 6 * 2 ** 20;
const SECTOR = 512;
const STEPS = 60;
const MARKER = 'STRATA-MARKER-16';
const ATTEMPTS = 10;

const random = seededRandom(77);
let qemu: QemuImg;
let keyFile: string;
let disk: Disk | null = null;

beforeEach(() => {
  qemu = new QemuImg();
  keyFile = qemu.path('key');
  writeFileSync(keyFile, PASSWORD, { mode: 0o600 });
});

afterEach(() => {
  disk?.close();
  disk = null;
  qemu.remove();
});

// ---- images ----

const secret = (): string[] => ['--object', `secret,id=s,file=${keyFile}`];
const opened = (name: string): string =>
  `driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=${qemu.path(name)}`;

/** QEMU measures how fast the machine is, and cannot always. */
function retried(run: () => { status: number | null; stderr: string }): void {
  for (let attempt = 1; ; attempt++) {
    const { status, stderr } = run();
    if (status === 0) return;
    if (attempt === ATTEMPTS || !stderr.includes('accurate CPU usage')) throw new Error(stderr);
  }
}

/** @param encrypt options without their prefix */
function qemuCreate(name: string, encrypt: readonly string[], options: readonly string[] = []): void {
  const all = ['format=luks', 'key-secret=s', 'iter-time=10', ...encrypt].map((option) => `encrypt.${option}`);
  const words = [...all, ...options].join();
  retried(() => qemu.try('create', '-q', ...secret(), '-f', 'qcow2', '-o', words, name, String(DISK_BYTES)));
}

/** An image of ours, which does not take seconds. */
function ourCreate(name: string, options: Partial<CreateOptions>, luks: Partial<LuksOptions> = {}): void {
  const { bytes } = runTask(
    createLuks({ ...LUKS_DEFAULTS, iterTimeMs: 1, ...luks }, Buffer.from(PASSWORD), new SystemClock(), inlineKeyWork),
  );
  const file = new NodeFile(qemu.path(name), { mode: 'create' });
  runTask(createImage(file, { ...CREATE_DEFAULTS, sizeBytes: DISK_BYTES, ...options, luksHeader: bytes }));
  file.close();
}

function qemuIo(name: string, ...commands: readonly string[]): void {
  const args = [...secret(), '--image-opts', ...commands.flatMap((command) => ['-c', command]), opened(name)];
  const { status, stdout, stderr } = qemu.exec('qemu-io', args);
  if (status !== 0 || /failed|error/i.test(stdout + stderr)) throw new Error(`${stdout}${stderr}`);
}

/** What is on the disk, as QEMU reads it. */
function qemuRead(name: string, ...more: readonly string[]): Buffer {
  qemu.run('convert', ...secret(), ...more, '--image-opts', opened(name), '-O', 'raw', 'read.raw');
  return readFileSync(qemu.path('read.raw'));
}

function expectWhole(name: string): void {
  qemu.run('check', ...secret(), '--image-opts', opened(name));
}

// ---- disks ----

function open(name: string, options: Partial<Qcow2Config> = {}, below: readonly BdevConfig[] = []): Disk {
  const file = { ...uringDefaults, name: 'file', path: qemu.path(name) };
  disk = new Disk(new Rig('luks-serving'), [...below, file, qcow2On({ keyFile, ...options })('disk', 'file')]);
  return disk;
}

function close(): void {
  disk!.close();
  disk = null;
}

interface Step {
  readonly type: 'write' | 'zero' | 'zeroUnmap' | 'discard' | 'flush' | 'read';
  readonly offset: number;
  readonly data: Buffer;
}

/** Discards are of whole clusters: what becomes of parts is up to the image. */
function script(clusterBytes: number): Step[] {
  return Array.from({ length: STEPS }, () => {
    const types = ['write', 'write', 'write', 'write', 'zero', 'zeroUnmap', 'discard', 'flush', 'read'] as const;
    const type = types[random.below(types.length)]!;
    const unit = type === 'discard' ? clusterBytes : SECTOR;
    const sizes = [1, 8, 8, 64, 200, 1500, 3000];
    const lengthMax = Math.max(1, Math.floor((sizes[random.below(sizes.length)]! * SECTOR) / unit));
    const length = (1 + random.below(lengthMax)) * unit;
    const offset = random.below((DISK_BYTES - length) / unit + 1) * unit;
    const data = Buffer.alloc(length);
    for (let at = 0; at < length; at += SECTOR) data.fill(1 + random.below(255), at, at + SECTOR);
    return { type, offset, data };
  });
}

/** Segments of whole sectors, or of anything. */
function layoutOf(length: number): Layout | undefined {
  if (random.below(4) === 0) return undefined;
  const unit = random.below(3) === 0 ? 100 : SECTOR;
  const lengths: number[] = [];
  for (let left = length; left > 0; left -= lengths.at(-1)!) {
    const isLast = lengths.length === 99;
    lengths.push(isLast ? left : Math.min(left, (1 + random.below(300)) * unit));
  }
  return { lengths, gaps: unit === SECTOR ? [512, 0, 4096] : [64, 0, 4096] };
}

function perform(on: Disk, steps: readonly Step[]): void {
  for (const { type, offset, data } of steps) {
    switch (type) {
      case 'write':
        on.write(offset, data, 0, layoutOf(data.length));
        break;
      case 'read':
        on.read(offset, data.length, layoutOf(data.length));
        break;
      default: {
        const io = {
          zero: IoType.writeZeroes,
          zeroUnmap: IoType.writeZeroes,
          discard: IoType.discard,
          flush: IoType.flush,
        };
        const isFlush = type === 'flush';
        const flags = type === 'zeroUnmap' ? IoFlag.unmap : 0;
        expect(on.run(io[type], isFlush ? 0 : offset, isFlush ? 0 : data.length, flags)).toBe(IoStatus.success);
      }
    }
    on.forget();
  }
}

/** What is at the end of a script on an image without encryption. */
function contentOfTwin(steps: readonly Step[], options: string, below: () => BdevConfig[]): Buffer {
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, 'twin', String(DISK_BYTES));
  const on = below();
  const file = { ...uringDefaults, name: 'file', path: qemu.path('twin') };
  const twin = new Disk(new Rig('twin'), [
    ...on,
    file,
    qcow2On({ backing: on.at(-1)?.name ?? null, imageDir: qemu.folder })('disk', 'file'),
  ]);
  perform(twin, steps);
  const content = twin.read(0, DISK_BYTES);
  twin.close();
  return content;
}

function backingFile(): BdevConfig[] {
  const data = Buffer.alloc(DISK_BYTES / 2);
  for (let at = 0; at < data.length; at += 4096) data.fill((at / 4096) % 251, at, at + 4096);
  writeFileSync(qemu.path('below'), data);
  const below: UringConfig = { ...uringDefaults, name: 'below', path: qemu.path('below'), readOnly: true };
  return [below];
}

const CBC: Partial<LuksOptions> = {
  cipherAlg: 'aes-128',
  cipherMode: 'cbc',
  ivgenAlg: 'essiv',
  ivgenHashAlg: 'sha256',
};
const ours =
  (options: Partial<CreateOptions>, luks: Partial<LuksOptions> = {}) =>
  (): void =>
    ourCreate('image', options, luks);

interface Case {
  readonly name: string;
  readonly make: () => void;
  readonly clusterBytes: number;
  readonly twin: string;
  readonly isBacked: boolean;
  readonly codecThreads: number;
}

const CASES: readonly Case[] = [
  {
    name: 'of QEMU, aes-256-xts',
    make: () => qemuCreate('image', []),
    clusterBytes: 65536,
    twin: 'cluster_size=64k',
    isBacked: false,
    codecThreads: 2,
  },
  {
    name: 'of QEMU, aes-256-cbc with ESSIV, with a data file',
    make: () =>
      qemuCreate(
        'image',
        ['cipher-mode=cbc', 'ivgen-alg=essiv', 'ivgen-hash-alg=sha256'],
        ['cluster_size=4k', 'data_file=image.data'],
      ),
    clusterBytes: 4096,
    twin: 'cluster_size=4k,data_file=twin.data',
    isBacked: false,
    codecThreads: 2,
  },
  {
    name: 'with a backing disk',
    make: ours({}),
    clusterBytes: 65536,
    twin: 'cluster_size=64k',
    isBacked: true,
    codecThreads: 0,
  },
  {
    name: 'with subclusters',
    make: ours({ clusterBits: 16, extendedL2: true }),
    clusterBytes: 65536,
    twin: 'extended_l2=on',
    isBacked: true,
    codecThreads: 2,
  },
  {
    name: 'with clusters of 512 bytes',
    make: ours({ clusterBits: 9 }, CBC),
    clusterBytes: 512,
    twin: 'cluster_size=512',
    isBacked: true,
    codecThreads: 2,
  },
  {
    name: 'with clusters of 2 MiB',
    make: ours({ clusterBits: 21 }),
    clusterBytes: 2 ** 21,
    twin: 'cluster_size=2M',
    isBacked: true,
    codecThreads: 2,
  },
];

describe('An encrypted disk', () => {
  it.each(CASES)('$name holds what QEMU reads', ({ make, clusterBytes, twin, isBacked, codecThreads }) => {
    make();
    const below = isBacked ? backingFile : () => [];
    const steps = script(clusterBytes);
    const expected = contentOfTwin(steps, twin, below);
    const on = below();
    const encrypted = open('image', { codecThreads, backing: on.at(-1)?.name ?? null, imageDir: qemu.folder }, on);
    perform(encrypted, steps);
    expectBytes(encrypted.read(0, DISK_BYTES), expected, 'as we read it');
    encrypted.forget();
    for (let at = 0, length = SECTOR; at < DISK_BYTES; at += length) {
      length = Math.min(DISK_BYTES - at, (1 + random.below(1000)) * SECTOR);
      expectBytes(encrypted.read(at, length, layoutOf(length)), expected.subarray(at, at + length), 'in pieces');
      encrypted.forget();
    }
    close();
    if (isBacked) qemu.run('rebase', '-u', ...secret(), '--image-opts', opened('image'), '-b', 'below', '-F', 'raw');
    expectWhole('image');
    expectBytes(qemuRead('image'), expected, 'as QEMU reads it');
  });

  it('reads what QEMU wrote, and QEMU what we wrote around it', () => {
    ourCreate('image', {});
    qemuIo('image', 'write -P 17 0 3M', 'write -P 18 1000k 4k', 'write -z 2M 64k', 'write -P 19 5M 512');
    const wanted = qemuRead('image');
    const on = open('image');
    const found = on.read(0, DISK_BYTES);
    expectBytes(found, wanted, 'what QEMU wrote');
    expect([found[0], found[1000 * 1024], found[2 * 2 ** 20], found[5 * 2 ** 20]]).toEqual([17, 18, 0, 19]);
    on.write(4096, Buffer.alloc(8192, 20));
    on.write(5 * 2 ** 20 + 1024, Buffer.alloc(512, 21));
    found.fill(20, 4096, 12288).fill(21, 5 * 2 ** 20 + 1024, 5 * 2 ** 20 + 1536);
    close();
    expectBytes(qemuRead('image'), found, 'what we wrote');
    expectWhole('image');
  });

  it('takes many requests at once, more than there are buffers', () => {
    ourCreate('image', {});
    const on = open('image');
    const expected = Buffer.alloc(DISK_BYTES);
    const requests: Request[] = [];
    for (const [bytes, from] of [
      [4096, 0],
      [DISK_BYTES / 2, DISK_BYTES / 2],
    ] as const) {
      for (let at = from; at < from + DISK_BYTES / 2; at += bytes) {
        const data = Buffer.alloc(bytes);
        for (let i = 0; i < bytes; i += SECTOR) data.fill(1 + random.below(255), i, i + SECTOR);
        data.copy(expected, at);
        requests.push(on.startWrite(at, data));
      }
    }
    on.finish(...requests);
    expect(requests.every(({ status }) => status === IoStatus.success)).toBe(true);
    on.forget();
    const reads = [0, 1, 2].map((i) => on.start(IoType.read, (i * DISK_BYTES) / 3, DISK_BYTES / 3));
    on.finish(...reads);
    expectBytes(Buffer.concat(reads.map((read) => on.gather(read))), expected, 'the disk');
  });
});

describe('What a guest writes', () => {
  it('is nowhere in the file, however it got there', async () => {
    ourCreate('image', {});
    const on = open('image');
    const marked = (bytes: number): Buffer => Buffer.alloc(bytes, MARKER);
    on.write(0, marked(2 ** 20));
    on.write(2 ** 20 + 512, marked(512));
    on.write(2 ** 20 + 8192, marked(4096), 0, { lengths: [100, 3996], gaps: [7] });
    const taken = on.open.bdev.operate!('createSnapshot', { snapshot: 'kept' });
    let isTaken = false;
    void taken.then(() => (isTaken = true));
    while (!isTaken) {
      on.rig.step();
      await new Promise(setImmediate);
    }
    // Copied around, with the marker in head and tail.
    on.write(4096, Buffer.alloc(512, 1));
    on.write(300 * 1024, Buffer.alloc(300 * 1024, 2));
    on.run(IoType.writeZeroes, 128 * 1024 + 512, 1024);
    on.run(IoType.flush);
    const content = on.read(0, DISK_BYTES);
    expect(content.includes(MARKER)).toBe(true);
    expect(readFileSync(qemu.path('image')).includes(MARKER)).toBe(false);
    close();
    expect(readFileSync(qemu.path('image')).includes(MARKER)).toBe(false);
    expectBytes(qemuRead('image'), content, 'now');
    const kept = qemuRead('image', '-l', 'snapshot.name=kept');
    expectBytes(kept.subarray(0, 2 ** 20), marked(2 ** 20), 'then');
    expectWhole('image');
  });

  it('is what it was when memory changes while it is written', () => {
    ourCreate('image', {});
    const on = open('image');
    const request = on.startWrite(0, Buffer.alloc(512 * 1024, 1));
    // The copy is made as the request is taken, or later; what is written is one or the other, sector by sector.
    on.scatter(request, Buffer.alloc(512 * 1024, 2));
    on.finish(request);
    on.forget();
    const found = on.read(0, 512 * 1024);
    expect(found.every((byte) => byte === 1 || byte === 2)).toBe(true);
    close();
    expectBytes(qemuRead('image').subarray(0, 512 * 1024), found, 'the disk');
  });
});

describe('A key', () => {
  function refusal(name: string, options: Partial<Qcow2Config> = {}): BdevError {
    const rig = new Rig('refusal');
    const file = { ...uringDefaults, name: 'file', path: qemu.path(name) };
    try {
      rig.registry.create(file);
      rig.registry.create(qcow2On({ keyFile, ...options })('disk', 'file'));
    } catch (error) {
      if (error instanceof BdevError) return error;
      throw error;
    } finally {
      // Nothing of it is left, either.
      rig.close();
    }
    throw new Error('it was opened');
  }

  it('that is wrong, missing, or of use for others is refused by its field', () => {
    ourCreate('image', {});
    const wrong = qemu.path('wrong');
    writeFileSync(wrong, 'open sesame', { mode: 0o600 });
    expect(refusal('image', { keyFile: wrong })).toMatchObject({ code: 'wrong-passphrase', field: 'keyFile' });
    expect(refusal('image', { keyFile: null })).toMatchObject({ code: 'no-key', field: 'keyFile' });
    expect(refusal('image', { keyFile: qemu.path('none') })).toMatchObject({ code: 'key-file', field: 'keyFile' });
    expect(refusal('image', { keyFile: qemu.folder })).toMatchObject({ code: 'key-file', field: 'keyFile' });
    writeFileSync(wrong, '');
    expect(refusal('image', { keyFile: wrong })).toMatchObject({ code: 'key-file', field: 'keyFile' });
    for (const mode of [0o640, 0o604, 0o660]) {
      chmodSync(keyFile, mode);
      const { code, field, message, hint } = refusal('image');
      expect([code, field]).toEqual(['key-file', 'keyFile']);
      expect(message).toMatch(/mode 06/);
      expect(hint).toMatch(/chmod 600/);
    }
  });

  it('is not taken for an image without encryption', () => {
    qemu.run('create', '-q', '-f', 'qcow2', 'image', '1M');
    expect(refusal('image')).toMatchObject({ code: 'not-encrypted', field: 'keyFile' });
  });

  it('is not known of images that an image names', () => {
    ourCreate('below.qcow2', {});
    qemu.run('create', '-q', '-f', 'qcow2', '-u', '-b', 'below.qcow2', '-F', 'qcow2', 'image', '1M');
    const refused = refusal('image', { keyFile: null, imageDir: qemu.folder });
    expect(refused.field).toBe('header.crypt_method');
    expect(refused.hint).toMatch(/key_file/);
  });

  it('opens an encrypted image below another one, as a bdev', () => {
    ourCreate('below.qcow2', {});
    qemuIo('below.qcow2', 'write -P 9 0 128k');
    const below = { ...uringDefaults, name: 'belowFile', path: qemu.path('below.qcow2'), readOnly: true };
    ourCreate('image', {});
    const middle = qcow2On({ keyFile, readOnly: true })('below', 'belowFile');
    const on = open('image', { backing: 'below' }, [below, middle]);
    on.write(512, Buffer.alloc(512, 8));
    const expected = Buffer.alloc(DISK_BYTES)
      .fill(9, 0, 128 * 1024)
      .fill(8, 512, 1024);
    expectBytes(on.read(0, DISK_BYTES), expected, 'the disk');
  });

  it('and what was before LUKS are told apart', () => {
    retried(() =>
      qemu.try(
        'create',
        '-q',
        ...secret(),
        '-f',
        'qcow2',
        '-o',
        'encrypt.format=aes,encrypt.key-secret=s',
        'image',
        '1M',
      ),
    );
    expect(refusal('image')).toMatchObject({ code: 'unsupported-image', field: 'header.crypt_method' });
  });

  it('is in nothing that an operator is shown', () => {
    ourCreate('image', {});
    const facts = JSON.stringify(open('image').open.bdev.describe());
    expect(facts).toContain('"cipher":"aes-256-xts"');
    expect(facts).not.toContain(PASSWORD);
    expect(facts).not.toContain('masterKey');
  });

  it('is worked out while the reactor serves others', async () => {
    ourCreate('image', {}, { iterTimeMs: 300 });
    const malloc: MallocConfig = { name: 'other', module: 'malloc', sizeBytes: 2 ** 20, blockSizeBytes: 512 };
    disk = new Disk(new Rig('prepare'), [malloc]);
    const { rig } = disk;
    const file: UringConfig = { ...uringDefaults, name: 'file', path: qemu.path('image') };
    rig.registry.create(file);
    let prepared: BdevConfig | null = null;
    const promise = rig.registry.prepare(qcow2On({ keyFile })('disk', 'file')).then((config) => (prepared = config));
    let served = 0;
    while (prepared === null) {
      disk.read(0, 4096);
      disk.forget();
      served++;
      await new Promise(setImmediate);
    }
    await promise;
    expect(served).toBeGreaterThan(100);
    const key = (prepared as Qcow2Config).unlocked!.masterKey;
    expect(key.every((byte) => byte === 0)).toBe(false);
    // No passphrase is needed any more, and the key is wiped.
    writeFileSync(keyFile, 'another one');
    rig.registry.create(prepared);
    expect(key.every((byte) => byte === 0)).toBe(true);
  });
});

describe('A compressed cluster of an encrypted image', () => {
  it('is not read, as it is not encrypted', () => {
    ourCreate('image', {});
    // QEMU writes it in the clear, which this shows.
    qemuIo('image', `write -c -P 65 0 64k`, 'write -P 66 64k 64k');
    const on = open('image');
    expect(on.run(IoType.flush)).toBe(IoStatus.success);
    const request = on.start(IoType.read, 0, 4096);
    on.finish(request);
    expect(request.status).toBe(IoStatus.ioError);
    expect(on.read(65536, 4096)).toEqual(Buffer.alloc(4096, 66));
    // What replaces all of it needs nothing of it.
    on.write(0, Buffer.alloc(65536, 67));
    expect(on.read(0, 4096)).toEqual(Buffer.alloc(4096, 67));
    close();
    expectWhole('image');
  });
});
