/**
 * Reading what a snapshot of an image holds, beside whoever serves the image: the snapshot as an image of its own that holds nothing
 * else, over the same file, the same key and the same backing chain.
 *
 * Invariant: what a snapshot refers to does not change and is not given up as long as the image has the snapshot; whoever opens a reader
 * sees to it that it has.
 */
import type { Reactor } from '../../poller/reactor.js';
import { Engine } from './engine.js';
import { Qcow2Image } from './image.js';
import type { Snapshot } from './tables.js';
import type { Task } from '../task.js';

/** The image that has the snapshot. */
export interface SnapshotHolder {
  readonly image: Qcow2Image;
  readonly engine: Engine;
  readonly reactor: Reactor;
}

/** Memory for L2 tables, and for decompressed clusters. */
export interface ReaderMemory {
  readonly l2CacheBytes: number;
  readonly clusterCacheBytes: number;
}

export class SnapshotReader {
  readonly snapshot: Snapshot;
  /** Takes the requests. */
  readonly engine: Engine;
  readonly #image: Qcow2Image;

  private constructor(snapshot: Snapshot, engine: Engine, image: Qcow2Image) {
    this.snapshot = snapshot;
    this.engine = engine;
    this.#image = image;
  }

  /** Throws BdevError. */
  static *open(
    { image, engine, reactor }: SnapshotHolder,
    snapshot: Snapshot,
    { l2CacheBytes, clusterCacheBytes }: ReaderMemory,
  ): Task<SnapshotReader> {
    const { l1Offset, l1Entries, sizeBytes } = snapshot;
    const header = { ...image.header, l1Offset, l1Entries, sizeBytes, snapshotCount: 0, bitmaps: null };
    const { bdev: base, channel } = image.file;
    const kept = new Qcow2Image(header, { reactor, base, channel, l2CacheBytes });
    try {
      yield* kept.load();
    } catch (error) {
      kept.release();
      throw error;
    }
    const reader = new Engine({
      reactor,
      layers: [{ ...engine.layers[0]!, image: kept, sizeBytes }, ...engine.layers.slice(1)],
      onDamage: (field, problem) => engine.damaged(field, problem),
      clusterCacheBytes,
      codecThreads: engine.codecThreads,
    });
    return new SnapshotReader(snapshot, reader, kept);
  }

  /** No request comes any more. */
  *close(): Task<void> {
    yield* this.engine.freeze();
    this.engine.release();
    this.#image.release();
  }
}
