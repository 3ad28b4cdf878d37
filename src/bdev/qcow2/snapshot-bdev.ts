/**
 * A snapshot of an image as a disk that is only read: of an image whose file nobody writes to, or of one that another bdev serves, which
 * goes on meanwhile and keeps the snapshot.
 */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevContext, BdevLimits, IoChannel } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';
import { unsupportedImage } from './image-error.js';
import { describeSnapshot } from './operations.js';
import type { Qcow2Config } from './qcow2.js';
import type { ReaderMemory, SnapshotReader } from './snapshot-reader.js';
import { completeTask } from '../task.js';
import type { Task } from '../task.js';

/** A bdev that serves an image with snapshots. */
export interface SnapshotSource extends Bdev {
  /** Reads a snapshot, which is not deleted before `release`. Throws BdevError. */
  openSnapshot(idOrName: string, memory: ReaderMemory): Task<KeptSnapshot>;
}

export interface KeptSnapshot {
  readonly reader: SnapshotReader;
  /** The reader is closed. */
  readonly release: () => void;
}

/** The bdev that serves the image whose snapshot is wanted; null: `base` holds its file. Throws BdevError. */
export function servedSource({ base, snapshot = null }: Qcow2Config, context: BdevContext): SnapshotSource | null {
  if (snapshot === null) return null;
  const bdev = context.find(base, 'base');
  return 'openSnapshot' in bdev ? (bdev as SnapshotSource) : null;
}

/** @param open opens the image that nobody serves. Throws BdevError */
export function newSnapshotBdev(
  config: Qcow2Config,
  context: BdevContext,
  open: (config: Qcow2Config) => SnapshotSource,
): Bdev {
  const served = servedSource(config, context);
  if (served !== null) return new SnapshotBdev(config, context.reactor, served, [served]);
  const image = open({ ...config, name: `${config.name}/image`, snapshot: null, readOnly: true });
  try {
    return new SnapshotBdev(config, context.reactor, image, image.bases, image);
  } catch (error) {
    image.destroy();
    throw error;
  }
}

class SnapshotBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'qcow2';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly readOnly = true;
  readonly supportsFua = false;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[];
  readonly readBases: readonly Bdev[];
  readonly #config: Qcow2Config;
  readonly #reactor: Reactor;
  readonly #kept: KeptSnapshot;
  /** The image, when it is nobody else's. */
  readonly #own: Bdev | null;

  constructor(
    config: Qcow2Config,
    reactor: Reactor,
    source: SnapshotSource,
    bases: readonly Bdev[],
    own: Bdev | null = null,
  ) {
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.#config = config;
    this.#reactor = reactor;
    this.#own = own;
    this.blockSizeBytes = source.blockSizeBytes;
    this.limits = source.limits;
    this.bases = bases;
    this.readBases = own === null ? [] : bases;
    this.#kept = completeTask(source.openSnapshot(config.snapshot!, config), () => reactor.step());
    const { sizeBytes } = this.#kept.reader.snapshot;
    if (sizeBytes % this.blockSizeBytes !== 0) {
      this.#close();
      throw unsupportedImage(
        'snapshot.size',
        `is ${sizeBytes}, no multiple of ${this.blockSizeBytes}`,
        'set `direct: false` on the bdev below',
      );
    }
    this.size = new BdevSize(this.blockSizeBytes, {
      sizeBytes: () => sizeBytes,
      resize: () => {
        throw new BdevError('read-only', 'name', `${config.name} is a snapshot`, 'resize the disk that it is of');
      },
    });
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type === IoType.read || type === IoType.flush;
  }

  openChannel(_reactor: Reactor): IoChannel {
    const { engine } = this.#kept.reader;
    // The engine is the bdev's: other channels may use it.
    return { submit: (io) => engine.submit(io), close: () => undefined };
  }

  describe(): Record<string, unknown> {
    const { snapshot, engine } = this.#kept.reader;
    return {
      base: this.#config.base,
      snapshot: describeSnapshot(snapshot),
      clusterBytes: engine.top.geometry.clusterBytes,
    };
  }

  destroy(): void {
    this.#close();
    this.#own?.destroy();
  }

  #close(): void {
    completeTask(this.#kept.reader.close(), () => this.#reactor.step());
    this.#kept.release();
  }
}
