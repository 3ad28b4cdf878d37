/**
 * The append-only log on its device, byte by byte: superblock, segments with their headers, footers and trailers, records. The tables are
 * in docs/on-disk-formats.md; the numbers here are offsets from there.
 */
import { native } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';

export const BLOCK_BYTES = 4096;
export const VERSION = 1;
export const SUPERBLOCK_COPIES = 4;
export const FIRST_CHECKPOINT_BLOCK = 8;
export const EXTENT_BYTES = 32;
export const EPOCHS_MAX = 16;
export const VOLUMES_MAX = 48;
/** Less than 4 MiB only makes sense in tests. */
export const SEGMENT_BLOCKS_MIN = 16;
export const SEGMENT_BLOCKS_MAX = 16_384;
export const SEGMENTS_MAX = 2 ** 22;

export const ExtentType = {
  data: 1,
  /** Reads as zeroes. */
  zero: 2,
  discard: 3,
  /** Was written past the log, to the base. */
  bypass: 4,
  barrier: 5,
  bookmark: 6,
  revert: 7,
  /** What the base held before. */
  preimage: 8,
  /** Fills a place. */
  pad: 9,
} as const;
export type ExtentType = (typeof ExtentType)[keyof typeof ExtentType];

const VERSION_AT = 8;
const CRC_AT = 12;
const UUID_BYTES = 16;
const NAME_BYTES = 32;
const EPOCHS_AT = 128;
const VOLUMES_AT = 1024;
const VOLUME_BYTES = 64;
const EXTENTS_AT = 72;
const MAGIC = {
  superblock: Buffer.from('STRALOG1', 'latin1'),
  segment: Buffer.from('STRASEG1', 'latin1'),
  trailer: Buffer.from('STRAFTR1', 'latin1'),
  checkpoint: Buffer.from('STRACKP1', 'latin1'),
  record: Buffer.from('STRAREC1', 'latin1'),
} as const;

export const SuperblockFlag = { closed: 1 } as const;

export interface Epoch {
  readonly epoch: number;
  /** Sequence number of its first record. */
  readonly firstSequence: number;
}

export interface Volume {
  readonly id: number;
  readonly flags: number;
  readonly blocks: number;
  /** 16 bytes in hexadecimal. */
  readonly baseUuid: string;
  readonly name: string;
}

export interface Superblock {
  readonly generation: number;
  /** 16 bytes in hexadecimal. */
  readonly uuid: string;
  readonly deviceBlocks: number;
  readonly segmentBlocks: number;
  readonly segmentCount: number;
  readonly firstSegmentBlock: number;
  readonly checkpointBlocks: number;
  readonly flags: number;
  /** 0 none, 1 A, 2 B. */
  readonly checkpointSlot: number;
  readonly checkpointGeneration: number;
  readonly dirtyTail: number;
  readonly historyTail: number;
  readonly flushedSequence: number;
  /** Oldest first; the last one is in force. */
  readonly epochs: readonly Epoch[];
  readonly volumes: readonly Volume[];
}

export interface SegmentHeader {
  readonly ordinal: number;
  readonly epoch: number;
  readonly firstSequence: number;
  readonly index: number;
  readonly nextIndex: number;
  readonly previousCrc: number;
  readonly uuid: string;
}

export interface SegmentTrailer {
  readonly ordinal: number;
  readonly epoch: number;
  readonly firstSequence: number;
  readonly lastSequence: number;
  readonly lastCrc: number;
  /** Blocks up to the end of its last record. */
  readonly usedBlocks: number;
  readonly entryCount: number;
  readonly footerBlocks: number;
  readonly footerCrc: number;
}

export interface CheckpointHeader {
  readonly generation: number;
  readonly flushedSequence: number;
  readonly segmentCount: number;
  /** The oldest segment that was not filled yet, or the next one: the chain goes on from there. */
  readonly headIndex: number;
  /** As its header says, which may not have been written yet. */
  readonly headOrdinal: number;
  readonly headFirstSequence: number;
  readonly headPreviousCrc: number;
  /** Of the table that follows: 8 bytes for each segment, its ordinal and 1, or 0: it holds nothing. */
  readonly tableCrc: number;
}

export interface RecordHeader {
  readonly epoch: number;
  readonly sequence: number;
  readonly wallUs: number;
  readonly monotonicUs: number;
  readonly flushedSequence: number;
  readonly previousCrc: number;
  readonly headerBlocks: number;
  readonly payloadBlocks: number;
  readonly extentCount: number;
}

