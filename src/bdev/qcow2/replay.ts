/**
 * Carrying out the log of a process that was killed: what it had answered becomes dirty metadata again, which a round then writes.
 * What is in the file already is found as it should be, and stays.
 */
import { BdevError } from '../bdev.js';
import type { Engine } from './engine.js';
import { badImage } from './image-error.js';
import type { Dropped } from './l2.js';
import { ENTRY_COMPRESSED, entryProblem, hostOf, readHosts, swap32 } from './l2.js';
import { RecordKind } from './restart-log.js';
import type { LogRecord, RestartLog } from './restart-log.js';
import type { Task } from '../task.js';
import { sleep } from './wait-list.js';

/**
 * References that are given up by the whole of the log. A process may have been killed while it carried the log out: then entries are
 * further than the records that come first, and what those drop is what later ones enter again.
 */
class DroppedByLog implements Dropped {
  readonly #counts = new Map<number, number>();

  add(cluster: number, count: number): void {
    for (let i = cluster; i < cluster + count; i++) this.#counts.set(i, (this.#counts.get(i) ?? 0) + 1);
  }

  /** An entry refers to it from here on. */
  entered(cluster: number): void {
    this.#counts.delete(cluster);
  }

  giveUp(dropped: Dropped): void {
    for (const [cluster, count] of this.#counts) for (let i = 0; i < count; i++) dropped.add(cluster, 1);
  }
}

/** Returns how many records there were. Throws BdevError. */
export function* replay(engine: Engine, log: RestartLog): Task<number> {
  const records = [...log.records()];
  const dropped = new DroppedByLog();
  for (const record of records) yield* apply(engine, record, dropped);
  dropped.giveUp(engine.dropped);
  return records.length;
}

function* apply(engine: Engine, record: LogRecord, dropped: DroppedByLog): Task<void> {
  const { top, allocator } = engine;
  const { clusterBytes } = top.geometry;
  const { kind, first, count, value } = record;
  const number = value[0]! * 2 ** 32 + value[1]!;
  switch (kind) {
    case RecordKind.map:
    case RecordKind.set:
      for (let i = 0; i < count; i++) {
        yield* applyEntry(engine, record, dropped, first + i, kind === RecordKind.map ? i * clusterBytes : 0);
      }
      return;
    case RecordKind.table:
      if (first >= top.l1.length || number % clusterBytes !== 0) throw badRecord(`table ${first} at ${number}`);
      yield* allocator!.assign(number / clusterBytes, 1);
      engine.enterTable(first, number);
      return;
    case RecordKind.refcount:
      yield* allocator!.assign(first, number);
      return;
    default:
      throw badRecord(`kind ${String(kind)}`);
  }
}

function* applyEntry(
  engine: Engine,
  { kind, value }: LogRecord,
  dropped: DroppedByLog,
  cluster: number,
  step: number,
): Task<void> {
  const { top, allocator } = engine;
  const { geometry, l2 } = top;
  const { clusterBytes, entryWords } = geometry;
  const offset = cluster * clusterBytes;
  if (offset >= top.sizeBytes || top.l1[top.tableOf(offset)] === 0) throw badRecord(`cluster ${cluster}`);
  const entry = Uint32Array.from(value);
  if (step > 0) {
    const host = hostOf(entry, 0) + step;
    entry[0] = swap32(((swap32(entry[0]!) & 0xff000000) | Math.floor(host / 2 ** 32)) >>> 0);
    entry[1] = swap32(host % 2 ** 32);
  }
  if (entryProblem(geometry, entry, 0) !== null) throw badRecord(`the entry of cluster ${cluster}`);
  while (l2.find(top.sliceOf(offset)) < 0) {
    const errno = yield* sleep((sleeper) => top.loadSlice(offset, sleeper));
    if (errno !== 0)
      throw new BdevError('io-error', 'base', `reading an L2 table failed: errno ${errno}`, 'look at the device');
  }
  const host = hostOf(entry, 0);
  if (kind === RecordKind.map && !geometry.hasExternalData) yield* allocator!.assign(host / clusterBytes, 1);
  const slot = l2.find(top.sliceOf(offset));
  if (slot < 0) throw new BdevError('io-error', 'l2_cache', 'the cache of L2 tables is too small', 'make it larger');
  const at = l2.wordsOf(slot) + (cluster % geometry.clustersPerSlice) * entryWords;
  const isCompressed = (swap32(l2.words[at]!) & ENTRY_COMPRESSED) !== 0;
  if (isCompressed || hostOf(l2.words, at) !== host) readHosts(geometry, l2.words, at, dropped);
  if (host !== 0) dropped.entered(host / clusterBytes);
  for (let i = 0; i < entryWords; i++) l2.words[at + i] = entry[i]!;
  l2.markDirty(slot);
  engine.noteChange();
}

function badRecord(what: string): BdevError {
  return badImage('restart log', `names ${what}, which the image does not have`);
}
