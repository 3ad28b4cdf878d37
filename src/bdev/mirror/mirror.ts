/**
 * A mirror: everything a consumer's disk holds is copied to another bdev while the consumer goes on, and kept the same on both from then
 * on; in the end the consumer may be moved over.
 *
 *     copying <-> ready -> pivoted | cancelled | failed
 *
 * Invariants
 * - The consumer's requests never fail because of the target, and are answered whatever becomes of it.
 * - A pivot is in two steps, between which no request is under way and both legs are the same and durable: whoever writes down between
 *   them that the target is the disk now loses nothing, whichever of the two is opened next.
 * - After the end, but for a pivot, nothing more is written to the target.
 */
import { native } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, BdevUser, OpenBdev } from '../bdev.js';
import { IO_TYPE_NAMES, IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { Job } from '../job.js';
import type { BdevRegistry } from '../registry.js';
import { runOnReactor, startTask } from '../task.js';
import type { Task, Waiter } from '../task.js';
import { CopyIo, Until } from './copy-io.js';
import { DirtyMap } from './dirty-map.js';
import { MirrorChannel } from './mirror-channel.js';

const CHUNK_BYTES = 2 ** 20;
/** Of a disk of 256 TiB; the map takes 32 MiB then. */
const CHUNKS_MAX = 2 ** 28;
/** How long a pivot waits for the copying, and how long requests are held for it at most. */
const CATCH_UP_US = 10e6;
const HOLD_US = 5e6;
/** With so few chunks to be copied again requests are held until they are. */
const HOLD_CHUNKS_MAX = 16;

export type MirrorState = 'copying' | 'ready' | 'pivoted' | 'cancelled' | 'failed';

export interface MirrorInfo {
  readonly source: string;
  readonly target: string;
  readonly state: MirrorState;
  /** Of the disk, so much is the same on both. */
  readonly doneBytes: number;
  readonly totalBytes: number;
  readonly bytesPerSecond: number;
  /** Why it failed. */
  readonly error?: string;
}

export interface MirrorOptions {
  readonly user: BdevUser;
  readonly registry: BdevRegistry;
  readonly reactor: Reactor;
  /** Name of a bdev that nobody else uses. */
  readonly target: string;
  /** 0: no limit. */
  readonly bytesPerSecond: number;
  /** What is copied at a time, whole blocks. Default 1 MiB; less for tests. */
  readonly chunkBytes?: number;
  /** It is over, and lets go of what it used; not told of a pivot. */
  readonly onEnd?: (info: MirrorInfo) => void;
}

export class Mirror {
  readonly #user: BdevUser;
  readonly #reactor: Reactor;
  readonly #source: OpenBdev;
  readonly #target: OpenBdev;
  readonly #channel: MirrorChannel;
  readonly #map: DirtyMap;
  readonly #sizeBytes: number;
  readonly #chunkBytes: number;
  readonly #job: Job;
  readonly #bytesPerSecond: number;
  readonly #onEnd: (info: MirrorInfo) => void;
  readonly #unpin: (() => void)[] = [];
  #state: 'active' | 'pivoted' | 'cancelled' | 'failed' = 'active';
  #error: string | null = null;
  /** The copying has nothing to do, and waits for something to be soiled. */
  #idleCopier: Waiter | null = null;
  #isCopying = true;
  #wasInStep = false;
  #isPivoting = false;
  #isOver = false;

  /** Starts. Throws BdevError when the target cannot take the place of the disk. */
  constructor(options: MirrorOptions) {
    const { user, registry, reactor, bytesPerSecond } = options;
    this.#user = user;
    this.#reactor = reactor;
    this.#source = user.open;
    this.#bytesPerSecond = bytesPerSecond;
    this.#chunkBytes = options.chunkBytes ?? CHUNK_BYTES;
    this.#onEnd = options.onEnd ?? (() => undefined);
    const { bdev } = this.#source;
    this.#sizeBytes = bdev.blockCount * bdev.blockSizeBytes;
    if (registry.writerOf(bdev.name) !== user.name) {
      throw new BdevError('read-only', 'name', `${user.name} only reads ${bdev.name}`, 'mirror a disk that it writes');
    }
    const target = registry.get(options.target);
    if (target !== undefined) checkTarget(bdev, target, this.#sizeBytes);
    this.#target = registry.open(options.target, user.name, 'target');
    this.#map = new DirtyMap(Math.ceil(this.#sizeBytes / this.#chunkBytes));
    this.#job = new Job('mirror', this.#sizeBytes, reactor, bytesPerSecond);
    this.#channel = new MirrorChannel({
      arena: reactor.arena,
      source: this.#source.channel,
      target: this.#target.channel,
      map: this.#map,
      chunkBytes: this.#chunkBytes,
      blockSizeBytes: bdev.blockSizeBytes,
      sizeBytes: this.#sizeBytes,
      onTargetFailure: (io) => this.#end('failed', describeFailure(io, this.#target.bdev)),
      onSoiled: () => this.#wakeCopier(),
    });
    for (const { bdev: leg } of [this.#source, this.#target]) {
      this.#unpin.push(leg.size.pin(`${bdev.name} is mirrored to ${this.#target.bdev.name}`));
    }
    // What came before is not known to the channel: nothing is copied until it is done.
    this.#channel.hold();
    user.route(this.#channel);
    startTask(this.#run(), () => undefined, rethrow);
  }

  get isActive(): boolean {
    return this.#state === 'active';
  }

  get isPivoting(): boolean {
    return this.#isPivoting;
  }

  /** It has let go of all that it used. */
  get isOver(): boolean {
    return this.#isOver;
  }

  get info(): MirrorInfo {
    const doneBytes = Math.max(0, this.#sizeBytes - this.#map.dirtyCount * this.#chunkBytes);
    const isInStep = this.#idleCopier !== null && this.#map.dirtyCount === 0;
    return {
      source: this.#source.bdev.name,
      target: this.#target.bdev.name,
      state: this.#state === 'active' ? (isInStep ? 'ready' : 'copying') : this.#state,
      doneBytes,
      totalBytes: this.#sizeBytes,
      bytesPerSecond: this.#bytesPerSecond,
      ...(this.#error === null ? {} : { error: this.#error }),
    };
  }

  /** Whether what `bdev` holds may change only by requests of the consumer, as it is a part of either leg. */
  involves(bdev: Bdev): boolean {
    return !this.#isOver && [this.#source.bdev, this.#target.bdev].some((leg) => stands(leg, bdev));
  }

  /** Ends it; the source goes on. Resolves when nothing more is written to the target. Rejects with BdevError during a pivot. */
  async cancel(): Promise<void> {
    if (this.#isPivoting) throw this.#busy('it is being pivoted');
    this.#end('cancelled', null);
    await runOnReactor(this.#reactor, this.#over());
  }

  /**
   * The first step of a pivot: from when it resolves until the second one the consumer's requests are held, and both legs are the same,
   * the target durable. Rejects with BdevError, and then everything goes on.
   */
  preparePivot(): Promise<void> {
    return runOnReactor(this.#reactor, this.prepare());
  }

  /** The same as a task. */
  *prepare(): Task<void> {
    if (!this.isActive) throw new BdevError('no-mirror', 'name', `the mirror is ${this.#state}`, 'start another one');
    if (!this.#wasInStep) throw new BdevError('not-ready', 'name', 'not all is copied yet', 'wait until it is ready');
    if (this.#isPivoting) throw this.#busy('it is being pivoted already');
    yield* this.#prepare();
  }

  /** The second step: the consumer uses the target from now on. */
  commitPivot(): void {
    this.#state = 'pivoted';
    this.#isPivoting = false;
    this.#job.cancel();
    this.#user.moveTo(this.#target);
    this.#wakeCopier();
    this.#source.close();
    this.#letGo();
    this.#channel.release(this.#target.channel);
  }

  /** Instead of the second step: all goes on as before. */
  abortPivot(): void {
    this.#isPivoting = false;
    this.#job.setPace(this.#bytesPerSecond);
    this.#channel.release(this.#channel);
  }

  // ---- Copying

  *#run(): Task<void> {
    const isTooLong = this.#deadline(HOLD_US);
    yield new Until(this.#reactor, () => !this.isActive || this.#source.isIdle() || isTooLong());
    if (this.#source.isIdle()) this.#channel.release(this.#channel);
    else this.#end('failed', 'the requests that came before it did not end in time');
    const buffer = this.#reactor.arena.allocate(this.#chunkBytes);
    const copy = new CopyIo();
    try {
      let chunk = 0;
      while (this.isActive) {
        chunk = this.#map.next(chunk);
        if (chunk < 0) {
          chunk = 0;
          this.#wasInStep = true;
          yield { begin: (waiter) => void (this.#idleCopier = waiter) };
        } else {
          yield* this.#copy(chunk, copy, buffer);
        }
      }
    } catch (error) {
      // Whoever ended the job has said why.
      if (!(error instanceof BdevError)) throw error;
    } finally {
      this.#reactor.arena.release(buffer);
    }
    this.#isCopying = false;
  }

  /** Copies a chunk, or not when it is to be tried again. Throws BdevError when the job is cancelled. */
  *#copy(chunk: number, copy: CopyIo, buffer: number): Task<void> {
    const channel = this.#channel;
    const offset = chunk * this.#chunkBytes;
    const length = Math.min(this.#chunkBytes, this.#sizeBytes - offset);
    if (channel.isResetting) yield new Until(this.#reactor, () => !channel.isResetting);
    yield channel.lock(chunk);
    if (this.isActive && !channel.isResetting) {
      yield copy.run(channel.source, IoType.read, offset, length, buffer);
      if (this.#mayGoOn(copy.io, this.#source.bdev)) {
        const isZero = native.isZero(this.#reactor.arena.baseAddress + buffer, length);
        const type = isZero ? IoType.writeZeroes : IoType.write;
        yield copy.run(channel.target, type, offset, length, isZero ? 0 : buffer);
        if (this.#mayGoOn(copy.io, this.#target.bdev)) this.#map.clean(chunk);
      }
    }
    channel.unlock();
    if (!this.#map.isDirty(chunk)) yield* this.#job.advance(length);
  }

  /** What became of a request of the copying; one that fails ends the job. */
  #mayGoOn(io: BdevIo, bdev: Bdev): boolean {
    const isAborted = io.status === IoStatus.aborted;
    if (io.status !== IoStatus.success && !isAborted) this.#end('failed', describeFailure(io, bdev));
    return this.isActive && !isAborted && !this.#channel.isResetting;
  }

  #wakeCopier(): void {
    const copier = this.#idleCopier;
    this.#idleCopier = null;
    copier?.wake();
  }

  // ---- The end

  #end(state: 'cancelled' | 'failed', error: string | null): void {
    if (!this.isActive) return;
    this.#state = state;
    this.#error = error;
    this.#user.route(this.#source.channel);
    this.#job.cancel();
    this.#channel.detach();
    // With the target given up that is the way to the source.
    this.#channel.release(this.#channel);
    this.#wakeCopier();
    // This may be in the middle of a completion of the target.
    this.#reactor.defer(() => startTask(this.#windUp(), () => undefined, rethrow));
  }

  /** Waits until the target has nothing more of it, and lets go of it. */
  *#windUp(): Task<void> {
    // What is held back there ends now, and what is not takes as long as it takes.
    yield new CopyIo().run(this.#target.channel, IoType.reset, 0, 0, 0);
    yield new Until(this.#reactor, () => !this.#isCopying && this.#channel.isQuiet && this.#target.isIdle());
    this.#target.close();
    this.#letGo();
    this.#onEnd(this.info);
  }

  #letGo(): void {
    this.#channel.close();
    for (const unpin of this.#unpin) unpin();
    this.#isOver = true;
  }

  *#over(): Task<void> {
    yield new Until(this.#reactor, () => this.#isOver);
  }

  // ---- Pivot

  *#prepare(): Task<void> {
    this.#isPivoting = true;
    this.#job.setPace(0);
    const isLate = this.#deadline(CATCH_UP_US);
    yield new Until(this.#reactor, () => !this.isActive || this.#map.dirtyCount <= HOLD_CHUNKS_MAX || isLate());
    if (this.#map.dirtyCount <= HOLD_CHUNKS_MAX) {
      this.#channel.hold();
      const isTooLong = this.#deadline(HOLD_US);
      yield new Until(this.#reactor, () => !this.isActive || this.#isStill() || isTooLong());
      if (this.#isStill()) yield* this.#flushTarget(isTooLong);
    }
    if (this.isActive && this.#isStill()) return;
    this.abortPivot();
    const reason = this.isActive ? 'requests or the copying did not end in time' : `the mirror is ${this.#state}`;
    throw this.#busy(reason);
  }

  /** Both legs are the same, and nothing is under way. */
  #isStill(): boolean {
    const isCopied = this.#idleCopier !== null && this.#map.dirtyCount === 0;
    return this.isActive && isCopied && this.#channel.isQuiet && this.#source.isIdle() && this.#target.isIdle();
  }

  *#flushTarget(isTooLong: () => boolean): Task<void> {
    const flush = new CopyIo();
    flush.submit(this.#target.channel, IoType.flush, 0, 0, 0);
    yield new Until(this.#reactor, () => flush.isDone || isTooLong());
    const { io } = flush;
    if (!flush.isDone) this.#end('failed', `flush of bdev ${this.#target.bdev.name} did not end in time`);
    else if (io.status !== IoStatus.success) this.#end('failed', describeFailure(io, this.#target.bdev));
  }

  #deadline(us: number): () => boolean {
    const endUs = this.#reactor.nowUs + us;
    return () => this.#reactor.nowUs >= endUs;
  }

  #busy(reason: string): BdevError {
    return new BdevError('busy', 'name', `${this.#source.bdev.name} cannot be switched: ${reason}`, 'try again');
  }
}

/** A mistake of ours ends the reactor. */
function rethrow(error: unknown): never {
  throw error;
}

/** Whether `bdev` is `top` or lies below it. */
function stands(top: Bdev, bdev: Bdev): boolean {
  return top === bdev || top.bases.some((base) => stands(base, bdev));
}

function describeFailure(io: BdevIo, bdev: Bdev): string {
  const { type, offsetBytes, lengthBytes, status, errno } = io;
  const words = `${IO_TYPE_NAMES[type]} of ${lengthBytes} bytes at ${offsetBytes} of bdev ${bdev.name}`;
  return status === IoStatus.noSpace ? `${words} failed: no space is left` : `${words} failed: errno ${errno}`;
}

/** Throws BdevError when `target` cannot take the place of `source`, also as a guest sees it. */
function checkTarget(source: Bdev, target: Bdev, sizeBytes: number): void {
  const refuse = (code: string, problem: string, hint: string): never => {
    throw new BdevError(code, 'target', `${target.name} cannot take the place of ${source.name}: ${problem}`, hint);
  };
  if (target === source) refuse('same-bdev', 'it is the same', 'name another bdev');
  if (target.readOnly) refuse('read-only', 'it is only read', 'open it for writing');
  if (target.blockSizeBytes !== source.blockSizeBytes) {
    const blocks = `its blocks are of ${target.blockSizeBytes} bytes, not ${source.blockSizeBytes}`;
    refuse('other-blocks', blocks, 'a guest cannot be told: choose `block_size` alike');
  }
  const targetBytes = target.blockCount * target.blockSizeBytes;
  if (targetBytes < sizeBytes) refuse('too-small', `it has ${targetBytes} bytes, not ${sizeBytes}`, 'make it larger');
  if (sizeBytes > CHUNKS_MAX * CHUNK_BYTES) refuse('too-large', 'the disk is larger than 256 TiB', 'copy it offline');
  for (const type of [IoType.discard, IoType.writeZeroes]) {
    if (!source.supports(type) || target.supports(type)) continue;
    refuse('does-less', `it knows no ${IO_TYPE_NAMES[type]}, which the guest was promised`, 'choose other storage');
  }
  if (source.guard !== undefined || target.guard !== undefined) {
    refuse('shared', 'another daemon may write to one of them', 'set `lock: true` on both');
  }
}
