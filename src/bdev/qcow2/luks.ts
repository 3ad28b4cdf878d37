/**
 * Keys of an encrypted image: the master key, which encrypts the disk, lies in up to eight key slots of the LUKS header, in each encrypted with
 * another passphrase. All here are tasks over the file, so that tools and the engine use the same.
 *
 * Invariants
 * - What is secret is wiped when it is no longer needed, by who made it: passphrases by the caller, master keys by who unlocked, all else here.
 * - A key slot is in the header when its key material is durable, and out of it before that is overwritten.
 * - The last passphrase is not removed.
 */
import { randomBytes, randomUUID, timingSafeEqual } from 'node:crypto';
import type { Clock } from '../../poller/clock.js';
import { BdevError } from '../bdev.js';
import type { Qcow2Header } from './format.js';
import type { ImageFile } from './image-file.js';
import { ITERATIONS_MIN, iterationsIn, mergeKey, splitKey, threadedKeyWork } from './luks/key-work.js';
import type { KeyWork } from './luks/key-work.js';
import {
  LUKS_DIGEST_BYTES,
  LUKS_HEADER_BYTES,
  LUKS_SALT_BYTES,
  LUKS_SECTOR_BYTES,
  LUKS_SLOTS,
  decodeLuksHeader,
  encodeLuksHeader,
  luksLayout,
  materialBytesOf,
  materialSectorOf,
} from './luks/luks-format.js';
import type { LuksHeader, LuksKeySlot } from './luks/luks-format.js';
import { cipherSpec, cryptMaterial, digestBytes } from './luks/sector-cipher.js';
import type { CipherSpec } from './luks/sector-cipher.js';
import type { Task } from '../task.js';

/** Where the LUKS header is in the file. */
export type LuksPlace = NonNullable<Qcow2Header['luksHeader']>;

export interface UnlockedLuks {
  readonly header: LuksHeader;
  readonly spec: CipherSpec;
  /** Wiped by the caller, as soon as a `SectorCipher` has it. */
  readonly masterKey: Buffer;
  /** That the passphrase opened. */
  readonly slot: number;
}

/** How a new image is encrypted; the names and values are those of qemu-img's options `encrypt.*`. */
export interface LuksOptions {
  readonly cipherAlg: string;
  readonly cipherMode: string;
  readonly ivgenAlg: string;
  readonly ivgenHashAlg: string;
  readonly hashAlg: string;
  /** How long it takes to try a passphrase, on this machine. */
  readonly iterTimeMs: number;
}

export const LUKS_DEFAULTS: LuksOptions = {
  cipherAlg: 'aes-256',
  cipherMode: 'xts',
  ivgenAlg: 'plain64',
  ivgenHashAlg: 'sha256',
  hashAlg: 'sha256',
  iterTimeMs: 2000,
};
/** The digest of the master key, of which nobody can try guesses, takes this part of it. */
const DIGEST_PART = 8;

/** Reads and checks the header. Throws BdevError. */
export function* readLuksHeader(file: ImageFile, place: LuksPlace): Task<LuksHeader> {
  const bytes = Buffer.alloc(LUKS_HEADER_BYTES);
  yield* file.read(place.offset, bytes);
  return decodeLuksHeader(bytes, place.lengthBytes);
}

/** Tries a passphrase on each key slot. Throws BdevError: `wrong-passphrase` when none opens. */
export function* unlockLuks(
  file: ImageFile,
  place: LuksPlace,
  passphrase: Buffer,
  work: KeyWork = threadedKeyWork,
): Task<UnlockedLuks> {
  const header = yield* readLuksHeader(file, place);
  const spec = cipherSpec(header.cipherName, header.cipherMode, header.keyBytes);
  digestBytes('luks.hash_spec', header.hash);
  for (const [slot, keySlot] of header.slots.entries()) {
    if (!keySlot.isActive) continue;
    const material = Buffer.alloc(materialBytesOf(header.keyBytes));
    yield* file.read(place.offset + keySlot.materialSector * LUKS_SECTOR_BYTES, material);
    const masterKey = yield* openSlot(header, spec, keySlot, material, passphrase, work);
    if (masterKey !== null) return { header, spec, masterKey, slot };
  }
  throw new BdevError(
    'wrong-passphrase',
    'luks',
    'no key slot of the image opens with this passphrase',
    'look at the file that the passphrase is taken from: a line break at its end counts',
  );
}

