/**
 * The qcow2 format: its constants, and the header with its extensions. Everything is big endian. Source: QEMU docs/interop/qcow2.rst.
 *
 *     offset  bytes  field                        offset  bytes  field
 *          0      4  magic "QFI\xfb"                  60      4  nb_snapshots
 *          4      4  version, 2 or 3                  64      8  snapshots_offset
 *          8      8  backing_file_offset          version 3:
 *         16      4  backing_file_size                72      8  incompatible_features
 *         20      4  cluster_bits                     80      8  compatible_features
 *         24      8  size                             88      8  autoclear_features
 *         32      4  crypt_method                     96      4  refcount_order
 *         36      4  l1_size                         100      4  header_length
 *         40      8  l1_table_offset                 104      1  compression_type
 *         48      8  refcount_table_offset           105      7  zero
 *         56      4  refcount_table_clusters         112     ..  unknown fields, kept
 *
 * then extensions {u32 type, u32 length, data, padding to 8}, then the backing file's name; all within the first cluster.
 *
 * Invariants
 * - A decoded header is within every bound below: whoever uses it allocates and multiplies without checking again.
 * - What is not understood and may be ignored is written back as it was.
 */
import { badImage, unsupportedImage } from './image-error.js';

export const MAGIC = 0x514649fb;
export const HEADER_V2_BYTES = 72;
export const HEADER_V3_BYTES = 104;
/** With the compression type: what is written today. */
export const HEADER_BYTES = 112;

export const CLUSTER_BITS_MIN = 9;
export const CLUSTER_BITS_MAX = 21;
export const CLUSTER_BITS_MIN_EXTENDED = 14;
export const L1_BYTES_MAX = 32 * 2 ** 20;
export const REFCOUNT_TABLE_BYTES_MAX = 8 * 2 ** 20;
export const SNAPSHOTS_MAX = 65536;
export const BACKING_NAME_BYTES_MAX = 1023;
export const BITMAPS_MAX = 65535;
export const BITMAP_DIRECTORY_BYTES_MAX = 64 * 2 ** 20;
/** Host offsets are 56 bits in the format; a number holds 53 exactly, and no file is larger. */
export const OFFSET_LIMIT = 2 ** 53;

/** Bits of `incompatible`. */
export const Incompatible = {
  dirty: 1n,
  corrupt: 2n,
  externalDataFile: 4n,
  compressionType: 8n,
  extendedL2: 16n,
} as const;
const INCOMPATIBLE_KNOWN = 31n;
/** Bits of `compatible`. */
export const Compatible = { lazyRefcounts: 1n } as const;
/** Bits of `autoclear`. */
export const Autoclear = { bitmaps: 1n, rawExternalData: 2n } as const;
const AUTOCLEAR_KNOWN = 3n;
/**
 * While an image is served its upper 32 autoclear bits are the number of the session that writes to it, 0: none. Whoever else opens
 * it for writing has to clear them, as bits that it does not know, so that what the session left behind is void (restart-log.ts).
 */
const SESSION_SHIFT = 32n;
const SESSION_MASK = 0xffffffffn << SESSION_SHIFT;

export const CryptMethod = { none: 0, aes: 1, luks: 2 } as const;
export type CryptMethod = (typeof CryptMethod)[keyof typeof CryptMethod];
export const CompressionType = { deflate: 0, zstd: 1 } as const;
export type CompressionType = (typeof CompressionType)[keyof typeof CompressionType];

/** Types of header extensions. */
export const Extension = {
  end: 0,
  backingFormat: 0xe2792aca,
  featureNames: 0x6803f857,
  bitmaps: 0x23852875,
  luksHeader: 0x0537be77,
  dataFile: 0x44415441,
} as const;
const BITMAPS_EXTENSION_BYTES = 24;
const LUKS_EXTENSION_BYTES = 16;
const FEATURE_NAME_BYTES = 48;
const FEATURE_KIND_NAMES = ['incompatible', 'compatible', 'autoclear'] as const;

