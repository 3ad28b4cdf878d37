/**
 * Opening what an image names: the file that it is backed by, and the one that holds its data. Names in images are those of strangers:
 * they are local paths, opened only beneath a folder that the operator has allowed, and formats are taken from the image, never guessed.
 */
import { readlinkSync, realpathSync } from 'node:fs';
import { basename, dirname, join, relative } from 'node:path';
import { O_DIRECTORY, O_RDONLY, O_RDWR, SystemError, check, checkObject, native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevConfig, BdevContext, IoChannel } from '../bdev.js';
import { ChannelFile } from './channel-file.js';
import type { Layer } from './engine.js';
import { hasExternalData } from './format.js';
import type { Qcow2Header } from './format.js';
import { badImage, unsupportedImage } from './image-error.js';
import { Qcow2Image, readHeader } from './image.js';
import type { Task } from './task.js';

/** Images one behind the other: as many as any tool makes, and a bound for those that go in a circle. */
export const CHAIN_MAX = 256;
const EXDEV = 18;

/** What a config may say of files that the uring module opens; the rest is as its schema has it. */
interface FileConfig extends BdevConfig {
  readonly path: string;
  readonly readOnly: boolean;
  readonly direct: boolean;
}

/** Everything that was opened on the way, to be closed again. */
export class Opened {
  readonly bdevs: Bdev[] = [];
  readonly channels: IoChannel[] = [];
  readonly images: Qcow2Image[] = [];

  close(): void {
    for (const image of this.images) image.release();
    for (const channel of this.channels) channel.close();
    for (const bdev of this.bdevs) bdev.destroy();
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
interface NamedFile {
  readonly bdev: Bdev;
  readonly path: string;
}

/** The images below one, as it and they name them. Throws BdevError. */
export function* openBacking(options: ChainOptions, base: Bdev, top: Qcow2Header): Task<Layer[]> {
  const { context, opened, seen } = options;
  const layers: Layer[] = [];
  let above = { header: top, path: pathOf(base) };
  const fd = check(native.fileOpen(above.path, O_RDONLY, 0), `open ${above.path}`);
  seen.add(identityOf(fd));
  native.fileClose(fd);
  while (above.header.backingFile !== null) {
    if (layers.length === CHAIN_MAX)
      throw badImage('header.backing_file', `has more than ${CHAIN_MAX} images behind it`);
    const format = above.header.backingFormat;
    if (format !== 'raw' && format !== 'qcow2') {
      throw unsupportedImage(
        'header.backing_format',
        format === null ? 'is not given, and formats are never guessed' : `is ${format}`,
        'set it with `qemu-img rebase -u -F FORMAT`, or name the bdev in `backing`',
      );
    }
    const file = openNamed(options, base, above.path, above.header.backingFile, `${layers.length + 1}`, true);
    const channel = context.open(file.bdev);
    opened.channels.push(channel);
    if (format === 'raw') {
      layers.push({ image: null, channel, sizeBytes: file.bdev.blockCount * file.bdev.blockSizeBytes });
      return layers;
    }
    const header = yield* readHeader(new ChannelFile(file.bdev, channel, context.reactor));
    if (header.cryptMethod !== 0)
      throw unsupportedImage(
        'header.crypt_method',
        `of ${file.path} is set: its key is not known here`,
        'serve that image as a bdev with its own `key_file`, and name it in `backing`',
      );
    const { l2CacheBytes } = options;
    const image = new Qcow2Image(header, { reactor: context.reactor, base: file.bdev, channel, l2CacheBytes });
    opened.images.push(image);
    yield* image.load();
    const data = hasExternalData(header)
      ? openData(options, base, file.path, header, `${layers.length + 1}-data`, true).channel
      : channel;
    layers.push({ image, channel: data, sizeBytes: header.sizeBytes });
    above = { header, path: file.path };
  }
  return layers;
}

/** The file that holds the data of an image, as its header names it. Throws BdevError. */
export function openData(
  options: ChainOptions,
  base: Bdev,
  imagePath: string,
  { dataFile }: Qcow2Header,
  suffix: string,
  readOnly: boolean,
): DataFile {
  if (dataFile === null) {
    throw unsupportedImage('header.data_file', 'is not given', 'name the bdev that holds the data in `data_file`');
  }
  const { bdev } = openNamed(options, base, imagePath, dataFile, suffix, readOnly);
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
  suffix: string,
  readOnly: boolean,
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
      'move it, or allow its folder',
    );
  }
  try {
    const path = readlinkSync(`/proc/self/fd/${fd}`);
    const identity = identityOf(fd);
    if (seen.has(identity)) throw badImage('header.backing_file', `goes in a circle: ${path} is in the chain already`);
    seen.add(identity);
    const config: FileConfig = {
      ...FILE_DEFAULTS,
      name: `${owner}/${suffix}`,
      path: `/proc/self/fd/${fd}`,
      readOnly,
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
    native.fileClose(fd);
  }
}

const FILE_DEFAULTS = {
  module: 'uring',
  create: null,
  blockSizeBytes: null,
  iopoll: false,
  fixedBuffers: false,
  lock: true,
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
