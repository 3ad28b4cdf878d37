/**
 * Goal: a packed ring is read by the rules of VIRTIO 1.2, 2.8, and by no others; whatever breaks one breaks the ring, before anything
 * is read or written that the driver did not offer. What it shares with a split ring is tested there (ring-rules, framing).
 *
 * Method: one test per rule, with rings written by hand; each broken ring has a neighbour that just keeps the rule.
 */
import { afterEach, describe, expect, it } from 'vitest';
import type { Descriptor } from '../frontend/driver-queue.js';
import { PackedDriverQueue, PackedEvent } from '../frontend/packed-driver-queue.js';
import { DescriptorFlag, RequestType, Status } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import { INDIRECT_MAX } from '../../src/vhost-user/chain-builder.js';
import { packedBase, unpackBase } from '../../src/vhost-user/packed-virtqueue.js';
import { blkHeader } from './chains.js';
import { RingDevice } from './ring-device.js';
import type { RingDeviceOptions } from './ring-device.js';
import { heldDisk } from './served-disk.js';
import { watchedMemory } from './watched-memory.js';
import type { Watcher } from './watched-memory.js';

const { next: NEXT, write: WRITE, indirect: INDIRECT } = DescriptorFlag;
const MIB = 2 ** 20;
const SECOND_LAP = 0x8000;

let ring: RingDevice;
afterEach(() => ring.close());

function start(options: RingDeviceOptions = {}): PackedDriverQueue {
  ring = new RingDevice({ queueSize: 8, ...options, packed: true });
  return ring.driver as PackedDriverQueue;
}

/** Header, data and status of a read of one sector. */
function readParts(): [Descriptor, Descriptor, Descriptor] {
  return [ring.readable(blkHeader(RequestType.read)), ring.writable(512), ring.writable(1)];
}

/** The ring is broken for this reason; nothing is answered, and nothing is taken any more. */
function expectBroken(fault: string): void {
  ring.settle();
  expect(ring.faults).toEqual([fault]);
  expect(ring.driver.takeRawUsed()).toBeUndefined();
  expect(ring.journal.entries).toEqual([]);
}

/** Writes descriptors from the start of the ring, available in the first lap, as they are; the device looks at them. */
function write(driver: PackedDriverQueue, ...parts: readonly (Descriptor & { readonly id?: number })[]): void {
  parts.forEach(({ address, lengthBytes, flags = 0, id = 0 }, i) =>
    driver.writePacked(i, { address, lengthBytes, id, flags: flags | PackedDriverQueue.availableFlags(1) }),
  );
}

describe('a packed ring', () => {
  it.each([1, 3, 8, 100, 1024])('of %i entries goes round and round, one request at a time', (queueSize) => {
    start({ queueSize });
    for (let i = 0; i < Math.min(3 * queueSize, 300) + 5; i++) {
      const content = fresh(512);
      expect(ring.run({ type: RequestType.write, sector: i % 8, out: content, indirectFrom: 0 }).status).toBe(
        Status.ok,
      );
      const { data } = ring.run({ type: RequestType.read, sector: i % 8, inBytes: 512, indirectFrom: 0 });
      expectBytes(data, content, 'read back');
    }
  });

  it.each([0, 1, 7, SECOND_LAP, SECOND_LAP | 7])('goes on from the place and lap 0x%s', (base) => {
    start({ base });
    for (let i = 0; i < 20; i++) {
      expect(
        ring.run({ type: RequestType.read, sector: 0, inBytes: 512, indirectFrom: i % 2 ? 0 : Infinity }),
      ).toMatchObject({ status: Status.ok, usedBytes: 513 });
    }
  });

  it('takes as many requests as it has entries, and answers them in any order', () => {
    const driver = start({ queueSize: 16, configs: heldDisk() });
    const requests = Array.from({ length: 16 }, (_, i) =>
      driver.prepare({ type: RequestType.read, sector: i, inBytes: 512, indirectFrom: 0 }),
    );
    driver.offer(...requests.map(({ head }) => head));
    ring.settle();
    expect(ring.queue.inflight).toBe(16);
    expect(driver.room).toBe(0);
    ring.release();
    expect(requests.every((request) => ring.completionOf(request)?.status === Status.ok)).toBe(true);
    expect(driver.room).toBe(16);
  });

  it('tells where it is with both wrap counters', () => {
    start();
    expect(ring.virtqueue.nextAvailable).toBe(0x8000_8000);
    for (let i = 0; i < 3; i++) ring.run({ type: RequestType.read, sector: 0, inBytes: 512, indirectFrom: Infinity });
    // Nine descriptors: one into the second lap, whose counters are 0.
    expect(ring.virtqueue.nextAvailable).toBe(0x0001_0001);
    for (const base of [0, 0x8000_8000, 0x7fff_7fff, 0x0001_8001, 0xffff_ffff]) {
      const { available, used } = unpackBase(base);
      expect(packedBase(available, used)).toBe(base);
    }
  });

  it('takes nothing that is not available in this lap, whatever its flags were before', () => {
    const driver = start();
    for (const flags of [0, (1 << 7) | (1 << 15), 1 << 15]) {
      driver.writePacked(0, { address: MIB, lengthBytes: 16, id: 0, flags });
      ring.settle();
      expect(ring.queue.inflight).toBe(0);
      expect(ring.faults).toEqual([]);
    }
  });

  it('is broken from the start when its places are further apart than it is long', () => {
    start();
    const virtqueue = ring.makeVirtqueue(packedBase({ index: 1, wrap: 1 }, { index: 2, wrap: 1 }));
    expect(virtqueue.pop(new DescriptorChain())).toBe(-2);
    expect(virtqueue.fault).toBe('its positions are further apart than it is long');
  });
});

