/**
 * Bit 63 of the entries of the active L1 and L2 tables: set exactly when the refcount of what they name is 1. And the entries that
 * are put right by making them zeroes.
 *
 * Invariant: a table is only written to when nothing else uses its cluster.
 */
import { clusterBytesOf, hasExtendedL2, hasExternalData, l2EntryBytes } from '../format.js';
import type { Task } from '../../task.js';
import { ClusterFlag, hex, offsetOf, swap } from './image-references.js';
import type { ImageReferences } from './image-references.js';

const COMPRESSED_HIGH = 0x40000000;
const ZERO_LOW = 1;
/** Bit 63, in a high half as it is in memory. */
const COPIED_RAW = 0x80;
const L1_PIECE_BYTES = 2 ** 20;

/** Looks at all active tables, and repairs them. */
export function* checkCopiedBits(image: ImageReferences, isRepair: boolean): Task<void> {
  yield* checkL1(image, isRepair);
  const { activeTables, clusterBytes } = image;
  for (let table = activeTables.nextUsed(0); table < image.clusterCount; table = activeTables.nextUsed(table + 1)) {
    yield* checkL2(image, table * clusterBytes, activeTables.get(table), isRepair && isSoleUse(image, table));
  }
  for (const [offset, { active }] of image.unalignedTables)
    if (active > 0) yield* checkL2(image, offset, active, false);
}

function* checkL1(image: ImageReferences, isRepair: boolean): Task<void> {
  const { file, header, clusterBytes } = image;
  const bytes = new Uint8Array(Math.min(L1_PIECE_BYTES, Math.ceil((header.l1Entries * 8) / 512) * 512));
  const words = new Uint32Array(bytes.buffer);
  const isWritable = isRepair && image.counts.get(header.l1Offset / clusterBytes) === 1;
  for (let start = 0; start < header.l1Entries * 8; start += bytes.length) {
    const piece = bytes.subarray(0, Math.min(bytes.length, header.l1Entries * 8 - start));
    yield* file.read(header.l1Offset + start, piece);
    let isChanged = false;
    for (let i = 0; i < piece.length / 4; i += 2) {
      const offset = offsetOf(swap(words[i]!), swap(words[i + 1]!));
      if (offset === 0 || isRight(image, offset, words[i]!)) continue;
      isChanged = flip(image, words, i, `l1[${start / 8 + i / 2}]`, 1, isWritable) || isChanged;
    }
    if (isChanged) yield* file.write(header.l1Offset + start, piece);
  }
}

function* checkL2(image: ImageReferences, tableOffset: number, times: number, isWritable: boolean): Task<void> {
  const { file, header } = image;
  const bytes = new Uint8Array(clusterBytesOf(header));
  yield* file.read(tableOffset, bytes);
  const words = new Uint32Array(bytes.buffer);
  const step = l2EntryBytes(header) / 4;
  const isExtended = hasExtendedL2(header);
  const isExternal = hasExternalData(header);
  let isChanged = false;
  for (let i = 0; i < words.length; i += step) {
    if ((words[i]! | words[i + 1]!) === 0) continue;
    const high = swap(words[i]!);
    if ((high & COMPRESSED_HIGH) !== 0) continue;
    const low = swap(words[i + 1]!);
    const offset = offsetOf(high, low);
    // In an external file an entry of zeroes, or of nothing, names no cluster.
    const isNone = offset === 0 && (!isExternal || high >= 0 || (!isExtended && (low & ZERO_LOW) !== 0));
    if (isNone || (isExternal ? high < 0 : isRight(image, offset, words[i]!))) continue;
    isChanged = flip(image, words, i, `l2@${hex(tableOffset)}[${i / step}]`, times, isWritable) || isChanged;
  }
  if (isChanged) yield* file.write(tableOffset, bytes);
}

function isRight(image: ImageReferences, offset: number, rawHigh: number): boolean {
  const flags = image.flags.get(Math.floor(offset / image.clusterBytes));
  return ((flags & ClusterFlag.refcountIsOne) !== 0) === ((rawHigh & COPIED_RAW) !== 0);
}

/** @returns whether the bit was changed */
function flip(
  image: ImageReferences,
  words: Uint32Array,
  at: number,
  field: string,
  times: number,
  isWritable: boolean,
): boolean {
  const message =
    (words[at]! & COPIED_RAW) !== 0
      ? 'says "copied" of a cluster whose refcount is not 1'
      : 'does not say "copied" of a cluster whose refcount is 1';
  if (!isWritable) {
    image.report.corruption(field, message, times);
    return false;
  }
  words[at]! ^= COPIED_RAW;
  image.report.repaired('corruption', field, message, times);
  return true;
}

/** Whether a cluster is used as an L2 table only. */
export function isSoleUse(image: ImageReferences, table: number): boolean {
  return image.counts.get(table) === image.activeTables.get(table) + image.inactiveTables.get(table);
}

/** Makes the entries zeroes that hold no data and whose offset cannot be right. */
export function* repairZeroEntries(image: ImageReferences): Task<void> {
  const { file, header, clusterBytes, report } = image;
  const entryBytes = l2EntryBytes(header);
  for (const { tableOffset, index } of image.badZeroEntries) {
    const field = `l2@${hex(tableOffset)}[${index}]`;
    const message = 'is not the start of a cluster, and holds no data';
    if (tableOffset % clusterBytes !== 0 || !isSoleUse(image, tableOffset / clusterBytes)) {
      report.corruption(field, message);
      continue;
    }
    const entry = Buffer.alloc(entryBytes);
    yield* file.read(tableOffset + index * entryBytes, entry);
    if (entryBytes === 16) {
      // Subclusters of zeroes stay what they are; the others are not allocated.
      entry.fill(0, 0, 8);
      entry.fill(0, 12);
    } else {
      entry.fill(0);
      entry[7] = ZERO_LOW;
    }
    yield* file.write(tableOffset + index * entryBytes, entry);
    report.repaired('corruption', field, message);
  }
}