export interface FeatureName {
  /** 0 incompatible, 1 compatible, 2 autoclear. */
  readonly kind: number;
  readonly bit: number;
  readonly name: string;
}

/** Where the bitmap directory is. */
export interface BitmapsExtension {
  readonly count: number;
  readonly directoryOffset: number;
  readonly directoryBytes: number;
}

export interface Qcow2Header {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  /** Size of the virtual disk. */
  readonly sizeBytes: number;
  readonly cryptMethod: CryptMethod;
  readonly l1Entries: number;
  readonly l1Offset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly snapshotCount: number;
  readonly snapshotTableOffset: number;
  readonly incompatible: bigint;
  readonly compatible: bigint;
  readonly autoclear: bigint;
  /** Width of a refcount is 2 ** refcountOrder bits. */
  readonly refcountOrder: number;
  readonly compressionType: CompressionType;
  /** What follows the known fields within the header. */
  readonly unknownFields: Buffer;
  readonly backingFile: string | null;
  readonly backingFormat: string | null;
  readonly dataFile: string | null;
  readonly bitmaps: BitmapsExtension | null;
  /** Where the LUKS header lies in the file. */
  readonly luksHeader: { readonly offset: number; readonly lengthBytes: number } | null;
  readonly featureNames: readonly FeatureName[];
  readonly unknownExtensions: readonly { readonly type: number; readonly data: Buffer }[];
}

/** The names that QEMU writes, and so do we. */
export const FEATURE_NAMES: readonly FeatureName[] = [
  { kind: 0, bit: 0, name: 'dirty bit' },
  { kind: 0, bit: 1, name: 'corrupt bit' },
  { kind: 0, bit: 2, name: 'external data file' },
  { kind: 0, bit: 3, name: 'compression type' },
  { kind: 0, bit: 4, name: 'extended L2 entries' },
  { kind: 1, bit: 0, name: 'lazy refcounts' },
  { kind: 2, bit: 0, name: 'bitmaps' },
  { kind: 2, bit: 1, name: 'raw external data' },
];

export function clusterBytesOf({ clusterBits }: Pick<Qcow2Header, 'clusterBits'>): number {
  return 2 ** clusterBits;
}

export function hasExtendedL2({ incompatible }: Pick<Qcow2Header, 'incompatible'>): boolean {
  return (incompatible & Incompatible.extendedL2) !== 0n;
}

export function hasExternalData({ incompatible }: Pick<Qcow2Header, 'incompatible'>): boolean {
  return (incompatible & Incompatible.externalDataFile) !== 0n;
}

/** Bytes of an L2 entry. */
export function l2EntryBytes(header: Pick<Qcow2Header, 'incompatible'>): 8 | 16 {
  return hasExtendedL2(header) ? 16 : 8;
}

/** Bytes of the disk that one L2 table maps. */
export function l2CoverageBytes(header: Pick<Qcow2Header, 'incompatible' | 'clusterBits'>): number {
  const clusterBytes = clusterBytesOf(header);
  return (clusterBytes / l2EntryBytes(header)) * clusterBytes;
}

/** L1 entries that a disk of a size needs. */
export function l1EntriesFor(header: Pick<Qcow2Header, 'incompatible' | 'clusterBits'>, sizeBytes: number): number {
  return Math.ceil(sizeBytes / l2CoverageBytes(header));
}

/** Counters in one refcount block. */
export function refcountsPerBlock({
  clusterBits,
  refcountOrder,
}: Pick<Qcow2Header, 'clusterBits' | 'refcountOrder'>): number {
  return 2 ** (clusterBits + 3 - refcountOrder);
}

/** Whether these bytes begin as a qcow2 image does. */
export function isQcow2(bytes: Buffer): boolean {
  return bytes.length >= 8 && bytes.readUInt32BE(0) === MAGIC;
}

