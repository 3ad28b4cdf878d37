/** qcow2: an image in QEMU's format as a disk, on a bdev that holds the file. */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevConfig, BdevContext, BdevLimits, BdevModule, IoChannel } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';
import { wholeRequests } from '../filter-bdev.js';
import { Below, Opened, openBacking, openData, pathOf } from './chain.js';
import type { ChainOptions } from './chain.js';
import { ChannelFile } from './channel-file.js';
import { shareCodecPool } from './codec/thread-codec-pool.js';
import { CryptChannel } from './crypt-channel.js';
import { findSnapshot } from './edit/snapshots.js';
import { resizeImage } from './edit/resize.js';
import type { ResizeOptions } from './edit/resize.js';
import type { Engine, Layer } from './engine.js';
import { CryptMethod, featureWords, hasExternalData } from './format.js';
import { unsupportedImage } from './image-error.js';
import { Qcow2Image, readHeader } from './image.js';
import { inlineKeyWork, threadedKeyWork } from './luks/key-work.js';
import { LUKS_SECTOR_BYTES } from './luks/luks-format.js';
import { SectorCipher } from './luks/sector-cipher.js';
import { unlockImage } from './luks/unlock.js';
import type { DiskKey } from './luks/unlock.js';
import { Operations } from './operations.js';
import type { Footing, Params } from './operations.js';
import { ServedImage } from './served-image.js';
import { newSnapshotBdev, servedSource } from './snapshot-bdev.js';
import type { KeptSnapshot, SnapshotSource } from './snapshot-bdev.js';
import { SnapshotReader } from './snapshot-reader.js';
import type { ReaderMemory } from './snapshot-reader.js';
import { completeTask, runOnReactor } from '../task.js';
import type { Task } from '../task.js';
import { openBaseFile, openNamedBase } from './writable-base.js';
import type { WritableBase } from './writable-base.js';

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
  /** Id or name of a snapshot, which is shown instead of the disk; then `base` may also be the qcow2 bdev that serves the image. */
  readonly snapshot?: string | null;
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