describe('a buffer id', () => {
  it('may be any number of 16 bits', () => {
    const driver = start();
    const [header, data, status] = readParts();
    const table = ring.table(header, data, status);
    write(driver, { ...table, id: 0xffff });
    ring.settle();
    const used = ring.memory.bytes(driver.descriptors, 16);
    expect([used.readUInt32LE(8), used.readUInt16LE(12)]).toEqual([513, 0xffff]);
    // AVAIL and USED as the lap has them, and WRITE, without which the length means nothing.
    expect(used.readUInt16LE(14)).toBe((1 << 7) | (1 << 15) | WRITE);
  });

  it('that is in flight breaks the ring when it is offered again; what is in flight is answered', () => {
    const driver = start({ configs: heldDisk() });
    const [request] = driver.submit({ type: RequestType.read, sector: 0, inBytes: 512, indirectFrom: 0 });
    ring.settle();
    const [header, data, status] = readParts();
    const table = ring.table(header, data, status);
    driver.writePacked(1, {
      ...table,
      id: request!.head,
      flags: INDIRECT | PackedDriverQueue.availableFlags(1),
    });
    ring.settle();
    expect(ring.faults).toEqual(['a buffer id was made available while it was in flight']);
    ring.release();
    expect(ring.completionOf(request!)).toMatchObject({ status: Status.ok, usedBytes: 513 });
  });

  it('is that of the last descriptor of a list; of the others it means nothing', () => {
    const driver = start();
    const [header, data, status] = readParts();
    write(
      driver,
      { ...header, flags: NEXT, id: 5 },
      { ...data, flags: WRITE | NEXT, id: 5 },
      { ...status, flags: WRITE, id: 9 },
    );
    ring.settle();
    expect(ring.memory.bytes(driver.descriptors, 16).readUInt16LE(12)).toBe(9);
  });
});

