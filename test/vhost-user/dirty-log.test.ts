/**
 * Goal: while a dirty log is in force, every page of guest memory that the device changes is marked in it, at the address the
 * front-end asked for, and no other; a log that is wrong or too small ends its session, and nothing beside it is written.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket. Guest memory is compared, page by page, with a copy
 * from before the device had its turn; the log is read by arithmetic of the test's own.
 */
import { setImmediate } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Arena, check, native } from '../../native/index.js';
import { DirtyBitmap, LOG_PAGE_BYTES, pagesOf } from '../frontend/dirty-bitmap.js';
import type { DirtyBitmapOptions } from '../frontend/dirty-bitmap.js';
import { encodeRanges } from '../frontend/driver-queue.js';
import type { DriverQueue, Request, RequestSpec } from '../frontend/driver-queue.js';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import { PackedDriverQueue } from '../frontend/packed-driver-queue.js';
import {
  DESCRIPTOR_BYTES,
  FEATURES_KNOWN,
  Feature,
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  RequestType,
  STATUS_UNANSWERED,
  Status,
  mask,
  u64,
} from '../frontend/protocol.js';
import { seededRandom } from '../support/seed.js';
import { DirtyLog, RingLog } from '../../src/vhost-user/dirty-log.js';
import { GuestMemory } from '../../src/vhost-user/guest-memory.js';
import { MemoryRanges } from '../../src/poller/memory-ranges.js';
import { RingDevice } from './ring-device.js';
import { DISK_BYTES, ServedDisk, heldDisk, openDescriptors } from './served-disk.js';

const MIB = 2 ** 20;
/** The second and third follow each other in guest addresses. */
const REGIONS = [
  { guestAddress: MIB, sizeBytes: MIB },
  { guestAddress: 0x1_4000_0000, sizeBytes: 4 * MIB, mmapOffset: 16 * 4096 },
  { guestAddress: 0x1_4000_0000 + 4 * MIB, sizeBytes: MIB },
];
/** Covers addresses up to 6 GiB. */
const LOG_BYTES = (6 * 2 ** 30) / LOG_PAGE_BYTES / 8;
const WITHOUT_EVENTS = FEATURES_KNOWN & ~mask(Feature.eventIdx);
/** So long that the device's event suppression is on another page than the descriptors. */
const PACKED = { packed: true, queueSize: 256 };
const KINDS = [
  ['split', false],
  ['packed', true],
] as const;
/** Beyond guest memory, within the log. */
const NOWHERE = 0x1_6000_0000;

let disk: ServedDisk;
let frontends: Frontend[];
let logs: DirtyBitmap[];
let descriptorsBefore: number;

beforeEach(() => {
  frontends = [];
  logs = [];
});

afterEach(() => {
  letGo();
  disk.close();
});

function serve(configs?: ReturnType<typeof heldDisk>): void {
  disk = configs === undefined ? new ServedDisk() : new ServedDisk({ configs });
  descriptorsBefore = openDescriptors();
}

function letGo(): void {
  for (const frontend of frontends) frontend.close();
  for (const log of logs) log.close();
  frontends = [];
  logs = [];
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
}

async function connect(options: Parameters<ServedDisk['connect']>[0] = {}): Promise<Frontend> {
  const frontend = await disk.connect({ regions: REGIONS, queueSize: 16, ...options });
  frontends.push(frontend);
  return frontend;
}

function makeLog(frontend: Frontend, options: Partial<DirtyBitmapOptions> = {}): DirtyBitmap {
  const log = new DirtyBitmap(frontend.memory.arena, { sizeBytes: LOG_BYTES, ...options });
  logs.push(log);
  return log;
}

/** Guest memory at one moment. */
class Snapshot {
  readonly #memory: Frontend['memory'];
  readonly #copies: readonly Buffer[];

