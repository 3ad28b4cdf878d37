/**
 * The simulated guest: a driver with requests of its own choosing on real rings, who knows at every answer what it may be.
 *
 * Invariants
 * - Nothing is done but in `tick`, which takes no simulated time.
 * - The memory of a request is its slot's; what lies around its buffers must not change.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { SeededRandom } from '../../src/poller/clock.js';
import {
  Feature,
  ID_BYTES,
  RANGE_BYTES,
  REQUEST_HEADER_BYTES,
  RequestType as WireType,
  SECTOR_BYTES,
  STATUS_UNANSWERED,
  Status,
} from '../frontend/protocol.js';
import type { DriverRing, Piece } from './driver-ring.js';
import { GuestRam } from './guest-ram.js';
import { Violation } from './oracle.js';
import type { Change, Oracle } from './oracle.js';
import { PackedRing } from './packed-ring.js';
import type { RequestAction, Setup } from './plan.js';
import { SplitRing } from './split-ring.js';

export interface GuestWorld {
  nowUs(): number;
  /** Requests that began by then may be answered by an error. */
  faultyUs(): number;
  /** The daemon sees a kick. */
  kicked(kickFd: number): void;
  trace(kind: 'request' | 'answer' | 'kick' | 'call', ...numbers: readonly number[]): void;
}

export const SERIAL = 'simulated-disk';
const REQUEST_SECTORS_MAX = 32;
const RANGES_MAX = 4;
/** Pieces of a request: header, data and status, each cut a few times. */
const CUTS_MAX = 6;
const PIECES_MAX = 2 * (CUTS_MAX + 2);
const GAP_BYTES_MAX = 64;
const TABLE_BYTES = PIECES_MAX * 16;
const SLOT_BYTES =
  TABLE_BYTES + REQUEST_HEADER_BYTES + REQUEST_SECTORS_MAX * SECTOR_BYTES + 2 * PIECES_MAX * GAP_BYTES_MAX;
const GUARD = 0xa5;
const RING_BYTES = 4096;
/** A request that is not answered in this time was lost. Less than a reactor sleeps at most, more than anything takes. */
const ANSWER_MAX_US = 400_000;
const TYPE_NUMBERS = { ...WireType, wrong: 99 };

/** A request in flight and the memory that it uses. */
interface Slot {
  readonly index: number;
  /** Guest address. */
  readonly memory: number;
  /** Its memory comes and goes. */
  readonly isExtra: boolean;
  action: RequestAction | null;
  id: number;
  pieces: readonly Piece[];
  /** Bytes of the memory that are used, the table first. */
  usedMemoryBytes: number;
  /** Device-writable bytes without the status. */
  inBytes: number;
  changes: Change[];
  /** Moment of the oracle at which it was offered. */
  began: number;
  /** When it was offered; since when the device could work on it. */
  offeredUs: number;
  sinceUs: number;
  /** A write that was promised to be durable when it is answered. */
  isDurable: boolean;
  expected: 'ok' | 'ioError' | 'unsupported';
}

export class GuestQueue {
  readonly index: number;
  readonly ring: DriverRing;
  readonly slots: readonly Slot[];
  readonly kickFd = check(native.eventfdCreate(), 'make a kick descriptor');
  readonly errFd = check(native.eventfdCreate(), 'make an error descriptor');
  callFd = check(native.eventfdCreate(), 'make a call descriptor');
  /** The device works on it. */
  isStarted = false;
  /** The front-end has asked where it stopped, and was not answered. */
  isBeingStopped = false;
  /** Calls are not looked at. */
  isMasked = false;

  constructor(index: number, ring: DriverRing, slots: readonly Slot[]) {
    this.index = index;
    this.ring = ring;
    this.slots = slots;
  }

  get inflight(): number {
    return this.slots.reduce((sum, slot) => sum + (slot.action === null ? 0 : 1), 0);
  }

  close(): void {
    for (const fd of [this.kickFd, this.errFd, this.callFd]) native.fileClose(fd);
  }
}

export class SimGuest {
  readonly ram: GuestRam;
  readonly queues: readonly GuestQueue[];
  /** Every write that is offered from now on is durable when it is answered. */
  writesThrough = false;
  /** Requests may use the memory that comes and goes. */
  usesExtra = false;
  /** Some queue may have been called. */
  mayBeCalled = false;
  /** Requests answered, by type. */
  readonly answered: Record<string, number> = {};
  readonly #world: GuestWorld;
  readonly #setup: Setup;
  readonly #oracle: Oracle;
  readonly #canIndirect: boolean;
  readonly #cutsMax: number;
  readonly #gap = new Uint8Array(3 * GAP_BYTES_MAX);
  readonly #scratch = new Uint8Array(REQUEST_HEADER_BYTES + REQUEST_SECTORS_MAX * SECTOR_BYTES);

