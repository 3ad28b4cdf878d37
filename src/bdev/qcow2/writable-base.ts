/**
 * What an overlay stands on, open for writing, so that the overlay can be committed to it: a raw file, an image, or a bdev that the config
 * names. Whoever reads through the overlay meanwhile reads what was written: there is one way to the base, for both.
 *
 * Invariants
 * - Nothing is written before `begin`, which makes sure that nobody else relies on what the base holds.
 * - After `end` it is whole and only read, as it was before `begin`.
 */
import { SystemError } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { Bdev, IoChannel, OpenBdev } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import { Below, openBackingFile } from './chain.js';
import type { ChainOptions, WritableFile } from './chain.js';
import { TaskIo } from '../task-io.js';
import { resizeImage } from './edit/resize.js';
import type { BackingContent } from './edit/resize.js';
import { Engine } from './engine.js';
import type { Layer } from './engine.js';
import { Incompatible } from './format.js';
import type { Qcow2Header } from './format.js';
import { unsupportedImage } from './image-error.js';
import { ServedImage } from './served-image.js';
import type { Task } from '../task.js';

/** Memory for decompressed clusters. */
const CLUSTER_CACHE_BYTES = 2 ** 22;

export interface WritableBase extends Below {
  /** The bdev that is written, for words. */
  readonly bdev: Bdev;
  /** Takes it over, and makes it as large as the overlay. Throws BdevError, then `end` is still to be called. */
  begin(sizeBytes: number): Task<void>;
  /** Throws BdevError. */
  end(): Task<void>;
}

export interface BaseFileOptions {
  readonly chain: ChainOptions;
  /** The bdev with the overlay's file, and its header. */
  readonly file: Bdev;
  readonly header: Qcow2Header;
  /** Where a session of the base may have left its log. */
  readonly restartDir: string | null;
  readonly codecThreads: number;
}

/** Opens the file that an overlay names as its backing file. Throws BdevError, and nothing of it is open then. */
export function* openBaseFile({ chain, file, header, restartDir, codecThreads }: BaseFileOptions): Task<WritableBase> {
  try {
    const base = yield* openBackingFile(chain, file, header);
    if (base.image === null) return new RawBase(base, chain);
    return new ImageBase(base, chain, restartDir, codecThreads);
  } catch (error) {
    chain.opened.close();
    if (!(error instanceof SystemError)) throw error;
    throw new BdevError(
      'open-failed',
      'name',
      error.message,
      'check its permissions; a disk with `isolate: true` opens no files, but takes a bdev named in `backing`',
    );
  }
}

class RawBase extends Below implements WritableBase {
  readonly bdev: Bdev;
  readonly #file: WritableFile;

  constructor(file: WritableFile, { opened }: ChainOptions) {
    super([layerOf(file.bdev, file.channel)], opened);
    this.bdev = file.bdev;
    this.#file = file;
  }

  *begin(sizeBytes: number): Task<void> {
    this.#file.lock.own();
    growBdev(this.bdev, sizeBytes);
  }

  *end(): Task<void> {
    this.#file.lock.share();
  }
}

class ImageBase extends Below implements WritableBase {
  readonly bdev: Bdev;
  readonly #file: WritableFile;
  readonly #served: ServedImage;
  readonly #restartDir: string | null;

  constructor(file: WritableFile, chain: ChainOptions, restartDir: string | null, codecThreads: number) {
    const { reactor } = chain.context;
    const image = file.image!;
    const { bdev, channel } = file;
    const served = new ServedImage({ bdev, image, channel, reactor });
    served.checkWritable();
    if ((image.header.incompatible & Incompatible.dirty) !== 0n) {
      throw unsupportedImage(
        'header.incompatible_features',
        `says that ${file.path} is dirty`,
        'repair it while nobody uses it: `strata img check -r all`',
      );
    }
    const sizeBytes = (): number => image.sizeBytes;
    const layer: Layer = {
      image,
      channel,
      get sizeBytes() {
        return sizeBytes();
      },
    };
    const engine = served.serve([layer, ...file.behind], { clusterCacheBytes: CLUSTER_CACHE_BYTES, codecThreads });
    // Who commits flushes.
    engine.answersWhenDurable = false;
    const shown: Layer = {
      image: null,
      channel: { submit: (io) => engine.submit(io), close: () => undefined },
      get sizeBytes() {
        return sizeBytes();
      },
    };
    super([shown], chain.opened);
    this.bdev = bdev;
    this.#file = file;
    this.#served = served;
    this.#restartDir = restartDir;
  }

