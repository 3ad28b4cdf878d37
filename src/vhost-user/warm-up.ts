/**
 * Warming up: the data path is run some thousand times before anybody is served, on a guest of our own, so that the first
 * real requests find compiled code. Cold code takes some hundred microseconds a request, and code that has seen only
 * one kind of request is compiled again at the first of another.
 *
 * The guest is a memfd with one split ring; the requests are those of Linux (indirect, event index), plus some that fail.
 */
import { check, native } from '../../native/index.js';
import type { OpenBdev } from '../bdev/bdev.js';
import type { Reactor } from '../poller/reactor.js';
import { BlkDevice } from './blk-device.js';
import { newControllerStats } from './controller-stats.js';
import { GuestMemory } from './guest-memory.js';
import { FeatureHi } from './protocol.js';
import { BLK_ID_BYTES, BlkType } from './virtio-blk.js';
import { VringPoller } from './vring-poller.js';
import { Vring } from './vring.js';

const RING_SIZE = 128;
/** Heads in use. The descriptors behind them serve chains without an indirect table, two to a head. */
const HEADS = 32;
const BATCH = 16;
const MEMORY_BYTES = 1024 * 1024;
// Layout of the guest, in bytes from its start.
const DESCRIPTORS_AT = 0;
const AVAILABLE_AT = 0x1000;
const USED_AT = 0x2000;
const REQUESTS_AT = 0x10000;
const REQUEST_BYTES = 0x80;
const HEADER_AT = 0x40;
const STATUS_AT = 0x60;
const DATA_AT = 0x40000;
const DATA_BYTES = 4096;

const DESC_NEXT = 1;
const DESC_WRITE = 2;
const DESC_INDIRECT = 4;

/** What the requests are, in turn: mostly reads and writes, some of the rest. */
const MIX = [
  BlkType.in, BlkType.out, BlkType.in, BlkType.out, BlkType.in, BlkType.flush, BlkType.out, BlkType.in,
  BlkType.out, BlkType.in, BlkType.getId, BlkType.out, BlkType.in, BlkType.out, BlkType.in, 99,
]; // prettier-ignore

const IDLE_STEPS = 200;

/** Steps that a request may take before it counts as lost. */
const STEPS_MAX = 1_000_000;

/**
 * Runs `requests` requests through a disk that may be written over: at depth 1 and in batches, with the reactor busy and with
 * it asking for kicks. The bdev is left open; nothing of the guest remains.
 */
export function warmUp(reactor: Reactor, open: OpenBdev, requests: number): void {
  const memfd = check(native.memfdCreate('strata-warm-up', MEMORY_BYTES), 'create memory to warm up with');
  const memory = new GuestMemory(reactor.arena, reactor.memory);
  const device = new BlkDevice(
    open,
    { serial: 'warm-up', queues: 1, readOnly: false, writeCache: true },
    newControllerStats(),
  );
  device.acknowledge(device.offeredLo, FeatureHi.version1);
  const vring = new Vring(0, device, memory, reactor.ring);
  const poller = new VringPoller(reactor, [vring]);
  try {
    memory.add({ guestAddress: 0, userAddress: 0, sizeBytes: MEMORY_BYTES, mmapOffset: 0 }, memfd);
    vring.setSize(RING_SIZE);
    vring.setAddresses({ descriptors: DESCRIPTORS_AT, available: AVAILABLE_AT, used: USED_AT }, null);
    const kickFd = check(native.eventfdCreate(), 'create an eventfd');
    vring.setKick(kickFd);
    vring.setCall(check(native.eventfdCreate(), 'create an eventfd'));
    vring.enabled = true;
    vring.startIfReady();
    poller.onMemoryFault = () => undefined;
    poller.start();
    // A session before its rings are started.
    for (let i = 0; i < IDLE_STEPS; i++) {
      reactor.step();
      poller.arm();
      poller.disarm();
    }
    poller.running = [vring];
    const guest = new WarmUpGuest(reactor, memory, open.bdev.blockCount * open.bdev.blockSizeBytes);
    for (let done = 0, depth = 1; done < requests; done += depth) {
      native.eventfdSignal(kickFd);
      guest.round(depth);
      poller.arm();
      poller.disarm();
      depth = depth === 1 ? BATCH : 1;
    }
  } finally {
    poller.stop();
    vring.stop();
    vring.close();
    memory.clear();
    device.close();
    native.fileClose(memfd);
  }
}

