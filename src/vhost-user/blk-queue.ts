/**
 * One virtqueue of a disk at work: takes requests, hands them to the bdev, writes status bytes, gives the heads back.
 *
 * Invariants
 * - A request is answered once: one status byte, one used entry whose length is what was written to the guest plus the status.
 * - A guest that breaks the ring's rules breaks this queue only: nothing more is taken from it, what is in flight finishes.
 * - No allocation per request.
 */
import { WINDOW_MASK, WINDOW_SCALE } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { BdevIo, IoFlag, IoStatus, IoType } from '../bdev/bdev-io.js';
import type { IoOwner } from '../bdev/bdev-io.js';
import type { BlkDevice } from './blk-device.js';
import { ControllerStat } from './controller-stats.js';
import { DescriptorChain } from './descriptor-chain.js';
import type { DirtyLog } from './dirty-log.js';
import {
  BLK_HEADER_BYTES,
  BLK_ID_BYTES,
  BLK_RANGES_MAX,
  BLK_RANGE_BYTES,
  BLK_RANGE_UNMAP,
  BLK_TYPE_BARRIER,
  BlkStatus,
  BlkType,
  SECTOR_BYTES,
} from './virtio-blk.js';
import { POP_BROKEN } from './virtqueue.js';
import type { Virtqueue } from './virtqueue.js';

/** Requests taken from one queue per step: the others get their turn. */
const BATCH_MAX = 128;
/** Upper word of a sector number whose byte offset is exact. */
const SECTOR_HI_MAX = 0xfff;
const RANGE_DOUBLES = 3;

/** State of one request beside its io. */
class BlkRequest {
  readonly io: BdevIo;
  readonly head: number;
  /** Arena offset of the status byte. */
  statusAddress = -0.5;
  /** Ranges of a discard or writeZeroes {offset, length, flags}; made at the first such request. */
  ranges: Float64Array | null = null;
  rangeCount = 0;
  rangesDone = 0;

  constructor(head: number) {
    this.io = new BdevIo();
    this.io.tag = head;
    this.head = head;
  }
}

/**
 * What a queue works with, made once for a ring however often a front-end starts and stops it: making it takes longer than anything
 * else that one message can ask for. Used by one queue at a time.
 */
export class BlkQueueMemory {
  /** One for each entry of the largest ring so far. */
  readonly requests: BlkRequest[] = [];
  readonly chain = new DescriptorChain();
  readonly header = new Uint32Array(new ArrayBuffer(4096), 0, BLK_HEADER_BYTES / 4);

  reserve(size: number): void {
    for (let head = this.requests.length; head < size; head++) this.requests.push(new BlkRequest(head));
  }
}

export class BlkQueue implements IoOwner {
  readonly index: number;
  /** Called when the last request in flight is answered; the session sets it while it drains. */
  onIdle: (() => void) | null = null;
  /** Called once when the guest breaks the ring. */
  onFault: ((fault: string) => void) | null = null;
  /** Where writes to the guest's buffers are logged, or null. */
  dirtyLog: DirtyLog | null = null;
  /** Why the queue is broken, or null. */
  fault: string | null = null;

  readonly #device: BlkDevice;
  readonly #arena: Arena;
  readonly #virtqueue: Virtqueue;
  readonly #requests: BlkRequest[];
  readonly #chain: DescriptorChain;
  readonly #header: Uint32Array;
  readonly #headerBytes: Uint8Array;
  #inflight = 0;
  #broken = false;
  // Where the data begins in the chain, past the header.
  #dataSegment = 0;
  #dataSkip = 0;

  constructor(
    device: BlkDevice,
    index: number,
    arena: Arena,
    virtqueue: Virtqueue,
    memory: BlkQueueMemory = new BlkQueueMemory(),
  ) {
    this.index = index;
    this.#device = device;
    this.#arena = arena;
    this.#virtqueue = virtqueue;
    memory.reserve(virtqueue.size);
    this.#requests = memory.requests;
    this.#chain = memory.chain;
    this.#header = memory.header;
    this.#headerBytes = new Uint8Array(memory.header.buffer);
  }

  get inflight(): number {
    return this.#inflight;
  }

  get broken(): boolean {
    return this.#broken;
  }

  get virtqueue(): Virtqueue {
    return this.#virtqueue;
  }

