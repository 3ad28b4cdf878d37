/** `strata img convert`: a disk as another image, read and written through the bdevs that the daemon serves. */
import { availableParallelism } from 'node:os';
import { withImpliedOptions } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { SystemClock } from '../../poller/clock.js';
import { copyBitmaps, refuseBitmaps } from './copy-bitmaps.js';
import { dataRanges } from './copy-disk.js';
import type { CopyRange, DiskPart } from './copy-disk.js';
import { configuredTarget, copyToTarget, imageTarget, isDevice, partsOf, refuseSelf } from './copy-image.js';
import type { CopyTarget } from './copy-image.js';
import { makeImage } from './create.js';
import { DiskHost } from './disk-host.js';
import type { SourceFilters } from './disk-host.js';
import { configuredName, imageSource, openSource } from './disk-source.js';
import type { DiskSource, SourceOptions } from './disk-source.js';
import { ENCRYPT_OPTIONS, makeLuksHeader } from './encryption.js';
import { fillImage } from './fill-image.js';
import { imageSpec, isDirect, parseSnapshot } from './image-spec.js';
import type { ImageSpec } from './image-spec.js';
import { Interruption } from './interruption.js';
import { newImage } from './new-image.js';
import type { NewImage } from './new-image.js';
import { optionHelp, parseFormat, parseImageOptions } from './image-options.js';
import type { Format } from './image-options.js';
import { ResumePoint, identityOf } from './resume.js';
import { readSecret } from './secrets.js';
import { ProgressLine, parseImageSize, print, usage } from './words.js';

export interface ConvertCommand extends SourceOptions {
  readonly format?: string;
  readonly targetFormat: string;
  readonly options: readonly string[];
  readonly object: readonly string[];
  readonly backing?: string;
  readonly backingFormat?: string;
  /** `-n`: the target is there. */
  readonly create: boolean;
  readonly targetIsZero?: boolean;
  readonly targetImageOpts?: boolean;
  /** `-l`. */
  readonly snapshot?: string;
  readonly sparse?: string;
  readonly parallel: string;
  readonly compress?: boolean;
  /** `-W`: pieces are written as they come. */
  readonly outOfOrder?: boolean;
  /** `-C`. */
  readonly copyOffload?: boolean;
  /** `-r`: bytes per second. */
  readonly rateLimit?: string;
  readonly salvage?: boolean;
  readonly bitmaps?: boolean;
  readonly skipBrokenBitmaps?: boolean;
  readonly resume?: boolean;
  /** `-t`: `unsafe`, or another word of qemu-img's for "on the disk when it is done". */
  readonly cache: string;
  /** `-T`. */
  readonly sourceCache: string;
  readonly progress?: boolean;
  readonly quiet?: boolean;
}

const PARALLEL_MAX = 64;
const SPARSE_BYTES = 4096;
/** With --resume it is written down how far it is after so much of the disk, or so long. */
const STRETCH_BYTES = 2 ** 30;
const STRETCH_US = 1_000_000;

/** What the command line says, in numbers. */
interface Plan {
  readonly command: ConvertCommand;
  readonly format: Format;
  readonly sparseBytes: number;
  readonly parallel: number;
  readonly filters: SourceFilters;
  readonly progress: ProgressLine;
}

/** Rejects with BdevError. */
export async function convertCommand(sourceName: string, targetName: string, command: ConvertCommand): Promise<void> {
  const format = parseFormat(command.targetFormat);
  if (command.options.includes('help')) {
    print(optionHelp(format, format === 'qcow2' ? ENCRYPT_OPTIONS : []));
    return;
  }
  const plan = planOf(format, command);
  refuseContradictions(command);
  const host = new DiskHost();
  let source: DiskSource | null = null;
  try {
    source = await openConvertSource(host, sourceName, command);
    await convert(host, source, targetName, plan);
  } finally {
    host.close();
    source?.close();
  }
  plan.progress.end();
}

function planOf(format: Format, command: ConvertCommand): Plan {
  const sparseBytes = command.sparse === undefined ? SPARSE_BYTES : parseImageSize(command.sparse, '-S');
  if (sparseBytes % 512 !== 0) throw usage('-S', `${command.sparse} is not a multiple of 512`, 'as 4k');
  const parallel = Number(command.parallel);
  if (!(Number.isInteger(parallel) && parallel >= 1 && parallel <= PARALLEL_MAX)) {
    throw usage('-m', `Invalid number of requests: ${command.parallel}`, `choose 1 to ${PARALLEL_MAX}`);
  }
  const bytesPerSecond = command.rateLimit === undefined ? null : parseImageSize(command.rateLimit, '-r');
  const onLoss = (offset: number, errno: number): void => {
    process.stderr.write(`strata img: warning: error while reading offset ${offset}: errno ${errno}\n`);
  };
  return {
    command,
    format,
    sparseBytes,
    parallel,
    filters: { bytesPerSecond, onLoss: command.salvage === true ? onLoss : null },
    progress: new ProgressLine(command.progress === true && command.quiet !== true),
  };
}

