/**
 * Copying from disk to disk: many pieces at once, in any order, and nothing for zeroes where the target has them already.
 *
 *     slot: read a piece ── look for zeroes ── write what is between them, run after run ── the next piece
 *
 * Invariants
 * - A piece ends where a unit of the target ends, so that its clusters are written whole as far as the source allows.
 * - After the first error nothing more is begun; what is in flight comes to its end.
 */
import { native } from '../../../native/index.js';
import type { BdevError, OpenBdev } from '../../bdev/bdev.js';
import { BdevIo, IoFlag, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import { requestError } from './disk-host.js';
import type { DiskHost } from './disk-host.js';

const PIECE_BYTES = 2 ** 20;
const ZEROES_BYTES = 2 ** 30;

/** A range of the source, in whole units of the target. */
export interface CopyRange {
  readonly start: number;
  readonly lengthBytes: number;
  /** Known to be zero, so that it is not read. */
  readonly isZero: boolean;
}

export interface CopyOptions {
  readonly source: OpenBdev;
  readonly target: OpenBdev;
  readonly sourcePath: string;
  readonly targetPath: string;
  /** In order, and none twice. */
  readonly ranges: Iterable<CopyRange>;
  /** What is taken off each offset of the source for the target. */
  readonly shiftBytes: number;
  /** Zeroes are looked for in units of this, a multiple of 512; 0: all is written as it is. */
  readonly sparseBytes: number;
  /** What is written at once at least: the target's cluster. */
  readonly unitBytes: number;
  /** Whether the target reads as zeroes where nothing is written to it. */
  readonly isTargetZero: boolean;
  readonly parallel: number;
  /** Called with the bytes of the source that are behind. */
  readonly onProgress: (bytes: number) => void;
}

/** Copies, and makes the copy durable. Throws BdevError. */
export function copyDisk(host: DiskHost, options: CopyOptions): void {
  const copy = new DiskCopy(host, options);
  try {
    copy.start();
    host.run(() => copy.isDone);
    if (copy.error !== null) throw copy.error;
    copy.flush();
    host.run(() => copy.isDone);
    if (copy.error !== null) throw copy.error as BdevError;
  } finally {
    copy.release();
  }
}

class DiskCopy {
  readonly options: CopyOptions;
  readonly host: DiskHost;
  readonly pieceBytes: number;
  error: BdevError | null = null;
  readonly #slots: Slot[] = [];
  readonly #ranges: Iterator<CopyRange>;
  #range: CopyRange | null = null;
  #at = 0;
  #running = 0;

  constructor(host: DiskHost, options: CopyOptions) {
    this.host = host;
    this.options = options;
    this.pieceBytes = Math.max(PIECE_BYTES, options.unitBytes);
    this.#ranges = options.ranges[Symbol.iterator]();
    const { arena } = host.reactor;
    for (let i = 0; i < options.parallel; i++) this.#slots.push(new Slot(this, arena.allocate(this.pieceBytes)));
  }

  get isDone(): boolean {
    return this.#running === 0;
  }

  start(): void {
    this.#running = this.#slots.length;
    for (const slot of this.#slots) slot.next();
  }

  flush(): void {
    this.#running = 1;
    this.#slots[0]!.flush();
  }

  /** The next piece, or null when there is none or something went wrong. */
  take(): CopyRange | null {
    if (this.error !== null) return null;
    while (this.#range === null || this.#at >= this.#range.start + this.#range.lengthBytes) {
      const next = this.#ranges.next();
      if (next.done === true) return null;
      this.#range = next.value;
      this.#at = next.value.start;
    }
    const { start, lengthBytes, isZero } = this.#range;
    const most = isZero ? ZEROES_BYTES : this.pieceBytes - (this.#at % this.pieceBytes);
    const piece = { start: this.#at, lengthBytes: Math.min(most, start + lengthBytes - this.#at), isZero };
    this.#at += piece.lengthBytes;
    this.options.onProgress(piece.start);
    return piece;
  }

  stop(): void {
    this.#running--;
  }

  fail(error: BdevError): void {
    this.error ??= error;
  }

  release(): void {
    for (const { address } of this.#slots) this.host.reactor.arena.release(address);
  }
}

/** One piece on its way. */
class Slot implements IoOwner {
  readonly address: number;
  readonly #copy: DiskCopy;
  readonly #io = new BdevIo();
  #piece: CopyRange = { start: 0, lengthBytes: 0, isZero: true };
  /** How much of the piece is written or known to need no writing. */
  #done = 0;
  #isReading = false;
  #isLast = false;

  constructor(copy: DiskCopy, address: number) {
    this.#copy = copy;
    this.address = address;
  }

  /** Begins pieces until one of them has to be waited for. */
  next(): void {
    const { source, isTargetZero } = this.#copy.options;
    for (;;) {
      const piece = this.#copy.take();
      if (piece === null) {
        this.#copy.stop();
        return;
      }
      this.#piece = piece;
      this.#done = 0;
      if (piece.isZero && isTargetZero) continue;
      if (piece.isZero) {
        this.#submit(IoType.writeZeroes, 0, piece.lengthBytes);
        return;
      }
      this.#isReading = true;
      this.#io.prepare(IoType.read, piece.start, piece.lengthBytes, 0);
      this.#io.addSegment(this.address, piece.lengthBytes);
      this.#io.push(this, 0);
      source.channel.submit(this.#io);
      return;
    }
  }

  /** The last request, when nothing else is left. */
  flush(): void {
    this.#isLast = true;
    this.#io.prepare(IoType.flush, 0, 0, 0);
    this.#io.push(this, 0);
    this.#copy.options.target.channel.submit(this.#io);
  }

  onDone(io: BdevIo): void {
    const { sourcePath, targetPath } = this.#copy.options;
    if (io.status !== IoStatus.success) {
      const path = this.#isReading ? sourcePath : targetPath;
      this.#copy.fail(requestError(this.#isReading ? 'read' : 'write', path, io.offsetBytes, io.errno));
    }
    if (this.#copy.error !== null || this.#isLast) {
      this.#copy.stop();
      return;
    }
    if (!this.#isReading) this.#done += io.lengthBytes;
    this.#isReading = false;
    // Not from within the completion: a disk that answers at once would nest them without end.
    this.#copy.host.reactor.defer(() => this.#goOn());
  }

  /** Writes the next run of the piece. */
  #goOn(): void {
    const { sparseBytes, unitBytes, isTargetZero } = this.#copy.options;
    const { lengthBytes } = this.#piece;
    while (this.#done < lengthBytes) {
      const unit = sparseBytes === 0 ? lengthBytes : Math.max(sparseBytes, Math.min(unitBytes, lengthBytes));
      const isZero = sparseBytes > 0 && this.#isZero(this.#done, unit);
      let end = this.#done + unit;
      while (end < lengthBytes && sparseBytes > 0 && this.#isZero(end, unit) === isZero) end += unit;
      end = Math.min(end, lengthBytes);
      if (isZero && isTargetZero) {
        this.#done = end;
        continue;
      }
      this.#submit(isZero ? IoType.writeZeroes : IoType.write, this.#done, end - this.#done);
      return;
    }
    this.next();
  }

  #submit(type: IoType, at: number, lengthBytes: number): void {
    const { target, shiftBytes } = this.#copy.options;
    const flags = type === IoType.writeZeroes ? IoFlag.unmap : 0;
    this.#io.prepare(type, this.#piece.start + at - shiftBytes, lengthBytes, flags);
    if (type === IoType.write) this.#io.addSegment(this.address + at, lengthBytes);
    this.#io.push(this, 0);
    target.channel.submit(this.#io);
  }

  #isZero(at: number, unit: number): boolean {
    const lengthBytes = Math.min(unit, this.#piece.lengthBytes - at);
    return native.isZero(this.#copy.host.reactor.arena.baseAddress + this.address + at, lengthBytes);
  }
}

/** A part of a disk: with data, of zeroes, or, null, one that is to be left as the target has it. */
export interface DiskPart {
  readonly start: number;
  readonly lengthBytes: number;
  readonly isZero: boolean | null;
}

/** The ranges with data, in whole units of a target that has zeroes elsewhere. @param end of the disk */
export function* dataRanges(parts: Iterable<DiskPart>, unitBytes: number, end: number): Generator<CopyRange> {
  let from = 0;
  let to = 0;
  for (const { start, lengthBytes, isZero } of parts) {
    if (isZero !== false) continue;
    const first = Math.max(Math.floor(start / unitBytes) * unitBytes, to);
    const last = Math.min(Math.ceil((start + lengthBytes) / unitBytes) * unitBytes, end);
    if (first > to) {
      if (to > from) yield { start: from, lengthBytes: to - from, isZero: false };
      from = first;
    }
    to = Math.max(to, last);
  }
  if (to > from) yield { start: from, lengthBytes: to - from, isZero: false };
}

/** All ranges but those that the target keeps. */
export function* allRanges(parts: Iterable<DiskPart>): Generator<CopyRange> {
  for (const { start, lengthBytes, isZero } of parts) if (isZero !== null) yield { start, lengthBytes, isZero };
}
