/**
 * Making an image: header, refcount table, refcount blocks, LUKS header, L1 table and, when metadata is preallocated, all L2 tables and
 * then all of the disk's clusters, each part in one piece and in the order of the disk. What is zero is left to the file, which is a hole there.
 *
 * Invariants
 * - Each cluster up to the end is used exactly once, so that all refcounts are 1.
 * - The header is written last: what is cut off before is no image.
 * - Memory is bounded: tables pass through a buffer of 1 MiB.
 */
import { BdevError } from '../bdev.js';
import { writeCounter } from './counter-bits.js';
import {
  Autoclear,
  CLUSTER_BITS_MAX,
  CLUSTER_BITS_MIN,
  CLUSTER_BITS_MIN_EXTENDED,
  Compatible,
  CompressionType,
  CryptMethod,
  FEATURE_NAMES,
  Incompatible,
  L1_BYTES_MAX,
  REFCOUNT_TABLE_BYTES_MAX,
  encodeHeader,
  l1EntriesFor,
  l2EntryBytes,
  refcountsPerBlock,
  writeUInt64,
} from './format.js';
import type { Qcow2Header } from './format.js';
import type { ImageFile } from './image-file.js';
import type { Task } from '../task.js';

const BUFFER_BYTES = 2 ** 20;
const COPIED = 0x80000000;

/** How much of the disk has its place in the file from the start: nothing, its tables, its space, or zeroes that are written. */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full';

export interface CreateOptions {
  /** Size of the virtual disk, a multiple of 512. */
  readonly sizeBytes: number;
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly refcountOrder: number;
  readonly lazyRefcounts: boolean;
  readonly extendedL2: boolean;
  readonly compressionType: CompressionType;
  readonly backingFile: string | null;
  readonly backingFormat: string | null;
  /** Name of the external data file. The file itself is made by the caller, as long as the disk, and preallocated by it. */
  readonly dataFile: string | null;
  readonly dataFileRaw: boolean;
  readonly preallocation: Preallocation;
  /** Header and key slots of a LUKS image, whole. */
  readonly luksHeader?: Buffer;
}

export const CREATE_DEFAULTS: Omit<CreateOptions, 'sizeBytes'> = {
  version: 3,
  clusterBits: 16,
  refcountOrder: 4,
  lazyRefcounts: false,
  extendedL2: false,
  compressionType: CompressionType.deflate,
  backingFile: null,
  backingFormat: null,
  dataFile: null,
  dataFileRaw: false,
  preallocation: 'off',
};

/** Where the parts of an image are, in clusters. */
export interface ImageLayout {
  readonly tableStart: number;
  readonly tableClusters: number;
  readonly blockStart: number;
  readonly blockCount: number;
  readonly luksStart: number;
  readonly l1Start: number;
  readonly l1Entries: number;
  readonly l2Start: number;
  readonly l2Count: number;
  readonly dataStart: number;
  /** First cluster after the image. */
  readonly end: number;
}

/** What of it the header says. */
export type HeaderLayout = Pick<ImageLayout, 'tableStart' | 'tableClusters' | 'luksStart' | 'l1Start' | 'l1Entries'>;

type Features = Pick<Qcow2Header, 'clusterBits' | 'refcountOrder' | 'incompatible'>;

/**
 * Writes a new, empty image.
 * @param file empty, or a device whose contents are lost. Throws BdevError.
 */
export function* createImage(file: ImageFile, given: CreateOptions): Task<void> {
  const options = withImpliedOptions(given);
  checkCreateOptions(options);
  const layout = layoutOf(options);
  const clusterBytes = 2 ** options.clusterBits;
  const header = newHeader(options, layout);
  const isBlank = file.sizeBytes === 0;
  yield* file.grow(layout.end * clusterBytes);
  if (!isBlank) yield* writeRegion(file, 0, layout.dataStart * clusterBytes, (bytes) => void bytes.fill(0));
  yield* writeRefcounts(file, options, layout);
  if (options.luksHeader !== undefined) yield* file.write(layout.luksStart * clusterBytes, options.luksHeader);
  if (layout.l2Count > 0) yield* writeMapping(file, options, layout, header);
  yield* preallocate(file, options, layout);
  yield* file.sync();
  yield* file.write(0, encodeHeader(header));
  yield* file.sync();
}

