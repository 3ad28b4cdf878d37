/**
 * The snapshot table as a check reads it: entry by entry, also where one of them is not as it has to be; and the repair, which leaves
 * out the snapshots that cannot be used and completes the others.
 *
 * Invariant: no more than `WINDOW_BYTES` of the table are in memory while it is looked at, and no more than `SNAPSHOT_TABLE_BYTES_MAX`
 * are walked.
 */
import { L1_BYTES_MAX, clusterBytesOf, hasExternalData, l1EntriesFor, writeUInt64 } from '../format.js';
import type { Qcow2Header } from '../format.js';
import type { ImageFile } from '../image-file.js';
import { SNAPSHOT_TABLE_BYTES_MAX } from '../tables.js';
import type { Task } from '../../task.js';
import type { ImageReferences } from './image-references.js';
import type { ReportBuilder } from './report.js';

const WINDOW_BYTES = 512 * 1024;
const FIXED_BYTES = 40;
const EXTRA_BYTES_MAX = 1024;
/** Extra data that version 3 asks for: sizes of the VM state and of the disk. */
const EXTRA_BYTES_MIN_V3 = 16;
/** Fields of the header: the number of snapshots, then where their table is. */
const HEADER_SNAPSHOTS_AT = 60;

interface Entry {
  readonly field: string;
  /** Where it is in the table. */
  readonly at: number;
  readonly lengthBytes: number;
  /** The fixed part and what follows it, as far as the window has it. */
  readonly bytes: Buffer;
  readonly l1Offset: number;
  readonly l1Entries: number;
  readonly extraBytes: number;
}

/** Visits all entries. @param visit what it returns false of is the last one. @returns bytes of the table */
function* eachEntry(
  header: Qcow2Header,
  fileBytes: number,
  read: (offset: number, bytes: Uint8Array) => Task<void>,
  visit: (entry: Entry) => Task<void>,
  onCutOff: (field: string) => void,
): Task<number> {
  const { snapshotCount, snapshotTableOffset } = header;
  const window = Buffer.alloc(WINDOW_BYTES);
  let at = 0;
  let windowAt = -1;
  for (let i = 0; i < snapshotCount; i++) {
    const field = `snapshots[${i}]`;
    if (snapshotTableOffset + at + FIXED_BYTES > fileBytes || at > SNAPSHOT_TABLE_BYTES_MAX) {
      onCutOff(field);
      break;
    }
    // An entry that is as it has to be is shorter than half of the window.
    if (windowAt < 0 || at + WINDOW_BYTES / 2 > windowAt + WINDOW_BYTES) {
      windowAt = at;
      const there = Math.min(WINDOW_BYTES, fileBytes - snapshotTableOffset - at);
      yield* read(snapshotTableOffset + at, window.subarray(0, there));
    }
    const bytes = window.subarray(at - windowAt);
    const extraBytes = bytes.readUInt32BE(36);
    const lengthBytes = FIXED_BYTES + extraBytes + bytes.readUInt16BE(12) + bytes.readUInt16BE(14);
    // Exact up to 2^53; what is beyond is beyond the file, too.
    const l1Offset = bytes.readUInt32BE(0) * 2 ** 32 + bytes.readUInt32BE(4);
    yield* visit({ field, at, lengthBytes, bytes, l1Offset, l1Entries: bytes.readUInt32BE(8), extraBytes });
    at = Math.ceil((at + lengthBytes) / 8) * 8;
  }
  return Math.min(at, SNAPSHOT_TABLE_BYTES_MAX);
}

/** What is wrong with an entry, or null. */
function problemOf(entry: Entry, header: Qcow2Header): { field: string; message: string; isUsable: boolean } | null {
  const { field, extraBytes, l1Offset, l1Entries } = entry;
  if (l1Offset % clusterBytesOf(header) !== 0) {
    const message = `is ${l1Offset}, not the start of a cluster`;
    return { field: `${field}.l1_table_offset`, message, isUsable: false };
  }
  if (l1Entries * 8 > L1_BYTES_MAX) {
    const message = `is ${l1Entries}, more than ${L1_BYTES_MAX / 8}`;
    return { field: `${field}.l1_size`, message, isUsable: false };
  }
  if (extraBytes > EXTRA_BYTES_MAX) {
    const message = `is ${extraBytes}, more than ${EXTRA_BYTES_MAX}`;
    return { field: `${field}.extra_data_size`, message, isUsable: false };
  }
  if (header.version >= 3 && extraBytes < EXTRA_BYTES_MIN_V3) {
    const message = `is ${extraBytes}, version 3 has at least ${EXTRA_BYTES_MIN_V3}`;
    return { field: `${field}.extra_data_size`, message, isUsable: true };
  }
  return null;
}