  /** Takes what is available. Returns whether there was anything. */
  poll(): boolean {
    let taken = 0;
    while (taken < BATCH_MAX && !this.#broken) {
      const head = this.#virtqueue.pop(this.#chain);
      if (head < 0) {
        if (head === POP_BROKEN) this.breakDown(this.#virtqueue.fault!);
        break;
      }
      taken++;
      this.#inflight++;
      this.#start(this.#requests[head]!);
    }
    this.#device.stats[ControllerStat.requests]! += taken;
    return taken > 0;
  }

  /** Takes all requests that were in flight when the ring was started. */
  takeRecovered(): void {
    while (this.#virtqueue.recovering && !this.#broken) this.poll();
  }

  /** No more is taken from this queue. */
  breakDown(fault: string): void {
    if (this.#broken) return;
    this.#broken = true;
    this.fault = fault;
    this.#device.stats[ControllerStat.queueFaults]!++;
    this.onFault?.(fault);
  }

  /** Completion of a request's io. */
  onDone(io: BdevIo): void {
    const request = this.#requests[io.tag]!;
    if (this.dirtyLog !== null && io.type === IoType.read) logSegments(this.dirtyLog, io);
    switch (io.status) {
      case IoStatus.success:
        if (request.rangesDone < request.rangeCount) {
          this.#nextRange(request);
          return;
        }
        this.#answer(request, BlkStatus.ok, io.type === IoType.read ? io.lengthBytes + 1 : 1);
        return;
      case IoStatus.notSupported:
        this.#answer(request, BlkStatus.unsupported, 1);
        return;
      default:
        this.#answer(request, BlkStatus.ioError, 1);
    }
  }

  #answer(request: BlkRequest, status: number, writtenBytes: number): void {
    const place = request.statusAddress;
    this.#arena.u8[(place * WINDOW_SCALE) | 0]![place & WINDOW_MASK] = status;
    if (this.dirtyLog !== null) this.dirtyLog.markArena(place, 1);
    this.#virtqueue.push(request.head, writtenBytes);
    if (status !== BlkStatus.ok) this.#device.stats[ControllerStat.requestErrors]!++;
    if (--this.#inflight === 0 && this.onIdle !== null) this.onIdle();
  }

  /** Reads the header of the chain just popped and starts the request. */
  #start(request: BlkRequest): void {
    const chain = this.#chain;
    if (chain.writableBytes === 0) {
      // Not even a status can be given: the head is lost, and so is the guest's driver.
      this.#inflight--;
      this.breakDown('a request without a status byte');
      return;
    }
    // The status is the last writable byte; what is before it is data (5.2.6.4: no assumption on framing).
    const last = chain.count - 1;
    request.statusAddress = chain.addresses[last]! + chain.lengths[last]! - 1;
    chain.lengths[last]!--;
    request.rangeCount = 0;
    request.rangesDone = 0;
    if (chain.readableBytes < BLK_HEADER_BYTES) {
      this.#answer(request, BlkStatus.ioError, 1);
      return;
    }
    const address = chain.addresses[0]!;
    let words: Uint32Array;
    let at: number;
    if (chain.lengths[0]! >= BLK_HEADER_BYTES && (address & 3) === 0 && (address & WINDOW_MASK) <= WINDOW_MASK - 15) {
      words = this.#arena.u32[(address * WINDOW_SCALE) | 0]!;
      at = (address & WINDOW_MASK) >>> 2;
      const whole = chain.lengths[0] === BLK_HEADER_BYTES;
      this.#dataSegment = whole ? 1 : 0;
      this.#dataSkip = whole ? 0 : BLK_HEADER_BYTES;
    } else {
      words = this.#header;
      at = 0;
      this.#dataSegment = 0;
      this.#dataSkip = 0;
      this.#takeBytes(BLK_HEADER_BYTES);
    }
    const type = words[at]! & ~BLK_TYPE_BARRIER;
    const sectorHi = words[at + 3]!;
    request.io.offsetBytes = (words[at + 2]! + sectorHi * 2 ** 32) * SECTOR_BYTES;
    this.#execute(request, type, sectorHi <= SECTOR_HI_MAX);
  }

  /** @param isSectorSane the sector's place is in `request.io` already: as an argument it would be boxed */
  #execute(request: BlkRequest, type: number, isSectorSane: boolean): void {
    const device = this.#device;
    switch (type) {
      case BlkType.in:
        if (!isSectorSane) break;
        this.#transfer(request, IoType.read, 0);
        return;
      case BlkType.out:
        if (!isSectorSane || device.readOnly) break;
        this.#transfer(request, IoType.write, device.writeThrough ? IoFlag.fua : 0);
        return;
      case BlkType.flush:
        request.io.prepare(IoType.flush, 0, 0, 0);
        this.#submit(request);
        return;
      case BlkType.getId:
        this.#answer(request, BlkStatus.ok, this.#writeId() + 1);
        return;
      case BlkType.discard:
        this.#startRanges(request, IoType.discard, device.discardSectorsMax);
        return;
      case BlkType.writeZeroes:
        this.#startRanges(request, IoType.writeZeroes, device.writeZeroesSectorsMax);
        return;
      default:
        this.#answer(request, BlkStatus.unsupported, 1);
        return;
    }
    this.#answer(request, BlkStatus.ioError, 1);
  }

  #submit(request: BlkRequest): void {
    request.io.push(this, 0);
    this.#device.channel.submit(request.io);
  }