/** A raw external data file is only right when every cluster of the disk is mapped to it. */
export function withImpliedOptions(options: CreateOptions): CreateOptions {
  return options.dataFileRaw && options.preallocation === 'off' ? { ...options, preallocation: 'metadata' } : options;
}

/** Throws BdevError for options that there are not, or not together. */
export function checkCreateOptions(options: CreateOptions): void {
  const { clusterBits, version } = options;
  const refuse = (field: string, message: string, hint: string): never => {
    throw new BdevError('bad-option', field, message, hint);
  };
  if (clusterBits < CLUSTER_BITS_MIN || clusterBits > CLUSTER_BITS_MAX) {
    refuse('cluster_size', `cluster_size is ${2 ** clusterBits}`, 'choose a power of two between 512 and 2M');
  }
  if (options.extendedL2 && clusterBits < CLUSTER_BITS_MIN_EXTENDED) {
    const message = `extended_l2 needs clusters of at least ${2 ** CLUSTER_BITS_MIN_EXTENDED} bytes`;
    refuse('cluster_size', message, 'choose a larger cluster_size, best 128k');
  }
  const newer: [string, boolean][] = [
    ['refcount_bits', options.refcountOrder !== 4],
    ['lazy_refcounts', options.lazyRefcounts],
    ['extended_l2', options.extendedL2],
    ['compression_type', options.compressionType !== CompressionType.deflate],
    ['data_file', options.dataFile !== null],
  ];
  for (const [field, isUsed] of newer) {
    if (isUsed && version === 2) refuse(field, `${field} is not known to compat=0.10`, 'use compat=1.1');
  }
  if (options.dataFileRaw && options.dataFile === null) {
    refuse('data_file_raw', 'data_file_raw needs a data file', 'name one with data_file');
  }
  if (options.dataFileRaw && options.backingFile !== null) {
    refuse('backing_file', 'an image with a raw data file has no backing file', 'leave one of the two out');
  }
  if (options.backingFile !== null && options.preallocation !== 'off' && !options.extendedL2) {
    const message = 'preallocated clusters would hide the backing file';
    refuse('preallocation', message, 'leave preallocation out, or use extended_l2');
  }
  if (options.dataFile !== null && options.luksHeader !== undefined) {
    refuse('data_file', 'an encrypted image has no external data file here', 'leave data_file or the encryption out');
  }
  if (options.sizeBytes % 512 !== 0) refuse('size', `${options.sizeBytes} is not a multiple of 512`, 'round it up');
  if (l1EntriesFor(featuresOf(options), options.sizeBytes) * 8 > L1_BYTES_MAX) {
    const message = `a disk of ${options.sizeBytes} bytes is too large for clusters of ${2 ** clusterBits} bytes`;
    refuse('size', message, 'choose a larger cluster_size');
  }
}

/** Where everything goes. Throws BdevError when the refcount table would be too large. */
export function layoutOf(options: CreateOptions): ImageLayout {
  const clusterBytes = 2 ** options.clusterBits;
  const features = featuresOf(options);
  const l1Entries = l1EntriesFor(features, options.sizeBytes);
  const isMapped = options.preallocation !== 'off';
  const luksClusters = Math.ceil((options.luksHeader?.length ?? 0) / clusterBytes);
  const l1Clusters = Math.ceil((l1Entries * 8) / clusterBytes);
  const l2Count = isMapped ? l1Entries : 0;
  const dataClusters = isMapped && options.dataFile === null ? Math.ceil(options.sizeBytes / clusterBytes) : 0;
  const others = 1 + luksClusters + l1Clusters + l2Count + dataClusters;
  const { blocks, tableClusters } = refcountClusters(others, features);
  if (tableClusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) {
    const message = `the refcount table of a disk of ${options.sizeBytes} bytes would be too large`;
    throw new BdevError('bad-option', 'size', message, 'choose a larger cluster_size, or fewer refcount_bits');
  }
  const luksStart = 1 + tableClusters + blocks;
  const l1Start = luksStart + luksClusters;
  const dataStart = l1Start + l1Clusters + l2Count;
  return {
    tableStart: 1,
    tableClusters,
    blockStart: 1 + tableClusters,
    blockCount: blocks,
    luksStart,
    l1Start,
    l1Entries,
    l2Start: l1Start + l1Clusters,
    l2Count,
    dataStart,
    end: dataStart + dataClusters,
  };
}