/**
 * Bytes of the first cluster that `decodeHeader` needs.
 * @param bytes the first 512 of the file. Throws BdevError.
 */
export function firstClusterBytes(bytes: Buffer): number {
  if (!isQcow2(bytes)) throw badImage('header.magic', 'is not that of a qcow2 image');
  return 2 ** boundedUInt32(bytes, 20, 'header.cluster_bits', CLUSTER_BITS_MIN, CLUSTER_BITS_MAX);
}

/**
 * @param bytes the first cluster of the file, or all of a file that is shorter
 * @param fileBytes size of the file
 * @param purpose `check` takes tables that are not all there, for a check to say so: whoever reads them looks where the file ends.
 * Throws BdevError, which names the field.
 */
export function decodeHeader(bytes: Buffer, fileBytes: number, purpose: 'use' | 'check' = 'use'): Qcow2Header {
  const clusterBytes = firstClusterBytes(bytes);
  const version = bytes.readUInt32BE(4);
  if (version !== 2 && version !== 3) {
    throw unsupportedImage(
      'header.version',
      `is ${version}`,
      'only versions 2 and 3 are known; a newer program may know it',
    );
  }
  if (version === 3 && bytes.length < HEADER_V3_BYTES) throw badImage('header', 'is cut off');
  const isV3 = version === 3;
  const headerBytes = isV3 ? bytes.readUInt32BE(100) : HEADER_V2_BYTES;
  if (
    isV3 &&
    (headerBytes < HEADER_V3_BYTES || headerBytes > Math.min(clusterBytes, bytes.length) || headerBytes % 8 !== 0)
  ) {
    throw badImage('header.header_length', `is ${headerBytes}, it may be ${HEADER_V3_BYTES} to a cluster, in eights`);
  }
  const incompatible = isV3 ? bytes.readBigUInt64BE(72) : 0n;
  const extensions = decodeExtensions(bytes.subarray(0, clusterBytes), headerBytes, version);
  const unknown = incompatible & ~INCOMPATIBLE_KNOWN;
  if (unknown !== 0n) throw unknownFeatures(unknown, extensions.featureNames);

  const header: Qcow2Header = {
    version,
    clusterBits: bytes.readUInt32BE(20),
    sizeBytes: offsetAt(bytes, 24, 'header.size'),
    cryptMethod: boundedUInt32(bytes, 32, 'header.crypt_method', 0, CryptMethod.luks) as CryptMethod,
    l1Entries: bytes.readUInt32BE(36),
    l1Offset: offsetAt(bytes, 40, 'header.l1_table_offset'),
    refcountTableOffset: offsetAt(bytes, 48, 'header.refcount_table_offset'),
    refcountTableClusters: bytes.readUInt32BE(56),
    snapshotCount: boundedUInt32(bytes, 60, 'header.nb_snapshots', 0, SNAPSHOTS_MAX),
    snapshotTableOffset: offsetAt(bytes, 64, 'header.snapshots_offset'),
    incompatible,
    compatible: isV3 ? bytes.readBigUInt64BE(80) : 0n,
    autoclear: isV3 ? bytes.readBigUInt64BE(88) : 0n,
    refcountOrder: isV3 ? boundedUInt32(bytes, 96, 'header.refcount_order', 0, 6) : 4,
    compressionType: headerBytes > HEADER_V3_BYTES ? (bytes[104]! as CompressionType) : CompressionType.deflate,
    unknownFields: Buffer.from(bytes.subarray(Math.min(HEADER_BYTES, headerBytes), headerBytes)),
    backingFile: decodeBackingName(bytes, clusterBytes),
    ...extensions,
  };
  checkHeader(header, purpose === 'check' ? Infinity : fileBytes, purpose);
  return header;
}

