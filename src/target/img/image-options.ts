/** `-o` of create, measure and convert for qcow2: qemu-img's names and values as options of an image. */
import type { CreateOptions, Preallocation } from '../../bdev/qcow2/create.js';
import { CREATE_DEFAULTS } from '../../bdev/qcow2/create.js';
import { CompressionType } from '../../bdev/qcow2/format.js';
import { parseChoice, parseImageSize, parseOptions, parseSwitch, usage } from './words.js';

const COMPATS = new Map<string, 2 | 3>([
  ['0.10', 2],
  ['v2', 2],
  ['1.1', 3],
  ['v3', 3],
]);
export const PREALLOCATIONS = ['off', 'metadata', 'falloc', 'full'] as const;

/** Name, what it takes, what it does. */
export const QCOW2_OPTIONS: readonly (readonly [string, string, string])[] = [
  ['backing_file', 'str', 'File name of a base image'],
  ['backing_fmt', 'str', 'Image format of the base image'],
  ['cluster_size', 'size', 'qcow2 cluster size, 512 to 2M (65536)'],
  ['compat', 'str', 'Version of the format: 0.10 or v2, 1.1 or v3 (1.1)'],
  ['compression_type', 'str', 'How compressed clusters are compressed: zlib or zstd (zlib)'],
  ['data_file', 'str', 'File name of an external data file'],
  ['data_file_raw', 'on/off', 'The external data file stays valid as a raw image (off)'],
  ['extended_l2', 'on/off', 'Extended L2 tables: clusters are allocated by parts (off)'],
  ['lazy_refcounts', 'on/off', 'Postpone refcount updates (off)'],
  ['preallocation', 'str', 'off, metadata, falloc or full (off)'],
  ['refcount_bits', 'num', 'Width of a reference count in bits, 1 to 64 (16)'],
  ['size', 'size', 'Virtual disk size'],
];
export const RAW_OPTIONS: readonly (readonly [string, string, string])[] = [
  ['preallocation', 'str', 'off, falloc or full (off)'],
  ['size', 'size', 'Virtual disk size'],
];

/** Formats that images can be made in. */
export type Format = 'raw' | 'qcow2';

export function parseFormat(text: string): Format {
  return parseChoice('format', text, ['raw', 'qcow2']);
}

/** What `-o help` prints. */
export function optionHelp(format: Format, others: readonly (readonly [string, string, string])[] = []): string {
  const options = [...(format === 'qcow2' ? QCOW2_OPTIONS : RAW_OPTIONS), ...others];
  return `Supported options:\n${options.map(([name, takes, text]) => `  ${`${name}=<${takes}>`.padEnd(25)}- ${text}\n`).join('')}`;
}

export interface ImageOptions extends Omit<CreateOptions, 'sizeBytes' | 'luksHeader'> {
  /** Of `size=`, rounded up to a sector; null when it was not given. */
  readonly sizeBytes: number | null;
  /** By their full names. */
  readonly others: ReadonlyMap<string, string>;
}

/** @param others names that are taken for qcow2 too, and handed on. Throws BdevError that names the option. */
export function parseImageOptions(
  format: Format,
  texts: readonly string[],
  others: readonly string[] = [],
): ImageOptions {
  const own = (format === 'qcow2' ? QCOW2_OPTIONS : RAW_OPTIONS).map(([name]) => name);
  const options = parseOptions(texts, format === 'qcow2' ? [...own, ...others] : own);
  const of = <T>(name: string, parse: (text: string) => T, otherwise: T): T => {
    const text = options.get(name);
    return text === undefined ? otherwise : parse(text);
  };
  const isOn = (name: string): boolean => of(name, (text) => parseSwitch(name, text), false);
  const parsed = {
    ...CREATE_DEFAULTS,
    backingFile: of<string | null>('backing_file', String, null),
    backingFormat: of<string | null>('backing_fmt', String, null),
    clusterBits: of('cluster_size', (text) => powerOfTwo('cluster_size', parseImageSize(text, 'cluster_size')), 16),
    version: of('compat', parseCompat, 3 as const),
    compressionType: of('compression_type', parseCompression, CompressionType.deflate as CompressionType),
    dataFile: of<string | null>('data_file', String, null),
    dataFileRaw: isOn('data_file_raw'),
    extendedL2: isOn('extended_l2'),
    lazyRefcounts: isOn('lazy_refcounts'),
    preallocation: of('preallocation', parsePreallocation, 'off'),
    refcountOrder: of('refcount_bits', parseRefcountBits, 4),
    others: new Map([...options].filter(([name]) => others.includes(name))),
    sizeBytes: of<number | null>('size', (text) => roundUp(parseImageSize(text)), null),
  };
  if (format === 'raw' && parsed.preallocation === 'metadata') {
    throw usage('preallocation', 'a raw image has no metadata', 'use preallocation=falloc or full');
  }
  return parsed;
}

/** Disks are whole sectors. */
export function roundUp(sizeBytes: number): number {
  return Math.ceil(sizeBytes / 512) * 512;
}

export function parsePreallocation(text: string): Preallocation {
  return parseChoice('preallocation', text, PREALLOCATIONS);
}

function powerOfTwo(name: string, value: number): number {
  const bits = Math.log2(value);
  if (!Number.isInteger(bits)) throw usage(name, `${name} is ${value}`, 'choose a power of two');
  return bits;
}

export function parseRefcountBits(text: string): number {
  const bits = Number(text);
  if (![1, 2, 4, 8, 16, 32, 64].includes(bits)) {
    throw usage('refcount_bits', `refcount_bits is ${text}`, 'choose a power of two up to 64');
  }
  return Math.log2(bits);
}

export function parseCompat(text: string): 2 | 3 {
  const version = COMPATS.get(text);
  if (version === undefined) throw usage('compat', `Invalid parameter 'compat': '${text}'`, 'use 0.10 or 1.1');
  return version;
}

function parseCompression(text: string): CompressionType {
  return parseChoice('compression_type', text, ['zlib', 'zstd']) === 'zstd'
    ? CompressionType.zstd
    : CompressionType.deflate;
}
