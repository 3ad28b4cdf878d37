/** A record of the log on its way: its extents and payload are gathered in memory of its own, and go to the device in one write. */
import { native } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';
import { BdevIo } from '../bdev-io.js';
import { BLOCK_BYTES, LogBlock, recordHeaderBlocks } from './format.js';
import type { ExtentType } from './format.js';
import type { LogSegment } from './log-segment.js';

/** Payload of a record at most, in blocks, and extents: a MiB. */
export const RECORD_BLOCKS_MAX = 256;
/** Room for the longest header. */
const HEADER_BLOCKS_MAX = recordHeaderBlocks(RECORD_BLOCKS_MAX, RECORD_BLOCKS_MAX);
/** A record that is the first of its segment has the header of that before it. */
const PAYLOAD_BLOCK = 1 + HEADER_BLOCKS_MAX;
const MEMORY_BYTES = (PAYLOAD_BLOCK + RECORD_BLOCKS_MAX) * BLOCK_BYTES;

/** Told what became of a record, in the order of the log. */
export interface RecordOwner {
  /** @param errno 0: it is in the log, as far as the device has it. The record is the log's again when this returns */
  onAppended(record: LogRecord, errno: number): void;
}

export class LogRecord {
  readonly io = new BdevIo(1);
  owner: RecordOwner | null = null;
  extentCount = 0;
  payloadBlocks = 0;
  /** From `append` on. */
  sequence = 0.5;
  /** Block of the device where the payload begins, from `append` on. */
  place = 0.5;
  /** What it is in, from `append` on. */
  segment: LogSegment | null = null;
  /** It is told of when it is durable. */
  isDurable = false;
  isDone = false;
  errno = 0;
  /** Extents, as they are in memory: volume, type, flags, lba, blocks, place in the payload, word. */
  readonly volumes = new Uint32Array(RECORD_BLOCKS_MAX);
  readonly types = new Uint8Array(RECORD_BLOCKS_MAX);
  readonly flags = new Uint8Array(RECORD_BLOCKS_MAX);
  readonly lbas = new Float64Array(RECORD_BLOCKS_MAX);
  readonly blocks = new Uint32Array(RECORD_BLOCKS_MAX);
  readonly places = new Uint32Array(RECORD_BLOCKS_MAX);
  readonly words = new Float64Array(RECORD_BLOCKS_MAX);
  readonly crcs = new Uint32Array(RECORD_BLOCKS_MAX);
  readonly #arena: Arena;
  readonly #blocksMax: number;
  readonly #memory: number;
  /** Headers of each length, the last one right before the payload. */
  readonly #headers: readonly LogBlock[];
  readonly #segmentHeaders: readonly LogBlock[];

  /** @param blocksMax payload it takes at most, and extents; up to RECORD_BLOCKS_MAX */
  constructor(arena: Arena, blocksMax: number) {
    this.#arena = arena;
    this.#blocksMax = blocksMax;
    this.#memory = arena.allocate(MEMORY_BYTES, BLOCK_BYTES);
    const at = (block: number, blocks: number): LogBlock =>
      new LogBlock(arena, this.#memory + block * BLOCK_BYTES, blocks * BLOCK_BYTES);
    const lengths = Array.from({ length: HEADER_BLOCKS_MAX }, (_, i) => i + 1);
    this.#headers = lengths.map((blocks) => at(PAYLOAD_BLOCK - blocks, blocks));
    this.#segmentHeaders = lengths.map((blocks) => at(PAYLOAD_BLOCK - blocks - 1, 1));
  }

  get headerBlocks(): number {
    return recordHeaderBlocks(this.extentCount, this.payloadBlocks);
  }

  /** Where the payload is in the arena. */
  get payload(): number {
    return this.#memory + PAYLOAD_BLOCK * BLOCK_BYTES;
  }

  get header(): LogBlock {
    return this.#headers[this.headerBlocks - 1]!;
  }

  /** Right before the header. */
  get segmentHeader(): LogBlock {
    return this.#segmentHeaders[this.headerBlocks - 1]!;
  }

  /** Whether so many blocks more find room, in an extent of their own. */
  hasRoom(blocks: number): boolean {
    return this.extentCount < this.#blocksMax && this.payloadBlocks + blocks <= this.#blocksMax;
  }

  /**
   * Adds an extent, for which there is room.
   * @param payloadBlocks as many as `blocks`, or 0 where the type has no payload
   * @returns its place in the payload, in blocks
   */
  add(volume: number, type: ExtentType, lba: number, blocks: number, payloadBlocks: number, word: number): number {
    const i = this.extentCount++;
    const place = this.payloadBlocks;
    this.volumes[i] = volume;
    this.types[i] = type;
    this.flags[i] = 0;
    this.lbas[i] = lba;
    this.blocks[i] = blocks;
    this.places[i] = place;
    this.words[i] = word;
    this.payloadBlocks += payloadBlocks;
    return place;
  }

  /** Writes extents and CRCs into the header; what the payload is by now is what it stays. */
  encode(): void {
    const { header, extentCount, payloadBlocks, payload, crcs } = this;
    for (let i = 0; i < extentCount; i++) {
      header.putExtent(
        i,
        this.volumes[i]!,
        this.types[i]!,
        this.flags[i]!,
        this.lbas[i]!,
        this.blocks[i]!,
        this.places[i]!,
        this.words[i]!,
      );
    }
    const address = this.#arena.baseAddress + payload;
    for (let block = 0; block < payloadBlocks; block++) {
      const crc = native.crc32c(0, address + block * BLOCK_BYTES, BLOCK_BYTES);
      crcs[block] = crc;
      header.writePayloadCrc(extentCount, block, crc);
    }
  }

  clear(): void {
    this.owner = null;
    this.segment = null;
    this.extentCount = 0;
    this.payloadBlocks = 0;
    this.isDone = false;
    this.errno = 0;
  }

  release(): void {
    this.#arena.release(this.#memory);
  }
}
