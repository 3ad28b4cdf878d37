/**
 * Goal: what the log writes is read as it was written; what is damaged anywhere is no superblock, header, trailer or record; and
 * numbers that do not fit together are refused however right their CRC is.
 *
 * Method: random structures, there and back; every byte changed; numbers set to bad values with a right CRC.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { native } from '../../../native/index.js';
import {
  BLOCK_BYTES,
  EPOCHS_MAX,
  LogBlock,
  VOLUMES_MAX,
  footerBlocksOf,
  layoutOf,
  recordHeaderBlocks,
} from '../../../src/bdev/log/format.js';
import type { Superblock } from '../../../src/bdev/log/format.js';
import { sharedArena } from '../../support/rig.js';
import { seed } from '../../support/seed.js';

const BLOCKS = 4;
let memory = 0;
let block: LogBlock;

beforeAll(() => {
  memory = sharedArena().allocate(BLOCKS * BLOCK_BYTES);
  block = new LogBlock(sharedArena(), memory, BLOCKS * BLOCK_BYTES);
});

afterAll(() => sharedArena().release(memory));

const number = fc.maxSafeNat();
const word = fc.nat({ max: 0xffffffff });
const uuid = fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Buffer.from(bytes).toString('hex'));

const superblock: fc.Arbitrary<Superblock> = fc
  .record({
    generation: number,
    uuid,
    segmentBlocks: fc.integer({ min: 1024, max: 16_384 }),
    segmentCount: fc.integer({ min: 2, max: 1000 }),
    checkpointBlocks: fc.integer({ min: 1, max: 1000 }),
    flags: fc.nat({ max: 1 }),
    checkpointSlot: fc.nat({ max: 2 }),
    checkpointGeneration: number,
    tails: fc.tuple(number, number),
    flushedSequence: number,
    epochs: fc.uniqueArray(number, { minLength: 1, maxLength: EPOCHS_MAX }),
    volumes: fc.uniqueArray(
      fc.record({
        id: word,
        flags: word,
        blocks: number,
        baseUuid: uuid,
        name: fc.stringMatching(/^[a-z0-9é-]{0,16}$/),
      }),
      { selector: ({ id }) => id, maxLength: VOLUMES_MAX },
    ),
  })
  .map(({ tails, epochs, ...rest }) => {
    const sorted = [...epochs].sort((a, b) => a - b);
    const firstSegmentBlock = 8 + 2 * rest.checkpointBlocks;
    return {
      ...rest,
      firstSegmentBlock,
      deviceBlocks: firstSegmentBlock + rest.segmentBlocks * rest.segmentCount,
      dirtyTail: Math.max(...tails),
      historyTail: Math.min(...tails),
      epochs: sorted.map((epoch) => ({ epoch, firstSequence: epoch })),
    };
  });

/** A CRC that is right for what is there. */
function reseal(lengthBytes: number): void {
  block.bytes.writeUInt32LE(0, 12);
  block.bytes.writeUInt32LE(native.crc32c(0, sharedArena().baseAddress + memory, lengthBytes), 12);
}

/** Changes each byte in turn. */
function expectFragile(lengthBytes: number, read: () => unknown): void {
  for (let at = 0; at < lengthBytes; at++) {
    const before = block.bytes[at]!;
    block.bytes[at] = before ^ (1 << (at % 8));
    if (read() !== null) throw new Error(`byte ${at} may be anything`);
    block.bytes[at] = before;
  }
  expect(read()).not.toBeNull();
}

const SMALL: Superblock = {
  generation: 7,
  uuid: '00112233445566778899aabbccddeeff',
  deviceBlocks: 10 + 2 * 1024,
  segmentBlocks: 1024,
  segmentCount: 2,
  firstSegmentBlock: 10,
  checkpointBlocks: 1,
  flags: 1,
  checkpointSlot: 1,
  checkpointGeneration: 3,
  dirtyTail: 5,
  historyTail: 4,
  flushedSequence: 99,
  epochs: [{ epoch: 1, firstSequence: 1 }],
  volumes: [{ id: 1, flags: 0, blocks: 100, baseUuid: 'ff'.repeat(16), name: 'disk' }],
};

