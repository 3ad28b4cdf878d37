/**
 * What an operator may ask of an image in use, beside serving it: snapshots, bitmaps, and jobs. What changes metadata does so while the
 * disk stands still (`edit`); a job works in steps between which requests are served.
 */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, OpenBdev } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import { Job } from '../job.js';
import { Backup } from './backup.js';
import type { Below } from './chain.js';
import { TaskIo } from '../task-io.js';
import { addBitmap, clearBitmap, removeBitmap } from './edit/bitmaps.js';
import { changeBackingFile } from './edit/header.js';
import { applySnapshot, createSnapshot, deleteSnapshot, findSnapshot } from './edit/snapshots.js';
import type { NewSnapshot } from './edit/snapshots.js';
import type { Engine } from './engine.js';
import type { ImageFile } from './image-file.js';
import type { Qcow2Image } from './image.js';
import { OverlayCommit } from './overlay-commit.js';
import { BitmapFlag } from './tables.js';
import type { Bitmap, Snapshot } from './tables.js';
import { runOnReactor, startTask } from '../task.js';
import type { Task } from '../task.js';
import type { WritableBase } from './writable-base.js';

/** Copied by one step of a stream: whole clusters of any size. */
const STREAM_BYTES = 2 ** 22;

export type Params = Readonly<Record<string, unknown>>;

/** An image in use, as its operations see it. */
export interface LiveImage {
  readonly bdev: Bdev;
  readonly image: Qcow2Image;
  readonly engine: Engine;
  readonly reactor: Reactor;
  /** Changes the image's metadata while the disk stands still; `then` is called in the end of that. Throws BdevError. */
  readonly edit: <T>(work: (file: ImageFile) => Task<T>, then?: () => void) => Task<T>;
  /** Does something while no request is under way. */
  readonly still: (work: () => void) => Task<void>;
  /** Makes durable what was written so far. Throws BdevError. */
  readonly flush: () => Task<void>;
  readonly footing: Footing;
  /** Says whether something is missing in a bitmap that records. */
  readonly setBitmapComplete: (name: string, isComplete: boolean) => void;
  /** Opens another bdev for writing. Throws BdevError. */
  readonly openTarget: (name: string) => OpenBdev;
  /** See BdevContext. */
  readonly jobEnded: (info: Record<string, unknown>) => void;
}

/** What an image stands on. */
export interface Footing {
  below: Below;
  /** Opens it anew, to read. Throws BdevError. */
  readonly openBelow: () => Task<Below>;
  /** Opens it for writing. Throws BdevError. */
  readonly openBase: () => Task<WritableBase>;
}

export class Operations {
  readonly #live: LiveImage;
  /** The last one. */
  #job: Job | null = null;
  /** Ids of snapshots that somebody reads. */
  readonly #read: string[] = [];

  constructor(live: LiveImage) {
    this.#live = live;
  }

  describe(): Record<string, unknown> | null {
    return this.#job?.describe() ?? null;
  }

