/**
 * What a rebase copies: where the image holds nothing, what it shows of its old backing file and the new one has otherwise. Several pieces
 * at once.
 *
 *     slot: read a piece of both ── write what differs, cluster after cluster, run after run ── the next piece
 */
import { native } from '../../../native/index.js';
import type { BdevError, OpenBdev } from '../../bdev/bdev.js';
import { BdevIo, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import type { DiskPart } from './copy-disk.js';
import { requestError } from './disk-host.js';
import type { DiskHost } from './disk-host.js';

const PIECE_BYTES = 2 ** 20;
const PARALLEL = 8;

/** A disk that reads as zeroes behind its end. */
export interface Below {
  readonly disk: OpenBdev;
  readonly sizeBytes: number;
}

export interface RebaseCopyOptions {
  /** The image, over its new backing file. */
  readonly target: OpenBdev;
  readonly path: string;
  readonly before: Below | null;
  readonly after: Below | null;
  /** What the image does not hold. */
  readonly parts: Iterable<Pick<DiskPart, 'start' | 'lengthBytes'>>;
  readonly clusterBytes: number;
  /** Called with the bytes of the disk that are behind. */
  readonly onProgress: (bytes: number) => void;
}

/** Copies, and makes the copy durable. Throws BdevError. */
export function copyDifferences(host: DiskHost, options: RebaseCopyOptions): void {
  const copy = new RebaseCopy(host, options);
  try {
    copy.run();
  } finally {
    copy.release();
  }
}

class RebaseCopy {
  readonly host: DiskHost;
  readonly options: RebaseCopyOptions;
  readonly pieceBytes: number;
  error: BdevError | null = null;
  running = 0;
  readonly #pieces: Iterator<{ readonly start: number; readonly lengthBytes: number }>;
  readonly #slots: Slot[] = [];

  constructor(host: DiskHost, options: RebaseCopyOptions) {
    this.host = host;
    this.options = options;
    this.pieceBytes = Math.max(PIECE_BYTES, options.clusterBytes);
    this.#pieces = this.#cut();
    for (let i = 0; i < PARALLEL; i++) this.#slots.push(new Slot(this));
  }

  run(): void {
    for (const slot of this.#slots) slot.next();
    this.host.run(() => this.running === 0);
    if (this.error === null) {
      this.#slots[0]!.flush();
      this.host.run(() => this.running === 0);
    }
    if (this.error !== null) throw this.error;
  }

  take(): { readonly start: number; readonly lengthBytes: number } | null {
    if (this.error !== null) return null;
    const next = this.#pieces.next();
    return next.done === true ? null : next.value;
  }

  release(): void {
    for (const slot of this.#slots) slot.release();
  }

  *#cut(): Generator<{ readonly start: number; readonly lengthBytes: number }> {
    const { parts, onProgress } = this.options;
    for (const { start, lengthBytes } of parts) {
      const end = start + lengthBytes;
      for (let at = start; at < end;) {
        const length = Math.min(end - at, this.pieceBytes - (at % this.pieceBytes));
        onProgress(at);
        yield { start: at, lengthBytes: length };
        at += length;
      }
    }
  }
}

/** One piece on its way. */
class Slot implements IoOwner {
  readonly #copy: RebaseCopy;
  readonly #addresses: readonly [number, number];
  readonly #reads = [new BdevIo(), new BdevIo()] as const;
  readonly #io = new BdevIo();
  #start = 0;
  #lengthBytes = 0;
  #waiting = 0;
  /** How much of the piece is written, or the same. */
  #done = 0;

  constructor(copy: RebaseCopy) {
    const { arena } = copy.host.reactor;
    this.#copy = copy;
    this.#addresses = [arena.allocate(copy.pieceBytes), arena.allocate(copy.pieceBytes)];
  }

  next(): void {
    for (;;) {
      const piece = this.#copy.take();
      if (piece === null) return;
      this.#start = piece.start;
      this.#lengthBytes = piece.lengthBytes;
      this.#done = 0;
      const { before, after } = this.#copy.options;
      const there = [this.#lengthIn(before), this.#lengthIn(after)] as const;
      // Zeroes in both.
      if (there[0] + there[1] === 0) continue;
      this.#copy.running++;
      this.#waiting = there.filter((length) => length > 0).length;
      for (const i of [0, 1] as const) this.#read(i, i === 0 ? before : after, there[i]);
      return;
    }
  }

  flush(): void {
    this.#copy.running++;
    this.#submit(IoType.flush, 0, 0);
  }

  onDone(io: BdevIo): void {
    const { options, host } = this.#copy;
    if (io.status !== IoStatus.success) {
      const action = io === this.#io ? 'write' : 'read';
      this.#copy.error ??= requestError(action, options.path, io.offsetBytes, io.errno);
    }
    if (io === this.#io) {
      this.#done = io.type === IoType.flush ? this.#lengthBytes : this.#done + io.lengthBytes;
      host.reactor.defer(() => this.#goOn());
    } else if (--this.#waiting === 0) host.reactor.defer(() => this.#goOn());
  }

  release(): void {
    for (const address of this.#addresses) this.#copy.host.reactor.arena.release(address);
  }

  /** Writes the next clusters that differ. */
  #goOn(): void {
    const { clusterBytes } = this.#copy.options;
    while (this.#copy.error === null && this.#done < this.#lengthBytes) {
      const from = this.#done;
      let end = from;
      while (end < this.#lengthBytes && this.#differs(end)) end = this.#clusterEnd(end);
      if (end === from) {
        this.#done = Math.min(this.#lengthBytes, from + clusterBytes - ((this.#start + from) % clusterBytes));
        continue;
      }
      const { arena } = this.#copy.host.reactor;
      const isZero = native.isZero(arena.baseAddress + this.#addresses[0] + from, end - from);
      this.#submit(isZero ? IoType.writeZeroes : IoType.write, from, end - from);
      return;
    }
    this.#copy.running--;
    this.next();
  }

  #clusterEnd(at: number): number {
    const { clusterBytes } = this.#copy.options;
    return Math.min(this.#lengthBytes, at + clusterBytes - ((this.#start + at) % clusterBytes));
  }

  #differs(at: number): boolean {
    const [held, shown] = this.#addresses.map((address) => this.#view(address, at, this.#clusterEnd(at))) as [
      Buffer,
      Buffer,
    ];
    return !held.equals(shown);
  }

  #lengthIn(below: Below | null): number {
    return below === null ? 0 : Math.max(0, Math.min(this.#lengthBytes, below.sizeBytes - this.#start));
  }

  #read(i: 0 | 1, below: Below | null, lengthBytes: number): void {
    this.#view(this.#addresses[i], lengthBytes, this.#lengthBytes).fill(0);
    if (lengthBytes === 0) return;
    const io = this.#reads[i];
    io.prepare(IoType.read, this.#start, lengthBytes, 0);
    io.addSegment(this.#addresses[i], lengthBytes);
    io.push(this, 0);
    below!.disk.channel.submit(io);
  }

  #submit(type: IoType, at: number, lengthBytes: number): void {
    this.#io.prepare(type, this.#start + at, lengthBytes, 0);
    if (type === IoType.write) this.#io.addSegment(this.#addresses[0] + at, lengthBytes);
    this.#io.push(this, 0);
    this.#copy.options.target.channel.submit(this.#io);
  }

  #view(address: number, from: number, to: number): Buffer {
    const { buffer, byteOffset } = this.#copy.host.reactor.arena.view8(address + from, to - from);
    return Buffer.from(buffer, byteOffset, to - from);
  }
}
