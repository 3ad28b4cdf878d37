/** `encrypt.*` of create, with qemu-img's names: the LUKS header of a new image. The passphrase comes from a file, never from the command line. */
import { LUKS_DEFAULTS, createLuks } from '../../bdev/qcow2/luks.js';
import { inlineKeyWork } from '../../bdev/qcow2/luks/key-work.js';
import type { LuksHeader } from '../../bdev/qcow2/luks/luks-format.js';
import { SystemClock } from '../../poller/clock.js';
import { runTask } from './node-file.js';
import { readSecret } from './secrets.js';
import { usage } from './words.js';

const PREFIX = 'encrypt.';
const SECTOR_BYTES = 512;

/** Name, what it takes, what it does: for `-o help`. */
export const ENCRYPT_OPTIONS: readonly (readonly [string, string, string])[] = [
  ['encrypt.format', 'str', 'How the disk is encrypted: luks'],
  ['encrypt.key-secret', 'str', 'ID of the secret with the passphrase, see --object'],
  ['encrypt.cipher-alg', 'str', `Cipher (${LUKS_DEFAULTS.cipherAlg})`],
  ['encrypt.cipher-mode', 'str', `Mode of the cipher (${LUKS_DEFAULTS.cipherMode})`],
  ['encrypt.hash-alg', 'str', `Hash for passphrases (${LUKS_DEFAULTS.hashAlg})`],
  ['encrypt.ivgen-alg', 'str', `Initial vectors (${LUKS_DEFAULTS.ivgenAlg})`],
  ['encrypt.ivgen-hash-alg', 'str', 'Hash for initial vectors, with essiv'],
  ['encrypt.iter-time', 'num', `Milliseconds that it takes to try a passphrase (${LUKS_DEFAULTS.iterTimeMs})`],
];

/** The header of a new image, or null when it is not to be encrypted. @param secrets `--object`s. Throws BdevError. */
export function makeLuksHeader(options: ReadonlyMap<string, string>, secrets: readonly string[]): Buffer | null {
  const of = (name: string): string | undefined => options.get(PREFIX + name);
  if (![...options.keys()].some((name) => name.startsWith(PREFIX))) return null;
  if (of('format') !== 'luks') {
    throw usage('encrypt.format', `encrypt.format is '${of('format') ?? ''}'`, 'use encrypt.format=luks');
  }
  const id = of('key-secret');
  if (id === undefined) throw usage('encrypt.key-secret', 'LUKS needs a passphrase', 'name a secret of --object');
  const iterTime = of('iter-time');
  const iterTimeMs = iterTime === undefined ? LUKS_DEFAULTS.iterTimeMs : Number(iterTime);
  if (!(iterTimeMs >= 1 && iterTimeMs <= 3_600_000)) {
    throw usage('encrypt.iter-time', `encrypt.iter-time is '${iterTime}'`, 'give milliseconds, as 2000');
  }
  const passphrase = readSecret(id, secrets);
  const luks = {
    cipherAlg: of('cipher-alg') ?? LUKS_DEFAULTS.cipherAlg,
    cipherMode: of('cipher-mode') ?? LUKS_DEFAULTS.cipherMode,
    hashAlg: of('hash-alg') ?? LUKS_DEFAULTS.hashAlg,
    ivgenAlg: of('ivgen-alg') ?? LUKS_DEFAULTS.ivgenAlg,
    ivgenHashAlg: of('ivgen-hash-alg') ?? LUKS_DEFAULTS.ivgenHashAlg,
    iterTimeMs,
  };
  try {
    const { bytes, unlocked } = runTask(createLuks(luks, passphrase, new SystemClock(), inlineKeyWork));
    unlocked.masterKey.fill(0);
    return bytes;
  } finally {
    passphrase.fill(0);
  }
}

/** What `info` shows of a LUKS header, by qemu-img's names. */
export function luksInfo(header: LuksHeader): Record<string, unknown> {
  const [cipherMode = '', iv = ''] = header.cipherMode.split('-');
  const [ivgen = '', ivHash] = iv.split(':');
  const keyBits = header.keyBytes * 8;
  return {
    'ivgen-alg': ivgen,
    ...(ivHash === undefined ? {} : { 'ivgen-hash-alg': ivHash }),
    'hash-alg': header.hash,
    // In this mode there are two keys in one.
    'cipher-alg': `${header.cipherName}-${cipherMode === 'xts' ? keyBits / 2 : keyBits}`,
    uuid: header.uuid,
    format: 'luks',
    'cipher-mode': cipherMode,
    slots: header.slots.map(({ isActive, iterations, materialSector }) => ({
      active: isActive,
      ...(isActive ? { iters: iterations } : {}),
      'key-offset': materialSector * SECTOR_BYTES,
      ...(isActive ? { stripes: 4000 } : {}),
    })),
    'payload-offset': header.payloadSector * SECTOR_BYTES,
    'master-key-iters': header.digestIterations,
  };
}
