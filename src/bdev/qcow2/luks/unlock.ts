/**
 * From the passphrase in a file to the key of an image that is to be served.
 *
 * Invariants
 * - The file is read once, and nobody but its owner may read it. What was in it is wiped when it has been tried.
 * - An image without encryption is not served where a key is given: whoever can replace the file would read what is written to it.
 */
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { BdevError } from '../../bdev.js';
import { CryptMethod } from '../format.js';
import type { Qcow2Header } from '../format.js';
import { unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import { unlockLuks } from '../luks.js';
import type { UnlockedLuks } from '../luks.js';
import type { Task } from '../../task.js';
import type { KeyWork } from './key-work.js';

const FIELD = 'keyFile';
const PASSPHRASE_BYTES_MAX = 64 * 1024;
const OTHERS = 0o077;

/** What a disk is encrypted with. */
export type DiskKey = Pick<UnlockedLuks, 'spec' | 'masterKey'>;

/**
 * @param keyFile null: the image has to be one without encryption
 * @returns the key, wiped by the caller; null for an image without encryption. Throws BdevError
 */
export function* unlockImage(
  file: ImageFile,
  header: Qcow2Header,
  keyFile: string | null,
  work: KeyWork,
): Task<DiskKey | null> {
  const { cryptMethod, luksHeader } = header;
  if (cryptMethod === CryptMethod.none) {
    if (keyFile === null) return null;
    throw keyError(
      'not-encrypted',
      'the image is not encrypted',
      'leave the key out, or look whether it is that image',
    );
  }
  if (luksHeader === null) {
    throw unsupportedImage(
      'header.crypt_method',
      `is ${cryptMethod}, AES as it was before LUKS`,
      'convert the image with qemu-img to encrypt.format=luks',
    );
  }
  if (keyFile === null) {
    throw keyError('no-key', 'the image is encrypted', 'name the file with its passphrase in `key_file`');
  }
  const passphrase = readPassphrase(keyFile);
  try {
    return yield* unlockLuks(file, luksHeader, passphrase, work);
  } catch (error) {
    if (!(error instanceof BdevError) || error.code !== 'wrong-passphrase') throw error;
    throw keyError(error.code, `the passphrase in ${keyFile} opens no key slot of the image`, error.hint);
  } finally {
    passphrase.fill(0);
  }
}

/** All bytes of a file. Throws BdevError. */
function readPassphrase(path: string): Buffer {
  let fd: number;
  try {
    // A pipe would be waited for.
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    const { code = 'failed' } = error as NodeJS.ErrnoException;
    throw keyError('key-file', `${path} cannot be opened: ${code}`, 'check the path and its permissions');
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile()) throw keyError('key-file', `${path} is no regular file`, 'put the passphrase into a file');
    if ((stat.mode & OTHERS) !== 0) {
      const mode = (stat.mode & 0o777).toString(8).padStart(4, '0');
      throw keyError('key-file', `${path} has mode ${mode}: others may use it`, `run \`chmod 600 ${path}\``);
    }
    if (stat.size === 0 || stat.size > PASSPHRASE_BYTES_MAX) {
      throw keyError(
        'key-file',
        `${path} has ${stat.size} bytes`,
        `a passphrase has 1 to ${PASSPHRASE_BYTES_MAX} bytes, and nothing else is in the file`,
      );
    }
    const bytes = Buffer.alloc(stat.size);
    const count = readSync(fd, bytes, 0, bytes.length, 0);
    if (count === bytes.length) return bytes;
    bytes.fill(0);
    throw keyError('key-file', `${path} changed while it was read`, 'try again');
  } finally {
    closeSync(fd);
  }
}

function keyError(code: string, message: string, hint: string): BdevError {
  return new BdevError(code, FIELD, message, hint);
}
