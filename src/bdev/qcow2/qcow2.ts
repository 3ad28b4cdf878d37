/** qcow2: an image in QEMU's format as a disk, on a bdev that holds the file. */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevConfig, BdevContext, BdevLimits, BdevModule, IoChannel } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';
import { wholeRequests } from '../filter-bdev.js';
import { Allocator } from './allocator.js';
import { Opened, openBacking, openData, pathOf } from './chain.js';
import { ChannelFile, TaskIo } from './channel-file.js';
import { checkImage } from './check.js';
import { shareCodecPool } from './codec/thread-codec-pool.js';
import { Committer } from './commit.js';
import { CryptChannel } from './crypt-channel.js';
import { resizeImage } from './edit/resize.js';
import type { ResizeOptions } from './edit/resize.js';
import { Engine } from './engine.js';
import type { Layer } from './engine.js';
import {
  Incompatible,
  clusterBytesOf,
  featureWords,
  hasExternalData,
  sessionOf,
  unknownAutoclear,
  withSession,
} from './format.js';
import { unsupportedImage } from './image-error.js';
import type { ImageFile } from './image-file.js';
import { Qcow2Image, loadRefcountTable, readHeader } from './image.js';
import { LiveBitmaps } from './live-bitmaps.js';
import { inlineKeyWork, threadedKeyWork } from './luks/key-work.js';
import { LUKS_SECTOR_BYTES } from './luks/luks-format.js';
import { SectorCipher } from './luks/sector-cipher.js';
import { unlockImage } from './luks/unlock.js';
import type { DiskKey } from './luks/unlock.js';
import { Operations } from './operations.js';
import type { Params } from './operations.js';
import { replay } from './replay.js';
import { RestartLog } from './restart-log.js';
import { completeTask, runOnReactor, startTask } from './task.js';
import type { Task } from './task.js';
import { WaitList, sleep } from './wait-list.js';

export interface Qcow2Config extends BdevConfig {
  readonly module: 'qcow2';
  /** Name of the bdev that holds the image. */
  readonly base: string;
  /** Name of the bdev that shows through where the image holds nothing; null: what the image names, beneath `imageDir`. */
  readonly backing: string | null;
  /** Name of the bdev that holds the data of an image with an external data file; null: what the image names. */
  readonly dataFile: string | null;
  /** Folder beneath which files that images name may be opened; null: none may. */
  readonly imageDir: string | null;
  /** File with the passphrase of an encrypted image; null: the image is not encrypted. */
  readonly keyFile: string | null;
  /** Its key, when it was worked out before: taken over, and wiped. */
  readonly unlocked?: DiskKey | null;
  readonly readOnly: boolean;
  /** Most memory for the cache of L2 tables. */
  readonly l2CacheBytes: number;
  /**
   * A folder on a tmpfs, for what this process owes the image when it is killed (restart-log.ts). Null: changes of the mapping are
   * made durable before they are answered.
   */
  readonly restartDir: string | null;
  /** Most memory for clusters that were compressed. */
  readonly clusterCacheBytes: number;
  /** Threads of the process that decompress, at most; 0: the reactor does it itself. */
  readonly codecThreads: number;
}

const REFCOUNT_CACHE_SLOTS = 256;
const REPAIR = 'repair it: `strata img check -r all`';
const HEADER_INCOMPATIBLE = 72;
const HEADER_AUTOCLEAR = 88;

class Qcow2Channel implements IoChannel {
  readonly #engine: Engine;

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  submit(io: BdevIo): void {
    this.#engine.submit(io);
  }

  close(): void {
    // The engine is the bdev's: other channels may use it.
  }
}

