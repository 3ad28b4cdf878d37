/**
 * The L2 tables below an L1 table, in bulk: who uses which cluster, and which clusters may be written in place. Runs of clusters are
 * handled as one, and nothing is made per cluster: a disk of 100 GiB has 1.6 million of them.
 *
 * A cluster's refcount counts the ways that lead to it: an L2 table that two L1 tables share counts all its clusters twice. So
 * sharing a table, or copying it, does not change the refcounts of what it points at.
 */
import { hasExternalData, l2EntryBytes } from '../format.js';
import { badImage } from '../image-error.js';
import type { Task } from '../../task.js';
import {
  compressedRange,
  entryOffset,
  isCompressed,
  isCopied,
  isEmptyEntry,
  setCopied,
  writeEntry,
} from './entries.js';
import { writeAt } from './file-access.js';
import type { ImageEdit } from './image-edit.js';

const READ_BYTES_MAX = 2 ** 20;

/** Entries of an L1 table, the last one excluded. */
export interface L1Range {
  readonly from: number;
  readonly to: number;
}

/** Reads the L2 tables of an L1 table, one after the other; ones that lie side by side at once. The bytes may be changed. */
export function* eachL2(
  edit: ImageEdit,
  l1: Buffer,
  visit: (table: Buffer, index: number) => Task<void>,
  { from, to }: L1Range = wholeL1(l1),
): Task<void> {
  const { clusterBytes } = edit;
  for (let index = from; index < to;) {
    const offset = entryOffset(l1, index * 8);
    if (offset === 0) {
      index++;
      continue;
    }
    let count = 1;
    while (
      index + count < to &&
      (count + 1) * clusterBytes <= READ_BYTES_MAX &&
      entryOffset(l1, (index + count) * 8) === offset + count * clusterBytes
    ) {
      count++;
    }
    const bytes = Buffer.alloc(count * clusterBytes);
    yield* edit.file.read(offset, bytes);
    for (let i = 0; i < count; i++) {
      yield* visit(bytes.subarray(i * clusterBytes, (i + 1) * clusterBytes), index + i);
    }
    index += count;
  }
}

export function wholeL1(l1: Buffer): L1Range {
  return { from: 0, to: l1.length / 8 };
}

/** Counts the L2 tables of an L1 table, and all that they point at, once more (1) or once less (-1). Throws BdevError. */
export function* countReferences(edit: ImageEdit, l1: Buffer, by: 1 | -1, range: L1Range = wholeL1(l1)): Task<void> {
  yield* eachL2(
    edit,
    l1,
    function* (table, index) {
      yield* countOnce(edit, entryOffset(l1, index * 8) / edit.clusterBytes, 1, by);
      yield* countEntries(edit, table, 0, table.length / l2EntryBytes(edit.header), by, index);
    },
    range,
  );
}

/** Counts what the entries of an L2 table point at. Throws BdevError. */
export function* countEntries(
  edit: ImageEdit,
  table: Buffer,
  from: number,
  to: number,
  by: 1 | -1,
  l1Index: number,
): Task<void> {
  const { header, clusterBytes } = edit;
  const isExternal = hasExternalData(header);
  const entryBytes = l2EntryBytes(header);
  let first = -1;
  let count = 0;
  for (let i = from; i < to; i++) {
    const at = i * entryBytes;
    if (isEmptyEntry(table, at)) continue;
    let cluster = -1;
    let clusters = 1;
    if (isCompressed(table, at)) {
      if (isExternal) throw badImage(entryName(l1Index, i), 'is compressed, but the data lies in an external file');
      const { offset, lengthBytes } = compressedRange(table, at, header);
      cluster = Math.floor(offset / clusterBytes);
      clusters = Math.floor((offset + lengthBytes - 1) / clusterBytes) - cluster + 1;
    } else {
      const offset = isExternal ? 0 : dataOffset(table, at, clusterBytes, l1Index, i);
      if (offset === 0) continue;
      cluster = offset / clusterBytes;
    }
    if (cluster !== first + count) {
      if (count > 0 && !edit.refcounts.changeNow(first, count, by)) yield* countOnce(edit, first, count, by);
      first = cluster;
      count = 0;
    }
    count += clusters;
  }
  if (count > 0) yield* countOnce(edit, first, count, by);
}

