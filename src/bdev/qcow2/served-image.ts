/**
 * An image that this process writes to, from its opening to its end: what it owes from before, the session, fields of the header, edits
 * while the disk stands still, and closing it so that it is whole without a log.
 *
 * Invariants
 * - Fields of the header are written one after the other: they share a block.
 * - Nothing is written before `beginWriting`, but for repairs.
 */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, IoChannel } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import { Allocator } from './allocator.js';
import { BitmapFile } from './bitmap-file.js';
import { TaskIo } from '../task-io.js';
import type { ChannelFile } from './channel-file.js';
import { checkImage } from './check.js';
import { Committer } from './commit.js';
import type { BitmapBits } from './edit/bitmap-bits.js';
import { Engine } from './engine.js';
import type { Layer } from './engine.js';
import { Incompatible, clusterBytesOf, sessionOf, unknownAutoclear, withSession } from './format.js';
import { unsupportedImage } from './image-error.js';
import type { ImageFile } from './image-file.js';
import { loadRefcountTable, readHeader } from './image.js';
import type { Qcow2Image } from './image.js';
import { LiveBitmaps } from './live-bitmaps.js';
import { replay } from './replay.js';
import { RestartLog } from './restart-log.js';
import { nextStep, startTask } from '../task.js';
import type { Task } from '../task.js';
import { WaitList, sleep } from './wait-list.js';

const REFCOUNT_CACHE_SLOTS = 256;
const REPAIR = 'repair it: `strata img check -r all`';
const HEADER_INCOMPATIBLE = 72;
const HEADER_AUTOCLEAR = 88;
const NO_BITMAPS: ReadonlyMap<string, BitmapBits> = new Map();

export interface ServedOptions {
  /** Of whoever it is served by. */
  readonly bdev: Bdev;
  readonly image: Qcow2Image;
  readonly channel: IoChannel;
  readonly reactor: Reactor;
}

export interface WritingOptions {
  /** A folder on a tmpfs, where a session that was killed has left its log; null: there is none. */
  readonly restartDir: string | null;
  /** Whether this one writes a log there, too: then changes are answered before they are durable. */
  readonly keepsLog: boolean;
}

export class ServedImage {
  readonly image: Qcow2Image;
  readonly file: ChannelFile;
  /** Changes of a session that was killed, which were carried out. */
  replayed = 0;
  /** Findings that were put right as it was opened. */
  repaired = 0;
  /** What made it take no more writes, or null. */
  damage: string | null = null;
  readonly #bdev: Bdev;
  readonly #channel: IoChannel;
  readonly #reactor: Reactor;
  #engine: Engine | null = null;
  #mayWrite = false;
  /** Null: bitmaps that are in use are lost with the process. */
  #bitmapFile: BitmapFile | null = null;
  readonly #incomplete = new Set<string>();
  /** The engine is frozen, or about to be. */
  #isStill = false;
  #isClosing = false;
  #isHeaderBusy = false;
  readonly #headerWaiters = new WaitList();

  constructor({ bdev, image, channel, reactor }: ServedOptions) {
    this.#bdev = bdev;
    this.image = image;
    this.file = image.file;
    this.#channel = channel;
    this.#reactor = reactor;
  }

  get engine(): Engine {
    return this.#engine!;
  }

  /** Throws BdevError for what is not written to. */
  checkWritable(): void {
    if ((this.image.header.incompatible & Incompatible.corrupt) === 0n) return;
    throw unsupportedImage('header.incompatible_features', 'says that it is corrupt', REPAIR);
  }

  /** Refcounts were left behind by a program that was ended: they are made anew, before the image is loaded. Throws BdevError. */
  *repair(): Task<void> {
    if ((this.image.header.incompatible & Incompatible.dirty) === 0n) return;
    const report = yield* checkImage(this.file, { repair: 'all' });
    this.image.header = yield* readHeader(this.file);
    this.repaired = report.corruptionsFixed + report.leaksFixed;
    if ((this.image.header.incompatible & Incompatible.dirty) === 0n) return;
    throw unsupportedImage('header.incompatible_features', 'says that it is dirty, and it cannot be repaired', REPAIR);
  }