/** @param material is wiped */
function* openSlot(
  header: LuksHeader,
  spec: CipherSpec,
  slot: LuksKeySlot,
  material: Buffer,
  passphrase: Buffer,
  work: KeyWork,
): Task<Buffer | null> {
  const { hash, keyBytes } = header;
  const slotKey = yield* work.pbkdf2(passphrase, slot.salt, slot.iterations, keyBytes, hash);
  cryptMaterial(spec, slotKey, material, false);
  slotKey.fill(0);
  const key = yield* mergeKey(material, keyBytes, hash, work);
  material.fill(0);
  const digest = yield* work.pbkdf2(key, header.digestSalt, header.digestIterations, LUKS_DIGEST_BYTES, hash);
  if (timingSafeEqual(digest, header.digest)) return key;
  key.fill(0);
  return null;
}

/**
 * Makes a LUKS header with one passphrase and a new master key, as `CreateOptions.luksHeader` wants it.
 * @param clock measures how long passphrases take. Throws BdevError: `bad-option`.
 */
export function* createLuks(
  options: LuksOptions,
  passphrase: Buffer,
  clock: Clock,
  work: KeyWork = threadedKeyWork,
): Task<{ bytes: Buffer; unlocked: UnlockedLuks }> {
  const { cipherMode, keyBytes } = headerTerms(options);
  const { hashAlg: hash, iterTimeMs } = options;
  const spec = cipherSpec('aes', cipherMode, keyBytes);
  const iterations = yield* iterationsIn(iterTimeMs, hash, keyBytes, work, clock);
  const masterKey = randomBytes(keyBytes);
  const digestSalt = randomBytes(LUKS_SALT_BYTES);
  const digestIterations = Math.max(ITERATIONS_MIN, Math.floor(iterations / DIGEST_PART));
  const empty: LuksHeader = {
    cipherName: 'aes',
    cipherMode,
    hash,
    payloadSector: luksLayout(keyBytes).payloadSector,
    keyBytes,
    digest: yield* work.pbkdf2(masterKey, digestSalt, digestIterations, LUKS_DIGEST_BYTES, hash),
    digestSalt,
    digestIterations,
    uuid: randomUUID(),
    slots: Array.from({ length: LUKS_SLOTS }, (_, slot) => emptySlot(materialSectorOf(slot, keyBytes))),
  };
  const filled = yield* fillSlot(empty, spec, masterKey, 0, passphrase, iterations, work);
  const bytes = Buffer.alloc(empty.payloadSector * LUKS_SECTOR_BYTES);
  encodeLuksHeader(filled.header).copy(bytes);
  filled.material.copy(bytes, filled.header.slots[0]!.materialSector * LUKS_SECTOR_BYTES);
  return { bytes, unlocked: { header: filled.header, spec, masterKey, slot: 0 } };
}

/**
 * Adds a passphrase to an unlocked image.
 * @returns the number of its key slot. Throws BdevError: `no-room` when all are taken.
 */
export function* addPassphrase(
  file: ImageFile,
  place: LuksPlace,
  unlocked: UnlockedLuks,
  passphrase: Buffer,
  iterTimeMs: number,
  clock: Clock,
  work: KeyWork = threadedKeyWork,
): Task<number> {
  const { spec, masterKey } = unlocked;
  const header = yield* readLuksHeader(file, place);
  const slot = header.slots.findIndex(({ isActive }) => !isActive);
  if (slot < 0) {
    throw new BdevError('no-room', 'luks', `all ${LUKS_SLOTS} key slots are taken`, 'remove a passphrase first');
  }
  const iterations = yield* iterationsIn(iterTimeMs, header.hash, header.keyBytes, work, clock);
  const filled = yield* fillSlot(header, spec, masterKey, slot, passphrase, iterations, work);
  yield* file.write(place.offset + header.slots[slot]!.materialSector * LUKS_SECTOR_BYTES, filled.material);
  yield* file.sync();
  yield* writeHeader(file, place, filled.header);
  return slot;
}

/**
 * Removes the key slot that a passphrase opened.
 * @param unlocked by that passphrase. Throws BdevError: `last-passphrase`.
 */
