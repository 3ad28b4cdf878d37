/**
 * A disk as tests use it: requests with their outcome, and memory for them that is laid out in pieces with guarded gaps, so that
 * a stray byte is noticed.
 */
import assert from 'node:assert/strict';
import { BdevIo, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { IoOwner } from '../../src/bdev/bdev-io.js';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import type { MemoryRange } from '../../src/poller/memory-ranges.js';
import type { OpenDisk, Rig } from './rig.js';

const GUARD = 0xa5;
const GAP_BYTES_MAX = 65536;
const GUARDS = Buffer.alloc(GAP_BYTES_MAX, GUARD);
const MEMORY_BYTES = 40 * 2 ** 20;

/** How the data of a request lies in memory. Lengths in bytes. */
export interface Layout {
  /** Sum is the length of the request; at least one, none is 0. */
  readonly lengths: readonly number[];
  /** Bytes left free before each piece, at most 64 KiB; cycled through. */
  readonly gaps: readonly number[];
}

/** The plainest layout. */
export function flat(lengthBytes: number): Layout {
  return { lengths: [lengthBytes], gaps: [0] };
}

/** One request and what became of it. */
export class Request implements IoOwner {
  readonly io = new BdevIo();
  /** How often it completed: 1 when all is well. */
  completions = 0;
  status: IoStatus = IoStatus.success;
  errno = 0;
  /** Called at completion, with the request. */
  then: ((request: Request) => void) | null = null;

  onDone(io: BdevIo): void {
    this.completions++;
    this.status = io.status;
    this.errno = io.errno;
    this.then?.(this);
  }
}

export class Disk {
  readonly rig: Rig;
  open: OpenDisk;
  readonly sizeBytes: number;
  readonly blockBytes: number;
  readonly #memory: number;
  readonly #bytes: Buffer;
  readonly #range: MemoryRange;
  #free = 0;

  constructor(rig: Rig, configs: readonly BdevConfig[]) {
    this.rig = rig;
    this.open = rig.open(configs);
    this.blockBytes = this.open.bdev.blockSizeBytes;
    this.sizeBytes = this.open.bdev.blockCount * this.blockBytes;
    this.#memory = rig.arena.allocate(MEMORY_BYTES);
    this.#bytes = Buffer.from(rig.arena.buffer, this.#memory, MEMORY_BYTES);
    this.#range = { address: this.#memory, lengthBytes: MEMORY_BYTES };
    rig.reactor.memory.add(this.#range);
  }

  /** All memory is free again. */
  forget(): void {
    this.#free = 0;
  }

  /** A request that is ready to be submitted; a transfer's pieces are laid out and guarded. */
  prepare(
    type: IoType,
    offsetBytes: number,
    lengthBytes: number,
    flags = 0,
    layout: Layout = flat(lengthBytes),
  ): Request {
    const request = new Request();
    request.io.prepare(type, offsetBytes, lengthBytes, flags);
    if ((type === IoType.read || type === IoType.write) && lengthBytes > 0) this.#layOut(request, layout);
    return request;
  }

  submit(request: Request): Request {
    request.io.push(request, 0);
    this.open.channel.submit(request.io);
    return request;
  }

  /** Prepares and submits a request without data to write. */
  start(type: IoType, offsetBytes: number, lengthBytes: number, flags = 0, layout?: Layout): Request {
    return this.submit(this.prepare(type, offsetBytes, lengthBytes, flags, layout));
  }

  /** Submits a write of `data`. */
  startWrite(offsetBytes: number, data: Buffer, flags = 0, layout?: Layout): Request {
    const request = this.prepare(IoType.write, offsetBytes, data.length, flags, layout);
    this.scatter(request, data);
    return this.submit(request);
  }

  /** Drives the reactor until every request has completed. */
  finish(...requests: Request[]): void {
    const isDone = (): boolean => requests.every((request) => request.completions > 0);
    this.rig.until(isDone, `requests on ${this.open.bdev.name}`);
    for (const request of requests) assert.equal(request.completions, 1, 'completed more than once');
  }

  /** Runs one request without data; returns its status. */
  run(type: IoType, offsetBytes = 0, lengthBytes = 0, flags = 0): IoStatus {
    const request = this.start(type, offsetBytes, lengthBytes, flags);
    this.finish(request);
    return request.status;
  }

  write(offsetBytes: number, data: Buffer, flags = 0, layout?: Layout): void {
    const request = this.startWrite(offsetBytes, data, flags, layout);
    this.finish(request);
    assert.deepEqual([request.status, request.errno], [IoStatus.success, 0], 'write');
  }

  read(offsetBytes: number, lengthBytes: number, layout?: Layout): Buffer {
    const request = this.start(IoType.read, offsetBytes, lengthBytes, 0, layout);
    this.finish(request);
    assert.deepEqual([request.status, request.errno], [IoStatus.success, 0], 'read');
    return this.gather(request);
  }

  /** Copies `data` into the pieces of a request. */
  scatter(request: Request, data: Buffer): void {
    let at = 0;
    for (const piece of this.#pieces(request)) at += data.copy(piece, 0, at, at + piece.length);
    assert.equal(at, data.length);
  }

  /** The data in the pieces of a request, after checking that nothing was written beside them. */
  gather(request: Request): Buffer {
    this.#checkGuards(request);
    return Buffer.concat(this.#pieces(request));
  }

  close(): void {
    assert.equal(this.open.stats.inflight, 0, 'requests in flight');
    this.rig.reactor.memory.remove(this.#range);
    this.open.close();
    this.rig.arena.release(this.#memory);
    this.rig.close();
  }

  #layOut(request: Request, layout: Layout): void {
    let at = this.#free;
    layout.lengths.forEach((length, i) => {
      const gap = layout.gaps[i % layout.gaps.length]!;
      this.#bytes.fill(GUARD, at, at + gap + length + 1);
      request.io.addSegment(this.#memory + at + gap, length);
      at += gap + length;
    });
    // One guard byte at least behind the last piece; the next request starts on a page.
    this.#free = Math.ceil((at + 1) / 4096) * 4096;
    assert.ok(this.#free <= MEMORY_BYTES, 'the test needs more memory');
  }

  #pieces(request: Request): Buffer[] {
    const { segmentAddresses, segmentLengths, segmentCount } = request.io;
    return Array.from({ length: segmentCount }, (_, i) => {
      const start = segmentAddresses[i]! - this.#memory;
      return this.#bytes.subarray(start, start + segmentLengths[i]!);
    });
  }

  #checkGuards(request: Request): void {
    const { segmentAddresses, segmentLengths, segmentCount } = request.io;
    for (let i = 0; i < segmentCount; i++) {
      const end = segmentAddresses[i]! + segmentLengths[i]! - this.#memory;
      const next = i + 1 < segmentCount ? segmentAddresses[i + 1]! - this.#memory : end + 1;
      const intact = this.#bytes.subarray(end, next).equals(GUARDS.subarray(0, next - end));
      assert.ok(intact, `stray bytes behind segment ${i}`);
    }
  }
}