describe('a list', () => {
  it('may have as many descriptors as the ring, over its end', () => {
    start({ base: 5 });
    const [header, , status] = readParts();
    expect(ring.offerChain(header, ...Array.from({ length: 6 }, () => ring.writable(512)), status)).toBe(6 * 512 + 1);
  });

  it('may not be longer than the ring, in which it would go on for ever', () => {
    const driver = start();
    const [header] = readParts();
    for (const lengthBytes of [16, 0]) {
      write(driver, ...Array.from({ length: 8 }, () => ({ ...header, lengthBytes, flags: NEXT })));
      expectBroken('a chain is longer than the ring, or loops');
      ring.restart();
    }
  });

  it('may not reach into what is in flight', () => {
    const driver = start({ configs: heldDisk() });
    const [request] = driver.submit({ type: RequestType.read, sector: 0, inBytes: 512, indirectFrom: Infinity });
    ring.settle();
    const [header] = readParts();
    for (let i = 3; i < 8; i++) {
      driver.writePacked(i, { ...header, id: 0, flags: NEXT | PackedDriverQueue.availableFlags(1) });
    }
    ring.settle();
    expect(ring.faults).toEqual(['more entries are available than the ring holds']);
    ring.release();
    expect(ring.completionOf(request!)?.status).toBe(Status.ok);
  });

  it('may hold descriptors of no length anywhere, wherever they point', () => {
    start();
    const [header, data, status] = readParts();
    const nowhere = { address: 2n ** 52n, lengthBytes: 0 };
    expect(ring.offerChain(nowhere, header, nowhere, data, status, { ...nowhere, flags: WRITE })).toBe(513);
  });

  it('may not have a readable buffer behind a writable one', () => {
    start();
    const [header, data, status] = readParts();
    ring.offerChain(header, data, header, status);
    expectBroken('a readable buffer after a writable one');
  });

  it('without a writable byte has nowhere to be answered: it breaks the ring', () => {
    start();
    const [header] = readParts();
    ring.offerChain(header);
    expectBroken('a request without a status byte');
  });

  it.each([
    ['outside all regions', 64 * MIB, 1],
    ['a byte before a region, into it', MIB - 1, 2],
    ['over the end of a region', 9 * MIB - 511, 512],
  ])('may not have a buffer %s', (_what, address, lengthBytes) => {
    start();
    for (const flags of [0, WRITE]) {
      const [header, data, status] = readParts();
      const buffer = { address, lengthBytes, flags };
      ring.offerChain(...(flags === 0 ? [header, buffer, data, status] : [header, buffer, status]));
      expectBroken('a buffer is outside guest memory');
      ring.restart();
    }
  });

  it.each([2n ** 53n, 2n ** 64n - 512n])('may not have a buffer at %i, which cannot be counted', (address) => {
    start();
    const [header, , status] = readParts();
    ring.offerChain(header, { address, lengthBytes: 1024, flags: WRITE }, status);
    expectBroken('a descriptor address is beyond 2^53');
  });
});

describe('an indirect table', () => {
  it('works whether or not it is marked as writable; of the flags in it only WRITE means something', () => {
    start();
    for (const extra of [0, WRITE]) {
      const [header, data, status] = readParts();
      const address = ring.memory.allocate(48);
      const table = ring.rawTable(address, [
        { ...header, flags: INDIRECT },
        { ...data, flags: WRITE | NEXT | 0xff80 },
        { ...status, flags: WRITE | INDIRECT },
      ]);
      expect(ring.offerChain({ ...table, flags: INDIRECT | extra })).toBe(513);
      expect(ring.bytes(status)[0]).toBe(Status.ok);
    }
  });

  it('may not be part of a list', () => {
    start();
    const [header, data, status] = readParts();
    ring.offerChain(header, ring.table(data, status));
    expectBroken('an indirect descriptor in a list');
    ring.restart();
    ring.offerChain(ring.table(header, data), status);
    expectBroken('an indirect descriptor in a list');
  });

  it('may not be offered when it was not negotiated', () => {
    start({ indirect: false });
    ring.offerChain(ring.table(...readParts()));
    expectBroken('an indirect descriptor without the feature');
  });

  it.each([0, 1, 15, 17, 0xffffffff])('may not be %i bytes long', (lengthBytes) => {
    start();
    ring.offerChain({ ...ring.table(...readParts()), lengthBytes });
    expectBroken('an indirect table of a broken length');
  });

  it('may be longer than the ring, up to a bound', () => {
    start();
    const [header, , status] = readParts();
    const data = Array.from({ length: INDIRECT_MAX - 2 }, () => ring.writable(512));
    expect(ring.offerChain(ring.table(header, ...data, status))).toBe((INDIRECT_MAX - 2) * 512 + 1);
    ring.offerChain({ ...ring.table(header, status), lengthBytes: 16 * (INDIRECT_MAX + 1) });
    ring.settle();
    expect(ring.faults).toEqual(['an indirect table is too long']);
  });

  it.each([64 * MIB, 9 * MIB - 32, MIB - 16, 0])('may not lie outside memory, at %i', (address) => {
    start();
    ring.offerChain({ ...ring.table(...readParts()), address });
    expectBroken('an indirect table is outside guest memory');
  });

  it('may lie at any address, aligned or not', () => {
    start();
    for (let shift = 0; shift < 16; shift++) {
      const table = ring.tableAt(ring.memory.allocate(64) + shift, ...readParts());
      expect(ring.offerChain(table), `shifted by ${shift}`).toBe(513);
    }
  });
});