/** Counts the table and all L1 tables of snapshots. Throws BdevError. */
export function* walkSnapshots(image: ImageReferences): Task<void> {
  const { header, report } = image;
  if (header.snapshotCount === 0) return;
  if (hasExternalData(header)) {
    report.corruption('header.nb_snapshots', `is ${header.snapshotCount}, with an external data file there are none`);
  }
  const bytes = yield* eachEntry(
    header,
    image.fileBytes,
    (offset, piece) => image.readTable(offset, piece),
    function* (entry) {
      const problem = problemOf(entry, header);
      if (problem !== null) report.corruption(problem.field, problem.message);
      const isTable = entry.l1Offset % image.clusterBytes === 0 && entry.l1Entries * 8 <= L1_BYTES_MAX;
      if (isTable) yield* image.countSnapshotL1(`${entry.field}.l1`, entry.l1Offset, entry.l1Entries);
    },
    (field) => report.corruption(field, 'is cut off'),
  );
  image.reference(header.snapshotTableOffset, bytes, 1, 'header.snapshots_offset');
}

/**
 * Writes the table anew, behind the end of the file, without the entries that cannot be used and with complete ones; in force
 * with one write to the header. Its cluster is not counted yet: refcounts have to be repaired after it.
 * @returns the header as it is then. Throws BdevError.
 */
export function* repairSnapshots(file: ImageFile, header: Qcow2Header, report: ReportBuilder): Task<Qcow2Header> {
  if (header.snapshotCount === 0) return header;
  const kept: Buffer[] = [];
  const fileBytes = file.sizeBytes;
  let isChanged = false;
  yield* eachEntry(
    header,
    fileBytes,
    (offset, piece) => file.read(offset, piece),

    function* (entry) {
      const problem = problemOf(entry, header);
      if (problem !== null) {
        isChanged = true;
        report.repaired('corruption', problem.field, problem.message);
      }
      if (problem?.isUsable !== false) kept.push(completed(entry, header));
    },
    () => undefined,
  );
  if (!isChanged) return header;
  const snapshotTableOffset =
    kept.length === 0 ? 0 : Math.ceil(fileBytes / clusterBytesOf(header)) * clusterBytesOf(header);
  if (kept.length > 0) {
    const table = Buffer.concat(kept);
    yield* file.grow(snapshotTableOffset + Math.ceil(table.length / 512) * 512);
    yield* file.write(snapshotTableOffset, table);
    yield* file.sync();
  }
  const fields = Buffer.alloc(12);
  fields.writeUInt32BE(kept.length, 0);
  writeUInt64(fields, snapshotTableOffset, 4);
  yield* file.write(HEADER_SNAPSHOTS_AT, fields);
  yield* file.sync();
  return { ...header, snapshotCount: kept.length, snapshotTableOffset };
}

/** The bytes of an entry, with the sizes of VM state and disk. */
function completed({ bytes, lengthBytes, extraBytes, l1Entries }: Entry, header: Qcow2Header): Buffer {
  const padded = (all: Buffer): Buffer => Buffer.concat([all, Buffer.alloc(-all.length & 7)]);
  if (extraBytes >= EXTRA_BYTES_MIN_V3) return padded(Buffer.from(bytes.subarray(0, lengthBytes)));
  const fixed = Buffer.from(bytes.subarray(0, FIXED_BYTES));
  const extra = Buffer.alloc(EXTRA_BYTES_MIN_V3);
  writeUInt64(extra, bytes.readUInt32BE(32), 0);
  // As old images have it: the disk was as large as it is now, when its L1 table says nothing else.
  if (l1EntriesFor(header, header.sizeBytes) <= l1Entries) writeUInt64(extra, header.sizeBytes, 8);
  fixed.writeUInt32BE(extra.length, 36);
  return padded(Buffer.concat([fixed, extra, bytes.subarray(FIXED_BYTES + extraBytes, lengthBytes)]));
}