/** An extent of a record, or an entry of a footer: `place` and `word` are what that says they are. */
export interface Extent {
  readonly volume: number;
  readonly type: number;
  readonly flags: number;
  readonly lba: number;
  readonly blocks: number;
  readonly place: number;
  readonly word: number;
}

/** Blocks of the header of a record. */
export function recordHeaderBlocks(extentCount: number, payloadBlocks: number): number {
  return Math.ceil((EXTENTS_AT + extentCount * EXTENT_BYTES + payloadBlocks * 4) / BLOCK_BYTES);
}

/** Blocks of the footer of a segment, without its trailer. */
export function footerBlocksOf(entryCount: number, segmentBlocks: number): number {
  return Math.ceil((entryCount * EXTENT_BYTES + segmentBlocks * 4) / BLOCK_BYTES);
}

export interface Layout {
  readonly checkpointBlocks: number;
  readonly firstSegmentBlock: number;
  readonly segmentCount: number;
}

/** What goes where on a device of so many blocks, with so many blocks to a checkpoint for each segment. */
export function layoutOf(deviceBlocks: number, segmentBlocks: number, bytesPerSegment: number): Layout {
  const most = Math.min(SEGMENTS_MAX, Math.floor(deviceBlocks / segmentBlocks));
  const checkpointBlocks = 1 + Math.ceil((most * bytesPerSegment) / BLOCK_BYTES);
  const firstSegmentBlock = FIRST_CHECKPOINT_BLOCK + 2 * checkpointBlocks;
  const segmentCount = Math.min(most, Math.max(0, Math.floor((deviceBlocks - firstSegmentBlock) / segmentBlocks)));
  return { checkpointBlocks, firstSegmentBlock, segmentCount };
}

/** Memory of the arena with one of the structures in it. */
export class LogBlock {
  readonly bytes: Buffer;
  readonly #address: number;

  constructor(arena: Arena, offset: number, lengthBytes: number) {
    this.bytes = Buffer.from(arena.buffer, offset, lengthBytes);
    this.#address = arena.baseAddress + offset;
  }

  // ---- encoding

  writeSuperblock(superblock: Superblock): void {
    const { bytes } = this;
    const { epochs, volumes } = superblock;
    if (epochs.length > EPOCHS_MAX || volumes.length > VOLUMES_MAX) throw new Error('log: a superblock has no room');
    this.#begin(MAGIC.superblock, BLOCK_BYTES);
    putUInt64(bytes, 16, superblock.generation);
    bytes.write(superblock.uuid, 24, UUID_BYTES, 'hex');
    putUInt64(bytes, 40, superblock.deviceBlocks);
    bytes.writeUInt32LE(superblock.segmentBlocks, 48);
    bytes.writeUInt32LE(superblock.segmentCount, 52);
    putUInt64(bytes, 56, superblock.firstSegmentBlock);
    putUInt64(bytes, 64, superblock.checkpointBlocks);
    bytes.writeUInt32LE(superblock.flags, 72);
    bytes.writeUInt32LE(superblock.checkpointSlot, 76);
    putUInt64(bytes, 80, superblock.checkpointGeneration);
    putUInt64(bytes, 88, superblock.dirtyTail);
    putUInt64(bytes, 96, superblock.historyTail);
    putUInt64(bytes, 104, superblock.flushedSequence);
    bytes.writeUInt32LE(epochs.length, 112);
    bytes.writeUInt32LE(volumes.length, 116);
    epochs.forEach(({ epoch, firstSequence }, i) => {
      putUInt64(bytes, EPOCHS_AT + i * 16, epoch);
      putUInt64(bytes, EPOCHS_AT + i * 16 + 8, firstSequence);
    });
    volumes.forEach((volume, i) => {
      const at = VOLUMES_AT + i * VOLUME_BYTES;
      bytes.writeUInt32LE(volume.id, at);
      bytes.writeUInt32LE(volume.flags, at + 4);
      putUInt64(bytes, at + 8, volume.blocks);
      bytes.write(volume.baseUuid, at + 16, UUID_BYTES, 'hex');
      bytes.write(volume.name, at + 32, NAME_BYTES, 'utf8');
    });
    this.#seal(BLOCK_BYTES);
  }

  writeSegmentHeader(header: SegmentHeader): void {
    const { bytes } = this;
    this.#begin(MAGIC.segment, BLOCK_BYTES);
    putUInt64(bytes, 16, header.ordinal);
    putUInt64(bytes, 24, header.epoch);
    putUInt64(bytes, 32, header.firstSequence);
    bytes.writeUInt32LE(header.index, 40);
    bytes.writeUInt32LE(header.nextIndex, 44);
    bytes.writeUInt32LE(header.previousCrc, 48);
    bytes.write(header.uuid, 56, UUID_BYTES, 'hex');
    this.#seal(BLOCK_BYTES);
  }