/** Throws BdevError for values that contradict one another, the bounds or the file. */
function checkHeader(header: Qcow2Header, fileBytes: number, purpose: 'use' | 'check'): void {
  const clusterBytes = clusterBytesOf(header);
  const { compressionType, incompatible } = header;
  if (hasExtendedL2(header) && header.clusterBits < CLUSTER_BITS_MIN_EXTENDED) {
    throw badImage(
      'header.cluster_bits',
      `is ${header.clusterBits}, extended L2 entries need ${CLUSTER_BITS_MIN_EXTENDED}`,
    );
  }
  const knownType =
    (incompatible & Incompatible.compressionType) !== 0n ? CompressionType.zstd : CompressionType.deflate;
  if (compressionType !== knownType) {
    throw compressionType > CompressionType.zstd
      ? unsupportedImage(
          'header.compression_type',
          `is ${compressionType}`,
          'convert the image with a program that knows it',
        )
      : badImage('header.compression_type', `is ${compressionType}, which contradicts header.incompatible_features`);
  }
  const l1Needed = l1EntriesFor(header, header.sizeBytes);
  if (l1Needed * 8 > L1_BYTES_MAX) {
    throw badImage('header.size', `is ${header.sizeBytes}, which needs an L1 table of more than ${L1_BYTES_MAX} bytes`);
  }
  if (header.l1Entries * 8 > L1_BYTES_MAX) {
    throw badImage('header.l1_size', `is ${header.l1Entries}, more than ${L1_BYTES_MAX / 8}`);
  }
  if (header.l1Entries < l1Needed)
    throw badImage('header.l1_size', `is ${header.l1Entries}, the disk needs ${l1Needed}`);
  checkTable('header.l1_table_offset', header.l1Offset, header.l1Entries * 8, clusterBytes, fileBytes);
  const isForUse = purpose === 'use';
  if (isForUse && header.refcountTableClusters === 0) throw badImage('header.refcount_table_clusters', 'is 0');
  if (header.refcountTableClusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) {
    throw badImage(
      'header.refcount_table_clusters',
      `is ${header.refcountTableClusters}, more than ${REFCOUNT_TABLE_BYTES_MAX} bytes`,
    );
  }
  // The last cluster of a file may be cut short.
  const lengthBytes = isForUse ? (header.refcountTableClusters - 1) * clusterBytes + 1 : 0;
  checkTable('header.refcount_table_offset', header.refcountTableOffset, lengthBytes, clusterBytes, fileBytes);
  if (isForUse && header.refcountTableOffset === 0) throw badImage('header.refcount_table_offset', 'is 0');
  if (header.snapshotCount > 0) {
    checkTable(
      'header.snapshots_offset',
      header.snapshotTableOffset,
      header.snapshotCount * 40,
      clusterBytes,
      fileBytes,
    );
  }
  const { bitmaps, luksHeader } = header;
  if (bitmaps !== null) {
    checkTable(
      'bitmaps.bitmap_directory_offset',
      bitmaps.directoryOffset,
      bitmaps.directoryBytes,
      clusterBytes,
      fileBytes,
    );
  }
  if (luksHeader !== null) {
    checkTable('luks.offset', luksHeader.offset, luksHeader.lengthBytes, clusterBytes, fileBytes);
  }
  if ((header.cryptMethod === CryptMethod.luks) !== (luksHeader !== null)) {
    throw badImage('header.crypt_method', `is ${header.cryptMethod}, which contradicts the LUKS header's extension`);
  }
  if (isForUse && hasExternalData(header) && header.snapshotCount > 0) {
    throw badImage('header.nb_snapshots', `is ${header.snapshotCount}, an image with an external data file has none`);
  }
}

/** A table begins at a cluster and lies within the file. */
export function checkTable(
  field: string,
  offset: number,
  lengthBytes: number,
  clusterBytes: number,
  fileBytes: number,
): void {
  if (offset % clusterBytes !== 0) throw badImage(field, `is ${offset}, not the start of a cluster`);
  if (lengthBytes > 0 && offset === 0) throw badImage(field, 'is 0, where the header is');
  if (offset + lengthBytes > fileBytes)
    throw badImage(field, `is ${offset}, ${lengthBytes} bytes from there reach beyond the file`);
}

