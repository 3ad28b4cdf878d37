/**
 * The end of the log: records are appended, made durable, and told of in their order.
 *
 *     take() ─ record.add(...) ─ append() ─ device ─ onAppended, by sequence number
 *     segment full: wait for its records ─ sync ─ footer and trailer; the next one is begun meanwhile
 *
 * Invariants
 * - Records are told of strictly by sequence number: none before all that came before it are on the device (I3). One that is to be
 *   durable is told of when all up to it is durable: without what came before it would not be found.
 * - A sync that a flush waits for begins after the flush came; what it makes durable was complete before it began (I5).
 * - A segment is sealed when a sync has made all of its records durable: what has a trailer is whole.
 * - A segment is begun only when the one after it is known: the chain from any segment leads to the end of the log.
 * - When a record cannot be written nothing that came later counts: all of it fails, and the log takes no more.
 */
import { EIO } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import type { IoChannel } from '../bdev.js';
import { BdevIo, IoFlag, IoQueue, IoStatus, IoType, statusOfErrno } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import { BLOCK_BYTES, recordHeaderBlocks } from './format.js';
import type { CheckpointHeader, Superblock } from './format.js';
import { LogRecord, RECORD_BLOCKS_MAX } from './log-record.js';
import type { RecordOwner } from './log-record.js';
import { FooterMemory, LogSegment } from './log-segment.js';

/** Records on their way at once; a power of two. */
const RECORDS = 16;
/** Segments that are filled or sealed at once. */
const OPEN_SEGMENTS = 3;

/** Kinds of what the writer waits for. */
const Step = { record: 0, flush: 1, sealSync: 2, seal: 3 } as const;

/** Where a log ends, and what of it is free: what recovery has found. */
export interface LogEnd {
  readonly epoch: number;
  readonly nextSequence: number;
  readonly lastCrc: number;
  readonly nextOrdinal: number;
  /** Segments in the order they are to be used; the first was promised by the last one in use. With no other none can be begun. */
  readonly freeSegments: readonly number[];
}

export interface LogWriterOptions {
  readonly reactor: Reactor;
  readonly channel: IoChannel;
  readonly superblock: Pick<Superblock, 'uuid' | 'segmentBlocks' | 'firstSegmentBlock'>;
  readonly end: LogEnd;
  /** A record or a segment has come free for `take`. */
  readonly onRoom: () => void;
  /** A segment was begun. */
  readonly onBegin: (segment: LogSegment) => void;
}

export class LogWriter implements IoOwner {
  /** Sequence number up to which all was told of. */
  appendedSequence: number;
  /** Sequence number up to which all is durable. */
  flushedSequence: number;
  /** Why nothing more is appended, an errno; 0: it is. */
  failure = 0;
  readonly #options: LogWriterOptions;
  /** Payload and extents of a record at most, and blocks of such a one. */
  readonly #payloadMax: number;
  readonly #recordBlocks: number;
  readonly #records: LogRecord[] = [];
  readonly #free: LogRecord[] = [];
  /** By sequence number mod RECORDS. */
  readonly #pending: (LogRecord | null)[] = new Array<LogRecord | null>(RECORDS).fill(null);
  readonly #memories: FooterMemory[] = [];
  readonly #freeSegments: number[];
  readonly #sealing: LogSegment[] = [];
  readonly #sealIo = new BdevIo(1);
  #isSealing = false;
  /** What is being filled; null when the one after it is not known. */
  #segment: LogSegment | null = null;
  /** Place of the segment that is next while none is being filled. */
  #nextIndex: number;
  #nextOrdinal: number;
  #lastCrc: number;
  #nextSequence: number;
  readonly #flushIo = new BdevIo(0);
  #flushes = new IoQueue();
  #nextFlushes = new IoQueue();
  #flushingSequence = 0.5;
  /** Sequence number up to which all is on the device. */
  #writtenSequence: number;
  /** Sequence number up to which all is durable, or is when it is on the device. */
  #durableWrites: number;
  #isFlushing = false;
  /** A record waits to be durable. */
  #isSyncWanted = false;

  constructor(options: LogWriterOptions) {
    this.#options = options;
    const { reactor, superblock, end } = options;
    this.#payloadMax = Math.min(RECORD_BLOCKS_MAX, superblock.segmentBlocks >> 2);
    this.#recordBlocks = recordHeaderBlocks(this.#payloadMax, this.#payloadMax) + this.#payloadMax;
    for (let i = 0; i < RECORDS; i++) this.#records.push(new LogRecord(reactor.arena, this.#payloadMax));
    this.#records.forEach((record, i) => (record.io.tag = i));
    this.#free.push(...this.#records);
    for (let i = 0; i < OPEN_SEGMENTS; i++) {
      this.#memories.push(new FooterMemory(reactor.arena, superblock.segmentBlocks));
    }
    this.#freeSegments = [...end.freeSegments];
    this.#nextSequence = end.nextSequence;
    this.appendedSequence = end.nextSequence - 1;
    this.flushedSequence = this.appendedSequence;
    this.#writtenSequence = this.appendedSequence;
    this.#durableWrites = this.appendedSequence;
    this.#lastCrc = end.lastCrc;
    this.#nextIndex = this.#freeSegments.shift()!;
    this.#nextOrdinal = end.nextOrdinal;
    this.#beginFirst();
  }

