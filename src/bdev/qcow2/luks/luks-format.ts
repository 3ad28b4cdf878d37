/**
 * The header of LUKS version 1, as it lies in the first bytes of what a qcow2 image's header calls its LUKS header. Big endian. Source: LUKS1
 * On-Disk Format Specification 1.2.3, QEMU block-luks.c.
 *
 *     offset  bytes  field                          key slot, eight of them from 208
 *          0      6  magic "LUKS\xba\xbe"           0      4  0x00ac71f3 active | 0x0000dead not
 *          6      2  version, 1                     4      4  iterations of PBKDF2
 *          8     32  cipher name                    8     32  salt
 *         40     32  cipher mode                   40      4  key material, in sectors from the magic
 *         72     32  hash                          44      4  stripes, 4000
 *        104      4  payload offset, sectors
 *        108      4  key bytes
 *        112     20  digest of the master key
 *        132     32  its salt
 *        164      4  its iterations
 *        168     40  UUID
 *
 * Invariant: a decoded header is within the bounds below, and its key slots lie apart from one another, behind it and within the
 * image's LUKS header.
 */
import { badImage, unsupportedImage } from '../image-error.js';

export const LUKS_HEADER_BYTES = 592;
export const LUKS_SECTOR_BYTES = 512;
export const LUKS_SLOTS = 8;
export const LUKS_STRIPES = 4000;
export const LUKS_DIGEST_BYTES = 20;
export const LUKS_SALT_BYTES = 32;
/** Minutes of work, which is what somebody who sets it may mean; 2^32 of them would be an attack. */
export const LUKS_ITERATIONS_MAX = 100_000_000;

const MAGIC = Buffer.from('LUKS\xba\xbe', 'latin1');
const VERSION = 1;
const SLOTS_AT = 208;
const SLOT_BYTES = 48;
const ACTIVE = 0x00ac71f3;
const INACTIVE = 0x0000dead;
const KEY_BYTES_MAX = 64;
/** Key slots begin at multiples of it where we make them, as QEMU does. */
const SLOT_ALIGNMENT_SECTORS = 8;

export interface LuksKeySlot {
  readonly isActive: boolean;
  readonly iterations: number;
  readonly salt: Buffer;
  readonly materialSector: number;
}

export interface LuksHeader {
  readonly cipherName: string;
  readonly cipherMode: string;
  readonly hash: string;
  readonly payloadSector: number;
  readonly keyBytes: number;
  readonly digest: Buffer;
  readonly digestSalt: Buffer;
  readonly digestIterations: number;
  readonly uuid: string;
  readonly slots: readonly LuksKeySlot[];
}

/** Bytes of the key material in a slot. */
export function materialBytesOf(keyBytes: number): number {
  return keyBytes * LUKS_STRIPES;
}

/** Sectors from the start of one slot's key material to the next, and of all before the payload, in headers that we make. */
export function luksLayout(keyBytes: number): { slotSectors: number; payloadSector: number } {
  const sectors = materialBytesOf(keyBytes) / LUKS_SECTOR_BYTES;
  const slotSectors = Math.ceil(sectors / SLOT_ALIGNMENT_SECTORS) * SLOT_ALIGNMENT_SECTORS;
  return { slotSectors, payloadSector: SLOT_ALIGNMENT_SECTORS + LUKS_SLOTS * slotSectors };
}

/** Where the key material of a slot is in headers that we make. */
export function materialSectorOf(slot: number, keyBytes: number): number {
  return SLOT_ALIGNMENT_SECTORS + slot * luksLayout(keyBytes).slotSectors;
}

/**
 * @param bytes LUKS_HEADER_BYTES
 * @param placeBytes of the image's LUKS header. Throws BdevError, which names the field.
 */
export function decodeLuksHeader(bytes: Buffer, placeBytes: number): LuksHeader {
  if (placeBytes < LUKS_HEADER_BYTES) throw badImage('luks.length', `is ${placeBytes}, less than ${LUKS_HEADER_BYTES}`);
  if (!bytes.subarray(0, MAGIC.length).equals(MAGIC)) throw badImage('luks.magic', 'is not that of a LUKS header');
  const version = bytes.readUInt16BE(6);
  if (version !== VERSION) {
    throw unsupportedImage('luks.version', `is ${version}`, 'QEMU knows version 1 only; convert the image');
  }
  const header: LuksHeader = {
    cipherName: textAt(bytes, 8, 32, 'luks.cipher_name'),
    cipherMode: textAt(bytes, 40, 32, 'luks.cipher_mode'),
    hash: textAt(bytes, 72, 32, 'luks.hash_spec'),
    payloadSector: bytes.readUInt32BE(104),
    keyBytes: bytes.readUInt32BE(108),
    digest: Buffer.from(bytes.subarray(112, 112 + LUKS_DIGEST_BYTES)),
    digestSalt: Buffer.from(bytes.subarray(132, 132 + LUKS_SALT_BYTES)),
    digestIterations: bytes.readUInt32BE(164),
    uuid: textAt(bytes, 168, 40, 'luks.uuid'),
    slots: Array.from({ length: LUKS_SLOTS }, (_, i) => decodeSlot(bytes, i)),
  };
  checkHeader(header, placeBytes);
  return header;
}

