/**
 * Committing an overlay in use: what it holds goes into its base, and the overlay lets go of it, part by part. Nothing is switched in
 * the end: overlay and base together are the disk at any moment, however far it got.
 *
 *     close the part off ── copy it to the base ── flush the base ── let go of it in the overlay ── open it again
 *
 * Invariants
 * - What is copied does not change meanwhile: who wants to write there waits.
 * - The overlay lets go of what the base holds durably, and of nothing else.
 * - The base changes only where the overlay hides it, so nobody reads anything else there than before.
 */
import { native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import { IoFlag, IoType } from '../bdev-io.js';
import type { Job } from '../job.js';
import type { Below } from './chain.js';
import { TaskIo } from '../task-io.js';

import { Extent, Mapped } from './l2.js';
import type { LiveImage } from './operations.js';
import type { Task } from '../task.js';
import { sleep } from './wait-list.js';
import type { WritableBase } from './writable-base.js';

/** Closed off at once, at most: whole clusters of any size. */
const PART_BYTES = 2 ** 21;

export class OverlayCommit {
  readonly #live: LiveImage;
  readonly #extent = new Extent();
  readonly #read: TaskIo;
  readonly #drop: TaskIo;
  #buffer = 0;

  constructor(live: LiveImage) {
    const { engine, bdev } = live;
    this.#live = live;
    this.#read = new TaskIo({ submit: (io) => engine.startJob(io), close: () => undefined }, bdev);
    this.#drop = new TaskIo({ submit: (io) => engine.letGo(io), close: () => undefined }, bdev);
  }

  /** @param check throws when the overlay is not to be committed, once no edit of it is under way. Throws BdevError */
  *run(job: Job, check: () => void): Task<void> {
    const { reactor, footing, bdev } = this.#live;
    const base = yield* footing.openBase();
    const unpin = bdev.size.pin(`${bdev.name} is committed`);
    yield* this.#standOn(base);
    this.#buffer = reactor.arena.allocate(PART_BYTES);
    // What went wrong first is what is told.
    let failure: { readonly error: unknown } | null = null;
    try {
      check();
      yield* base.begin(job.totalBytes);
      this.#live.engine.noteBelow();
      yield* this.#commitAll(job, base);
    } catch (error) {
      failure = { error };
    }
    unpin();
    reactor.arena.release(this.#buffer);
    try {
      yield* this.#giveBack(base);
    } catch (error) {
      failure ??= { error };
    }
    if (failure !== null) throw failure.error;
  }

  *#commitAll(job: Job, base: WritableBase): Task<void> {
    const { engine } = this.#live;
    const { clusterBytes } = engine.top.geometry;
    const write = new TaskIo(base.layers[0]!.channel, base.bdev);
    for (let offset = 0; offset < job.totalBytes;) {
      yield* this.#lookUp(offset, job.totalBytes - offset);
      const { kind, lengthBytes } = this.#extent;
      if (kind === Mapped.unallocated && this.#extent.hostCluster < 0) {
        offset += lengthBytes;
        job.doneBytes = offset;
        continue;
      }
      const start = offset - (offset % clusterBytes);
      const length = Math.min(PART_BYTES, job.totalBytes - start);
      yield* engine.closeOff(start, length);
      let copied = 0;
      try {
        copied = yield* this.#commitPart(write, start, length);
      } finally {
        engine.reopen();
      }
      offset = start + length;
      job.doneBytes = offset - copied;
      yield* job.advance(copied);
    }
    yield* this.#live.flush();
  }

  /** Returns how many bytes it copied. */
  *#commitPart(write: TaskIo, start: number, lengthBytes: number): Task<number> {
    const { engine } = this.#live;
    const end = start + lengthBytes;
    let copied = 0;
    for (let offset = start; offset < end;) {
      yield* this.#lookUp(offset, end - offset);
      const { kind, lengthBytes: length } = this.#extent;
      if (kind !== Mapped.unallocated) {
        yield* this.#copy(write, offset, length, kind === Mapped.zero);
        copied += length;
      }
      offset += length;
    }
    if (copied > 0) {
      write.io.prepare(IoType.flush, 0, 0, 0);
      yield* write.run();
    }
    yield* engine.thawed();
    this.#drop.io.prepare(IoType.discard, start, lengthBytes, 0);
    yield* this.#drop.run();
    return copied;
  }

  *#copy(write: TaskIo, offset: number, lengthBytes: number, isKnownZero: boolean): Task<void> {
    const { engine, reactor } = this.#live;
    let isZero = isKnownZero;
    if (!isKnownZero) {
      yield* engine.thawed();
      this.#read.io.prepare(IoType.read, offset, lengthBytes, 0);
      this.#read.io.addSegment(this.#buffer, lengthBytes);
      yield* this.#read.run();
      isZero = native.isZero(reactor.arena.baseAddress + this.#buffer, lengthBytes);
    }
    write.io.prepare(isZero ? IoType.writeZeroes : IoType.write, offset, lengthBytes, isZero ? IoFlag.unmap : 0);
    if (!isZero) write.io.addSegment(this.#buffer, lengthBytes);
    yield* write.run();
  }

  /** What the overlay itself has from an offset on. Throws BdevError. */
  *#lookUp(offset: number, lengthBytes: number): Task<void> {
    const { engine } = this.#live;
    const extent = this.#extent;
    for (;;) {
      yield* engine.thawed();
      extent.offsetBytes = offset;
      extent.wantedBytes = lengthBytes;
      if (engine.top.find(extent)) return;
      const errno = yield* sleep((sleeper) => engine.top.loadSlice(offset, sleeper));
      if (errno !== 0)
        throw new BdevError('io-error', 'base', `reading an L2 table failed: errno ${errno}`, 'look at the device');
    }
  }

  /** The base is only read again. Where that fails it stays open as it is, and is not written to either. */
  *#giveBack(base: WritableBase): Task<void> {
    try {
      yield* base.end();
    } finally {
      yield* this.#standOn(yield* this.#live.footing.openBelow());
    }
  }

  /** The disk stands on something else from here on, which shows the same. */
  *#standOn(below: Below): Task<void> {
    const { engine, footing, still } = this.#live;
    const former = footing.below;
    yield* still(() => {
      engine.standOn(below.layers);
      footing.below = below;
    });
    yield* former.close();
  }
}
