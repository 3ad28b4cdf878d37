/** `strata img create`: a new image, and the data file that it names. */
import { statSync } from 'node:fs';
import { checkCreateOptions, createImage, preallocateSpace, withImpliedOptions } from '../../bdev/qcow2/create.js';
import type { CreateOptions, Preallocation } from '../../bdev/qcow2/create.js';
import { CompressionType } from '../../bdev/qcow2/format.js';
import { ENCRYPT_OPTIONS, makeLuksHeader } from './encryption.js';
import { optionHelp, parseFormat, parseImageOptions, roundUp } from './image-options.js';
import type { Format } from './image-options.js';
import { NodeFile, runTask } from './node-file.js';
import { closeImage, openImage, resolveName } from './open-image.js';
import { parseImageSize, print, usage } from './words.js';

const encryptNames = ENCRYPT_OPTIONS.map(([name]) => name);

export interface CreateCommand {
  readonly quiet?: boolean;
  readonly format: string;
  readonly backing?: string;
  readonly backingFormat?: string;
  readonly unsafe?: boolean;
  readonly options: readonly string[];
  readonly object: readonly string[];
}

/** Throws BdevError. */
export function createCommand(path: string | undefined, size: string | undefined, command: CreateCommand): void {
  const format = parseFormat(command.format);
  if (command.options.some((text) => text === 'help' || text === '?')) {
    print(optionHelp(format, format === 'qcow2' ? ENCRYPT_OPTIONS : []));
    return;
  }
  if (path === undefined) throw usage('filename', 'Expecting image file name', 'name the image');
  const given = parseImageOptions(format, command.options, encryptNames);
  const backingFile = command.backing ?? given.backingFile;
  const backingFormat = command.backingFormat ?? given.backingFormat;
  if (format === 'raw' && backingFile !== null) {
    throw usage('backing_file', 'Backing file not supported for file format raw', 'use -f qcow2');
  }
  if (backingFile !== null && backingFormat === null) {
    throw usage('backing_fmt', 'Backing file specified without backing format', 'name it with -F: raw or qcow2');
  }
  refuseOverwriting(path, [
    backingFile === null ? null : localName(path, backingFile),
    given.dataFile === null ? null : localName(path, given.dataFile),
  ]);
  const asked = size === undefined ? given.sizeBytes : roundUp(parseImageSize(size));
  const backingSize =
    backingFile === null || command.unsafe === true ? null : sizeOfBacking(path, backingFile, backingFormat);
  const sizeBytes = asked ?? backingSize;
  if (sizeBytes === null) {
    throw usage('size', 'Image creation needs a size parameter', 'give a size, as 10G');
  }
  const luksHeader = makeLuksHeader(given.others, command.object);
  const encryption = luksHeader === null ? {} : { luksHeader };
  const options = withImpliedOptions({ ...given, backingFile, backingFormat, sizeBytes, ...encryption });
  // Before any file is made.
  if (format === 'qcow2') checkCreateOptions(options);
  if (command.quiet !== true) print(`Formatting '${path}', ${describe(format, options)}\n`);
  makeImage(path, format, options);
}

/** Makes a file that holds an empty disk. Throws BdevError. */
export function makeImage(path: string, format: Format, options: CreateOptions): void {
  if (format === 'raw') {
    makeRaw(path, options.sizeBytes, options.preallocation);
    return;
  }
  const data = options.dataFile;
  if (data !== null) makeRaw(resolveName(path, data), options.sizeBytes, options.preallocation);
  const file = new NodeFile(path, { mode: 'create' });
  try {
    runTask(createImage(file, options));
  } finally {
    file.close();
  }
}

function makeRaw(path: string, sizeBytes: number, preallocation: Preallocation): void {
  const file = new NodeFile(path, { mode: 'create' });
  try {
    runTask(file.grow(sizeBytes));
    if (sizeBytes > 0) runTask(preallocateSpace(file, 0, sizeBytes, preallocation));
    runTask(file.sync());
  } finally {
    file.close();
  }
}

function sizeOfBacking(path: string, name: string, format: string | null): number {
  const backing = openImage({ path: resolveName(path, name), format }, { mode: 'read' });
  closeImage(backing);
  return roundUp(backing.sizeBytes);
}

/** A name that is no local one is the unsafe user's. */
function localName(path: string, name: string): string | null {
  try {
    return resolveName(path, name);
  } catch {
    return null;
  }
}

/** An image that is made is emptied first: it may not be what it is made from. Throws BdevError. */
function refuseOverwriting(path: string, names: readonly (string | null)[]): void {
  const there = statSync(path, { throwIfNoEntry: false });
  if (there === undefined) return;
  for (const name of names) {
    const used = name === null ? undefined : statSync(name, { throwIfNoEntry: false });
    if (used !== undefined && used.ino === there.ino && used.dev === there.dev) {
      throw usage(
        'filename',
        `${path}: Trying to create an image with the same filename as the backing file`,
        'choose another name',
      );
    }
  }
}

/** The words that qemu-img prints. */
function describe(format: Format, options: CreateOptions): string {
  const onOff = (value: boolean): string => (value ? 'on' : 'off');
  if (format === 'raw') return `fmt=raw size=${options.sizeBytes}`;
  const words = [
    'fmt=qcow2',
    ...(options.luksHeader === undefined ? [] : ['encrypt.format=luks']),
    `cluster_size=${2 ** options.clusterBits}`,
    `extended_l2=${onOff(options.extendedL2)}`,
    ...(options.preallocation === 'off' ? [] : [`preallocation=${options.preallocation}`]),
    `compression_type=${options.compressionType === CompressionType.zstd ? 'zstd' : 'zlib'}`,
    `size=${options.sizeBytes}`,
    ...(options.backingFile === null ? [] : [`backing_file=${options.backingFile}`]),
    ...(options.backingFormat === null ? [] : [`backing_fmt=${options.backingFormat}`]),
    ...(options.dataFile === null ? [] : [`data_file=${options.dataFile}`]),
    `lazy_refcounts=${onOff(options.lazyRefcounts)}`,
    `refcount_bits=${2 ** options.refcountOrder}`,
  ];
  return words.join(' ');
}
