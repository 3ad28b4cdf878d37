/**
 * Internal snapshots: taken, deleted, applied and listed. A snapshot is an L1 table of its own that shares L2 tables and clusters
 * with the others; whoever writes to a shared cluster copies it first, as the copied flags of the active tables tell.
 *
 * All clusters are counted in memory first, which finds what is wrong with an image before anything is written. Then the L2 tables
 * whose flags change are written anew, then the L1 tables and the snapshot table; the commit is one write of the header.
 */
import { BdevError } from '../../bdev.js';
import { SNAPSHOTS_MAX } from '../format.js';
import { unsupportedImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import { SNAPSHOT_TABLE_BYTES_MAX, encodeSnapshots } from '../tables.js';
import type { Snapshot } from '../tables.js';
import type { Task } from '../../task.js';
import { loadHeader } from './header.js';
import { ImageEdit, assertNoExternalData, loadL1, loadSnapshots } from './image-edit.js';
import { countReferences, settleCopied } from './l2-tables.js';

const NAME_BYTES_MAX = 65535;
/** Snapshots that an error names, and characters of each name. */
const NAMED_MAX = 20;
const SHOWN_MAX = 80;
const ICOUNT_NONE = 0xffffffffffffffffn;

export interface NewSnapshot {
  readonly name: string;
  /** When it is taken, since 1970. */
  readonly seconds: number;
  readonly nanoseconds: number;
}

/** The snapshots of an image, oldest first. Throws BdevError. */
export function* listSnapshots(file: ImageFile): Task<readonly Snapshot[]> {
  const { header } = yield* loadHeader(file);
  return (yield* loadSnapshots(file, header)).snapshots;
}

/** Keeps what the disk holds now under a name, which need not be the only one. Throws BdevError. */
export function* createSnapshot(file: ImageFile, { name, seconds, nanoseconds }: NewSnapshot): Task<Snapshot> {
  if (Buffer.byteLength(name) > NAME_BYTES_MAX) {
    throw new BdevError('bad-name', 'name', `the snapshot's name has more than ${NAME_BYTES_MAX} bytes`, 'shorten it');
  }
  const edit = yield* ImageEdit.open(file);
  const { header, snapshots } = edit;
  assertNoExternalData(header);
  if (snapshots.length >= SNAPSHOTS_MAX) {
    throw new BdevError('too-many-snapshots', '', `the image has ${SNAPSHOTS_MAX} snapshots`, 'delete some');
  }
  yield* countReferences(edit, edit.l1, 1);
  const active = Buffer.from(edit.l1);
  const kept = Buffer.from(edit.l1);
  yield* settleCopied(edit, active, kept);
  const snapshot: Snapshot = {
    id: nextId(snapshots),
    name,
    l1Offset: yield* edit.place(kept),
    l1Entries: header.l1Entries,
    seconds,
    nanoseconds,
    guestClock: 0n,
    vmStateBytes: 0,
    sizeBytes: header.sizeBytes,
    icount: ICOUNT_NONE,
    unknownExtra: Buffer.alloc(0),
  };
  yield* commitSnapshots(edit, active, [...snapshots, snapshot]);
  return snapshot;
}

/** Removes a snapshot and gives back what only it uses. Throws BdevError. */
export function* deleteSnapshot(file: ImageFile, idOrName: string): Task<Snapshot> {
  const edit = yield* ImageEdit.open(file);
  assertNoExternalData(edit.header);
  const snapshot = findSnapshot(edit.snapshots, idOrName);
  const l1 = yield* loadSnapshotL1(edit, snapshot);
  yield* countReferences(edit, l1, -1);
  yield* edit.free({ offset: snapshot.l1Offset, lengthBytes: l1.length });
  const active = Buffer.from(edit.l1);
  yield* settleCopied(edit, active);
  yield* commitSnapshots(
    edit,
    active,
    edit.snapshots.filter((other) => other !== snapshot),
  );
  yield* edit.giveBack();
  return snapshot;
}

/** Makes the disk what it was, its size too; what it holds now is lost. Throws BdevError. */
export function* applySnapshot(file: ImageFile, idOrName: string): Task<Snapshot> {
  const edit = yield* ImageEdit.open(file);
  assertNoExternalData(edit.header);
  const snapshot = findSnapshot(edit.snapshots, idOrName);
  if (edit.bitmaps.length > 0) {
    throw unsupportedImage(
      'bitmaps',
      'track what is written since a backup, which holds no longer when the disk is set back',
      'remove the bitmaps first',
    );
  }
  const active = yield* loadSnapshotL1(edit, snapshot);
  yield* countReferences(edit, active, 1);
  yield* countReferences(edit, edit.l1, -1);
  yield* settleCopied(edit, active);
  const { header } = edit;
  yield* edit.free({ offset: header.l1Offset, lengthBytes: edit.l1.length });
  yield* edit.commit({
    l1Offset: yield* edit.place(active),
    l1Entries: snapshot.l1Entries,
    sizeBytes: snapshot.sizeBytes,
  });
  yield* edit.giveBack();
  return snapshot;
}

/** By its id, else by its name. Throws BdevError. */
export function findSnapshot(snapshots: readonly Snapshot[], idOrName: string): Snapshot {
  const found = snapshots.find(({ id }) => id === idOrName) ?? snapshots.find(({ name }) => name === idOrName);
  if (found !== undefined) return found;
  throw new BdevError(
    'no-such-snapshot',
    '',
    `the image has no snapshot ${JSON.stringify(idOrName)}`,
    snapshots.length === 0 ? 'it has none at all' : `by id or by name it has ${namesOf(snapshots)}`,
  );
}

function namesOf(snapshots: readonly Snapshot[]): string {
  const names = snapshots.slice(0, NAMED_MAX).map(({ id, name }) => `${id} (${name.slice(0, SHOWN_MAX)})`);
  return [...names, ...(snapshots.length > NAMED_MAX ? ['others'] : [])].join(', ');
}

function* commitSnapshots(edit: ImageEdit, active: Buffer, snapshots: readonly Snapshot[]): Task<void> {
  const table = encodeSnapshots(snapshots);
  if (table.length > SNAPSHOT_TABLE_BYTES_MAX) {
    throw new BdevError('too-many-snapshots', '', 'the table of snapshots would be too large', 'delete some');
  }
  const { header } = edit;
  yield* edit.free(edit.snapshotTable);
  yield* edit.free({ offset: header.l1Offset, lengthBytes: edit.l1.length });
  yield* edit.commit({
    l1Offset: yield* edit.place(active),
    snapshotTableOffset: yield* edit.place(table),
    snapshotCount: snapshots.length,
  });
}

function* loadSnapshotL1(edit: ImageEdit, { id, l1Offset, l1Entries }: Snapshot): Task<Buffer> {
  return yield* loadL1(edit.file, edit.header, l1Offset, l1Entries, `snapshot ${id} l1`);
}

/** One more than the largest number among the ids, as QEMU counts. */
function nextId(snapshots: readonly Snapshot[]): string {
  let largest = 0;
  for (const { id } of snapshots) largest = Math.max(largest, Number.parseInt(id, 10) || 0);
  return String(largest + 1);
}
