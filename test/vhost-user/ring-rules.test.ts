/**
 * Goal: a split ring is read by the rules of VIRTIO 1.2, 2.7, and by no others: whatever breaks one breaks the ring, before
 * anything is read or written that the driver did not offer; whatever keeps them works.
 *
 * Method: one test per rule, with rings written by hand; each broken ring has a neighbour that just keeps the rule. The request
 * is a disk request, so that what was read and written shows.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Descriptor } from '../frontend/driver-queue.js';
import { DescriptorFlag, RequestType, Status } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { INDIRECT_MAX } from '../../src/vhost-user/chain-builder.js';
import { blkHeader } from './chains.js';
import { RingDevice } from './ring-device.js';
import type { RingDeviceOptions } from './ring-device.js';
import { heldDisk } from './served-disk.js';

const { next: NEXT, write: WRITE, indirect: INDIRECT } = DescriptorFlag;
const MIB = 2 ** 20;

let ring: RingDevice;

function start(options: RingDeviceOptions = {}): void {
  ring = new RingDevice(options);
}

afterEach(() => ring.close());

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
  const [request] = ring.driver.submit({ type: RequestType.flush });
  ring.settle();
  expect(ring.completionOf(request!)).toBeUndefined();
  expect(ring.faults).toHaveLength(1);
}

describe('the available ring', () => {
  beforeEach(() => start());

  it.each([128, 129, 0x8000, 0xffff])('may not hold the head %i of a ring of 128', (head) => {
    ring.driver.offer(head);
    expectBroken('a head is beyond the ring');
  });

  it('may hold the last descriptor as a head', () => {
    const [header, data, status] = readParts();
    ring.driver.writeDescriptor(127, ring.table(header, data, status));
    expect(ring.offer(127)).toEqual({ id: 127, lengthBytes: 513 });
  });

  it.each([129, 1000, 0xffff])('may not have its index %i entries ahead of a ring of 128', (ahead) => {
    ring.driver.publishIndex(ahead);
    expectBroken('more entries are available than the ring holds');
  });

  it('may have its index as many entries ahead as it has', () => {
    for (let i = 0; i < 128; i++) ring.driver.submit({ type: RequestType.flush });
    ring.settle();
    expect(ring.driver.deviceUsedIndex).toBe(128);
  });

  it('may not hold a head twice in one batch', () => {
    const head = ring.driver.prepare({ type: RequestType.flush }).head;
    ring.driver.offer(head, head);
    ring.settle();
    expect(ring.faults).toEqual(['a head was made available while it was in flight']);
    // The first of the two is a request like any other.
    expect(ring.driver.deviceUsedIndex).toBe(1);
  });
});

describe('a head', () => {
  it('that is in flight breaks the ring when it is offered again; what is in flight is answered', () => {
    start({ configs: heldDisk() });
    const [request, other] = ring.driver.submit(
      { type: RequestType.read, sector: 0, inBytes: 512 },
      { type: RequestType.read, sector: 1, inBytes: 512 },
    );
    ring.settle();
    ring.driver.offer(request!.head);
    ring.settle();
    expect(ring.faults).toEqual(['a head was made available while it was in flight']);
    expect(ring.queue.inflight).toBe(2);
    ring.release();
    expect(ring.completionOf(other!)?.status).toBe(Status.ok);
    expect(request!.completion).toMatchObject({ status: Status.ok, usedBytes: 513 });
    expect(ring.driver.deviceUsedIndex).toBe(2);
  });

  it('may be offered again once it was answered', () => {
    start();
    const [header, data, status] = readParts();
    ring.driver.writeDescriptor(5, ring.table(header, data, status));
    for (let i = 0; i < 300; i++) expect(ring.offer(5)).toEqual({ id: 5, lengthBytes: 513 });
  });
});

describe('a chain', () => {
  beforeEach(() => start({ queueSize: 8 }));

  it.each([8, 9, 0xffff])('may not go on at the descriptor %i of a ring of 8', (next) => {
    const [header] = readParts();
    ring.driver.writeDescriptor(0, { ...header, flags: NEXT, next });
    ring.driver.offer(0);
    expectBroken('a next index is beyond the table');
  });

  it('may have as many descriptors as the ring', () => {
    const [header, , status] = readParts();
    expect(ring.offerChain(header, ...Array.from({ length: 6 }, () => ring.writable(512)), status)).toBe(6 * 512 + 1);
  });

  it.each([
    ['to itself', [0]],
    ['back to its head', [1, 2, 0]],
    ['within', [1, 2, 1]],
    ['through the whole ring', [1, 2, 3, 4, 5, 6, 7, 0]],
  ])('may not lead %s', (_what, order) => {
    const [header] = readParts();
    order.forEach((next, i) => ring.driver.writeDescriptor(i, { ...header, flags: NEXT, next }));
    ring.driver.offer(0);
    expectBroken('a chain is longer than the ring, or loops');
  });

  it('may not loop through descriptors of no length either', () => {
    const empty = { address: 0, lengthBytes: 0, flags: NEXT };
    ring.driver.writeDescriptor(0, { ...empty, next: 1 });
    ring.driver.writeDescriptor(1, { ...empty, next: 0 });
    ring.driver.offer(0);
    expectBroken('a chain is longer than the ring, or loops');
  });

  it('may hold descriptors of no length anywhere, wherever they point', () => {
    const [header, data, status] = readParts();
    const nowhere = { address: 2n ** 52n, lengthBytes: 0 };
    const used = ring.offerChain(nowhere, header, nowhere, data, { ...nowhere, flags: WRITE }, status, {
      ...nowhere,
      flags: WRITE,
    });
    expect(used).toBe(513);
    expect(ring.bytes(status)[0]).toBe(Status.ok);
  });

  it('may not have a readable buffer behind a writable one', () => {
    const [header, data, status] = readParts();
    const head = writeOut(header, data, ring.readable(Buffer.alloc(512)), status);
    ring.driver.offer(head);
    expectBroken('a readable buffer after a writable one');
  });

  function writeOut(...parts: Descriptor[]): number {
    parts.forEach((part, i) => {
      const isLast = i === parts.length - 1;
      ring.driver.writeDescriptor(i, isLast ? part : { ...part, flags: (part.flags ?? 0) | NEXT, next: i + 1 });
    });
    return 0;
  }

  it('without a writable byte has nowhere to be answered: it breaks the ring, and nothing behind it is taken', () => {
    const flush = ring.driver.prepare({ type: RequestType.flush });
    const [header] = readParts();
    const silent = ring.driver.takeDescriptors(1)[0]!;
    ring.driver.writeDescriptor(silent, header);
    ring.driver.offer(silent, flush.head);
    expectBroken('a request without a status byte');
  });

  it.each<[string, Descriptor]>([
    ['outside all regions', { address: 64 * MIB, lengthBytes: 1 }],
    ['a byte before a region', { address: MIB - 1, lengthBytes: 1 }],
    ['a byte before a region, into it', { address: MIB - 1, lengthBytes: 2 }],
    ['at the end of a region', { address: 9 * MIB, lengthBytes: 1 }],
    ['over the end of a region', { address: 9 * MIB - 511, lengthBytes: 512 }],
    ['longer than all memory', { address: MIB, lengthBytes: 0xf0000000 }],
    ['at 0', { address: 0, lengthBytes: 16 }],
  ])('may not have a buffer %s', (_what, buffer) => {
    for (const flags of [0, WRITE]) {
      const [header, data, status] = readParts();
      ring.driver.offer(
        flags === 0 ? writeOut(header, buffer, data, status) : writeOut(header, { ...buffer, flags }, status),
      );
      expectBroken('a buffer is outside guest memory');
      ring.restart();
    }
  });

  it.each([2n ** 53n, 2n ** 63n, 2n ** 64n - 512n, 2n ** 64n - 1n, 0xffff_0000_0010_0000n])(
    'may not have a buffer at %i, where its end wraps or cannot be counted',
    (address) => {
      const [header, , status] = readParts();
      ring.driver.offer(writeOut(header, { address, lengthBytes: 1024, flags: WRITE }, status));
      expectBroken('a descriptor address is beyond 2^53');
    },
  );
});

describe('an indirect table', () => {
  beforeEach(() => start({ queueSize: 16 }));

  it('works, whether or not it is marked as writable', () => {
    for (const extra of [0, WRITE]) {
      const [header, data, status] = readParts();
      const table = ring.table(header, data, status);
      expect(ring.offerChain({ ...table, flags: INDIRECT | extra })).toBe(513);
      expect(ring.bytes(status)[0]).toBe(Status.ok);
    }
  });

  it('may follow direct descriptors', () => {
    const [header, data, status] = readParts();
    expect(ring.offerChain(header, ring.table(data, status))).toBe(513);
    expect(ring.offerChain(header, data, ring.table(status))).toBe(513);
  });

  it('may not be offered when it was not negotiated', () => {
    ring.close();
    start({ indirect: false });
    const [header, data, status] = readParts();
    ring.offerChain(ring.table(header, data, status));
    expectBroken('an indirect descriptor without the feature');
  });

  it('may not hold another', () => {
    const [header, data, status] = readParts();
    ring.offerChain(ring.table(header, ring.table(data, status)));
    expectBroken('nested indirect descriptors');
  });

  it('may not hold itself', () => {
    const address = ring.memory.allocate(16);
    ring.offerChain(ring.rawTable(address, [{ address, lengthBytes: 16, flags: INDIRECT }]));
    expectBroken('nested indirect descriptors');
  });

  it('may not be followed by another descriptor', () => {
    const [header, data, status] = readParts();
    ring.offerChain(ring.table(header, data), status);
    expectBroken('an indirect descriptor with a next one');
  });

  it.each([0, 1, 15, 17, 47, 0xffffffff])('may not be %i bytes long', (lengthBytes) => {
    const [header, data, status] = readParts();
    ring.offerChain({ ...ring.table(header, data, status), lengthBytes });
    expectBroken('an indirect table of a broken length');
  });

  it('may be longer than the ring, up to the longest request that is announced and more', () => {
    const count = INDIRECT_MAX;
    const address = ring.memory.allocate(16 * count);
    const [header, , status] = readParts();
    const data = Array.from({ length: count - 2 }, () => ring.writable(512));
    const chain = [header, ...data, status].map((part, i) =>
      i === count - 1 ? part : { ...part, flags: (part.flags ?? 0) | NEXT, next: i + 1 },
    );
    expect(ring.offerChain(ring.rawTable(address, chain))).toBe((count - 2) * 512 + 1);
  });

  it.each([16 * (INDIRECT_MAX + 1), 16 * 65536, 0xfffffff0])(
    'may not be %i bytes long, which is too long',
    (length) => {
      const [header, data, status] = readParts();
      ring.offerChain({ ...ring.table(header, data, status), lengthBytes: length });
      expectBroken('an indirect table is too long');
    },
  );

  it('may not go on beyond its end', () => {
    const [header] = readParts();
    const address = ring.memory.allocate(64);
    for (const next of [2, 3, 0xffff]) {
      ring.offerChain(
        ring.rawTable(address, [
          { ...header, flags: NEXT, next: 1 },
          { ...header, flags: NEXT, next },
        ]),
      );
      expectBroken('a next index is beyond the table');
      ring.restart();
    }
  });

  it('may not loop, with lengths or without', () => {
    const address = ring.memory.allocate(64);
    for (const lengthBytes of [16, 0]) {
      const [header] = readParts();
      const part = { ...header, lengthBytes, flags: NEXT };
      ring.offerChain(
        ring.rawTable(address, [
          { ...part, next: 1 },
          { ...part, next: 0 },
        ]),
      );
      expectBroken('a chain is longer than the ring, or loops');
      ring.restart();
    }
  });

  it('may not have a readable buffer behind a writable one, before it or in it', () => {
    const [header, data, status] = readParts();
    ring.offerChain(ring.table(header, data, header, status));
    expectBroken('a readable buffer after a writable one');
    ring.restart();
    ring.offerChain(header, data, ring.table(header, status));
    expectBroken('a readable buffer after a writable one');
  });

  it.each([64 * MIB, 9 * MIB - 32, 9 * MIB - 47, MIB - 16, 0])('may not lie outside memory, at %i', (address) => {
    const [header, data, status] = readParts();
    ring.offerChain({ ...ring.table(header, data, status), address });
    expectBroken('an indirect table is outside guest memory');
  });

  it('may not lie beyond what can be counted', () => {
    ring.offerChain({ address: 2n ** 64n - 48n, lengthBytes: 48, flags: INDIRECT });
    expectBroken('a descriptor address is beyond 2^53');
  });

  it('may lie at any address, aligned or not', () => {
    for (let shift = 0; shift < 16; shift++) {
      const [header, data, status] = readParts();
      const address = ring.memory.allocate(64) + shift;
      const table = ring.rawTable(address, [
        { ...header, flags: NEXT, next: 1 },
        { ...data, flags: WRITE | NEXT, next: 2 },
        status,
      ]);
      expect(ring.offerChain(table), `shifted by ${shift}`).toBe(513);
    }
  });
});

describe.each(['split', 'packed'])('buffers over regions that follow each other (%s ring)', (kind) => {
  const regions = [
    { guestAddress: MIB, sizeBytes: MIB },
    { guestAddress: 2 * MIB, sizeBytes: 8192, userAddress: 0x7000_0000_0000 },
    { guestAddress: 2 * MIB + 8192, sizeBytes: MIB, mmapOffset: 4096 },
    // A gap, then more.
    { guestAddress: 8 * MIB, sizeBytes: MIB },
  ];
  beforeEach(() => start({ regions, packed: kind === 'packed' }));

  const seam = 2 * MIB;
  const request = (data: Descriptor, type: number): Descriptor[] => [
    ring.readable(blkHeader(type)),
    data,
    ring.writable(1),
  ];

  it.each([
    ['one seam', seam - 512, 1024],
    ['two seams', seam - 4096, 16384],
    ['a seam after a byte', seam - 1, 512],
    ['a seam before a byte', seam - 511, 512],
  ])('hold the right data over %s', (_what, address, lengthBytes) => {
    const content = fresh(lengthBytes);
    ring.poke(address, content);
    expect(ring.offerChain(...request({ address, lengthBytes }, RequestType.write))).toBe(1);
    ring.poke(address, Buffer.alloc(lengthBytes));
    expect(ring.offerChain(...request({ address, lengthBytes, flags: WRITE }, RequestType.read))).toBe(lengthBytes + 1);
    expectBytes(ring.peek(address, lengthBytes), content, 'read over the seam');
  });

  it('may hold a header and a status too', () => {
    const header = { address: seam - 7, lengthBytes: 16 };
    ring.poke(header.address, blkHeader(RequestType.read));
    const status = { address: seam + 8192 - 2, lengthBytes: 4, flags: WRITE };
    expect(ring.offerChain(header, ring.writable(509), status)).toBe(513);
    expect(ring.peek(status.address + 3, 1)[0]).toBe(Status.ok);
  });

  it.each([seam - 24, seam - 4, seam + 8192 - 8, seam + 8192 - 16])('may hold an indirect table, at %i', (address) => {
    const [header, data, status] = readParts();
    expect(ring.offerChain(ring.tableAt(address, header, data, status))).toBe(513);
  });

  it('may not reach over a gap', () => {
    ring.offerChain(...request({ address: 3 * MIB + 8192 - 256, lengthBytes: 512, flags: WRITE }, RequestType.read));
    expectBroken('a buffer is outside guest memory');
  });
});

describe.each(['split', 'packed'])('memory beyond the reach of 32 bits (%s ring)', (kind) => {
  const guestAddress = 2 ** 40;
  beforeEach(() =>
    start({
      packed: kind === 'packed',
      regions: [
        { guestAddress: MIB, sizeBytes: MIB },
        { guestAddress, sizeBytes: 5 * 2 ** 30 },
      ],
    }),
  );

  /** Guest address of the byte whose arena offset on the device's side is the next multiple of 2 GiB. */
  function windowEdge(): number {
    const at = ring.guestMemory.translate(guestAddress, 1);
    return guestAddress + (Math.ceil((at + 4096) / 2 ** 31) * 2 ** 31 - at);
  }

  it('holds headers, tables, data and status anywhere around the edges of 2 GiB windows', () => {
    const edge = windowEdge();
    for (const shift of [-4096, -48, -33, -32, -17, -16, -15, -12, -8, -4, -1, 0, 4]) {
      for (const part of ['header', 'table', 'data', 'status']) {
        const content = fresh(512);
        const [header, data, status] = [
          { address: ring.memory.allocate(16), lengthBytes: 16 },
          { address: ring.memory.allocate(512), lengthBytes: 512, flags: 0 },
          { address: ring.memory.allocate(3), lengthBytes: 3, flags: WRITE },
        ] as const;
        const place = { header, data, status, table: { address: ring.memory.allocate(48) } };
        const at = { ...place, [part]: { ...place[part as 'header'], address: edge + shift } };
        ring.poke(at.header.address, blkHeader(RequestType.write));
        ring.poke(at.data.address, content);
        const table = ring.tableAt(at.table.address, at.header, at.data, at.status);
        const what = `${part} at ${shift}`;
        expect(ring.offerChain(table), what).toBe(1);
        expect(ring.peek(at.status.address + 2, 1)[0], what).toBe(Status.ok);
        expectBytes(ring.run({ type: RequestType.read, sector: 0, inBytes: 512 }).data, content, what);
        ring.restart();
      }
    }
  });

  it('may be offered up to 2^32 bytes in one chain, and not a byte more', () => {
    const half = { address: guestAddress, lengthBytes: 2 ** 31, flags: WRITE };
    const header = ring.readable(blkHeader(RequestType.read));
    const rest = { address: guestAddress, lengthBytes: 2 ** 31 - 17, flags: WRITE };
    const status = ring.writable(1);
    // Longer than the disk, so answered by an error: the ring is in order.
    expect(ring.offerChain(header, half, rest, status)).toBe(1);
    expect(ring.bytes(status)[0]).toBe(Status.ioError);
    ring.restart();
    ring.offerChain(header, half, { ...rest, lengthBytes: 2 ** 31 - 16 }, status);
    expectBroken('a chain is longer than 2^32 bytes');
  });
});

