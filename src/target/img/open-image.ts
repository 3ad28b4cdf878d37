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
import type { Task } from '../../bdev/qcow2/task.js';
import { parseFormat } from './image-options.js';
import type { Format } from './image-options.js';
import { NodeFile, runTask } from './node-file.js';
import type { NodeFileOptions } from './node-file.js';
import { usage } from './words.js';

/** Most snapshot tables are far shorter: the rest is read when need be. */
const SNAPSHOT_READ_BYTES = 2 ** 20;

export interface OpenImage {
  readonly file: NodeFile;
  readonly format: Format;
  /** Whether the format was guessed. */
  readonly isGuessed: boolean;
  /** Of a qcow2 image. */
  readonly header: Qcow2Header | null;
  /** Of the disk. */
  readonly sizeBytes: number;
}

/**
 * Opens an image. The caller closes its file.
 * @param format as the operator says, or null to look at the first bytes. Throws BdevError.
 */
export function openImage(path: string, format: string | null, options: NodeFileOptions): OpenImage {
  const file = new NodeFile(path, options);
  try {
    const known = format === null ? guessFormat(file) : parseFormat(format);
    const header = known === 'qcow2' ? runTask(readHeader(file)) : null;
    if (header !== null && sessionOf(header) !== 0) heedSession(path, options);
    const sizeBytes = header?.sizeBytes ?? Math.ceil(file.sizeBytes / 512) * 512;
    return { file, format: known, isGuessed: format === null, header, sizeBytes };
  } catch (error) {
    file.close();
    throw error;
  }
}

/**
 * The daemon was killed while it served the image, or it serves it now: part of what it answered is in its restart folder, and is
 * carried out when it serves the image again, unless somebody else has written to it. Throws BdevError.
 */
function heedSession(path: string, { mode, discardSession = false }: NodeFileOptions): void {
  const what = `${path} was in use by a daemon that did not end: the last writes may not be in it yet`;
  const hint = 'let the daemon serve it once more';
  if (mode === 'read') process.stderr.write(`strata img: warning: ${what}\n    -> ${hint}\n`);
  else if (!discardSession) {
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
