/**
 * `strata img info`: what an image says of itself, with qemu-img's words and JSON.
 *
 * Invariant: no file is opened but the one that was named; with `--backing-chain` those that it names, which have to be local and
 * beneath its own folder, or the folder that the operator allows.
 */
import { realpathSync } from 'node:fs';
import { dirname, sep } from 'node:path';
import { BdevError } from '../../bdev/bdev.js';
import { Autoclear, Compatible, CompressionType, CryptMethod, Incompatible } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import { BitmapFlag } from '../../bdev/qcow2/tables.js';
import type { Bitmap, Snapshot } from '../../bdev/qcow2/tables.js';
import { readLuksHeader } from '../../bdev/qcow2/luks.js';
import { luksInfo } from './encryption.js';
import { configuredName, readBdevs } from './disk-source.js';
import type { SourceOptions } from './disk-source.js';
import { imageSpec } from './image-spec.js';
import type { ImageSpec } from './image-spec.js';
import { runTask } from './node-file.js';
import type { NodeFile } from './node-file.js';
import { closeImage, openImage, readBitmaps, readSnapshots, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { humanSize, print, printJson, usage } from './words.js';

export interface InfoCommand extends SourceOptions {
  readonly format?: string;
  readonly output: 'human' | 'json';
  readonly backingChain?: boolean;
  readonly backingFolder?: string;
}

/** As QEMU bounds nothing: no chain that anybody made is this long, and one that leads back into itself is. */
const CHAIN_MAX = 200;

/** One image in qemu-img's JSON. */
export interface ImageInfo {
  readonly filename: string;
  readonly format: string;
  readonly 'virtual-size': number;
  readonly 'actual-size': number;
  readonly 'dirty-flag': boolean;
  readonly [field: string]: unknown;
}

/** Rejects with BdevError. */
export async function infoCommand(name: string, command: InfoCommand): Promise<void> {
  const bdev = configuredName(name, command);
  if (bdev !== null) {
    await bdevInfo(bdev, command);
    return;
  }
  const infos: ImageInfo[] = [];
  const seen = new Set<string>();
  const { forceShare = false } = command;
  const first = imageSpec(name, command.format ?? null, command);
  const folder = realpathSync(command.backingFolder ?? dirname(first.path));
  for (let next: ImageSpec | null = first; next !== null;) {
    // What was said on the command line is allowed; what an image says may not be.
    if (infos.length > 0) checkAllowed(next.path, folder, seen);
    const { info, backing } = readInfo(next);
    infos.push(info);
    seen.add(realpathSync(next.path));
    if (command.backingChain !== true || next.backing === null) break;
    if (next.backing !== undefined) next = next.backing;
    else if (backing === null) break;
    else next = { path: resolveName(next.path, backing.name), format: backing.format, forceShare };
  }
  if (command.output === 'json') printJson(command.backingChain === true ? infos : infos[0]);
  else print(infos.map(asText).join('\n'));
}

/** A disk of the daemon's config: what its module says of it. */
async function bdevInfo(name: string, command: InfoCommand): Promise<void> {
  const { DiskHost } = await import('./disk-host.js');
  const host = new DiskHost();
  try {
    const { bdev } = host.openConfigured(await readBdevs(command.config!), name, false);
    const sizeBytes = bdev.blockCount * bdev.blockSizeBytes;
    const info = { name, module: bdev.moduleName, 'virtual-size': sizeBytes, 'block-size': bdev.blockSizeBytes };
    if (command.output === 'json') printJson({ ...info, specific: bdev.describe() });
    else {
      print(`bdev: ${name}\nmodule: ${bdev.moduleName}\nvirtual size: ${humanSize(sizeBytes)} (${sizeBytes} bytes)\n`);
      print(`block size: ${bdev.blockSizeBytes}\n${dump(bdev.describe(), 0).join('\n')}\n`);
    }
  } finally {
    host.close();
  }
}

/** Throws BdevError for a backing file that may not be opened. */
function checkAllowed(path: string, folder: string, seen: ReadonlySet<string>): void {
  let real: string;
  try {
    real = realpathSync(path);
  } catch {
    throw new BdevError('open-failed', 'backing_file', `Could not open '${path}'`, 'check the path');
  }
  if (real !== folder && !real.startsWith(folder.endsWith(sep) ? folder : folder + sep)) {
    const hint = 'allow its folder with --backing-folder, if you know where the image comes from';
    throw usage('backing_file', `'${path}' is not beneath ${folder}: it is not opened`, hint);
  }
  if (seen.has(real) || seen.size >= CHAIN_MAX) {
    throw usage('backing_file', `the backing chain leads back to '${path}'`, 'give one of the images another base');
  }
}

function readInfo(spec: ImageSpec): { info: ImageInfo; backing: { name: string; format: string | null } | null } {
  const { path } = spec;
  const image = openImage(spec, { mode: 'read' });
  try {
    const { header } = image;
    const shared = {
      filename: path,
      format: image.format,
      'virtual-size': image.sizeBytes,
      'actual-size': image.file.allocatedBytes,
      // QEMU has no such field: it always guesses when it is not told.
      ...(image.isGuessed ? { 'format-guessed': true } : {}),
    };
    if (header === null) return { info: { ...shared, 'dirty-flag': false }, backing: null };
    const { backingFile, backingFormat } = header;
    const info = { ...shared, ...qcow2Info(image, header, path) };
    return { info, backing: backingFile === null ? null : { name: backingFile, format: backingFormat } };
  } finally {
    closeImage(image);
  }
}

function qcow2Info(image: OpenImage, header: Qcow2Header, path: string) {
  const snapshots = runTask(readSnapshots(image.file, header));
  const bitmaps = runTask(readBitmaps(image.file, header));
  const { backingFile, backingFormat } = header;
  return {
    'dirty-flag': (header.incompatible & Incompatible.dirty) !== 0n,
    'cluster-size': 2 ** header.clusterBits,
    ...(header.cryptMethod === CryptMethod.none ? {} : { encrypted: true }),
    ...(backingFile === null
      ? {}
      : { 'backing-filename': backingFile, 'full-backing-filename': fullName(path, backingFile) }),
    ...(backingFile === null || backingFormat === null ? {} : { 'backing-filename-format': backingFormat }),
    ...(snapshots.length === 0 ? {} : { snapshots: snapshots.map(snapshotInfo) }),
    'format-specific': { type: 'qcow2', data: specificInfo(header, bitmaps, encryptInfo(image.file, header)) },
  };
}

/** A name is shown also when it is no local one. */
function fullName(path: string, name: string): string {
  try {
    return resolveName(path, name);
  } catch {
    return name;
  }
}

function specificInfo(header: Qcow2Header, bitmaps: readonly Bitmap[], encryption: Record<string, unknown>) {
  const has = (bit: bigint): boolean => (header.incompatible & bit) !== 0n;
  if (header.version === 2) {
    return { compat: '0.10', 'compression-type': 'zlib', 'refcount-bits': 16, ...encryption };
  }
  return {
    compat: '1.1',
    'compression-type': header.compressionType === CompressionType.zstd ? 'zstd' : 'zlib',
    'lazy-refcounts': (header.compatible & Compatible.lazyRefcounts) !== 0n,
    ...(bitmaps.length === 0 ? {} : { bitmaps: bitmaps.map(bitmapInfo) }),
    'refcount-bits': 2 ** header.refcountOrder,
    ...encryption,
    ...(header.dataFile === null ? {} : { 'data-file': header.dataFile }),
    ...(has(Incompatible.externalDataFile)
      ? { 'data-file-raw': (header.autoclear & Autoclear.rawExternalData) !== 0n }
      : {}),
    corrupt: has(Incompatible.corrupt),
    'extended-l2': has(Incompatible.extendedL2),
  };
}

function encryptInfo(file: NodeFile, { cryptMethod, luksHeader }: Qcow2Header): Record<string, unknown> {
  if (cryptMethod === CryptMethod.none) return {};
  return { encrypt: luksHeader === null ? { format: 'aes' } : luksInfo(runTask(readLuksHeader(file, luksHeader))) };
}

function bitmapInfo({ name, granularityBits, flags }: Bitmap) {
  const words = [
    ...((flags & BitmapFlag.inUse) === 0 ? [] : ['in-use']),
    ...((flags & BitmapFlag.auto) === 0 ? [] : ['auto']),
  ];
  return { flags: words, name, granularity: 2 ** granularityBits };
}

function snapshotInfo(snapshot: Snapshot) {
  const { id, name, seconds, nanoseconds, guestClock, vmStateBytes, icount } = snapshot;
  return {
    // All ones: the guest's instructions were not counted.
    ...(icount === 0xffffffffffffffffn ? {} : { icount: Number(icount) }),
    'vm-clock-nsec': Number(guestClock % 1_000_000_000n),
    name,
    'date-sec': seconds,
    'date-nsec': nanoseconds,
    'vm-clock-sec': Number(guestClock / 1_000_000_000n),
    id,
    'vm-state-size': vmStateBytes,
  };
}

type SnapshotInfo = ReturnType<typeof snapshotInfo>;

function asText(info: ImageInfo): string {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}${info['format-guessed'] === true ? ' (guessed from its first bytes)' : ''}`,
    `virtual size: ${humanSize(info['virtual-size'])} (${info['virtual-size']} bytes)`,
    `disk size: ${humanSize(info['actual-size'])}`,
  ];
  if (info['encrypted'] === true) lines.push('encrypted: yes');
  if (info['cluster-size'] !== undefined) lines.push(`cluster_size: ${info['cluster-size'] as number}`);
  if (info['dirty-flag']) lines.push('cleanly shut down: no');
  const backing = info['backing-filename'] as string | undefined;
  if (backing !== undefined) {
    const full = info['full-backing-filename'] as string;
    lines.push(`backing file: ${backing}${full === backing ? '' : ` (actual path: ${full})`}`);
    const format = info['backing-filename-format'] as string | undefined;
    if (format !== undefined) lines.push(`backing file format: ${format}`);
  }
  if (info['snapshots'] !== undefined) lines.push(snapshotText(info['snapshots'] as SnapshotInfo[]).trimEnd());
  const specific = info['format-specific'] as { data: Record<string, unknown> } | undefined;
  if (specific !== undefined) lines.push('Format specific information:', ...dump(specific.data, 1));
  return `${lines.join('\n')}\n`;
}

/** A table of snapshots, as `snapshot -l` prints it too. */
export function snapshotText(snapshots: readonly SnapshotInfo[]): string {
  const row = (...[id, tag, size, date, clock, count]: string[]): string =>
    `${id!.padEnd(9)} ${tag!.padEnd(16)} ${size!.padStart(8)}${date!.padStart(20)}${clock!.padStart(13)}${count!.padStart(11)}`;
  const rows = snapshots.map((one) => {
    const icount = 'icount' in one ? String(one.icount) : '';
    const size = humanSize(one['vm-state-size']);
    return row(one.id, one.name, size, localTime(one['date-sec']), clockText(one), icount);
  });
  return `Snapshot list:\n${[row('ID', 'TAG', 'VM SIZE', 'DATE', 'VM CLOCK', 'ICOUNT'), ...rows].join('\n')}\n`;
}

/** The snapshots of an image for `snapshotText`. */
export function snapshotInfos(snapshots: readonly Snapshot[]): SnapshotInfo[] {
  return snapshots.map(snapshotInfo);
}

function localTime(seconds: number): string {
  const date = new Date(seconds * 1000);
  const two = (value: number): string => String(value).padStart(2, '0');
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

function clockText(one: SnapshotInfo): string {
  const two = (value: number): string => String(value).padStart(2, '0');
  const seconds = one['vm-clock-sec'];
  const ms = String(Math.floor(one['vm-clock-nsec'] / 1e6)).padStart(3, '0');
  return `${two(Math.floor(seconds / 3600))}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}.${ms}`;
}

/** Fields with spaces for dashes, deeper ones further in. */
function dump(value: unknown, depth: number): string[] {
  const indent = '    '.repeat(depth);
  const entries: [string, unknown][] = Array.isArray(value)
    ? value.map((item, i) => [`[${i}]`, item as unknown])
    : Object.entries(value as object).map(([key, item]) => [key.replaceAll('-', ' '), item as unknown]);
  return entries.flatMap(([key, item]) =>
    typeof item === 'object' && item !== null
      ? [`${indent}${key}:`, ...dump(item, depth + 1)]
      : [`${indent}${key}: ${String(item as string | number | boolean)}`],
  );
}
