/**
 * A vhost-user-blk front-end for tests and benchmarks: what a virtual machine monitor and the driver in its guest do together,
 * over a real socket with real shared memory.
 *
 *     const frontend = await Frontend.connect(socketPath, { queues: 2 });
 *     const { status, data } = await frontend.queue.read(0, 4096);
 *     await frontend.close();
 *
 * `connect` does all of the set-up in the order QEMU does it; `open` only connects, for tests that go their own way through
 * the same steps or send what no front-end should (`connection.send(encodeMessage(...))`).
 */
import { Arena, native } from '../../native/index.js';
import { Connection, Disconnected } from './connection.js';
import type { Reply } from './connection.js';
import type { DirtyBitmap } from './dirty-bitmap.js';
import { DriverQueue } from './driver-queue.js';
import { DriverMemory } from './guest-memory.js';
import type { Region, RegionOptions } from './guest-memory.js';
import { PackedDriverQueue } from './packed-driver-queue.js';
import {
  CONFIG_BYTES,
  ConfigAt,
  FEATURES_KNOWN,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION_1,
  INFLIGHT_BYTES,
  Feature,
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  encodeInflight,
  VRING_FLAG_LOG,
  encodeMessage,
  mask,
  u32,
  u64,
} from './protocol.js';
import { Waiter } from './waiting.js';

export interface FrontendOptions {
  /** Virtio features to accept of those offered. Default: all this driver knows. */
  readonly features?: bigint;
  /** Protocol features to accept of those offered. Default: all this driver knows. */
  readonly protocolFeatures?: bigint;
  /** Packed rings instead of split ones. */
  readonly packed?: boolean;
  /** Queues to set up. Default 1. */
  readonly queues?: number;
  /** Entries per queue. Default 128. */
  readonly queueSize?: number;
  readonly regions?: readonly RegionOptions[];
  /** Default one shared by all front-ends of the process. */
  readonly arena?: Arena;
  /** For each wait. Default 5000. */
  readonly timeoutMs?: number;
  /** Drives the device when it lives in this thread. */
  readonly step?: () => void;
}

/** An in-flight region as messages describe it, with the descriptor of its memory. */
export interface InflightArea {
  readonly fd: number;
  readonly mmapSize: number;
  readonly mmapOffset: number;
  readonly queues: number;
  readonly queueSize: number;
}

/** The back-end answered a message by a failure. */
export class Refused extends Error {
  constructor(readonly id: number) {
    super(`the back-end refused message ${id}`);
    this.name = 'Refused';
  }
}

/** The virtio-blk configuration space, up to write_zeroes_may_unmap. Sectors of 512 bytes. */
export interface BlkConfig {
  readonly capacitySectors: number;
  readonly sizeMaxBytes: number;
  readonly segMax: number;
  readonly blkSizeBytes: number;
  readonly physicalBlockExp: number;
  readonly writeback: number;
  readonly numQueues: number;
  readonly maxDiscardSectors: number;
  readonly maxDiscardSegments: number;
  readonly discardSectorAlignment: number;
  readonly maxWriteZeroesSectors: number;
  readonly maxWriteZeroesSegments: number;
  readonly writeZeroesMayUnmap: number;
}

let sharedArena: Arena | undefined;

/** Address space is given back only by garbage collection, so front-ends without an arena of their own share one. */
function arenaOfProcess(): Arena {
  return (sharedArena ??= new Arena(2 ** 38));
}

export class Frontend {
  readonly memory: DriverMemory;
  readonly waiter: Waiter;
  connection: Connection;
  readonly queues: DriverQueue[] = [];
  /** As negotiated. */
  features = 0n;
  protocolFeatures = 0n;
  /** As offered by the back-end. */
  offeredFeatures = 0n;
  offeredProtocolFeatures = 0n;
  /** Kept over reconnections, as QEMU keeps it; null until the back-end made one. */
  inflightArea: InflightArea | null = null;

  readonly #socketPath: string;
  readonly #options: FrontendOptions;