  constructor(world: GuestWorld, setup: Setup, oracle: Oracle, arena: Arena) {
    this.#world = world;
    this.#setup = setup;
    this.#oracle = oracle;
    this.#canIndirect = !setup.withoutFeatures.includes(Feature.indirectDescriptors);
    // Without tables the longest chain has to fit the ring.
    this.#cutsMax = this.#canIndirect ? CUTS_MAX : Math.min(CUTS_MAX, setup.queueSize / 4);
    const slots = setup.queues * setup.depth;
    const ringBytes = setup.queues * RING_BYTES;
    // The second region begins in the middle of a slot.
    const half = ringBytes + Math.ceil(slots / 2) * SLOT_BYTES - SLOT_BYTES / 2;
    this.ram = new GuestRam(arena, [half, slots * SLOT_BYTES], setup.queues * SLOT_BYTES);
    const eventIdx = !setup.withoutFeatures.includes(Feature.eventIdx);
    const Ring = setup.packed ? PackedRing : SplitRing;
    const rings = Array.from({ length: setup.queues }, () => new Ring(this.ram, setup.queueSize, eventIdx));
    this.queues = rings.map((ring, index) => new GuestQueue(index, ring, this.#makeSlots()));
  }

  get inflight(): number {
    return this.queues.reduce((sum, queue) => sum + queue.inflight, 0);
  }

  /** No request is in the memory that comes and goes. */
  get isExtraFree(): boolean {
    return this.queues.every((queue) => queue.slots.every((slot) => !slot.isExtra || slot.action === null));
  }

  /** Offers a request. False when its queue has no room. */
  submit(action: RequestAction, seed: number): boolean {
    const queue = this.queues[action.queue]!;
    const slot = queue.slots.findLast((one) => one.action === null && (!one.isExtra || this.usesExtra));
    if (slot === undefined) return false;
    const random = new SeededRandom(seed);
    const out = this.#prepare(slot, action, random);
    const inBytes = slot.inBytes + 1;
    const memory = { at: slot.memory + TABLE_BYTES };
    const pieces = [
      ...this.#cut(random, memory, out.length, false, REQUEST_HEADER_BYTES),
      ...this.#cut(random, memory, inBytes, true, inBytes - 1),
    ];
    const isLong = pieces.length > this.#setup.queueSize;
    const isTabled = this.#canIndirect && (isLong || random.below(4) > 0);
    // In a packed ring a table stands alone.
    const tabledFrom = this.#setup.packed ? 0 : [0, 0, 0, 1, 2][random.below(5)]!;
    slot.id = queue.ring.add(pieces, isTabled ? tabledFrom : Infinity, slot.memory);
    if (slot.id < 0) {
      if (queue.inflight === 0) throw new Error('a request that does not fit an empty ring');
      for (const change of slot.changes.reverse()) this.#oracle.withdraw(change);
      return false;
    }
    slot.usedMemoryBytes = memory.at + GAP_BYTES_MAX - slot.memory;
    this.ram.fill(slot.memory + TABLE_BYTES, slot.usedMemoryBytes - TABLE_BYTES, GUARD);
    slot.action = action;
    slot.pieces = pieces;
    scatter(this.ram, pieces, out);
    for (const piece of pieces) if (piece.writable) this.ram.fill(piece.address, piece.lengthBytes, STATUS_UNANSWERED);
    slot.offeredUs = this.#world.nowUs();
    slot.sinceUs = slot.offeredUs;
    slot.isDurable = this.writesThrough;
    const { sector, sectors, type } = action;
    this.#world.trace(
      'request',
      queue.index,
      slot.index,
      TYPE_NUMBERS[type],
      sector,
      sectors,
      slot.changes[0]?.value ?? 0,
    );
    if (queue.ring.publish()) this.#kick(queue);
    return true;
  }

  /** Takes answers. Throws Violation. */
  harvest(): void {
    if (this.#setup.isCalled && !this.mayBeCalled) return;
    this.mayBeCalled = false;
    for (const queue of this.queues) {
      if (this.#setup.isCalled) {
        if (queue.isMasked || native.eventfdDrain(queue.callFd) === 0) continue;
        this.#world.trace('call', queue.index);
      }
      this.take(queue);
    }
  }

  /** Takes the answers of a queue, called or not. */
  take(queue: GuestQueue): void {
    do {
      while (queue.ring.takeUsed()) this.#answer(queue);
      queue.ring.wantCalls(this.#setup.isCalled);
    } while (queue.ring.hasUsed);
  }

  /** Throws Violation when a request has been waited for too long. */
  checkProgress(): void {
    const nowUs = this.#world.nowUs();
    for (const queue of this.queues) {
      if (!queue.isStarted) continue;
      const late = queue.slots.find((slot) => slot.action !== null && nowUs - slot.sinceUs > ANSWER_MAX_US);
      if (late !== undefined) throw new Violation(`queue ${queue.index}: request ${late.index} is not answered`);
    }
  }

  /** The device works on a queue from now on, or no more. */
  started(queue: GuestQueue, isStarted: boolean): void {
    queue.isStarted = isStarted;
    queue.isMasked = false;
    for (const slot of queue.slots) slot.sinceUs = this.#world.nowUs();
  }

  /** The promise of durable writes ends, also for those in flight. */
  endWriteThrough(): void {
    this.writesThrough = false;
    for (const queue of this.queues) for (const slot of queue.slots) slot.isDurable = false;
  }

  /** Starts a queue anew; what was in flight on it is forgotten. */
  reset(queue: GuestQueue): void {
    queue.isMasked = false;
    queue.isBeingStopped = false;
    queue.ring.reset();
    queue.ring.wantCalls(this.#setup.isCalled);
    for (const slot of queue.slots) slot.action = null;
  }

  close(): void {
    for (const queue of this.queues) queue.close();
    this.ram.close();
  }

  #makeSlots(): Slot[] {
    const { depth } = this.#setup;
    return Array.from({ length: depth + 1 }, (_, index) => ({
      index,
      isExtra: index === depth,
      memory: index === depth ? this.ram.allocateExtra(SLOT_BYTES) : this.ram.allocate(SLOT_BYTES, 16),
      action: null,
      id: -1,
      pieces: [],
      usedMemoryBytes: 0,
      inBytes: 0,
      changes: [],
      began: 0,
      offeredUs: 0,
      sinceUs: 0,
      isDurable: false,
      expected: 'ok',
    }));
  }

  #kick(queue: GuestQueue): void {
    this.#world.trace('kick', queue.index);
    check(native.eventfdSignal(queue.kickFd), 'kick');
    this.#world.kicked(queue.kickFd);
  }

  /** Sets up the slot, and returns the bytes that the device is to read. */
  #prepare(slot: Slot, action: RequestAction, random: SeededRandom): Uint8Array {
    const { type } = action;
    let { sector, sectors } = action;
    slot.began = this.#oracle.now();
    slot.changes = [];
    slot.inBytes = 0;
    slot.expected = 'ok';
    const bytes = this.#scratch;
    const words = new Uint32Array(bytes.buffer, 0, bytes.length / 4);
    let outBytes = 0;
    let wireType = TYPE_NUMBERS[type];
    switch (type) {
      case 'read':
        slot.inBytes = sectors * SECTOR_BYTES;
        break;
      case 'write': {
        const change = this.#oracle.beginWrite(sector, sectors);
        this.#oracle.stamp(change, words.subarray(REQUEST_HEADER_BYTES / 4));
        slot.changes = [change];
        outBytes = sectors * SECTOR_BYTES;
        break;
      }
      case 'discard':
      case 'writeZeroes':
        outBytes = this.#writeRanges(slot, action, words, random);
        sector = 0;
        break;
      case 'getId':
        slot.inBytes = ID_BYTES;
        break;
      case 'flush':
        break;
      case 'wrong': {
        const isUnknown = random.below(2) === 0;
        slot.expected = isUnknown ? 'unsupported' : 'ioError';
        if (!isUnknown) {
          wireType = random.below(2) === 0 ? WireType.read : WireType.write;
          sector = this.#oracle.sectors - random.below(sectors);
          if (wireType === WireType.read) slot.inBytes = sectors * SECTOR_BYTES;
          else outBytes = sectors * SECTOR_BYTES;
        }
        sectors = 0;
      }
    }
    words[0] = wireType;
    words[1] = 0;
    words[2] = sector;
    words[3] = 0;
    return bytes.subarray(0, REQUEST_HEADER_BYTES + outBytes);
  }

  /** Cuts the range of the action into a few that follow each other. Returns their length in bytes. */
  #writeRanges(slot: Slot, action: RequestAction, words: Uint32Array, random: SeededRandom): number {
    const unit = this.#setup.blockSectors;
    let at = REQUEST_HEADER_BYTES / 4;
    let sector = action.sector;
    let left = action.sectors;
    for (let i = 0; left > 0; i++) {
      const blocks = left / unit;
      const sectors = i === RANGES_MAX - 1 ? left : (1 + random.below(blocks)) * unit;
      words[at] = sector;
      words[at + 1] = 0;
      words[at + 2] = sectors;
      words[at + 3] = action.type === 'writeZeroes' ? random.below(2) : 0;
      at += RANGE_BYTES / 4;
      const begin = action.type === 'discard' ? 'beginDiscard' : 'beginZeroes';
      slot.changes.push(this.#oracle[begin](sector, sectors));
      sector += sectors;
      left -= sectors;
    }
    return at * 4 - REQUEST_HEADER_BYTES;
  }

  /** Cuts a stream of bytes into pieces of the slot's memory: as Linux does, at `usual`, or anywhere. */
  #cut(random: SeededRandom, memory: { at: number }, lengthBytes: number, writable: boolean, usual: number): Piece[] {
    const cuts = new Set<number>([0, lengthBytes]);
    if (!this.#setup.wildFraming) cuts.add(usual);
    else for (let i = random.below(this.#cutsMax + 1); i > 0; i--) cuts.add(random.below(lengthBytes + 1));
    const sorted = [...cuts].sort((a, b) => a - b);
    const pieces: Piece[] = [];
    for (let i = 0; i + 1 < sorted.length; i++) {
      const length = sorted[i + 1]! - sorted[i]!;
      const alignment = this.#setup.wildFraming && random.below(2) === 0 ? 1 : GAP_BYTES_MAX;
      memory.at = Math.ceil((memory.at + random.below(GAP_BYTES_MAX)) / alignment) * alignment;
      pieces.push({ address: memory.at, lengthBytes: length, writable });
      memory.at += length;
    }
    return pieces;
  }

  #answer(queue: GuestQueue): void {
    const { usedId, usedBytes } = queue.ring;
    const slot = queue.slots.find((one) => one.action !== null && one.id === usedId);
    if (slot === undefined) throw new Violation(`queue ${queue.index}: ${usedId} was used and is not in flight`);
    const action = slot.action!;
    const { type } = action;
    slot.action = null;
    const written = gather(this.ram, slot.pieces);
    const status = written[slot.inBytes]!;
    this.#world.trace('answer', queue.index, slot.index, status, usedBytes);
    this.#checkStatus(slot, type, status);
    const isOk = status === Status.ok;
    const wanted = isOk ? slot.inBytes + 1 : 1;
    if (usedBytes !== wanted)
      throw new Violation(`a ${type} of status ${status} used ${usedBytes} bytes, not ${wanted}`);
    this.#checkGuards(slot);
    for (const change of slot.changes) this.#oracle.end(change, isOk, isOk && slot.isDurable);
    this.answered[type] = (this.answered[type] ?? 0) + 1;
    if (!isOk) return;
    if (type === 'flush') this.#oracle.flushed(slot.began);
    if (type === 'read') {
      this.#oracle.verify(slot.began, action.sector, new Uint32Array(written.buffer, 0, slot.inBytes / 4));
    }
    if (type === 'getId') {
      const id = new TextDecoder().decode(written.subarray(0, slot.inBytes)).replace(/\0+$/, '');
      if (id !== SERIAL) throw new Violation(`the serial is ${id}`);
    }
  }

  #checkStatus(slot: Slot, type: string, status: number): void {
    if (slot.expected !== 'ok') {
      if (status !== Status[slot.expected]) throw new Violation(`a wrong request was answered by status ${status}`);
      return;
    }
    if (status === Status.ok) return;
    const isExcused = this.#setup.mayFail || slot.offeredUs <= this.#world.faultyUs();
    if (status !== Status.ioError || !isExcused) throw new Violation(`a ${type} was answered by status ${status}`);
  }

  /** Nothing between the buffers has changed. */
  #checkGuards(slot: Slot): void {
    const gap = this.#gap;
    let at = slot.memory + TABLE_BYTES;
    const end = { address: slot.memory + slot.usedMemoryBytes, lengthBytes: 0 };
    for (const { address, lengthBytes } of [...slot.pieces, end]) {
      const bytes = gap.subarray(0, address - at);
      this.ram.read(at, bytes);
      if (bytes.some((byte) => byte !== GUARD))
        throw new Violation('memory beside the buffers of a request was written');
      at = address + lengthBytes;
    }
  }
}

function scatter(ram: GuestRam, pieces: readonly Piece[], out: Uint8Array): void {
  let at = 0;
  for (const { address, lengthBytes, writable } of pieces) {
    if (writable) continue;
    ram.write(address, out.subarray(at, at + lengthBytes));
    at += lengthBytes;
  }
}

/** What the device wrote, the status being the last byte. */
function gather(ram: GuestRam, pieces: readonly Piece[]): Uint8Array {
  const writable = pieces.filter((piece) => piece.writable);
  const bytes = new Uint8Array(writable.reduce((sum, piece) => sum + piece.lengthBytes, 0));
  let at = 0;
  for (const { address, lengthBytes } of writable) {
    ram.read(address, bytes.subarray(at, at + lengthBytes));
    at += lengthBytes;
  }
  return bytes;
}