  /** The oldest segment of which not all is on the device, or what is next, as a checkpoint names it: before it nothing can get lost. */
  get head(): Pick<CheckpointHeader, 'headIndex' | 'headOrdinal' | 'headFirstSequence' | 'headPreviousCrc'> {
    const segment = this.#sealing.find(({ lastSequence }) => lastSequence > this.#writtenSequence) ?? this.#segment;
    return {
      headIndex: segment?.index ?? this.#nextIndex,
      headOrdinal: segment?.ordinal ?? this.#nextOrdinal,
      headFirstSequence: segment?.firstSequence ?? this.#nextSequence,
      headPreviousCrc: segment?.previousCrc ?? this.#lastCrc,
    };
  }

  /** Segments that are neither in use nor promised to be next. */
  get spareSegments(): number {
    return this.#freeSegments.length;
  }

  /** Nothing is under way. */
  get isIdle(): boolean {
    return this.#free.length === RECORDS && !this.#isFlushing && !this.#isSealing;
  }

  /** An empty record, or null: there is none, or no segment for it; `onRoom` is called when that may have changed. */
  take(): LogRecord | null {
    const segment = this.#segment;
    if (segment === null || this.failure !== 0) return null;
    if (!this.#canBegin() && !segment.hasRoom(this.#recordBlocks, this.#payloadMax)) return null;
    return this.#free.pop() ?? null;
  }

  /** Puts a record at the end of the log; its owner is told. @param isDurable it is to be durable then */
  append(record: LogRecord, owner: RecordOwner, isDurable: boolean): void {
    const { reactor, superblock, channel } = this.#options;
    const headerBlocks = record.headerBlocks;
    const blocks = headerBlocks + record.payloadBlocks;
    if (!this.#segment!.hasRoom(blocks, record.extentCount)) this.#roll();
    const segment = this.#segment!;
    const sequence = this.#nextSequence++;
    const isFirst = segment.isEmpty;
    record.owner = owner;
    record.sequence = sequence;
    record.isDurable = isDurable;
    const isThrough = isDurable && this.#durableWrites === sequence - 1;
    if (isThrough) this.#durableWrites = sequence;
    record.encode();
    this.#lastCrc = record.header.writeRecordHeader({
      epoch: segment.epoch,
      sequence,
      wallUs: Math.floor(reactor.clock.wallMs() * 1000),
      monotonicUs: Math.floor(reactor.nowUs),
      flushedSequence: this.flushedSequence,
      previousCrc: this.#lastCrc,
      headerBlocks,
      payloadBlocks: record.payloadBlocks,
      extentCount: record.extentCount,
    });
    segment.lastCrc = this.#lastCrc;
    const start = superblock.firstSegmentBlock + segment.index * superblock.segmentBlocks + segment.usedBlocks;
    record.place = start + headerBlocks;
    segment.add(record, sequence, headerBlocks);
    segment.outstanding++;
    record.segment = segment;
    this.#pending[sequence % RECORDS] = record;
    const before = isFirst ? 1 : 0;
    if (isFirst) record.segmentHeader.writeSegmentHeader(this.#headerOf(segment));
    const { io } = record;
    const lengthBytes = (before + blocks) * BLOCK_BYTES;
    io.prepare(IoType.write, (start - before) * BLOCK_BYTES, lengthBytes, isThrough ? IoFlag.fua : 0);
    io.addSegment(record.payload - (before + headerBlocks) * BLOCK_BYTES, lengthBytes);
    io.push(this, Step.record);
    channel.submit(io);
  }

  /** Answers the io when all that its sender was told of is durable. */
  flush(io: BdevIo): void {
    this.#nextFlushes.append(io);
    this.#beginFlush();
  }

  /** Segments that nothing is needed of any more. */
  free(indices: readonly number[]): void {
    this.#freeSegments.push(...indices);
    this.#beginFirst();
    this.#options.onRoom();
  }

  release(): void {
    for (const record of this.#records) record.release();
    for (const memory of this.#memories) memory.release();
    for (const segment of this.#sealing) segment.memory.release();
    this.#segment?.memory.release();
  }

  onDone(io: BdevIo, step: number): void {
    const errno = io.status === IoStatus.success ? 0 : io.errno || EIO;
    if (step === Step.record) this.#recordDone(this.#records[io.tag]!, errno);
    else if (step === Step.flush) this.#flushDone(errno);
    else this.#sealStepDone(step, errno);
  }

  #recordDone(record: LogRecord, errno: number): void {
    record.isDone = true;
    record.errno = errno;
    record.segment!.outstanding--;
    for (let next = this.#pendingAt(this.#writtenSequence + 1); next?.isDone === true;) {
      this.#writtenSequence = next.sequence;
      this.failure ||= next.errno;
      const isThrough = (next.io.flags & IoFlag.fua) !== 0 && this.flushedSequence === next.sequence - 1;
      if (isThrough && this.failure === 0) this.flushedSequence = next.sequence;
      next = this.#pendingAt(this.#writtenSequence + 1);
    }
    this.#tell();
    this.#sealNext();
    this.#options.onRoom();
  }

  #pendingAt(sequence: number): LogRecord | null {
    const record = this.#pending[sequence % RECORDS]!;
    return record?.sequence === sequence ? record : null;
  }

  /** Tells of what is on the device, as durably as it is to be. */
  #tell(): void {
    while (this.appendedSequence < this.#writtenSequence) {
      const next = this.#pendingAt(this.appendedSequence + 1)!;
      if (this.failure === 0 && next.isDurable && this.flushedSequence < next.sequence) {
        this.#isSyncWanted = true;
        this.#beginFlush();
        return;
      }
      this.#pending[next.sequence % RECORDS] = null;
      this.appendedSequence = next.sequence;
      next.owner!.onAppended(next, this.failure);
      next.clear();
      this.#free.push(next);
    }
  }

  // ---- flushes

  #beginFlush(): void {
    if (this.#isFlushing || (this.#nextFlushes.length === 0 && !this.#isSyncWanted)) return;
    this.#isFlushing = true;
    this.#isSyncWanted = false;
    const empty = this.#flushes;
    this.#flushes = this.#nextFlushes;
    this.#nextFlushes = empty;
    this.#flushingSequence = this.#writtenSequence;
    this.#flushIo.prepare(IoType.flush, 0, 0, 0);
    this.#flushIo.push(this, Step.flush);
    this.#options.channel.submit(this.#flushIo);
  }

  #flushDone(errno: number): void {
    // Pages that could not be written are gone: what a later sync says of them means nothing.
    this.failure ||= errno;
    if (this.failure === 0) {
      this.flushedSequence = Math.max(this.flushedSequence, this.#flushingSequence);
      this.#durableWrites = Math.max(this.#durableWrites, this.flushedSequence);
    }
    const status = statusOfErrno(this.failure);
    for (let left = this.#flushes.length; left > 0; left--) this.#flushes.shift()!.complete(status, this.failure);
    this.#isFlushing = false;
    this.#tell();
    this.#beginFlush();
    this.#options.onRoom();
  }

  // ---- segments

  #canBegin(): boolean {
    return this.#freeSegments.length > 0 && this.#memories.length > 0;
  }

  /** The segment is full: what comes goes into the next one. */
  #roll(): void {
    const full = this.#segment!;
    if (!this.#canBegin()) throw new Error('log: a record without a segment for it');
    this.#segment = this.#beginSegment(full.nextIndex, full.ordinal + 1);
    this.#sealing.push(full);
    this.#sealNext();
  }

  #beginFirst(): void {
    if (this.#segment === null && this.#canBegin())
      this.#segment = this.#beginSegment(this.#nextIndex, this.#nextOrdinal);
  }

  #beginSegment(index: number, ordinal: number): LogSegment {
    const nextIndex = this.#freeSegments.shift()!;
    const start = {
      epoch: this.#options.end.epoch,
      firstSequence: this.#nextSequence,
      previousCrc: this.#lastCrc,
    };
    const segment = new LogSegment(this.#memories.pop()!, { index, ordinal, nextIndex }, start);
    this.#options.onBegin(segment);
    return segment;
  }

  #headerOf(segment: LogSegment): Parameters<LogRecord['segmentHeader']['writeSegmentHeader']>[0] {
    const { ordinal, epoch, firstSequence, index, nextIndex, previousCrc } = segment;
    return { ordinal, epoch, firstSequence, index, nextIndex, previousCrc, uuid: this.#options.superblock.uuid };
  }

  /** Seals the oldest full segment whose records are all there. */
  #sealNext(): void {
    const segment = this.#sealing[0];
    if (this.#isSealing || segment === undefined || segment.outstanding > 0 || this.failure !== 0) return;
    this.#isSealing = true;
    this.#sealIo.prepare(IoType.flush, 0, 0, 0);
    this.#sealIo.push(this, Step.sealSync);
    this.#options.channel.submit(this.#sealIo);
  }

  #sealStepDone(step: number, errno: number): void {
    const segment = this.#sealing[0]!;
    if (errno === 0 && step === Step.sealSync) {
      this.#writeFooter(segment);
      return;
    }
    this.#isSealing = false;
    this.#sealing.shift();
    this.#memories.push(segment.memory);
    if (step === Step.sealSync) this.failure ||= errno;
    this.#sealNext();
    this.#options.onRoom();
  }

  #writeFooter(segment: LogSegment): void {
    const { superblock, channel } = this.#options;
    const { memory, index } = segment;
    const lengthBytes = memory.writeTrailer(segment);
    const end = superblock.firstSegmentBlock + (index + 1) * superblock.segmentBlocks;
    this.#sealIo.prepare(IoType.write, end * BLOCK_BYTES - lengthBytes, lengthBytes, 0);
    this.#sealIo.addSegment(memory.address, lengthBytes);
    this.#sealIo.push(this, Step.seal);
    channel.submit(this.#sealIo);
  }
}