  private constructor(socketPath: string, options: FrontendOptions) {
    const arena = options.arena ?? arenaOfProcess();
    this.#socketPath = socketPath;
    this.#options = options;
    this.waiter = new Waiter(options.timeoutMs ?? 5000, options.step);
    this.connection = new Connection(socketPath, arena, this.waiter);
    this.memory = new DriverMemory(arena, options.regions);
    for (let index = 0; index < (options.queues ?? 1); index++) {
      const { memory, waiter } = this;
      const Queue = options.packed === true ? PackedDriverQueue : DriverQueue;
      this.queues.push(new Queue({ index, size: options.queueSize ?? 128, memory, waiter }));
    }
  }

  /** Connects and makes memory and queues; says nothing yet. Throws SystemError. */
  static open(socketPath: string, options: FrontendOptions = {}): Frontend {
    return new Frontend(socketPath, options);
  }

  /** Connects, negotiates, shares memory, starts and enables all queues. Throws SystemError, Disconnected, Refused. */
  static async connect(socketPath: string, options: FrontendOptions = {}): Promise<Frontend> {
    const frontend = new Frontend(socketPath, options);
    try {
      await frontend.setUp();
      return frontend;
    } catch (error) {
      frontend.close();
      throw error;
    }
  }

  /** The first queue. */
  get queue(): DriverQueue {
    return this.queues[0]!;
  }

  has(feature: number): boolean {
    return (this.features & mask(feature)) !== 0n;
  }

  hasProtocol(feature: number): boolean {
    return (this.protocolFeatures & mask(feature)) !== 0n;
  }

  // ---- Messages

  /** Sends a message that has no reply of its own; with REPLY_ACK waits for the acknowledgement. Throws Refused. */
  async tell(id: number, payload: Uint8Array = Buffer.alloc(0), fds: readonly number[] = []): Promise<void> {
    if (!this.hasProtocol(ProtocolFeature.replyAck)) {
      await this.connection.send(encodeMessage(id, payload), fds);
      return;
    }
    await this.connection.send(encodeMessage(id, payload, { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY }), fds);
    const reply = await this.#receive(id);
    if (reply.payload.length !== 8)
      throw new Error(`acknowledgement of message ${id} has ${reply.payload.length} bytes`);
    if (reply.payload.readBigUInt64LE() !== 0n) throw new Refused(id);
  }

