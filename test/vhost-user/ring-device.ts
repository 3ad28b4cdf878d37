/**
 * A disk behind one ring, without a socket: the driver's and the device's side of a virtqueue over the same memfds, on a reactor
 * that is stepped by hand. Guest memory is mapped between two pages that nobody may touch.
 */
import assert from 'node:assert/strict';
import { Arena, check, native } from '../../native/index.js';
import type { BdevConfig, OpenBdev } from '../../src/bdev/bdev.js';
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller } from '../../src/poller/poller.js';
import { BlkDevice } from '../../src/vhost-user/blk-device.js';
import { BlkQueue } from '../../src/vhost-user/blk-queue.js';
import { newControllerStats } from '../../src/vhost-user/controller-stats.js';
import { GuestMemory } from '../../src/vhost-user/guest-memory.js';
import { FeatureHi } from '../../src/vhost-user/protocol.js';
import { PackedVirtqueue } from '../../src/vhost-user/packed-virtqueue.js';
import { SplitVirtqueue } from '../../src/vhost-user/split-virtqueue.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import { DriverQueue, writeDescriptor } from '../frontend/driver-queue.js';
import type { Completion, Descriptor, Request, RequestSpec } from '../frontend/driver-queue.js';
import { DriverMemory } from '../frontend/guest-memory.js';
import type { Region, RegionOptions } from '../frontend/guest-memory.js';
import { PackedDriverQueue, writePackedDescriptor } from '../frontend/packed-driver-queue.js';
import { DESCRIPTOR_BYTES, DescriptorFlag } from '../frontend/protocol.js';
import { Waiter } from '../frontend/waiting.js';
import { Rig } from '../support/rig.js';
import { writeChain } from './chains.js';
import { HELD_US, JournalChannel, memoryDisk } from './served-disk.js';

const MIB = 2 ** 20;
const PAGE_BYTES = 4096;
const CANARY = 0xc5;

/** The driver's mappings of guest memory; one for all tests of a file. */
let driverArena: Arena | undefined;

export interface RingDeviceOptions {
  readonly configs?: readonly BdevConfig[];
  readonly regions?: readonly RegionOptions[];
  /** A packed ring instead of a split one. */
  readonly packed?: boolean;
  readonly queueSize?: number;
  readonly eventIdx?: boolean;
  readonly indirect?: boolean;
  readonly readOnly?: boolean;
  readonly serial?: string;
  /** Both indices at the start. */
  readonly base?: number;
}

export class RingDevice {
  readonly rig = new Rig('ring');
  readonly memory: DriverMemory;
  readonly guestMemory: GuestMemory;
  readonly device: BlkDevice;
  readonly driver: DriverQueue;
  readonly journal: JournalChannel;
  virtqueue!: Virtqueue;
  queue!: BlkQueue;
  /** Why the ring broke, each time it did. */
  readonly faults: string[] = [];
  /** Times the driver was to be notified. */
  notifications = 0;

  readonly #options: RingDeviceOptions;
  readonly #open: OpenBdev;
  readonly #canaries: readonly Buffer[];
  readonly #canaryOffsets: readonly number[];
  readonly #pollers: readonly (readonly [Poller, PollPhase])[];

