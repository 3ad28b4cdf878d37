/**
 * The driver's side of one split virtqueue (VIRTIO 1.2, 2.7), and the virtio-blk requests on it. Well-behaved unless told
 * otherwise: `writeDescriptor`, `offer` and the views of the rings write whatever a test wants a device to meet.
 *
 * Invariant: descriptors and memory of a request are reused only after its used entry was taken.
 */
import { check, native } from '../../native/index.js';
import type { DriverMemory, Region } from './guest-memory.js';
import {
  AVAILABLE_NO_INTERRUPT,
  DESCRIPTOR_BYTES,
  DescriptorFlag,
  ID_BYTES,
  RANGE_BYTES,
  RANGE_UNMAP,
  REQUEST_HEADER_BYTES,
  RequestType,
  SECTOR_BYTES,
  STATUS_UNANSWERED,
  USED_NO_NOTIFY,
} from './protocol.js';
import type { Waiter } from './waiting.js';

export interface Descriptor {
  readonly address: number | bigint;
  readonly lengthBytes: number;
  readonly flags?: number;
  readonly next?: number;
}

/** Lengths of the pieces a part of a request is cut into, each in memory of its own; they add up to the part. */
export interface Framing {
  /** Header and data the device reads. As Linux cuts it: header, data. */
  readonly readable?: readonly number[];
  /** Data the device writes and the status byte. As Linux cuts it: data, status. */
  readonly writable?: readonly number[];
}

export interface RequestSpec {
  readonly type: number;
  readonly sector?: number | bigint;
  /** Data the device reads. */
  readonly out?: Uint8Array;
  /** Length of the data the device writes. */
  readonly inBytes?: number;
  readonly framing?: Framing;
  /** The first piece that goes to an indirect table; pieces before it have descriptors of the ring. Infinity: no table. */
  readonly indirectFrom?: number;
  /** Where the pieces lie. */
  readonly region?: Region;
  /** Added to the address of every piece, to misalign it. */
  readonly shiftBytes?: number;
}

/** A request in flight. */
export interface Request {
  readonly head: number;
  readonly spec: RequestSpec;
  /** Guest addresses and lengths of the pieces, device-readable ones first. */
  readonly pieces: readonly Piece[];
  /** Set once the used entry was taken. */
  completion: Completion | undefined;
}

export interface Completion {
  readonly status: number;
  /** The used entry's length. */
  readonly usedBytes: number;
  /** What the device wrote before the status byte. */
  readonly data: Buffer;
}

interface Piece {
  readonly address: number;
  readonly lengthBytes: number;
  readonly writable: boolean;
}

interface Owned {
  readonly request: Request;
  readonly descriptors: readonly number[];
  readonly memory: readonly number[];
}

/** A range of a discard or write-zeroes request. */
export interface SectorRange {
  readonly sector: number;
  readonly sectors: number;
  readonly unmap?: boolean;
}

export interface DriverQueueOptions {
  readonly index: number;
  readonly size: number;
  readonly memory: DriverMemory;
  readonly waiter: Waiter;
  /** Where the rings lie. */
  readonly region?: Region;
}

const PAGE_BYTES = 4096;
/** An event index this far ahead asks for no call in practice. */
const EVENT_FAR_AHEAD = 0x7fff;

export class DriverQueue {
  readonly index: number;
  readonly size: number;
  /** Guest addresses of the three parts. */
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  readonly kickFd = check(native.eventfdCreate(), 'make a kick descriptor');
  readonly callFd = check(native.eventfdCreate(), 'make a call descriptor');
  readonly errFd = check(native.eventfdCreate(), 'make an error descriptor');
  /** Negotiated; set before the queue is used. */
  eventIdx = false;
  indirect = false;
  /** Kicks sent. */
  kicks = 0;
  /** Live bytes of the rings, for tests that look or meddle. */
  readonly availableBytes: Buffer;
  readonly usedBytes: Buffer;

  protected readonly memory: DriverMemory;
  readonly #waiter: Waiter;
  readonly #fence = new Int32Array(new SharedArrayBuffer(4));
  #freeDescriptors: number[] = [];
  #inflight = new Map<number, Owned>();
  #availableIndex = 0;
  #usedIndex = 0;
  #isClosed = false;

  constructor(options: DriverQueueOptions) {
    this.index = options.index;
    this.size = options.size;
    this.memory = options.memory;
    this.#waiter = options.waiter;
    const region = options.region ?? options.memory.ringRegion;
    this.descriptors = this.memory.allocate(DESCRIPTOR_BYTES * this.size, 16, region);
    this.available = this.memory.allocate(6 + 2 * this.size, 2, region);
    this.used = this.memory.allocate(6 + 8 * this.size, 4, region);
    this.availableBytes = this.memory.bytes(this.available, 6 + 2 * this.size);
    this.usedBytes = this.memory.bytes(this.used, 6 + 8 * this.size);
    this.#clear();
  }

