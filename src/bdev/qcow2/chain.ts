/**
 * Opening what an image names: the file that it is backed by, and the one that holds its data. Names in images are those of strangers:
 * they are local paths, opened only beneath a folder that the operator has allowed, and formats are taken from the image, never guessed.
 */
import { readlinkSync, realpathSync } from 'node:fs';
import { basename, dirname, join, relative } from 'node:path';
import { O_DIRECTORY, O_RDONLY, O_RDWR, SystemError, check, checkObject, native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevConfig, BdevContext, IoChannel } from '../bdev.js';
import { changeLock } from '../file-lock.js';
import { ChannelFile } from './channel-file.js';
import type { Layer } from './engine.js';
import { hasExternalData } from './format.js';
import type { Qcow2Header } from './format.js';
import { badImage, unsupportedImage } from './image-error.js';
import { Qcow2Image, readHeader } from './image.js';
import type { Task } from '../task.js';

/** Images one behind the other: as many as any tool makes, and a bound for those that go in a circle. */
export const CHAIN_MAX = 256;
const EXDEV = 18;

/** What a config may say of files that the uring module opens; the rest is as its schema has it. */
interface FileConfig extends BdevConfig {
  readonly path: string;
  readonly readOnly: boolean;
  readonly direct: boolean;
  readonly lock: boolean;
}

/** Everything that was opened on the way, to be closed again. */
export class Opened {
  readonly bdevs: Bdev[] = [];
  readonly channels: IoChannel[] = [];
  readonly images: Qcow2Image[] = [];
  readonly locks: FileLock[] = [];

  close(): void {
    for (const image of this.images) image.release();
    for (const channel of this.channels) channel.close();
    for (const bdev of this.bdevs) bdev.destroy();
    for (const lock of this.locks) lock.close();
  }
}

/** What lies below an image, open. */
export class Below {
  readonly layers: readonly Layer[];
  readonly #opened: Opened;

  constructor(layers: readonly Layer[] = [], opened = new Opened()) {
    this.layers = layers;
    this.#opened = opened;
  }

  /** No request is under way. */
  *close(): Task<void> {
    this.#opened.close();
  }
}

/** Keeps others from a file of the chain that is going to be written, and is never let go of on the way there and back. */
export class FileLock {
  readonly #fd: number;
  readonly #path: string;

  /** Nobody else may write to it from here on. @param fd open for writing, and closed with the lock. Throws BdevError */
  constructor(fd: number, path: string) {
    this.#fd = fd;
    this.#path = path;
    this.share();
  }

