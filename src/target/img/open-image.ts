/**
 * Opening an image for a tool: the one file that was named, its format as it was said or as its first bytes tell, and what its
 * header, snapshot table and bitmap directory say. Nothing that the image names is opened here.
 */
import { dirname, isAbsolute, join } from 'node:path';
import { readHeader } from '../../bdev/qcow2/check.js';
import { BdevError } from '../../bdev/bdev.js';
import { Autoclear, isQcow2, sessionOf } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import { SNAPSHOT_TABLE_BYTES_MAX, decodeBitmaps, decodeSnapshots } from '../../bdev/qcow2/tables.js';
import type { Bitmap, Snapshot } from '../../bdev/qcow2/tables.js';
import type { Task } from '../../bdev/task.js';
import { unlockLuks } from '../../bdev/qcow2/luks.js';
import type { UnlockedLuks } from '../../bdev/qcow2/luks.js';
import { inlineKeyWork } from '../../bdev/qcow2/luks/key-work.js';
import { parseFormat } from './image-options.js';
import type { Format } from './image-options.js';
import type { ImageSpec, SnapshotChoice } from './image-spec.js';
import { NodeFile, runTask } from './node-file.js';
import type { NodeFileOptions } from './node-file.js';
import { usage } from './words.js';

/** Most snapshot tables are far shorter: the rest is read when need be. */
const SNAPSHOT_READ_BYTES = 2 ** 20;

export interface OpenImage {
  readonly spec: ImageSpec;
  readonly file: NodeFile;
  readonly format: Format;
  /** Whether the format was guessed. */
  readonly isGuessed: boolean;
  /** Of a qcow2 image; with the mapping and the size of the snapshot, if one was chosen. */
  readonly header: Qcow2Header | null;
  /** Of the disk. */
  readonly sizeBytes: number;
  /** Of an encrypted image whose passphrase was given; wiped by `closeImage`. */
  readonly key: UnlockedLuks | null;
}

/** Opens an image. The caller closes it by `closeImage`. Throws BdevError. */
export function openImage(spec: ImageSpec, options: NodeFileOptions): OpenImage {
  const { path, format } = spec;
  const file = new NodeFile(path, { ...options, forceShare: options.mode === 'read' && sharesFile(spec, options) });
  try {
    const known = format === null ? guessFormat(file) : parseFormat(format);
    const stored = known === 'qcow2' ? runTask(readHeader(file)) : null;
    if (stored !== null && sessionOf(stored) !== 0) heedSession(path, options);
    const header = spec.snapshot === undefined ? stored : snapshotHeader(file, stored, spec.snapshot);
    const sizeBytes = header?.sizeBytes ?? Math.ceil(file.sizeBytes / 512) * 512;
    const key = unlock(file, header, spec);
    return { spec, file, format: known, isGuessed: format === null, header, sizeBytes, key };
  } catch (error) {
    file.close();
    throw error;
  }
}

/** Closes an image, and forgets its key. */
export function closeImage({ file, key }: OpenImage): void {
  file.close();
  key?.masterKey.fill(0);
}

function sharesFile(spec: ImageSpec, { forceShare = false }: NodeFileOptions): boolean {
  return forceShare || spec.forceShare === true;
}

/** Throws BdevError when the passphrase is none of the image's. */
function unlock(file: NodeFile, header: Qcow2Header | null, { path, passphrase }: ImageSpec): UnlockedLuks | null {
  if (passphrase === undefined) return null;
  const place = header?.luksHeader ?? null;
  if (place === null) {
    throw usage('encrypt.key-secret', `${path} is not encrypted by LUKS`, 'leave the secret out');
  }
  const bytes = passphrase();
  try {
    return runTask(unlockLuks(file, place, bytes, inlineKeyWork));
  } finally {
    bytes.fill(0);
  }
}

/** The header with the mapping of a snapshot. Throws BdevError when there is none such. */
function snapshotHeader(file: NodeFile, header: Qcow2Header | null, wanted: SnapshotChoice): Qcow2Header {
  const all = header === null ? [] : runTask(readSnapshots(file, header));
  const { id, name, idOrName } = wanted;
  const found =
    idOrName === undefined
      ? all.find((snapshot) => (id ?? snapshot.id) === snapshot.id && (name ?? snapshot.name) === snapshot.name)
      : (all.find((snapshot) => snapshot.id === idOrName) ?? all.find((snapshot) => snapshot.name === idOrName));
  if (header === null || found === undefined || (id ?? name ?? idOrName) === undefined) {
    const known = all.map((snapshot) => `${snapshot.id} (${snapshot.name})`).join(', ');
    throw usage('-l', `Failed to load snapshot: ${file.path} has no such one`, `there are: ${known || 'none'}`);
  }
  return { ...header, l1Offset: found.l1Offset, l1Entries: found.l1Entries, sizeBytes: found.sizeBytes };
}

/**
 * The daemon was killed while it served the image, or it serves it now: part of what it answered is in its restart folder, and is
 * carried out when it serves the image again, unless somebody else has written to it. Throws BdevError.
 */
function heedSession(path: string, { mode, discardSession = false }: NodeFileOptions): void {
  if (discardSession) return;
  const what = `${path} was in use by a daemon that did not end: the last writes may not be in it yet`;
  const hint = 'let the daemon serve it once more';
  if (mode === 'read') process.stderr.write(`strata img: warning: ${what}\n    -> ${hint}\n`);
  else {
    const field = 'header.autoclear_features';
    throw new BdevError('in-session', field, what, `${hint}; or give those writes up with --discard-session`);
  }
}

function guessFormat(file: NodeFile): Format {
  const bytes = Buffer.alloc(8);
  file.readNow(0, bytes);
  return isQcow2(bytes) ? 'qcow2' : 'raw';
}

/** The snapshots of an image. Throws BdevError. */
export function* readSnapshots(file: NodeFile, header: Qcow2Header): Task<Snapshot[]> {
  if (header.snapshotCount === 0) return [];
  const there = Math.min(SNAPSHOT_TABLE_BYTES_MAX, Math.max(0, file.sizeBytes - header.snapshotTableOffset));
  const first = Buffer.alloc(Math.min(SNAPSHOT_READ_BYTES, there));
  yield* file.read(header.snapshotTableOffset, first);
  try {
    return decodeSnapshots(first, header, file.sizeBytes).snapshots;
  } catch (error) {
    if (first.length === there) throw error;
  }
  const all = Buffer.alloc(there);
  yield* file.read(header.snapshotTableOffset, all);
  return decodeSnapshots(all, header, file.sizeBytes).snapshots;
}

/** The bitmaps of an image that are valid. Throws BdevError. */
export function* readBitmaps(file: NodeFile, header: Qcow2Header): Task<Bitmap[]> {
  const { bitmaps } = header;
  if (bitmaps === null || (header.autoclear & Autoclear.bitmaps) === 0n) return [];
  const directory = Buffer.alloc(bitmaps.directoryBytes);
  yield* file.read(bitmaps.directoryOffset, directory);
  return decodeBitmaps(directory, bitmaps.count, header, file.sizeBytes);
}

/** Where a name in an image points: relative to the image's folder. Throws BdevError for what is no local file. */
export function resolveName(imagePath: string, name: string): string {
  const local = name.startsWith('file:') ? name.slice(5) : name;
  // `nbd:...` and `json:{...}`: a colon before any slash names a protocol.
  if (/^[^/]*:/.test(local)) {
    throw usage('backing_file', `'${name}' is not the name of a local file`, 'only local files are opened');
  }
  return isAbsolute(local) ? local : join(dirname(imagePath), local);
}
