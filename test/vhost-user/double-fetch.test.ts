/**
 * Goal: what the driver writes between two looks of the device makes no difference, as there are no two looks: every field of
 * shared memory is read once, and what was checked is what is used.
 *
 * Method: first, memory that tells of every access, and is scrambled right behind the device's back after each; the outcome has
 * to be that of memory left alone. Then the real thing: a thread that scribbles over ring, tables and headers while the queue
 * runs; whatever comes of it stays within the guest's memory, which lies between guarded pages.
 */
import { Worker } from 'node:worker_threads';
import { afterEach, describe, expect, it } from 'vitest';
import { IoType } from '../../src/bdev/bdev-io.js';
import type { BdevIo } from '../../src/bdev/bdev-io.js';
import { BlkQueue } from '../../src/vhost-user/blk-queue.js';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import { writeDescriptor } from '../frontend/driver-queue.js';
import { RequestType } from '../frontend/protocol.js';
import { seededRandom } from '../support/seed.js';
import { blkHeader } from './chains.js';
import { RingDevice } from './ring-device.js';
import { watchedMemory } from './watched-memory.js';
import type { Watcher } from './watched-memory.js';

const MIB = 2 ** 20;

let ring: RingDevice;
afterEach(() => ring.close());

describe('the device', () => {
  const framings = [
    { name: 'direct descriptors', indirectFrom: Infinity, shiftBytes: 0 },
    { name: 'an indirect table', indirectFrom: 0, shiftBytes: 0 },
    { name: 'both', indirectFrom: 1, shiftBytes: 0 },
    { name: 'a header that is misaligned', indirectFrom: 0, shiftBytes: 1 },
    { name: 'a header in pieces', indirectFrom: 0, shiftBytes: 0, readable: [1, 6, 9, 16] },
  ];
  const requests = [
    { type: RequestType.read, sector: 1, inBytes: 1024 },
    { type: RequestType.write, sector: 2, out: Buffer.alloc(16, 3) },
    { type: RequestType.writeZeroes, out: Buffer.alloc(16, 0) },
    { type: RequestType.flush },
    { type: RequestType.getId, inBytes: 20 },
  ];

  it.each(
    framings.flatMap((framing) =>
      requests.map((spec) => ({ framing, spec, what: `${framing.name}, type ${spec.type}` })),
    ),
  )('reads every field of a request once: $what', ({ framing: { indirectFrom, shiftBytes, readable }, spec }) => {
    ring = new RingDevice();
    const outBytes = 'out' in spec ? spec.out.length : 0;
    const framing = readable !== undefined && outBytes === 16 ? { framing: { readable } } : {};
    const request = ring.driver.prepare({ ...spec, ...framing, indirectFrom, shiftBytes });
    const reads = new Map<string, number>();
    const watcher: Watcher = {
      afterRead: (at, bytes) => {
        const field = `${bytes} bytes at ${at}`;
        reads.set(field, (reads.get(field) ?? 0) + 1);
      },
    };
    const watched = watchedMemory(ring.guestMemory, watcher);
    const virtqueue = ring.makeVirtqueue(0, watched);
    const queue = new BlkQueue(ring.device, 0, watched.arena, virtqueue);
    reads.clear();
    ring.driver.offer(request.head);
    queue.poll();
    expect(Math.max(...reads.values())).toBe(2);
    // Only avail->idx is looked at again: for more requests.
    const twice = [...reads].filter(([, count]) => count > 1).map(([field]) => field);
    const availableIndex = ring.guestMemory.translateUser(ring.memory.userAddress(ring.driver.available), 1) + 2;
    expect(twice).toEqual([`2 bytes at ${availableIndex}`]);
    expect(reads.size).toBeGreaterThan(8);
    ring.settle();
    expect(queue.inflight).toBe(0);
  });

  it('makes of memory that is scrambled behind its back what it makes of memory left alone', () => {
    ring = new RingDevice({ queueSize: 16 });
    const random = seededRandom(5);
    const { arena } = ring.guestMemory;
    const region = ring.memory.ringRegion;
    const start = ring.guestMemory.translate(region.guestAddress, 1);
    const all = Buffer.from(arena.buffer, start, 256 * 1024);
    const scrambled = new Set<number>();
    let repeated = 0;
    const watcher: Watcher = {
      afterRead: (at, bytes) => {
        if (scrambled.has(at)) repeated++;
        scrambled.add(at);
        for (let i = 0; i < bytes; i++) arena.view8(at + i, 1)[0] = random.below(256);
      },
    };
    const watched = watchedMemory(ring.guestMemory, watcher);
    const outcomes = { taken: 0, broken: 0, looped: 0 };
    for (let round = 0; round < 400; round++) {
      ring.restart();
      const pieces = Array.from({ length: 1 + random.below(6) }, () => 1 + random.below(600));
      const request = ring.driver.prepare({
        type: RequestType.read,
        inBytes: 0,
        framing: { readable: [16], writable: pieces },
        indirectFrom: random.below(4),
        shiftBytes: random.below(2) * random.below(16),
      });
      if (random.below(2) === 0) {
        // Something is wrong with it, perhaps.
        const table = ring.memory.bytes(ring.driver.descriptors, 256);
        table.writeUInt8(random.below(256), request.head * 16 + random.below(16));
      }
      ring.driver.availableBytes.writeUInt16LE(request.head, 4);
      ring.driver.availableBytes.writeUInt16LE(1, 2);
      const before = Buffer.from(all);
      const [alone, behind] = [new DescriptorChain(), new DescriptorChain()];
      const plain = ring.makeVirtqueue(0);
      const head = plain.pop(alone);
      before.copy(all);
      const other = ring.makeVirtqueue(0, watched);
      scrambled.clear();
      repeated = 0;
      const again = other.pop(behind);
      before.copy(all);
      expect(scrambled.size).toBeGreaterThan(2);
      if (repeated > 0) {
        // A chain that leads to itself is walked until it is too long: there a field may be seen twice.
        expect(plain.fault).toBe('a chain is longer than the ring, or loops');
        outcomes.looped++;
        continue;
      }
      expect(again).toBe(head);
      expect(other.fault).toBe(plain.fault);
      if (head < 0) {
        outcomes.broken++;
        continue;
      }
      outcomes.taken++;
      expect([behind.count, behind.readableCount]).toEqual([alone.count, alone.readableCount]);
      expect(behind.addresses.subarray(0, behind.count)).toEqual(alone.addresses.subarray(0, alone.count));
      expect(behind.lengths.subarray(0, behind.count)).toEqual(alone.lengths.subarray(0, alone.count));
    }
    expect(outcomes.taken).toBeGreaterThan(100);
    expect(outcomes.broken).toBeGreaterThan(20);
    ring.restart();
  });
});

