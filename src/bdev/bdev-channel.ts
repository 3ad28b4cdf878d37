/**
 * The bdev core: every consumer's way into a bdev. It makes any legal request fit what the module below can do, retries what
 * is out of a resource, and counts.
 *
 * A request that fits goes straight through (one push, one call). One that does not is carried out by a SplitJob as a set of
 * child requests: split at limits and boundaries, bounced when memory is misaligned, emulated when the module lacks it.
 *
 * Invariants
 * - Every submitted io completes exactly once, never with `again`.
 * - Requests that a module refused for want of a resource are retried in the order of refusal, ahead of any that came while they
 *   waited. A request refused at once keeps its place.
 * - A reset ends, as aborted, what waits here, and completes when nothing else of the channel is left.
 * - What reaches a module lies within the bdev, is a multiple of its block size and within its limits; writes never reach a
 *   read-only bdev.
 */
import type { Reactor } from '../poller/reactor.js';
import { PollPhase } from '../poller/poller.js';
import type { Poller } from '../poller/poller.js';
import type { Bdev, IoChannel } from './bdev.js';
import { IoQueue, IoStatus, IoType } from './bdev-io.js';
import type { BdevIo, IoOwner } from './bdev-io.js';
import type { IoStats } from './io-stats.js';
import { SplitJobPool } from './split-job.js';

const EINVAL = 22;
const EROFS = 30;
const ECANCELED = 125;
/** A request of a consumer, which is counted; the note of its frame is its start time. */
const OWN = 0;
/** A SplitJob's child, which is not. */
const CHILD = 1;
/** Gives a field that changes double representation from the start. */
const DOUBLE = 0.5;

export class BdevChannel implements IoChannel, IoOwner, Poller {
  readonly bdev: Bdev;
  readonly reactor: Reactor;
  readonly #channel: IoChannel;
  readonly #stats: IoStats;
  readonly #jobs: SplitJobPool;

  // Flattened from bdev: read for every request.
  #sizeBytes = DOUBLE;
  readonly #blockMask: number;
  readonly #memoryMask: number;
  readonly #maxTransferBytes: number;
  readonly #maxSegments: number;
  readonly #boundaryBytes: number;
  readonly #readOnly: boolean;
  readonly #fuaNative: boolean;

  readonly #endWatch: () => void;

  /** Requests handed to the module and not back yet. */
  #below = 0;
  /** Requests that the module refused; they are retried until it takes them. */
  readonly #refused = new IoQueue();
  /** Requests that came while others were refused or retried. */
  readonly #queued = new IoQueue();
  #polling = false;
  #retrying = false;
  #refusedAgain = false;
  /** Resets that are done below. */
  readonly #resets = new IoQueue();

  /** @param readOnly refuse writes whatever the bdev allows: a consumer that holds no claim */
  constructor(bdev: Bdev, reactor: Reactor, stats: IoStats, readOnly = bdev.readOnly) {
    const limits = bdev.limits;
    checkLimits(bdev);
    this.bdev = bdev;
    this.reactor = reactor;
    this.#stats = stats;
    this.#channel = bdev.openChannel(reactor);
    this.#takeSize();
    this.#endWatch = bdev.size.watch(() => this.#takeSize());
    this.#blockMask = bdev.blockSizeBytes - 1;
    this.#memoryMask = limits.memoryAlignmentBytes - 1;
    this.#maxTransferBytes = limits.maxTransferBytes || Infinity;
    this.#maxSegments = limits.maxSegments || Infinity;
    this.#boundaryBytes = limits.boundaryBytes || Infinity;
    this.#readOnly = readOnly;
    this.#fuaNative = bdev.supportsFua;
    this.#jobs = new SplitJobPool(this);
  }

