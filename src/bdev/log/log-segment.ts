/** A segment that records are appended to: how far it is filled, and what its footer will say. */
import { native } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';
import { BLOCK_BYTES, EXTENT_BYTES, LogBlock, footerBlocksOf } from './format.js';
import type { LogRecord } from './log-record.js';

export class LogSegment {
  readonly index: number;
  readonly ordinal: number;
  readonly epoch: number;
  /** The segment that follows. */
  readonly nextIndex: number;
  readonly firstSequence: number;
  /** CRC of the header of the record before its first. */
  readonly previousCrc: number;
  lastSequence: number;
  lastCrc: number;
  /** Blocks up to the end of the last record. */
  usedBlocks = 1;
  /** Records on their way to the device. */
  outstanding = 0;
  /** Its entries, as they are in the footer but for their order. */
  readonly memory: FooterMemory;
  entryCount = 0;

  constructor(
    memory: FooterMemory,
    place: { readonly index: number; readonly ordinal: number; readonly nextIndex: number },
    start: { readonly epoch: number; readonly firstSequence: number; readonly previousCrc: number },
  ) {
    this.index = place.index;
    this.ordinal = place.ordinal;
    this.nextIndex = place.nextIndex;
    this.epoch = start.epoch;
    this.firstSequence = start.firstSequence;
    this.lastSequence = start.firstSequence - 1;
    this.previousCrc = start.previousCrc;
    this.lastCrc = start.previousCrc;
    this.memory = memory;
    memory.crcs.fill(0);
  }

  get isEmpty(): boolean {
    return this.usedBlocks === 1;
  }

  /** Whether a record of so many blocks and extents finds room, with what the footer needs then. */
  hasRoom(blocks: number, extents: number): boolean {
    const { segmentBlocks } = this.memory;
    const footer = footerBlocksOf(this.entryCount + extents, segmentBlocks) + 1;
    return this.usedBlocks + blocks + footer <= segmentBlocks;
  }

  /** A record was put at the end. */
  add(record: LogRecord, sequence: number, headerBlocks: number): void {
    const { entries, crcs } = this.memory;
    const payload = this.usedBlocks + headerBlocks;
    for (let i = 0; i < record.extentCount; i++) {
      const { volumes, types, flags, lbas, blocks, places } = record;
      const place = payload + places[i]!;
      entries.putExtent(this.entryCount++, volumes[i]!, types[i]!, flags[i]!, lbas[i]!, blocks[i]!, place, sequence, 0);
    }
    for (let i = 0; i < record.payloadBlocks; i++) crcs[payload + i] = record.crcs[i]!;
    this.usedBlocks = payload + record.payloadBlocks;
    this.lastSequence = sequence;
  }
}

/** Memory for the footer of a segment, with its trailer behind it. */
export class FooterMemory {
  readonly segmentBlocks: number;
  readonly entries: LogBlock;
  /** Of each block of the segment; 0 for what is no payload. */
  readonly crcs: Uint32Array;
  readonly address: number;
  readonly #arena: Arena;

  constructor(arena: Arena, segmentBlocks: number) {
    this.#arena = arena;
    this.segmentBlocks = segmentBlocks;
    this.crcs = new Uint32Array(segmentBlocks);
    const lengthBytes = (footerBlocksOf(segmentBlocks, segmentBlocks) + 1) * BLOCK_BYTES;
    this.address = arena.allocate(lengthBytes, BLOCK_BYTES);
    this.entries = new LogBlock(arena, this.address, lengthBytes);
  }

  /** Sorts the entries, puts the CRCs behind them. Returns the bytes of the footer, in whole blocks. */
  #finish(entryCount: number): number {
    const { entries, crcs, segmentBlocks } = this;
    const all = Array.from({ length: entryCount }, (_, i) => entries.readExtent(i, 0));
    all.sort((a, b) => a.volume - b.volume || a.lba - b.lba || a.place - b.place);
    all.forEach((extent, i) => entries.writeExtent(i, extent, 0));
    const end = entryCount * EXTENT_BYTES;
    for (let block = 0; block < segmentBlocks; block++) entries.bytes.writeUInt32LE(crcs[block]!, end + block * 4);
    const lengthBytes = footerBlocksOf(entryCount, segmentBlocks) * BLOCK_BYTES;
    entries.bytes.fill(0, end + segmentBlocks * 4, lengthBytes);
    return lengthBytes;
  }

  /** Finishes the footer and puts the trailer behind it. Returns the bytes of both. */
  writeTrailer(segment: LogSegment): number {
    const { ordinal, epoch, firstSequence, lastSequence, lastCrc, usedBlocks, entryCount } = segment;
    const lengthBytes = this.#finish(entryCount);
    const footerCrc = native.crc32c(0, this.#arena.baseAddress + this.address, lengthBytes);
    const footerBlocks = lengthBytes / BLOCK_BYTES;
    const numbers = { ordinal, epoch, firstSequence, lastSequence, lastCrc, usedBlocks, entryCount };
    const trailer = new LogBlock(this.#arena, this.address + lengthBytes, BLOCK_BYTES);
    trailer.writeSegmentTrailer({ ...numbers, footerBlocks, footerCrc });
    return lengthBytes + BLOCK_BYTES;
  }

  release(): void {
    this.#arena.release(this.address);
  }
}