  writeSegmentTrailer(trailer: SegmentTrailer): void {
    const { bytes } = this;
    this.#begin(MAGIC.trailer, BLOCK_BYTES);
    putUInt64(bytes, 16, trailer.ordinal);
    putUInt64(bytes, 24, trailer.epoch);
    putUInt64(bytes, 32, trailer.firstSequence);
    putUInt64(bytes, 40, trailer.lastSequence);
    bytes.writeUInt32LE(trailer.lastCrc, 48);
    bytes.writeUInt32LE(trailer.usedBlocks, 52);
    bytes.writeUInt32LE(trailer.entryCount, 56);
    bytes.writeUInt32LE(trailer.footerBlocks, 60);
    bytes.writeUInt32LE(trailer.footerCrc, 64);
    this.#seal(BLOCK_BYTES);
  }

  writeCheckpointHeader(header: CheckpointHeader): void {
    const { bytes } = this;
    this.#begin(MAGIC.checkpoint, BLOCK_BYTES);
    putUInt64(bytes, 16, header.generation);
    putUInt64(bytes, 24, header.flushedSequence);
    bytes.writeUInt32LE(header.segmentCount, 32);
    bytes.writeUInt32LE(header.headIndex, 36);
    bytes.writeUInt32LE(header.tableCrc, 40);
    bytes.writeUInt32LE(header.headPreviousCrc, 44);
    putUInt64(bytes, 48, header.headFirstSequence);
    putUInt64(bytes, 56, header.headOrdinal);
    this.#seal(BLOCK_BYTES);
  }

  /** The extents are written before. Returns the CRC, which the next record names. */
  writeRecordHeader(header: RecordHeader): number {
    const { bytes } = this;
    MAGIC.record.copy(bytes);
    bytes.writeUInt32LE(VERSION, VERSION_AT);
    putUInt64(bytes, 16, header.epoch);
    putUInt64(bytes, 24, header.sequence);
    putUInt64(bytes, 32, header.wallUs);
    putUInt64(bytes, 40, header.monotonicUs);
    putUInt64(bytes, 48, header.flushedSequence);
    bytes.writeUInt32LE(header.previousCrc, 56);
    bytes.writeUInt32LE(header.headerBlocks, 60);
    bytes.writeUInt32LE(header.payloadBlocks, 64);
    bytes.writeUInt32LE(header.extentCount, 68);
    const end = EXTENTS_AT + header.extentCount * EXTENT_BYTES + header.payloadBlocks * 4;
    bytes.fill(0, end, header.headerBlocks * BLOCK_BYTES);
    return this.#seal(header.headerBlocks * BLOCK_BYTES);
  }

  /** @param at where extents begin */
  writeExtent(index: number, extent: Extent, at = EXTENTS_AT): void {
    const { volume, type, flags, lba, blocks, place, word } = extent;
    this.putExtent(index, volume, type, flags, lba, blocks, place, word, at);
  }

  /** The same without an object. */
  putExtent(
    index: number,
    volume: number,
    type: number,
    flags: number,
    lba: number,
    blocks: number,
    place: number,
    word: number,
    at = EXTENTS_AT,
  ): void {
    const { bytes } = this;
    const start = at + index * EXTENT_BYTES;
    bytes.writeUInt32LE(volume, start);
    bytes[start + 4] = type;
    bytes[start + 5] = flags;
    bytes.writeUInt16LE(0, start + 6);
    putUInt64(bytes, start + 8, lba);
    bytes.writeUInt32LE(blocks, start + 16);
    bytes.writeUInt32LE(place, start + 20);
    putUInt64(bytes, start + 24, word);
  }

  /** CRC of a block of the payload. */
  writePayloadCrc(extentCount: number, block: number, crc: number): void {
    this.bytes.writeUInt32LE(crc, EXTENTS_AT + extentCount * EXTENT_BYTES + block * 4);
  }

  // ---- decoding: null when it is none, or damaged