describe('A superblock', () => {
  it('is read as it was written', () => {
    fc.assert(
      fc.property(superblock, (given) => {
        block.writeSuperblock(given);
        expect(block.readSuperblock()).toEqual(given);
      }),
      { seed },
    );
  });

  it('that is damaged in any byte is none', () => {
    block.writeSuperblock(SMALL);
    expectFragile(BLOCK_BYTES, () => block.readSuperblock());
  });

  it.each<[string, Partial<Superblock>]>([
    ['segments beyond the end of the device', { segmentCount: 3 }],
    ['segments of no blocks', { segmentBlocks: 0 }],
    ['segments that are too large', { segmentBlocks: 2 ** 20, deviceBlocks: 2 ** 30 }],
    ['segments where the checkpoints are', { firstSegmentBlock: 9 }],
    ['a history that begins after what is dirty', { historyTail: 6 }],
    ['no epoch', { epochs: [] }],
    [
      'epochs in the wrong order',
      {
        epochs: [
          { epoch: 2, firstSequence: 1 },
          { epoch: 1, firstSequence: 5 },
        ],
      },
    ],
    ['a volume twice', { volumes: [SMALL.volumes[0]!, SMALL.volumes[0]!] }],
    ['a third slot', { checkpointSlot: 3 }],
  ])('that names %s is none', (_, change) => {
    block.writeSuperblock({ ...SMALL, ...change });
    expect(block.readSuperblock()).toBeNull();
  });

  it.each([
    [40, 8],
    [56, 8],
    [64, 8],
    [88, 8],
    [112, 4],
    [116, 4],
  ])('with the largest number at %i is none', (at, bytes) => {
    block.writeSuperblock(SMALL);
    block.bytes.fill(0xff, at, at + bytes);
    reseal(BLOCK_BYTES);
    expect(block.readSuperblock()).toBeNull();
  });

  it('of a later version is none', () => {
    block.writeSuperblock(SMALL);
    block.bytes[8] = 2;
    reseal(BLOCK_BYTES);
    expect(block.readSuperblock()).toBeNull();
  });
});

describe('A segment', () => {
  const header = {
    ordinal: 2 ** 40,
    epoch: 3,
    firstSequence: 77,
    index: 1,
    nextIndex: 0,
    previousCrc: 0xdeadbeef,
    uuid: SMALL.uuid,
  };
  const trailer = {
    ordinal: 9,
    epoch: 3,
    firstSequence: 77,
    lastSequence: 2 ** 45,
    lastCrc: 0xfeedbeef,
    usedBlocks: 900,
    entryCount: 100,
    footerBlocks: footerBlocksOf(100, 1024),
    footerCrc: 5,
  };

  it('has a header and a trailer that are read as they were written, and are none when damaged', () => {
    block.writeSegmentHeader(header);
    expect(block.readSegmentHeader()).toEqual(header);
    expect(block.readSegmentTrailer(1024)).toBeNull();
    expectFragile(BLOCK_BYTES, () => block.readSegmentHeader());
    block.writeSegmentTrailer(trailer);
    expect(block.readSegmentTrailer(1024)).toEqual(trailer);
    expect(block.readSegmentHeader()).toBeNull();
    expectFragile(BLOCK_BYTES, () => block.readSegmentTrailer(1024));
  });

  it.each([{ usedBlocks: 1023 }, { entryCount: 2000 }, { footerBlocks: 1000 }, { entryCount: 0xffffffff }])(
    'with a trailer that does not fit into it has none: %o',
    (change) => {
      block.writeSegmentTrailer({ ...trailer, ...change });
      expect(block.readSegmentTrailer(1024)).toBeNull();
    },
  );
});