  constructor({ memory }: Frontend) {
    this.#memory = memory;
    this.#copies = memory.regions.map(({ guestAddress, sizeBytes }) =>
      Buffer.from(memory.bytes(guestAddress, sizeBytes)),
    );
  }

  /** Pages that differ by now. */
  changed(): number[] {
    return this.#memory.regions.flatMap(({ guestAddress, sizeBytes }, i) => {
      const now = this.#memory.bytes(guestAddress, sizeBytes);
      const before = this.#copies[i]!;
      const pages: number[] = [];
      for (let at = 0; at < sizeBytes; at += LOG_PAGE_BYTES) {
        if (now.compare(before, at, at + LOG_PAGE_BYTES, at, at + LOG_PAGE_BYTES) !== 0) {
          pages.push((guestAddress + at) / LOG_PAGE_BYTES);
        }
      }
      return pages;
    });
  }
}

/** Lets the device answer, without touching guest memory meanwhile. */
function untilAnswered({ memory }: Frontend, requests: readonly Request[]): void {
  const statuses = requests
    .map(({ pieces }) => pieces.at(-1)!)
    .map((p) => memory.bytes(p.address + p.lengthBytes - 1, 1));
  disk.until(() => statuses.every(([status]) => status !== STATUS_UNANSWERED), 'answers');
  // Of the step that wrote the last status byte nothing is left to be done: answers are published at its end.
}

/** Pages that the device may write to for the sake of requests. */
function writablePages(requests: readonly Request[]): number[] {
  return requests.flatMap(({ pieces }) =>
    pieces.filter((piece) => piece.writable).flatMap(({ address, lengthBytes }) => pagesOf(address, lengthBytes)),
  );
}

const usedPages = (queue: DriverQueue, at = queue.used): number[] => pagesOf(at, 6 + 8 * queue.size);
/** Pages of what the device writes to of a ring: the used ring, or a packed ring's descriptors and the device's event suppression. */
const ringPages = (queue: DriverQueue): number[] =>
  queue instanceof PackedDriverQueue
    ? [...pagesOf(queue.descriptors, DESCRIPTOR_BYTES * queue.size), ...pagesOf(queue.used, 4)]
    : usedPages(queue);
const read = (sector = 0, inBytes = 4096): RequestSpec => ({ type: RequestType.read, sector, inBytes });

async function fillDisk({ queue }: Frontend): Promise<void> {
  const data = Buffer.alloc(256 * 1024);
  for (let at = 0; at < DISK_BYTES; at += data.length) {
    for (let i = 0; i < data.length; i += 4) data.writeUInt32LE(at + i + 1, i);
    expect((await queue.write(at / 512, data)).status).toBe(Status.ok);
  }
}