  /** Sends a message and returns the payload of its reply. */
  async ask(id: number, payload: Uint8Array = Buffer.alloc(0), fds: readonly number[] = []): Promise<Buffer> {
    await this.connection.send(encodeMessage(id, payload), fds);
    return (await this.#receive(id)).payload;
  }

  async askU64(id: number, payload?: Uint8Array): Promise<bigint> {
    const reply = await this.ask(id, payload);
    if (reply.length !== 8) throw new Error(`the reply to message ${id} has ${reply.length} bytes`);
    return reply.readBigUInt64LE();
  }

  /** Returns when the back-end has carried out everything sent so far. */
  async barrier(): Promise<void> {
    await this.askU64(MessageId.getFeatures);
  }

  // ---- Steps of the set-up

  async setUp(): Promise<void> {
    await this.negotiate();
    if (this.hasProtocol(ProtocolFeature.inflightShmfd)) await this.shareInflight();
    await this.shareMemory();
    for (const queue of this.queues) await this.startQueue(queue);
    await this.barrier();
  }

  /** Hands over the in-flight region, which the back-end makes the first time. */
  async shareInflight(): Promise<void> {
    this.inflightArea ??= await this.getInflight(this.queues.length, this.queues[0]!.size);
    await this.setInflight(this.inflightArea);
  }

  async getInflight(queues: number, queueSize: number): Promise<InflightArea> {
    const request = encodeInflight({ mmapSize: 0, mmapOffset: 0, queues, queueSize });
    await this.connection.send(encodeMessage(MessageId.getInflightFd, request));
    const { payload, fds } = await this.#receive(MessageId.getInflightFd);
    const [fd] = fds;
    if (payload.length !== INFLIGHT_BYTES || fd === undefined || fds.length !== 1) {
      throw new Error(`GET_INFLIGHT_FD was answered by ${payload.length} bytes and ${fds.length} descriptors`);
    }
    return {
      fd: this.connection.keep(fd),
      mmapSize: Number(payload.readBigUInt64LE(0)),
      mmapOffset: Number(payload.readBigUInt64LE(8)),
      queues: payload.readUInt16LE(16),
      queueSize: payload.readUInt16LE(18),
    };
  }

  async setInflight(area: InflightArea): Promise<void> {
    await this.tell(MessageId.setInflightFd, encodeInflight(area), [area.fd]);
  }

  async negotiate(): Promise<void> {
    this.offeredFeatures = await this.askU64(MessageId.getFeatures);
    this.features = this.offeredFeatures & ((this.#options.features ?? FEATURES_KNOWN) | this.#ringFeatures);
    if (this.has(Feature.protocolFeatures)) {
      this.offeredProtocolFeatures = await this.askU64(MessageId.getProtocolFeatures);
      const accepted = this.offeredProtocolFeatures & (this.#options.protocolFeatures ?? PROTOCOL_FEATURES_KNOWN);
      await this.tell(MessageId.setProtocolFeatures, u64(accepted));
      this.protocolFeatures = accepted;
    }
    await this.tell(MessageId.setOwner);
    await this.tell(MessageId.setFeatures, u64(this.features));
    for (const queue of this.queues) {
      queue.eventIdx = this.has(Feature.eventIdx);
      queue.indirect = this.has(Feature.indirectDescriptors);
    }
  }

  /** Tells of all regions: one by one where that was negotiated, else as a table. */
  async shareMemory(): Promise<void> {
    if (this.hasProtocol(ProtocolFeature.configureMemSlots)) {
      for (const region of this.memory.regions) await this.shareRegion(region);
    } else {
      await this.shareMemoryTable();
    }
  }

  async shareMemoryTable(regions: readonly Region[] = this.memory.regions): Promise<void> {
    const payload = Buffer.concat([u32(regions.length, 0), ...regions.map((region) => region.describe())]);
    await this.tell(
      MessageId.setMemTable,
      payload,
      regions.map((region) => region.fd),
    );
  }

  async shareRegion(region: Region): Promise<void> {
    await this.tell(MessageId.addMemReg, Buffer.concat([u64(0), region.describe()]), [region.fd]);
  }

  async unshareRegion(region: Region): Promise<void> {
    await this.tell(MessageId.remMemReg, Buffer.concat([u64(0), region.describe()]));
  }

  /** @param base where to start, as SET_VRING_BASE has it for the kind of ring */
  async startQueue(queue: DriverQueue, base = queue.base, enable = true): Promise<void> {
    const { index, size } = queue;
    await this.tell(MessageId.setVringNum, u32(index, size));
    await this.tell(MessageId.setVringBase, u32(index, base));
    await this.setQueueAddresses(queue);
    await this.tell(MessageId.setVringKick, u64(index), [queue.kickFd]);
    await this.tell(MessageId.setVringCall, u64(index), [queue.callFd]);
    await this.tell(MessageId.setVringErr, u64(index), [queue.errFd]);
    if (enable && this.has(Feature.protocolFeatures)) await this.enableQueue(queue, true);
  }

  /** @param logAddress guest address at which writes to the used ring are to be logged */
  async setQueueAddresses(queue: DriverQueue, logAddress?: number): Promise<void> {
    const user = (guestAddress: number): Buffer => u64(this.memory.userAddress(guestAddress));
    const addresses = [user(queue.descriptors), user(queue.used), user(queue.available), u64(logAddress ?? 0)];
    const flags = logAddress === undefined ? 0 : VRING_FLAG_LOG;
    await this.tell(MessageId.setVringAddr, Buffer.concat([u32(queue.index, flags), ...addresses]));
  }

  async setFeatures(features: bigint): Promise<void> {
    await this.tell(MessageId.setFeatures, u64(features));
    this.features = features;
  }

  // ---- Dirty log

  async setLogBase(log: DirtyBitmap): Promise<void> {
    const description = log.describe();
    const reply = await this.ask(MessageId.setLogBase, description, [log.fd]);
    if (!reply.equals(description)) throw new Error('the reply to SET_LOG_BASE is not its payload');
  }

  /** Switches logging on or off, in QEMU's order: the log, the feature, each ring with its used ring's address. */
  async setLogging(log: DirtyBitmap | null): Promise<void> {
    if (log !== null) await this.setLogBase(log);
    const others = this.features & ~mask(Feature.logAll);
    await this.setFeatures(log === null ? others : others | mask(Feature.logAll));
    for (const queue of this.queues) await this.setQueueAddresses(queue, log === null ? undefined : queue.used);
  }

  async enableQueue(queue: DriverQueue, enabled: boolean): Promise<void> {
    await this.tell(MessageId.setVringEnable, u32(queue.index, enabled ? 1 : 0));
  }

  /** Stops the ring once its requests are done. Returns the index of the available ring where it is to go on. */
  async stopQueue(queue: DriverQueue): Promise<number> {
    const base = (await this.ask(MessageId.getVringBase, u32(queue.index, 0))).readUInt32LE(4);
    queue.stoppedAt(base);
    return base;
  }

  // ---- Configuration space

  /** Bytes of the device's configuration space. */
  async getConfig(offset: number, lengthBytes: number): Promise<Buffer> {
    const payload = Buffer.concat([u32(offset, lengthBytes, 0), Buffer.alloc(lengthBytes)]);
    const reply = await this.ask(MessageId.getConfig, payload);
    if (reply.length === 0) throw new Refused(MessageId.getConfig);
    return reply.subarray(12);
  }

  async setConfig(offset: number, bytes: Uint8Array, flags = 0): Promise<void> {
    await this.tell(MessageId.setConfig, Buffer.concat([u32(offset, bytes.length, flags), bytes]));
  }

  async blkConfig(): Promise<BlkConfig> {
    const bytes = await this.getConfig(0, CONFIG_BYTES);
    return {
      capacitySectors: Number(bytes.readBigUInt64LE(ConfigAt.capacity)),
      sizeMaxBytes: bytes.readUInt32LE(ConfigAt.sizeMax),
      segMax: bytes.readUInt32LE(ConfigAt.segMax),
      blkSizeBytes: bytes.readUInt32LE(ConfigAt.blkSize),
      physicalBlockExp: bytes.readUInt8(ConfigAt.physicalBlockExp),
      writeback: bytes.readUInt8(ConfigAt.writeback),
      numQueues: bytes.readUInt16LE(ConfigAt.numQueues),
      maxDiscardSectors: bytes.readUInt32LE(ConfigAt.maxDiscardSectors),
      maxDiscardSegments: bytes.readUInt32LE(ConfigAt.maxDiscardSeg),
      discardSectorAlignment: bytes.readUInt32LE(ConfigAt.discardSectorAlignment),
      maxWriteZeroesSectors: bytes.readUInt32LE(ConfigAt.maxWriteZeroesSectors),
      maxWriteZeroesSegments: bytes.readUInt32LE(ConfigAt.maxWriteZeroesSeg),
      writeZeroesMayUnmap: bytes.readUInt8(ConfigAt.writeZeroesMayUnmap),
    };
  }

  // ---- Ends

  /** Stops all queues and closes the connection, as a virtual machine does that is shut down. Memory stays. */
  async detach(): Promise<void> {
    for (const queue of this.queues) await this.enableQueueIfNegotiated(queue, false);
    for (const queue of this.queues) await this.stopQueue(queue);
    this.connection.close();
  }

  /** Closes the connection without a word. Memory and rings stay as they are. */
  disconnect(): void {
    this.connection.close();
  }

  /** Connects anew with the same memory, rings and in-flight region. Rings go on at the used index, unless that says otherwise. */
  async reconnect(): Promise<void> {
    this.connection.close();
    this.connection = new Connection(this.#socketPath, this.memory.arena, this.waiter);
    this.features = 0n;
    this.protocolFeatures = 0n;
    await this.setUp();
  }

  /** Lets everything go. */
  close(): void {
    this.connection.close();
    if (this.inflightArea !== null) native.fileClose(this.inflightArea.fd);
    this.inflightArea = null;
    for (const queue of this.queues) queue.close();
    this.memory.close();
  }

  async enableQueueIfNegotiated(queue: DriverQueue, enabled: boolean): Promise<void> {
    if (this.has(Feature.protocolFeatures)) await this.enableQueue(queue, enabled);
  }

  get #ringFeatures(): bigint {
    return this.#options.packed === true ? mask(Feature.ringPacked) : 0n;
  }

  async #receive(id: number): Promise<Reply> {
    const reply = await this.connection.receive();
    if (reply.id !== id || (reply.flags & (FLAG_REPLY | 3)) !== (FLAG_REPLY | FLAG_VERSION_1)) {
      throw new Error(`message ${id} was answered by message ${reply.id} with flags ${reply.flags}`);
    }
    return reply;
  }
}

export { Disconnected };
