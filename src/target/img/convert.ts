/** `strata img convert` and `dd`: a disk as another image, read and written through the bdevs that the daemon serves. */
import { statSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { CREATE_DEFAULTS, withImpliedOptions } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { allRanges, copyDisk, dataRanges } from './copy-disk.js';
import type { CopyRange, DiskPart } from './copy-disk.js';
import { makeImage } from './create.js';
import { DiskHost } from './disk-host.js';
import { mapDisk, wholeSectors } from './disk-map.js';
import { fillImage } from './fill-image.js';
import { Interruption } from './interruption.js';
import { newImage } from './new-image.js';
import type { NewImage } from './new-image.js';
import { optionHelp, parseFormat, parseImageOptions } from './image-options.js';
import type { Format } from './image-options.js';
import { closeChain, openChain } from './open-chain.js';
import { openImage } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { ProgressLine, parseImageSize, print, usage } from './words.js';

export interface ConvertCommand {
  readonly format?: string;
  readonly targetFormat: string;
  readonly options: readonly string[];
  readonly backing?: string;
  readonly backingFormat?: string;
  /** `-n`: the target is there. */
  readonly create: boolean;
  readonly targetIsZero?: boolean;
  readonly sparse: string;
  readonly parallel: string;
  readonly compress?: boolean;
  /** `-W`: pieces are written as they come. */
  readonly outOfOrder?: boolean;
  /** `-t`: `unsafe`, or another word of qemu-img's for "on the disk when it is done". */
  readonly cache: string;
  readonly progress?: boolean;
  readonly quiet?: boolean;
  readonly forceShare?: boolean;
}

const PARALLEL_MAX = 64;

/** Throws BdevError. */
export async function convertCommand(sourcePath: string, targetPath: string, command: ConvertCommand): Promise<void> {
  const format = parseFormat(command.targetFormat);
  if (command.options.includes('help')) {
    print(optionHelp(format));
    return;
  }
  const sparseBytes = parseImageSize(command.sparse, '-S');
  if (sparseBytes % 512 !== 0) throw usage('-S', `${command.sparse} is not a multiple of 512`, 'as 4k');
  const parallel = Number(command.parallel);
  if (!(Number.isInteger(parallel) && parallel >= 1 && parallel <= PARALLEL_MAX)) {
    throw usage('-m', `Invalid number of requests: ${command.parallel}`, `choose 1 to ${PARALLEL_MAX}`);
  }
  if (command.targetIsZero === true && command.create) {
    throw usage('--target-is-zero', '--target-is-zero requires use of -n flag', 'leave it out');
  }
  const chain = openChain(sourcePath, command.format ?? null, command.forceShare === true);
  try {
    refuseSelf(chain, targetPath);
    const backingFile = command.backing ?? null;
    const options = imageOptions(format, chain[0]!.sizeBytes, command);
    const progress = new ProgressLine(command.progress === true && command.quiet !== true);
    if (command.compress === true) refuseCompression(format, options, command);
    if (canFill(targetPath, options, command, sparseBytes)) {
      await fillNewImage(chain, targetPath, format, options, { command, sparseBytes, parallel, progress });
      progress.end();
      return;
    }
    if (command.create) makeImage(targetPath, format, options);
    copyImage(chain, targetPath, format, {
      range: { start: 0, lengthBytes: chain[0]!.sizeBytes },
      // A device is not emptied, and a target with a backing file shows that.
      isTargetZero: backingFile === null && (command.create ? !isDevice(targetPath) : command.targetIsZero === true),
      hasBacking: backingFile !== null,
      sparseBytes,
      parallel,
      forceShare: command.forceShare === true,
      progress,
    });
    progress.end();
  } finally {
    closeChain(chain);
  }
}

interface FillCommand {
  readonly command: ConvertCommand;
  readonly sparseBytes: number;
  readonly parallel: number;
  readonly progress: ProgressLine;
}

/** Whether the output is a new file that is written front to back. */
function canFill(path: string, options: CreateOptions, command: ConvertCommand, sparseBytes: number): boolean {
  if (!command.create || isDevice(path)) return false;
  if (command.compress === true) return true;
  return sparseBytes > 0 && options.dataFile === null && options.preallocation === 'off';
}

/** Throws BdevError for what cannot be compressed. */
function refuseCompression(format: Format, options: CreateOptions, command: ConvertCommand): void {
  const refuse = (message: string, hint: string): never => {
    throw usage('-c', message, hint);
  };
  if (format === 'raw') refuse('Compression not supported for this file format', 'use -O qcow2');
  if (!command.create) refuse('-c makes a new image', 'leave -n out');
  if (options.dataFile !== null) refuse('an external data file holds no compressed clusters', 'leave data_file out');
  if (options.preallocation !== 'off')
    refuse('Compression and preallocation not supported at the same time', 'leave one out');
}

async function fillNewImage(
  chain: readonly OpenImage[],
  targetPath: string,
  format: Format,
  options: CreateOptions,
  { command, sparseBytes, parallel, progress }: FillCommand,
): Promise<void> {
  if (isDevice(targetPath)) throw usage('-c', 'a device is not compressed to', 'name a file');
  const { sizeBytes } = chain[0]!;
  const hasBacking = options.backingFile !== null;
  const compression = command.compress === true ? options.compressionType : null;
  const host = new DiskHost();
  const signals = new Interruption();
  let image: NewImage | null = null;
  try {
    const source = host.openChain(chain, command.forceShare === true);
    image = newImage(targetPath, format, options);
    const most = compression === null ? sparseBytes : 0;
    const unitBytes = Math.max(1, Math.ceil(most / image.unitBytes)) * image.unitBytes;
    const parts = partsOf(hasBacking ? [chain[0]!] : chain, { start: 0, lengthBytes: sizeBytes }, hasBacking);
    await fillImage(
      host,
      {
        source,
        sourcePath: chain[0]!.file.path,
        image,
        ranges:
          sparseBytes === 0 ? wholeDisk(sizeBytes) : dataRanges(neededParts(parts, hasBacking), unitBytes, sizeBytes),
        unitBytes,
        isSparse: sparseBytes > 0 && image.keepsZeroes,
        compression,
        threads: availableParallelism(),
        parallel,
        inOrder: command.outOfOrder !== true,
        onProgress: (at) => progress.update(at / sizeBytes),
      },
      (interrupt) => signals.onSignal(interrupt),
    );
    image.finish(command.cache !== 'unsafe');
  } finally {
    host.close();
    image?.close();
    signals.end();
  }
}

function wholeDisk(lengthBytes: number): CopyRange[] {
  return lengthBytes === 0 ? [] : [{ start: 0, lengthBytes, isZero: false }];
}

/** What is to be read: where something is behind the output, all but what it keeps; zeroes, too, hide it. */
function* neededParts(parts: Iterable<DiskPart>, hasBacking: boolean): Generator<DiskPart> {
  for (const part of parts) yield hasBacking ? { ...part, isZero: part.isZero === null } : part;
}

export interface DdCommand {
  readonly format?: string;
  readonly targetFormat: string;
  readonly forceShare?: boolean;
}

/** `dd if=A of=B [bs=N] [count=N] [skip=N]`. Throws BdevError. */
export function ddCommand(words: readonly string[], command: DdCommand): void {
  const known = ['if', 'of', 'bs', 'count', 'skip'];
  const given = new Map<string, string>();
  for (const word of words) {
    const at = word.indexOf('=');
    const name = word.slice(0, Math.max(at, 0));
    if (!known.includes(name)) throw usage(word, `Unrecognized operand '${word}'`, `use ${known.join('=, ')}=`);
    given.set(name, word.slice(at + 1));
  }
  const source = given.get('if');
  const target = given.get('of');
  if (source === undefined || target === undefined) {
    throw usage('if', 'Must specify both input and output file names', 'as if=A of=B');
  }
  const blockBytes = parseImageSize(given.get('bs') ?? '512', 'bs');
  if (blockBytes === 0 || blockBytes % 512 !== 0) throw usage('bs', `bs is ${blockBytes}`, 'use a multiple of 512');
  const format = parseFormat(command.targetFormat);
  const chain = openChain(source, command.format ?? null, command.forceShare === true);
  try {
    refuseSelf(chain, target);
    const { sizeBytes } = chain[0]!;
    const start = Math.min(sizeBytes, Number(given.get('skip') ?? 0) * blockBytes);
    const most = given.has('count') ? Number(given.get('count')) * blockBytes : Infinity;
    const lengthBytes = Math.min(sizeBytes - start, most);
    if (!Number.isSafeInteger(start) || !Number.isSafeInteger(lengthBytes)) {
      throw usage('count', 'skip and count are whole numbers', 'as count=10');
    }
    makeImage(target, format, { ...CREATE_DEFAULTS, sizeBytes: lengthBytes });
    copyImage(chain, target, format, {
      range: { start, lengthBytes },
      isTargetZero: !isDevice(target),
      hasBacking: false,
      sparseBytes: 4096,
      parallel: 8,
      forceShare: command.forceShare === true,
      progress: new ProgressLine(false),
    });
  } finally {
    closeChain(chain);
  }
}

interface CopyImageOptions {
  readonly range: { readonly start: number; readonly lengthBytes: number };
  readonly isTargetZero: boolean;
  readonly hasBacking: boolean;
  readonly sparseBytes: number;
  readonly parallel: number;
  readonly forceShare: boolean;
  readonly progress: ProgressLine;
}

function copyImage(chain: readonly OpenImage[], targetPath: string, format: Format, options: CopyImageOptions): void {
  const { range, isTargetZero, hasBacking, progress } = options;
  if (range.lengthBytes === 0) return;
  const unitBytes = clusterBytesAt(targetPath, format);
  const behind = openChain(targetPath, format, false);
  const [own] = behind.splice(0, 1);
  own?.file.close();
  const host = new DiskHost();
  try {
    const source = host.openChain(chain, options.forceShare);
    const target = host.openTarget(targetPath, format, behind);
    const room = target.bdev.blockCount * target.bdev.blockSizeBytes;
    if (room < range.lengthBytes) {
      const message = `the output has ${room} bytes, the disk ${range.lengthBytes}`;
      throw usage('filename', message, 'use a larger target');
    }
    const parts = partsOf(hasBacking ? [chain[0]!] : chain, range, hasBacking);
    const end = range.start + range.lengthBytes;
    copyDisk(host, {
      source,
      target,
      sourcePath: chain[0]!.file.path,
      targetPath,
      ranges: isTargetZero && options.sparseBytes > 0 ? dataRanges(parts, unitBytes, end) : allRanges(parts),
      shiftBytes: range.start,
      sparseBytes: options.sparseBytes,
      unitBytes,
      isTargetZero,
      parallel: options.parallel,
      onProgress: (at) => progress.update((at - range.start) / range.lengthBytes),
    });
  } finally {
    host.close();
    closeChain(behind);
  }
}

/** @param hasBacking whether the target has the same images behind it, so that what is there need not be copied */
function* partsOf(
  chain: readonly OpenImage[],
  range: { readonly start: number; readonly lengthBytes: number },
  hasBacking: boolean,
): Generator<DiskPart> {
  for (const { start, lengthBytes, kind } of wholeSectors(mapDisk(chain, range))) {
    const isNothing = kind === 'unallocated' && hasBacking;
    yield { start, lengthBytes, isZero: isNothing ? null : kind === 'zero' || kind === 'unallocated' };
  }
}

function imageOptions(format: Format, sizeBytes: number, command: ConvertCommand): CreateOptions {
  const given = parseImageOptions(format, command.options);
  const backingFile = command.backing ?? given.backingFile;
  const backingFormat = command.backingFormat ?? given.backingFormat;
  if (backingFile !== null && backingFormat === null) {
    throw usage('backing_fmt', 'Backing file specified without backing format', 'name it with -F: raw or qcow2');
  }
  if (backingFile !== null && command.backing === undefined) {
    throw usage(
      'backing_file',
      'backing_file is given as an option',
      'use -B, so that only the differences are copied',
    );
  }
  return withImpliedOptions({ ...given, backingFile, backingFormat, sizeBytes });
}

/** Throws BdevError for a target that is one of the sources: it would be emptied. */
function refuseSelf(chain: readonly OpenImage[], targetPath: string): void {
  const there = statSync(targetPath, { throwIfNoEntry: false });
  if (there === undefined) return;
  for (const { file } of chain) {
    const { ino, dev } = statSync(file.path);
    if (ino === there.ino && dev === there.dev) {
      throw usage('filename', `${targetPath} is the source, or behind it`, 'choose another name');
    }
  }
}

function isDevice(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isBlockDevice() === true;
}

function clusterBytesAt(path: string, format: Format): number {
  if (format === 'raw') return 4096;
  const image = openImage(path, format, { mode: 'read' });
  image.file.close();
  return 2 ** image.header!.clusterBits;
}