class Qcow2Bdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'qcow2';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly readOnly: boolean;
  readonly supportsFua = false;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[];
  readonly readBases: readonly Bdev[];
  readonly #config: Qcow2Config;
  readonly #reactor: Reactor;
  readonly #image: Qcow2Image;
  readonly #engine: Engine;
  readonly #operations: Operations;
  readonly #opened = new Opened();
  readonly #file: ChannelFile;
  #isEdited = false;
  #isClosing = false;
  #isHeaderBusy = false;
  readonly #headerWaiters = new WaitList();
  /** Findings that were put right as it was opened. */
  #repaired = 0;
  /** The bdev of an external data file. */
  #data: Bdev | null = null;
  /** Changes of a session that was killed, which were carried out. */
  #replayed = 0;
  /** What made it take no more writes, or null. */
  #damage: string | null = null;
  /** Of an encrypted image. */
  #cipher: string | null = null;

  constructor(config: Qcow2Config, context: BdevContext) {
    const { reactor } = context;
    const base = context.base(config.base, 'base');
    const named = [config.dataFile, config.backing] as const;
    const [dataFile, backing] = named.map((name, i) =>
      name === null ? null : context.base(name, i === 0 ? 'data_file' : 'backing'),
    ) as [Bdev | null, Bdev | null];
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.#config = config;
    this.#reactor = reactor;
    this.readOnly = config.readOnly || base.readOnly;
    this.blockSizeBytes = base.blockSizeBytes;
    this.bases = [base, dataFile, backing].filter((bdev) => bdev !== null);
    this.readBases = backing === null ? [] : [backing];
    const channel = this.#openChannel(context, base);
    this.#file = new ChannelFile(base, channel, reactor);
    let unlocked: DiskKey | null = config.unlocked ?? null;
    try {
      const header = this.#complete(readHeader(this.#file));
      unlocked ??= this.#complete(unlockImage(this.#file, header, config.keyFile, inlineKeyWork));
      const image = new Qcow2Image(header, { reactor, base, channel, l2CacheBytes: config.l2CacheBytes });
      this.#opened.images.push(image);
      this.#image = image;
      this.#checkUsable();
      if (!this.readOnly && (header.incompatible & Incompatible.dirty) !== 0n) this.#complete(this.#repair());
      this.#complete(this.#prepareFile());
      this.#complete(image.load());
      this.#engine = new Engine({
        reactor,
        layers: this.#openLayers(context, base, channel, dataFile, backing, unlocked),
        onDamage: (field, problem) => this.#onDamage(field, problem),
        clusterCacheBytes: config.clusterCacheBytes,
        codecThreads: config.codecThreads,
      });
      if (!this.readOnly) this.#prepareWriting(channel);
      this.#operations = new Operations({
        bdev: this,
        image,
        engine: this.#engine,
        reactor,
        edit: (work) => this.#edit(work),
        openTarget: (name) => context.openTarget(name, config.name),
        jobEnded: (info) => context.jobEnded(info),
      });
    } catch (error) {
      // Anything else than what is wrong with the image or its device is no reason to tidy up.
      if (error instanceof BdevError) this.#giveUp();
      throw error;
    } finally {
      unlocked?.masterKey.fill(0);
    }
    this.limits = {
      ...wholeRequests(base),
      memoryAlignmentBytes: unlocked === null ? 1 : LUKS_SECTOR_BYTES,
      physicalBlockBytes: Math.max(base.limits.physicalBlockBytes, 4096),
      discardGranularityBytes: this.#image.geometry.unitBytes,
      optimalIoBytes: this.#image.geometry.clusterBytes,
    };
    this.size = new BdevSize(this.blockSizeBytes, {
      sizeBytes: () => this.#image.sizeBytes,
      resize: (sizeBytes) => void this.#complete(this.#edit((file) => resizeImage(file, sizeBytes, this.#dataFile()))),
    });
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    switch (type) {
      case IoType.read:
      case IoType.flush:
        return true;
      case IoType.write:
      case IoType.discard:
      case IoType.writeZeroes:
        return !this.readOnly;
      case IoType.reset:
        return false;
    }
  }

  openChannel(_reactor: Reactor): IoChannel {
    return new Qcow2Channel(this.#engine);
  }

  async operate(operation: string, params: Params): Promise<unknown> {
    return this.#operations.operate(operation, params);
  }

  describe(): Record<string, unknown> {
    const { header, geometry, l2, snapshots, bitmaps } = this.#image;
    return {
      base: this.#config.base,
      backing: this.#config.backing,
      version: header.version,
      clusterBytes: geometry.clusterBytes,
      features: featureWords(header),
      cipher: this.#cipher,
      snapshots: snapshots.map(({ name }) => name),
      bitmaps: bitmaps.map(({ name }) => name),
      l2CacheBytes: l2.slotCount * l2.sliceBytes,
      l2CacheCoversBytes: l2.slotCount * geometry.sliceCoverageBytes,
      replayed: this.#replayed,
      repaired: this.#repaired,
      damage: this.#damage,
      job: this.#operations.describe(),
    };
  }

  destroy(): void {
    const engine = this.#engine;
    this.#operations.stop();
    while (this.#isEdited) this.#reactor.step();
    this.#isClosing = true;
    if (engine.committer !== null && engine.allocator !== null) {
      try {
        this.#complete(engine.settleAll(() => this.#flush()));
        this.#complete(engine.allocator.trim());
        if (engine.bitmaps !== null) this.#complete(engine.bitmaps.store(this.#file));
        if (engine.log !== null) this.#complete(this.#endSession(engine.log));
      } catch (error) {
        if (!(error instanceof BdevError)) throw error;
        // Whoever opens the image next finds what is owed to it.
        engine.log?.abandon();
      }
      engine.committer.release();
      engine.allocator.release();
    }
    this.#complete(engine.quiet());
    engine.release();
    this.#complete(this.#headerIdle());
    try {
      // An edit that was under way when it was marked may have written the header as it was.
      if (this.#damage !== null) this.#complete(this.#mark());
    } catch (error) {
      if (!(error instanceof BdevError)) throw error;
    }
    this.#opened.close();
  }

  /** It could not be opened: nothing of it stays behind. */
  #giveUp(): void {
    const engine = this.#engine as Engine | undefined;
    if (engine !== undefined) {
      const { committer, allocator } = engine;
      while (committer?.isIdle === false || allocator?.isIdle === false) this.#reactor.step();
      committer?.release();
      allocator?.release();
      engine.release();
    }
    this.#complete(this.#headerIdle());
    this.#opened.close();
  }

  #openChannel(context: BdevContext, bdev: Bdev): IoChannel {
    const channel = context.open(bdev);
    this.#opened.channels.push(channel);
    return channel;
  }

  /** The image, and what lies below: what the config names goes before what the image does. Throws BdevError. */
  #openLayers(
    context: BdevContext,
    base: Bdev,
    channel: IoChannel,
    dataFile: Bdev | null,
    backing: Bdev | null,
    unlocked: DiskKey | null,
  ): Layer[] {
    const { name, imageDir, l2CacheBytes } = this.#config;
    const image = this.#image;
    const { header } = image;
    const options = { context, opened: this.#opened, name, imageDir, l2CacheBytes, seen: new Set<string>() };
    let data = { bdev: base, channel };
    if (hasExternalData(header)) {
      data =
        dataFile === null
          ? openData(options, base, pathOf(base), header, 'data', this.readOnly)
          : { bdev: dataFile, channel: this.#openChannel(context, dataFile) };
      const { blockSizeBytes, blockCount, size } = data.bdev;
      const wanted = Math.ceil(header.sizeBytes / blockSizeBytes) * blockSizeBytes;
      if (!this.readOnly && blockCount * blockSizeBytes < wanted) size.resize(wanted);
      this.#data = data.bdev;
    } else if (dataFile !== null) {
      throw new BdevError(
        'no-data-file',
        'data_file',
        `the image on ${base.name} has its data in itself`,
        'leave it out',
      );
    }
    const layers: Layer[] = [
      {
        image,
        channel: unlocked === null ? data.channel : this.#encrypt(data.channel, unlocked),
        get sizeBytes() {
          return image.sizeBytes;
        },
      },
    ];
    if (backing !== null) {
      const sizeBytes = backing.blockCount * backing.blockSizeBytes;
      return [...layers, { image: null, channel: this.#openChannel(context, backing), sizeBytes }];
    }
    return header.backingFile === null ? layers : [...layers, ...this.#complete(openBacking(options, base, header))];
  }

  #encrypt(channel: IoChannel, { spec, masterKey }: DiskKey): IoChannel {
    const { codecThreads } = this.#config;
    const reactor = this.#reactor;
    const cipher = new SectorCipher(spec, masterKey);
    const pool = codecThreads === 0 ? null : shareCodecPool(reactor, codecThreads);
    const encrypted = new CryptChannel({ reactor, channel, cipher, pool });
    this.#opened.channels.push(encrypted);
    this.#cipher = spec.name;
    return encrypted;
  }

  *#flush(): Task<void> {
    const request = new TaskIo({ submit: (io) => this.#engine.committer!.flush(io), close: () => undefined }, this);
    request.io.prepare(IoType.flush, 0, 0, 0);
    yield* request.run();
  }

  /** What a resize has to know beside the image itself. */
  #dataFile(): ResizeOptions {
    const bdev = this.#data;
    return bdev === null ? {} : { dataFile: new ChannelFile(bdev, this.#engine.dataChannel, this.#reactor) };
  }

  /**
   * Changes the image's metadata while the disk stands still: requests wait meanwhile. Throws BdevError, and then the image is as it
   * was or as it was to be.
   */
  *#edit<T>(work: (file: ImageFile) => Task<T>): Task<T> {
    const engine = this.#engine;
    if (engine.isReadOnly) {
      throw new BdevError('read-only', 'name', `${this.name} is not written to`, this.#damage ?? 'open it for writing');
    }
    if (this.#isClosing) throw new BdevError('closing', 'name', `${this.name} is being closed`, 'start it again');
    if (this.#isEdited)
      throw new BdevError('busy', 'name', `${this.name} is being changed already`, 'try again when that is over');
    this.#isEdited = true;
    yield* engine.freeze();
    try {
      yield* engine.settleAll(() => this.#flush());
      try {
        if (engine.bitmaps !== null) yield* engine.bitmaps.store(this.#file);
        return yield* work(this.#file);
      } finally {
        yield* this.#reload();
      }
    } finally {
      this.#isEdited = false;
      engine.thaw();
    }
  }

  /** Takes up what the image is by now. */
  *#reload(): Task<void> {
    const engine = this.#engine;
    const image = this.#image;
    try {
      image.header = yield* readHeader(this.#file);
      image.l2.clear();
      yield* image.load();
      engine.allocator!.reset(yield* loadRefcountTable(image));
      engine.forgetCompressed();
      engine.bitmaps = yield* LiveBitmaps.open(this.#file, image.header, image.bitmaps);
      // An edit ends the session of whoever wrote before it.
      if (engine.log !== null) yield* this.#writeAutoclear(withSession(image.header.autoclear, engine.log.session));
    } catch (error) {
      if (error instanceof BdevError) engine.damaged(error.field, error.message);
      throw error;
    }
  }

  #complete<T>(task: Task<T>): T {
    return completeTask(task, () => this.#reactor.step());
  }

  /** Throws BdevError for what this engine does not do. */
  #checkUsable(): void {
    const { header } = this.#image;
    if (header.sizeBytes % this.blockSizeBytes !== 0) {
      throw unsupportedImage(
        'header.size',
        `is ${header.sizeBytes}, no multiple of ${this.blockSizeBytes}`,
        'set `direct: false` on the bdev below, or resize the image',
      );
    }
    if (this.readOnly) return;
    if ((header.incompatible & Incompatible.corrupt) !== 0n) {
      throw unsupportedImage('header.incompatible_features', 'says that it is corrupt', REPAIR);
    }
  }

  /** Refcounts were left behind by a program that was ended: they are made anew. Throws BdevError. */
  *#repair(): Task<void> {
    const report = yield* checkImage(this.#file, { repair: 'all' });
    this.#image.header = yield* readHeader(this.#file);
    this.#repaired = report.corruptionsFixed + report.leaksFixed;
    if ((this.#image.header.incompatible & Incompatible.dirty) === 0n) return;
    throw unsupportedImage('header.incompatible_features', 'says that it is dirty, and it cannot be repaired', REPAIR);
  }

  /** Whole clusters, and no claim about the image that is not kept. */
  *#prepareFile(): Task<void> {
    if (this.readOnly) return;
    const { header } = this.#image;
    const clusterBytes = clusterBytesOf(header);
    const whole = Math.ceil(this.#file.sizeBytes / clusterBytes) * clusterBytes;
    try {
      yield* this.#file.grow(whole);
    } catch (error) {
      // A device ends where it ends.
      if (!(error instanceof BdevError)) throw error;
    }
    const broken = unknownAutoclear(header);
    if (broken !== 0n) yield* this.#writeAutoclear(header.autoclear & ~broken);
  }

  *#writeAutoclear(autoclear: bigint): Task<void> {
    yield* this.#writeField(HEADER_AUTOCLEAR, autoclear);
    this.#image.header = { ...this.#image.header, autoclear };
  }

  /** Makes a field of the header durable, one after the other: they share a block. Throws BdevError. */
  *#writeField(offset: number, value: bigint): Task<void> {
    yield* this.#headerIdle();
    this.#isHeaderBusy = true;
    try {
      const field = Buffer.alloc(8);
      field.writeBigUInt64BE(value);
      yield* this.#file.write(offset, field);
      yield* this.#file.sync();
    } finally {
      this.#isHeaderBusy = false;
      this.#headerWaiters.wakeAll(0);
    }
  }

  *#headerIdle(): Task<void> {
    while (this.#isHeaderBusy) yield* sleep((sleeper) => this.#headerWaiters.add(sleeper));
  }

  /** Carries out what the session before this one left behind, and begins a session of its own. */
  *#beginSession(folder: string): Task<void> {
    const { arena } = this.#reactor;
    const engine = this.#engine;
    const { header } = this.#image;
    const left = sessionOf(header) === 0 ? null : RestartLog.open(folder, sessionOf(header), arena);
    if (left !== null) {
      try {
        this.#replayed = yield* replay(engine, left);
        yield* engine.settleAll(() => this.#flush());
      } catch (error) {
        left.abandon();
        throw error;
      }
    }
    const log = RestartLog.create(folder, this.#reactor);
    try {
      yield* this.#writeAutoclear(withSession(header.autoclear, log.session));
    } catch (error) {
      log.close();
      left?.abandon();
      throw error;
    }
    left?.close();
    engine.log = log;
    engine.committer!.log = log;
  }

  /** The image is whole without a log. */
  *#endSession(log: RestartLog): Task<void> {
    yield* this.#writeAutoclear(withSession(this.#image.header.autoclear, 0));
    log.close();
  }

  #prepareWriting(channel: IoChannel): void {
    const engine = this.#engine;
    const image = this.#image;
    const allocator = new Allocator({
      image,
      reactor: this.#reactor,
      channel,
      refcountTable: this.#complete(loadRefcountTable(image)),
      cacheSlots: REFCOUNT_CACHE_SLOTS,
      onCacheFull: () => engine.committer?.request(),
    });
    engine.allocator = allocator;
    engine.committer = new Committer({
      image,
      allocator,
      reactor: this.#reactor,
      channel,
      dataChannel: image.geometry.hasExternalData ? engine.dataChannel : null,
      onBegin: () => engine.onRoundBegin(),
      onRound: (isAll) => engine.onRound(isAll),
    });
    engine.bitmaps = this.#complete(LiveBitmaps.open(this.#file, image.header, image.bitmaps));
    engine.isReadOnly = false;
    const { restartDir } = this.#config;
    // Version 2 has no bits that another program would clear.
    if (restartDir !== null && image.header.version >= 3) this.#complete(this.#beginSession(restartDir));
  }

  #onDamage(field: string, problem: string): void {
    if (this.#damage !== null) return;
    this.#damage = `${field} ${problem}`;
    startTask(
      this.#mark(),
      () => undefined,
      () => undefined,
    );
  }

  /** Says in the image that it is damaged. Throws BdevError. */
  *#mark(): Task<void> {
    if (this.readOnly || this.#image.header.version < 3) return;
    const incompatible = this.#image.header.incompatible | Incompatible.corrupt;
    this.#image.header = { ...this.#image.header, incompatible };
    yield* this.#writeField(HEADER_INCOMPATIBLE, incompatible);
  }
}

/** Works out the key of an encrypted image, which takes seconds, on threads. Rejects with BdevError. */
async function prepareQcow2(config: Qcow2Config, context: BdevContext): Promise<Qcow2Config> {
  if (config.keyFile === null) return config;
  const { reactor } = context;
  const base = context.base(config.base, 'base');
  const channel = context.open(base);
  const file = new ChannelFile(base, channel, reactor);
  const unlock = function* (): Task<DiskKey | null> {
    return yield* unlockImage(file, yield* readHeader(file), config.keyFile, threadedKeyWork);
  };
  try {
    return { ...config, unlocked: await runOnReactor(reactor, unlock()) };
  } finally {
    channel.close();
  }
}

export const qcow2Module: BdevModule<Qcow2Config> = {
  name: 'qcow2',
  prepare: prepareQcow2,
  create: (config, context) => new Qcow2Bdev(config, context),
};
