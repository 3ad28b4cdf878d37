/**
 * uring: a regular file or block device through io_uring. Data moves by the kernel between the device and the segments of the
 * request, which for a guest are its own memory: no copy on the way.
 *
 *     flush        fdatasync                              discard      fallocate: punch a hole
 *     write + FUA  RWF_DSYNC                              writeZeroes  punch a hole (unmap) or zero the range
 *
 * Invariants
 * - A request completes when all its bytes have moved: short transfers are continued.
 * - A file that ends within a block shows the whole of it: zeroes behind its end, until something is written there.
 */
import {
  EAGAIN,
  EINTR,
  EIO,
  ENOSPC,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_ZERO_RANGE,
  RWF_DSYNC,
  SystemError,
  native,
} from '../../../native/index.js';
import { PollPhase } from '../../poller/poller.js';
import type { Poller } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { Ring, RingFile, RingOp, RingRange } from '../../poller/ring.js';
import { Uring } from '../../poller/uring.js';
import type { Bdev, BdevContext, BdevLimits, BdevModule, IoChannel } from '../bdev.js';
import { BdevError } from '../bdev.js';
import { IoFlag, IoStatus, IoType, statusOfErrno } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';
import { FixedBuffers } from './fixed-buffers.js';
import { RunningLock, fileSize, growFile, openUringFile } from './uring-file.js';
import type { UringConfig, UringFile } from './uring-file.js';

export type { UringConfig } from './uring-file.js';

/** IOV_MAX of the kernel. */
const SEGMENTS_MAX = 1024;
/** Longest transfer of one system call, in whole 4 KiB blocks. */
const TRANSFER_BYTES_MAX = 2 ** 31 - 4096;
const REQUESTS_MAX = 1024;
const IOVEC_WORDS = 4;

/** One request on the ring: its slot, its iovecs, how far it got. Made once, used for ever. */
class UringRequest implements RingOp, RingRange {
  readonly #channel: UringChannel;
  readonly slot: number;
  /** Arena offset of SEGMENTS_MAX iovecs. */
  readonly iovecAddress: number;
  readonly iovecs: Uint32Array;
  io: BdevIo | null = null;
  doneBytes = -0.5;
  // What is asked of the ring: a request is its own range.
  address = -0.5;
  lengthBytes = -0.5;
  offsetBytes = -0.5;

  constructor(channel: UringChannel, ring: Ring, iovecAddress: number) {
    this.#channel = channel;
    this.slot = ring.attach(this);
    this.iovecAddress = iovecAddress;
    this.iovecs = ring.arena.view32(iovecAddress, SEGMENTS_MAX * IOVEC_WORDS);
  }

  onCompletion(result: number): void {
    this.#channel.onCompletion(this, result);
  }
}

class UringChannel implements IoChannel {
  readonly #ring: Ring;
  /** Reads and writes go here: the reactor's ring, or one of its own that polls the device. */
  readonly #dataRing: Ring;
  readonly #reactor: Reactor;
  readonly #blockSizeBytes: number;
  readonly #isDirect: boolean;
  readonly #file: RingFile;
  readonly #dataFile: RingFile;
  readonly #fixed: FixedBuffers | null;
  readonly #requests: UringRequest[] = [];
  readonly #dataRequests: UringRequest[] = [];
  readonly #free: UringRequest[] = [];
  readonly #dataFree: UringRequest[] = [];
  readonly #slabs: number[] = [];
  readonly #devicePoller: Poller | null;

  constructor(reactor: Reactor, fd: number, blockSizeBytes: number, { direct, iopoll, fixedBuffers }: UringConfig) {
    this.#reactor = reactor;
    this.#blockSizeBytes = blockSizeBytes;
    this.#isDirect = direct;
    this.#ring = reactor.ring;
    this.#file = this.#ring.registerFile(fd);
    if (iopoll) {
      const ring = new Uring(reactor.arena, { iopoll: true });
      this.#dataRing = ring;
      this.#dataFile = ring.registerFile(fd);
      this.#dataFree = [];
      this.#devicePoller = {
        poll: () => {
          const reaped = ring.reap() > 0;
          ring.enter();
          return reaped || ring.inflight > 0;
        },
        arm: () => ring.inflight > 0,
        disarm: () => undefined,
      };
      reactor.addPoller(this.#devicePoller, PollPhase.batch);
    } else {
      this.#dataRing = this.#ring;
      this.#dataFile = this.#file;
      this.#dataFree = this.#free;
      this.#dataRequests = this.#requests;
      this.#devicePoller = null;
    }
    this.#fixed = fixedBuffers ? new FixedBuffers(reactor.memory, this.#dataRing) : null;
  }

  get fixedBytes(): number {
    return this.#fixed?.registeredBytes ?? 0;
  }