  submit(io: BdevIo): void {
    this.#stats.started();
    io.notes[io.depth] = this.reactor.nowUs;
    io.push(this, OWN);
    switch (io.type) {
      case IoType.read:
      case IoType.write:
        if (this.#fits(io)) this.#toModule(io);
        else this.#takeApart(io);
        return;
      case IoType.flush:
        // A module without a flush keeps nothing back.
        if (this.bdev.supports(IoType.flush)) this.#toModule(io);
        else this.finish(io, IoStatus.success, 0);
        return;
      case IoType.discard:
      case IoType.writeZeroes:
        this.#takeApart(io);
        return;
      case IoType.reset:
        this.#reset(io);
        return;
    }
  }

  /** The way down of a SplitJob's child, which fits by construction. */
  submitChild(child: BdevIo): void {
    child.push(this, CHILD);
    this.#toModule(child);
  }

  onDone(io: BdevIo, frame: number): void {
    this.#below--;
    if (io.status === IoStatus.again) {
      io.push(this, frame);
      this.#putBack(io);
      return;
    }
    if (io.type === IoType.reset) {
      io.push(this, frame);
      this.#resets.append(io);
    } else {
      if (frame === OWN) this.#stats.ended(io, this.reactor);
      io.complete(io.status, io.errno);
    }
    if (this.#refused.length > 0) this.#retry();
    if (this.#resets.length > 0) this.#completeResets();
  }

  /** Answers a request that is not below: it got no further, or a SplitJob has done it. */
  finish(io: BdevIo, status: IoStatus, errno: number): void {
    const frame = io.pop();
    io.status = status;
    if (frame === OWN) this.#stats.ended(io, this.reactor);
    io.complete(status, errno);
  }

  /** Whether no request is in flight. */
  isIdle(): boolean {
    return this.#below === 0 && this.#refused.length === 0 && this.#queued.length === 0 && this.#jobs.active === 0;
  }

  close(): void {
    if (!this.isIdle()) throw new Error(`bdev ${this.bdev.name}: closed with I/O in flight`);
    if (this.#polling) this.reactor.removePoller(this);
    this.#endWatch();
    this.#channel.close();
    this.#jobs.release();
  }

  /** Runs while requests wait: nothing below need ever complete to make the module ready. */
  poll(): boolean {
    if (this.#refused.length > 0) {
      this.#retry();
      return true;
    }
    this.#polling = false;
    this.reactor.removePoller(this);
    return false;
  }

  /** With requests below, their completion wakes the reactor; without, somebody has to ask again. */
  arm(): boolean {
    return this.#refused.length > 0 && this.#below === 0;
  }

  disarm(): void {
    // Nothing was armed.
  }

  #takeSize(): void {
    this.#sizeBytes = this.bdev.blockCount * this.bdev.blockSizeBytes;
  }

  #toModule(io: BdevIo): void {
    if (this.#refused.length > 0 || this.#retrying) {
      this.#queued.append(io);
      return;
    }
    this.#below++;
    this.#channel.submit(io);
  }

  /** The module said `again`. */
  #putBack(io: BdevIo): void {
    this.#refusedAgain = true;
    if (this.#retrying) this.#refused.prepend(io);
    else this.#refused.append(io);
    if (this.#polling) return;
    this.#polling = true;
    this.reactor.addPoller(this, PollPhase.take);
  }

  #retry(): void {
    if (this.#retrying) return;
    this.#retrying = true;
    this.#refusedAgain = false;
    while (!this.#refusedAgain) {
      const io = this.#refused.shift() ?? this.#queued.shift();
      if (io === null) break;
      this.#below++;
      this.#channel.submit(io);
    }
    this.#retrying = false;
  }

  /** Whether a read or write can go to the module as it is. */
  #fits(io: BdevIo): boolean {
    const length = io.lengthBytes;
    const offset = io.offsetBytes;
    if (((offset | length) & this.#blockMask) !== 0 || length === 0 || offset < 0) return false;
    if (offset + length > this.#sizeBytes || length > this.#maxTransferBytes) return false;
    if (io.type === IoType.write && (this.#readOnly || (io.flags !== 0 && !this.#fuaNative))) return false;
    const count = io.segmentCount;
    if (count > this.#maxSegments) return false;
    if (this.#memoryMask !== 0) {
      const addresses = io.segmentAddresses;
      const lengths = io.segmentLengths;
      for (let i = 0; i < count; i++) {
        if (((addresses[i]! | lengths[i]!) & this.#memoryMask) !== 0) return false;
      }
    }
    if (this.#boundaryBytes !== Infinity) {
      const boundary = this.#boundaryBytes;
      if (Math.floor(offset / boundary) !== Math.floor((offset + length - 1) / boundary)) return false;
    }
    return true;
  }

  /** Bad requests, discards, writeZeroes, and reads and writes that do not fit. */
  #takeApart(io: BdevIo): void {
    const offset = io.offsetBytes;
    const length = io.lengthBytes;
    if (((offset | length) & this.#blockMask) !== 0 || !(offset >= 0) || !(offset + length <= this.#sizeBytes)) {
      this.finish(io, IoStatus.ioError, EINVAL);
    } else if (this.#readOnly && io.type !== IoType.read) {
      this.finish(io, IoStatus.ioError, EROFS);
    } else if (length === 0) {
      this.finish(io, IoStatus.success, 0);
    } else if (io.type === IoType.discard && !this.bdev.supports(IoType.discard)) {
      this.finish(io, IoStatus.notSupported, 0);
    } else {
      this.#jobs.start(io);
    }
  }

  /** What waits here ends first, so that it cannot keep the reset from what is held back below. */
  #reset(io: BdevIo): void {
    this.#jobs.abort();
    this.#abort(this.#refused);
    this.#abort(this.#queued);
    if (this.bdev.supports(IoType.reset)) {
      this.#below++;
      this.#channel.submit(io);
    } else {
      this.#resets.append(io);
      this.#completeResets();
    }
  }

  #abort(queue: IoQueue): void {
    for (let left = queue.length; left > 0; left--) {
      const io = queue.shift();
      if (io === null) return;
      this.finish(io, IoStatus.aborted, ECANCELED);
    }
  }

  #completeResets(): void {
    if (!this.isIdle()) return;
    for (let io = this.#resets.shift(); io !== null; io = this.#resets.shift()) this.finish(io, IoStatus.success, 0);
  }
}

/** What splitting relies on: whatever is cut at a limit is whole blocks, and a whole block can be had in aligned memory. */
function checkLimits(bdev: Bdev): void {
  const { maxTransferBytes, boundaryBytes, maxDiscardBytes, maxWriteZeroesBytes, memoryAlignmentBytes } = bdev.limits;
  for (const limit of [maxTransferBytes, boundaryBytes, maxDiscardBytes, maxWriteZeroesBytes]) {
    if (limit % bdev.blockSizeBytes !== 0)
      throw new Error(`bdev ${bdev.name}: its limit ${limit} is not in whole blocks`);
  }
  if (bdev.blockSizeBytes % memoryAlignmentBytes !== 0) {
    throw new Error(`bdev ${bdev.name}: its memory alignment ${memoryAlignmentBytes} is larger than a block`);
  }
}