/** Refcount blocks and clusters of the refcount table that an image needs which has so many clusters beside them. */
export function refcountClusters(
  clusters: number,
  features: Pick<Qcow2Header, 'clusterBits' | 'refcountOrder'>,
): { blocks: number; tableClusters: number } {
  const perBlock = refcountsPerBlock(features);
  const perTableCluster = 2 ** (features.clusterBits - 3);
  let blocks = 0;
  let tableClusters = 0;
  for (;;) {
    const needed = Math.ceil((clusters + blocks + tableClusters) / perBlock);
    const table = Math.ceil(needed / perTableCluster);
    if (needed === blocks && table === tableClusters) return { blocks, tableClusters };
    blocks = needed;
    tableClusters = table;
  }
}

/** What of the options decides on the sizes of tables. */
export function featuresOf({ clusterBits, refcountOrder, extendedL2 }: CreateOptions): Features {
  return { clusterBits, refcountOrder, incompatible: extendedL2 ? Incompatible.extendedL2 : 0n };
}

/** The header of an image whose parts are there. Throws BdevError when it does not fit the first cluster. */
export function newHeader(options: CreateOptions, layout: HeaderLayout): Qcow2Header {
  const header = headerOf(options, layout);
  if (fits(header)) return header;
  const message = `the names of other files do not fit the first cluster of ${2 ** options.clusterBits} bytes`;
  throw new BdevError('bad-option', 'backing_file', message, 'choose shorter names or a larger cluster_size');
}

function headerOf(options: CreateOptions, layout: HeaderLayout): Qcow2Header {
  const clusterBytes = 2 ** options.clusterBits;
  const { dataFile, luksHeader } = options;
  const isZstd = options.compressionType !== CompressionType.deflate;
  const header: Qcow2Header = {
    version: options.version,
    clusterBits: options.clusterBits,
    sizeBytes: options.sizeBytes,
    cryptMethod: luksHeader === undefined ? CryptMethod.none : CryptMethod.luks,
    l1Entries: layout.l1Entries,
    l1Offset: layout.l1Entries > 0 ? layout.l1Start * clusterBytes : 0,
    refcountTableOffset: layout.tableStart * clusterBytes,
    refcountTableClusters: layout.tableClusters,
    snapshotCount: 0,
    snapshotTableOffset: 0,
    incompatible:
      featuresOf(options).incompatible |
      (dataFile === null ? 0n : Incompatible.externalDataFile) |
      (isZstd ? Incompatible.compressionType : 0n),
    compatible: options.lazyRefcounts ? Compatible.lazyRefcounts : 0n,
    autoclear: options.dataFileRaw ? Autoclear.rawExternalData : 0n,
    refcountOrder: options.refcountOrder,
    compressionType: options.compressionType,
    unknownFields: Buffer.alloc(0),
    backingFile: options.backingFile,
    backingFormat: options.backingFormat,
    dataFile,
    bitmaps: null,
    luksHeader:
      luksHeader === undefined ? null : { offset: layout.luksStart * clusterBytes, lengthBytes: luksHeader.length },
    featureNames: options.version === 3 ? FEATURE_NAMES : [],
    unknownExtensions: [],
  };
  // Names of features are a help for people; in a cluster of 512 bytes the name of the backing file comes first.
  return fits(header) ? header : { ...header, featureNames: [] };
}

function fits(header: Qcow2Header): boolean {
  try {
    encodeHeader(header);
    return true;
  } catch {
    return false;
  }
}