  submit(io: BdevIo): void {
    const isData = io.type <= IoType.write;
    const request = (isData ? this.#dataFree : this.#free).pop() ?? this.#grow(isData);
    if (request === null) {
      io.complete(IoStatus.again, 0);
      return;
    }
    request.io = io;
    request.doneBytes = 0;
    if (!this.#queue(request, io)) this.#finish(request, io, IoStatus.again, 0);
  }

  onCompletion(request: UringRequest, result: number): void {
    const io = request.io!;
    if (result < 0) {
      if (result === -EAGAIN || result === -EINTR) this.#finish(request, io, IoStatus.again, 0);
      else this.#finish(request, io, statusOfErrno(-result), -result);
      return;
    }
    if (io.type > IoType.write) {
      this.#finish(request, io, IoStatus.success, 0);
      return;
    }
    const doneBytes = request.doneBytes + result;
    if (doneBytes === io.lengthBytes) {
      this.#finish(request, io, IoStatus.success, 0);
    } else if (io.type === IoType.read && this.#isLastBlock(io, doneBytes, result)) {
      this.#zeroRest(io, doneBytes);
      this.#finish(request, io, IoStatus.success, 0);
    } else if (result === 0) {
      // A read beyond the end of a file that was truncated under us; a write that found no room.
      const isRead = io.type === IoType.read;
      this.#finish(request, io, isRead ? IoStatus.ioError : IoStatus.noSpace, isRead ? EIO : ENOSPC);
    } else {
      request.doneBytes = doneBytes;
      if (!this.#queue(request, io)) this.#finish(request, io, IoStatus.again, 0);
    }
  }

  close(): void {
    for (const request of this.#requests) this.#ring.detach(request.slot);
    this.#fixed?.close();
    this.#ring.unregisterFile(this.#file);
    if (this.#devicePoller !== null) {
      this.#reactor.removePoller(this.#devicePoller);
      this.#dataRing.close();
    }
    for (const slab of this.#slabs) this.#reactor.arena.release(slab);
  }

  /** A read came short within the block in which the file ends. */
  #isLastBlock(io: BdevIo, doneBytes: number, result: number): boolean {
    if (io.lengthBytes - doneBytes >= this.#blockSizeBytes) return false;
    // Direct I/O cannot go on from there; nothing else makes it stop within a block.
    return result === 0 || (this.#isDirect && doneBytes % this.#blockSizeBytes !== 0);
  }

  #zeroRest(io: BdevIo, doneBytes: number): void {
    let skip = doneBytes;
    for (let i = 0; i < io.segmentCount; i++) {
      const length = io.segmentLengths[i]!;
      if (skip < length) this.#reactor.arena.view8(io.segmentAddresses[i]! + skip, length - skip).fill(0);
      skip = Math.max(0, skip - length);
    }
  }

  #finish(request: UringRequest, io: BdevIo, status: IoStatus, errno: number): void {
    request.io = null;
    (io.type <= IoType.write ? this.#dataFree : this.#free).push(request);
    io.complete(status, errno);
  }

  #queue(request: UringRequest, io: BdevIo): boolean {
    switch (io.type) {
      case IoType.read:
      case IoType.write:
        return this.#queueTransfer(request, io);
      case IoType.flush:
        return this.#ring.fdatasync(request.slot, this.#file);
      case IoType.discard:
        return this.#queueAllocate(request, io, FALLOC_FL_PUNCH_HOLE);
      case IoType.writeZeroes:
        return this.#queueAllocate(
          request,
          io,
          (io.flags & IoFlag.unmap) !== 0 ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE,
        );
      case IoType.reset:
        throw new Error('uring: the core never passes a reset to a leaf');
    }
  }

  #queueAllocate(request: UringRequest, io: BdevIo, mode: number): boolean {
    request.offsetBytes = io.offsetBytes;
    request.lengthBytes = io.lengthBytes;
    return this.#ring.fallocate(request.slot, this.#file, request, mode | FALLOC_FL_KEEP_SIZE);
  }

  #queueTransfer(request: UringRequest, io: BdevIo): boolean {
    const ring = this.#dataRing;
    const file = this.#dataFile;
    const slot = request.slot;
    const isRead = io.type === IoType.read;
    const rwFlags = (io.flags & IoFlag.fua) !== 0 ? RWF_DSYNC : 0;
    request.offsetBytes = io.offsetBytes + request.doneBytes;
    if (io.segmentCount === 1) {
      request.address = io.segmentAddresses[0]! + request.doneBytes;
      request.lengthBytes = io.lengthBytes - request.doneBytes;
      const buffer = this.#fixed === null ? -1 : this.#fixed.find(request);
      if (buffer >= 0) {
        if (isRead) return ring.readFixed(slot, file, request, buffer);
        return ring.writeFixed(slot, file, request, rwFlags, buffer);
      }
      if (isRead) return ring.read(slot, file, request, 0);
      return ring.write(slot, file, request, rwFlags);
    }
    const count = this.#fillIovecs(request, io);
    request.address = request.iovecAddress;
    if (isRead) return ring.readv(slot, file, request, count, 0);
    return ring.writev(slot, file, request, count, rwFlags);
  }

  /** The segments of what is still to be moved. Returns how many there are. */
  #fillIovecs(request: UringRequest, io: BdevIo): number {
    const iovecs = request.iovecs;
    const base = this.#ring.arena.baseAddress;
    let skip = request.doneBytes;
    let at = 0;
    for (let i = 0; i < io.segmentCount; i++) {
      const length = io.segmentLengths[i]!;
      if (skip >= length) {
        skip -= length;
        continue;
      }
      const address = base + io.segmentAddresses[i]! + skip;
      iovecs[at] = address;
      iovecs[at + 1] = address * 2 ** -32;
      iovecs[at + 2] = length - skip;
      iovecs[at + 3] = 0;
      at += IOVEC_WORDS;
      skip = 0;
    }
    return at / IOVEC_WORDS;
  }