describe('pages that the device writes to', () => {
  it.each([
    ['with event indices', { features: FEATURES_KNOWN }, 0],
    ['without', { features: WITHOUT_EVENTS }, 0],
    ['in a log at an odd offset of its file', { features: FEATURES_KNOWN }, 4099],
    ['of a packed ring, with event indices', { features: FEATURES_KNOWN, ...PACKED }, 0],
    ['of a packed ring, without', { features: WITHOUT_EVENTS, ...PACKED }, 0],
  ])('are all marked, and no others, whatever is asked for: %s', async (_what, options, offsetBytes) => {
    serve();
    const frontend = await connect(options);
    await fillDisk(frontend);
    const { queue, memory } = frontend;
    const log = makeLog(frontend, { offsetBytes, behindBytes: 100 });
    await frontend.setLogging(log);
    // Whatever was written to the used ring before logging was on.
    expect(log.pages()).toEqual(new Set(ringPages(queue)));
    const random = seededRandom(options.features === FEATURES_KNOWN ? 1 : 2);
    const cut = (lengthBytes: number): number[] => {
      const ends = [...Array.from({ length: random.below(5) }, () => random.below(lengthBytes)), lengthBytes];
      return ends
        .sort((a, b) => a - b)
        .map((end, i) => end - (ends[i - 1] ?? 0))
        .filter((length) => length > 0);
    };
    const makeSpec = (): RequestSpec => {
      const sectors = 1 + random.below(64);
      const common = {
        sector: random.below(DISK_BYTES / 512 + 32),
        region: memory.regions[random.below(3)]!,
        shiftBytes: [0, 0, 1, 511, 4093][random.below(5)]!,
        ...(random.below(2) === 0 ? {} : { indirectFrom: [0, 1, Infinity][random.below(3)]! }),
      };
      switch (random.below(8)) {
        case 0:
          return { ...common, type: RequestType.write, out: Buffer.alloc(sectors * 512, random.below(256)) };
        case 1:
          return { ...common, type: RequestType.getId, inBytes: 20, framing: { writable: cut(21) } };
        case 2:
          return { ...common, type: RequestType.flush };
        case 3:
          return { ...common, type: RequestType.discard, out: encodeRanges([{ sector: 8, sectors: 8 }]) };
        case 4:
          return { ...common, type: 77, inBytes: 100 };
        default: {
          const inBytes = random.below(8) === 0 ? 100 : sectors * 512;
          return { ...common, type: RequestType.read, inBytes, framing: { writable: cut(inBytes + 1) } };
        }
      }
    };
    let pagesChanged = 0;
    for (let round = 0; round < 150; round++) {
      log.clear();
      const requests = queue.submit(makeSpec());
      const before = new Snapshot(frontend);
      untilAnswered(frontend, requests);
      const changed = before.changed();
      const marked = log.pages();
      pagesChanged += changed.length;
      expect(
        changed.filter((page) => !marked.has(page)),
        `changed and not marked in round ${round}`,
      ).toEqual([]);
      const allowed = new Set([...writablePages(requests), ...ringPages(queue)]);
      expect(
        [...marked].filter((page) => !allowed.has(page)),
        `marked without need in round ${round}`,
      ).toEqual([]);
      while (queue.takeUsed() !== undefined);
    }
    expect(pagesChanged).toBeGreaterThan(300);
    expect(log.isGuarded).toBe(true);
  });

  it('are marked for a buffer that spans regions, in both', async () => {
    serve();
    const frontend = await connect();
    await fillDisk(frontend);
    const { queue, memory } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    log.clear();
    // Data from the last page of the second region to the first of the third.
    const seam = REGIONS[2]!.guestAddress;
    const request = queue.prepare({ ...read(0, 8192), indirectFrom: Infinity });
    const data = request.pieces.findIndex((piece) => piece.lengthBytes === 8192);
    const descriptor = memory.bytes(queue.descriptors, 16 * queue.size);
    let index = request.head;
    for (let i = 0; i < data; i++) index = descriptor.readUInt16LE(16 * index + 14);
    descriptor.writeBigUInt64LE(BigInt(seam - 4096), 16 * index);
    queue.offer(request.head);
    const before = new Snapshot(frontend);
    untilAnswered(frontend, [request]);
    const status = request.pieces.at(-1)!.address;
    const expected = [...pagesOf(seam - 4096, 8192), ...pagesOf(status, 1), ...usedPages(queue)];
    expect(new Set(before.changed())).toEqual(new Set(expected));
    expect(log.pages()).toEqual(new Set(expected));
  });

  it('are found where regions meet in the arena and nowhere else', () => {
    serve();
    const arena = new Arena(2 ** 31);
    const memory = new GuestMemory(arena, new MemoryRanges());
    const fd = check(native.memfdCreate('guest', 2 * MIB), 'make memory');
    memory.add({ guestAddress: 0x10_0000_0000, sizeBytes: MIB, userAddress: 0, mmapOffset: 0 }, fd);
    memory.add({ guestAddress: MIB, sizeBytes: MIB, userAddress: 2 ** 40, mmapOffset: MIB }, fd);
    native.fileClose(fd);
    const seam = memory.translate(MIB, 1);
    expect(memory.translate(0x10_0000_0000, 1)).toBe(seam - MIB);
    const ranges: number[][] = [];
    memory.visitGuestRanges(seam - 100, 300, (guestAddress, length) => ranges.push([guestAddress, length]));
    expect(ranges).toEqual([
      [0x10_0000_0000 + MIB - 100, 100],
      [MIB, 200],
    ]);
    memory.clear();
  });

  it('are not marked while logging is off: the comparison would see what is missing', async () => {
    serve();
    const frontend = await connect();
    await fillDisk(frontend);
    const log = makeLog(frontend);
    await frontend.setLogBase(log);
    const requests = frontend.queue.submit(read());
    const before = new Snapshot(frontend);
    untilAnswered(frontend, requests);
    expect(before.changed().length).toBeGreaterThanOrEqual(2);
    expect(log.pages().size).toBe(0);
  });
});

