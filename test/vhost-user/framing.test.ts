/**
 * Goal: how a driver cuts header, data and status into buffers makes no difference (VIRTIO 1.2, 2.7.4.2 and 5.2.6.4): the disk
 * holds, and the driver is told, what an array in memory would.
 *
 * Method: sequences of requests with random framing (pieces of any length, none included, direct and indirect, misaligned, on two
 * regions, batched) against a model that knows nothing of framing. fast-check shrinks a sequence that fails.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { encodeRanges } from '../frontend/driver-queue.js';
import type { Completion, RequestSpec } from '../frontend/driver-queue.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { seed } from '../support/seed.js';
import { RingDevice } from './ring-device.js';
import { DISK_BYTES, memoryDisk } from './served-disk.js';

const MIB = 2 ** 20;
const SECTORS = 64;

/** A request before it is cut into pieces. */
interface Operation {
  readonly type: number;
  readonly sector: number;
  readonly sectors: number;
  /** Where pieces end, as parts of the whole; where two are alike there is a piece of no length. */
  readonly readableCuts: readonly number[];
  readonly writableCuts: readonly number[];
  readonly indirectFrom: number;
  readonly region: number;
  readonly shiftBytes: number;
}

const cuts = fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { maxLength: 14 });
const operation: fc.Arbitrary<Operation> = fc.record({
  type: fc.constantFrom(
    ...[RequestType.read, RequestType.read, RequestType.write, RequestType.write, RequestType.write],
    ...[RequestType.writeZeroes, RequestType.discard, RequestType.getId, RequestType.flush],
  ),
  sector: fc.nat(SECTORS - 1),
  sectors: fc.integer({ min: 1, max: 24 }),
  readableCuts: cuts,
  writableCuts: cuts,
  indirectFrom: fc.oneof(fc.constant(0), fc.nat(4), fc.constant(Infinity)),
  region: fc.nat(1),
  shiftBytes: fc.constantFrom(0, 0, 1, 3, 8, 511),
});

/** Lengths of the pieces of `lengthBytes` that are cut at these parts of it. */
function pieces(lengthBytes: number, at: readonly number[]): number[] {
  const ends = [...at.map((part) => Math.floor(part * lengthBytes)), lengthBytes].sort((a, b) => a - b);
  return ends.map((end, i) => end - (ends[i - 1] ?? 0));
}

/** A disk as an array, and what it answers. */
class Model {
  readonly bytes = Buffer.alloc(SECTORS * 512 + 24 * 512);

  /** Returns the data of the answer. */
  apply({ type, sector, sectors }: Operation, out: Buffer): Buffer {
    const [from, to] = [sector * 512, (sector + sectors) * 512];
    switch (type) {
      case RequestType.read:
        return Buffer.from(this.bytes.subarray(from, to));
      case RequestType.write:
        out.copy(this.bytes, from);
        return Buffer.alloc(0);
      case RequestType.writeZeroes:
      case RequestType.discard:
        this.bytes.fill(0, from, to);
        return Buffer.alloc(0);
      case RequestType.getId:
        return Buffer.from('serial'.padEnd(20, '\0'));
      default:
        return Buffer.alloc(0);
    }
  }
}