/** Writes nonsense and near-sense over the first 12 KiB of guest memory, as fast as it can. */
const SCRIBBLER = `
const { writeSync } = require('node:fs');
const { workerData: { fd, at, stop, seed } } = require('node:worker_threads');
let state = seed;
const below = (bound) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * bound);
};
const bytes = Buffer.alloc(16);
const flag = new Int32Array(stop);
while (Atomics.load(flag, 0) === 0) {
  const kind = below(4);
  if (kind === 0) bytes.writeUInt32LE(below(2 ** 32), 0);
  else if (kind === 1) bytes.writeUInt32LE(below(9), 0);
  else if (kind === 2) bytes.writeUInt32LE(2 ** 32 - 1 - below(4096), 0);
  else bytes.writeUInt32LE(below(9 * 2 ** 20), 0);
  // The ring itself less often than the tables and headers behind it: it breaks at once.
  const place = below(16) === 0 ? below(2048) : 2048 + below(10240);
  writeSync(fd, bytes, 0, 1 << below(3), at + (place & ~3));
}
Atomics.store(flag, 0, 2);
Atomics.notify(flag, 0);
`;

describe('a driver that writes while the device reads', () => {
  it('breaks its own ring at most, and reaches nothing beside its memory', async () => {
    ring = new RingDevice({ queueSize: 64, regions: [{ guestAddress: MIB, sizeBytes: 8 * MIB, mmapOffset: 8192 }] });
    const region = ring.memory.ringRegion;
    const low = ring.guestMemory.translate(region.guestAddress, 1);
    const outside: string[] = [];
    const submit = ring.journal.submit.bind(ring.journal);
    ring.journal.submit = (io: BdevIo): void => {
      for (let i = 0; i < io.segmentCount; i++) {
        const [at, length] = [io.segmentAddresses[i]!, io.segmentLengths[i]!];
        if (!(at >= low && length > 0 && at + length <= low + region.sizeBytes)) outside.push(`${length} at ${at}`);
      }
      if (io.type !== IoType.write && io.type !== IoType.read && io.segmentCount > 0) outside.push(`type ${io.type}`);
      submit(io);
    };
    expect(ring.guarded).toBe(true);

    // Ring and tables lie at the start of the region, where the driver allocates.
    const stop = new SharedArrayBuffer(4);
    const flag = new Int32Array(stop);
    const workerData = { fd: region.fd, at: region.mmapOffset, stop, seed: 1 };
    const worker = new Worker(SCRIBBLER, { eval: true, workerData });
    await new Promise((resolve) => worker.once('online', resolve));
    let breaks = 0;
    let requests = 0;
    const { stats } = ring.device;
    const { memory, driver } = ring;
    const tables = MIB + 2048;
    const headers = MIB + 8192;
    const table = memory.bytes(tables, 64 * 48);
    const descriptors = memory.bytes(driver.descriptors, 64 * 16);
    const header = blkHeader(RequestType.write, 1);
    expect(driver.used + 6 + 8 * 64).toBeLessThan(tables);
    const start = performance.now();
    // As long as it takes for both to have met often enough.
    while (
      performance.now() < start + 1000 ||
      ((breaks < 20 || requests < 500) && performance.now() < start + 15_000)
    ) {
      for (let i = 0; i < 200 && ring.faults.length === 0; i++) {
        // Written raw: what the driver believes of its ring has long ceased to be true.
        const head = i % 64;
        memory.bytes(headers + 64 * head, 16).set(header);
        writeDescriptor(table.subarray(48 * head), {
          address: headers + 64 * head,
          lengthBytes: 16,
          flags: 1,
          next: 1,
        });
        writeDescriptor(table.subarray(48 * head + 16), { address: MIB + 65536, lengthBytes: 512, flags: 1, next: 2 });
        writeDescriptor(table.subarray(48 * head + 32), {
          address: headers + 64 * head + 16,
          lengthBytes: 1,
          flags: 2,
        });
        writeDescriptor(descriptors.subarray(16 * head), { address: tables + 48 * head, lengthBytes: 48, flags: 4 });
        driver.availableBytes.writeUInt16LE(head, 4 + 2 * (ring.virtqueue.nextAvailable % 64));
        driver.availableBytes.writeUInt16LE((ring.virtqueue.nextAvailable + 1) & 0xffff, 2);
        ring.rig.step();
      }
      breaks += ring.faults.length;
      requests += stats[0]!;
      stats[0] = 0;
      ring.settle();
      ring.restart();
    }
    Atomics.store(flag, 0, 1);
    expect(Atomics.wait(flag, 0, 1, 5000)).not.toBe('timed-out');
    await worker.terminate();
    expect(outside).toEqual([]);
    expect(ring.guarded).toBe(true);
    expect(breaks).toBeGreaterThanOrEqual(20);
    expect(requests).toBeGreaterThanOrEqual(500);
    ring.restart();
  });
});