class WarmUpGuest {
  readonly #reactor: Reactor;
  readonly #words: Uint32Array;
  readonly #halves: Uint16Array;
  readonly #blocks: number;
  #available = 0;
  #turn = 0;

  constructor(reactor: Reactor, memory: GuestMemory, diskBytes: number) {
    const base = memory.translate(0, MEMORY_BYTES);
    this.#reactor = reactor;
    this.#words = reactor.arena.view32(base, MEMORY_BYTES / 4);
    this.#halves = reactor.arena.view16(base, MEMORY_BYTES / 2);
    this.#blocks = Math.max(1, Math.floor(diskBytes / DATA_BYTES));
  }

  /** Offers `depth` requests and steps the reactor until all are answered. */
  round(depth: number): void {
    for (let i = 0; i < depth; i++) {
      const head = this.#available % HEADS;
      this.#fill(head, MIX[this.#turn++ % MIX.length]!);
      this.#halves[AVAILABLE_AT / 2 + 2 + (this.#available % RING_SIZE)] = head;
      this.#available++;
    }
    this.#halves[AVAILABLE_AT / 2 + 1] = this.#available;
    // Every other round asks to be notified.
    this.#halves[AVAILABLE_AT / 2 + 2 + RING_SIZE] = this.#available - (depth & 1);
    const wanted = this.#available & 0xffff;
    for (let steps = 0; this.#halves[USED_AT / 2 + 1] !== wanted; steps++) {
      if (steps === STEPS_MAX) throw new Error('warm-up: a request was not answered');
      if (!this.#reactor.step()) this.#reactor.ring.wait(1000);
    }
  }

  #fill(head: number, type: number): void {
    const request = REQUESTS_AT + head * REQUEST_BYTES;
    const dataBytes = type === BlkType.in || type === BlkType.out ? DATA_BYTES : BLK_ID_BYTES;
    const dataFlags = type === BlkType.out ? DESC_NEXT : DESC_NEXT | DESC_WRITE;
    // One in four without an indirect table: header in the head itself, data and status in the two descriptors kept for it.
    const isIndirect = head % 4 !== 0;
    const table = isIndirect ? request / 16 : 0;
    const first = isIndirect ? 0 : head;
    const data = isIndirect ? 1 : HEADS + 2 * head;
    if (isIndirect) this.#describe(head, request, 3 * 16, DESC_INDIRECT, 0);
    this.#describe(table + first, request + HEADER_AT, 16, DESC_NEXT, type === BlkType.flush ? data + 1 : data);
    this.#describe(table + data, DATA_AT + head * DATA_BYTES, dataBytes, dataFlags, data + 1);
    this.#describe(table + data + 1, request + STATUS_AT, 1, DESC_WRITE, 0);
    const header = (request + HEADER_AT) / 4;
    this.#words[header] = type;
    this.#words[header + 2] = (this.#turn % this.#blocks) * (DATA_BYTES / 512);
    this.#words[header + 3] = 0;
  }

  /** Writes descriptor `at`, counted in 16 bytes from the start of the guest. */
  #describe(at: number, address: number, length: number, flags: number, next: number): void {
    const word = at * 4;
    this.#words[word] = address;
    this.#words[word + 1] = 0;
    this.#words[word + 2] = length;
    this.#words[word + 3] = flags | (next << 16);
  }
}
