/**
 * io_uring as the simulation has it: requests go to simulated disks, take simulated time, and complete in an order of the seed.
 * Readiness of descriptors is raised by whoever causes it.
 *
 * A request takes effect at one moment between submission and completion. A sync covers what was completed when it was submitted.
 */
import {
  EAGAIN,
  ECANCELED,
  EINTR,
  EINVAL,
  EIO,
  ENOSPC,
  EOPNOTSUPP,
  FALLOC_FL_ZERO_RANGE,
  RWF_DSYNC,
  checkObject,
  native,
} from '../../native/index.js';
import type { SeededRandom } from '../../src/poller/clock.js';
import { RING_CQE_MORE } from '../../src/poller/ring.js';
import type { Ring, RingFile, RingOp, RingRange } from '../../src/poller/ring.js';
import { SECTOR_BYTES } from './sim-disk.js';
import type { DirtyWrite, SimDisk, Sync } from './sim-disk.js';
import { StrayAccess } from './sim-process.js';
import type { SimArena } from './sim-process.js';
import type { Timeline } from './timeline.js';
import type { Trace } from './trace.js';

export const RingOpcode = { read: 0, write: 1, sync: 2, allocate: 3 } as const;
export type RingOpcode = (typeof RingOpcode)[keyof typeof RingOpcode];

/**
 * What goes wrong with a request. `flip`, `lose` and `misdirect` make it succeed and be wrong: for modules that promise to notice.
 */
export const FAULTS = ['eio', 'enospc', 'short', 'again', 'interrupted', 'flip', 'lose', 'misdirect'] as const;
export type Fault = (typeof FAULTS)[number];

const FAULT_ERRNO: Partial<Record<Fault, number>> = { eio: EIO, enospc: ENOSPC, again: EAGAIN, interrupted: EINTR };

/** One request of the ring. */
export interface SimRequest {
  readonly opcode: RingOpcode;
  readonly disk: SimDisk;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** RWF_* of a write, mode of an allocation. */
  readonly flags: number;
  /** Arena offsets and lengths, in pairs. */
  readonly pieces: readonly number[];
  readonly slot: number;
  readonly generation: number;
  /** From 1, over the ring's life. */
  number: number;
}

export interface SimRingOptions {
  readonly arena: SimArena;
  readonly timeline: Timeline;
  readonly trace: Trace;
  /** Of disk requests: latency, order, moment of the effect, extent of a failure. */
  readonly random: SeededRandom;
  /** Finds the disk of a file by its inode. */
  readonly diskOf: (inode: number) => SimDisk;
  readonly latencyUs: (request: SimRequest) => number;
  /** Asked once for each request as it is submitted. */
  readonly fault: (request: SimRequest) => Fault | null;
  /** Called when a request completes that failed. */
  readonly failed?: () => void;
  /** Lets the world outside go on until a time; returns early when `enough` says so. May throw to end the daemon. */
  readonly pass: (untilUs: number, enough?: () => boolean) => void;
  /** Time that one step of the reactor takes. */
  readonly stepUs: () => number;
  /** Called before each submission and each completion: the place for a crash. */
  readonly beforeIo: () => void;
  readonly entries: number;
}

interface Completion {
  readonly slot: number;
  readonly generation: number;
  readonly result: number;
  readonly flags: number;
}

/** A request between submission and completion. */
interface Running {
  readonly request: SimRequest;
  /** What it came to, once it has taken effect. */
  outcome: Outcome | null;
}

const NOBODY: RingOp = { onCompletion: () => undefined };
const POLL_ENDS_ONE_IN = 16;
/** Steps without work until time jumps to the next event. */
const IDLE_STEPS_MAX = 8;

export class SimRing implements Ring {
  readonly arena: SimArena;
  inflight = 0;
  /** Disk requests so far. */
  ios = 0;
  readonly #options: SimRingOptions;
  readonly #ops: RingOp[] = [];
  readonly #generations: number[] = [];
  readonly #freeSlots: number[] = [];
  readonly #files: (SimDisk | null)[] = [];
  readonly #buffers: ({ readonly address: number; readonly lengthBytes: number } | null)[] = [];
  /** Slot of the poll by descriptor. */
  readonly #watches = new Map<number, { readonly slot: number; readonly events: number }>();
  /** Descriptors with something to see, and what. */
  readonly #ready = new Map<number, number>();
  #queue: SimRequest[] = [];
  readonly #running = new Set<Running>();
  #posted: Completion[] = [];
  #idleSteps = 0;

  constructor(options: SimRingOptions) {
    this.#options = options;
    this.arena = options.arena;
  }