type Extensions = Pick<
  Qcow2Header,
  'backingFormat' | 'dataFile' | 'bitmaps' | 'luksHeader' | 'featureNames' | 'unknownExtensions'
>;

function decodeExtensions(bytes: Buffer, headerBytes: number, version: number): Extensions {
  const found: { -readonly [K in keyof Extensions]: Extensions[K] } = {
    backingFormat: null,
    dataFile: null,
    bitmaps: null,
    luksHeader: null,
    featureNames: [],
    unknownExtensions: [],
  };
  // Extensions end where the backing file's name begins; images of the first days have none and end at once.
  const nameOffset = offsetAt(bytes, 8, 'header.backing_file_offset');
  const end = nameOffset > 0 ? Math.min(nameOffset, bytes.length) : bytes.length;
  if (version === 2 && nameOffset === 0 && bytes.length < headerBytes + 8) return found;
  let at = headerBytes;
  while (at + 8 <= end) {
    const type = bytes.readUInt32BE(at);
    const length = bytes.readUInt32BE(at + 4);
    at += 8;
    if (type === Extension.end) break;
    if (length > end - at) {
      throw badImage(`extension 0x${type.toString(16)}.length`, `is ${length}, it reaches beyond the header's cluster`);
    }
    takeExtension(found, type, Buffer.from(bytes.subarray(at, at + length)));
    at += Math.ceil(length / 8) * 8;
  }
  return found;
}

function takeExtension(found: { -readonly [K in keyof Extensions]: Extensions[K] }, type: number, data: Buffer): void {
  switch (type) {
    case Extension.backingFormat:
      found.backingFormat = data.toString('utf8');
      return;
    case Extension.dataFile:
      found.dataFile = data.toString('utf8');
      return;
    case Extension.featureNames: {
      const names: FeatureName[] = [];
      for (let at = 0; at + FEATURE_NAME_BYTES <= data.length; at += FEATURE_NAME_BYTES) {
        const text = data.toString('latin1', at + 2, at + FEATURE_NAME_BYTES);
        names.push({ kind: data[at]!, bit: data[at + 1]!, name: text.replace(/\0.*$/s, '') });
      }
      found.featureNames = names;
      return;
    }
    case Extension.bitmaps: {
      if (data.length !== BITMAPS_EXTENSION_BYTES) {
        throw badImage('bitmaps.length', `is ${data.length}, it must be ${BITMAPS_EXTENSION_BYTES}`);
      }
      const count = boundedUInt32(data, 0, 'bitmaps.nb_bitmaps', 1, BITMAPS_MAX);
      const directoryBytes = offsetAt(data, 8, 'bitmaps.bitmap_directory_size');
      if (directoryBytes < count * 24 || directoryBytes > BITMAP_DIRECTORY_BYTES_MAX) {
        const bound = `${count * 24} to ${BITMAP_DIRECTORY_BYTES_MAX}`;
        throw badImage('bitmaps.bitmap_directory_size', `is ${directoryBytes}, it may be ${bound}`);
      }
      found.bitmaps = { count, directoryBytes, directoryOffset: offsetAt(data, 16, 'bitmaps.bitmap_directory_offset') };
      return;
    }
    case Extension.luksHeader:
      if (data.length !== LUKS_EXTENSION_BYTES) {
        throw badImage('luks.length', `is ${data.length}, it must be ${LUKS_EXTENSION_BYTES}`);
      }
      found.luksHeader = { offset: offsetAt(data, 0, 'luks.offset'), lengthBytes: offsetAt(data, 8, 'luks.length') };
      return;
    default:
      found.unknownExtensions = [...found.unknownExtensions, { type, data }];
  }
}

