/**
 * Ciphers of encrypted images: sectors of 512 bytes, each with a vector made from its number. What OpenSSL has of LUKS: AES in the modes
 * XTS and CBC, with the vectors plain, plain64 and ESSIV. Sectors of a disk go through native jobs (codec-job.ts), by the handle of a
 * `SectorCipher`; key material, which is little and seldom, goes through node:crypto.
 */
import { createCipheriv, createDecipheriv, createHash, getCiphers, getHashes } from 'node:crypto';
import { check, native } from '../../../../native/index.js';
import { unsupportedImage } from '../image-error.js';
import { LUKS_SECTOR_BYTES } from './luks-format.js';

/** native/cipher.h has the same numbers. */
const VectorKind = { plain: 0, plain64: 1, essiv: 2 } as const;
type VectorKind = (typeof VectorKind)[keyof typeof VectorKind];

const VECTOR_BYTES = 16;
const NO_KEY = Buffer.alloc(0);

/** A cipher as OpenSSL names it. */
export interface CipherSpec {
  readonly name: string;
  readonly vector: VectorKind;
  /** Hash of the key that encrypts vectors; null but for ESSIV. */
  readonly essivHash: string | null;
  readonly essivName: string;
}

/** What qcow2 had before LUKS, crypt_method 1: the key is the passphrase itself, and sectors are numbered as the guest sees them. */
export const LEGACY_AES: CipherSpec = {
  name: 'aes-128-cbc',
  vector: VectorKind.plain64,
  essivHash: null,
  essivName: '',
};
const LEGACY_KEY_BYTES = 16;

/**
 * @param cipher and mode as in a LUKS header: `aes`, `xts-plain64`, `cbc-essiv:sha256`. Throws BdevError for what there is not.
 */
export function cipherSpec(cipher: string, mode: string, keyBytes: number): CipherSpec {
  const hint = 'convert the image with qemu-img to aes-256, mode xts, vectors plain64';
  if (cipher !== 'aes') throw unsupportedImage('luks.cipher_name', `is ${cipher}, only aes is known`, hint);
  const [, chaining, vectorName, , hash] = /^(xts|cbc)-(plain|plain64|essiv)(:(\w+))?$/.exec(mode) ?? [];
  if (chaining === undefined || (vectorName === 'essiv') !== (hash !== undefined)) {
    throw unsupportedImage('luks.cipher_mode', `is ${mode}`, hint);
  }
  // XTS has two keys.
  const bits = (chaining === 'xts' ? keyBytes / 2 : keyBytes) * 8;
  const name = `aes-${bits}-${chaining}`;
  // Of aes-192 the key material is no whole number of sectors, which QEMU cannot read either.
  if (bits !== 128 && bits !== 256) {
    throw unsupportedImage('luks.key_bytes', `is ${keyBytes}, ${name} is not known`, hint);
  }
  const essivHash = hash ?? null;
  const essivBits = essivHash === null ? 0 : digestBytes('luks.cipher_mode', essivHash) * 8;
  const essivName = `aes-${essivBits}-ecb`;
  if (essivHash !== null && !getCiphers().includes(essivName)) {
    throw unsupportedImage('luks.cipher_mode', `is ${mode}, whose hash is no key of AES`, hint);
  }
  return { name, vector: VectorKind[vectorName as keyof typeof VectorKind], essivHash, essivName };
}

/** Length of a hash. Throws BdevError when it is not known. */
export function digestBytes(field: string, hash: string): number {
  if (!getHashes().includes(hash)) {
    throw unsupportedImage(field, `names the hash ${hash}`, 'convert the image with qemu-img to sha256');
  }
  return createHash(hash).digest().length;
}

/** The key of an image with crypt_method 1. Wiped by the caller. */
export function legacyKey(passphrase: Buffer): Buffer {
  const key = Buffer.alloc(LEGACY_KEY_BYTES);
  passphrase.copy(key);
  return key;
}

/** A cipher for jobs of the thread that opened it and of the pool. */
export class SectorCipher {
  /** For `CodecJob.cipher`. */
  readonly handle: number;

  /** @param key is copied. Throws SystemError. */
  constructor(spec: CipherSpec, key: Buffer) {
    const { name, vector, essivHash, essivName } = spec;
    const essivKey = essivHash === null ? NO_KEY : createHash(essivHash).update(key).digest();
    const handle = native.cipherOpen(name, key, vector, essivName, essivKey);
    essivKey.fill(0);
    this.handle = check(handle, `open the cipher ${name}`);
  }

  /** Wipes the keys. No job with it may be in flight. */
  close(): void {
    native.cipherClose(this.handle);
  }
}

/** Encrypts or decrypts sectors in place, the first one is number 0. */
export function cryptMaterial(spec: CipherSpec, key: Buffer, bytes: Buffer, encrypt: boolean): void {
  const essivKey = spec.essivHash === null ? NO_KEY : createHash(spec.essivHash).update(key).digest();
  const vector = Buffer.alloc(VECTOR_BYTES);
  for (let at = 0; at < bytes.length; at += LUKS_SECTOR_BYTES) {
    vector.fill(0).writeUInt32LE(at / LUKS_SECTOR_BYTES);
    if (spec.essivHash !== null) {
      createCipheriv(spec.essivName, essivKey, null).setAutoPadding(false).update(vector).copy(vector);
    }
    const make = encrypt ? createCipheriv : createDecipheriv;
    const sector = bytes.subarray(at, at + LUKS_SECTOR_BYTES);
    make(spec.name, key, vector).setAutoPadding(false).update(sector).copy(sector);
  }
  essivKey.fill(0);
}