describe('A record', () => {
  const extent = fc.record({
    volume: word,
    type: fc.nat({ max: 255 }),
    flags: fc.nat({ max: 255 }),
    lba: number,
    blocks: word,
    place: word,
    word: number,
  });

  it('has a header that is read as it was written, and is none when damaged', () => {
    fc.assert(
      fc.property(
        fc.array(extent, { maxLength: 130 }),
        fc.array(word, { maxLength: 300 }),
        fc.tuple(number, number, number, number, number, word),
        (extents, crcs, [epoch, sequence, wallUs, monotonicUs, flushedSequence, previousCrc]) => {
          const headerBlocks = recordHeaderBlocks(extents.length, crcs.length);
          const header = {
            epoch,
            sequence,
            wallUs,
            monotonicUs,
            flushedSequence,
            previousCrc,
            headerBlocks,
            payloadBlocks: crcs.length,
            extentCount: extents.length,
          };
          block.bytes.fill(0xee);
          extents.forEach((one, i) => block.writeExtent(i, one));
          crcs.forEach((crc, i) => block.writePayloadCrc(extents.length, i, crc));
          const crc = block.writeRecordHeader(header);
          expect(block.peekRecordHeader(1000)).toEqual(header);
          expect(block.recordCrc(headerBlocks)).toBe(crc);
          expect(extents.map((_, i) => block.readExtent(i))).toEqual(extents);
          expect(crcs.map((_, i) => block.readPayloadCrc(extents.length, i))).toEqual(crcs);
          expect(block.peekRecordHeader(headerBlocks + crcs.length - 1)).toBeNull();
        },
      ),
      { seed },
    );
    const headerBlocks = block.peekRecordHeader(1000)!.headerBlocks;
    expectFragile(headerBlocks * BLOCK_BYTES, () => (block.recordCrc(headerBlocks) < 0 ? null : true));
  });

  it('with a number that cannot be is none', () => {
    block.bytes.fill(0, 0, BLOCK_BYTES);
    const numbers = { epoch: 1, sequence: 1, wallUs: 1, monotonicUs: 1, flushedSequence: 0, previousCrc: 0 };
    block.writeRecordHeader({ ...numbers, headerBlocks: 1, payloadBlocks: 1, extentCount: 1 });
    expect(block.peekRecordHeader(1000)).not.toBeNull();
    for (const at of [16, 24, 32, 40, 48, 60, 64, 68]) {
      const before = Buffer.from(block.bytes.subarray(at, at + 8));
      block.bytes.fill(0xff, at, at < 60 ? at + 8 : at + 4);
      expect(block.peekRecordHeader(1000), `at ${at}`).toBeNull();
      before.copy(block.bytes, at);
    }
  });

  it('of one block takes two, and one of eight takes nine', () => {
    expect(recordHeaderBlocks(1, 1) + 1).toBe(2);
    expect(recordHeaderBlocks(8, 8) + 8).toBe(9);
    expect(recordHeaderBlocks(111, 111)).toBe(1);
    expect(recordHeaderBlocks(112, 112)).toBe(2);
  });
});

describe('The layout of a device', () => {
  it('puts everything on it, next to one another', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 2 ** 32 }),
        fc.integer({ min: 1024, max: 16_384 }),
        fc.integer({ min: 16, max: 100_000 }),
        (deviceBlocks, segmentBlocks, bytesPerSegment) => {
          const { checkpointBlocks, firstSegmentBlock, segmentCount } = layoutOf(
            deviceBlocks,
            segmentBlocks,
            bytesPerSegment,
          );
          expect(firstSegmentBlock).toBe(8 + 2 * checkpointBlocks);
          expect((checkpointBlocks - 1) * BLOCK_BYTES).toBeGreaterThanOrEqual(segmentCount * bytesPerSegment);
          if (segmentCount > 0)
            expect(firstSegmentBlock + segmentCount * segmentBlocks).toBeLessThanOrEqual(deviceBlocks);
        },
      ),
      { seed },
    );
  });
});
