/** `strata img measure`: bytes that the file of a new image would take, empty and when all of the disk is written. */
import { CREATE_DEFAULTS, checkCreateOptions, refcountClusters } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { Incompatible, l1EntriesFor } from '../../bdev/qcow2/format.js';
import { bitmapTableEntries } from '../../bdev/qcow2/tables.js';
import { optionHelp, parseFormat, parseImageOptions, roundUp } from './image-options.js';
import { imageSpec, parseSnapshot } from './image-spec.js';
import type { ImageSpec, SpecOptions } from './image-spec.js';
import { closeChain, openChain } from './open-chain.js';
import { mapDisk } from './disk-map.js';
import { runTask } from './node-file.js';
import { readBitmaps } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { parseImageSize, print, printJson, usage } from './words.js';

export interface MeasureCommand extends SpecOptions {
  readonly size?: string;
  readonly format?: string;
  readonly targetFormat: string;
  readonly options: readonly string[];
  readonly output: 'human' | 'json';
  /** `-l`. */
  readonly snapshot?: string;
}

interface Measure {
  readonly required: number;
  readonly 'fully-allocated': number;
  readonly bitmaps?: number;
}

/** Throws BdevError. */
export function measureCommand(path: string | undefined, command: MeasureCommand): void {
  const format = parseFormat(command.targetFormat);
  if (command.options.includes('help')) {
    print(optionHelp(format));
    return;
  }
  if ((path === undefined) === (command.size === undefined)) {
    throw usage('filename', 'either an image or --size is needed', 'name one of the two');
  }
  const options = parseImageOptions(format, command.options);
  const chain = path === undefined ? null : openChain(sourceSpec(path, command));
  try {
    const sizeBytes = chain === null ? roundUp(parseImageSize(command.size!)) : chain[0]!.sizeBytes;
    const settings: CreateOptions = { ...CREATE_DEFAULTS, ...options, sizeBytes };
    const measure =
      format === 'raw' ? { required: sizeBytes, 'fully-allocated': sizeBytes } : measureQcow2(settings, chain);
    if (command.output === 'json') printJson(measure);
    else print(asText(measure));
  } finally {
    if (chain !== null) closeChain(chain);
  }
}

function sourceSpec(path: string, command: MeasureCommand): ImageSpec {
  const spec = imageSpec(path, command.format ?? null, command);
  return command.snapshot === undefined ? spec : { ...spec, snapshot: parseSnapshot(command.snapshot) };
}

function measureQcow2(options: CreateOptions, chain: readonly OpenImage[] | null): Measure {
  checkCreateOptions(options);
  const clusterBytes = 2 ** options.clusterBits;
  const diskBytes = Math.ceil(options.sizeBytes / clusterBytes) * clusterBytes;
  const metadataBytes = metadataOf(options, diskBytes);
  const isFull = options.preallocation === 'falloc' || options.preallocation === 'full';
  const dataBytes = isFull ? diskBytes : chain === null ? 0 : dataBytesOf(chain, clusterBytes);
  const bitmaps = chain === null ? {} : bitmapBytes(chain[0]!, clusterBytes);
  return { required: metadataBytes + dataBytes, 'fully-allocated': metadataBytes + diskBytes, ...bitmaps };
}

/** Header, tables and refcounts of a disk that is written to everywhere. */
function metadataOf(options: CreateOptions, diskBytes: number): number {
  const { clusterBits, refcountOrder, extendedL2 } = options;
  const clusterBytes = 2 ** clusterBits;
  const l1Entries = l1EntriesFor({ clusterBits, incompatible: extendedL2 ? Incompatible.extendedL2 : 0n }, diskBytes);
  const l1Clusters = Math.ceil((l1Entries * 8) / clusterBytes);
  const clusters = 1 + l1Entries + l1Clusters;
  const { blocks, tableClusters } = refcountClusters(clusters + diskBytes / clusterBytes, {
    clusterBits,
    refcountOrder,
  });
  return (clusters + blocks + tableClusters) * clusterBytes;
}

/** Clusters of the new image that something of the disk falls into. */
function dataBytesOf(chain: readonly OpenImage[], clusterBytes: number): number {
  let bytes = 0;
  let counted = 0;
  for (const { start, lengthBytes, kind } of mapDisk(chain)) {
    if (kind === 'zero' || kind === 'unallocated') continue;
    const from = Math.max(counted, Math.floor(start / clusterBytes) * clusterBytes);
    counted = Math.max(counted, Math.ceil((start + lengthBytes) / clusterBytes) * clusterBytes);
    bytes += Math.max(0, counted - from);
  }
  return bytes;
}

/** What the bitmaps of the image would take in one of these clusters. */
function bitmapBytes({ file, header, sizeBytes }: OpenImage, clusterBytes: number): { bitmaps?: number } {
  if (header === null || header.version === 2) return {};
  const bitmaps = runTask(readBitmaps(file, header));
  let clusters = 0;
  let directoryBytes = 0;
  for (const { granularityBits, name } of bitmaps) {
    const entries = bitmapTableEntries(sizeBytes, granularityBits, clusterBytes);
    clusters += entries + Math.ceil((entries * 8) / clusterBytes);
    directoryBytes += Math.ceil((24 + Buffer.byteLength(name)) / 8) * 8;
  }
  return { bitmaps: (clusters + Math.ceil(directoryBytes / clusterBytes)) * clusterBytes };
}

function asText(measure: Measure): string {
  const bitmaps = measure.bitmaps === undefined ? '' : `bitmaps size: ${measure.bitmaps}\n`;
  return `required size: ${measure.required}\nfully allocated size: ${measure['fully-allocated']}\n${bitmaps}`;
}
