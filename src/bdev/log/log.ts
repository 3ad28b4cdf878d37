/**
 * An append-only log on a bdev: made, opened, appended to, given back from its old end.
 *
 * Invariants
 * - Nothing is appended before the superblock says, durably, which epoch it is in (no record of before counts any more).
 * - A segment is used again only when the superblock says, durably, that nothing of it is needed (I6), and a checkpoint from which
 *   the chain of segments leads on without it.
 */
import { randomBytes } from 'node:crypto';
import { BdevError } from '../bdev.js';
import type { Bdev, IoChannel } from '../bdev.js';
import type { BdevIo } from '../bdev-io.js';
import type { Reactor } from '../../poller/reactor.js';
import type { Task } from '../task.js';
import { CHECKPOINT_ENTRY_BYTES, NO_ORDINAL, writeCheckpoint } from './checkpoint.js';
import { SUPERBLOCK_COPIES, SuperblockFlag, layoutOf } from './format.js';
import type { Superblock, Volume } from './format.js';
import { LogDevice } from './log-device.js';
import type { LogRecord, RecordOwner } from './log-record.js';
import { LogWriter } from './log-writer.js';
import { Recovery } from './recovery.js';
import type { LogReader } from './recovery.js';
import { readSuperblock, writeSuperblock } from './superblock.js';

/** Fewer would leave nothing to be filled while others are given back. */
const SEGMENTS_MIN = 4;

export interface LogPlace {
  readonly reactor: Reactor;
  readonly bdev: Bdev;
  readonly channel: IoChannel;
}

export interface NewLog {
  readonly segmentBlocks: number;
  readonly volumes: readonly Volume[];
}

/** Makes an empty log; what the device held is lost. Throws BdevError. */
export function* createLog(place: LogPlace, { segmentBlocks, volumes }: NewLog): Task<void> {
  const device = new LogDevice(place.reactor, place.bdev, place.channel);
  const layout = layoutOf(device.blocks, segmentBlocks, CHECKPOINT_ENTRY_BYTES);
  if (layout.segmentCount < SEGMENTS_MIN) {
    const words = `bdev ${place.bdev.name} has room for ${layout.segmentCount} segments of ${segmentBlocks} blocks`;
    throw new BdevError('too-small', 'base', words, `give it room for ${SEGMENTS_MIN}, or make them smaller`);
  }
  const uuid = randomBytes(16).toString('hex');
  const ordinals = new Float64Array(layout.segmentCount).fill(NO_ORDINAL);
  ordinals[0] = 0;
  const memory = device.memory(1);
  try {
    const numbers = { ordinal: 0, epoch: 1, firstSequence: 1, index: 0, nextIndex: 1, previousCrc: 0, uuid };
    memory.view.writeSegmentHeader(numbers);
    yield* device.write(layout.firstSegmentBlock, 1, memory.address);
  } finally {
    memory.release();
  }
  const shape = { ...layout, checkpointSlot: 0 };
  const head = { headIndex: 0, headOrdinal: 0, headFirstSequence: 1, headPreviousCrc: 0 };
  const checkpoint = { ...head, flushedSequence: 0, ordinals };
  const checkpointSlot = yield* writeCheckpoint(device, shape, 1, checkpoint);
  const superblock: Superblock = {
    ...layout,
    generation: 0,
    uuid,
    deviceBlocks: device.blocks,
    segmentBlocks,
    flags: SuperblockFlag.closed,
    checkpointSlot,
    checkpointGeneration: 1,
    dirtyTail: 0,
    historyTail: 0,
    flushedSequence: 0,
    epochs: [{ epoch: 1, firstSequence: 1 }],
    volumes,
  };
  // All copies: another log that was here must not be found any more.
  for (let generation = 1; generation <= SUPERBLOCK_COPIES; generation++)
    yield* writeSuperblock(device, { ...superblock, generation });
}

export interface OpenLogOptions extends LogPlace {
  readonly reader: LogReader;
  /** A record may be taken again. */
  readonly onRoom: () => void;
}

