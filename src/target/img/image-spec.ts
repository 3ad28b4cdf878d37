/**
 * Which image a command means, and how it is to be opened: a file name with `-f`, or `--image-opts` with the keys of QEMU's block
 * drivers. A key that cannot be honoured is refused by its name.
 */
import { readSecret } from './secrets.js';
import { keyValues, parseSwitch, usage } from './words.js';

/** An internal snapshot: by id, by name, by both, or by what is the one or the other. */
export interface SnapshotChoice {
  readonly id?: string;
  readonly name?: string;
  readonly idOrName?: string;
}

export interface ImageSpec {
  readonly path: string;
  /** Null: looked at. */
  readonly format: string | null;
  /** What is behind it: null nothing; undefined, what the image names. */
  readonly backing?: ImageSpec | null;
  /** Instead of the data file that the image names. */
  readonly dataFile?: string;
  /** Reads the passphrase, wiped by the caller. Throws BdevError. */
  readonly passphrase?: () => Buffer;
  /** Read as it was then. */
  readonly snapshot?: SnapshotChoice;
  readonly forceShare?: boolean;
  /** Past the page cache. */
  readonly direct?: boolean;
}

/** What commands that open an image are told about it, beside its name. */
export interface SpecOptions {
  readonly imageOpts?: boolean;
  readonly object?: readonly string[];
  readonly forceShare?: boolean;
  /** Past the page cache. */
  readonly direct?: boolean;
}

const KEYS = [
  'driver',
  'filename',
  'file.driver',
  'file.filename',
  'encrypt.format',
  'encrypt.key-secret',
  'data-file.driver',
  'data-file.filename',
  'force-share',
  'cache.direct',
  'file.cache.direct',
  'backing',
] as const;
const BACKING = 'backing.';
const FILE_DRIVERS = ['file', 'host_device'];

/** @param format of `-f`, or null. Throws BdevError. */
export function imageSpec(text: string, format: string | null, options: SpecOptions): ImageSpec {
  const shared = {
    ...(options.forceShare === true ? { forceShare: true } : {}),
    ...(options.direct === true ? { direct: true } : {}),
  };
  if (options.imageOpts !== true) return { path: text, format, ...shared };
  if (format !== null) {
    throw usage(
      '--image-opts',
      '--image-opts and --format are mutually exclusive',
      'write driver=FORMAT in the options',
    );
  }
  return { ...specOf(keyValues(text), '', options.object ?? []), ...shared };
}

/** @param prefix of the keys, for messages */
function specOf(keys: ReadonlyMap<string, string>, prefix: string, objects: readonly string[]): ImageSpec {
  const behind = new Map<string, string>();
  for (const [key, value] of keys) {
    if (key.startsWith(BACKING)) behind.set(key.slice(BACKING.length), value);
    else if (!KEYS.some((known) => known === key)) {
      const hint = `use ${KEYS.join(', ')} and backing.KEY`;
      throw usage(prefix + key, `the option '${prefix}${key}' is not known here`, hint);
    }
  }
  const isOn = (key: string): boolean => keys.has(key) && parseSwitch(prefix + key, keys.get(key)!);
  const choose = (key: string, known: readonly string[]): void => {
    const value = keys.get(key);
    if (value === undefined || known.includes(value)) return;
    throw usage(prefix + key, `'${prefix}${key}' is '${value}'`, `use ${known.join(' or ')}`);
  };
  choose('file.driver', FILE_DRIVERS);
  choose('data-file.driver', FILE_DRIVERS);
  choose('encrypt.format', ['luks']);
  choose('driver', ['qcow2', 'raw', ...FILE_DRIVERS]);
  const driver = keys.get('driver') ?? null;
  const isFile = driver !== null && FILE_DRIVERS.includes(driver);
  const path = keys.get(isFile ? 'filename' : 'file.filename');
  if (path === undefined || keys.has(isFile ? 'file.filename' : 'filename')) {
    const wanted = isFile ? 'filename' : 'file.filename';
    throw usage(prefix + wanted, 'the options have to name a file', `as driver=${driver ?? 'qcow2'},${wanted}=PATH`);
  }
  const secret = keys.get('encrypt.key-secret');
  const dataFile = keys.get('data-file.filename');
  return {
    path,
    format: isFile ? 'raw' : driver,
    ...backingOf(keys.get('backing'), behind, prefix, objects),
    ...(secret === undefined ? {} : { passphrase: () => readSecret(secret, objects) }),
    ...(dataFile === undefined ? {} : { dataFile }),
    ...(isOn('force-share') ? { forceShare: true } : {}),
    ...(isOn('cache.direct') || isOn('file.cache.direct') ? { direct: true } : {}),
  };
}

function backingOf(
  word: string | undefined,
  behind: ReadonlyMap<string, string>,
  prefix: string,
  objects: readonly string[],
): { backing?: ImageSpec | null } {
  if (word !== undefined && (!['', 'null'].includes(word) || behind.size > 0)) {
    throw usage(`${prefix}backing`, `'${prefix}backing' is '${word}'`, "write 'backing=' for none, or backing.KEY=...");
  }
  if (word !== undefined) return { backing: null };
  return behind.size === 0 ? {} : { backing: specOf(behind, prefix + BACKING, objects) };
}

/** `-l`: `snapshot.id=ID,snapshot.name=NAME`, or an id or name alone. Throws BdevError. */
export function parseSnapshot(text: string): SnapshotChoice {
  if (!text.startsWith('snapshot.')) return { idOrName: text };
  const keys = keyValues(text);
  for (const key of keys.keys()) {
    if (key !== 'snapshot.id' && key !== 'snapshot.name') {
      throw usage('-l', `Invalid parameter '${key}'`, 'use snapshot.id and snapshot.name');
    }
  }
  const id = keys.get('snapshot.id');
  const name = keys.get('snapshot.name');
  return { ...(id === undefined ? {} : { id }), ...(name === undefined ? {} : { name }) };
}

/** Cache modes of `-t` and `-T`. */
export const CACHE_MODES = ['none', 'writeback', 'writethrough', 'directsync', 'unsafe'] as const;

/** Whether a cache mode reads and writes past the page cache. */
export function isDirect(mode: string | undefined): boolean {
  return mode === 'none' || mode === 'directsync';
}
