/**
 * Filling a new image with what a disk holds: several pieces are read at once, compressed by the threads of the pool where that is asked
 * for, and written one after the other.
 *
 *     slot: read a piece ── look for zeroes ── (compress each unit) ── wait for its turn ── write it ── the next piece
 *
 * Invariants
 * - Pieces are written in the order of the disk, or as they come; what is before the first piece that is not written is settled.
 * - After the first error nothing more is begun; what is in flight comes to its end.
 */
import assert from 'node:assert/strict';
import { native } from '../../../native/index.js';
import type { BdevError, OpenBdev } from '../../bdev/bdev.js';
import { BdevIo, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import { CodecJob, CodecStatus, DEFLATE_LEVEL, ZSTD_LEVEL, compressionOf } from '../../bdev/qcow2/codec/codec-job.js';
import type { CodecOwner } from '../../bdev/qcow2/codec/codec-job.js';
import { ThreadCodecPool } from '../../bdev/qcow2/codec/thread-codec-pool.js';
import { CompressionType } from '../../bdev/qcow2/format.js';
import { PollPhase } from '../../poller/poller.js';
import type { Poller } from '../../poller/poller.js';
import type { CopyRange } from './copy-disk.js';
import { requestError } from './disk-host.js';
import type { DiskHost } from './disk-host.js';
import type { NewImage } from './new-image.js';

/** Threads of the kernel read ahead by so much for each request: enough that a busy machine seldom lets the writer wait. */
const PIECE_BYTES = 2 ** 20;
/** As many jobs as a pool has room for. */
const JOBS_MAX = 256;

export interface FillOptions {
  readonly source: OpenBdev;
  readonly sourcePath: string;
  readonly image: NewImage;
  /** With data, in order, and none twice; they begin with a unit of the image and end with one or with the disk. */
  readonly ranges: Iterable<CopyRange>;
  /** What is looked at for zeroes and compressed at once: the image's unit, or, of what is not compressed, a multiple of it. */
  readonly unitBytes: number;
  /** Whether zeroes are left out. */
  readonly isSparse: boolean;
  /** Type to compress with, or null. */
  readonly compression: CompressionType | null;
  readonly threads: number;
  readonly parallel: number;
  /** Whether pieces are written in the order of the disk. */
  readonly inOrder: boolean;
  /** Called when all before an offset of the disk is written. Throws BdevError. */
  readonly onSettled: (offset: number) => void;
  /** Called with the bytes of the source that are behind. */
  readonly onProgress: (bytes: number) => void;
}

/** Copies. `interrupt` of what `onStart` is given ends it early. Throws BdevError. */
export async function fillImage(
  host: DiskHost,
  options: FillOptions,
  onStart: (interrupt: (error: BdevError) => void) => void,
): Promise<void> {
  const { reactor } = host;
  const pool = options.compression === null ? null : new ThreadCodecPool(reactor, options.threads);
  const fill = new ImageFill(host, options, pool);
  reactor.addPoller(fill, PollPhase.take);
  try {
    onStart((error) => fill.fail(error));
    fill.start();
    while (!fill.isDone) {
      reactor.runSlice();
      // Signals are heard there.
      await new Promise((resolve) => setImmediate(resolve));
    }
    if (fill.error !== null) throw fill.error;
  } finally {
    reactor.removePoller(fill);
    fill.release();
    pool?.close();
  }
}

class ImageFill implements Poller {
  readonly options: FillOptions;
  readonly host: DiskHost;
  readonly pool: ThreadCodecPool | null;
  error: BdevError | null = null;
  readonly #pieceBytes: number;
  readonly #free: Slot[] = [];
  readonly #slots: Slot[] = [];
  /** Under way, in the order of the disk. */
  readonly #queue: Slot[] = [];
  readonly #ranges: Iterator<CopyRange>;
  #range: CopyRange | null = null;
  #at = 0;

  constructor(host: DiskHost, options: FillOptions, pool: ThreadCodecPool | null) {
    this.host = host;
    this.options = options;
    this.pool = pool;
    this.#ranges = options.ranges[Symbol.iterator]();
    const units = Math.max(1, Math.floor(PIECE_BYTES / options.unitBytes));
    const most = pool === null ? units : Math.floor(JOBS_MAX / options.parallel);
    this.#pieceBytes = Math.min(units, most) * options.unitBytes;
    for (let i = 0; i < options.parallel; i++) this.#slots.push(new Slot(this, this.#pieceBytes));
    this.#free.push(...this.#slots);
  }

  get isDone(): boolean {
    return this.#queue.length === 0;
  }

  start(): void {
    while (this.#free.length > 0) {
      const piece = this.#take();
      if (piece === null) break;
      const slot = this.#free.pop()!;
      this.#queue.push(slot);
      slot.start(piece);
    }
    if (this.isDone) this.host.reactor.endSlice();
  }

  /** Writes what has its turn. */
  poll(): boolean {
    const { image, inOrder, onSettled } = this.options;
    let written = 0;
    for (let i = 0; i < this.#queue.length;) {
      const slot = this.#queue[i]!;
      if (slot.isReady) {
        if (this.error === null) this.#attempt(() => slot.writeTo(image));
        this.#queue.splice(i, 1);
        this.#free.push(slot);
        written++;
      } else if (inOrder && this.error === null) break;
      else i++;
    }
    if (written === 0) return false;
    if (this.error === null && this.#queue.length > 0) {
      const { start } = this.#queue[0]!.piece;
      this.#attempt(() => {
        image.settle(start);
        onSettled(start);
      });
    }
    this.start();
    return true;
  }

  fail(error: BdevError): void {
    this.error ??= error;
  }

  release(): void {
    for (const slot of this.#slots) slot.release();
  }

  #attempt(action: () => void): void {
    try {
      action();
    } catch (error) {
      this.fail(error as BdevError);
    }
  }

  /** The next piece, or null when there is none or something went wrong. */
  #take(): CopyRange | null {
    if (this.error !== null) return null;
    while (this.#range === null || this.#at >= this.#range.start + this.#range.lengthBytes) {
      const next = this.#ranges.next();
      if (next.done === true) return null;
      this.#range = next.value;
      this.#at = next.value.start;
    }
    const { start, lengthBytes } = this.#range;
    const most = this.#pieceBytes - (this.#at % this.#pieceBytes);
    const piece = { start: this.#at, lengthBytes: Math.min(most, start + lengthBytes - this.#at), isZero: false };
    this.#at += piece.lengthBytes;
    this.options.onProgress(piece.start);
    return piece;
  }
}

