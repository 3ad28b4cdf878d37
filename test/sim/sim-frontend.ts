/**
 * The front-end of the simulated guest: what a virtual machine monitor says on the socket. Each conversation is a generator that
 * goes on when the guest has its turn, so that the guest works on meanwhile.
 */
import { EAGAIN, check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import {
  ConfigAt,
  FEATURES_KNOWN,
  FLAG_NEED_REPLY,
  FLAG_VERSION_1,
  Feature,
  MESSAGE_HEADER_BYTES,
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  encodeInflight,
  encodeMessage,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import type { DriverRing } from './driver-ring.js';
import type { GuestRam, RamRegion } from './guest-ram.js';
import { Violation } from './oracle.js';
import type { Setup } from './plan.js';
import type { Wire } from './sim-process.js';

/** A conversation; each turn is one look for an answer. */
export type Script<T = void> = Generator<void, T>;

/** A queue as the front-end has to know it. */
export interface FrontendQueue {
  readonly index: number;
  readonly ring: DriverRing;
  readonly kickFd: number;
  readonly callFd: number;
  readonly errFd: number;
}

export interface FrontendWorld {
  /** Where the daemon listens. */
  readonly socketPath: string;
  /** The daemon sees a connection, bytes, or the end of the connection. */
  connected(wire: Wire): void;
  sent(wire: Wire): void;
  hungUp(wire: Wire): void;
  trace(kind: 'message' | 'reply' | 'connect' | 'hangUp', a?: number, b?: number, c?: number): void;
}

const BUFFER_BYTES = 16384;

export class SimFrontend {
  /** As negotiated, of the latest session. */
  features = 0n;
  protocolFeatures = 0n;
  readonly #world: FrontendWorld;
  readonly #setup: Setup;
  readonly #ram: GuestRam;
  readonly #arena: Arena;
  readonly #buffer: number;
  readonly #counts = new Int32Array(2);
  readonly #fds = new Int32Array(1);
  #receivedFds: number[] = [];
  /** The region of requests in flight, as the daemon described it. Kept over connections. */
  #inflight: { readonly fd: number; readonly payload: Buffer } | null = null;
  #fd = -1;
  #wire: Wire | null = null;
  #received = Buffer.alloc(0);

  constructor(world: FrontendWorld, setup: Setup, ram: GuestRam, arena: Arena) {
    this.#world = world;
    this.#setup = setup;
    this.#ram = ram;
    this.#arena = arena;
    this.#buffer = arena.allocate(BUFFER_BYTES);
  }

  has(feature: number): boolean {
    return (this.features & mask(feature)) !== 0n;
  }

  hasProtocol(feature: number): boolean {
    return (this.protocolFeatures & mask(feature)) !== 0n;
  }

  /** Connects and negotiates. */
  *connect(): Script {
    this.#fd = check(native.socketConnect(this.#world.socketPath), 'connect to the daemon');
    this.#wire = { passing: [], isClosed: false };
    this.#received = Buffer.alloc(0);
    this.protocolFeatures = 0n;
    this.#world.trace('connect');
    this.#world.connected(this.#wire);
    const offered = yield* this.askU64(MessageId.getFeatures);
    const rings = this.#setup.packed ? mask(Feature.ringPacked) : 0n;
    this.features = offered & (FEATURES_KNOWN | rings) & ~mask(...this.#setup.withoutFeatures);
    const protocol = yield* this.askU64(MessageId.getProtocolFeatures);
    const accepted = protocol & PROTOCOL_FEATURES_KNOWN & ~mask(...this.#setup.withoutProtocolFeatures);
    yield* this.tell(MessageId.setProtocolFeatures, u64(accepted));
    this.protocolFeatures = accepted;
    yield* this.tell(MessageId.setOwner);
    yield* this.tell(MessageId.setFeatures, u64(this.features));
  }

  /** All regions: one by one where that was negotiated, else as a table. */
  *shareMemory(): Script {
    const { regions } = this.#ram;
    if (this.hasProtocol(ProtocolFeature.configureMemSlots)) {
      for (const region of regions) {
        yield* this.tell(MessageId.addMemReg, Buffer.concat([u64(0), this.#ram.describe(region)]), [region.fd]);
      }
    } else {
      yield* this.shareMemoryTable();
    }
  }

  /** A region comes, or goes, after what is in flight. */
  *changeMemory(region: RamRegion, comes: boolean): Script {
    if (!this.hasProtocol(ProtocolFeature.configureMemSlots)) yield* this.shareMemoryTable();
    else {
      const payload = Buffer.concat([u64(0), this.#ram.describe(region)]);
      if (comes) yield* this.tell(MessageId.addMemReg, payload, [region.fd]);
      else yield* this.tell(MessageId.remMemReg, payload);
    }
    yield* this.barrier();
  }

  *shareMemoryTable(): Script {
    const { regions } = this.#ram;
    const payload = Buffer.concat([u32(regions.length, 0), ...regions.map((region) => this.#ram.describe(region))]);
    yield* this.tell(
      MessageId.setMemTable,
      payload,
      regions.map(({ fd }) => fd),
    );
  }

  /** Hands over the in-flight region, which the daemon makes the first time. */
  *shareInflight(queues: number, queueSize: number): Script {
    if (!this.hasProtocol(ProtocolFeature.inflightShmfd)) return;
    if (this.#inflight === null) {
      const request = encodeInflight({ mmapSize: 0, mmapOffset: 0, queues, queueSize });
      const payload = yield* this.ask(MessageId.getInflightFd, request);
      this.#inflight = { fd: this.#receivedFds.pop()!, payload };
    }
    yield* this.tell(MessageId.setInflightFd, this.#inflight.payload, [this.#inflight.fd]);
  }

  /** What is in flight outlives the daemon. */
  get keepsInflight(): boolean {
    return this.#inflight !== null;
  }

  /** A new machine begins without one. */
  dropInflight(): void {
    if (this.#inflight !== null) native.fileClose(this.#inflight.fd);
    this.#inflight = null;
  }

  *startRing(queue: FrontendQueue): Script {
    const { index, ring } = queue;
    const user = (address: number): Buffer => u64(this.#ram.userAddress(address));
    const { descriptors, available, used } = ring.parts;
    const addresses = [user(descriptors), user(used), user(available), u64(0)];
    yield* this.tell(MessageId.setVringNum, u32(index, ring.size));
    yield* this.tell(MessageId.setVringBase, u32(index, ring.base));
    yield* this.tell(MessageId.setVringAddr, Buffer.concat([u32(index, 0), ...addresses]));
    yield* this.tell(MessageId.setVringErr, u64(index), [queue.errFd]);
    yield* this.tell(MessageId.setVringKick, u64(index), [queue.kickFd]);
    yield* this.setCall(queue);
    yield* this.tell(MessageId.setVringEnable, u32(index, 1));
  }

  *setCall(queue: FrontendQueue): Script {
    yield* this.tell(MessageId.setVringCall, u64(queue.index), [queue.callFd]);
  }

  /** Stops a ring; returns where it is to go on. */
  *stopRing(queue: FrontendQueue): Script<number> {
    return baseOf(yield* this.ask(MessageId.getVringBase, u32(queue.index, 0)));
  }

  /** The answer to GET_VRING_BASE that a daemon which is gone has left in the socket; null: it had not answered. */
  lastBase(): number | null {
    this.#pull();
    const reply = this.#takeReply(MessageId.getVringBase);
    return reply === null ? null : baseOf(reply);
  }

  *setWriteback(on: boolean): Script {
    const payload = Buffer.concat([u32(ConfigAt.writeback, 1, 0), Buffer.of(on ? 1 : 0)]);
    yield* this.tell(MessageId.setConfig, payload);
    yield* this.barrier();
  }

  /** Returns when everything said before was carried out. */
  *barrier(): Script {
    yield* this.askU64(MessageId.getFeatures);
  }

  *tell(id: number, payload: Uint8Array = Buffer.alloc(0), fds: readonly number[] = []): Script {
    if (!this.hasProtocol(ProtocolFeature.replyAck)) {
      this.#send(encodeMessage(id, payload), fds);
      return;
    }
    this.#send(encodeMessage(id, payload, { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY }), fds);
    const reply = yield* this.#receive(id);
    if (reply.readBigUInt64LE() !== 0n) throw new Violation(`message ${id} was refused`);
  }

  *ask(id: number, payload: Uint8Array = Buffer.alloc(0)): Script<Buffer> {
    this.#send(encodeMessage(id, payload));
    return yield* this.#receive(id);
  }

  *askU64(id: number): Script<bigint> {
    return (yield* this.ask(id)).readBigUInt64LE();
  }

  /** Closes the connection without a word. */
  hangUp(): void {
    for (const fd of this.#receivedFds) native.fileClose(fd);
    this.#receivedFds = [];
    if (this.#wire === null) return;
    this.#world.trace('hangUp');
    const wire = this.#wire;
    this.#wire = null;
    wire.isClosed = true;
    native.fileClose(this.#fd);
    this.#world.hungUp(wire);
  }

  close(): void {
    this.hangUp();
    this.dropInflight();
    this.#arena.release(this.#buffer);
  }

  #send(bytes: Uint8Array, fds: readonly number[] = []): void {
    const wire = this.#wire!;
    this.#arena.view8(this.#buffer, bytes.length).set(bytes);
    wire.passing.push(...fds);
    const address = this.#arena.baseAddress + this.#buffer;
    const sent = native.socketSend(this.#fd, address, bytes.length, Int32Array.from(fds));
    if (sent !== bytes.length) throw new Violation('the daemon closed the connection');
    this.#world.trace(
      'message',
      new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true),
      bytes.length,
      fds.length,
    );
    this.#world.sent(wire);
  }

  *#receive(id: number): Script<Buffer> {
    for (;;) {
      if (!this.#pull()) throw new Violation('the daemon ended the session');
      const reply = this.#takeReply(id);
      if (reply !== null) return reply;
      yield;
    }
  }

  /** The payload of the answer to a message, when all of it is there. */
  #takeReply(id: number): Buffer | null {
    const lengthBytes =
      this.#received.length < MESSAGE_HEADER_BYTES ? Infinity : MESSAGE_HEADER_BYTES + this.#received.readUInt32LE(8);
    if (this.#received.length < lengthBytes) return null;
    const reply = this.#received.subarray(0, lengthBytes);
    this.#received = Buffer.from(this.#received.subarray(lengthBytes));
    this.#world.trace('reply', reply.readUInt32LE(0), reply.length);
    if (reply.readUInt32LE(0) !== id) throw new Violation(`message ${id} was answered by ${reply.readUInt32LE(0)}`);
    return reply.subarray(MESSAGE_HEADER_BYTES);
  }

  /** Receives what is there. Returns false when the connection has ended. */
  #pull(): boolean {
    const address = this.#arena.baseAddress + this.#buffer;
    const count = native.socketReceive(this.#fd, address, BUFFER_BYTES, this.#fds, this.#counts);
    if (count === -EAGAIN) return true;
    if (count <= 0) return false;
    this.#receivedFds.push(...this.#fds.subarray(0, this.#counts[0]));
    this.#received = Buffer.concat([this.#received, this.#arena.view8(this.#buffer, count)]);
    return true;
  }
}

function baseOf(payload: Buffer): number {
  return payload.readUInt32LE(4);
}