function* countOnce({ refcounts }: ImageEdit, first: number, count: number, by: 1 | -1): Task<void> {
  if (by === 1) yield* refcounts.raise(first, count);
  else yield* refcounts.lower(first, count);
}

/** Host offset of a standard entry. Throws BdevError. */
export function dataOffset(table: Buffer, at: number, clusterBytes: number, l1Index: number, index: number): number {
  const offset = entryOffset(table, at);
  if (offset % clusterBytes !== 0)
    throw badImage(entryName(l1Index, index), `is ${offset}, not the start of a cluster`);
  return offset;
}

function entryName(l1Index: number, index: number): string {
  return `l2[${l1Index}][${index}]`;
}

/**
 * Sets the copied flags of the active L1 table and its L2 tables to what the refcounts say: exactly 1. An L2 table that changes
 * moves to a new cluster.
 * @param l1 the active table, changed in place
 * @param shared another L1 table that points at the same L2 tables, and goes on to do so. Throws BdevError.
 */
export function* settleCopied(edit: ImageEdit, l1: Buffer, shared: Buffer | null = null): Task<void> {
  const { refcounts, clusterBytes } = edit;
  yield* eachL2(edit, l1, function* (table, index) {
    const old = entryOffset(l1, index * 8) / clusterBytes;
    if (yield* settleEntries(edit, table, index)) {
      const cluster = yield* refcounts.allocate(1);
      yield* writeAt(edit.file, cluster * clusterBytes, table);
      if (shared !== null) yield* refcounts.raise(cluster, 1);
      yield* refcounts.lower(old, 1, shared === null ? 1 : 2);
      writeEntry(l1, index * 8, cluster * clusterBytes);
    }
    const isOnly = (yield* refcounts.get(entryOffset(l1, index * 8) / clusterBytes)) === 1;
    setCopied(l1, index * 8, isOnly);
    if (shared !== null) l1.copy(shared, index * 8, index * 8, index * 8 + 8);
  });
}

/** Returns whether a flag had to be changed. */
function* settleEntries(edit: ImageEdit, table: Buffer, l1Index: number): Task<boolean> {
  const { refcounts, clusterBytes, header } = edit;
  if (hasExternalData(header)) return false;
  const entryBytes = l2EntryBytes(header);
  let isChanged = false;
  for (let at = 0; at < table.length; at += entryBytes) {
    if (isEmptyEntry(table, at) || isCompressed(table, at)) continue;
    const offset = dataOffset(table, at, clusterBytes, l1Index, at / entryBytes);
    if (offset === 0) continue;
    const known = refcounts.peek(offset / clusterBytes);
    const count = known >= 0 ? known : yield* refcounts.get(offset / clusterBytes);
    if (count === 0) throw badImage(entryName(l1Index, at / entryBytes), `is ${offset}, where the refcount is 0`);
    if (isCopied(table, at) === (count === 1)) continue;
    setCopied(table, at, count === 1);
    isChanged = true;
  }
  return isChanged;
}

/**
 * Changes the L2 table at an entry of an L1 table, or makes one there: the new table lies in a cluster of its own.
 * @param l1 changed in place
 * @param change works on the table's bytes, and counts what it points at and no longer points at. Throws BdevError.
 */
export function* rewriteL2(
  edit: ImageEdit,
  l1: Buffer,
  index: number,
  change: (table: Buffer) => Task<void>,
): Task<void> {
  const { clusterBytes, refcounts } = edit;
  const table = Buffer.alloc(clusterBytes);
  const old = entryOffset(l1, index * 8);
  if (old > 0) yield* edit.file.read(old, table);
  yield* change(table);
  const offset = (yield* refcounts.allocate(1)) * clusterBytes;
  yield* writeAt(edit.file, offset, table);
  if (old > 0) yield* refcounts.lower(old / clusterBytes, 1);
  writeEntry(l1, index * 8, offset);
}