/** In the words of qemu-img. Throws BdevError. */
function refuseContradictions(command: ConvertCommand): void {
  const { create } = command;
  const isSet = (
    name: 'targetIsZero' | 'targetImageOpts' | 'copyOffload' | 'compress' | 'skipBrokenBitmaps',
  ): boolean => command[name] === true;
  const refuse = (field: string, message: string): never => {
    throw usage(field, message, 'leave one of them out');
  };
  if (isSet('targetIsZero') && create) refuse('--target-is-zero', '--target-is-zero requires use of -n flag');
  if (isSet('targetImageOpts') && create) refuse('--target-image-opts', '--target-image-opts requires use of -n flag');
  if (isSet('skipBrokenBitmaps') && command.bitmaps !== true) {
    refuse('--skip-broken-bitmaps', 'Use of --skip-broken-bitmaps requires --bitmaps');
  }
  if (command.resume === true && command.bitmaps === true) {
    refuse('--resume', '--resume knows nothing of bitmaps: `bitmap --merge` copies them afterwards');
  }
  if (isSet('copyOffload') && command.sparse !== undefined) {
    refuse('-C', 'Cannot enable copy offloading when -S is used');
  }
  if (isSet('copyOffload') && isSet('compress')) refuse('-C', 'Cannot enable copy offloading when -c is used');
}

async function openConvertSource(host: DiskHost, name: string, command: ConvertCommand): Promise<DiskSource> {
  const format = command.format ?? null;
  const { snapshot, sourceCache } = command;
  if (configuredName(name, command) !== null) {
    if (snapshot !== undefined) throw usage('-l', `${name} is no image file`, 'name the file');
    return openSource(host, name, format, command);
  }
  const spec = imageSpec(name, format, { ...command, direct: isDirect(sourceCache) });
  return imageSource(host, {
    ...spec,
    ...(snapshot === undefined ? {} : { snapshot: parseSnapshot(snapshot) }),
  });
}

async function convert(host: DiskHost, source: DiskSource, targetName: string, plan: Plan): Promise<void> {
  const { command, format, sparseBytes } = plan;
  const bdev = await configuredTarget(host, targetName, command);
  if (bdev !== null) {
    if (command.compress === true) throw usage('-c', 'a bdev is not compressed to', 'leave -c out');
    if (command.resume === true) throw noResume();
    copyAll(host, source, bdev, plan, command.targetIsZero === true);
    return;
  }
  const target = targetSpec(targetName, plan);
  refuseSelf(source, target.path);
  const options = imageOptions(format, source.sizeBytes, command);
  if (command.bitmaps === true) {
    if (format !== 'qcow2') throw usage('--bitmaps', 'a raw image has no bitmaps', 'use -O qcow2');
    refuseBitmaps(source, command.skipBrokenBitmaps === true);
  }
  if (command.compress === true) refuseCompression(format, options, command);
  if (canFill(target.path, options, command, sparseBytes)) await fillNewImage(host, source, target.path, options, plan);
  else {
    if (command.resume === true) throw noResume();
    if (command.create) makeImage(target.path, format, options);
    // A device is not emptied, and a target with a backing file shows that.
    const isZero = command.create ? !isDevice(target.path) : command.targetIsZero === true;
    copyAll(host, source, imageTarget(host, target), plan, isZero && options.backingFile === null);
  }
  if (command.bitmaps === true) {
    host.closeDisks();
    copyBitmaps(source, target, command.skipBrokenBitmaps === true);
  }
}

function noResume(): Error {
  const hint = 'leave --resume out; or -n, -S 0, encryption, data_file and preallocation';
  return usage('--resume', '--resume needs a new file that is written front to back', hint);
}

function targetSpec(name: string, { command, format }: Plan): ImageSpec {
  if (command.targetImageOpts === true) {
    return imageSpec(name, null, { imageOpts: true, object: command.object });
  }
  const { others } = parseImageOptions(format, command.options, encryptNames);
  const secret = others.get('encrypt.key-secret');
  const passphrase = (): Buffer => readSecret(secret!, command.object);
  return { path: name, format, ...(secret === undefined ? {} : { passphrase }) };
}

/** Copies all of the disk to what is there. */
function copyAll(host: DiskHost, source: DiskSource, target: CopyTarget, plan: Plan, isTargetZero: boolean): void {
  copyToTarget(host, source, target, {
    range: { start: 0, lengthBytes: source.sizeBytes },
    isTargetZero,
    hasBacking: plan.command.backing !== undefined,
    sparseBytes: plan.sparseBytes,
    parallel: plan.parallel,
    filters: plan.filters,
    progress: plan.progress,
  });
}

