/**
 * Disks for a tool: a reactor in this process, driven by the tool itself, with the same bdevs that the daemon serves.
 *
 * Invariant: nothing runs but within `run`, which ends when what it waits for has happened.
 */
import { availableParallelism } from 'node:os';
import { Arena, check, native } from '../../../native/index.js';
import { BdevError } from '../../bdev/bdev.js';
import type { BdevConfig, BdevModule, OpenBdev, UseGuard } from '../../bdev/bdev.js';
import { BdevIo, IO_TYPE_NAMES, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import type { MallocConfig } from '../../bdev/malloc/malloc.js';
import { modules } from '../../bdev/modules.js';
import { CryptMethod, hasExternalData } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import type { QosConfig } from '../../bdev/qos/qos.js';
import type { Qcow2Config } from '../../bdev/qcow2/qcow2.js';
import { BdevRegistry } from '../../bdev/registry.js';
import type { UringConfig } from '../../bdev/uring/uring.js';
import { SeededRandom, SystemClock } from '../../poller/clock.js';
import { Reactor } from '../../poller/reactor.js';
import { Uring } from '../../poller/uring.js';
import { basesOf } from '../config/config.js';
import type { AnyBdevConfig } from '../config/config.js';
import { headerViewModule } from './header-view.js';
import type { HeaderViewConfig } from './header-view.js';
import type { ImageSpec } from './image-spec.js';
import { salvageModule } from './salvage.js';
import type { SalvageConfig } from './salvage.js';
import { openImage, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';

const OWN_MODULES = [headerViewModule, salvageModule] as unknown as readonly BdevModule<BdevConfig>[];
const L2_CACHE_BYTES = 32 * 2 ** 20;
const CLUSTER_CACHE_BYTES = 64 * 2 ** 20;

export class DiskHost {
  readonly reactor: Reactor;
  readonly registry: BdevRegistry;
  readonly #ring: Uring;
  readonly #opened: OpenBdev[] = [];
  readonly #guards: UseGuard[] = [];
  #count = 0;

  constructor() {
    const arena = new Arena();
    const clock = new SystemClock();
    this.#ring = new Uring(arena, { threadedReads: true });
    const random = new SeededRandom(process.pid);
    this.reactor = new Reactor({ name: 'img', arena, ring: this.#ring, clock, random, mode: 'interrupt', pollUs: 0 });
    // A slice ends when a signal is to be heard.
    this.reactor.watchEventLoop(check(native.eventLoopFd(), 'find the event loop'));
    this.registry = new BdevRegistry(this.reactor, [...modules, ...OWN_MODULES]);
  }

  /** Opens the disk that a chain of images is, to read. Throws BdevError. */
  openChain(chain: readonly OpenImage[]): OpenBdev {
    let below: string | null = null;
    for (const image of [...chain].reverse()) {
      const { spec, format, header, key } = image;
      below = this.#create({ spec, format, header, key }, { readOnly: true, backing: below });
    }
    return this.#open(below!, null);
  }

  /** Opens a disk to write, which nobody else has open. @param behind what shows through where it holds nothing. Throws BdevError. */
  openTarget(spec: ImageSpec, behind: readonly OpenImage[]): OpenBdev {
    const backing = behind.length === 0 ? null : this.openChain(behind).bdev.name;
    // Only looked at: the disk opens the file itself.
    const image = openImage(spec, { mode: 'read', discardSession: true });
    try {
      image.file.close();
      const { format, header, key } = image;
      return this.#open(this.#create({ spec, format, header, key }, { readOnly: false, backing }), 'img');
    } finally {
      image.key?.masterKey.fill(0);
    }
  }

  /** Stands filters before a disk that was opened to read. Throws BdevError. */
  filter({ bdev }: OpenBdev, { bytesPerSecond, onLoss }: SourceFilters): OpenBdev {
    let { name } = bdev;
    if (onLoss !== null) {
      const config: SalvageConfig = { name: `salvage${this.#count++}`, module: 'salvage', base: name, onLoss };
      name = this.registry.create(config).name;
    }
    if (bytesPerSecond !== null) {
      const none = { readIops: 0, writeIops: 0, totalIops: 0, writeBytesPerSecond: 0, totalBytesPerSecond: 0 };
      const limits = { ...none, readBytesPerSecond: bytesPerSecond, burstSeconds: 0, group: null };
      const config: QosConfig = { ...limits, name: `rate${this.#count++}`, module: 'qos', base: name };
      name = this.registry.create(config).name;
    }
    return this.#open(name, null);
  }

  /** Opens a disk of the daemon's config, with all that is below it. Throws BdevError. */
  openConfigured(bdevs: readonly AnyBdevConfig[], name: string, isTarget: boolean): OpenBdev {
    const config = bdevs.find((candidate) => candidate.name === name);
    if (config === undefined) {
      const known = bdevs.map((candidate) => candidate.name).join(', ');
      throw new BdevError('no-such-bdev', 'filename', `the config has no bdev ${name}`, `there are: ${known}`);
    }
    this.#createConfigured(bdevs, config, isTarget);
    const disk = this.#open(name, isTarget ? 'img' : null);
    const { guard } = disk.bdev;
    const reason = guard?.acquire() ?? null;
    if (reason !== null) throw new BdevError('locked', 'filename', `bdev ${name}: ${reason}`, 'end its other user');
    if (guard !== undefined) this.#guards.push(guard);
    return disk;
  }

  #createConfigured(bdevs: readonly AnyBdevConfig[], config: AnyBdevConfig, isTarget: boolean): void {
    if (this.registry.get(config.name) !== undefined) return;
    for (const base of basesOf(config)) {
      const below = bdevs.find(({ name }) => name === base.name)!;
      this.#createConfigured(bdevs, below, isTarget && !base.isRead);
    }
    const isImage = config.module === 'uring' || config.module === 'qcow2';
    this.registry.create(isImage && !isTarget ? { ...config, readOnly: true } : config);
  }

  /** Goes on until it is done, asleep where there is nothing to do. */
  run(isDone: () => boolean): void {
    while (!isDone()) {
      if (!this.reactor.step() && !isDone()) this.reactor.rest();
    }
  }

  /** Ends all disks, on which nothing is in flight: images are complete then. Throws BdevError. */
  closeDisks(): void {
    for (const disk of this.#opened.splice(0)) disk.close();
    for (const guard of this.#guards.splice(0)) guard.release();
    this.registry.destroyAll();
  }

  close(): void {
    this.closeDisks();
    this.#ring.close();
  }

  #open(name: string, writer: string | null): OpenBdev {
    const disk = this.registry.open(name, writer, 'filename');
    this.#opened.push(disk);
    return disk;
  }

  #create({ spec, format, header, key }: ImageFacts, options: DiskOptions): string {
    const { path } = spec;
    const file = this.#createFile(path, spec, options);
    if (format === 'raw' || header === null) return file;
    if (header.cryptMethod !== CryptMethod.none && key === null) {
      const secret = '--object secret,id=KEY,file=PATH';
      const opts = `--image-opts driver=qcow2,encrypt.key-secret=KEY,file.filename=${path}`;
      throw new BdevError('no-key', 'encrypt.key-secret', `${path} is encrypted`, `give its key: ${secret} ${opts}`);
    }
    const dataFile = spec.dataFile ?? header.dataFile;
    const qcow2: Qcow2Config = {
      name: `image${this.#count++}`,
      module: 'qcow2',
      base: spec.snapshot === undefined ? file : this.#createView(file, header),
      // What the image names is opened only as part of a chain that is: otherwise nothing is behind it.
      backing: options.backing ?? (header.backingFile === null ? null : this.#createBlank()),
      dataFile:
        hasExternalData(header) && dataFile !== null
          ? this.#createFile(resolveName(path, dataFile), spec, options)
          : null,
      imageDir: null,
      keyFile: null,
      unlocked: key === null ? null : { spec: key.spec, masterKey: Buffer.from(key.masterKey) },
      readOnly: options.readOnly,
      l2CacheBytes: L2_CACHE_BYTES,
      clusterCacheBytes: CLUSTER_CACHE_BYTES,
      codecThreads: availableParallelism(),
      restartDir: null,
    };
    this.registry.create(qcow2);
    return qcow2.name;
  }

  #createFile(path: string, spec: ImageSpec, { readOnly }: DiskOptions): string {
    const uring: UringConfig = {
      name: `file${this.#count++}`,
      module: 'uring',
      path,
      readOnly,
      lock: !(readOnly && spec.forceShare === true),
      create: null,
      blockSizeBytes: null,
      direct: spec.direct === true,
      iopoll: false,
      fixedBuffers: false,
    };
    this.registry.create(uring);
    return uring.name;
  }

  /** The file as if the header said where the snapshot's mapping is. */
  #createView(base: string, header: Qcow2Header): string {
    const view: HeaderViewConfig = { name: `view${this.#count++}`, module: 'header-view', base, header };
    this.registry.create(view);
    return view.name;
  }

  /** A disk that ends where it begins, almost: behind its end there are zeroes. */
  #createBlank(): string {
    const blank: MallocConfig = {
      name: `blank${this.#count++}`,
      module: 'malloc',
      sizeBytes: 512,
      blockSizeBytes: 512,
    };
    this.registry.create(blank);
    return blank.name;
  }
}

export interface SourceFilters {
  /** Reads are kept to this rate; null: to none. */
  readonly bytesPerSecond: number | null;
  /** What cannot be read is zeroes, and this is called; null: it is an error. */
  readonly onLoss: SalvageConfig['onLoss'] | null;
}

type ImageFacts = Pick<OpenImage, 'spec' | 'format' | 'header' | 'key'>;

interface DiskOptions {
  readonly readOnly: boolean;
  /** Name of the disk behind an image, or null. */
  readonly backing: string | null;
}

/** What went wrong with a request of a tool, in words. */
export function requestError(action: string, path: string, offset: number, errno: number): BdevError {
  const reason = errno === 28 ? 'no space is left' : `error ${errno === 0 ? '' : errno}`.trimEnd();
  const hint = errno === 28 ? 'make room' : 'check the image with `strata img check`, and the device';
  return new BdevError('io-error', 'filename', `${path}: ${action} at ${offset}: ${reason}`, hint);
}

const REQUEST_BYTES = 2 ** 20;

/** One request at a time, with a buffer in the arena. */
export class DiskRequest implements IoOwner {
  readonly address: number;
  readonly #host: DiskHost;
  readonly #path: string;
  readonly #io = new BdevIo();
  #isDone = true;

  /** @param path of the disk, for messages */
  constructor(host: DiskHost, path: string) {
    this.#host = host;
    this.#path = path;
    this.address = host.reactor.arena.allocate(REQUEST_BYTES);
  }

  /** At most `REQUEST_BYTES`, in whole sectors; what was read is in `bytes`. Throws BdevError. */
  run(disk: OpenBdev, type: IoType, offset: number, lengthBytes: number): void {
    const io = this.#io;
    io.prepare(type, offset, lengthBytes, 0);
    if (type === IoType.read || type === IoType.write) io.addSegment(this.address, lengthBytes);
    io.push(this, 0);
    this.#isDone = false;
    disk.channel.submit(io);
    this.#host.run(() => this.#isDone);
    if (io.status !== IoStatus.success) throw requestError(IO_TYPE_NAMES[type], this.#path, offset, io.errno);
  }

  /** Any range of the disk. Throws BdevError. */
  readBytes(disk: OpenBdev, offset: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length;) {
      const start = Math.floor((offset + done) / 512) * 512;
      const skip = offset + done - start;
      const length = Math.min(REQUEST_BYTES, Math.ceil((skip + bytes.length - done) / 512) * 512);
      this.run(disk, IoType.read, start, length);
      const piece = this.bytes(length).subarray(skip, skip + bytes.length - done);
      bytes.set(piece, done);
      done += piece.length;
    }
  }

  /** The buffer. */
  bytes(lengthBytes: number): Buffer {
    const { buffer, byteOffset } = this.#host.reactor.arena.view8(this.address, lengthBytes);
    return Buffer.from(buffer, byteOffset, lengthBytes);
  }

  onDone(): void {
    this.#isDone = true;
  }

  release(): void {
    this.#host.reactor.arena.release(this.address);
  }
}