/** @param before what the header was, of which the bytes that mean nothing are kept */
export function encodeLuksHeader(header: LuksHeader, before?: Buffer): Buffer {
  const bytes = Buffer.alloc(LUKS_HEADER_BYTES);
  before?.copy(bytes, 0, 0, LUKS_HEADER_BYTES);
  MAGIC.copy(bytes, 0);
  bytes.writeUInt16BE(VERSION, 6);
  putText(bytes, header.cipherName, 8, 32);
  putText(bytes, header.cipherMode, 40, 32);
  putText(bytes, header.hash, 72, 32);
  bytes.writeUInt32BE(header.payloadSector, 104);
  bytes.writeUInt32BE(header.keyBytes, 108);
  header.digest.copy(bytes, 112);
  header.digestSalt.copy(bytes, 132);
  bytes.writeUInt32BE(header.digestIterations, 164);
  putText(bytes, header.uuid, 168, 40);
  for (const [i, slot] of header.slots.entries()) {
    const at = SLOTS_AT + i * SLOT_BYTES;
    bytes.writeUInt32BE(slot.isActive ? ACTIVE : INACTIVE, at);
    bytes.writeUInt32BE(slot.iterations, at + 4);
    slot.salt.copy(bytes, at + 8);
    bytes.writeUInt32BE(slot.materialSector, at + 40);
    bytes.writeUInt32BE(LUKS_STRIPES, at + 44);
  }
  return bytes;
}

function decodeSlot(bytes: Buffer, index: number): LuksKeySlot {
  const field = `luks.key_slots[${index}]`;
  const at = SLOTS_AT + index * SLOT_BYTES;
  const active = bytes.readUInt32BE(at);
  if (active !== ACTIVE && active !== INACTIVE) throw badImage(`${field}.active`, `is 0x${active.toString(16)}`);
  const stripes = bytes.readUInt32BE(at + 44);
  if (stripes !== LUKS_STRIPES) throw badImage(`${field}.stripes`, `is ${stripes}, it has to be ${LUKS_STRIPES}`);
  return {
    isActive: active === ACTIVE,
    iterations: bytes.readUInt32BE(at + 4),
    salt: Buffer.from(bytes.subarray(at + 8, at + 8 + LUKS_SALT_BYTES)),
    materialSector: bytes.readUInt32BE(at + 40),
  };
}

function checkHeader(header: LuksHeader, placeBytes: number): void {
  const { keyBytes, slots } = header;
  if (keyBytes === 0 || keyBytes > KEY_BYTES_MAX || keyBytes % 8 !== 0) {
    throw badImage('luks.key_bytes', `is ${keyBytes}, it may be 8 to ${KEY_BYTES_MAX}, in eights`);
  }
  checkIterations('luks.mk_digest_iter', header.digestIterations);
  let end = LUKS_HEADER_BYTES;
  const inOrder = [...slots.entries()].sort(([, a], [, b]) => a.materialSector - b.materialSector);
  for (const [i, slot] of inOrder) {
    const field = `luks.key_slots[${i}]`;
    if (slot.isActive) checkIterations(`${field}.iterations`, slot.iterations);
    const start = slot.materialSector * LUKS_SECTOR_BYTES;
    const problem = `is ${slot.materialSector}`;
    if (start < end) throw badImage(`${field}.key_offset`, `${problem}, where there is something else already`);
    end = start + materialBytesOf(keyBytes);
    if (end > placeBytes) throw badImage(`${field}.key_offset`, `${problem}, its key reaches beyond the LUKS header`);
  }
}

function checkIterations(field: string, iterations: number): void {
  if (iterations === 0 || iterations > LUKS_ITERATIONS_MAX) {
    throw badImage(field, `is ${iterations}, it may be 1 to ${LUKS_ITERATIONS_MAX}`);
  }
}

function textAt(bytes: Buffer, at: number, length: number, field: string): string {
  const end = bytes.subarray(at, at + length).indexOf(0);
  const text = bytes.toString('latin1', at, end < 0 ? at + length : at + end);
  if (!/^[\x20-\x7e]*$/.test(text)) throw badImage(field, 'is not text');
  return text;
}

function putText(bytes: Buffer, text: string, at: number, length: number): void {
  bytes.fill(0, at, at + length);
  bytes.write(text, at, length - 1, 'latin1');
}