describe.each([true, false])('notifications of a packed ring (event index: %s)', (eventIdx) => {
  const wrapOf = (position: number): number => (Math.floor(position / 8) % 2 === 0 ? 1 : 0);

  it('call the driver as its event suppression says', () => {
    const driver = start({ eventIdx });
    for (let from = 0; from < 16; from++) {
      for (let count = 0; count <= 8; count++) {
        for (const [flags, distance] of [
          [PackedEvent.enable, 0],
          [PackedEvent.disable, 0],
          ...Array.from({ length: 12 }, (_, i) => [PackedEvent.descriptor, i - 4] as const),
        ] as const) {
          if (from + distance < 0) continue;
          const event = from + distance;
          ring.restart((from % 8) | (wrapOf(from) === 1 ? 0 : SECOND_LAP));
          const requests = Array.from({ length: count }, () =>
            driver.prepare({ type: RequestType.flush, indirectFrom: 0 }),
          );
          driver.offer(...requests.map(({ head }) => head));
          driver.setDriverEvent(flags, { index: event % 8, wrap: wrapOf(event) });
          ring.notifications = 0;
          ring.settle();
          // One by one: is the place that is waited for among those that were used?
          const isPassed = event >= from && event < from + count;
          const isByPlace = eventIdx && flags === PackedEvent.descriptor;
          const expected = count > 0 && (isByPlace ? isPassed : flags !== PackedEvent.disable);
          expect(ring.notifications > 0, `${count} from ${from}, flags ${flags} at ${event}`).toBe(expected);
          while (driver.takeUsed() !== undefined);
        }
      }
    }
  });

  it('never let both sides sleep, at whichever moment the driver comes', () => {
    const driver = start({ eventIdx });
    for (const base of [0, 7, SECOND_LAP | 3]) {
      let moments = 1;
      for (let moment = 0; moment <= moments; moment++) {
        ring.restart(base);
        const [header, data, status] = readParts();
        const id = driver.rawChain([ring.table(header, data, status)]);
        let seen = 0;
        let came = false;
        let kicked = false;
        const come = (): void => {
          came = true;
          const before = driver.kicks;
          driver.offer(id);
          kicked = driver.kicks > before;
        };
        const tick = (): void => {
          if (seen++ === moment) come();
        };
        const watcher: Watcher = {};
        const virtqueue = ring.makeVirtqueue(driver.base, watchedMemory(ring.guestMemory, watcher));
        virtqueue.setNotification(false);
        expect(virtqueue.pop(new DescriptorChain())).toBe(-1);
        Object.assign(watcher, { beforeRead: tick, afterRead: tick, afterWrite: tick });
        const awake = virtqueue.setNotification(true);
        for (const name of ['beforeRead', 'afterRead', 'afterWrite'] as const) delete watcher[name];
        moments = seen;
        if (!came) come();
        expect(awake || kicked, `base ${base}, moment ${moment} of ${moments}`).toBe(true);
      }
      expect(moments).toBe(3);
      ring.restart();
    }
  });

  it('are not asked for while the device is awake', () => {
    const driver = start({ eventIdx });
    ring.virtqueue.setNotification(false);
    for (let i = 0; i < 20; i++) ring.run({ type: RequestType.flush });
    expect(driver.kicks).toBe(0);
  });
});

describe('the device', () => {
  it.each([
    ['a list', Infinity],
    ['an indirect table', 0],
  ])('reads every field of a request once: %s', (_what, indirectFrom) => {
    const driver = start();
    const request = driver.prepare({ type: RequestType.write, sector: 2, out: Buffer.alloc(512, 3), indirectFrom });
    const reads = new Map<string, number>();
    const watched = watchedMemory(ring.guestMemory, {
      afterRead: (at, bytes) => void reads.set(`${bytes} at ${at}`, (reads.get(`${bytes} at ${at}`) ?? 0) + 1),
    });
    const virtqueue = ring.makeVirtqueue(driver.base, watched);
    reads.clear();
    driver.offer(request.head);
    const chain = new DescriptorChain();
    expect(virtqueue.pop(chain)).toBeGreaterThanOrEqual(0);
    expect([...reads.values()].every((count) => count === 1)).toBe(true);
    expect(reads.size).toBe(indirectFrom === 0 ? 16 : 12);
    expect([chain.count, chain.readableCount]).toEqual([3, 2]);
    ring.restart();
  });
});