  /** Number of requests the device has not answered, as far as used entries were taken. */
  get inflight(): number {
    return this.#inflight.size;
  }

  /** Where the next entry of the available ring goes, 16 bits. */
  get availableIndex(): number {
    return this.#availableIndex;
  }

  /** The device's index of the used ring, 16 bits. */
  get deviceUsedIndex(): number {
    return this.usedBytes.readUInt16LE(2);
  }

  /** What a front-end that knows the ring from its memory says in SET_VRING_BASE. */
  get base(): number {
    return this.deviceUsedIndex;
  }

  /** The device stopped here, as GET_VRING_BASE said. */
  stoppedAt(_base: number): void {
    // The used index tells.
  }

  /** Empties the rings and forgets what is in flight, as a driver does that starts the device anew. */
  reset(): void {
    this.#clear();
  }

  #clear(): void {
    this.memory.bytes(this.descriptors, DESCRIPTOR_BYTES * this.size).fill(0);
    this.availableBytes.fill(0);
    this.usedBytes.fill(0);
    for (const { memory } of this.#inflight.values()) memory.forEach((address) => this.memory.free(address));
    this.#inflight = new Map();
    this.#freeDescriptors = Array.from({ length: this.size }, (_, i) => this.size - 1 - i);
    this.#availableIndex = 0;
    this.#usedIndex = 0;
  }

