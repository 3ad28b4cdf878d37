/**
 * Persistent dirty bitmaps: what of a disk was written since some moment, kept in the image for incremental backups.
 *
 * A bitmap whose bits are kept in memory and get ahead of the image is marked as in use before, durably; who finds the mark knows that
 * the bits in the image are not to be trusted. The mark goes when the bits are stored. All other changes are edits with one commit.
 */
import { BdevError } from '../../bdev.js';
import { Autoclear, BITMAPS_MAX, BITMAP_DIRECTORY_BYTES_MAX, clusterBytesOf } from '../format.js';
import type { Qcow2Header } from '../format.js';
import { badImage, unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import {
  BITMAP_GRANULARITY_BITS_MAX,
  BITMAP_GRANULARITY_BITS_MIN,
  BitmapFlag,
  bitmapTableEntries,
  encodeBitmaps,
} from '../tables.js';
import type { Bitmap } from '../tables.js';
import type { Task } from '../../task.js';
import { BitmapBits } from './bitmap-bits.js';
import { entryOffset } from './entries.js';
import { assertEditable, loadHeader } from './header.js';
import { ImageEdit, loadBitmapDirectory } from './image-edit.js';

const NAME_BYTES_MAX = 1023;
const FLAGS_OFFSET = 12;

export interface NewBitmap {
  readonly name: string;
  /** One bit stands for so many bytes of the disk, as a power of two; as QEMU chooses if not given. */
  readonly granularityBits?: number;
  /** Does not record writes until it is enabled. */
  readonly isDisabled?: boolean;
}

/** The bitmaps of an image. Throws BdevError. */
export function* listBitmaps(file: ImageFile): Task<readonly Bitmap[]> {
  const { header } = yield* loadHeader(file);
  return yield* loadBitmapDirectory(file, header);
}

/** Adds a bitmap with nothing in it. Throws BdevError. */
export function* addBitmap(file: ImageFile, { name, granularityBits, isDisabled = false }: NewBitmap): Task<Bitmap> {
  const edit = yield* ImageEdit.open(file);
  const bits = granularityBits ?? Math.min(16, Math.max(12, edit.header.clusterBits));
  assertPossible(edit, name, bits);
  const bitmap: Bitmap = {
    name,
    ...(yield* placeBits(edit, new BitmapBits(edit.header.sizeBytes, bits))),
    flags: isDisabled ? 0 : BitmapFlag.auto,
    granularityBits: bits,
    extra: Buffer.alloc(0),
  };
  yield* edit.commit(yield* placeDirectory(edit, [...edit.bitmaps, bitmap]));
  return bitmap;
}

/** Removes a bitmap, also one that is not to be trusted. Throws BdevError. */
export function* removeBitmap(file: ImageFile, name: string): Task<void> {
  const edit = yield* ImageEdit.open(file);
  const bitmap = findBitmap(edit.bitmaps, name);
  yield* freeBits(edit, bitmap);
  const left = edit.bitmaps.filter((other) => other !== bitmap);
  yield* edit.commit(yield* placeDirectory(edit, left));
}

/** Makes all of the disk clean in a bitmap. Throws BdevError. */
export function* clearBitmap(file: ImageFile, name: string): Task<void> {
  const edit = yield* ImageEdit.open(file);
  const { granularityBits } = trusted(findBitmap(edit.bitmaps, name));
  yield* replaceBits(edit, new Map([[name, new BitmapBits(edit.header.sizeBytes, granularityBits)]]));
}

/** Whether writes are recorded in it from now on. Throws BdevError. */
export function* enableBitmap(file: ImageFile, name: string, isEnabled: boolean): Task<void> {
  const edit = yield* ImageEdit.open(file);
  trusted(findBitmap(edit.bitmaps, name));
  const changed = edit.bitmaps.map((bitmap) => {
    if (bitmap.name !== name) return bitmap;
    const flags = (isEnabled ? bitmap.flags | BitmapFlag.auto : bitmap.flags & ~BitmapFlag.auto) >>> 0;
    return { ...bitmap, flags };
  });
  yield* edit.commit(yield* placeDirectory(edit, changed));
}

/** Adds what other bitmaps of the image have to one of them. Throws BdevError. */
export function* mergeBitmaps(file: ImageFile, name: string, sources: readonly string[]): Task<void> {
  const edit = yield* ImageEdit.open(file);
  const bits = yield* loadBits(edit.file, edit.header, findBitmap(edit.bitmaps, name));
  for (const source of sources) {
    bits.merge(yield* loadBits(edit.file, edit.header, findBitmap(edit.bitmaps, source)));
  }
  yield* replaceBits(edit, new Map([[name, bits]]));
}

/** Loads a bitmap's bits into memory. Throws BdevError when they are not to be trusted. */
export function* loadBitmap(file: ImageFile, name: string): Task<BitmapBits> {
  const { header } = yield* loadHeader(file);
  return yield* loadBits(file, header, findBitmap(yield* loadBitmapDirectory(file, header), name));
}

/** Stores the bits of bitmaps, by name, all at once: they are not in use any more. Throws BdevError. */
export function* storeBitmaps(file: ImageFile, bits: ReadonlyMap<string, BitmapBits>): Task<void> {
  yield* replaceBits(yield* ImageEdit.open(file), bits);
}

/** Says that these bitmaps' bits in memory are ahead of the image: durable when this returns. Throws BdevError. */
export function* markBitmapsInUse(file: ImageFile, names: readonly string[]): Task<void> {
  const { header } = yield* loadHeader(file);
  assertEditable(header);
  const bitmaps = yield* loadBitmapDirectory(file, header);
  for (const name of names) trusted(findBitmap(bitmaps, name));
  let at = header.bitmaps?.directoryOffset ?? 0;
  for (const bitmap of bitmaps) {
    // Four bytes of one sector: there or not, and more marks than are needed do no harm.
    if (names.includes(bitmap.name)) yield* file.write(at + FLAGS_OFFSET, flagBytes(bitmap.flags | BitmapFlag.inUse));
    at += encodeBitmaps([bitmap]).length;
  }
  yield* file.sync();
}

/** Throws BdevError. */
export function findBitmap(bitmaps: readonly Bitmap[], name: string): Bitmap {
  const found = bitmaps.find((bitmap) => bitmap.name === name);
  if (found !== undefined) return found;
  throw new BdevError('no-such-bitmap', '', `the image has no bitmap ${JSON.stringify(name)}`, 'list its bitmaps');
}

/** Throws BdevError for a bitmap that a program left in use. */
export function trusted(bitmap: Bitmap): Bitmap {
  if ((bitmap.flags & BitmapFlag.inUse) === 0) return bitmap;
  throw new BdevError(
    'inconsistent-bitmap',
    '',
    `the bitmap ${JSON.stringify(bitmap.name)} was in use when a program ended: what it says may be wrong`,
    'remove it, and make a full backup next time',
  );
}

/** Throws BdevError. */
export function* loadBits(file: ImageFile, header: Qcow2Header, bitmap: Bitmap): Task<BitmapBits> {
  trusted(bitmap);
  const clusterBytes = clusterBytesOf(header);
  const bits = new BitmapBits(header.sizeBytes, bitmap.granularityBits);
  const table = yield* loadTable(file, bitmap, clusterBytes);
  const cluster = Buffer.alloc(clusterBytes);
  for (let i = 0; i < bitmap.tableEntries; i++) {
    const offset = entryOffset(table, i * 8);
    const start = i * clusterBytes;
    if (offset > 0) {
      yield* file.read(offset, cluster);
      cluster.copy(bits.bytes, start);
    } else if ((table[i * 8 + 7]! & 1) !== 0) bits.bytes.subarray(start, start + clusterBytes).fill(0xff);
  }
  bits.trim();
  return bits;
}

/** Writes bits to new clusters. Ones that are all the same take none. */
export function* placeBits(edit: ImageEdit, bits: BitmapBits): Task<Pick<Bitmap, 'tableOffset' | 'tableEntries'>> {
  const { clusterBytes } = edit;
  const tableEntries = bitmapTableEntries(bits.sizeBytes, bits.granularityBits, clusterBytes);
  const table = Buffer.alloc(tableEntries * 8);
  for (let i = 0; i < tableEntries; i++) {
    const chunk = bits.bytes.subarray(i * clusterBytes, (i + 1) * clusterBytes);
    if (chunk.every((byte) => byte === 0)) continue;
    if (chunk.every((byte) => byte === 0xff)) {
      table[i * 8 + 7] = 1;
      continue;
    }
    const offset = yield* edit.place(chunk);
    table.writeUInt32BE(Math.floor(offset / 2 ** 32), i * 8);
    table.writeUInt32BE(offset % 2 ** 32, i * 8 + 4);
  }
  return { tableOffset: yield* edit.place(table), tableEntries };
}

/** Gives back all clusters of a bitmap. Throws BdevError. */
export function* freeBits(edit: ImageEdit, bitmap: Bitmap): Task<void> {
  const table = yield* loadTable(edit.file, bitmap, edit.clusterBytes);
  for (let at = 0; at < table.length; at += 8) {
    const offset = entryOffset(table, at);
    if (offset > 0) yield* edit.refcounts.lower(offset / edit.clusterBytes, 1);
  }
  yield* edit.free({ offset: bitmap.tableOffset, lengthBytes: table.length });
}

/** Writes a new directory, gives back the old one, and returns what the header has to say of it. Throws BdevError. */
export function* placeDirectory(
  edit: ImageEdit,
  bitmaps: readonly Bitmap[],
): Task<Pick<Qcow2Header, 'bitmaps' | 'autoclear'>> {
  const { autoclear } = edit.header;
  const directory = encodeBitmaps(bitmaps);
  if (bitmaps.length > BITMAPS_MAX || directory.length > BITMAP_DIRECTORY_BYTES_MAX) {
    throw new BdevError('too-many-bitmaps', '', `the image has ${bitmaps.length - 1} bitmaps`, 'remove some');
  }
  yield* edit.free(edit.bitmapDirectory);
  if (bitmaps.length === 0) return { bitmaps: null, autoclear: autoclear & ~Autoclear.bitmaps };
  const directoryOffset = yield* edit.place(directory);
  return {
    bitmaps: { count: bitmaps.length, directoryOffset, directoryBytes: directory.length },
    autoclear: autoclear | Autoclear.bitmaps,
  };
}

function* replaceBits(edit: ImageEdit, bits: ReadonlyMap<string, BitmapBits>): Task<void> {
  for (const name of bits.keys()) findBitmap(edit.bitmaps, name);
  const replaced: Bitmap[] = [];
  for (const bitmap of edit.bitmaps) {
    const stored = bits.get(bitmap.name);
    if (stored === undefined) {
      replaced.push(bitmap);
      continue;
    }
    if (stored.sizeBytes !== edit.header.sizeBytes || stored.granularityBits !== bitmap.granularityBits) {
      throw new BdevError('bad-bitmap', '', `the bits are not those of the bitmap ${bitmap.name}`, 'load it again');
    }
    yield* freeBits(edit, bitmap);
    const placed = yield* placeBits(edit, stored);
    replaced.push({ ...bitmap, ...placed, flags: (bitmap.flags & ~BitmapFlag.inUse) >>> 0 });
  }
  yield* edit.commit(yield* placeDirectory(edit, replaced));
}

function* loadTable(file: ImageFile, { name, tableOffset, tableEntries }: Bitmap, clusterBytes: number): Task<Buffer> {
  const table = Buffer.alloc(tableEntries * 8);
  yield* file.read(tableOffset, table);
  for (let i = 0; i < tableEntries; i++) {
    const offset = entryOffset(table, i * 8);
    const field = `bitmap ${JSON.stringify(name)} table[${i}]`;
    if (offset % clusterBytes !== 0) throw badImage(field, `is ${offset}, not the start of a cluster`);
    if (offset >= file.sizeBytes) throw badImage(field, `is ${offset}, beyond the end of the file`);
  }
  return table;
}

function assertPossible({ header, bitmaps }: ImageEdit, name: string, granularityBits: number): void {
  if (header.version < 3) {
    throw unsupportedImage('header.version', 'is 2', 'bitmaps need version 3: `strata img convert`');
  }
  const nameBytes = Buffer.byteLength(name);
  if (nameBytes === 0 || nameBytes > NAME_BYTES_MAX) {
    const bound = `1 to ${NAME_BYTES_MAX}`;
    throw new BdevError(
      'bad-name',
      'name',
      `the bitmap's name has ${nameBytes} bytes, it may have ${bound}`,
      'change it',
    );
  }
  if (bitmaps.some((bitmap) => bitmap.name === name)) {
    throw new BdevError('name-in-use', 'name', `the image has a bitmap ${JSON.stringify(name)}`, 'choose another name');
  }
  if (granularityBits < BITMAP_GRANULARITY_BITS_MIN || granularityBits > BITMAP_GRANULARITY_BITS_MAX) {
    throw new BdevError(
      'bad-granularity',
      'granularity',
      `the granularity is ${2 ** granularityBits} bytes`,
      'it may be 512 bytes to 2 GiB, a power of two',
    );
  }
}

function flagBytes(flags: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(flags >>> 0);
  return bytes;
}