  /** Ends what is running. */
  stop(): void {
    this.#job?.cancel();
    while (this.#job?.isRunning === true) this.#live.reactor.step();
  }

  /** See Bdev.operate. */
  async operate(operation: string, params: Params): Promise<unknown> {
    const { image } = this.#live;
    const name = textOf(params['snapshot'] ?? params['bitmap']);
    switch (operation) {
      case 'snapshots':
        return image.snapshots.map(describeSnapshot);
      case 'createSnapshot':
        this.#checkBelowStays();
        return describeSnapshot(await this.#run((file) => createSnapshot(file, this.#newSnapshot(name))));
      case 'deleteSnapshot':
        this.#checkUnread(name);
        await this.#run((file) => deleteSnapshot(file, name));
        return true;
      case 'applySnapshot':
        this.#checkBelowStays();
        await this.#run((file) => this.#apply(file, name));
        return true;
      case 'bitmaps':
        return image.bitmaps.map((bitmap) => this.#describeBitmap(bitmap));
      case 'addBitmap':
        await this.#run((file) => addBitmap(file, { name, ...granularityOf(params) }));
        return true;
      case 'removeBitmap':
        await this.#run((file) => removeBitmap(file, name));
        return true;
      case 'clearBitmap':
        await this.#run((file) => clearBitmap(file, name));
        return true;
      case 'stream':
        return this.#stream(Number(params['bytesPerSecond'] ?? 0));
      case 'commit':
        return this.#commit(Number(params['bytesPerSecond'] ?? 0));
      case 'backup':
        return this.#backup(textOf(params['target']), name, Number(params['bytesPerSecond'] ?? 0));
      case 'job':
        return this.describe();
      case 'cancelJob':
        this.#job?.cancel();
        return this.describe();
      default:
        throw new BdevError(
          'no-such-operation',
          'operation',
          `a qcow2 bdev knows no ${operation}`,
          'see docs/qcow2.md',
        );
    }
  }

  /** Keeps a snapshot that is read from being deleted. Returns what ends that. */
  keepSnapshot({ id }: Snapshot): () => void {
    this.#read.push(id);
    return () => void this.#read.splice(this.#read.indexOf(id), 1);
  }

  /** Throws BdevError. */
  #checkUnread(idOrName: string): void {
    const { id, name } = findSnapshot(this.#live.image.snapshots, idOrName);
    if (!this.#read.includes(id)) return;
    throw new BdevError('in-use', 'snapshot', `the snapshot ${name} is served as a disk`, 'remove that disk first');
  }

  #newSnapshot(name: string): NewSnapshot {
    const nowMs = this.#live.reactor.clock.wallMs();
    return { name, seconds: Math.floor(nowMs / 1000), nanoseconds: Math.round((nowMs % 1000) * 1e6) };
  }

  *#apply(file: ImageFile, name: string): Task<void> {
    const { image } = this.#live;
    const snapshot = findSnapshot(image.snapshots, name);
    if (snapshot.sizeBytes < image.sizeBytes) {
      throw new BdevError(
        'shrinks',
        'snapshot',
        `the disk had ${snapshot.sizeBytes} bytes then, and a disk in use does not shrink`,
        'stop the daemon and use `strata img snapshot -a`',
      );
    }
    yield* applySnapshot(file, name);
  }

  #describeBitmap({ name, granularityBits, flags }: Bitmap): Record<string, unknown> {
    const bits = this.#live.engine.bitmaps?.get(name);
    return {
      name,
      granularity: 2 ** granularityBits,
      isRecording: bits !== undefined,
      isInconsistent: bits === undefined && (flags & BitmapFlag.inUse) !== 0,
      dirtyBytes: bits?.dirtyBytes ?? null,
    };
  }

  /** Copies all that shows through from below into the image, then lets go of what is below. */
  #stream(bytesPerSecond: number): Record<string, unknown> {
    this.#checkBacked();
    this.#checkNoSnapshots();
    return this.#start('stream', this.#live.image.sizeBytes, bytesPerSecond, (job) => this.#streamAll(job));
  }