  *begin(sizeBytes: number): Task<void> {
    this.#file.lock.own();
    yield* this.#served.beginWriting({ restartDir: this.#restartDir, keepsLog: false });
    if (this.#served.image.sizeBytes >= sizeBytes) return;
    const { behind } = this.#file;
    const backing = behind.length === 0 ? null : contentOf(behind, this.#served.engine, this.bdev);
    yield* this.#served.edit((file) => resizeImage(file, sizeBytes, { backing }));
  }

  *end(): Task<void> {
    try {
      yield* this.#served.endWriting();
    } finally {
      this.#file.lock.share();
    }
  }

  override *close(): Task<void> {
    yield* this.#served.close();
    yield* super.close();
  }
}

/** A bdev that the config names. Throws BdevError, and it is closed then. */
export function openNamedBase(open: OpenBdev, sizeBytes: number): WritableBase {
  const { blockCount, blockSizeBytes, name, guard } = open.bdev;
  let problem: BdevError | null = null;
  if (open.bdev.readOnly) {
    problem = new BdevError('read-only', 'backing', `${name} is only read`, 'leave its `read_only` out');
  } else if (guard !== undefined) {
    // Nobody runs, so nobody would hold it.
    problem = new BdevError('not-locked', 'backing', `the file of ${name} is locked for guests`, 'set `lock: true`');
  } else if (blockCount * blockSizeBytes < sizeBytes) {
    const hint = `make it larger first: \`strata rpc bdev_resize name=${name} new_size=${sizeBytes}\``;
    problem = new BdevError('too-small', 'backing', `${name} is smaller than the disk on top of it`, hint);
  }
  if (problem === null) return new NamedBase(open);
  open.close();
  throw problem;
}

class NamedBase extends Below implements WritableBase {
  readonly bdev: Bdev;
  readonly #open: OpenBdev;

  constructor(open: OpenBdev) {
    super([layerOf(open.bdev, open.channel)]);
    this.bdev = open.bdev;
    this.#open = open;
  }

  *begin(): Task<void> {
    // Nobody else relies on it, or it would not be open.
  }

  *end(): Task<void> {
    // It goes on as it is.
  }

  override *close(): Task<void> {
    this.#open.close();
    yield* super.close();
  }
}

function layerOf(bdev: Bdev, channel: IoChannel): Layer {
  return {
    image: null,
    channel,
    get sizeBytes() {
      return bdev.blockCount * bdev.blockSizeBytes;
    },
  };
}

/** Throws BdevError. */
function growBdev({ blockCount, blockSizeBytes, size }: Bdev, sizeBytes: number): void {
  if (blockCount * blockSizeBytes < sizeBytes) size.resize(Math.ceil(sizeBytes / blockSizeBytes) * blockSizeBytes);
}

/** What some layers show, for the metadata of the image above them. */
function contentOf(layers: readonly Layer[], above: Engine, bdev: Bdev): BackingContent {
  const { reactor, codecThreads } = above;
  const { sizeBytes, channel, image } = layers[0]!;
  const block = bdev.blockSizeBytes;
  return {
    sizeBytes,
    *read(offset, bytes) {
      const start = Math.floor(offset / block) * block;
      const end = Math.min(sizeBytes, Math.ceil((offset + bytes.length) / block) * block);
      bytes.fill(0);
      if (end <= start) return;
      const engine =
        image === null
          ? null
          : new Engine({
              reactor,
              layers,
              onDamage: (field, problem) => above.damaged(field, problem),
              clusterCacheBytes: CLUSTER_CACHE_BYTES,
              codecThreads,
            });
      const buffer = reactor.arena.allocate(end - start);
      try {
        const request = new TaskIo(engine === null ? channel : { submit: (io) => engine.submit(io), close }, bdev);
        request.io.prepare(IoType.read, start, end - start, 0);
        request.io.addSegment(buffer, end - start);
        yield* request.run();
        const found = reactor.arena.view8(buffer, end - start).subarray(offset - start);
        bytes.set(found.subarray(0, bytes.length));
      } finally {
        if (engine !== null) {
          yield* engine.freeze();
          engine.release();
        }
        reactor.arena.release(buffer);
      }
    },
  };
}

const close = (): void => undefined;