function decodeBackingName(bytes: Buffer, clusterBytes: number): string | null {
  const offset = offsetAt(bytes, 8, 'header.backing_file_offset');
  if (offset === 0) return null;
  const length = boundedUInt32(bytes, 16, 'header.backing_file_size', 0, BACKING_NAME_BYTES_MAX);
  if (offset > Math.min(clusterBytes, bytes.length) - length) {
    throw badImage('header.backing_file_offset', `is ${offset}, the name is not within the first cluster`);
  }
  if (length === 0) return null;
  const name = bytes.toString('utf8', offset, offset + length);
  if (name.includes('\0')) throw badImage('header.backing_file_name', 'holds a zero byte');
  return name;
}

/**
 * The bytes from the start of the file to the end of the backing file's name, at most a cluster.
 * Throws BdevError when they do not fit.
 */
export function encodeHeader(header: Qcow2Header): Buffer {
  const clusterBytes = clusterBytesOf(header);
  const isV3 = header.version === 3;
  const headerBytes = isV3 ? HEADER_BYTES + header.unknownFields.length : HEADER_V2_BYTES;
  const extensions = Buffer.concat(extensionsOf(header).map(encodeExtension));
  const name = Buffer.from(header.backingFile ?? '', 'utf8');
  const totalBytes = headerBytes + extensions.length + name.length;
  if (name.length > BACKING_NAME_BYTES_MAX || totalBytes > clusterBytes) {
    throw badImage('header', `has ${totalBytes} bytes with its extensions and names, a cluster has ${clusterBytes}`);
  }
  const bytes = Buffer.alloc(totalBytes);
  bytes.writeUInt32BE(MAGIC, 0);
  bytes.writeUInt32BE(header.version, 4);
  if (name.length > 0) writeUInt64(bytes, headerBytes + extensions.length, 8);
  bytes.writeUInt32BE(name.length, 16);
  bytes.writeUInt32BE(header.clusterBits, 20);
  writeUInt64(bytes, header.sizeBytes, 24);
  bytes.writeUInt32BE(header.cryptMethod, 32);
  bytes.writeUInt32BE(header.l1Entries, 36);
  writeUInt64(bytes, header.l1Offset, 40);
  writeUInt64(bytes, header.refcountTableOffset, 48);
  bytes.writeUInt32BE(header.refcountTableClusters, 56);
  bytes.writeUInt32BE(header.snapshotCount, 60);
  writeUInt64(bytes, header.snapshotTableOffset, 64);
  if (isV3) {
    bytes.writeBigUInt64BE(header.incompatible, 72);
    bytes.writeBigUInt64BE(header.compatible, 80);
    bytes.writeBigUInt64BE(header.autoclear, 88);
    bytes.writeUInt32BE(header.refcountOrder, 96);
    bytes.writeUInt32BE(headerBytes, 100);
    bytes[104] = header.compressionType;
    header.unknownFields.copy(bytes, HEADER_BYTES);
  }
  extensions.copy(bytes, headerBytes);
  name.copy(bytes, headerBytes + extensions.length);
  return bytes;
}

/** Ones that say where things are come first: they belong into the first sector, with the fields that change together with them. */
function extensionsOf(header: Qcow2Header): { type: number; data: Buffer }[] {
  const all: { type: number; data: Buffer }[] = [];
  const add = (type: number, data: Buffer): void => void all.push({ type, data });
  if (header.bitmaps !== null) {
    const data = Buffer.alloc(BITMAPS_EXTENSION_BYTES);
    data.writeUInt32BE(header.bitmaps.count, 0);
    writeUInt64(data, header.bitmaps.directoryBytes, 8);
    writeUInt64(data, header.bitmaps.directoryOffset, 16);
    add(Extension.bitmaps, data);
  }
  if (header.backingFormat !== null) add(Extension.backingFormat, Buffer.from(header.backingFormat, 'utf8'));
  if (header.dataFile !== null) add(Extension.dataFile, Buffer.from(header.dataFile, 'utf8'));
  if (header.luksHeader !== null) {
    const data = Buffer.alloc(LUKS_EXTENSION_BYTES);
    writeUInt64(data, header.luksHeader.offset, 0);
    writeUInt64(data, header.luksHeader.lengthBytes, 8);
    add(Extension.luksHeader, data);
  }
  for (const { type, data } of header.unknownExtensions) add(type, data);
  if (header.featureNames.length > 0) {
    const data = Buffer.alloc(FEATURE_NAME_BYTES * header.featureNames.length);
    header.featureNames.forEach(({ kind, bit, name }, i) => {
      data[i * FEATURE_NAME_BYTES] = kind;
      data[i * FEATURE_NAME_BYTES + 1] = bit;
      data.write(name, i * FEATURE_NAME_BYTES + 2, FEATURE_NAME_BYTES - 2, 'latin1');
    });
    add(Extension.featureNames, data);
  }
  add(Extension.end, Buffer.alloc(0));
  return all;
}