describe.each([
  ['small rings, no event index', { queueSize: 32, eventIdx: false }],
  ['event index', { queueSize: 256, eventIdx: true }],
  ['packed rings, no event index', { queueSize: 33, eventIdx: false, packed: true }],
  ['packed rings, event index', { queueSize: 256, eventIdx: true, packed: true }],
])('any framing, with %s', (_name, options) => {
  let ring: RingDevice;

  beforeAll(() => {
    ring = new RingDevice({
      ...options,
      configs: memoryDisk(),
      regions: [
        { guestAddress: MIB, sizeBytes: 4 * MIB },
        { guestAddress: 2 ** 33, sizeBytes: 8 * MIB, mmapOffset: 4096 },
      ],
    });
  });
  afterAll(() => ring.close());

  /** The request as the driver lays it out, and the bytes it writes. */
  function lay({ type, sector, sectors, ...framing }: Operation): { spec: RequestSpec; out: Buffer } {
    let out: Buffer = Buffer.alloc(0);
    let inBytes = 0;
    if (type === RequestType.write) out = fresh(sectors * 512);
    if (type === RequestType.writeZeroes || type === RequestType.discard) out = encodeRanges([{ sector, sectors }]);
    if (type === RequestType.read) inBytes = sectors * 512;
    if (type === RequestType.getId) inBytes = 20;
    const readable = pieces(16 + out.length, framing.readableCuts);
    const writable = pieces(inBytes + 1, framing.writableCuts);
    // What does not fit into the ring's own descriptors goes to a table.
    const indirectFrom = Math.min(framing.indirectFrom, readable.length + writable.length > 30 ? 4 : Infinity);
    const { shiftBytes } = framing;
    const region = ring.memory.regions[framing.region]!;
    return {
      spec: { type, sector, out, inBytes, framing: { readable, writable }, indirectFrom, region, shiftBytes },
      out,
    };
  }

  function expectAnswer(completion: Completion | undefined, data: Buffer, what: string): void {
    expect(completion, what).toMatchObject({ status: Status.ok, usedBytes: data.length + 1 });
    expectBytes(completion!.data.subarray(0, data.length), data, what);
  }

  it('gives the same disk, the same data and the exact used length', () => {
    const property = fc.property(fc.array(operation, { minLength: 1, maxLength: 30 }), (operations) => {
      const model = new Model();
      ring.run({ type: RequestType.writeZeroes, out: encodeRanges([{ sector: 0, sectors: DISK_BYTES / 512 }]) });
      for (const [i, op] of operations.entries()) {
        const { spec, out } = lay(op);
        expectAnswer(ring.run(spec), model.apply(op, out), `request ${i}`);
      }
      const { length } = model.bytes;
      expectBytes(ring.run({ type: RequestType.read, sector: 0, inBytes: length }).data, model.bytes, 'the disk');
    });
    fc.assert(property, { numRuns: 150, seed });
  });

  it('gives each of a batch its own answer', () => {
    const distinct = fc.array(operation, { minLength: 2, maxLength: 8 }).filter((operations) => {
      const places = operations.filter(({ type }) => type !== RequestType.getId && type !== RequestType.flush);
      return places.every((a) =>
        places.every((b) => a === b || a.sector + a.sectors <= b.sector || b.sector + b.sectors <= a.sector),
      );
    });
    const property = fc.property(distinct, (operations) => {
      const model = new Model();
      ring.run({ type: RequestType.writeZeroes, out: encodeRanges([{ sector: 0, sectors: DISK_BYTES / 512 }]) });
      const laid = operations.map((op) => ({ op, ...lay({ ...op, indirectFrom: 0 }) }));
      const requests = ring.driver.submit(...laid.map(({ spec }) => spec));
      ring.settle();
      for (const [i, request] of requests.entries()) {
        const { op, out } = laid[i]!;
        expectAnswer(ring.completionOf(request), model.apply(op, out), `request ${i}`);
      }
    });
    fc.assert(property, { numRuns: 100, seed });
  });
});

describe('a header', () => {
  let ring: RingDevice;
  beforeAll(() => {
    ring = new RingDevice();
  });
  afterAll(() => ring.close());

  it('may be cut into 1 to 16 pieces, alone or merged with the data', () => {
    for (let count = 1; count <= 16; count++) {
      const header = [...Array<number>(count - 1).fill(1), 16 - (count - 1)];
      for (const readable of [
        [...header, 512],
        [...header.slice(0, -1), header.at(-1)! + 512],
        [...header.slice(0, -1), header.at(-1)! + 1, 511],
      ]) {
        const out = fresh(512);
        const spec = { type: RequestType.write, sector: count, out, framing: { readable } };
        expect(ring.run(spec), `${readable.join('+')}`).toMatchObject({ status: Status.ok, usedBytes: 1 });
        expectBytes(ring.run({ type: RequestType.read, sector: count, inBytes: 512 }).data, out, readable.join('+'));
      }
    }
  });
});

describe('a status byte', () => {
  let ring: RingDevice;
  beforeAll(() => {
    ring = new RingDevice();
  });
  afterAll(() => ring.close());

  it.each([
    [[513]],
    [[512, 1]],
    [[511, 2]],
    [[1, 512]],
    [[256, 256, 1]],
    [[512, 0, 1, 0]],
    [[...Array<number>(513).fill(1)]],
  ])('may be merged with the data of a read or split from it: case %#', (writable) => {
    const out = fresh(512);
    ring.run({ type: RequestType.write, sector: 0, out });
    const answer = ring.run({
      type: RequestType.read,
      sector: 0,
      inBytes: 512,
      framing: { writable },
      indirectFrom: 0,
    });
    expect(answer).toMatchObject({ status: Status.ok, usedBytes: 513 });
    expectBytes(answer.data, out, writable.join('+'));
  });
});