  constructor(options: RingDeviceOptions = {}) {
    this.#options = options;
    const { rig } = this;
    const arena = (driverArena ??= new Arena(2 ** 36));
    this.memory = new DriverMemory(arena, options.regions ?? [{ guestAddress: MIB, sizeBytes: 8 * MIB }]);
    const Driver = options.packed === true ? PackedDriverQueue : DriverQueue;
    this.driver = new Driver({
      index: 0,
      size: options.queueSize ?? 128,
      memory: this.memory,
      waiter: new Waiter(5000),
    });
    this.guestMemory = new GuestMemory(rig.arena, rig.reactor.memory);
    const before = rig.arena.allocate(PAGE_BYTES);
    for (const region of this.memory.regions) this.guestMemory.add(region, region.fd);
    const after = rig.arena.allocate(PAGE_BYTES);
    this.#canaryOffsets = [before, after];
    this.#canaries = this.#canaryOffsets.map((at) => Buffer.from(rig.arena.buffer, at, PAGE_BYTES).fill(CANARY));

    this.#open = rig.open(options.configs ?? memoryDisk());
    this.journal = new JournalChannel(this.#open.channel);
    const { serial = 'serial', readOnly = false } = options;
    const blkOptions = { serial, readOnly, queues: 1, writeCache: true };
    const open = {
      bdev: this.#open.bdev,
      channel: this.journal,
      isIdle: () => this.#open.isIdle(),
      close: () => undefined,
    };
    this.device = new BlkDevice(open, blkOptions, newControllerStats());
    this.device.acknowledge(this.device.offeredLo, FeatureHi.version1);
    const taker = { poll: () => this.queue.poll() };
    const publisher = { poll: () => this.#publish() };
    this.#pollers = [
      [taker, PollPhase.take],
      [publisher, PollPhase.publish],
    ];
    this.restart(options.base ?? 0);
    for (const [poller, phase] of this.#pollers) rig.reactor.addPoller(poller, phase);
  }

  /**
   * Empties the ring and starts anew. Nothing is in flight.
   * @param base both indices; in a packed ring both places, with bit 15 set in the second lap
   */
  restart(base = 0): void {
    assert.equal((this.queue as BlkQueue | undefined)?.inflight ?? 0, 0, 'requests are in flight');
    const { driver } = this;
    const { eventIdx = false, indirect = true } = this.#options;
    this.faults.length = 0;
    this.journal.entries.length = 0;
    driver.reset();
    if (driver instanceof PackedDriverQueue) {
      driver.startAt({ index: base & 0x7fff, wrap: (base >>> 15) ^ 1 });
    } else {
      driver.availableBytes.writeUInt16LE(base, 2);
      driver.usedBytes.writeUInt16LE(base, 2);
      driver.resume();
    }
    driver.eventIdx = eventIdx;
    driver.indirect = indirect;
    this.virtqueue = this.makeVirtqueue(driver.base);
    this.queue = new BlkQueue(this.device, 0, this.rig.arena, this.virtqueue);
    this.queue.onFault = (fault) => this.faults.push(fault);
  }

  /** The device's side of the ring, started where SET_VRING_BASE says; a split used ring goes on where its memory says. */
  makeVirtqueue(base: number, memory = this.guestMemory): Virtqueue {
    const { driver } = this;
    const { eventIdx = false, indirect = true } = this.#options;
    const user = (address: number): number => this.guestMemory.translateUser(this.memory.userAddress(address), 1);
    const place = {
      size: driver.size,
      descriptors: user(driver.descriptors),
      available: user(driver.available),
      used: user(driver.used),
    };
    const Queue = this.driver instanceof PackedDriverQueue ? PackedVirtqueue : SplitVirtqueue;
    return new Queue(memory, place, base, eventIdx, indirect);
  }

  settle(steps = 4): void {
    for (let i = 0; i < steps; i++) this.rig.step();
  }

  /** Lets the completions go that the disk holds back. */
  release(): void {
    this.rig.clock.advance(HELD_US);
    this.settle();
  }

  /** Takes used entries; returns the completion of a request made by the driver queue. */
  completionOf(request: Request): Completion | undefined {
    while (this.driver.takeUsed() !== undefined);
    return request.completion;
  }

  /** Runs a request; throws when it is not answered at once. */
  run(spec: RequestSpec): Completion {
    const [request] = this.driver.submit(spec);
    for (let i = 0; i < 100; i++) {
      this.rig.step();
      const completion = this.completionOf(request!);
      if (completion !== undefined) return completion;
    }
    throw new Error(`request of type ${spec.type} was not answered: ${this.faults.join(', ')}`);
  }

  /** Offers a chain; returns its used entry, undefined when there is none. */
  offer(head: number): { readonly id: number; readonly lengthBytes: number } | undefined {
    this.driver.offer(head);
    this.settle();
    return this.driver.takeRawUsed();
  }

  /** Links the parts to a chain and offers it. Returns the used length; undefined when there is no answer. */
  offerChain(...parts: readonly Descriptor[]): number | undefined {
    const { driver } = this;
    const head = driver instanceof PackedDriverQueue ? driver.rawChain(parts) : writeChain(driver, parts);
    const used = this.offer(head);
    if (used !== undefined) assert.equal(used.id, head);
    return used?.lengthBytes;
  }

  /** A device-readable buffer that holds these bytes. */
  readable(content: Uint8Array, region?: Region): Descriptor {
    const address = this.memory.allocate(content.length, 16, region);
    this.memory.bytes(address, content.length).set(content);
    return { address, lengthBytes: content.length };
  }

  /** A device-writable buffer. */
  writable(lengthBytes: number, region?: Region): Descriptor {
    const address = this.memory.allocate(lengthBytes, 16, region);
    this.memory.bytes(address, lengthBytes).fill(0xff);
    return { address, lengthBytes, flags: DescriptorFlag.write };
  }

  bytes(descriptor: Descriptor): Buffer {
    return this.memory.bytes(Number(descriptor.address), descriptor.lengthBytes);
  }

  /** An indirect table of parts that follow each other, and the descriptor of it. */
  table(...parts: readonly Descriptor[]): Descriptor {
    return this.tableAt(this.memory.allocate(DESCRIPTOR_BYTES * parts.length), ...parts);
  }

  tableAt(address: number, ...parts: readonly Descriptor[]): Descriptor {
    if (this.driver instanceof PackedDriverQueue) return this.rawTable(address, parts);
    const linked = parts.map((part, i) =>
      i === parts.length - 1 ? part : { ...part, flags: (part.flags ?? 0) | DescriptorFlag.next, next: i + 1 },
    );
    return this.rawTable(address, linked);
  }

  /** An indirect table at an address, of descriptors as they are. */
  rawTable(address: number, descriptors: readonly Descriptor[]): Descriptor {
    descriptors.forEach((descriptor, i) => {
      const bytes = Buffer.alloc(DESCRIPTOR_BYTES);
      const { address: to, lengthBytes, flags = 0 } = descriptor;
      if (this.driver instanceof PackedDriverQueue) {
        writePackedDescriptor(bytes, { address: to, lengthBytes, id: 0, flags });
      } else {
        writeDescriptor(bytes, descriptor);
      }
      this.poke(address + DESCRIPTOR_BYTES * i, bytes);
    });
    return { address, lengthBytes: DESCRIPTOR_BYTES * descriptors.length, flags: DescriptorFlag.indirect };
  }

  /** Writes guest memory byte by byte: regions may meet in between. */
  poke(address: number, content: Uint8Array): void {
    content.forEach((byte, i) => (this.memory.bytes(address + i, 1)[0] = byte));
  }

  peek(address: number, lengthBytes: number): Buffer {
    return Buffer.from(Array.from({ length: lengthBytes }, (_, i) => this.memory.bytes(address + i, 1)[0]!));
  }

  /** Whether the guard pages touch the guest's memory on both sides, and nobody has touched them. */
  get guarded(): boolean {
    const { regions } = this.memory;
    const start = this.guestMemory.translateUser(regions[0]!.userAddress, 1);
    const end = this.guestMemory.translateUser(regions.at(-1)!.userAddress, 1) + regions.at(-1)!.sizeBytes;
    const [before, after] = this.#canaryOffsets as [number, number];
    return before + PAGE_BYTES === start && after === end && this.#areCanariesIntact();
  }

  close(): void {
    this.release();
    assert.equal(this.queue.inflight, 0, 'requests in flight');
    assert.ok(this.#areCanariesIntact(), 'memory beside the guest was written');
    for (const [poller] of this.#pollers) this.rig.reactor.removePoller(poller);
    this.#open.close();
    this.guestMemory.clear();
    for (const at of this.#canaryOffsets) this.rig.arena.release(at);
    this.driver.close();
    this.memory.close();
    this.rig.close();
  }

  #publish(): boolean {
    if (this.virtqueue.publish()) {
      this.notifications++;
      check(native.eventfdSignal(this.driver.callFd), 'notify the driver');
    }
    return false;
  }

  #areCanariesIntact(): boolean {
    return this.#canaries.every((canary) => canary.every((byte) => byte === CANARY));
  }
}