  /** Nobody else may have it open. Throws BdevError. */
  own(): void {
    if (changeLock(this.#fd, this.#path, true)) return;
    this.share();
    throw this.#inUse();
  }

  /** Throws BdevError. */
  share(): void {
    if (!changeLock(this.#fd, this.#path, false)) throw this.#inUse();
  }

  close(): void {
    native.fileClose(this.#fd);
  }

  #inUse(): BdevError {
    return new BdevError(
      'locked',
      'name',
      `${this.#path} is in use by another disk or process, which relies on what it holds`,
      'end that one, then commit again',
    );
  }
}

export interface ChainOptions {
  readonly context: BdevContext;
  readonly opened: Opened;
  /** Of the bdev that owns all this. */
  readonly name: string;
  /** Beneath it files may be opened; null: none may. */
  readonly imageDir: string | null;
  readonly l2CacheBytes: number;
  /** Files of the chain so far. */
  readonly seen: Set<string>;
}

/** The bdev that holds an image's data, open. */
export interface DataFile {
  readonly bdev: Bdev;
  readonly channel: IoChannel;
}

/** A file that was found by its name. */
export interface NamedFile {
  readonly bdev: Bdev;
  readonly path: string;
}

/** How a named file is opened. */
interface Access {
  /** Of its bdev's name. */
  readonly suffix: string;
  readonly readOnly: boolean;
  /** Its lock is one that changes hands (FileLock), and not the bdev's. */
  readonly hasOwnLock?: boolean;
}

/** The images below one, as it and they name them. Throws BdevError. */
export function* openBacking(options: ChainOptions, base: Bdev, top: Qcow2Header): Task<Layer[]> {
  noteOwn(options, base);
  return yield* openBehind(options, base, { header: top, path: pathOf(base) }, 1);
}

/** The file of an image is part of the chain. */
function noteOwn({ seen }: ChainOptions, base: Bdev): void {
  const path = pathOf(base);
  const fd = check(native.fileOpen(path, O_RDONLY, 0), `open ${path}`);
  seen.add(identityOf(fd));
  native.fileClose(fd);
}

/** An image of a chain, as far as the ones behind it need it. */
interface Above {
  readonly header: Qcow2Header;
  readonly path: string;
}

function* openBehind(options: ChainOptions, base: Bdev, top: Above, first: number): Task<Layer[]> {
  const { context, opened } = options;
  const layers: Layer[] = [];
  let above = top;
  while (above.header.backingFile !== null) {
    const number = first + layers.length;
    if (number > CHAIN_MAX) throw badImage('header.backing_file', `has more than ${CHAIN_MAX} images behind it`);
    const format = backingFormatOf(above.header);
    const file = openNamed(options, base, above.path, above.header.backingFile, {
      suffix: `${number}`,
      readOnly: true,
    });
    const channel = context.open(file.bdev);
    opened.channels.push(channel);
    if (format === 'raw') {
      layers.push({ image: null, channel, sizeBytes: file.bdev.blockCount * file.bdev.blockSizeBytes });
      return layers;
    }
    const image = yield* openImage(options, file, channel);
    const { header } = image;
    const data = hasExternalData(header)
      ? openData(options, base, file.path, header, { suffix: `${number}-data`, readOnly: true }).channel
      : channel;
    layers.push({ image, channel: data, sizeBytes: header.sizeBytes });
    above = { header, path: file.path };
  }
  return layers;
}

function* openImage(
  { context, opened, l2CacheBytes }: ChainOptions,
  file: NamedFile,
  channel: IoChannel,
): Task<Qcow2Image> {
  const header = yield* readHeader(new ChannelFile(file.bdev, channel, context.reactor));
  if (header.cryptMethod !== 0)
    throw unsupportedImage(
      'header.crypt_method',
      `of ${file.path} is set: its key is not known here`,
      'serve that image as a bdev with its own `key_file`, and name it in `backing`',
    );
  const image = new Qcow2Image(header, { reactor: context.reactor, base: file.bdev, channel, l2CacheBytes });
  opened.images.push(image);
  yield* image.load();
  return image;
}

function backingFormatOf({ backingFormat: format }: Qcow2Header): 'raw' | 'qcow2' {
  if (format === 'raw' || format === 'qcow2') return format;
  throw unsupportedImage(
    'header.backing_format',
    format === null ? 'is not given, and formats are never guessed' : `is ${format}`,
    'set it with `qemu-img rebase -u -F FORMAT`, or name the bdev in `backing`',
  );
}

/** The file directly below an image, which can be written to, and what lies below that. */
export interface WritableFile extends NamedFile {
  readonly channel: IoChannel;
  readonly lock: FileLock;
  /** Null: it is raw. */
  readonly image: Qcow2Image | null;
  readonly behind: readonly Layer[];
}

/** Opens what an image names as its backing file for writing; nothing is written yet. Throws BdevError. */
export function* openBackingFile(options: ChainOptions, base: Bdev, header: Qcow2Header): Task<WritableFile> {
  const { context, opened } = options;
  noteOwn(options, base);
  const format = backingFormatOf(header);
  const file = openNamed(options, base, pathOf(base), header.backingFile!, {
    suffix: '1',
    readOnly: false,
    hasOwnLock: true,
  });
  const channel = context.open(file.bdev);
  opened.channels.push(channel);
  const found = { ...file, channel, lock: opened.locks[0]! };
  if (format === 'raw') return { ...found, image: null, behind: [] };
  const image = yield* openImage(options, file, channel);
  if (hasExternalData(image.header)) {
    throw unsupportedImage(
      'header.data_file',
      `of ${file.path} names another file, which is not written to from above`,
      'serve that image as a bdev, and name it in `backing`',
    );
  }
  const behind = yield* openBehind(options, base, { header: image.header, path: file.path }, 2);
  return { ...found, image, behind };
}

/** The file that holds the data of an image, as its header names it. Throws BdevError. */
export function openData(
  options: ChainOptions,
  base: Bdev,
  imagePath: string,
  { dataFile }: Qcow2Header,
  access: Access,
): DataFile {
  if (dataFile === null) {
    throw unsupportedImage('header.data_file', 'is not given', 'name the bdev that holds the data in `data_file`');
  }
  const { bdev } = openNamed(options, base, imagePath, dataFile, access);
  const channel = options.context.open(bdev);
  options.opened.channels.push(channel);
  return { bdev, channel };
}

/** Path of the file of a bdev. Throws BdevError when it is none. */
export function pathOf(bdev: Bdev): string {
  const { path } = bdev.describe();
  if (typeof path === 'string') return realpathSync(path);
  throw new BdevError(
    'no-path',
    'base',
    `${bdev.name} is no file, so names in its image lead nowhere`,
    'name the bdevs in `backing` and `data_file`',
  );
}

function openNamed(
  { context, opened, name: owner, imageDir, seen }: ChainOptions,
  base: Bdev,
  imagePath: string,
  name: string,
  { suffix, readOnly, hasOwnLock = false }: Access,
): NamedFile {
  if (imageDir === null) {
    throw new BdevError(
      'not-allowed',
      'image_dir',
      `the image ${imagePath} names the file ${name}, and no folder is allowed`,
      'set `image_dir` to the folder that the files of the chain lie in, or name the bdevs in `backing` and `data_file`',
    );
  }
  if (/^[^/]*:/.test(name)) throw unsupportedImage('header.backing_file', `is ${name}, no local path`, 'name a file');
  const wanted = name.startsWith('/') ? name : join(dirname(imagePath), name);
  const beneath = relative(realOf(imageDir), join(realOf(dirname(wanted)), basename(wanted)));
  const folder = check(native.fileOpen(imageDir, O_RDONLY | O_DIRECTORY, 0), `open ${imageDir}`);
  const fd = native.fileOpenBeneath(folder, beneath, readOnly ? O_RDONLY : O_RDWR);
  native.fileClose(folder);
  if (fd < 0) {
    const reason =
      fd === -EXDEV ? `lies outside of ${imageDir}` : `cannot be opened: ${new SystemError(-fd, 'open').code}`;
    throw new BdevError(
      'backing-file',
      'image_dir',
      `${wanted}, named by ${imagePath}, ${reason}`,
      readOnly
        ? 'move it, or allow its folder'
        : 'allow writing to it; a disk with `isolate: true` opens no files, but takes a bdev named in `backing`',
    );
  }
  let lock: FileLock | null = null;
  try {
    const path = readlinkSync(`/proc/self/fd/${fd}`);
    const identity = identityOf(fd);
    if (seen.has(identity)) throw badImage('header.backing_file', `goes in a circle: ${path} is in the chain already`);
    seen.add(identity);
    if (hasOwnLock) {
      lock = new FileLock(fd, path);
      opened.locks.push(lock);
    }
    const config: FileConfig = {
      ...FILE_DEFAULTS,
      name: `${owner}/${suffix}`,
      path: `/proc/self/fd/${fd}`,
      readOnly,
      lock: !hasOwnLock,
      direct: base.describe()['direct'] === true,
    };
    const bdev = context.create(config);
    opened.bdevs.push(bdev);
    if (bdev.blockSizeBytes > base.blockSizeBytes) {
      throw new BdevError(
        'block-size',
        'base',
        `${path} has blocks of ${bdev.blockSizeBytes} bytes`,
        'set `direct: false`',
      );
    }
    return { bdev, path };
  } finally {
    if (lock === null) native.fileClose(fd);
  }
}

const FILE_DEFAULTS = {
  module: 'uring',
  create: null,
  blockSizeBytes: null,
  iopoll: false,
  fixedBuffers: false,
};

/** Throws BdevError. */
function realOf(folder: string): string {
  try {
    return realpathSync(folder);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new BdevError('backing-file', 'image_dir', `${folder} cannot be used: ${code}`, 'check the path');
  }
}

/** Of an open file, whatever it is called. */
function identityOf(fd: number): string {
  const { inode, deviceMajor, deviceMinor } = checkObject(native.fileStat(fd), 'stat a file of the chain');
  return `${deviceMajor}:${deviceMinor}:${inode}`;
}
