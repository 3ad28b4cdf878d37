/** `--object secret,...`: passphrases for images. They come from files, never from the command line, which others can read. */
import { readFileSync } from 'node:fs';
import { BdevError } from '../../bdev/bdev.js';
import { keyValues, usage } from './words.js';

const NAMES = ['qom-type', 'id', 'file', 'format'] as const;

/** The passphrase of a secret: the bytes of its file, all of them; the caller wipes them. Throws BdevError. */
export function readSecret(id: string, objects: readonly string[]): Buffer {
  for (const text of objects) {
    const [kind = '', ...rest] = text.split(',');
    if (kind !== 'secret' && kind !== 'qom-type=secret') {
      throw usage('--object', `there are no objects of type '${kind}' here`, 'as secret,id=key,file=PATH');
    }
    const fields = keyValues(rest.join(','));
    if (fields.get('id') !== id) continue;
    const path = fields.get('file');
    if (path === undefined) {
      throw usage('--object', `secret '${id}' names no file`, 'write file=PATH: others can read a command line');
    }
    for (const name of fields.keys()) {
      if (!NAMES.some((known) => known === name)) {
        throw usage('--object', `Invalid parameter '${name}' of secret '${id}'`, `use ${NAMES.slice(1).join(', ')}`);
      }
    }
    const bytes = readPassphrase(path);
    return fields.get('format') === 'base64' ? Buffer.from(bytes.toString('latin1'), 'base64') : bytes;
  }
  throw usage('encrypt.key-secret', `No secret with id '${id}'`, `add --object secret,id=${id},file=PATH`);
}

function readPassphrase(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    const { code = 'failed' } = error as NodeJS.ErrnoException;
    throw new BdevError('open-failed', '--object', `Could not read '${path}': ${code}`, 'check the path');
  }
}
