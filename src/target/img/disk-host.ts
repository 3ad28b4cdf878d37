/**
 * Disks for a tool: a reactor in this process, driven by the tool itself, with the same bdevs that the daemon serves.
 *
 * Invariant: nothing runs but within `run`, which ends when what it waits for has happened.
 */
import { availableParallelism } from 'node:os';
import { Arena } from '../../../native/index.js';
import { BdevError } from '../../bdev/bdev.js';
import type { OpenBdev } from '../../bdev/bdev.js';
import { BdevIo, IO_TYPE_NAMES, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import type { MallocConfig } from '../../bdev/malloc/malloc.js';
import { modules } from '../../bdev/modules.js';
import { readHeader } from '../../bdev/qcow2/check.js';
import { hasExternalData } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import type { Qcow2Config } from '../../bdev/qcow2/qcow2.js';
import { BdevRegistry } from '../../bdev/registry.js';
import type { UringConfig } from '../../bdev/uring/uring.js';
import { SeededRandom, SystemClock } from '../../poller/clock.js';
import { Reactor } from '../../poller/reactor.js';
import { Uring } from '../../poller/uring.js';
import type { Format } from './image-options.js';
import { NodeFile, runTask } from './node-file.js';
import { resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';

const WAIT_US = 20_000;
const L2_CACHE_BYTES = 32 * 2 ** 20;
const CLUSTER_CACHE_BYTES = 64 * 2 ** 20;

export class DiskHost {
  readonly reactor: Reactor;
  readonly registry: BdevRegistry;
  readonly #ring: Uring;
  readonly #opened: OpenBdev[] = [];
  #count = 0;

  constructor() {
    const arena = new Arena();
    const clock = new SystemClock();
    this.#ring = new Uring(arena);
    const random = new SeededRandom(process.pid);
    this.reactor = new Reactor({ name: 'img', arena, ring: this.#ring, clock, random, mode: 'interrupt', pollUs: 0 });
    this.registry = new BdevRegistry(this.reactor, modules);
  }

  /** Opens the disk that a chain of images is, to read. Throws BdevError. */
  openChain(chain: readonly OpenImage[], forceShare: boolean): OpenBdev {
    let below: string | null = null;
    for (const image of [...chain].reverse()) {
      below = this.#create(image.file.path, image.format, { readOnly: true, lock: !forceShare, backing: below });
    }
    return this.#open(below!, null);
  }

  /** Opens a disk to write. @param behind what shows through where it holds nothing, to read. Throws BdevError. */
  openTarget(path: string, format: Format, behind: readonly OpenImage[]): OpenBdev {
    const backing = behind.length === 0 ? null : this.openChain(behind, false).bdev.name;
    return this.#open(this.#create(path, format, { readOnly: false, lock: true, backing }), 'img');
  }

  /** Goes on until it is done. */
  run(isDone: () => boolean): void {
    while (!isDone()) {
      if (!this.reactor.step() && this.#ring.inflight > 0) this.#ring.wait(WAIT_US);
    }
  }

  /** Ends all disks, on which nothing is in flight: images are complete then. Throws BdevError. */
  close(): void {
    for (const disk of this.#opened.splice(0)) disk.close();
    this.registry.destroyAll();
    this.#ring.close();
  }

  #open(name: string, writer: string | null): OpenBdev {
    const disk = this.registry.open(name, writer, 'filename');
    this.#opened.push(disk);
    return disk;
  }

  #create(path: string, format: Format, options: DiskOptions): string {
    const file = this.#createFile(path, options);
    if (format === 'raw') return file;
    const header = headerOf(path);
    const qcow2: Qcow2Config = {
      name: `image${this.#count++}`,
      module: 'qcow2',
      base: file,
      // What the image names is opened only as part of a chain that is: otherwise nothing is behind it.
      backing: options.backing ?? (header.backingFile === null ? null : this.#createBlank()),
      dataFile:
        hasExternalData(header) && header.dataFile !== null
          ? this.#createFile(resolveName(path, header.dataFile), options)
          : null,
      imageDir: null,
      keyFile: null,
      readOnly: options.readOnly,
      l2CacheBytes: L2_CACHE_BYTES,
      clusterCacheBytes: CLUSTER_CACHE_BYTES,
      codecThreads: availableParallelism(),
      restartDir: null,
    };
    this.registry.create(qcow2);
    return qcow2.name;
  }

  #createFile(path: string, { readOnly, lock }: DiskOptions): string {
    const uring: UringConfig = {
      name: `file${this.#count++}`,
      module: 'uring',
      path,
      readOnly,
      lock,
      create: null,
      blockSizeBytes: null,
      direct: false,
      iopoll: false,
      fixedBuffers: false,
    };
    this.registry.create(uring);
    return uring.name;
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

interface DiskOptions {
  readonly readOnly: boolean;
  readonly lock: boolean;
  /** Name of the disk behind an image, or null. */
  readonly backing: string | null;
}

/** The header of an image, of which another part of the tool holds the lock. Throws BdevError. */
function headerOf(path: string): Qcow2Header {
  const file = new NodeFile(path, { mode: 'read', forceShare: true });
  try {
    return runTask(readHeader(file));
  } finally {
    file.close();
  }
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