  attach(op: RingOp): number {
    const slot = this.#freeSlots.pop() ?? this.#ops.length;
    this.#ops[slot] = op;
    this.#generations[slot] = (this.#generations[slot] ?? 0) + 1;
    return slot;
  }

  detach(slot: number): void {
    this.#ops[slot] = NOBODY;
    this.#generations[slot]!++;
    this.#freeSlots.push(slot);
  }

  registerFile(fd: number): RingFile {
    const { inode } = checkObject(native.fileStat(fd), 'stat a file of the ring');
    return this.#files.push(this.#options.diskOf(inode)) - 1;
  }

  unregisterFile(file: RingFile): void {
    this.#files[file] = null;
  }

  read(slot: number, file: RingFile, range: RingRange, flags: number): boolean {
    return this.#take(RingOpcode.read, slot, file, range.offsetBytes, range.lengthBytes, flags, [
      range.address,
      range.lengthBytes,
    ]);
  }

  write(slot: number, file: RingFile, range: RingRange, flags: number): boolean {
    return this.#take(RingOpcode.write, slot, file, range.offsetBytes, range.lengthBytes, flags, [
      range.address,
      range.lengthBytes,
    ]);
  }

  readv(slot: number, file: RingFile, range: RingRange, count: number, flags: number): boolean {
    const pieces = this.#pieces(range.address, count);
    return this.#take(RingOpcode.read, slot, file, range.offsetBytes, sumOf(pieces), flags, pieces);
  }

  writev(slot: number, file: RingFile, range: RingRange, count: number, flags: number): boolean {
    const pieces = this.#pieces(range.address, count);
    return this.#take(RingOpcode.write, slot, file, range.offsetBytes, sumOf(pieces), flags, pieces);
  }

  readFixed(slot: number, file: RingFile, range: RingRange, buffer: number): boolean {
    this.#checkBuffer(buffer, range.address, range.lengthBytes);
    return this.read(slot, file, range, 0);
  }

  writeFixed(slot: number, file: RingFile, range: RingRange, flags: number, buffer: number): boolean {
    this.#checkBuffer(buffer, range.address, range.lengthBytes);
    return this.write(slot, file, range, flags);
  }

  fdatasync(slot: number, file: RingFile): boolean {
    return this.#take(RingOpcode.sync, slot, file, 0, 0, 0, []);
  }

  fallocate(slot: number, file: RingFile, range: RingRange, mode: number): boolean {
    return this.#take(RingOpcode.allocate, slot, file, range.offsetBytes, range.lengthBytes, mode, []);
  }

  poll(slot: number, fd: number, events: number): boolean {
    this.#watches.set(fd, { slot, events });
    this.#tellReady(fd);
    return true;
  }

  cancelPoll(slot: number): boolean {
    for (const [fd, watch] of this.#watches) if (watch.slot === slot) this.#watches.delete(fd);
    this.#post(slot, this.#generations[slot]!, -ECANCELED, 0);
    return true;
  }

  /** Something happened to a descriptor: events of poll(2) that hold from now on. */
  raise(fd: number, events: number): void {
    this.#options.trace.add(this.#options.timeline.nowUs(), 'ready', events);
    this.#ready.set(fd, (this.#ready.get(fd) ?? 0) | events);
    this.#tellReady(fd);
  }

  /** The descriptor is closed. */
  forget(fd: number): void {
    this.#ready.delete(fd);
  }

  registerBuffer(address: number, lengthBytes: number): number {
    return this.#buffers.push({ address, lengthBytes }) - 1;
  }

  unregisterBuffer(index: number): void {
    this.#buffers[index] = null;
  }

  enter(): void {
    this.#submitAll();
    const { timeline } = this.#options;
    const untilUs = timeline.nowUs() + this.#options.stepUs();
    // A reactor that spins would spin for thousands of steps.
    const isIdle = ++this.#idleSteps > IDLE_STEPS_MAX;
    this.#pass(isIdle ? Math.max(untilUs, timeline.nextDueUs) : untilUs);
  }

  wait(timeoutUs: number): boolean {
    const { timeline, trace } = this.#options;
    this.#submitAll();
    trace.add(timeline.nowUs(), 'sleep', timeoutUs);
    if (this.#posted.length === 0) this.#pass(timeline.nowUs() + timeoutUs, () => this.#posted.length > 0);
    return this.#posted.length > 0;
  }

  reap(): number {
    const posted = this.#posted;
    if (posted.length === 0) return 0;
    this.#posted = [];
    this.#idleSteps = 0;
    for (const { slot, generation, result, flags } of posted) {
      if (generation === this.#generations[slot]) this.#ops[slot]!.onCompletion(result, flags);
    }
    return posted.length;
  }

  close(): void {
    // Holds nothing.
  }

  /**
   * The process has died: decides what becomes of the requests that were with the kernel.
   * @param part how many of the first sectors of a change still happen
   */
  abandon(part = (sectors: number) => this.#anyPart(sectors)): void {
    const { trace, timeline } = this.#options;
    for (const running of this.#running) {
      const { request } = running;
      const isChange = request.opcode === RingOpcode.write || request.opcode === RingOpcode.allocate;
      if (running.outcome === null && isChange) {
        const sectors = Math.ceil(request.lengthBytes / SECTOR_BYTES);
        const done = part(sectors);
        trace.add(timeline.nowUs(), 'abandon', request.number, done);
        running.outcome = { result: 0, write: this.#change(request, done * SECTOR_BYTES) };
      }
      if (running.outcome?.write) running.outcome.write.completed = true;
    }
    this.#running.clear();
  }

  #anyPart(sectors: number): number {
    const { random } = this.#options;
    return [0, sectors, random.below(sectors + 1)][random.below(3)]!;
  }

  #pass(untilUs: number, enough?: () => boolean): void {
    this.#options.pass(untilUs, enough);
  }

  #take(
    opcode: RingOpcode,
    slot: number,
    file: RingFile,
    offsetBytes: number,
    lengthBytes: number,
    flags: number,
    pieces: readonly number[],
  ): boolean {
    if (this.#queue.length === this.#options.entries) return false;
    const disk = this.#files[file];
    if (disk === undefined || disk === null) throw new Error(`sim ring: file ${file} is not registered`);
    const generation = this.#generations[slot]!;
    this.#queue.push({ opcode, disk, offsetBytes, lengthBytes, flags, pieces, slot, generation, number: 0 });
    this.inflight++;
    return true;
  }

  /** Reads `count` struct iovec, as the kernel does when it is given them. */
  #pieces(iovecAddress: number, count: number): number[] {
    const words = this.arena.view32(iovecAddress, 4 * count);
    const pieces: number[] = [];
    for (let at = 0; at < words.length; at += 4) {
      pieces.push(words[at]! + words[at + 1]! * 2 ** 32 - this.arena.baseAddress, words[at + 2]!);
    }
    return pieces;
  }

  #checkBuffer(index: number, address: number, lengthBytes: number): void {
    const buffer = this.#buffers[index] ?? null;
    if (buffer === null || address < buffer.address || address + lengthBytes > buffer.address + buffer.lengthBytes) {
      throw new StrayAccess(`a fixed buffer ${index} that is not registered there`);
    }
  }

  #submitAll(): void {
    const queue = this.#queue;
    if (queue.length === 0) return;
    this.#queue = [];
    this.#idleSteps = 0;
    for (const request of queue) this.#submit(request);
  }

  #submit(request: SimRequest): void {
    const { timeline, trace, random } = this.#options;
    this.#options.beforeIo();
    request.number = ++this.ios;
    const { opcode, offsetBytes, lengthBytes, flags, disk } = request;
    trace.add(timeline.nowUs(), 'submit', opcode, offsetBytes, lengthBytes, flags, request.number);
    const fault = this.#options.fault(request);
    if (fault !== null) trace.add(timeline.nowUs(), 'fault', request.number, FAULTS.indexOf(fault));
    const running: Running = { request, outcome: null };
    this.#running.add(running);
    const sync = opcode === RingOpcode.sync ? disk.beginSync(random) : null;
    const latencyUs = this.#options.latencyUs(request);
    const effectUs = [0, latencyUs, latencyUs * random.next()][random.below(3)]!;
    const takeEffect = (): void => {
      if (running.outcome !== null || !this.#running.has(running)) return;
      trace.add(timeline.nowUs(), 'effect', request.number);
      running.outcome = this.#perform(request, fault);
    };
    if (effectUs < latencyUs) timeline.after(effectUs, takeEffect);
    timeline.after(latencyUs, () => {
      if (!this.#running.has(running)) return;
      takeEffect();
      this.#options.beforeIo();
      this.#running.delete(running);
      this.#finish(request, running.outcome!, sync);
    });
  }

  #finish(request: SimRequest, outcome: Outcome, sync: Sync | null): void {
    const { timeline, trace } = this.#options;
    if (sync !== null && outcome.result === 0) request.disk.endSync(sync);
    if (outcome.write !== null) {
      outcome.write.completed = true;
      const isSynchronous = request.opcode === RingOpcode.write && (request.flags & RWF_DSYNC) !== 0;
      if (isSynchronous && outcome.result >= 0) request.disk.harden(outcome.write);
    }
    if (outcome.result < 0) this.#options.failed?.();
    this.inflight--;
    trace.add(timeline.nowUs(), 'done', request.number, outcome.result);
    this.#post(request.slot, request.generation, outcome.result, 0);
  }

  /** Moves the data and says what the system call would return. */
  #perform(request: SimRequest, fault: Fault | null): Outcome {
    const { random } = this.#options;
    const { opcode, disk, lengthBytes, offsetBytes } = request;
    const errno = fault === null ? undefined : FAULT_ERRNO[fault];
    if (opcode === RingOpcode.sync) return { result: errno === undefined ? 0 : -errno, write: null };
    if (opcode === RingOpcode.allocate && (request.flags & FALLOC_FL_ZERO_RANGE) !== 0 && !disk.canZeroRange) {
      return { result: -EOPNOTSUPP, write: null };
    }
    if (offsetBytes < 0 || offsetBytes % SECTOR_BYTES !== 0) return { result: -EINVAL, write: null };
    const there = Math.max(0, Math.min(lengthBytes, disk.fileBytes - offsetBytes));
    const sectors = there / SECTOR_BYTES;
    if (errno !== undefined) {
      // Part of it may have happened before it failed.
      const part = fault === 'eio' || fault === 'enospc' ? random.below(sectors + 1) * SECTOR_BYTES : 0;
      return { result: -errno, write: this.#transfer(request, part, fault) };
    }
    const isTransfer = opcode !== RingOpcode.allocate;
    const done =
      fault === 'short' && isTransfer && sectors > 1 ? (1 + random.below(sectors - 1)) * SECTOR_BYTES : there;
    const write = this.#transfer(request, done, fault);
    return { result: isTransfer ? done : 0, write };
  }

  #transfer(request: SimRequest, lengthBytes: number, fault: Fault | null): DirtyWrite | null {
    if (request.opcode !== RingOpcode.read) return fault === 'lose' ? null : this.#change(request, lengthBytes, fault);
    const { view } = request.disk;
    let at = request.offsetBytes;
    let left = lengthBytes;
    for (let i = 0; left > 0; i += 2) {
      const length = Math.min(left, request.pieces[i + 1]!);
      this.#memory(request.pieces[i]!, length).set(view.subarray(at, at + length));
      at += length;
      left -= length;
    }
    if (fault === 'flip') this.#memory(request.pieces[0]!, 1)[0]! ^= 1 << this.#options.random.below(8);
    return null;
  }

  /** The first bytes of a write or a zeroing reach the disk's cache. */
  #change(request: SimRequest, lengthBytes: number, fault: Fault | null = null): DirtyWrite | null {
    if (lengthBytes === 0) return null;
    const { disk } = request;
    let offset = request.offsetBytes;
    if (fault === 'misdirect') {
      offset = this.#options.random.below((disk.sizeBytes - lengthBytes) / SECTOR_BYTES + 1) * SECTOR_BYTES;
    }
    if (request.opcode === RingOpcode.allocate) return disk.write(offset, lengthBytes, null);
    const bytes = new Uint8Array(lengthBytes);
    for (let i = 0, at = 0; at < lengthBytes; i += 2) {
      const length = Math.min(lengthBytes - at, request.pieces[i + 1]!);
      bytes.set(this.#memory(request.pieces[i]!, length), at);
      at += length;
    }
    if (fault === 'flip') bytes[this.#options.random.below(lengthBytes)]! ^= 1 << this.#options.random.below(8);
    return disk.write(offset, lengthBytes, bytes);
  }

  #memory(address: number, lengthBytes: number): Uint8Array {
    if (!this.arena.holds(address, lengthBytes)) throw new StrayAccess('a request to memory that is not mapped');
    // The kernel's stores are none of the daemon's.
    return new Uint8Array(this.arena.buffer, address, lengthBytes);
  }

  #tellReady(fd: number): void {
    const watch = this.#watches.get(fd);
    if (watch === undefined) return;
    // POLLHUP is told whether it was asked for or not.
    const events = (this.#ready.get(fd) ?? 0) & (watch.events | 16);
    if (events === 0) return;
    // The kernel ends a multishot poll when it likes.
    const isLast = this.#options.random.below(POLL_ENDS_ONE_IN) === 0;
    if (isLast) this.#watches.delete(fd);
    this.#post(watch.slot, this.#generations[watch.slot]!, events, isLast ? 0 : RING_CQE_MORE);
  }

  #post(slot: number, generation: number, result: number, flags: number): void {
    this.#posted.push({ slot, generation, result, flags });
  }
}

/** What a request came to. */
interface Outcome {
  readonly result: number;
  readonly write: DirtyWrite | null;
}

function sumOf(pieces: readonly number[]): number {
  let sum = 0;
  for (let i = 1; i < pieces.length; i += 2) sum += pieces[i]!;
  return sum;
}