  readSuperblock(): Superblock | null {
    const { bytes } = this;
    if (!this.#isWhole(MAGIC.superblock, BLOCK_BYTES)) return null;
    const epochCount = bytes.readUInt32LE(112);
    const volumeCount = bytes.readUInt32LE(116);
    if (epochCount > EPOCHS_MAX || volumeCount > VOLUMES_MAX) return null;
    const superblock: Superblock = {
      generation: getUInt64(bytes, 16),
      uuid: bytes.toString('hex', 24, 24 + UUID_BYTES),
      deviceBlocks: getUInt64(bytes, 40),
      segmentBlocks: bytes.readUInt32LE(48),
      segmentCount: bytes.readUInt32LE(52),
      firstSegmentBlock: getUInt64(bytes, 56),
      checkpointBlocks: getUInt64(bytes, 64),
      flags: bytes.readUInt32LE(72),
      checkpointSlot: bytes.readUInt32LE(76),
      checkpointGeneration: getUInt64(bytes, 80),
      dirtyTail: getUInt64(bytes, 88),
      historyTail: getUInt64(bytes, 96),
      flushedSequence: getUInt64(bytes, 104),
      epochs: Array.from({ length: epochCount }, (_, i) => ({
        epoch: getUInt64(bytes, EPOCHS_AT + i * 16),
        firstSequence: getUInt64(bytes, EPOCHS_AT + i * 16 + 8),
      })),
      volumes: Array.from({ length: volumeCount }, (_, i) => readVolume(bytes, VOLUMES_AT + i * VOLUME_BYTES)),
    };
    return isSound(superblock) ? superblock : null;
  }

  readSegmentHeader(): SegmentHeader | null {
    const { bytes } = this;
    if (!this.#isWhole(MAGIC.segment, BLOCK_BYTES)) return null;
    return sound({
      ordinal: getUInt64(bytes, 16),
      epoch: getUInt64(bytes, 24),
      firstSequence: getUInt64(bytes, 32),
      index: bytes.readUInt32LE(40),
      nextIndex: bytes.readUInt32LE(44),
      previousCrc: bytes.readUInt32LE(48),
      uuid: bytes.toString('hex', 56, 56 + UUID_BYTES),
    });
  }

  /** @param segmentBlocks what all in it lies within */
  readSegmentTrailer(segmentBlocks: number): SegmentTrailer | null {
    const { bytes } = this;
    if (!this.#isWhole(MAGIC.trailer, BLOCK_BYTES)) return null;
    const trailer: SegmentTrailer = {
      ordinal: getUInt64(bytes, 16),
      epoch: getUInt64(bytes, 24),
      firstSequence: getUInt64(bytes, 32),
      lastSequence: getUInt64(bytes, 40),
      lastCrc: bytes.readUInt32LE(48),
      usedBlocks: bytes.readUInt32LE(52),
      entryCount: bytes.readUInt32LE(56),
      footerBlocks: bytes.readUInt32LE(60),
      footerCrc: bytes.readUInt32LE(64),
    };
    const { usedBlocks, entryCount, footerBlocks } = trailer;
    const isSized = entryCount <= segmentBlocks && footerBlocks === footerBlocksOf(entryCount, segmentBlocks);
    return isSized && usedBlocks + footerBlocks + 1 <= segmentBlocks ? sound(trailer) : null;
  }

  readCheckpointHeader(): CheckpointHeader | null {
    const { bytes } = this;
    if (!this.#isWhole(MAGIC.checkpoint, BLOCK_BYTES)) return null;
    return sound({
      generation: getUInt64(bytes, 16),
      flushedSequence: getUInt64(bytes, 24),
      segmentCount: bytes.readUInt32LE(32),
      headIndex: bytes.readUInt32LE(36),
      tableCrc: bytes.readUInt32LE(40),
      headPreviousCrc: bytes.readUInt32LE(44),
      headFirstSequence: getUInt64(bytes, 48),
      headOrdinal: getUInt64(bytes, 56),
    });
  }

  /** The numbers of a record header, of which its first block is here: what can be said before all of it was read. */
  peekRecordHeader(blocksMax: number): RecordHeader | null {
    const { bytes } = this;
    if (MAGIC.record.compare(bytes, 0, 8) !== 0 || bytes.readUInt32LE(VERSION_AT) !== VERSION) return null;
    const header: RecordHeader = {
      epoch: getUInt64(bytes, 16),
      sequence: getUInt64(bytes, 24),
      wallUs: getUInt64(bytes, 32),
      monotonicUs: getUInt64(bytes, 40),
      flushedSequence: getUInt64(bytes, 48),
      previousCrc: bytes.readUInt32LE(56),
      headerBlocks: bytes.readUInt32LE(60),
      payloadBlocks: bytes.readUInt32LE(64),
      extentCount: bytes.readUInt32LE(68),
    };
    const { headerBlocks, payloadBlocks, extentCount } = header;
    if (extentCount > blocksMax || payloadBlocks > blocksMax) return null;
    const isSized = headerBlocks === recordHeaderBlocks(extentCount, payloadBlocks);
    return isSized && headerBlocks + payloadBlocks <= blocksMax ? sound(header) : null;
  }

  /** CRC of a record header, of which all blocks are here; -1 when it is not the one it has. */
  recordCrc(headerBlocks: number): number {
    return this.#isWhole(MAGIC.record, headerBlocks * BLOCK_BYTES) ? this.bytes.readUInt32LE(CRC_AT) : -1;
  }

  readExtent(index: number, at = EXTENTS_AT): Extent {
    const { bytes } = this;
    const start = at + index * EXTENT_BYTES;
    return {
      volume: bytes.readUInt32LE(start),
      type: bytes[start + 4]!,
      flags: bytes[start + 5]!,
      lba: getUInt64(bytes, start + 8),
      blocks: bytes.readUInt32LE(start + 16),
      place: bytes.readUInt32LE(start + 20),
      word: getUInt64(bytes, start + 24),
    };
  }

  readPayloadCrc(extentCount: number, block: number): number {
    return this.bytes.readUInt32LE(EXTENTS_AT + extentCount * EXTENT_BYTES + block * 4);
  }

  #begin(magic: Buffer, lengthBytes: number): void {
    this.bytes.fill(0, 0, lengthBytes);
    magic.copy(this.bytes);
    this.bytes.writeUInt32LE(VERSION, VERSION_AT);
  }

  #seal(lengthBytes: number): number {
    this.bytes.writeUInt32LE(0, CRC_AT);
    const crc = native.crc32c(0, this.#address, lengthBytes);
    this.bytes.writeUInt32LE(crc, CRC_AT);
    return crc;
  }

  #isWhole(magic: Buffer, lengthBytes: number): boolean {
    const { bytes } = this;
    if (magic.compare(bytes, 0, 8) !== 0 || bytes.readUInt32LE(VERSION_AT) !== VERSION) return false;
    const crc = bytes.readUInt32LE(CRC_AT);
    return this.#seal(lengthBytes) === crc || this.#unseal(crc);
  }

  /** What was read stays as it was. */
  #unseal(crc: number): false {
    this.bytes.writeUInt32LE(crc, CRC_AT);
    return false;
  }
}

/** Whether the numbers of a superblock fit together: all that is addressed by them lies on the device. */
function isSound(superblock: Superblock): boolean {
  const { deviceBlocks, segmentBlocks, segmentCount, firstSegmentBlock, checkpointBlocks, epochs, volumes } =
    superblock;
  if (segmentBlocks < SEGMENT_BLOCKS_MIN || segmentBlocks > SEGMENT_BLOCKS_MAX || segmentCount > SEGMENTS_MAX)
    return false;
  if (firstSegmentBlock < FIRST_CHECKPOINT_BLOCK + 2 * checkpointBlocks) return false;
  if (firstSegmentBlock + segmentBlocks * segmentCount > deviceBlocks) return false;
  if (superblock.checkpointSlot > 2 || superblock.historyTail > superblock.dirtyTail) return false;
  if (sound(superblock) === null || [...epochs, ...volumes].some((each) => sound(each) === null)) return false;
  const isOrdered = epochs.every(
    ({ epoch, firstSequence }, i) =>
      i === 0 || (epoch > epochs[i - 1]!.epoch && firstSequence >= epochs[i - 1]!.firstSequence),
  );
  return epochs.length > 0 && isOrdered && new Set(volumes.map(({ id }) => id)).size === volumes.length;
}

function readVolume(bytes: Buffer, at: number): Volume {
  const name = bytes.subarray(at + 32, at + 32 + NAME_BYTES);
  const end = name.indexOf(0);
  return {
    id: bytes.readUInt32LE(at),
    flags: bytes.readUInt32LE(at + 4),
    blocks: getUInt64(bytes, at + 8),
    baseUuid: bytes.toString('hex', at + 16, at + 16 + UUID_BYTES),
    name: name.toString('utf8', 0, end < 0 ? NAME_BYTES : end),
  };
}

/** Null when a number of it is larger than it can be. */
function sound<T extends object>(value: T): T | null {
  return Object.values(value).every((field) => typeof field !== 'number' || Number.isSafeInteger(field)) ? value : null;
}

/** Numbers from 2^53 on come out as Infinity, which `sound` does not let pass. */
export function getUInt64(bytes: Buffer, at: number): number {
  const high = bytes.readUInt32LE(at + 4);
  return high < 2 ** 21 ? high * 2 ** 32 + bytes.readUInt32LE(at) : Infinity;
}

export function putUInt64(bytes: Buffer, at: number, value: number): void {
  bytes.writeUInt32LE(value % 2 ** 32, at);
  bytes.writeUInt32LE(Math.floor(value / 2 ** 32), at + 4);
}