describe('logging', () => {
  it.each(KINDS)(
    'is switched on and off under running %s rings, and holds for requests already in flight',
    async (_kind, packed) => {
      serve(heldDisk());
      const frontend = await connect({ packed });
      const { queue } = frontend;
      const log = makeLog(frontend);
      const requests = queue.submit(read(0, 8192), read(64, 512));
      disk.settle();
      await frontend.setLogging(log);
      log.clear();
      disk.release();
      expect(log.pages()).toEqual(new Set([...writablePages(requests), ...ringPages(queue)]));

      const more = queue.submit(read());
      disk.settle();
      await frontend.setLogging(null);
      log.clear();
      disk.release();
      while (queue.takeUsed() !== undefined);
      expect(more[0]!.completion?.status).toBe(Status.ok);
      expect(log.pages().size).toBe(0);
    },
  );

  it('of the used ring is at the address that was given, which may be outside of memory and change at any time', async () => {
    serve();
    const frontend = await connect({ queues: 2 });
    const { queue } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    for (const address of [NOWHERE, NOWHERE + 4096 - 4, queue.used]) {
      await frontend.setQueueAddresses(queue, address);
      expect([...log.pages()]).toEqual(expect.arrayContaining(usedPages(queue, address)));
      log.clear();
      const requests = queue.submit({ type: RequestType.flush });
      untilAnswered(frontend, requests);
      while (queue.takeUsed() !== undefined);
      const allowed = new Set([...writablePages(requests), ...usedPages(queue, address)]);
      expect([...log.pages()].filter((page) => !allowed.has(page))).toEqual([]);
      expect(log.has(pagesOf(address + 2, 2)[0]!)).toBe(true);
      log.clear();
    }
    // Without the flag the ring is not logged, its buffers are.
    await frontend.setQueueAddresses(queue);
    const requests = queue.submit({ type: RequestType.flush });
    untilAnswered(frontend, requests);
    expect(log.pages()).toEqual(new Set(writablePages(requests)));
  });

  it('of a packed ring marks its parts where they lie, whatever address is given for the used ring', async () => {
    serve();
    const frontend = await connect(PACKED);
    const { queue } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    log.clear();
    await frontend.setQueueAddresses(queue, NOWHERE);
    expect(log.pages()).toEqual(new Set(ringPages(queue)));
    log.clear();
    const requests = queue.submit({ type: RequestType.flush });
    untilAnswered(frontend, requests);
    // The one descriptor that is its answer.
    expect(log.pages()).toEqual(new Set([...writablePages(requests), ...pagesOf(queue.descriptors, DESCRIPTOR_BYTES)]));
    while (queue.takeUsed() !== undefined);
    await frontend.setQueueAddresses(queue);
    log.clear();
    const more = queue.submit({ type: RequestType.flush });
    untilAnswered(frontend, more);
    expect(log.pages()).toEqual(new Set(writablePages(more)));
  });

  it.each([
    ['split ring', { eventIdx: true }],
    ['split ring without event indices', { eventIdx: false }],
    ['packed ring', { ...PACKED, eventIdx: true }],
    ['packed ring without event indices', { ...PACKED, eventIdx: false }],
  ])('marks where a %s asks for kicks, and where it asks for none', (_what, options) => {
    serve();
    const ring = new RingDevice(options);
    const { driver, guestMemory, memory, virtqueue } = ring;
    const marks = new DirtyBitmap(memory.arena, { sizeBytes: LOG_BYTES });
    const log = new DirtyLog(guestMemory, marks.fd, LOG_BYTES, 0);
    virtqueue.setLog(new RingLog(log, driver.used));
    ring.run({ type: RequestType.flush });
    const changes = [true, false, true, false].map((isWanted) => {
      marks.clear();
      const before = Buffer.from(driver.usedBytes);
      virtqueue.setNotification(isWanted);
      const changed = [...before.keys()].filter((at) => before[at] !== driver.usedBytes[at]);
      expect([...marks.pages()]).toEqual(expect.arrayContaining(changed.flatMap((at) => pagesOf(driver.used + at, 1))));
      return changed.length;
    });
    expect(Math.max(...changes)).toBeGreaterThan(0);
    virtqueue.setLog(null);
    log.close();
    marks.close();
    ring.close();
  });

  it.each(KINDS)('marks the answers of a %s ring that goes round', async (_kind, packed) => {
    serve();
    const frontend = await connect({ packed, queueSize: 1024, regions: [{ guestAddress: MIB, sizeBytes: 4 * MIB }] });
    const { queue } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    const flush: RequestSpec = { type: RequestType.flush };
    for (let done = 0; done < 2048; done += 128) {
      log.clear();
      const requests = queue.submit(...Array.from({ length: 128 }, () => flush));
      const before = new Snapshot(frontend);
      untilAnswered(frontend, requests);
      const marked = log.pages();
      expect(before.changed().filter((page) => !marked.has(page))).toEqual([]);
      while (queue.takeUsed() !== undefined);
    }
  });

  it.each([
    ['split ring', { features: FEATURES_KNOWN }],
    ['split ring without event indices', { features: WITHOUT_EVENTS }],
    ['packed ring', { features: FEATURES_KNOWN, ...PACKED }],
    ['packed ring without event indices', { features: WITHOUT_EVENTS, ...PACKED }],
  ])('covers what a %s writes when it stops and when it starts', async (_what, options) => {
    serve();
    const frontend = await connect(options);
    const { queue } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    await queue.flush();
    log.clear();
    const before = new Snapshot(frontend);
    await frontend.stopQueue(queue);
    expect(before.changed()).not.toEqual([]);
    expect([...log.pages()]).toEqual(expect.arrayContaining(before.changed()));

    log.clear();
    // The log went with the stop: rings wait for a new one, as a QEMU gives it that starts the device again.
    await frontend.startQueue(queue);
    await frontend.setQueueAddresses(queue, queue.used);
    const [request] = queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(request!.completion ?? queue.takeUsed()).toBeUndefined();
    expect(log.pages().size).toBe(0);
    await frontend.setLogBase(log);
    expect((await queue.completion(request!)).status).toBe(Status.ok);
    const marked = log.pages();
    expect(ringPages(queue).every((page) => marked.has(page))).toBe(true);
  });

  it.each(KINDS)(
    'covers what was in flight when a %s ring is stopped, before its place is told',
    async (_kind, packed) => {
      serve(heldDisk());
      const frontend = await connect({ packed });
      const { queue } = frontend;
      const log = makeLog(frontend);
      await frontend.setLogging(log);
      const requests = queue.submit(read(0, 8192), read(64, 512));
      disk.settle();
      log.clear();
      const before = new Snapshot(frontend);
      let isTold = false;
      const stopping = frontend.stopQueue(queue).then(() => (isTold = true));
      for (let i = 0; i < 20; i++) {
        disk.step();
        await setImmediate();
      }
      expect([isTold, before.changed()]).toEqual([false, []]);
      disk.release();
      await stopping;
      const changed = before.changed();
      const marked = log.pages();
      expect(changed).toEqual(
        expect.arrayContaining(requests.flatMap(({ pieces }) => pagesOf(pieces.at(-1)!.address, 1))),
      );
      expect(changed.filter((page) => !marked.has(page))).toEqual([]);
      while (queue.takeUsed() !== undefined);
      expect(requests.map(({ completion }) => completion?.status)).toEqual([Status.ok, Status.ok]);
    },
  );

  it.each(KINDS)(
    'of a %s ring goes on in a new log, also for what is in flight, and the old one is let go of',
    async (_kind, packed) => {
      serve(heldDisk());
      const frontend = await connect({ packed });
      const { queue } = frontend;
      const [first, second] = [makeLog(frontend), makeLog(frontend, { sizeBytes: LOG_BYTES + 8, offsetBytes: 8 })];
      await frontend.setLogging(first);
      const mapped = disk.rig.arena.usedBytes;
      const requests = queue.submit(read(0, 8192));
      disk.settle();
      await frontend.setLogBase(second);
      expect(disk.rig.arena.usedBytes).toBeLessThanOrEqual(mapped + 4096);
      first.clear();
      second.clear();
      disk.release();
      expect(first.pages().size).toBe(0);
      expect(second.pages()).toEqual(new Set([...writablePages(requests), ...ringPages(queue)]));
    },
  );

  it('that was asked for keeps rings from running until there is a log', async () => {
    serve();
    const frontend = await connect();
    const { queue } = frontend;
    await frontend.setFeatures(frontend.features | mask(Feature.logAll));
    const [request] = queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(queue.deviceUsedIndex).toBe(0);
    const log = makeLog(frontend);
    await frontend.setLogBase(log);
    expect((await queue.completion(request!)).status).toBe(Status.ok);
    expect([...log.pages()]).toEqual(expect.arrayContaining(writablePages([request!])));
  });

  it('that cannot be, as no log was negotiated, keeps nothing from running', async () => {
    serve();
    const protocolFeatures = PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.logShmfd);
    const frontend = await connect({ features: FEATURES_KNOWN | mask(Feature.logAll), protocolFeatures });
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    await expect(frontend.setQueueAddresses(frontend.queue, frontend.queue.used)).rejects.toThrow(Refused);
  });

  it('raises the descriptor of SET_LOG_FD when pages were marked', async () => {
    serve();
    const frontend = await connect();
    const signalFd = check(native.eventfdCreate(), 'make an eventfd');
    for (let i = 0; i < 2; i++) await frontend.tell(MessageId.setLogFd, Buffer.alloc(0), [signalFd]);
    await frontend.setLogging(makeLog(frontend));
    disk.settle();
    native.eventfdDrain(signalFd);
    disk.settle();
    expect(native.eventfdDrain(signalFd)).toBe(0);
    await frontend.queue.flush();
    expect(native.eventfdDrain(signalFd)).toBeGreaterThanOrEqual(1);
    native.fileClose(signalFd);
    await expect(frontend.tell(MessageId.setLogFd, Buffer.alloc(0), [frontend.memory.ringRegion.fd])).rejects.toThrow(
      Refused,
    );
  });

  it('is the only feature that may change under a started ring', async () => {
    serve();
    const frontend = await connect();
    const { features } = frontend;
    const log = makeLog(frontend);
    await frontend.setLogBase(log);
    for (const other of [Feature.flush, Feature.eventIdx, Feature.version1, Feature.protocolFeatures]) {
      const wanted = (features & ~mask(other)) | mask(Feature.logAll);
      await expect(frontend.tell(MessageId.setFeatures, u64(wanted))).rejects.toThrow(Refused);
    }
    await frontend.queue.flush();
    expect(log.pages().size).toBe(0);
    await frontend.setFeatures(features | mask(Feature.logAll));
    await frontend.queue.flush();
    expect(log.pages().size).toBeGreaterThan(0);
  });

  it('does not let the addresses of a started ring change with it', async () => {
    serve();
    const frontend = await connect({ queues: 2 });
    const [queue, other] = frontend.queues as [DriverQueue, DriverQueue];
    const elsewhere = { ...queue, index: 0, descriptors: other.descriptors, used: queue.used } as DriverQueue;
    await expect(frontend.setQueueAddresses(elsewhere, queue.used)).rejects.toThrow(Refused);
    expect((await queue.flush()).status).toBe(Status.ok);
  });
});

