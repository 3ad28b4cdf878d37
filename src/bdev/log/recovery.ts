/**
 * Finding the end of a log: the segments that the checkpoint knows, then the chain from the one that was being filled. A sealed segment
 * says by its footer what is in it; any other is read record by record, and sealed.
 *
 * Invariants
 * - What is found is a prefix of what was appended (I2): the first record that does not count ends it (I4).
 * - A record that does not count although something durable says that it was durable is lost data, and never passed over (I10).
 * - Recovery that was cut off finds the same when it is done again (I8): it only adds footers to segments that have none.
 */
import { native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { Task } from '../task.js';
import { readCheckpoint, NO_ORDINAL } from './checkpoint.js';
import { BLOCK_BYTES, LogBlock, footerBlocksOf } from './format.js';
import type { RecordHeader, SegmentHeader, SegmentTrailer, Superblock } from './format.js';
import type { LogDevice } from './log-device.js';
import { FooterMemory, LogSegment } from './log-segment.js';
import type { LogEnd } from './log-writer.js';

/** Blocks read at once. */
const READ_BLOCKS = 256;

/** Told what is in the log, segment by segment, oldest first. */
export interface LogReader {
  /** @param entries of the footer: sorted by volume, lba and place, or in the order of the log; CRCs lie behind them */
  onSegment(segment: FoundSegment, entries: LogBlock): void;
}

export interface FoundSegment {
  readonly index: number;
  readonly ordinal: number;
  readonly entryCount: number;
  readonly firstSequence: number;
  readonly lastSequence: number;
}

export interface Recovered {
  readonly end: LogEnd;
  /** Ordinal of each segment, NO_ORDINAL for one that holds nothing. */
  readonly ordinals: Float64Array;
  /** Records that were read one by one. */
  readonly records: number;
}

export class Recovery {
  readonly #device: LogDevice;
  readonly #superblock: Superblock;
  readonly #reader: LogReader;
  readonly #footer: FooterMemory;
  readonly #contents: number;
  readonly #arena: LogDevice['reactor']['arena'];
  /** The latest one seen. */
  #epoch: number;
  /** Known to have been durable. */
  #durable: number;
  /** What the next segment has to go on from; none before the first. */
  #last: { readonly sequence: number; readonly crc: number } | null = null;
  #records = 0;
  readonly #unsealed: { readonly index: number; readonly header: SegmentHeader }[] = [];

  constructor(device: LogDevice, superblock: Superblock, reader: LogReader) {
    this.#device = device;
    this.#superblock = superblock;
    this.#reader = reader;
    this.#durable = superblock.flushedSequence;
    this.#epoch = superblock.epochs.at(-1)!.epoch;
    this.#arena = device.reactor.arena;
    this.#footer = new FooterMemory(this.#arena, superblock.segmentBlocks);
    this.#contents = this.#arena.allocate(superblock.segmentBlocks * BLOCK_BYTES, BLOCK_BYTES);
  }

  /** Throws BdevError. */
  *run(): Task<Recovered> {
    try {
      return yield* this.#find();
    } finally {
      this.#footer.release();
      this.#arena.release(this.#contents);
    }
  }

  *#find(): Task<Recovered> {
    const superblock = this.#superblock;
    const checkpoint = yield* readCheckpoint(this.#device, superblock);
    this.#durable = Math.max(this.#durable, checkpoint.flushedSequence);
    const ordinals = new Float64Array(superblock.segmentCount).fill(NO_ORDINAL);
    const { headOrdinal } = checkpoint;
    const known = [...checkpoint.ordinals.keys()]
      .filter((i) => checkpoint.ordinals[i]! >= superblock.historyTail && checkpoint.ordinals[i]! < headOrdinal)
      .sort((a, b) => checkpoint.ordinals[a]! - checkpoint.ordinals[b]!);
    for (const index of known) {
      const segment = yield* this.#segmentAt(index, checkpoint.ordinals[index]!);
      if (segment === null) throw this.#lost(index, 'is gone');
      ordinals[index] = checkpoint.ordinals[index]!;
    }
    const { headFirstSequence, headPreviousCrc } = checkpoint;
    const before = { sequence: headFirstSequence - 1, crc: headPreviousCrc };
    if (this.#last !== null && (this.#last.sequence !== before.sequence || this.#last.crc !== before.crc)) {
      throw this.#lost(checkpoint.headIndex, 'does not follow the one before');
    }
    this.#last = before;
    let next = checkpoint.headIndex;
    let ordinal = headOrdinal;
    for (; next < superblock.segmentCount; ordinal++) {
      const segment = yield* this.#segmentAt(next, ordinal);
      if (segment === null) break;
      ordinals[next] = ordinal;
      next = segment.nextIndex;
    }
    const { sequence, crc } = this.#last;
    if (sequence < this.#durable)
      throw this.#lost(next, `ends at record ${sequence}, and ${this.#durable} was durable`);
    // Not before: what is sealed is no longer doubted.
    for (const { index, header } of this.#unsealed) yield* this.#seal(yield* this.#scan(index, header));
    const free = [...ordinals.keys()].filter((i) => ordinals[i] === NO_ORDINAL && i !== next);
    const end: LogEnd = {
      // One that no other opening has had, whatever became of its superblock.
      epoch: Math.max(this.#epoch + 1, Math.floor(this.#device.reactor.clock.wallMs() * 1000)),
      nextSequence: sequence + 1,
      lastCrc: crc,
      nextOrdinal: ordinal,
      freeSegments: next < superblock.segmentCount ? [next, ...free] : free,
    };
    return { end, ordinals, records: this.#records };
  }

  /** Reads a segment and tells the reader; null when it is not the one that is looked for, or has no record. Throws BdevError. */
  *#segmentAt(index: number, ordinal: number): Task<SegmentHeader | null> {
    const header = yield* this.#headerOf(index);
    if (header?.ordinal !== ordinal || header.uuid !== this.#superblock.uuid) return null;
    const last = this.#last;
    if (last !== null && (header.firstSequence !== last.sequence + 1 || header.previousCrc !== last.crc)) {
      yield* this.#lookInto(index, header, last);
      return null;
    }
    const trailer = yield* this.#trailerOf(index, header);
    if (trailer !== null) {
      this.#epoch = Math.max(this.#epoch, trailer.epoch);
      this.#last = { sequence: trailer.lastSequence, crc: trailer.lastCrc };
      this.#durable = Math.max(this.#durable, trailer.lastSequence);
      this.#reader.onSegment({ ...trailer, index }, this.#footer.entries);
      return header;
    }
    const scanned = yield* this.#scan(index, header);
    if (scanned.isEmpty) return null;
    this.#last = { sequence: scanned.lastSequence, crc: scanned.lastCrc };
    this.#records += scanned.lastSequence - scanned.firstSequence + 1;
    this.#reader.onSegment(scanned, this.#footer.entries);
    this.#unsealed.push({ index, header });
    return header;
  }

  *#headerOf(index: number): Task<SegmentHeader | null> {
    yield* this.#device.read(this.#start(index), 1, this.#contents);
    return this.#view(0, 1).readSegmentHeader();
  }

  /** The trailer, with the entries in the footer's memory; null when the segment has none that is whole. */
  *#trailerOf(index: number, { ordinal, epoch }: SegmentHeader): Task<SegmentTrailer | null> {
    const { segmentBlocks } = this.#superblock;
    const most = footerBlocksOf(segmentBlocks, segmentBlocks) + 1;
    const end = this.#start(index) + segmentBlocks;
    yield* this.#device.read(end - most, most, this.#contents);
    const trailer = this.#view(most - 1, 1).readSegmentTrailer(segmentBlocks);
    if (trailer?.ordinal !== ordinal || trailer.epoch !== epoch) return null;
    const at = this.#contents + (most - 1 - trailer.footerBlocks) * BLOCK_BYTES;
    const lengthBytes = trailer.footerBlocks * BLOCK_BYTES;
    if (native.crc32c(0, this.#arena.baseAddress + at, lengthBytes) !== trailer.footerCrc) return null;
    this.#footer.entries.bytes.set(this.#arena.view8(at, lengthBytes));
    return trailer;
  }

  // ---- record by record

  *#scan(index: number, header: SegmentHeader): Task<LogSegment> {
    const { segmentBlocks } = this.#superblock;
    yield* this.#readAll(index);
    const { ordinal, nextIndex, epoch, firstSequence, previousCrc } = header;
    const place = { index, ordinal, nextIndex };
    const segment = new LogSegment(this.#footer, place, { epoch, firstSequence, previousCrc });
    // What lies in it from an earlier epoch was found, and sealed, when that one ended. A later one is of a superblock that is gone.
    if (epoch < this.#epoch) return segment;
    this.#epoch = epoch;
    let at = 1;
    while (at < segmentBlocks) {
      const record = this.#recordAt(at, segment);
      if (record === null) break;
      this.#take(segment, at, record);
      at = segment.usedBlocks;
    }
    this.#lookBehind(segment);
    return segment;
  }

  /** A segment that would follow if the one before it were whole. */
  *#lookInto(
    index: number,
    header: SegmentHeader,
    last: { readonly sequence: number; readonly crc: number },
  ): Task<void> {
    const { epoch, nextIndex, ordinal } = header;
    if (epoch < this.#epoch) return;
    yield* this.#readAll(index);
    const start = { epoch, firstSequence: last.sequence + 1, previousCrc: last.crc };
    this.#lookBehind(new LogSegment(this.#footer, { index, ordinal, nextIndex }, start));
  }

  /** The record at a block, if it counts as the next one. */
  #recordAt(at: number, segment: LogSegment): RecordHeader | null {
    const left = this.#superblock.segmentBlocks - at;
    const header = this.#view(at, 1).peekRecordHeader(left);
    if (header === null || header.epoch !== segment.epoch || header.sequence !== segment.lastSequence + 1) return null;
    if (header.previousCrc !== segment.lastCrc) return null;
    const { headerBlocks, payloadBlocks, extentCount } = header;
    const view = this.#view(at, headerBlocks);
    if (view.recordCrc(headerBlocks) < 0) return null;
    const payload = this.#arena.baseAddress + this.#contents + (at + headerBlocks) * BLOCK_BYTES;
    for (let block = 0; block < payloadBlocks; block++) {
      const crc = native.crc32c(0, payload + block * BLOCK_BYTES, BLOCK_BYTES);
      if (crc !== view.readPayloadCrc(extentCount, block)) return null;
    }
    return header;
  }

  #take(segment: LogSegment, at: number, header: RecordHeader): void {
    const { headerBlocks, payloadBlocks, extentCount, sequence } = header;
    const view = this.#view(at, headerBlocks);
    const payload = at + headerBlocks;
    for (let i = 0; i < extentCount; i++) {
      const extent = view.readExtent(i);
      this.#footer.entries.writeExtent(
        segment.entryCount++,
        { ...extent, place: payload + extent.place, word: sequence },
        0,
      );
    }
    for (let block = 0; block < payloadBlocks; block++) {
      this.#footer.crcs[payload + block] = view.readPayloadCrc(extentCount, block);
    }
    segment.usedBlocks = payload + payloadBlocks;
    segment.lastSequence = sequence;
    segment.lastCrc = view.recordCrc(headerBlocks);
    this.#durable = Math.max(this.#durable, header.flushedSequence);
  }

  /** Later records, which do not count any more, may still know that what is missing was durable. */
  #lookBehind(segment: LogSegment): void {
    const { segmentBlocks } = this.#superblock;
    for (let at = segment.usedBlocks; at < segmentBlocks; at++) {
      const header = this.#view(at, 1).peekRecordHeader(segmentBlocks - at);
      if (header?.epoch !== segment.epoch || header.sequence <= segment.lastSequence) continue;
      if (this.#view(at, header.headerBlocks).recordCrc(header.headerBlocks) < 0) continue;
      this.#durable = Math.max(this.#durable, header.flushedSequence);
    }
  }

  /** Its records are made durable first: what has a trailer is whole. */
  *#seal(segment: LogSegment): Task<void> {
    yield* this.#device.flush();
    const lengthBytes = this.#footer.writeTrailer(segment);
    const blocks = lengthBytes / BLOCK_BYTES;
    const end = this.#start(segment.index) + this.#superblock.segmentBlocks;
    yield* this.#device.write(end - blocks, blocks, this.#footer.address);
    yield* this.#device.flush();
  }

  *#readAll(index: number): Task<void> {
    const { segmentBlocks } = this.#superblock;
    for (let at = 0; at < segmentBlocks; at += READ_BLOCKS) {
      const blocks = Math.min(READ_BLOCKS, segmentBlocks - at);
      yield* this.#device.read(this.#start(index) + at, blocks, this.#contents + at * BLOCK_BYTES);
    }
  }

  #start(index: number): number {
    return this.#superblock.firstSegmentBlock + index * this.#superblock.segmentBlocks;
  }

  #view(block: number, blocks: number): LogBlock {
    return new LogBlock(this.#arena, this.#contents + block * BLOCK_BYTES, blocks * BLOCK_BYTES);
  }

  #lost(index: number, what: string): BdevError {
    const { name } = this.#device.bdev;
    const place = index < this.#superblock.segmentCount ? ` segment ${index}, at block ${this.#start(index)},` : '';
    return new BdevError(
      'corrupt-log',
      'base',
      `the log on bdev ${name} is damaged:${place} ${what}`,
      'the device has lost data: do not write to it, and copy what can be read',
    );
  }
}