  *#streamAll(job: Job): Task<void> {
    const { bdev, engine, edit } = this.#live;
    const request = new TaskIo({ submit: (io) => engine.populate(io), close: () => undefined }, bdev);
    // A disk that grows meanwhile has nothing below its former end.
    for (let offset = 0; offset < job.totalBytes; offset += STREAM_BYTES) {
      yield* engine.thawed();
      const lengthBytes = Math.min(STREAM_BYTES, job.totalBytes - offset);
      request.io.prepare(IoType.write, offset, lengthBytes, 0);
      yield* request.run();
      yield* job.advance(lengthBytes);
    }
    yield* engine.thawed();
    // One may have been on its way as this began.
    this.#checkNoSnapshots();
    yield* edit(function* (file) {
      yield* changeBackingFile(file, null, null);
      engine.standOn([]);
    });
  }

  /** Throws BdevError when nothing lies below. */
  #checkBacked(): void {
    const { bdev, engine } = this.#live;
    if (engine.layers.length > 1) return;
    throw new BdevError('no-backing', 'name', `${bdev.name} has nothing below it`, 'there is nothing to be done');
  }

  /** Copies what the image holds into what lies directly below, and lets go of it. */
  #commit(bytesPerSecond: number): Record<string, unknown> {
    this.#checkBacked();
    this.#checkNoSnapshots();
    const commit = new OverlayCommit(this.#live);
    return this.#start('commit', this.#live.image.sizeBytes, bytesPerSecond, (job) =>
      commit.run(job, () => this.#checkNoSnapshots()),
    );
  }

  /** A snapshot shows what lies below, too: it has to stay there as it is. Throws BdevError. */
  #checkNoSnapshots(): void {
    const { bdev, image } = this.#live;
    if (image.snapshots.length === 0) return;
    const names = image.snapshots.map(({ name }) => name).join(', ');
    throw new BdevError(
      'has-snapshots',
      'name',
      `${bdev.name} has snapshots (${names}), which show what lies below as it is now`,
      'delete them first',
    );
  }

  /** Throws BdevError while a job changes what lies below. */
  #checkBelowStays(): void {
    const job = this.#job;
    if (job?.isRunning !== true || job.type === 'backup') return;
    throw new BdevError('busy', 'name', `${this.#live.bdev.name} has a job: ${job.type}`, 'wait for it, or cancel it');
  }

  /** Copies the disk as it is now to another bdev; with a bitmap only what that has, which is clean then. */
  #backup(target: string, bitmap: string, bytesPerSecond: number): Record<string, unknown> {
    const { image, engine } = this.#live;
    if (bitmap !== '' && engine.bitmaps?.get(bitmap) === undefined) {
      throw new BdevError(
        'no-such-bitmap',
        'bitmap',
        `no bitmap ${bitmap} records what is written`,
        'add it, and make a full backup',
      );
    }
    const backup = new Backup(this.#live, target, bitmap === '' ? null : bitmap);
    return this.#start('backup', image.sizeBytes, bytesPerSecond, (job) =>
      backup.run(job, this.#newSnapshot(backup.snapshot)),
    );
  }

  #start(
    type: string,
    totalBytes: number,
    bytesPerSecond: number,
    work: (job: Job) => Task<void>,
  ): Record<string, unknown> {
    const { bdev, engine, reactor } = this.#live;
    if (this.#job?.isRunning === true) {
      throw new BdevError('busy', 'name', `${bdev.name} has a job: ${this.#job.type}`, 'wait for it, or cancel it');
    }
    if (engine.isReadOnly)
      throw new BdevError('read-only', 'name', `${bdev.name} is not written to`, 'open it for writing');
    const job = new Job(type, totalBytes, reactor, bytesPerSecond);
    this.#job = job;
    let refusal: { readonly error: unknown } | null = null;
    const end = (error: unknown): void => {
      job.end(error);
      if (error !== null) refusal = { error };
      this.#live.jobEnded(job.describe());
    };
    startTask(work(job), () => end(null), end);
    // What is plain before it has waited for anything is told at once.
    if (refusal !== null) throw (refusal as { readonly error: unknown }).error;
    return job.describe();
  }

  async #run<T>(work: (file: ImageFile) => Task<T>): Promise<T> {
    const { edit, reactor, bdev } = this.#live;
    const result = await runOnReactor(reactor, edit(work));
    bdev.size.rescan();
    return result;
  }
}

function textOf(value: unknown): string {
  return typeof value === 'string' ? value : '';
}

/** Throws BdevError. */
function granularityOf({ granularity }: Params): { granularityBits?: number } {
  if (granularity === undefined || granularity === null) return {};
  const bits = Math.log2(Number(granularity));
  if (Number.isInteger(bits)) return { granularityBits: bits };
  throw new BdevError('bad-granularity', 'granularity', 'the granularity is no power of two', 'use 65536, for example');
}

/** A snapshot in an operator's words. */
export function describeSnapshot({
  id,
  name,
  seconds,
  nanoseconds,
  sizeBytes,
  vmStateBytes,
}: Snapshot): Record<string, unknown> {
  return { id, name, date: new Date(seconds * 1000 + nanoseconds / 1e6).toISOString(), sizeBytes, vmStateBytes };
}