  /** Starts to answer requests: reads, and writes from `beginWriting` on. */
  serve(
    layers: readonly Layer[],
    memory: { readonly clusterCacheBytes: number; readonly codecThreads: number },
  ): Engine {
    this.#engine = new Engine({
      ...memory,
      reactor: this.#reactor,
      layers,
      onDamage: (field, problem) => this.#onDamage(field, problem),
    });
    return this.#engine;
  }

  /** From here on it may be written to. Throws BdevError. */
  *beginWriting({ restartDir, keepsLog }: WritingOptions): Task<void> {
    const { engine, image } = this;
    this.#mayWrite = true;
    yield* this.#prepareFile();
    const allocator = new Allocator({
      image,
      reactor: this.#reactor,
      channel: this.#channel,
      refcountTable: yield* loadRefcountTable(image),
      cacheSlots: REFCOUNT_CACHE_SLOTS,
      onCacheFull: () => engine.committer?.request(),
    });
    engine.allocator = allocator;
    engine.committer = new Committer({
      image,
      allocator,
      reactor: this.#reactor,
      channel: this.#channel,
      dataChannel: image.geometry.hasExternalData ? engine.dataChannel : null,
      onBegin: () => engine.onRoundBegin(),
      onRound: (isAll) => engine.onRound(isAll),
    });
    engine.isReadOnly = false;
    // Version 2 has no bits that another program would clear.
    const folder = image.header.version < 3 ? null : restartDir;
    const former = sessionOf(image.header);
    const left = folder === null ? null : yield* this.#carryOut(folder);
    try {
      const bitmaps = yield* this.#loadBitmaps(folder, former);
      if (folder !== null && keepsLog) yield* this.#beginSession(folder, bitmaps);
      // A log that was left is void when anything is written without one.
      else if (former !== 0) yield* this.#writeAutoclear(withSession(image.header.autoclear, 0));
      if (bitmaps !== null) yield* bitmaps.markInUse(this.file);
      engine.bitmaps = bitmaps;
    } catch (error) {
      left?.abandon();
      throw error;
    }
    left?.close();
    if (folder !== null && former !== 0) BitmapFile.discard(folder, former);
  }

  *#loadBitmaps(folder: string | null, session: number): Task<LiveBitmaps | null> {
    const { header, bitmaps } = this.image;
    const left = folder === null || session === 0 ? undefined : BitmapFile.read(folder, session);
    return yield* LiveBitmaps.load(this.file, header, bitmaps, left);
  }

  *flush(): Task<void> {
    const committer = this.engine.committer!;
    const request = new TaskIo({ submit: (io) => committer.flush(io), close: () => undefined }, this.#bdev);
    request.io.prepare(IoType.flush, 0, 0, 0);
    yield* request.run();
  }

  /**
   * Changes the image's metadata while the disk stands still: requests wait meanwhile. Throws BdevError, and then the image is as it
   * was or as it was to be.
   * @param then called when the image is taken up as it is by then, before any request
   */
  *edit<T>(work: (file: ImageFile) => Task<T>, then?: () => void): Task<T> {
    const { engine } = this;
    const { name } = this.#bdev;
    if (engine.isReadOnly) {
      throw new BdevError('read-only', 'name', `${name} is not written to`, this.damage ?? 'open it for writing');
    }
    if (this.#isClosing) throw new BdevError('closing', 'name', `${name} is being closed`, 'start it again');
    if (this.#isStill)
      throw new BdevError('busy', 'name', `${name} is being changed already`, 'try again when that is over');
    this.#isStill = true;
    yield* engine.freeze();
    try {
      yield* engine.settleAll(() => this.flush());
      let result: T;
      try {
        if (engine.bitmaps !== null) yield* engine.bitmaps.store(this.file);
        result = yield* work(this.file);
      } finally {
        yield* this.#reload();
      }
      then?.();
      return result;
    } finally {
      this.#isStill = false;
      engine.thaw();
    }
  }

  /** Does something while no request is under way, when it is its turn. */
  *still(work: () => void): Task<void> {
    const { engine } = this;
    while (this.#isStill) yield* engine.thawed();
    this.#isStill = true;
    yield* engine.freeze();
    work();
    this.#isStill = false;
    engine.thaw();
  }

  /** Says whether something is missing in a bitmap that records: then it is of no use when this process is killed. */
  setBitmapComplete(name: string, isComplete: boolean): void {
    if (isComplete) this.#incomplete.delete(name);
    else this.#incomplete.add(name);
    this.#bitmapFile?.setComplete(name, isComplete);
  }

  /** The end: no request is under way, and none comes. What could not be written is found by whoever opens the image next. */
  *close(): Task<void> {
    const { engine } = this;
    while (this.#isStill) yield* engine.thawed();
    this.#isClosing = true;
    const { committer, allocator, log } = engine;
    if (committer !== null && allocator !== null) {
      try {
        yield* this.#endWriting();
      } catch (error) {
        if (!(error instanceof BdevError)) throw error;
        log?.abandon();
        this.#bitmapFile?.abandon();
      }
      yield* this.#release();
    }
    yield* engine.quiet();
    engine.release();
    yield* this.#headerIdle();
    try {
      // An edit that was under way when it was marked may have written the header as it was.
      if (this.damage !== null) yield* this.#mark();
    } catch (error) {
      if (!(error instanceof BdevError)) throw error;
    }
  }

  /** It is only read from here on, and whole in its file. No write is under way, and none comes. Throws BdevError. */
  *endWriting(): Task<void> {
    const { engine } = this;
    if (engine.committer === null) return;
    try {
      yield* this.#endWriting();
    } finally {
      yield* this.#release();
      engine.isReadOnly = true;
      this.#mayWrite = false;
    }
  }

  /** It could not be opened: nothing of it stays behind. */
  *giveUp(): Task<void> {
    const engine = this.#engine;
    if (engine !== null) {
      engine.log?.abandon();
      this.#bitmapFile?.abandon();
      yield* this.#release();
      engine.release();
    }
    yield* this.#headerIdle();
  }

  *#endWriting(): Task<void> {
    const { engine } = this;
    yield* engine.settleAll(() => this.flush());
    yield* engine.allocator!.trim();
    if (engine.bitmaps !== null) yield* engine.bitmaps.store(this.file);
    if (engine.log !== null) yield* this.#endSession(engine.log);
  }

  *#release(): Task<void> {
    const { engine } = this;
    const { committer, allocator } = engine;
    // At least once: it may be the end of a round that is told here, which is not through with it.
    do yield* nextStep(this.#reactor);
    while (committer?.isIdle === false || allocator?.isIdle === false);
    committer?.release();
    allocator?.release();
    engine.committer = null;
    engine.allocator = null;
    engine.log = null;
  }

  /** Takes up what the image is by now. */
  *#reload(): Task<void> {
    const { engine, image } = this;
    try {
      image.header = yield* readHeader(this.file);
      image.l2.clear();
      yield* image.load();
      engine.allocator!.reset(yield* loadRefcountTable(image));
      engine.forgetCompressed();
      const bitmaps = yield* LiveBitmaps.load(this.file, image.header, image.bitmaps);
      this.#bitmapFile?.keep(bitmaps?.bits ?? NO_BITMAPS, this.#incomplete);
      engine.bitmaps = bitmaps;
      // An edit ends the session of whoever wrote before it.
      if (engine.log !== null) yield* this.#writeAutoclear(withSession(image.header.autoclear, engine.log.session));
      if (bitmaps !== null) yield* bitmaps.markInUse(this.file);
    } catch (error) {
      if (error instanceof BdevError) engine.damaged(error.field, error.message);
      throw error;
    }
  }

  /** Whole clusters, and no claim about the image that is not kept. */
  *#prepareFile(): Task<void> {
    const { header } = this.image;
    const clusterBytes = clusterBytesOf(header);
    const whole = Math.ceil(this.file.sizeBytes / clusterBytes) * clusterBytes;
    try {
      yield* this.file.grow(whole);
    } catch (error) {
      // A device ends where it ends.
      if (!(error instanceof BdevError)) throw error;
    }
    const broken = unknownAutoclear(header);
    if (broken !== 0n) yield* this.#writeAutoclear(header.autoclear & ~broken);
  }

  *#writeAutoclear(autoclear: bigint): Task<void> {
    yield* this.#writeField(HEADER_AUTOCLEAR, autoclear);
    this.image.header = { ...this.image.header, autoclear };
  }

  /** Makes a field of the header durable. Throws BdevError. */
  *#writeField(offset: number, value: bigint): Task<void> {
    yield* this.#headerIdle();
    this.#isHeaderBusy = true;
    try {
      const field = Buffer.alloc(8);
      field.writeBigUInt64BE(value);
      yield* this.file.write(offset, field);
      yield* this.file.sync();
    } finally {
      this.#isHeaderBusy = false;
      this.#headerWaiters.wakeAll(0);
    }
  }

  *#headerIdle(): Task<void> {
    while (this.#isHeaderBusy) yield* sleep((sleeper) => this.#headerWaiters.add(sleeper));
  }

  /** Carries out what the session before this one left behind. Returns its log, null when there is none. */
  *#carryOut(folder: string): Task<RestartLog | null> {
    const session = sessionOf(this.image.header);
    const left = session === 0 ? null : RestartLog.open(folder, session, this.#reactor.arena);
    if (left === null) return null;
    try {
      this.replayed = yield* replay(this.engine, left);
      yield* this.engine.settleAll(() => this.flush());
    } catch (error) {
      left.abandon();
      throw error;
    }
    return left;
  }

  *#beginSession(folder: string, bitmaps: LiveBitmaps | null): Task<void> {
    const { engine } = this;
    const log = RestartLog.create(folder, this.#reactor);
    const bitmapFile = BitmapFile.create(folder, log.session, this.#reactor.arena);
    try {
      bitmapFile?.keep(bitmaps?.bits ?? NO_BITMAPS, this.#incomplete);
      yield* this.#writeAutoclear(withSession(this.image.header.autoclear, log.session));
    } catch (error) {
      log.close();
      bitmapFile?.close();
      throw error;
    }
    engine.log = log;
    engine.committer!.log = log;
    this.#bitmapFile = bitmapFile;
  }

  /** The image is whole without a log. */
  *#endSession(log: RestartLog): Task<void> {
    yield* this.#writeAutoclear(withSession(this.image.header.autoclear, 0));
    log.close();
    this.#bitmapFile?.close();
    this.#bitmapFile = null;
  }

  #onDamage(field: string, problem: string): void {
    if (this.damage !== null) return;
    this.damage = `${field} ${problem}`;
    startTask(
      this.#mark(),
      () => undefined,
      () => undefined,
    );
  }

  /** Says in the image that it is damaged. Throws BdevError. */
  *#mark(): Task<void> {
    if (!this.#mayWrite || this.image.header.version < 3) return;
    const incompatible = this.image.header.incompatible | Incompatible.corrupt;
    this.image.header = { ...this.image.header, incompatible };
    yield* this.#writeField(HEADER_INCOMPATIBLE, incompatible);
  }
}
