/**
 * A backup of a disk in use: what it holds at one moment, to another bdev. The moment is kept by an internal snapshot, which is read by
 * an engine of its own and deleted in the end; so the guest's writes neither wait for the backup nor get into it.
 *
 * With a bitmap only what it has is copied: what was written since the backup before. From that moment on it is clean and records what
 * belongs into the next one; when the backup fails, what it had is given back.
 */
import { native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { OpenBdev } from '../bdev.js';
import { IoFlag, IoType } from '../bdev-io.js';
import type { Job } from '../job.js';
import { TaskIo } from '../task-io.js';
import { BitmapBits } from './edit/bitmap-bits.js';
import { createSnapshot, deleteSnapshot, findSnapshot } from './edit/snapshots.js';
import type { NewSnapshot } from './edit/snapshots.js';
import type { LiveImage } from './operations.js';
import { SnapshotReader } from './snapshot-reader.js';
import type { Task } from '../task.js';

const STEP_BYTES = 2 ** 20;
const READER_MEMORY = { l2CacheBytes: 2 ** 22, clusterCacheBytes: 2 ** 22 };

export class Backup {
  /** Name of the snapshot that keeps the moment. */
  readonly snapshot = 'strata-backup';
  readonly #live: LiveImage;
  readonly #target: OpenBdev;
  readonly #bitmap: string | null;

  /** Throws BdevError when the target cannot be had, or is too small. */
  constructor(live: LiveImage, target: string, bitmap: string | null) {
    this.#live = live;
    this.#bitmap = bitmap;
    this.#target = live.openTarget(target);
    const { blockCount, blockSizeBytes, name } = this.#target.bdev;
    if (blockCount * blockSizeBytes >= live.image.sizeBytes && blockSizeBytes <= live.bdev.blockSizeBytes) return;
    this.#target.close();
    throw new BdevError(
      'too-small',
      'target',
      `${name} cannot hold a copy of ${live.bdev.name}`,
      'name a bdev of its size and blocks',
    );
  }

  *run(job: Job, moment: NewSnapshot): Task<void> {
    const { edit, engine, setBitmapComplete } = this.#live;
    const bitmap = this.#bitmap;
    let ranges: BitmapBits | null = null;
    let isDone = false;
    try {
      const { snapshots } = this.#live.image;
      // In the image it keeps what it has, in case this process is killed.
      const takeRanges = (): void => {
        const bits = bitmap === null ? undefined : engine.bitmaps?.get(bitmap);
        if (bitmap === null || bits === undefined) return;
        ranges = copyOf(bits);
        // Until the backup is whole, or has given back what it took.
        setBitmapComplete(bitmap, false);
        bits.clear(0, bits.sizeBytes);
      };
      yield* edit(function* (file) {
        // One that a killed process has left.
        if (snapshots.some(({ name }) => name === moment.name)) yield* deleteSnapshot(file, moment.name);
        yield* createSnapshot(file, moment);
      }, takeRanges);
      yield* this.#copy(job, ranges);
      isDone = true;
    } finally {
      if (!isDone && bitmap !== null && ranges !== null) engine.bitmaps?.get(bitmap)?.merge(ranges);
      if (bitmap !== null) setBitmapComplete(bitmap, true);
      try {
        yield* engine.thawed();
        const isThere = this.#live.image.snapshots.some(({ name }) => name === this.snapshot);
        if (isThere) yield* edit((file) => deleteSnapshot(file, this.snapshot));
      } finally {
        this.#target.close();
      }
    }
  }

  *#copy(job: Job, ranges: BitmapBits | null): Task<void> {
    const { image, reactor, bdev } = this.#live;
    const snapshot = findSnapshot(image.snapshots, this.snapshot);
    const { sizeBytes } = snapshot;
    const reader = yield* SnapshotReader.open(this.#live, snapshot, READER_MEMORY);
    const buffer = reactor.arena.allocate(STEP_BYTES);
    const read = new TaskIo({ submit: (io) => reader.engine.submit(io), close: () => undefined }, bdev);
    const write = new TaskIo(this.#target.channel, this.#target.bdev);
    try {
      let last = 0;
      for (const range of ranges?.ranges() ?? [{ offset: 0, lengthBytes: sizeBytes }]) {
        const end = range.offset + range.lengthBytes;
        for (let offset = range.offset; offset < end; offset += STEP_BYTES) {
          const length = Math.min(STEP_BYTES, end - offset);
          read.io.prepare(IoType.read, offset, length, 0);
          read.io.addSegment(buffer, length);
          yield* read.run();
          // The target may hold anything: zeroes are written, too, but as such.
          const isZero = native.isZero(reactor.arena.baseAddress + buffer, length);
          write.io.prepare(isZero ? IoType.writeZeroes : IoType.write, offset, length, isZero ? IoFlag.unmap : 0);
          if (!isZero) write.io.addSegment(buffer, length);
          yield* write.run();
          yield* job.advance(offset + length - last);
          last = offset + length;
        }
      }
      write.io.prepare(IoType.flush, 0, 0, 0);
      yield* write.run();
      job.doneBytes = job.totalBytes;
    } finally {
      yield* reader.close();
      reactor.arena.release(buffer);
    }
  }
}

function copyOf(bits: BitmapBits): BitmapBits {
  const copy = new BitmapBits(bits.sizeBytes, bits.granularityBits);
  copy.merge(bits);
  return copy;
}