class Qcow2Bdev implements SnapshotSource {
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
  readonly #served: ServedImage;
  readonly #operations: Operations;
  readonly #opened = new Opened();
  readonly #footing: Footing;
  /** The bdev of an external data file. */
  #data: Bdev | null = null;
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
    this.readBases = this.readOnly ? this.bases : backing === null ? [] : [backing];
    const channel = this.#openChannel(context, base);
    const file = new ChannelFile(base, channel, reactor);
    let unlocked: DiskKey | null = config.unlocked ?? null;
    this.#footing = {
      below: new Below(),
      openBelow: () => this.#openBelow(context, base, backing),
      openBase: () => this.#openBase(context, base, backing),
    };
    try {
      const header = this.#complete(readHeader(file));
      unlocked ??= this.#complete(unlockImage(file, header, config.keyFile, inlineKeyWork));
      const image = new Qcow2Image(header, { reactor, base, channel, l2CacheBytes: config.l2CacheBytes });
      this.#opened.images.push(image);
      this.#image = image;
      const served = new ServedImage({ bdev: this, image, channel, reactor });
      this.#served = served;
      this.#checkUsable();
      if (!this.readOnly) this.#complete(served.repair());
      this.#complete(image.load());
      const top = this.#openTop(context, base, channel, dataFile, unlocked);
      this.#footing.below = this.#complete(this.#footing.openBelow());
      this.#engine = served.serve([top, ...this.#footing.below.layers], config);
      if (!this.readOnly)
        this.#complete(served.beginWriting({ restartDir: config.restartDir, keepsLog: config.restartDir !== null }));
      this.#operations = new Operations({
        bdev: this,
        image,
        engine: this.#engine,
        reactor,
        edit: (work, then) => served.edit(work, then),
        still: (work) => served.still(work),
        flush: () => served.flush(),
        footing: this.#footing,
        setBitmapComplete: (name, isComplete) => served.setBitmapComplete(name, isComplete),
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
      resize: (sizeBytes) =>
        void this.#complete(this.#served.edit((file) => resizeImage(file, sizeBytes, this.#dataFile()))),
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

  *openSnapshot(idOrName: string, memory: ReaderMemory): Task<KeptSnapshot> {
    const image = this.#image;
    const snapshot = findSnapshot(image.snapshots, idOrName);
    const holder = { image, engine: this.#engine, reactor: this.#reactor };
    const reader = yield* SnapshotReader.open(holder, snapshot, memory);
    return { reader, release: this.#operations.keepSnapshot(snapshot) };
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
      replayed: this.#served.replayed,
      repaired: this.#served.repaired,
      damage: this.#served.damage,
      job: this.#operations.describe(),
    };
  }

  destroy(): void {
    this.#operations.stop();
    this.#complete(this.#served.close());
    this.#complete(this.#footing.below.close());
    this.#opened.close();
  }

  /** It could not be opened: nothing of it stays behind. */
  #giveUp(): void {
    const served = this.#served as ServedImage | undefined;
    if (served !== undefined) this.#complete(served.giveUp());
    this.#complete(this.#footing.below.close());
    this.#opened.close();
  }

  #openChannel(context: BdevContext, bdev: Bdev): IoChannel {
    const channel = context.open(bdev);
    this.#opened.channels.push(channel);
    return channel;
  }

  #chainOptions(context: BdevContext, opened: Opened): ChainOptions {
    const { name, imageDir, l2CacheBytes } = this.#config;
    return { context, opened, name, imageDir, l2CacheBytes, seen: new Set() };
  }

  /** The image, and where its data lies: what the config names goes before what the image does. Throws BdevError. */
  #openTop(
    context: BdevContext,
    base: Bdev,
    channel: IoChannel,
    dataFile: Bdev | null,
    unlocked: DiskKey | null,
  ): Layer {
    const image = this.#image;
    const { header } = image;
    let data = { bdev: base, channel };
    if (hasExternalData(header)) {
      const options = this.#chainOptions(context, this.#opened);
      data =
        dataFile === null
          ? openData(options, base, pathOf(base), header, { suffix: 'data', readOnly: this.readOnly })
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
    return {
      image,
      channel: unlocked === null ? data.channel : this.#encrypt(data.channel, unlocked),
      get sizeBytes() {
        return image.sizeBytes;
      },
    };
  }

  /** What shows through where the image holds nothing: what the config names goes before what the image does. Throws BdevError. */
  *#openBelow(context: BdevContext, base: Bdev, backing: Bdev | null): Task<Below> {
    const { header } = this.#image;
    const opened = new Opened();
    try {
      if (backing !== null) {
        const channel = context.open(backing);
        opened.channels.push(channel);
        const sizeBytes = backing.blockCount * backing.blockSizeBytes;
        return new Below([{ image: null, channel, sizeBytes }], opened);
      }
      if (header.backingFile === null) return new Below();
      return new Below(yield* openBacking(this.#chainOptions(context, opened), base, header), opened);
    } catch (error) {
      opened.close();
      throw error;
    }
  }

  /** The same, for writing. Throws BdevError. */
  *#openBase(context: BdevContext, base: Bdev, backing: Bdev | null): Task<WritableBase> {
    const { restartDir, codecThreads, name } = this.#config;
    const { header } = this.#image;
    if (backing !== null) return openNamedBase(context.openBase(backing.name, name), header.sizeBytes);
    if (header.cryptMethod !== CryptMethod.none) {
      throw unsupportedImage(
        'header.crypt_method',
        'is set, and that of its backing file is not: what is secret would be in the clear there',
        'if that is what you want, serve the backing file as a bdev and name it in `backing`',
      );
    }
    const chain = this.#chainOptions(context, new Opened());
    return yield* openBaseFile({ chain, file: base, header, restartDir, codecThreads });
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

  /** What a resize has to know beside the image itself. */
  #dataFile(): ResizeOptions {
    const bdev = this.#data;
    return bdev === null ? {} : { dataFile: new ChannelFile(bdev, this.#engine.dataChannel, this.#reactor) };
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
    if (!this.readOnly) this.#served.checkWritable();
  }
}

/** Works out the key of an encrypted image, which takes seconds, on threads. Rejects with BdevError. */
async function prepareQcow2(config: Qcow2Config, context: BdevContext): Promise<Qcow2Config> {
  if (config.keyFile === null || servedSource(config, context) !== null) return config;
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
  create: (config, context) => {
    const open = (whole: Qcow2Config): Qcow2Bdev => new Qcow2Bdev(whole, context);
    return (config.snapshot ?? null) === null ? open(config) : newSnapshotBdev(config, context, open);
  },
};