  /** One more request, up to the bound; null beyond it. */
  #grow(isData: boolean): UringRequest | null {
    const requests = isData ? this.#dataRequests : this.#requests;
    if (requests.length === REQUESTS_MAX) return null;
    const slab = this.#reactor.arena.allocate(SEGMENTS_MAX * IOVEC_WORDS * 4);
    this.#slabs.push(slab);
    const request = new UringRequest(this, isData ? this.#dataRing : this.#ring, slab);
    requests.push(request);
    return request;
  }
}

class UringBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'uring';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly guard: RunningLock | undefined;
  readonly readOnly: boolean;
  readonly supportsFua = true;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[] = [];
  readonly #config: UringConfig;
  readonly #file: UringFile;
  #channel: UringChannel | null = null;

  constructor(config: UringConfig, context: BdevContext) {
    if (config.iopoll && !config.direct) {
      throw new BdevError(
        'iopoll',
        'iopoll',
        'polled completions need direct I/O',
        'set `direct: true` or `iopoll: false`',
      );
    }
    const file = openUringFile(config, context.reactor.arena);
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.blockSizeBytes = file.blockSizeBytes;
    this.size = new BdevSize(file.blockSizeBytes, {
      sizeBytes: () => Math.ceil(fileSize(file, config) / file.blockSizeBytes) * file.blockSizeBytes,
      resize: (sizeBytes) => growFile(file, config, sizeBytes),
    });
    if (config.lock === 'running') this.guard = new RunningLock(file, config, () => this.size.rescan());
    this.readOnly = config.readOnly;
    this.#config = config;
    this.#file = file;
    const physicalBlockBytes = Math.max(file.blockSizeBytes, file.facts.physicalBlockBytes);
    this.limits = {
      maxTransferBytes: TRANSFER_BYTES_MAX,
      maxSegments: SEGMENTS_MAX,
      memoryAlignmentBytes: file.memoryAlignmentBytes,
      boundaryBytes: 0,
      maxDiscardBytes: 0,
      maxWriteZeroesBytes: 0,
      optimalIoBytes: 0,
      physicalBlockBytes,
      // File systems punch whole 4 KiB blocks.
      discardGranularityBytes: Math.max(physicalBlockBytes, 4096),
    };
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    switch (type) {
      case IoType.read:
      case IoType.flush:
        return true;
      case IoType.write:
      case IoType.writeZeroes:
        return !this.readOnly;
      case IoType.discard:
        return this.#file.canDiscard;
      case IoType.reset:
        return false;
    }
  }

  openChannel(reactor: Reactor): IoChannel {
    try {
      this.#channel = new UringChannel(reactor, this.#file.fd, this.blockSizeBytes, this.#config);
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      throw new BdevError(
        'io-uring',
        'module',
        error.message,
        'check kernel.io_uring_disabled and the limit of open files',
      );
    }
    return this.#channel;
  }

  describe(): Record<string, unknown> {
    return {
      path: this.#config.path,
      kind: this.#file.facts.kind,
      direct: this.#config.direct,
      iopoll: this.#config.iopoll,
      memoryAlignmentBytes: this.#file.memoryAlignmentBytes,
      fixedBufferBytes: this.#channel?.fixedBytes ?? 0,
    };
  }

  destroy(): void {
    native.fileClose(this.#file.fd);
  }
}

export const uringModule: BdevModule<UringConfig> = {
  name: 'uring',
  create: (config, context) => new UringBdev(config, context),
};