/** Fills part of the file through the buffer. @param fill is given zeroes or what it wrote before, and where in the part they begin */
function* writeRegion(
  file: ImageFile,
  offset: number,
  lengthBytes: number,
  fill: (bytes: Buffer, start: number) => void,
): Task<void> {
  const buffer = Buffer.alloc(Math.min(BUFFER_BYTES, lengthBytes));
  for (let start = 0; start < lengthBytes; start += buffer.length) {
    const piece = buffer.subarray(0, Math.min(buffer.length, lengthBytes - start));
    fill(piece, start);
    yield* file.write(offset + start, piece);
  }
}

function* writeRefcounts(file: ImageFile, options: CreateOptions, layout: ImageLayout): Task<void> {
  const clusterBytes = 2 ** options.clusterBits;
  const { refcountOrder } = options;
  yield* writeRegion(file, layout.tableStart * clusterBytes, layout.blockCount * 8, (bytes, start) => {
    for (let at = 0; at < bytes.length; at += 8) {
      writeUInt64(bytes, (layout.blockStart + (start + at) / 8) * clusterBytes, at);
    }
  });
  // All counters are 1: one that is filled so stands for all of them, but for the end.
  const perByte = 8 / 2 ** refcountOrder;
  const usedBytes = Math.ceil(layout.end / perByte);
  let isFilled = false;
  yield* writeRegion(file, layout.blockStart * clusterBytes, usedBytes, (bytes, start) => {
    const counters = Math.min(bytes.length * perByte, layout.end - start * perByte);
    if (isFilled && counters === bytes.length * perByte) return;
    bytes.fill(0);
    for (let i = 0; i < counters; i++) writeCounter(bytes, i, refcountOrder, 1);
    isFilled = true;
  });
}

/** L1 and L2 tables that map the disk to the clusters at the end, or to the data file at the same offset. */
function* writeMapping(file: ImageFile, options: CreateOptions, layout: ImageLayout, header: Qcow2Header): Task<void> {
  const clusterBytes = 2 ** options.clusterBits;
  const entryBytes = l2EntryBytes(header);
  const base = options.dataFile === null ? layout.dataStart * clusterBytes : 0;
  const clusters = Math.ceil(options.sizeBytes / clusterBytes);
  const writeEntry = (bytes: Buffer, offset: number, at: number): void => {
    bytes.writeUInt32BE((COPIED + Math.floor(offset / 2 ** 32)) >>> 0, at);
    bytes.writeUInt32BE(offset % 2 ** 32, at + 4);
  };
  yield* writeRegion(file, layout.l1Start * clusterBytes, layout.l1Entries * 8, (bytes, start) => {
    for (let at = 0; at < bytes.length; at += 8) {
      writeEntry(bytes, (layout.l2Start + (start + at) / 8) * clusterBytes, at);
    }
  });
  yield* writeRegion(file, layout.l2Start * clusterBytes, layout.l2Count * clusterBytes, (bytes, start) => {
    bytes.fill(0);
    for (let at = 0; at < bytes.length; at += entryBytes) {
      const cluster = (start + at) / entryBytes;
      if (cluster < clusters) writeEntry(bytes, base + cluster * clusterBytes, at);
    }
  });
}

/** Space, or zeroes, for the disk within the image; that of an external data file is the caller's. */
function* preallocate(file: ImageFile, options: CreateOptions, layout: ImageLayout): Task<void> {
  const clusterBytes = 2 ** options.clusterBits;
  const offset = layout.dataStart * clusterBytes;
  const lengthBytes = (layout.end - layout.dataStart) * clusterBytes;
  if (lengthBytes > 0) yield* preallocateSpace(file, offset, lengthBytes, options.preallocation);
}

/** Reserves space in a file, or writes zeroes to it; `off` and `metadata` leave a hole. Throws BdevError. */
export function* preallocateSpace(
  file: ImageFile,
  offset: number,
  lengthBytes: number,
  preallocation: Preallocation,
): Task<void> {
  if (preallocation === 'full') {
    yield* writeRegion(file, offset, lengthBytes, () => undefined);
  } else if (preallocation === 'falloc') {
    if (file.allocate === undefined) {
      throw new BdevError('bad-option', 'preallocation', 'this file cannot reserve space', 'use preallocation=full');
    }
    yield* file.allocate(offset, lengthBytes);
  }
}