export function* removePassphrase(file: ImageFile, place: LuksPlace, unlocked: Pick<UnlockedLuks, 'slot'>): Task<void> {
  const header = yield* readLuksHeader(file, place);
  const { slot } = unlocked;
  const { isActive, materialSector } = header.slots[slot]!;
  if (!isActive) return;
  if (header.slots.filter((other) => other.isActive).length === 1) {
    throw new BdevError(
      'last-passphrase',
      'luks',
      'this is the last passphrase: without it the data would be lost',
      'add another one first',
    );
  }
  yield* writeHeader(file, place, withSlot(header, slot, emptySlot(materialSector)));
  yield* file.write(place.offset + materialSector * LUKS_SECTOR_BYTES, randomBytes(materialBytesOf(header.keyBytes)));
  yield* file.sync();
}

function* fillSlot(
  header: LuksHeader,
  spec: CipherSpec,
  masterKey: Buffer,
  slot: number,
  passphrase: Buffer,
  iterations: number,
  work: KeyWork,
): Task<{ header: LuksHeader; material: Buffer }> {
  const { hash, keyBytes } = header;
  const { materialSector } = header.slots[slot]!;
  const salt = randomBytes(LUKS_SALT_BYTES);
  const slotKey = yield* work.pbkdf2(passphrase, salt, iterations, keyBytes, hash);
  const material = yield* splitKey(masterKey, hash, work);
  cryptMaterial(spec, slotKey, material, true);
  slotKey.fill(0);
  return { header: withSlot(header, slot, { isActive: true, iterations, salt, materialSector }), material };
}

/** Writes the header over the one that is there, and makes it durable. */
function* writeHeader(file: ImageFile, place: LuksPlace, header: LuksHeader): Task<void> {
  const before = Buffer.alloc(LUKS_HEADER_BYTES);
  yield* file.read(place.offset, before);
  yield* file.write(place.offset, encodeLuksHeader(header, before));
  yield* file.sync();
}

function withSlot(header: LuksHeader, slot: number, keySlot: LuksKeySlot): LuksHeader {
  return { ...header, slots: header.slots.map((other, i) => (i === slot ? keySlot : other)) };
}

function emptySlot(materialSector: number): LuksKeySlot {
  return { isActive: false, iterations: 0, salt: Buffer.alloc(LUKS_SALT_BYTES), materialSector };
}

/** Options as the header says them. */
function headerTerms(options: LuksOptions): { cipherMode: string; keyBytes: number } {
  const { cipherAlg, cipherMode, ivgenAlg, ivgenHashAlg, hashAlg, iterTimeMs } = options;
  const refuse = (option: string, value: string, known: string): never => {
    throw new BdevError('bad-option', `encrypt.${option}`, `${value} is not known`, `it may be ${known}`);
  };
  const bits = /^aes-(128|256)$/.exec(cipherAlg)?.[1];
  if (bits === undefined) return refuse('cipher-alg', cipherAlg, 'aes-128, aes-256');
  if (!['xts', 'cbc'].includes(cipherMode)) refuse('cipher-mode', cipherMode, 'xts, cbc');
  if (!['plain', 'plain64', 'essiv'].includes(ivgenAlg)) refuse('ivgen-alg', ivgenAlg, 'plain64, plain, essiv');
  if (!['sha1', 'sha224', 'sha256', 'sha384', 'sha512', 'ripemd160'].includes(hashAlg)) {
    refuse('hash-alg', hashAlg, 'sha256, sha512, sha384, sha224, sha1, ripemd160');
  }
  // ESSIV takes the hash for a key of AES.
  if (ivgenAlg === 'essiv' && ivgenHashAlg !== 'sha256') refuse('ivgen-hash-alg', ivgenHashAlg, 'sha256');
  if (!(iterTimeMs >= 1 && iterTimeMs <= 60_000)) refuse('iter-time', `${iterTimeMs}`, '1 to 60000');
  const keyBytes = (Number(bits) / 8) * (cipherMode === 'xts' ? 2 : 1);
  const ivgen = ivgenAlg === 'essiv' ? `essiv:${ivgenHashAlg}` : ivgenAlg;
  return { cipherMode: `${cipherMode}-${ivgen}`, keyBytes };
}