  /** Takes the ring's indices from its memory: somebody else has used it meanwhile and left nothing in flight. */
  resume(): void {
    if (this.#inflight.size > 0) throw new Error('the queue has requests of its own in flight');
    this.#availableIndex = this.availableBytes.readUInt16LE(2);
    this.#usedIndex = this.deviceUsedIndex;
    this.suppressCalls(false);
  }

  // ---- Raw access

  writeDescriptor(index: number, descriptor: Descriptor): void {
    writeDescriptor(this.memory.bytes(this.descriptors + DESCRIPTOR_BYTES * index, DESCRIPTOR_BYTES), descriptor);
  }

  /** Takes descriptors out of the free list, for raw use. */
  takeDescriptors(count: number): number[] {
    if (count > this.#freeDescriptors.length) throw new Error(`the queue has no ${count} free descriptors`);
    return this.#freeDescriptors.splice(-count).reverse();
  }

  /** Puts heads into the available ring, makes them visible and kicks if the device wants it. */
  offer(...heads: readonly number[]): void {
    this.checkOpen();
    const before = this.#availableIndex;
    for (const head of heads) {
      this.availableBytes.writeUInt16LE(head, 4 + 2 * (this.#availableIndex & (this.size - 1)));
      this.#availableIndex = (this.#availableIndex + 1) & 0xffff;
    }
    this.publishIndex(this.#availableIndex);
    if (this.#deviceWantsKick(before)) this.kick();
  }

  /** Writes the available ring's index, right or wrong. */
  publishIndex(index: number): void {
    this.fence();
    this.availableBytes.writeUInt16LE(index & 0xffff, 2);
    this.fence();
  }

  kick(): void {
    this.kicks++;
    check(native.eventfdSignal(this.kickFd), 'kick');
  }

  /** Asks for calls or for none. In force at once, but a call may be on its way. */
  suppressCalls(suppress: boolean): void {
    this.availableBytes.writeUInt16LE(suppress ? AVAILABLE_NO_INTERRUPT : 0, 0);
    const event = suppress ? this.#usedIndex + EVENT_FAR_AHEAD : this.#usedIndex;
    this.availableBytes.writeUInt16LE(event & 0xffff, 4 + 2 * this.size);
    this.fence();
  }

  /** The next used entry, or undefined. Entries of requests made here complete them. Throws on an entry of no request. */
  takeUsed(): { readonly id: number; readonly lengthBytes: number } | undefined {
    const entry = this.takeRawUsed();
    if (entry === undefined) return undefined;
    const owned = this.#inflight.get(entry.id);
    if (owned === undefined)
      throw new Error(`queue ${this.index}: the device used ${entry.id}, which is not in flight`);
    this.#inflight.delete(entry.id);
    this.#complete(owned, entry.lengthBytes);
    return entry;
  }

  /** The next used entry as it stands, or undefined. */
  takeRawUsed(): { readonly id: number; readonly lengthBytes: number } | undefined {
    this.checkOpen();
    if (this.deviceUsedIndex === this.#usedIndex) return undefined;
    const at = 4 + 8 * (this.#usedIndex & (this.size - 1));
    const entry = { id: this.usedBytes.readUInt32LE(at), lengthBytes: this.usedBytes.readUInt32LE(at + 4) };
    this.#usedIndex = (this.#usedIndex + 1) & 0xffff;
    // The event index asks for a call at the next entry, unless it was put far ahead.
    const wantsCalls = (this.availableBytes.readUInt16LE(0) & AVAILABLE_NO_INTERRUPT) === 0;
    if (wantsCalls) this.availableBytes.writeUInt16LE(this.#usedIndex, 4 + 2 * this.size);
    return entry;
  }

  /** Waits for a signal on the call descriptor, and clears it. Returns how often it was raised. Throws WaitTimeout. */
  async called(timeoutMs?: number): Promise<number> {
    return this.#signalled(this.callFd, 'call', timeoutMs);
  }

  /** As `called`, of the error descriptor. */
  async erred(timeoutMs?: number): Promise<number> {
    return this.#signalled(this.errFd, 'error signal', timeoutMs);
  }

  // ---- Requests

  /** Lays the request out in memory and descriptors, without offering it. */
  prepare(spec: RequestSpec): Request {
    const out = Buffer.concat([requestHeader(spec), spec.out ?? Buffer.alloc(0)]);
    const inBytes = (spec.inBytes ?? 0) + 1;
    const readable =
      spec.framing?.readable ?? [REQUEST_HEADER_BYTES, out.length - REQUEST_HEADER_BYTES].filter(positive);
    const writable = spec.framing?.writable ?? [inBytes - 1, 1].filter(positive);
    const memory: number[] = [];
    const piece = (lengthBytes: number, isWritable: boolean): Piece => {
      const shift = spec.shiftBytes ?? 0;
      const alignment = lengthBytes >= SECTOR_BYTES ? PAGE_BYTES : 16;
      const address = this.memory.allocate(lengthBytes + shift, alignment, spec.region);
      memory.push(address);
      return { address: address + shift, lengthBytes, writable: isWritable };
    };
    const pieces = [...readable.map((n) => piece(n, false)), ...writable.map((n) => piece(n, true))];
    let at = 0;
    for (const { address, lengthBytes } of pieces.filter((p) => !p.writable)) {
      this.memory.bytes(address, lengthBytes).set(out.subarray(at, at + lengthBytes));
      at += lengthBytes;
    }
    for (const p of pieces.filter((q) => q.writable)) {
      this.memory.bytes(p.address, p.lengthBytes).fill(STATUS_UNANSWERED);
    }
    const chain = this.#describe(pieces, spec.indirectFrom ?? (this.indirect ? 0 : Infinity), memory);
    const descriptors = this.placeChain(chain);
    const request: Request = { head: descriptors[0]!, spec, pieces, completion: undefined };
    this.#inflight.set(request.head, { request, descriptors, memory });
    return request;
  }

  /** Prepares and offers requests, all at once. */
  submit(...specs: readonly RequestSpec[]): Request[] {
    const requests = specs.map((spec) => this.prepare(spec));
    this.offer(...requests.map((request) => request.head));
    return requests;
  }

  /** Waits for the device's answer by watching the used ring. Throws WaitTimeout. */
  async completion(request: Request, timeoutMs?: number): Promise<Completion> {
    return this.#waiter.until(
      `completion of request ${request.head} (type ${request.spec.type})`,
      () => {
        while (request.completion === undefined && this.takeUsed() !== undefined);
        return request.completion;
      },
      timeoutMs,
    );
  }

  /** Submits a request and waits for its answer. */
  async run(spec: RequestSpec, timeoutMs?: number): Promise<Completion> {
    return this.completion(this.submit(spec)[0]!, timeoutMs);
  }

  read(sector: number, lengthBytes: number): Promise<Completion> {
    return this.run({ type: RequestType.read, sector, inBytes: lengthBytes });
  }

  write(sector: number, data: Uint8Array): Promise<Completion> {
    return this.run({ type: RequestType.write, sector, out: data });
  }

  flush(): Promise<Completion> {
    return this.run({ type: RequestType.flush });
  }

  getId(): Promise<Completion> {
    return this.run({ type: RequestType.getId, inBytes: ID_BYTES });
  }

  discard(...ranges: readonly SectorRange[]): Promise<Completion> {
    return this.run({ type: RequestType.discard, out: encodeRanges(ranges) });
  }

  writeZeroes(...ranges: readonly SectorRange[]): Promise<Completion> {
    return this.run({ type: RequestType.writeZeroes, out: encodeRanges(ranges) });
  }

  close(): void {
    this.#isClosed = true;
    for (const fd of [this.kickFd, this.callFd, this.errFd]) native.fileClose(fd);
  }

  /** A wait may outlive its front-end, whose memory is gone. */
  protected checkOpen(): void {
    if (this.#isClosed) throw new Error(`queue ${this.index} is closed`);
  }

  protected fence(): void {
    Atomics.exchange(this.#fence, 0, 0);
  }

  /** Descriptors of a request that come back when it is answered. The first names it. */
  protected placeChain(chain: readonly Descriptor[]): number[] {
    const indices = this.takeDescriptors(chain.length);
    linkChain(chain, (i) => indices[i]!).forEach((descriptor, i) => this.writeDescriptor(indices[i]!, descriptor));
    return indices;
  }

  /** Which piece may be the first of an indirect table when `wanted` is asked for. */
  protected tableFrom(wanted: number, _pieces: number): number {
    return wanted;
  }

  /** Writes an indirect table. */
  protected writeTable(address: number, chain: readonly Descriptor[]): void {
    linkChain(chain, (i) => i).forEach((descriptor, i) =>
      writeDescriptor(this.memory.bytes(address + DESCRIPTOR_BYTES * i, DESCRIPTOR_BYTES), descriptor),
    );
  }

  /** Descriptors for the pieces, from `indirectFrom` on in a table. */
  #describe(pieces: readonly Piece[], indirectFrom: number, memory: number[]): Descriptor[] {
    const direct = pieces.slice(0, this.tableFrom(indirectFrom, pieces.length));
    const tabled = pieces.slice(direct.length);
    const chain: Descriptor[] = direct.map(describePiece);
    if (tabled.length > 0) {
      const lengthBytes = DESCRIPTOR_BYTES * tabled.length;
      const table = this.memory.allocate(lengthBytes);
      memory.push(table);
      this.writeTable(table, tabled.map(describePiece));
      chain.push({ address: table, lengthBytes, flags: DescriptorFlag.indirect });
    }
    return chain;
  }

  #complete(owned: Owned, usedBytes: number): void {
    const { request } = owned;
    const written = Buffer.concat(
      request.pieces.filter((p) => p.writable).map((p) => this.memory.bytes(p.address, p.lengthBytes)),
    );
    request.completion = { status: written.at(-1)!, usedBytes, data: written.subarray(0, -1) };
    this.#freeDescriptors.push(...owned.descriptors);
    owned.memory.forEach((address) => this.memory.free(address));
  }

  #deviceWantsKick(before: number): boolean {
    if (!this.eventIdx) return (this.usedBytes.readUInt16LE(0) & USED_NO_NOTIFY) === 0;
    const event = this.usedBytes.readUInt16LE(4 + 8 * this.size);
    return ((this.#availableIndex - event - 1) & 0xffff) < ((this.#availableIndex - before) & 0xffff);
  }

  async #signalled(fd: number, what: string, timeoutMs?: number): Promise<number> {
    return this.#waiter.until(
      `${what} of queue ${this.index}`,
      () => {
        const count = native.eventfdDrain(fd);
        return count > 0 ? count : undefined;
      },
      timeoutMs,
    );
  }
}

function positive(length: number): boolean {
  return length > 0;
}

function requestHeader(spec: RequestSpec): Buffer {
  const header = Buffer.alloc(REQUEST_HEADER_BYTES);
  header.writeUInt32LE(spec.type, 0);
  header.writeBigUInt64LE(BigInt(spec.sector ?? 0), 8);
  return header;
}

function describePiece(piece: Piece): Descriptor {
  return {
    address: piece.address,
    lengthBytes: piece.lengthBytes,
    flags: piece.writable ? DescriptorFlag.write : 0,
  };
}

/** Sets NEXT and `next` on all but the last. */
function linkChain(chain: readonly Descriptor[], place: (i: number) => number): Descriptor[] {
  return chain.map((descriptor, i) =>
    i === chain.length - 1
      ? descriptor
      : { ...descriptor, flags: (descriptor.flags ?? 0) | DescriptorFlag.next, next: place(i + 1) },
  );
}

/** Writes one descriptor of a ring or of an indirect table. */
export function writeDescriptor(bytes: Buffer, descriptor: Descriptor): void {
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(descriptor.address)), 0);
  bytes.writeUInt32LE(descriptor.lengthBytes, 8);
  bytes.writeUInt16LE(descriptor.flags ?? 0, 12);
  bytes.writeUInt16LE(descriptor.next ?? 0, 14);
}

/** {u64 sector, u32 sectors, u32 flags} each. */
export function encodeRanges(ranges: readonly SectorRange[]): Buffer {
  const bytes = Buffer.alloc(RANGE_BYTES * ranges.length);
  ranges.forEach((range, i) => {
    bytes.writeBigUInt64LE(BigInt(range.sector), RANGE_BYTES * i);
    bytes.writeUInt32LE(range.sectors, RANGE_BYTES * i + 8);
    bytes.writeUInt32LE(range.unmap === true ? RANGE_UNMAP : 0, RANGE_BYTES * i + 12);
  });
  return bytes;
}
