/** What a command reads from or writes to: an image with all that is behind it, or a bdev of the daemon's config. */
import { existsSync } from 'node:fs';
import type { OpenBdev } from '../../bdev/bdev.js';
import { BdevError } from '../../bdev/bdev.js';
import type { AnyBdevConfig } from '../config/config.js';
import type { DiskHost } from './disk-host.js';
import { mapDisk } from './disk-map.js';
import type { DiskExtent, MapRange } from './disk-map.js';
import { imageSpec } from './image-spec.js';
import type { ImageSpec, SpecOptions } from './image-spec.js';
import { closeChain, openChain } from './open-chain.js';
import type { OpenImage } from './open-image.js';
import { usage } from './words.js';

const PREFIX = 'bdev:';

export interface DiskSource {
  /** For messages. */
  readonly path: string;
  readonly sizeBytes: number;
  /** The images; none of a bdev. */
  readonly chain: readonly OpenImage[];
  /** In order. What is not known of a bdev counts as data. */
  extents(range?: MapRange): Iterable<DiskExtent>;
  /** Of the image itself, without what is behind it: that is unallocated. */
  ownExtents(range?: MapRange): Iterable<DiskExtent>;
  /** To read. Throws BdevError. */
  open(): OpenBdev;
  close(): void;
}

export interface SourceOptions extends SpecOptions {
  /** The daemon's config, for names like `bdev:disk0`. */
  readonly config?: string;
}

/** The name of a bdev of the config, or null for what names an image. Throws BdevError. */
export function configuredName(text: string, options: SourceOptions): string | null {
  if (options.imageOpts === true || !text.startsWith(PREFIX)) return null;
  if (options.config !== undefined) return text.slice(PREFIX.length);
  if (existsSync(text)) return null;
  throw usage('--config', `${text} is a bdev of a config`, 'name the config with --config FILE');
}

/** Opens what is to be read; the caller closes it before the host. Rejects with BdevError. */
export async function openSource(
  host: DiskHost,
  text: string,
  format: string | null,
  options: SourceOptions,
): Promise<DiskSource> {
  const name = configuredName(text, options);
  if (name === null) return imageSource(host, imageSpec(text, format, options));
  if (format !== null) throw usage('-f', `${text} has no format`, 'leave -f out');
  const disk = host.openConfigured(await readBdevs(options.config!), name, false);
  return new BdevSource(text, disk);
}

/** Throws BdevError. */
export function imageSource(host: DiskHost, spec: ImageSpec): DiskSource {
  return new ImageSource(host, openChain(spec));
}

/** The bdevs of a config. Rejects with BdevError. */
export async function readBdevs(file: string): Promise<readonly AnyBdevConfig[]> {
  const { loadConfig } = await import('../config/load.js');
  const { ConfigError } = await import('../config/problem.js');
  try {
    return loadConfig(file).config.bdevs;
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    throw new BdevError('bad-config', '--config', error.message, `see \`strata check-config ${file}\``);
  }
}

class ImageSource implements DiskSource {
  readonly path: string;
  readonly sizeBytes: number;
  readonly chain: readonly OpenImage[];
  readonly #host: DiskHost;

  constructor(host: DiskHost, chain: readonly OpenImage[]) {
    this.#host = host;
    this.chain = chain;
    this.path = chain[0]!.file.path;
    this.sizeBytes = chain[0]!.sizeBytes;
  }

  extents(range: MapRange = {}): Iterable<DiskExtent> {
    return mapDisk(this.chain, range);
  }

  ownExtents(range: MapRange = {}): Iterable<DiskExtent> {
    return mapDisk(this.chain.slice(0, 1), range);
  }

  open(): OpenBdev {
    return this.#host.openChain(this.chain);
  }

  close(): void {
    closeChain(this.chain);
  }
}

class BdevSource implements DiskSource {
  readonly path: string;
  readonly sizeBytes: number;
  readonly chain = [];
  readonly #disk: OpenBdev;

  constructor(path: string, disk: OpenBdev) {
    this.path = path;
    this.#disk = disk;
    this.sizeBytes = disk.bdev.blockCount * disk.bdev.blockSizeBytes;
  }

  *extents({ start = 0, lengthBytes = Infinity }: MapRange = {}): Iterable<DiskExtent> {
    const length = Math.min(this.sizeBytes - start, lengthBytes);
    if (length > 0) yield { start, lengthBytes: length, kind: 'data', depth: 0, hostOffset: null };
  }

  ownExtents(range?: MapRange): Iterable<DiskExtent> {
    return this.extents(range);
  }

  open(): OpenBdev {
    return this.#disk;
  }

  close(): void {
    // The host's.
  }
}