/** What a unit of a piece is. */
const UnitKind = { data: 0, zero: 1, compressed: 2 } as const;
type UnitKind = (typeof UnitKind)[keyof typeof UnitKind];

/** One piece on its way. */
class Slot implements IoOwner, CodecOwner {
  piece: CopyRange = { start: 0, lengthBytes: 0, isZero: false };
  isReady = false;
  readonly #fill: ImageFill;
  readonly #address: number;
  readonly #packed: number;
  readonly #io = new BdevIo();
  /** Of each unit. */
  readonly #kinds: UnitKind[] = [];
  readonly #jobs: CodecJob[] = [];
  #compressing = 0;

  constructor(fill: ImageFill, pieceBytes: number) {
    const { arena } = fill.host.reactor;
    this.#fill = fill;
    this.#address = arena.allocate(pieceBytes);
    this.#packed = fill.pool === null ? -1 : arena.allocate(pieceBytes);
  }

  start(piece: CopyRange): void {
    this.piece = piece;
    this.isReady = false;
    this.#io.prepare(IoType.read, piece.start, piece.lengthBytes, 0);
    this.#io.addSegment(this.#address, piece.lengthBytes);
    this.#io.push(this, 0);
    this.#fill.options.source.channel.submit(this.#io);
  }

  onDone(io: BdevIo): void {
    const { options, error } = this.#fill;
    if (io.status !== IoStatus.success) {
      this.#fill.fail(requestError('read', options.sourcePath, io.offsetBytes, io.errno));
    }
    if (error !== null || io.status !== IoStatus.success) {
      this.isReady = true;
      return;
    }
    const { unitBytes, isSparse, compression } = options;
    const { lengthBytes } = this.piece;
    const units = Math.ceil(lengthBytes / unitBytes);
    const { arena } = this.#fill.host.reactor;
    arena.view8(this.#address + lengthBytes, units * unitBytes - lengthBytes).fill(0);
    const words = arena.view32(this.#address, (units * unitBytes) / 4);
    for (let unit = 0; unit < units; unit++) {
      // Data is seldom zero at its first word: most units cost no call.
      const mayBeZero = isSparse && words[(unit * unitBytes) / 4] === 0;
      const isZero = mayBeZero && native.isZero(arena.baseAddress + this.#address + unit * unitBytes, unitBytes);
      this.#kinds[unit] = isZero ? UnitKind.zero : UnitKind.data;
      if (compression !== null && !isZero) this.#compress(unit, compression);
    }
    this.isReady = this.#compressing === 0;
  }

  onCodecDone(job: CodecJob): void {
    const unit = this.#jobs.indexOf(job);
    this.#kinds[unit] = job.status === CodecStatus.ok ? UnitKind.compressed : UnitKind.data;
    this.#compressing--;
    this.isReady = this.#compressing === 0;
  }

  /** Writes what is not zero. Throws BdevError. */
  writeTo(image: NewImage): void {
    const { unitBytes } = this.#fill.options;
    const { start, lengthBytes } = this.piece;
    const { arena } = this.#fill.host.reactor;
    const units = Math.ceil(lengthBytes / unitBytes);
    for (let unit = 0; unit < units;) {
      const offset = start + unit * unitBytes;
      const kind = this.#kinds[unit];
      let end = unit + 1;
      if (kind === UnitKind.compressed) {
        const packed = arena.view8(this.#packed + unit * unitBytes, this.#jobs[unit]!.producedBytes);
        image.writeCompressed(offset, packed);
      } else if (kind === UnitKind.data) {
        while (end < units && this.#kinds[end] === UnitKind.data) end++;
        image.write(offset, arena.view8(this.#address + unit * unitBytes, (end - unit) * unitBytes));
      } else image.writeZeroes(offset, unitBytes);
      unit = end;
    }
  }

  release(): void {
    const { arena } = this.#fill.host.reactor;
    arena.release(this.#address);
    if (this.#packed >= 0) arena.release(this.#packed);
  }

  /** What does not get smaller is stored as it is. */
  #compress(unit: number, type: CompressionType): void {
    const { unitBytes } = this.#fill.options;
    const job = (this.#jobs[unit] ??= new CodecJob(this));
    job.operation = compressionOf(type);
    job.level = type === CompressionType.zstd ? ZSTD_LEVEL : DEFLATE_LEVEL;
    job.source = this.#address + unit * unitBytes;
    job.sourceBytes = unitBytes;
    job.destination = this.#packed + unit * unitBytes;
    job.capacityBytes = unitBytes - 1;
    this.#compressing++;
    assert(this.#fill.pool!.submit(job), 'a pool has room for all units under way');
  }
}