describe('a ring', () => {
  it.each([0, 1, 77, 0x7fff, 0xfffe, 0xffff])('goes on from the index %i, past the end of 16 bits', (base) => {
    start({ base, queueSize: 4 });
    for (let i = 0; i < 12; i++) {
      const content = fresh(512);
      expect(ring.run({ type: RequestType.write, sector: i, out: content }).status).toBe(Status.ok);
      expectBytes(ring.run({ type: RequestType.read, sector: i, inBytes: 512 }).data, content, 'read back');
    }
    expect(ring.virtqueue.nextAvailable).toBe((base + 24) & 0xffff);
    expect(ring.driver.deviceUsedIndex).toBe((base + 24) & 0xffff);
  });

  it('of one entry works', () => {
    start({ queueSize: 1 });
    for (let i = 0; i < 5; i++) expect(ring.run({ type: RequestType.flush }).status).toBe(Status.ok);
  });

  it('of 1024 entries takes 1024 requests at once, and answers each once', () => {
    start({ queueSize: 1024, configs: heldDisk() });
    const requests = Array.from({ length: 1024 }, (_, i) =>
      ring.driver.prepare({ type: RequestType.read, sector: i, inBytes: 512 }),
    );
    ring.driver.offer(...requests.map((request) => request.head));
    ring.settle(20);
    expect(ring.queue.inflight).toBe(1024);
    ring.release();
    expect(requests.every((request) => ring.completionOf(request)?.status === Status.ok)).toBe(true);
    expect(ring.driver.deviceUsedIndex).toBe(1024);
  });

  it('goes on where its used ring says, however far that is from the available ring', () => {
    start();
    ring.driver.usedBytes.writeUInt16LE(500, 2);
    ring.driver.availableBytes.writeUInt16LE(77, 2);
    ring.driver.resume();
    const { driver } = ring;
    const again = ring.makeVirtqueue(77);
    again.push(3, 42);
    again.publish();
    expect(driver.deviceUsedIndex).toBe(501);
    expect(driver.takeRawUsed()).toEqual({ id: 3, lengthBytes: 42 });
    expect(again.nextAvailable).toBe(77);
  });

  it('lies between pages that nobody has touched', () => {
    start();
    ring.run({ type: RequestType.write, sector: 0, out: fresh(65536) });
    ring.run({ type: RequestType.read, sector: 0, inBytes: 65536 });
    expect(ring.guarded).toBe(true);
  });
});
