/** Writing a disk to an image, a device or a bdev that is there, through the code that serves disks. */
import { statSync } from 'node:fs';
import type { OpenBdev } from '../../bdev/bdev.js';
import { allRanges, copyDisk, dataRanges } from './copy-disk.js';
import type { DiskPart } from './copy-disk.js';
import type { DiskHost, SourceFilters } from './disk-host.js';
import { wholeSectors } from './disk-map.js';
import { configuredName, readBdevs } from './disk-source.js';
import type { DiskSource, SourceOptions } from './disk-source.js';
import type { ImageSpec } from './image-spec.js';
import { closeChain, openBehind } from './open-chain.js';
import { closeImage, openImage } from './open-image.js';
import type { ProgressLine } from './words.js';
import { usage } from './words.js';

/** Less than this is not worth a hole. */
const PAGE_BYTES = 4096;

export interface CopyImageOptions {
  readonly range: { readonly start: number; readonly lengthBytes: number };
  /** Whether it reads as zeroes. */
  readonly isTargetZero: boolean;
  /** Whether it shows the same images behind it as the source. */
  readonly hasBacking: boolean;
  readonly sparseBytes: number;
  readonly parallel: number;
  readonly filters: SourceFilters;
  readonly progress: ProgressLine;
}

/** A disk to write to. */
export interface CopyTarget {
  readonly path: string;
  readonly disk: OpenBdev;
  /** What is written at once at least. */
  readonly unitBytes: number;
}

/** Opens an image to write to, with what is behind it. The host closes it. Throws BdevError. */
export function imageTarget(host: DiskHost, spec: ImageSpec): CopyTarget {
  const image = openImage(spec, { mode: 'read' });
  const unitBytes = image.header === null ? PAGE_BYTES : 2 ** image.header.clusterBits;
  closeImage(image);
  const behind = openBehind(image);
  try {
    return { path: spec.path, disk: host.openTarget(spec, behind), unitBytes };
  } finally {
    closeChain(behind);
  }
}

/** Opens a bdev of the config to write to, if the name is that of one. The host closes it. Rejects with BdevError. */
export async function configuredTarget(
  host: DiskHost,
  text: string,
  options: SourceOptions,
): Promise<CopyTarget | null> {
  const name = configuredName(text, options);
  if (name === null) return null;
  const disk = host.openConfigured(await readBdevs(options.config!), name, true);
  if (disk.bdev.readOnly) throw usage('filename', `bdev ${name} is read-only`, 'choose one that can be written to');
  return { path: text, disk, unitBytes: Math.max(PAGE_BYTES, disk.bdev.limits.optimalIoBytes) };
}

/** Copies a range of the source to the beginning of the target, durably. Throws BdevError. */
export function copyToTarget(host: DiskHost, source: DiskSource, target: CopyTarget, options: CopyImageOptions): void {
  const { range, isTargetZero, hasBacking, progress } = options;
  const { bdev } = target.disk;
  const room = bdev.blockCount * bdev.blockSizeBytes;
  if (room < range.lengthBytes) {
    const message = `the output has ${room} bytes, the disk ${range.lengthBytes}`;
    throw usage('filename', message, 'use a larger target');
  }
  if (range.lengthBytes === 0) return;
  const parts = partsOf(source, range, hasBacking);
  const end = range.start + range.lengthBytes;
  copyDisk(host, {
    source: host.filter(source.open(), options.filters),
    target: target.disk,
    sourcePath: source.path,
    targetPath: target.path,
    ranges: isTargetZero && options.sparseBytes > 0 ? dataRanges(parts, target.unitBytes, end) : allRanges(parts),
    shiftBytes: range.start,
    sparseBytes: options.sparseBytes,
    unitBytes: target.unitBytes,
    isTargetZero,
    parallel: options.parallel,
    onProgress: (at) => progress.update((at - range.start) / range.lengthBytes),
  });
}

/** @param hasBacking whether the target has the same images behind it, so that what is there need not be copied */
export function* partsOf(
  source: DiskSource,
  range: { readonly start: number; readonly lengthBytes: number },
  hasBacking: boolean,
): Generator<DiskPart> {
  const extents = hasBacking ? source.ownExtents(range) : source.extents(range);
  for (const { start, lengthBytes, kind } of wholeSectors(extents)) {
    const isNothing = kind === 'unallocated' && hasBacking;
    yield { start, lengthBytes, isZero: isNothing ? null : kind === 'zero' || kind === 'unallocated' };
  }
}

/** Throws BdevError for a target that is one of the sources: it would be emptied. */
export function refuseSelf({ chain }: DiskSource, targetPath: string): void {
  const there = statSync(targetPath, { throwIfNoEntry: false });
  if (there === undefined) return;
  for (const { file } of chain) {
    const { ino, dev } = statSync(file.path);
    if (ino === there.ino && dev === there.dev) {
      throw usage('filename', `${targetPath} is the source, or behind it`, 'choose another name');
    }
  }
}

export function isDevice(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isBlockDevice() === true;
}