describe('a dirty log', () => {
  const FILE_BYTES = 65536;

  it.each<[string, bigint, bigint]>([
    ['of no size', 0n, 0n],
    ['that ends beyond its file', BigInt(FILE_BYTES) + 1n, 0n],
    ['whose offset takes it beyond its file', BigInt(FILE_BYTES), 1n],
    ['that begins beyond its file', 8n, BigInt(FILE_BYTES)],
    ['whose size and offset wrap around', 16n, 2n ** 64n - 8n],
    ['whose size wraps around', 2n ** 64n - 8n, 16n],
    ['whose size is negative', 2n ** 63n, 0n],
    ['whose numbers cannot be counted exactly', 2n ** 53n, 0n],
    ['whose offset cannot be counted exactly', 8n, 2n ** 53n],
    ['longer than any guest needs', 2n ** 31n + 1n, 0n],
  ])('%s ends the session, with nothing mapped', async (_what, size, offset) => {
    serve();
    const frontend = await connect();
    const mapped = disk.rig.arena.usedBytes;
    const fd = check(
      native.memfdCreate('log', size > 2n ** 31n && size < 2n ** 32n ? 2 ** 32 : FILE_BYTES),
      'make a file',
    );
    const setting = frontend.ask(MessageId.setLogBase, Buffer.concat([u64(size), u64(offset)]), [fd]);
    await expect(setting).rejects.toThrow('closed the connection');
    native.fileClose(fd);
    disk.untilListening();
    expect(disk.sessionFaults).toBe(1);
    expect(disk.rig.arena.usedBytes).toBeLessThan(mapped);
  });

  it('that is no file ends the session', async () => {
    serve();
    const frontend = await connect();
    const setting = frontend.ask(MessageId.setLogBase, Buffer.concat([u64(8), u64(0)]), [frontend.queue.callFd]);
    await expect(setting).rejects.toThrow('closed the connection');
    expect(disk.complaints[0]).toContain('not a file');
  });

  it('that was not negotiated ends the session', async () => {
    serve();
    const frontend = await connect({ protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.logShmfd) });
    await expect(frontend.setLogBase(makeLog(frontend))).rejects.toThrow('closed the connection');
  });

  it('may cover everything up to its last page, and what is beyond ends the session and is not written', async () => {
    serve();
    for (const [short, survives] of [
      [0, true],
      [1, false],
    ] as const) {
      const guestAddress = 8 * MIB;
      // 64 pages: the last one is covered by the last bit.
      const frontend = await connect({ regions: [REGIONS[0]!, { guestAddress, sizeBytes: 64 * 4096 }] });
      const end = guestAddress / LOG_PAGE_BYTES + 64;
      const log = makeLog(frontend, { sizeBytes: end / 8 - short, behindBytes: 4096 });
      await frontend.setLogging(log);
      const filling = frontend.memory.allocate(62 * 4096, 4096);
      frontend.queue.submit({ type: RequestType.read, inBytes: 4096, framing: { writable: [4096, 1] } });
      expect(filling).toBe(guestAddress);
      disk.settle();
      if (survives) {
        expect(log.has(end - 1)).toBe(true);
        expect(disk.sessionFaults).toBe(0);
      } else {
        disk.untilListening();
        expect(disk.complaints[0]).toContain('the dirty log does not cover guest address');
        expect(disk.sessionFaults).toBe(1);
      }
      expect(log.isGuarded).toBe(true);
      letGo();
    }
  });

  it('that is too short for the address of a used ring ends the session', async () => {
    serve();
    const frontend = await connect();
    const log = makeLog(frontend, { behindBytes: 4096 });
    await frontend.setLogging(log);
    await frontend.setQueueAddresses(frontend.queue, LOG_BYTES * 8 * LOG_PAGE_BYTES - 4);
    await frontend.connection.disconnected();
    expect(log.isGuarded).toBe(true);
    const again = await connect();
    await expect(again.setQueueAddresses(again.queue, 2 ** 52)).rejects.toThrow(Refused);
  });

  it('that is cut short under us ends its session, not the daemon', async () => {
    serve();
    const frontend = await connect();
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    check(native.fileTruncate(log.fd, 0), 'truncate the log');
    frontend.queue.submit(read());
    disk.untilListening();
    expect(disk.complaints[0]).toContain('the dirty log is longer than its file');
    check(native.fileTruncate(log.fd, LOG_BYTES), 'make it long again');
    expect((await (await connect()).queue.flush()).status).toBe(Status.ok);
  });

  it('of a session that ended is not there for the next one', async () => {
    serve();
    const frontend = await connect();
    const log = makeLog(frontend);
    await frontend.setLogging(log);
    frontend.disconnect();
    disk.untilListening();
    log.clear();
    const next = await connect();
    await next.queue.flush();
    expect(log.pages().size).toBe(0);
  });
});
