/** `strata img snapshot`, `resize` and `bitmap`: changes of what an image says of itself, each of them whole or not at all. */
import { BdevError } from '../../bdev/bdev.js';
import { preallocateSpace } from '../../bdev/qcow2/create.js';
import { hasExternalData } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import {
  addBitmap,
  clearBitmap,
  enableBitmap,
  loadBitmap,
  mergeBitmaps,
  removeBitmap,
  storeBitmaps,
} from '../../bdev/qcow2/edit/bitmaps.js';
import { resizeImage } from '../../bdev/qcow2/edit/resize.js';
import type { BackingContent } from '../../bdev/qcow2/edit/resize.js';
import { applySnapshot, createSnapshot, deleteSnapshot } from '../../bdev/qcow2/edit/snapshots.js';
import { DiskHost, DiskRequest } from './disk-host.js';
import { parsePreallocation, roundUp } from './image-options.js';
import { imageSpec } from './image-spec.js';
import type { SpecOptions } from './image-spec.js';
import { snapshotInfos, snapshotText } from './info.js';
import { NodeFile, runTask } from './node-file.js';
import { closeChain, openBacking } from './open-chain.js';
import { closeImage, openImage, readSnapshots, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { parseImageSize, print, printJson, usage } from './words.js';

export interface EditCommand extends SpecOptions {
  readonly format?: string;
  readonly quiet?: boolean;
  readonly discardSession?: boolean;
}

export interface SnapshotCommand extends EditCommand {
  readonly list?: boolean;
  readonly apply?: string;
  readonly create?: string;
  readonly delete?: string;
  readonly output: 'human' | 'json';
}

/** @param wallMs what time it is. Throws BdevError. */
export function snapshotCommand(path: string, command: SnapshotCommand, wallMs: number): void {
  const { apply, create } = command;
  const given = [apply, create, command.delete].filter((name) => name !== undefined);
  if (given.length > 1 || (given.length > 0 && command.list === true)) {
    throw usage('snapshot', "Cannot mix '-l', '-a', '-c', '-d'", 'give one of them');
  }
  if (given.length === 0) {
    listSnapshots(path, command);
    return;
  }
  withImage(path, command, ({ file }) => {
    const seconds = Math.floor(wallMs / 1000);
    if (create !== undefined)
      runTask(createSnapshot(file, { name: create, seconds, nanoseconds: (wallMs % 1000) * 1e6 }));
    else if (apply !== undefined) runTask(applySnapshot(file, apply));
    else runTask(deleteSnapshot(file, command.delete!));
  });
}

function listSnapshots(path: string, command: SnapshotCommand): void {
  const image = openImage(imageSpec(path, command.format ?? null, command), { mode: 'read' });
  try {
    const infos = snapshotInfos(image.header === null ? [] : runTask(readSnapshots(image.file, image.header)));
    if (command.output === 'json') printJson(infos);
    else if (infos.length > 0) print(snapshotText(infos));
  } finally {
    closeImage(image);
  }
}

export interface ResizeCommand extends EditCommand {
  readonly shrink?: boolean;
  readonly preallocation?: string;
}

/** @param size as `20G`, or `+10G`, `-10G`. Throws BdevError. */
export function resizeCommand(path: string, size: string, command: ResizeCommand): void {
  const preallocation = parsePreallocation(command.preallocation ?? 'off');
  const image = openForEdit(path, command, ['raw', 'qcow2']);
  const { file, header } = image;
  try {
    const amount = parseImageSize(size.replace(/^[+-]/, ''));
    const relative = size.startsWith('+') ? amount : size.startsWith('-') ? -amount : null;
    const sizeBytes = roundUp(relative === null ? amount : image.sizeBytes + relative);
    if (sizeBytes < image.sizeBytes && command.shrink !== true) {
      const message = "Shrinking an image will delete all data beyond the shrunken image's end";
      throw usage('size', message, 'use --shrink if that is what you want');
    }
    if (header === null) resizeRaw(file, sizeBytes, preallocation);
    else resizeQcow2(image, header, sizeBytes, { preallocation, mayShrink: command.shrink === true });
  } finally {
    file.close();
  }
  if (command.quiet !== true) print('Image resized.\n');
}

function resizeRaw(file: NodeFile, sizeBytes: number, preallocation: ReturnType<typeof parsePreallocation>): void {
  const before = file.sizeBytes;
  if (file.isDevice) throw usage('filename', `${file.path} is a device`, 'make the device itself larger');
  file.truncate(sizeBytes);
  if (sizeBytes > before) runTask(preallocateSpace(file, before, sizeBytes - before, preallocation));
  runTask(file.sync());
}

/** Throws BdevError. */
export function resizeQcow2(
  image: OpenImage,
  header: Qcow2Header,
  sizeBytes: number,
  options: { preallocation: ReturnType<typeof parsePreallocation>; mayShrink: boolean },
): void {
  const { file } = image;
  const dataFile =
    hasExternalData(header) && header.dataFile !== null
      ? new NodeFile(resolveName(file.path, header.dataFile), { mode: 'write' })
      : null;
  try {
    withBackingContent(image, header, (backing) => {
      runTask(resizeImage(file, sizeBytes, { ...options, backing, dataFile }));
    });
    if (dataFile !== null && sizeBytes < dataFile.sizeBytes) dataFile.truncate(sizeBytes);
  } finally {
    dataFile?.close();
  }
}

/** Calls with what the backing files hold, which new parts of the disk must not show. */
function withBackingContent(
  image: OpenImage,
  header: Qcow2Header,
  use: (backing: BackingContent | null) => void,
): void {
  if (header.backingFile === null) {
    use(null);
    return;
  }
  const chain = openBacking(image);
  const host = new DiskHost();
  try {
    const disk = host.openChain(chain);
    const request = new DiskRequest(host, chain[0]!.file.path);
    const { sizeBytes } = chain[0]!;
    use({
      sizeBytes,
      *read(offset, bytes) {
        const end = Math.min(sizeBytes, offset + bytes.length);
        bytes.fill(0);
        if (end > offset) request.readBytes(disk, offset, bytes.subarray(0, end - offset));
      },
    });
    request.release();
  } finally {
    host.close();
    closeChain(chain);
  }
}

/** One step of `bitmap`, in the order of the command line. */
export interface BitmapAction {
  readonly what: 'add' | 'remove' | 'clear' | 'enable' | 'disable' | 'merge';
  /** Of `merge`: the other bitmap. */
  readonly source?: string;
}

export interface BitmapCommand extends EditCommand {
  readonly granularity?: string;
  readonly sourceFile?: string;
  readonly sourceFormat?: string;
}

/** Throws BdevError. */
export function bitmapCommand(
  path: string,
  name: string,
  actions: readonly BitmapAction[],
  command: BitmapCommand,
): void {
  if (actions.length === 0) {
    throw usage('bitmap', 'Need at least one of --add, --remove, --clear, --enable, --disable, or --merge', 'as --add');
  }
  const isAdded = actions.some(({ what }) => what === 'add');
  if (command.granularity !== undefined && !isAdded)
    throw usage('-g', 'granularity only supported with --add', 'leave it out');
  const isMerged = actions.some(({ what }) => what === 'merge');
  if (command.sourceFile !== undefined && !isMerged)
    throw usage('-b', '-b only supported with --merge', 'leave it out');
  const granularity = command.granularity === undefined ? null : parseImageSize(command.granularity, '-g');
  if (granularity !== null && !Number.isInteger(Math.log2(granularity))) {
    throw usage('-g', `granularity is ${granularity}`, 'choose a power of two from 512 to 2G');
  }
  withImage(path, command, ({ file }) => {
    for (const { what, source } of actions) {
      switch (what) {
        case 'add':
          runTask(
            addBitmap(file, { name, ...(granularity === null ? {} : { granularityBits: Math.log2(granularity) }) }),
          );
          break;
        case 'remove':
          runTask(removeBitmap(file, name));
          break;
        case 'clear':
          runTask(clearBitmap(file, name));
          break;
        case 'enable':
        case 'disable':
          runTask(enableBitmap(file, name, what === 'enable'));
          break;
        case 'merge':
          if (command.sourceFile === undefined) runTask(mergeBitmaps(file, name, [source!]));
          else mergeFromFile(file, name, source!, command.sourceFile, command.sourceFormat ?? null);
          break;
      }
    }
  });
}

function mergeFromFile(file: NodeFile, name: string, source: string, path: string, format: string | null): void {
  const other = openImage({ path, format }, { mode: 'read' });
  try {
    if (other.header === null) throw usage('-b', `${path} is raw: it has no bitmaps`, 'name a qcow2 image');
    const bits = runTask(loadBitmap(file, name));
    bits.merge(runTask(loadBitmap(other.file, source)));
    runTask(storeBitmaps(file, new Map([[name, bits]])));
  } finally {
    other.file.close();
  }
}

function withImage(path: string, command: EditCommand, change: (image: OpenImage) => void): void {
  const image = openForEdit(path, command, ['qcow2']);
  try {
    change(image);
  } finally {
    closeImage(image);
  }
}

/** Opens an image to change it. Throws BdevError. */
export function openForEdit(path: string, command: EditCommand, formats: readonly string[]): OpenImage {
  const image = openImage(imageSpec(path, command.format ?? null, { ...command, forceShare: false }), {
    mode: 'write',
    discardSession: command.discardSession === true,
  });
  if (formats.includes(image.format)) return image;
  closeImage(image);
  throw new BdevError(
    'usage',
    'format',
    `${image.file.path} is a ${image.format} image, which has no such thing`,
    'use qcow2',
  );
}