function encodeExtension({ type, data }: { type: number; data: Buffer }): Buffer {
  const bytes = Buffer.alloc(8 + Math.ceil(data.length / 8) * 8);
  bytes.writeUInt32BE(type, 0);
  bytes.writeUInt32BE(data.length, 4);
  data.copy(bytes, 8);
  return bytes;
}

/** Autoclear bits that whoever writes to the image has to clear first. */
export function unknownAutoclear({ autoclear }: Pick<Qcow2Header, 'autoclear'>): bigint {
  return autoclear & ~(AUTOCLEAR_KNOWN | SESSION_MASK);
}

/** Number of the session that was writing to the image, 0: none. */
export function sessionOf({ autoclear }: Pick<Qcow2Header, 'autoclear'>): number {
  return Number((autoclear & SESSION_MASK) >> SESSION_SHIFT);
}

/** The autoclear bits with another session. */
export function withSession(autoclear: bigint, session: number): bigint {
  return (autoclear & ~SESSION_MASK) | (BigInt(session) << SESSION_SHIFT);
}

function unknownFeatures(unknown: bigint, names: readonly FeatureName[]): Error {
  const bits = Array.from({ length: 64 }, (_, bit) => bit).filter((bit) => (unknown & (1n << BigInt(bit))) !== 0n);
  const words = bits.map((bit) => {
    const name = names.find((known) => known.kind === 0 && known.bit === bit)?.name;
    return name === undefined ? `bit ${bit}` : `bit ${bit} (${name})`;
  });
  return unsupportedImage(
    'header.incompatible_features',
    `has ${words.join(', ')}, not known here`,
    'use a program that knows it, and convert the image there',
  );
}

/** The names by which an image's own features are shown. */
export function featureWords(header: Qcow2Header): string[] {
  const fields = [header.incompatible, header.compatible, header.autoclear];
  return FEATURE_NAMES.filter(({ kind, bit }) => (fields[kind]! & (1n << BigInt(bit))) !== 0n).map(
    ({ kind, name }) => `${FEATURE_KIND_NAMES[kind]}: ${name}`,
  );
}

/** A 64-bit field that has to be exact as a number. Throws BdevError. */
export function offsetAt(bytes: Buffer, at: number, field: string): number {
  const value = bytes.readUInt32BE(at) * 2 ** 32 + bytes.readUInt32BE(at + 4);
  if (value >= OFFSET_LIMIT) throw badImage(field, `is ${value}, beyond 2^53`);
  return value;
}

/** Writes a number below 2^53. */
export function writeUInt64(bytes: Buffer, value: number, at: number): void {
  bytes.writeUInt32BE(Math.floor(value / 2 ** 32), at);
  bytes.writeUInt32BE(value % 2 ** 32, at + 4);
}

function boundedUInt32(bytes: Buffer, at: number, field: string, min: number, max: number): number {
  const value = bytes.readUInt32BE(at);
  if (value < min || value > max) throw badImage(field, `is ${value}, it may be ${min} to ${max}`);
  return value;
}
