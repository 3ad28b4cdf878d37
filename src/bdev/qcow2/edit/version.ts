/** The version of the format that an image is in: 3 (compat=1.1) or 2 (compat=0.10). Both changes are edits with one commit. */
import { FEATURE_NAMES, hasExternalData, l2EntryBytes } from '../format.js';
import type { Qcow2Header } from '../format.js';
import { unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import { encodeSnapshots } from '../tables.js';
import type { Task } from '../../task.js';
import { freeBits, placeDirectory } from './bitmaps.js';
import { entryOffset, isCompressed, isZeroEntry, setCopied, writeEntry } from './entries.js';
import { writeAt } from './file-access.js';
import { ImageEdit, loadL1 } from './image-edit.js';
import { eachL2, rewriteL2 } from './l2-tables.js';

/** Throws BdevError, and then nothing has changed. */
export function* upgradeImage(file: ImageFile): Task<void> {
  const edit = yield* ImageEdit.open(file);
  if (edit.header.version === 3) return;
  // Their sizes have to be said from now on.
  const snapshots = edit.snapshots.length === 0 ? {} : yield* replaceSnapshots(edit);
  yield* edit.commit({ version: 3, featureNames: FEATURE_NAMES, ...snapshots });
}

function* replaceSnapshots(edit: ImageEdit): Task<Partial<Qcow2Header>> {
  yield* edit.free(edit.snapshotTable);
  return { snapshotTableOffset: yield* edit.place(encodeSnapshots(edit.snapshots)) };
}

/**
 * Bitmaps are given up: version 2 has none.
 * @param hasBacking whether something shows through where the image holds nothing, so that zeroes have to be written out
 * @param onProgress is called with 0 to 1. Throws BdevError, and then nothing has changed
 */
export function* downgradeImage(
  file: ImageFile,
  hasBacking: boolean,
  onProgress: (fraction: number) => void,
): Task<void> {
  const edit = yield* ImageEdit.open(file);
  const { header } = edit;
  if (header.version === 2) return;
  assertSimple(edit);
  yield* assertNoZeroes(edit);
  const l1 = Buffer.from(edit.l1);
  const entries = l1.length / 8;
  for (let index = 0; index < entries; index++) {
    onProgress(index / entries);
    if (yield* hasZeroes(edit, l1, index)) yield* writeZeroesOut(edit, l1, index, hasBacking);
  }
  const moved = l1.equals(edit.l1) ? {} : yield* replaceL1(edit, l1);
  const snapshots = edit.snapshots.length === 0 ? {} : yield* replaceSnapshots(edit);
  for (const bitmap of edit.bitmaps) yield* freeBits(edit, bitmap);
  yield* placeDirectory(edit, []);
  const features = { incompatible: 0n, compatible: 0n, autoclear: 0n, featureNames: [], bitmaps: null };
  yield* edit.commit({ version: 2, ...features, ...moved, ...snapshots });
}

/** Throws BdevError for what version 2 does not know. */
function assertSimple({ header, snapshots }: ImageEdit): void {
  const refuse = (field: string, problem: string, hint: string): never => {
    throw unsupportedImage(field, problem, hint);
  };
  if (hasExternalData(header)) {
    refuse('header.incompatible_features', 'Cannot downgrade an image with a data file', 'convert it');
  }
  if (header.incompatible !== 0n) {
    refuse(
      'header.incompatible_features',
      `Cannot downgrade an image with incompatible features 0x${header.incompatible.toString(16)} set`,
      'convert it',
    );
  }
  if (header.refcountOrder !== 4) {
    refuse('header.refcount_order', 'compat=0.10 requires refcount_bits=16', 'add refcount_bits=16');
  }
  if (snapshots.some(({ sizeBytes }) => sizeBytes !== header.sizeBytes)) {
    refuse('snapshots', 'Internal snapshots prevent downgrade of image: one has another size', 'delete it');
  }
}

/** Snapshots share tables with the disk and with one another: their zeroes are not written out. Throws BdevError. */
function* assertNoZeroes(edit: ImageEdit): Task<void> {
  const { snapshots, header } = edit;
  for (const [i, { l1Offset, l1Entries }] of snapshots.entries()) {
    const l1 = yield* loadL1(edit.file, header, l1Offset, l1Entries, `snapshots[${i}].l1`);
    for (let index = 0; index < l1Entries; index++) {
      if (yield* hasZeroes(edit, l1, index)) {
        throw unsupportedImage(
          'snapshots',
          'hold zero clusters, which version 2 has not',
          'delete them, or convert it',
        );
      }
    }
  }
}

function* hasZeroes(edit: ImageEdit, l1: Buffer, index: number): Task<boolean> {
  let found = false;
  const entryBytes = l2EntryBytes(edit.header);
  yield* eachL2(
    edit,
    l1,
    function* (table) {
      for (let at = 0; at < table.length; at += entryBytes)
        found ||= !isCompressed(table, at) && isZeroEntry(table, at);
    },
    { from: index, to: index + 1 },
  );
  return found;
}

function* writeZeroesOut(edit: ImageEdit, l1: Buffer, index: number, hasBacking: boolean): Task<void> {
  const { clusterBytes, refcounts, file } = edit;
  const zeroes = Buffer.alloc(clusterBytes);
  yield* rewriteL2(edit, l1, index, function* (table) {
    for (let at = 0; at < table.length; at += 8) {
      if (isCompressed(table, at) || !isZeroEntry(table, at)) continue;
      const held = entryOffset(table, at) / clusterBytes;
      if (held > 0) yield* refcounts.lower(held, 1);
      table.fill(0, at, at + 8);
      if (!hasBacking) continue;
      const offset = (yield* refcounts.allocate(1)) * clusterBytes;
      yield* writeAt(file, offset, zeroes);
      writeEntry(table, at, offset);
    }
  });
  setCopied(l1, index * 8, true);
}

function* replaceL1(edit: ImageEdit, l1: Buffer): Task<Partial<Qcow2Header>> {
  yield* edit.free({ offset: edit.header.l1Offset, lengthBytes: edit.l1.length });
  return { l1Offset: yield* edit.place(l1) };
}