/** Whether the output is a new file that is written front to back. */
function canFill(path: string, options: CreateOptions, command: ConvertCommand, sparseBytes: number): boolean {
  if (!command.create || isDevice(path) || options.luksHeader !== undefined) return false;
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
  if (options.luksHeader !== undefined)
    refuse('Compression and encryption not supported at the same time', 'leave one out');
  if (options.preallocation !== 'off')
    refuse('Compression and preallocation not supported at the same time', 'leave one out');
}

async function fillNewImage(
  host: DiskHost,
  source: DiskSource,
  targetPath: string,
  options: CreateOptions,
  { command, format, sparseBytes, parallel, filters, progress }: Plan,
): Promise<void> {
  if (isDevice(targetPath)) throw usage('-c', 'a device is not compressed to', 'name a file');
  const { sizeBytes } = source;
  const hasBacking = options.backingFile !== null;
  const compression = command.compress === true ? options.compressionType : null;
  const resume =
    command.resume === true ? resumePoint(source, targetPath, options, { format, sparseBytes, command }) : null;
  const signals = new Interruption(resume === null ? 'start it again' : 'start it again, with --resume');
  let image: NewImage | null = null;
  try {
    const disk = host.filter(source.open(), filters);
    const begun = newImage(targetPath, format, options, resume);
    image = begun;
    const most = compression === null ? sparseBytes : 0;
    const unitBytes = Math.max(1, Math.ceil(most / image.unitBytes)) * image.unitBytes;
    const parts = partsOf(source, { start: 0, lengthBytes: sizeBytes }, hasBacking);
    await fillImage(
      host,
      {
        source: disk,
        sourcePath: source.path,
        image,
        ranges: rangesFrom(
          sparseBytes === 0 ? wholeDisk(sizeBytes) : dataRanges(neededParts(parts, hasBacking), unitBytes, sizeBytes),
          resume?.offset ?? 0,
        ),
        unitBytes,
        isSparse: sparseBytes > 0 && image.keepsZeroes,
        compression,
        threads: availableParallelism(),
        parallel,
        inOrder: command.outOfOrder !== true,
        onSettled: checkpoints(begun, resume),
        onProgress: (at) => progress.update(at / sizeBytes),
      },
      (interrupt) => signals.onSignal(interrupt),
    );
    image.finish(command.cache !== 'unsafe' || resume !== null);
    resume?.remove();
  } finally {
    image?.close();
    signals.end();
  }
}

/** Throws BdevError. */
function resumePoint(
  source: DiskSource,
  path: string,
  options: CreateOptions,
  { format, sparseBytes, command }: Pick<Plan, 'format' | 'sparseBytes' | 'command'>,
): ResumePoint {
  if (command.outOfOrder === true)
    throw usage('--resume', '--resume needs an output that is written in order', 'leave -W out');
  const compress = command.compress === true;
  return new ResumePoint(path, identityOf(source, format, options, { '-c': compress, '-S': sparseBytes }));
}

/** What is called when all before an offset is written: now and then it is made durable, and written down. */
function checkpoints(image: NewImage, resume: ResumePoint | null): (offset: number) => void {
  if (resume === null) return () => undefined;
  const clock = new SystemClock();
  let lastOffset = resume.offset;
  let lastUs = clock.nowUs();
  return (offset) => {
    if (offset - lastOffset < STRETCH_BYTES && clock.nowUs() - lastUs < STRETCH_US) return;
    resume.save(offset, image.checkpoint());
    lastOffset = offset;
    lastUs = clock.nowUs();
  };
}

/** What is left of ranges from an offset on. */
function* rangesFrom(ranges: Iterable<CopyRange>, offset: number): Generator<CopyRange> {
  for (const range of ranges) {
    const end = range.start + range.lengthBytes;
    const start = Math.max(range.start, offset);
    if (end > start) yield { ...range, start, lengthBytes: end - start };
  }
}

function wholeDisk(lengthBytes: number): CopyRange[] {
  return lengthBytes === 0 ? [] : [{ start: 0, lengthBytes, isZero: false }];
}

/** What is to be read: where something is behind the output, all but what it keeps; zeroes, too, hide it. */
function* neededParts(parts: Iterable<DiskPart>, hasBacking: boolean): Generator<DiskPart> {
  for (const part of parts) yield hasBacking ? { ...part, isZero: part.isZero === null } : part;
}

const encryptNames = ENCRYPT_OPTIONS.map(([name]) => name);

function imageOptions(format: Format, sizeBytes: number, command: ConvertCommand): CreateOptions {
  const given = parseImageOptions(format, command.options, encryptNames);
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
  const luksHeader = command.create ? makeLuksHeader(given.others, command.object) : null;
  const encryption = luksHeader === null ? {} : { luksHeader };
  return withImpliedOptions({ ...given, backingFile, backingFormat, sizeBytes, ...encryption });
}