/** Opens a log: tells the reader what is in it, and makes it ready to be appended to. Throws BdevError. */
export function* openLog(options: OpenLogOptions): Task<Log> {
  const device = new LogDevice(options.reactor, options.bdev, options.channel);
  const superblock = yield* readSuperblock(device);
  const recovered = yield* new Recovery(device, superblock, options.reader).run();
  const { end, ordinals } = recovered;
  const opened: Superblock = {
    ...superblock,
    generation: superblock.generation + 1,
    flags: superblock.flags & ~SuperblockFlag.closed,
    epochs: [{ epoch: end.epoch, firstSequence: end.nextSequence }],
  };
  yield* writeSuperblock(device, opened);
  return new Log(device, opened, recovered.records, ordinals, (onBegin) => {
    const { reactor, channel } = options;
    return new LogWriter({ reactor, channel, superblock: opened, end, onRoom: options.onRoom, onBegin });
  });
}

export class Log {
  /** Records that were read one by one as it was opened. */
  readonly recoveredRecords: number;
  readonly writer: LogWriter;
  readonly #device: LogDevice;
  readonly #ordinals: Float64Array;
  #superblock: Superblock;

  constructor(
    device: LogDevice,
    superblock: Superblock,
    recoveredRecords: number,
    ordinals: Float64Array,
    makeWriter: (onBegin: (segment: { readonly index: number; readonly ordinal: number }) => void) => LogWriter,
  ) {
    this.#device = device;
    this.#superblock = superblock;
    this.recoveredRecords = recoveredRecords;
    this.#ordinals = ordinals;
    this.writer = makeWriter(({ index, ordinal }) => {
      ordinals[index] = ordinal;
    });
  }

  get superblock(): Superblock {
    return this.#superblock;
  }

  /** Index of the segment with an ordinal, -1 when there is none. */
  segmentOf(ordinal: number): number {
    return this.#ordinals.indexOf(ordinal);
  }

  take(): LogRecord | null {
    return this.writer.take();
  }

  append(record: LogRecord, owner: RecordOwner, isDurable: boolean): void {
    this.writer.append(record, owner, isDurable);
  }

  flush(io: BdevIo): void {
    this.writer.flush(io);
  }

  /**
   * Nothing of segments before these ordinals is dirty, or needed at all: what is not needed is used again when that is durable.
   * Throws BdevError.
   */
  *advance(dirtyTail: number, historyTail: number): Task<void> {
    const { failure } = this.writer;
    if (failure !== 0) {
      const words = `the log on bdev ${this.#device.bdev.name} takes no more: errno ${failure}`;
      throw new BdevError('log-failed', 'base', words, 'look at the device, and open the log again');
    }
    yield* this.#commit({ dirtyTail, historyTail });
    const freed = [...this.#ordinals.keys()].filter(
      (i) => this.#ordinals[i] !== NO_ORDINAL && this.#ordinals[i]! < historyTail,
    );
    for (const index of freed) this.#ordinals[index] = NO_ORDINAL;
    this.writer.free(freed);
  }

  /** Nothing is under way. One that failed is left as it is, for its next opening. Throws BdevError. */
  *close(): Task<void> {
    try {
      if (this.writer.failure === 0) yield* this.#commit({ flags: this.#superblock.flags | SuperblockFlag.closed });
    } finally {
      this.writer.release();
    }
  }

  /** Writes a checkpoint, and a superblock that names it and says what has changed. */
  *#commit(changes: Partial<Superblock>): Task<void> {
    const { flushedSequence, head } = this.writer;
    const superblock = { ...this.#superblock, ...changes };
    const checkpointGeneration = superblock.checkpointGeneration + 1;
    const ordinals = this.#ordinals.map((ordinal) => (ordinal < superblock.historyTail ? NO_ORDINAL : ordinal));
    const checkpoint = { ...head, flushedSequence, ordinals };
    const checkpointSlot = yield* writeCheckpoint(this.#device, superblock, checkpointGeneration, checkpoint);
    const generation = superblock.generation + 1;
    this.#superblock = { ...superblock, generation, flushedSequence, checkpointSlot, checkpointGeneration };
    yield* writeSuperblock(this.#device, this.#superblock);
  }
}
