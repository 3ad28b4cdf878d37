/**
 * Checking an image, and repairing it: whether each cluster has as many users as its refcount says, and every table is as it has to be.
 * The numbers are those of qemu-img check, in one thing stricter: a cluster of metadata that is also used for something else is a
 * corruption also when its refcount counts both.
 *
 * Memory is a few bytes for each cluster in use, and one buffer; nothing is allocated by a number of the image that was not compared
 * with the file.
 */
import { BdevError } from '../bdev.js';
import { checkCopiedBits, isSoleUse, repairZeroEntries } from './check/copied-bits.js';
import { DiskRefcounts } from './check/disk-refcounts.js';
import { CLUSTERS_MAX, ImageReferences } from './check/image-references.js';
import { ReportBuilder } from './check/report.js';
import type { CheckReport } from './check/report.js';
import { repairSnapshots } from './check/snapshots.js';
import {
  Autoclear,
  Incompatible,
  clusterBytesOf,
  decodeHeader,
  encodeHeader,
  firstClusterBytes,
  unknownAutoclear,
  withSession,
} from './format.js';
import type { Qcow2Header } from './format.js';
import type { ImageFile } from './image-file.js';
import type { Task } from '../task.js';

export type { CheckReport, Finding, FindingKind } from './check/report.js';

/** What may be changed: nothing, refcounts that are too high, or all that can be put right. */
export type Repair = 'none' | 'leaks' | 'all';

export interface CheckOptions {
  readonly repair: Repair;
  /** Called now and then with 0 to 1. */
  readonly onProgress?: (fraction: number) => void;
}

/** Where the walk ends and the comparison of refcounts begins, of 1. */
const WALK_SHARE = 0.8;
const INCOMPATIBLE_AT = 72;

/**
 * Checks a whole image that nobody else uses meanwhile.
 * Throws BdevError when it is no qcow2 image or its header cannot be right, and when the file cannot be read or written.
 */
export function* checkImage(file: ImageFile, options: CheckOptions): Task<CheckReport> {
  const found = yield* readHeader(file);
  const report = new ReportBuilder();
  report.totalClusters = Math.ceil(found.sizeBytes / clusterBytesOf(found));
  if (Math.ceil(file.sizeBytes / clusterBytesOf(found)) > CLUSTERS_MAX) {
    report.error('image', `has more than ${CLUSTERS_MAX} clusters`);
    return report.build();
  }
  try {
    if (options.repair !== 'none') yield* prepareHeader(file, found);
    const header = options.repair === 'all' ? yield* repairSnapshots(file, found, report) : found;
    yield* checkParts(file, header, report, options);
  } catch (error) {
    if (!(error instanceof BdevError) || error.code === 'io-error' || error.code === 'no-space') throw error;
    report.error(error.field, error.message);
  }
  if (options.repair !== 'none' && report.checkErrors === 0 && report.corruptions === 0) yield* markClean(file, found);
  options.onProgress?.(1);
  return report.build();
}

/** Reads the header as a check does, which takes more than a program that uses the image. Throws BdevError. */
export function* readHeader(file: ImageFile): Task<Qcow2Header> {
  const sector = Buffer.alloc(512);
  yield* file.read(0, sector);
  const bytes = Buffer.alloc(Math.min(firstClusterBytes(sector), Math.max(file.sizeBytes, sector.length)));
  yield* file.read(0, bytes);
  return decodeHeader(bytes, file.sizeBytes, 'check');
}

function* checkParts(file: ImageFile, header: Qcow2Header, report: ReportBuilder, options: CheckOptions): Task<void> {
  const { repair } = options;
  const image = new ImageReferences(file, header, report, {
    isRepair: repair === 'all',
    onProgress: (fraction) => options.onProgress?.(fraction * WALK_SHARE),
  });
  yield* image.count();
  const refcounts = new DiskRefcounts(image);
  yield* refcounts.count();
  yield* repairZeroEntries(image);

  const mark = report.mark();
  yield* refcounts.compare('none');
  if (refcounts.mustRebuild && repair === 'all') {
    const { corruptions, leaks } = report.takeBack(mark);
    yield* refcounts.rebuild();
    if (corruptions > 0) report.repaired('corruption', 'refcounts', 'were wrong and are made anew', corruptions);
    if (leaks > 0) report.repaired('leak', 'refcounts', 'counted users that there are not', leaks);
  } else if (refcounts.mustRebuild && repair === 'leaks') {
    report.error('refcounts', 'have to be made anew, which a repair of leaks does not do');
    return;
  } else if (repair !== 'none' && (report.corruptions > 0 || report.leaks > 0)) {
    report.takeBack(mark);
    yield* refcounts.compare(repair);
  }
  if (refcounts.hasWrongCopied) {
    // A refcount that is still wrong says nothing about the bits.
    const isSound = report.corruptions === 0 && report.leaks === 0 && report.checkErrors === 0;
    yield* checkCopiedBits(image, repair === 'all' || (repair === 'leaks' && isSound));
  }
  if (report.corruptions === 0) findOverlaps(image);
  if (repair !== 'none') yield* file.sync();
}

/** Metadata that something else uses too, though its refcount is right. */
function findOverlaps(image: ImageReferences): void {
  const { header, counts, clusterBytes, report, activeTables } = image;
  const lookAt = (field: string, offset: number, lengthBytes: number): void => {
    for (let at = offset; at < offset + lengthBytes; at += clusterBytes) {
      const users = counts.get(at / clusterBytes);
      if (users > 1) report.corruption(field, `has a cluster at ${at} with ${users} users`);
    }
  };
  lookAt('header', 0, clusterBytes);
  lookAt('header.l1_table_offset', header.l1Offset, header.l1Entries * 8);
  if (header.snapshotCount > 0) lookAt('header.snapshots_offset', header.snapshotTableOffset, 1);
  if (header.luksHeader !== null) lookAt('luks.offset', header.luksHeader.offset, header.luksHeader.lengthBytes);
  for (let table = activeTables.nextUsed(0); table < image.clusterCount; table = activeTables.nextUsed(table + 1)) {
    if (!isSoleUse(image, table) && counts.get(table) < counts.max) {
      report.corruption(`l2@0x${(table * clusterBytes).toString(16)}`, 'is used for something else too');
    }
  }
}

/** Before the first write: bits of features that we do not keep go, and a bitmap directory that somebody else left behind. */
function* prepareHeader(file: ImageFile, header: Qcow2Header): Task<void> {
  // What a session wrote down elsewhere holds no longer, either.
  const autoclear = withSession(header.autoclear & ~unknownAutoclear(header), 0);
  const isStale = header.bitmaps !== null && (header.autoclear & Autoclear.bitmaps) === 0n;
  if (autoclear === header.autoclear && !isStale) return;
  const bitmaps = isStale ? null : header.bitmaps;
  yield* file.write(0, encodeHeader({ ...header, bitmaps, autoclear }));
  yield* file.sync();
}

/** Nothing is wrong any more: the image may be written to again. */
function* markClean(file: ImageFile, header: Qcow2Header): Task<void> {
  if ((header.incompatible & (Incompatible.dirty | Incompatible.corrupt)) === 0n) return;
  const bits = Buffer.alloc(8);
  bits.writeBigUInt64BE(header.incompatible & ~(Incompatible.dirty | Incompatible.corrupt));
  yield* file.write(INCOMPATIBLE_AT, bits);
  yield* file.sync();
}