  #transfer(request: BlkRequest, type: typeof IoType.read | typeof IoType.write, flags: number): void {
    const chain = this.#chain;
    const io = request.io;
    const isRead = type === IoType.read;
    const lengthBytes = isRead ? chain.writableBytes - 1 : chain.readableBytes - BLK_HEADER_BYTES;
    io.prepare(type, io.offsetBytes, lengthBytes, flags);
    const end = isRead ? chain.count : chain.readableCount;
    let skip = isRead ? 0 : this.#dataSkip;
    for (let i = isRead ? chain.readableCount : this.#dataSegment; i < end; i++) {
      const length = chain.lengths[i]! - skip;
      if (length > 0) io.addSegment(chain.addresses[i]! + skip, length);
      skip = 0;
    }
    this.#submit(request);
  }

  /** Writes the serial to the data buffers, as much as fits. Returns how much that was. */
  #writeId(): number {
    const chain = this.#chain;
    let done = 0;
    for (let i = chain.readableCount; i < chain.count && done < BLK_ID_BYTES; i++) {
      const place = chain.addresses[i]!;
      const part = Math.min(chain.lengths[i]!, BLK_ID_BYTES - done);
      for (let k = 0; k < part; k++) {
        const byte = place + k;
        this.#arena.u8[(byte * WINDOW_SCALE) | 0]![byte & WINDOW_MASK] = this.#device.serial[done++]!;
      }
      if (part > 0) this.dirtyLog?.markArena(place, part);
    }
    return done;
  }

  /** Checks all ranges of a discard or writeZeroes, then starts with the first. */
  #startRanges(request: BlkRequest, type: typeof IoType.discard | typeof IoType.writeZeroes, sectorsMax: number): void {
    const device = this.#device;
    const count = (this.#chain.readableBytes - BLK_HEADER_BYTES) / BLK_RANGE_BYTES;
    if (sectorsMax === 0) {
      this.#answer(request, BlkStatus.unsupported, 1);
      return;
    }
    if (device.readOnly || count < 1 || count > BLK_RANGES_MAX || !Number.isInteger(count)) {
      this.#answer(request, BlkStatus.ioError, 1);
      return;
    }
    const ranges = (request.ranges ??= new Float64Array(BLK_RANGES_MAX * RANGE_DOUBLES));
    for (let i = 0; i < count; i++) {
      this.#takeBytes(BLK_RANGE_BYTES);
      const sectorHi = this.#header[1]!;
      const sectors = this.#header[2]!;
      const flags = this.#header[3]!;
      // 5.2.6.2: unknown flags are unsupported, and so is unmap on a discard.
      if (flags > BLK_RANGE_UNMAP || (flags !== 0 && type === IoType.discard)) {
        this.#answer(request, BlkStatus.unsupported, 1);
        return;
      }
      if (sectorHi > SECTOR_HI_MAX || sectors > sectorsMax) {
        this.#answer(request, BlkStatus.ioError, 1);
        return;
      }
      ranges[i * RANGE_DOUBLES] = (this.#header[0]! + sectorHi * 2 ** 32) * SECTOR_BYTES;
      ranges[i * RANGE_DOUBLES + 1] = sectors * SECTOR_BYTES;
      ranges[i * RANGE_DOUBLES + 2] = flags;
    }
    request.rangeCount = count;
    request.io.type = type;
    this.#nextRange(request);
  }

  #nextRange(request: BlkRequest): void {
    const at = request.rangesDone++ * RANGE_DOUBLES;
    const ranges = request.ranges!;
    const unmap = ranges[at + 2] === BLK_RANGE_UNMAP ? IoFlag.unmap : 0;
    const fua = this.#device.writeThrough ? IoFlag.fua : 0;
    request.io.prepare(request.io.type, ranges[at]!, ranges[at + 1]!, unmap | fua);
    this.#submit(request);
  }

  /** Copies the next bytes of the readable part to `#header`, wherever the guest cut it. They are there: see the callers. */
  #takeBytes(count: number): void {
    const chain = this.#chain;
    let done = 0;
    while (done < count) {
      const left = chain.lengths[this.#dataSegment]! - this.#dataSkip;
      if (left <= 0) {
        this.#dataSegment++;
        this.#dataSkip = 0;
        continue;
      }
      const place = chain.addresses[this.#dataSegment]! + this.#dataSkip;
      this.#headerBytes[done++] = this.#arena.u8[(place * WINDOW_SCALE) | 0]![place & WINDOW_MASK]!;
      this.#dataSkip++;
    }
  }
}

/** Whatever became of a read, any of its buffers may have been written to. */
function logSegments(log: DirtyLog, io: BdevIo): void {
  for (let i = 0; i < io.segmentCount; i++) log.markArena(io.segmentAddresses[i]!, io.segmentLengths[i]!);
}
