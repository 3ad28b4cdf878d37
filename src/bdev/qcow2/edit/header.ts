/**
 * Changing an image's header. Everything that says where the metadata is lies within the first 512 bytes, which a disk writes whole
 * or not at all: a change of an image is made elsewhere and comes into force with the write of this sector.
 *
 * Extensions and names may reach beyond it. What the header in force refers to there is not written to: where that has to change, the
 * first sector is written as one that does without (the names of features are left out, a long backing name is kept apart), then
 * what lies beyond, then the first sector again. Each of these headers says the same of the image, or what is new.
 *
 * Only extensions that are unknown here, a name of a data file that does not fit, or two long names in a cluster that is too small
 * for both need two sectors at once; these are written in one piece and may be torn by a loss of power.
 */
import { BdevError } from '../../bdev.js';
import {
  Autoclear,
  BACKING_NAME_BYTES_MAX,
  Compatible,
  Extension,
  HEADER_V2_BYTES,
  Incompatible,
  decodeHeader,
  encodeHeader,
  firstClusterBytes,
  offsetAt,
  unknownAutoclear,
  withSession,
  writeUInt64,
} from '../format.js';
import type { Qcow2Header } from '../format.js';
import { unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import type { Task } from '../../task.js';

const SECTOR_BYTES = 512;

/** A header with the bytes of the cluster it was read from. */
export interface LoadedHeader {
  readonly header: Qcow2Header;
  readonly cluster: Buffer;
}

/** Throws BdevError. */
export function* loadHeader(file: ImageFile): Task<LoadedHeader> {
  const start = Buffer.alloc(SECTOR_BYTES);
  yield* file.read(0, start);
  const cluster = Buffer.alloc(firstClusterBytes(start));
  yield* file.read(0, cluster);
  return {
    header: decodeHeader(cluster.subarray(0, Math.min(cluster.length, file.sizeBytes)), file.sizeBytes),
    cluster,
  };
}

/** Throws BdevError for an image that has to be repaired before anything is changed. */
export function assertEditable({ incompatible }: Qcow2Header): void {
  const check = '`strata img check --repair` makes it good';
  if ((incompatible & Incompatible.corrupt) !== 0n) {
    throw unsupportedImage('header.incompatible_features', 'says that the image is corrupt', check);
  }
  if ((incompatible & Incompatible.dirty) !== 0n) {
    throw unsupportedImage('header.incompatible_features', 'says that refcounts are not up to date (dirty)', check);
  }
}

/**
 * Makes a header the image's, durably. What it points at is durable before. Autoclear bits that are not known here are cleared, and
 * so is the number of a session: what it wrote down elsewhere holds no longer. A disk in use begins another session afterwards.
 * @param loaded what is in force
 * @returns what is then. Throws BdevError.
 */
export function* commitHeader(file: ImageFile, loaded: LoadedHeader, wanted: Qcow2Header): Task<LoadedHeader> {
  const autoclear = withSession(wanted.autoclear & ~unknownAutoclear(wanted), 0);
  const { header, bytes } = encodeFitting({ ...wanted, autoclear });
  let { cluster } = loaded;
  let target = overlay(cluster, bytes, 0);
  const changed = changedSectors(cluster, target);
  if (changed.length > 1 && usedBytes(cluster, loaded.header) > SECTOR_BYTES) {
    const lean = leanHeader(loaded, bytes.length);
    if (lean === null) {
      const end = (changed.at(-1)! + 1) * SECTOR_BYTES;
      yield* commitSectors(file, target.subarray(0, end), 0);
      return { header, cluster: target };
    }
    for (const [offset, part] of lean) {
      yield* commitSectors(file, part, offset);
      cluster = overlay(cluster, part, offset);
    }
    target = overlay(cluster, bytes, 0);
  }
  const tail = changedSectors(cluster, target).filter((sector) => sector > 0);
  const isHeadChanged = changedSectors(cluster, target).includes(0);
  if (tail.length > 0) {
    const start = tail[0]! * SECTOR_BYTES;
    yield* commitSectors(file, target.subarray(start, (tail.at(-1)! + 1) * SECTOR_BYTES), start);
  }
  if (isHeadChanged) yield* commitSectors(file, target.subarray(0, SECTOR_BYTES), 0);
  return { header, cluster: target };
}

/** Reads the header, changes it and makes the change durable. Throws BdevError. */
export function* updateHeader(
  file: ImageFile,
  change: (header: Qcow2Header) => Partial<Qcow2Header>,
): Task<Qcow2Header> {
  const loaded = yield* loadHeader(file);
  const changed = change(loaded.header);
  if (Object.keys(changed).length === 0) return loaded.header;
  return (yield* commitHeader(file, loaded, { ...loaded.header, ...changed })).header;
}

/**
 * Changes what the image says of its backing file, and nothing else (`rebase -u`).
 * @param backingFile null: none. Throws BdevError.
 */
export function* changeBackingFile(
  file: ImageFile,
  backingFile: string | null,
  backingFormat: string | null,
): Task<Qcow2Header> {
  if (backingFile !== null && (backingFile === '' || Buffer.byteLength(backingFile) > BACKING_NAME_BYTES_MAX)) {
    throw new BdevError(
      'bad-name',
      'backing_file',
      `the name of the backing file has ${Buffer.byteLength(backingFile)} bytes, it may have 1 to ${BACKING_NAME_BYTES_MAX}`,
      'use a shorter path, as one relative to the image',
    );
  }
  return yield* updateHeader(file, (header) => {
    assertEditable(header);
    if (backingFile !== null && (header.autoclear & Autoclear.rawExternalData) !== 0n) {
      throw unsupportedImage(
        'header.autoclear_features',
        'says that its data file is raw',
        'it can have no backing file',
      );
    }
    return { backingFile, backingFormat: backingFile === null ? null : backingFormat };
  });
}

/** Says that refcounts may be behind what is written (lazy refcounts), or need not be any more. Throws BdevError. */
export function* setLazyRefcounts(file: ImageFile, lazy: boolean): Task<Qcow2Header> {
  return yield* updateHeader(file, (header) => {
    assertEditable(header);
    if (header.version < 3) throw unsupportedImage('header.version', 'is 2', 'lazy refcounts need version 3');
    const { lazyRefcounts } = Compatible;
    return { compatible: lazy ? header.compatible | lazyRefcounts : header.compatible & ~lazyRefcounts };
  });
}

/** Sets or clears the dirty or the corrupt bit, durably. Throws BdevError. */
export function* markImage(file: ImageFile, mark: 'dirty' | 'corrupt', isSet: boolean): Task<Qcow2Header> {
  return yield* updateHeader(file, (header) => {
    // Version 2 has no place for it.
    if (header.version < 3) return {};
    const bit = Incompatible[mark];
    return { incompatible: isSet ? header.incompatible | bit : header.incompatible & ~bit };
  });
}

/** The step at which a change comes into force, when `bytes` are of the first sector. */
function* commitSectors(file: ImageFile, bytes: Buffer, offset: number): Task<void> {
  if (offset + bytes.length > file.sizeBytes) yield* file.grow(offset + bytes.length);
  yield* file.write(offset, bytes);
  yield* file.sync();
}

/** The names of features may be left out where there is no room. */
function encodeFitting(header: Qcow2Header): { header: Qcow2Header; bytes: Buffer } {
  try {
    return { header, bytes: encodeHeader(header) };
  } catch (error) {
    if (header.featureNames.length === 0) throw error;
    const lean = { ...header, featureNames: [] };
    return { header: lean, bytes: encodeHeader(lean) };
  }
}

/**
 * What makes the header in force one that needs its first sector only, in the order of writing: the backing file's name where
 * nothing else is, if need be, and the sector. Null where that cannot be.
 */
function leanHeader({ header, cluster }: LoadedHeader, wantedBytes: number): [number, Buffer][] | null {
  const lean = { ...header, featureNames: [] };
  const whole = encodeHeader(lean);
  if (whole.length <= SECTOR_BYTES) return [[0, overlay(cluster.subarray(0, SECTOR_BYTES), whole, 0)]];
  const without = encodeHeader({ ...lean, backingFile: null });
  const name = Buffer.from(header.backingFile ?? '', 'utf8');
  const nameOffset = Math.ceil(Math.max(usedBytes(cluster, header), wantedBytes) / SECTOR_BYTES) * SECTOR_BYTES;
  if (without.length > SECTOR_BYTES || nameOffset + name.length > cluster.length) return null;
  writeUInt64(without, nameOffset, 8);
  without.writeUInt32BE(name.length, 16);
  return [
    [nameOffset, name],
    [0, overlay(cluster.subarray(0, SECTOR_BYTES), without, 0)],
  ];
}

/** How far what the header refers to reaches into its cluster. */
function usedBytes(cluster: Buffer, { version }: Qcow2Header): number {
  let at = version === 3 ? cluster.readUInt32BE(100) : HEADER_V2_BYTES;
  const nameOffset = offsetAt(cluster, 8, 'header.backing_file_offset');
  const end = nameOffset > 0 ? nameOffset : cluster.length;
  while (at + 8 <= end) {
    const type = cluster.readUInt32BE(at);
    at += type === Extension.end ? 8 : 8 + Math.ceil(cluster.readUInt32BE(at + 4) / 8) * 8;
    if (type === Extension.end) break;
  }
  return Math.min(cluster.length, Math.max(at, nameOffset > 0 ? nameOffset + cluster.readUInt32BE(16) : 0));
}

function changedSectors(before: Buffer, after: Buffer): number[] {
  const sectors = Array.from({ length: before.length / SECTOR_BYTES }, (_, i) => i);
  return sectors.filter((i) => {
    const [start, end] = [i * SECTOR_BYTES, (i + 1) * SECTOR_BYTES];
    return before.compare(after, start, end, start, end) !== 0;
  });
}

function overlay(bytes: Buffer, part: Buffer, offset: number): Buffer {
  const whole = Buffer.from(bytes);
  part.copy(whole, offset);
  return whole;
}
