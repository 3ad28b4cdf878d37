/**
 * `strata img rebase` and `commit`: what is behind an image, without a change of what its disk holds.
 *
 * Invariant: what the image would show differently is in it, durably, before it names another backing file; what is committed is
 * in the backing file, durably, before the image is emptied.
 */
import { realpathSync, statSync } from 'node:fs';
import { createImage } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { changeBackingFile } from '../../bdev/qcow2/edit/header.js';
import { Compatible, CryptMethod, hasExtendedL2, hasExternalData } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import { allRanges, copyDisk } from './copy-disk.js';
import { DiskHost } from './disk-host.js';
import { mapDisk, wholeSectors } from './disk-map.js';
import { openForEdit, resizeCommand } from './edit.js';
import type { EditCommand } from './edit.js';
import { imageSpec } from './image-spec.js';
import type { ImageSpec } from './image-spec.js';
import { NodeFile, runTask } from './node-file.js';
import { closeChain, openBehind, openChain } from './open-chain.js';
import { closeImage, openImage, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { copyDifferences } from './rebase-copy.js';
import type { Below } from './rebase-copy.js';
import { ProgressLine, parseChoice, parseImageSize, print, usage } from './words.js';

export interface RebaseCommand extends EditCommand {
  readonly backing: string;
  readonly backingFormat?: string;
  readonly unsafe?: boolean;
  readonly progress?: boolean;
}

/** Throws BdevError. */
export function rebaseCommand(path: string, command: RebaseCommand): void {
  const name = command.backing === '' ? null : command.backing;
  const format = command.backingFormat ?? null;
  if (name !== null && format === null) {
    throw usage('backing_fmt', 'a backing file needs a format', 'name it with -F: raw or qcow2');
  }
  if (format !== null) parseChoice('backing_fmt', format, ['raw', 'qcow2']);
  if (command.unsafe !== true) takeOver(path, name, format, command);
  const image = openForEdit(path, command, ['qcow2']);
  try {
    runTask(changeBackingFile(image.file, name, format));
  } finally {
    closeImage(image);
  }
}

/** Copies to the image what it shows of its backing file and the new one has otherwise. */
function takeOver(path: string, name: string | null, format: string | null, command: RebaseCommand): void {
  // Only looked at: the disk opens the image itself, to write.
  closeImage(openForEdit(path, command, ['qcow2']));
  const spec: ImageSpec = { ...imageSpec(path, command.format ?? null, command), format: 'qcow2' };
  const top = openImage(spec, { mode: 'read', discardSession: true });
  const chains: OpenImage[][] = [];
  const progress = new ProgressLine(command.progress === true && command.quiet !== true);
  const host = new DiskHost();
  try {
    const before = openBehind(top);
    chains.push(before);
    const after = name === null ? [] : openChain({ path: resolveName(spec.path, name), format });
    chains.push(after);
    const own = realpathSync(spec.path);
    if (after.some(({ file }) => realpathSync(file.path) === own)) {
      throw usage('backing_file', `${spec.path} is behind '${name ?? ''}' itself`, 'choose another base');
    }
    const parts = [...wholeSectors(mapDisk([top]))].filter(({ kind }) => kind === 'unallocated');
    closeImage(top);
    copyDifferences(host, {
      // Over the new one: a zero that only the old one shows has to be written.
      target: host.openTarget(spec, after),
      path: spec.path,
      before: below(host, before),
      after: below(host, after),
      parts,
      clusterBytes: 2 ** top.header!.clusterBits,
      onProgress: (at) => progress.update(at / top.sizeBytes),
    });
    progress.end();
  } finally {
    host.close();
    closeChain(chains.flat());
  }
}

function below(host: DiskHost, chain: readonly OpenImage[]): Below | null {
  return chain.length === 0 ? null : { disk: host.openChain(chain), sizeBytes: chain[0]!.sizeBytes };
}

export interface CommitCommand extends EditCommand {
  readonly base?: string;
  /** `-r`: bytes per second. */
  readonly rateLimit?: string;
  /** `-d`: the image keeps what it has. */
  readonly keep?: boolean;
  readonly progress?: boolean;
}

/** Throws BdevError. */
export function commitCommand(path: string, command: CommitCommand): void {
  const image = openForEdit(path, command, ['qcow2']);
  const { header } = image;
  closeImage(image);
  const { spec } = image;
  const chain = openChain({ ...spec, format: 'qcow2' });
  const depth = baseOf(chain, spec.path, command.base);
  const isEmptied = command.base === undefined && command.keep !== true;
  try {
    if (isEmptied) assertEmptiable(header!);
  } catch (error) {
    closeChain(chain);
    throw error;
  }
  const above = chain.slice(0, depth);
  const base = chain[depth]!;
  const behind = chain.slice(depth + 1);
  // The disk opens it itself, and alone.
  base.file.close();
  try {
    if (base.sizeBytes < chain[0]!.sizeBytes) {
      resizeCommand(base.file.path, String(chain[0]!.sizeBytes), { format: base.format, quiet: true });
    }
    copyUp(above, base, behind, command);
  } finally {
    closeChain([...above, ...behind]);
    base.key?.masterKey.fill(0);
  }
  if (isEmptied) emptyImage(spec.path, header!);
  if (command.quiet !== true) print('Image committed.\n');
}

function baseOf(chain: readonly OpenImage[], path: string, base: string | undefined): number {
  if (chain.length < 2)
    throw usage('backing_file', 'Image does not have a backing file', 'there is nothing to commit to');
  if (base === undefined) return 1;
  const wanted =
    statSync(resolveName(path, base), { throwIfNoEntry: false }) ?? statSync(base, { throwIfNoEntry: false });
  const found = chain.findIndex(({ file }, i) => {
    const { ino, dev } = statSync(file.path);
    return i > 0 && ino === wanted?.ino && dev === wanted.dev;
  });
  if (found < 0)
    throw usage('-b', `Did not find '${base}' in the backing chain of '${path}'`, 'see info --backing-chain');
  return found;
}

function copyUp(
  above: readonly OpenImage[],
  base: OpenImage,
  behind: readonly OpenImage[],
  command: CommitCommand,
): void {
  const progress = new ProgressLine(command.progress === true && command.quiet !== true);
  const sizeBytes = above[0]!.sizeBytes;
  const bytesPerSecond = command.rateLimit === undefined ? null : parseImageSize(command.rateLimit, '-r');
  const host = new DiskHost();
  try {
    const source = host.filter(host.openChain(above), { bytesPerSecond, onLoss: null });
    const target = host.openTarget({ ...base.spec, format: base.format }, behind);
    const parts = [...wholeSectors(mapDisk(above))].map(({ start, lengthBytes, kind }) => ({
      start,
      lengthBytes,
      isZero: kind === 'unallocated' ? null : kind === 'zero',
    }));
    copyDisk(host, {
      source,
      target,
      sourcePath: above[0]!.file.path,
      targetPath: base.file.path,
      ranges: allRanges(parts),
      shiftBytes: 0,
      sparseBytes: 4096,
      unitBytes: 4096,
      isTargetZero: false,
      parallel: 8,
      onProgress: (at) => progress.update(at / sizeBytes),
    });
  } finally {
    host.close();
  }
  progress.end();
}

/** Throws BdevError for an image that has more than its disk, which would be lost. */
function assertEmptiable(header: Qcow2Header): void {
  const has = [
    ['snapshots', header.snapshotCount > 0],
    ['bitmaps', header.bitmaps !== null],
    ['an external data file', hasExternalData(header)],
    ['encryption', header.cryptMethod !== CryptMethod.none],
  ] as const;
  const more = has.find(([, isThere]) => isThere);
  if (more === undefined) return;
  throw usage('-d', `the image has ${more[0]}: it cannot be emptied`, 'commit with -d, which leaves it as it is');
}

/** Makes the image anew: everything that it held is in its backing file. */
function emptyImage(path: string, header: Qcow2Header): void {
  const options: CreateOptions = {
    sizeBytes: header.sizeBytes,
    version: header.version,
    clusterBits: header.clusterBits,
    refcountOrder: header.refcountOrder,
    lazyRefcounts: (header.compatible & Compatible.lazyRefcounts) !== 0n,
    extendedL2: hasExtendedL2(header),
    compressionType: header.compressionType,
    backingFile: header.backingFile,
    backingFormat: header.backingFormat,
    dataFile: null,
    dataFileRaw: false,
    preallocation: 'off',
  };
  const file = new NodeFile(path, { mode: 'create' });
  try {
    runTask(createImage(file, options));
  } finally {
    file.close();
  }
}
