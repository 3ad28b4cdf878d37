/**
 * logDisk: a disk for tests that is nothing but a log: writes are appended, reads find the latest by an index, and when segments run out what
 * is still alive in the oldest one is appended again. By it the log is judged by everything that judges disks.
 */
import { EIO, native } from '../../native/index.js';
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller } from '../../src/poller/poller.js';
import type { Reactor } from '../../src/poller/reactor.js';
import { BdevError, unlimited } from '../../src/bdev/bdev.js';
import type { Bdev, BdevConfig, BdevContext, BdevModule, IoChannel } from '../../src/bdev/bdev.js';
import { IoFlag, IoQueue, IoStatus, IoType, statusOfErrno } from '../../src/bdev/bdev-io.js';
import type { BdevIo } from '../../src/bdev/bdev-io.js';
import { BdevSize } from '../../src/bdev/bdev-size.js';
import { BLOCK_BYTES, ExtentType } from '../../src/bdev/log/format.js';
import { createLog, openLog } from '../../src/bdev/log/log.js';
import type { Log } from '../../src/bdev/log/log.js';
import type { LogRecord } from '../../src/bdev/log/log-record.js';
import { TaskIo } from '../../src/bdev/task-io.js';
import { completeTask, nextStep, startTask } from '../../src/bdev/task.js';
import type { Task, Waiter } from '../../src/bdev/task.js';

/** Segments are given back when fewer are left; and so many are kept for that. */
const CLEAN_BELOW = 4;
const RESERVED = 2;

export interface LogDiskConfig extends BdevConfig {
  readonly module: 'logDisk';
  readonly base: string;
  /** Of 4 KiB. */
  readonly blocks: number;
  /** Makes the log, when there is none. */
  readonly segmentBlocks: number;
}

/** What one record carries: requests of the guest, or blocks that are moved. */
class Batch {
  readonly ios: BdevIo[] = [];
  /** By extent: where the block was, -1 for new data. */
  readonly from: number[] = [];
}

class LogDisk implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'logDisk';
  readonly blockSizeBytes = BLOCK_BYTES;
  readonly size: BdevSize;
  readonly readOnly = false;
  readonly supportsFua = true;
  readonly limits = { ...unlimited(BLOCK_BYTES), maxTransferBytes: 4 * BLOCK_BYTES, maxSegments: 1 };
  readonly bases: readonly Bdev[];
  readonly channel: IoChannel;
  readonly log: Log;
  /** By lba: block of the device, 0 for what was never written. */
  readonly index: Float64Array;
  readonly #reactor: Reactor;
  onRoom: () => void = () => undefined;

  constructor(config: LogDiskConfig, context: BdevContext) {
    const base = context.base(config.base, 'base');
    const { reactor } = context;
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.bases = [base];
    this.#reactor = reactor;
    this.size = new BdevSize(BLOCK_BYTES, {
      sizeBytes: () => config.blocks * BLOCK_BYTES,
      resize: () => {
        throw new Error('a logDisk keeps its size');
      },
    });
    this.index = new Float64Array(config.blocks);
    this.channel = context.open(base);
    const place = { reactor, bdev: base, channel: this.channel };
    const segments: { readonly start: number; readonly entries: readonly (readonly [lba: number, place: number])[] }[] =
      [];
    const run = <T>(task: Task<T>): T => completeTask(task, () => reactor.step());
    let first = -1;
    try {
      this.log = run(
        openLog({
          ...place,
          onRoom: () => this.onRoom(),
          reader: {
            onSegment: ({ index, entryCount }, entries) => {
              first = first < 0 ? index : first;
              const all = Array.from({ length: entryCount }, (_, i) => entries.readExtent(i, 0));
              all.sort((a, b) => a.place - b.place);
              segments.push({
                start: index,
                entries: all.flatMap(({ lba, blocks, place: at }) =>
                  Array.from({ length: blocks }, (_, i) => [lba + i, at + i] as const),
                ),
              });
            },
          },
        }),
      );
    } catch (error) {
      if (error instanceof BdevError) this.channel.close();
      throw error;
    }
    const { firstSegmentBlock, segmentBlocks } = this.log.superblock;
    for (const { start, entries } of segments) {
      for (const [lba, at] of entries) this.index[lba] = firstSegmentBlock + start * segmentBlocks + at;
    }
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type === IoType.read || type === IoType.write || type === IoType.flush;
  }

  openChannel(reactor: Reactor): IoChannel {
    return new LogDiskChannel(this, reactor);
  }

  describe(): Record<string, unknown> {
    return { records: this.log.recoveredRecords };
  }

  destroy(): void {
    try {
      completeTask(this.log.close(), () => this.#reactor.step());
    } finally {
      this.channel.close();
    }
  }
}

class LogDiskChannel implements IoChannel, Poller {
  readonly #disk: LogDisk;
  readonly #reactor: Reactor;
  readonly #writes = new IoQueue();
  readonly #batches = new Map<LogRecord, Batch>();
  #isCleaning = false;
  /** Blocks of the oldest segment, on their way to the end. */
  #moving: { readonly lba: number; readonly from: number; readonly bytes: Uint8Array }[] = [];
  #mover: Waiter | null = null;
  /** Under way. */
  readonly #reads = new Set<BdevIo>();

  constructor(disk: LogDisk, reactor: Reactor) {
    this.#disk = disk;
    this.#reactor = reactor;
    reactor.addPoller(this, PollPhase.batch);
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.flush) this.#disk.log.flush(io);
    else if (io.type === IoType.write) this.#writes.append(io);
    else this.#read(io);
  }

  close(): void {
    while (this.#isCleaning || !this.#disk.log.writer.isIdle) this.#reactor.step();
    this.#reactor.removePoller(this);
  }

  /** All that came in this step becomes one record. */
  poll(): boolean {
    const { log } = this.#disk;
    if (this.#writes.length === 0 && this.#moving.length === 0) return false;
    if (log.writer.failure !== 0) {
      while (this.#writes.length > 0)
        this.#writes.shift()!.complete(statusOfErrno(log.writer.failure), log.writer.failure);
      this.#endMoving();
      return true;
    }
    const { spareSegments } = log.writer;
    if (spareSegments < CLEAN_BELOW && !this.#isCleaning) this.#clean();
    // The last ones are for blocks that are moved, which is what makes room.
    if (spareSegments < RESERVED && this.#moving.length === 0) return false;
    const record = log.take();
    if (record === null) return false;
    this.#fill(record);
    return true;
  }

  #fill(record: LogRecord): void {
    const batch = new Batch();
    const { arena } = this.#reactor;
    let isDurable = false;
    for (const { lba, from, bytes } of this.#moving.splice(0)) {
      const place = record.add(1, ExtentType.data, lba, 1, 1, 0);
      arena.view8(record.payload + place * BLOCK_BYTES, BLOCK_BYTES).set(bytes);
      batch.from.push(from);
    }
    while (this.#writes.length > 0 && record.hasRoom(this.#writes.head!.lengthBytes / BLOCK_BYTES)) {
      const io = this.#writes.shift()!;
      const blocks = io.lengthBytes / BLOCK_BYTES;
      const place = record.add(1, ExtentType.data, io.offsetBytes / BLOCK_BYTES, blocks, blocks, 0);
      const to = arena.baseAddress + record.payload + place * BLOCK_BYTES;
      native.copyList(Float64Array.of(to, arena.baseAddress + io.segmentAddresses[0]!, io.lengthBytes), 1);
      batch.from.push(-1);
      batch.ios.push(io);
      isDurable ||= (io.flags & IoFlag.fua) !== 0;
    }
    this.#batches.set(record, batch);
    this.#disk.log.append(record, this, isDurable);
  }

  onAppended(record: LogRecord, errno: number): void {
    const batch = this.#batches.get(record)!;
    this.#batches.delete(record);
    const { index } = this.#disk;
    for (let i = 0; i < record.extentCount && errno === 0; i++) {
      for (let block = 0; block < record.blocks[i]!; block++) {
        const lba = record.lbas[i]! + block;
        const from = batch.from[i]!;
        // Written anew while it was moved: that came later.
        if (from < 0 || index[lba] === from) index[lba] = record.place + record.places[i]! + block;
      }
    }
    for (const io of batch.ios) io.complete(statusOfErrno(errno), errno);
    if (batch.from.some((from) => from >= 0)) this.#endMoving();
  }

  #endMoving(): void {
    const mover = this.#mover;
    this.#mover = null;
    this.#moving = [];
    mover?.wake();
  }

  // ---- reading

  #read(io: BdevIo): void {
    this.#reads.add(io);
    const end = (status: IoStatus, errno: number): void => {
      this.#reads.delete(io);
      io.complete(status, errno);
    };
    startTask(
      this.#readAll(io),
      () => end(IoStatus.success, 0),
      () => end(IoStatus.ioError, EIO),
    );
  }

  *#readAll(io: BdevIo): Task<void> {
    const address = io.segmentAddresses[0]!;
    for (let at = 0; at < io.lengthBytes; at += BLOCK_BYTES) {
      const place = this.#disk.index[(io.offsetBytes + at) / BLOCK_BYTES]!;
      if (place === 0) this.#reactor.arena.view8(address + at, BLOCK_BYTES).fill(0);
      else yield* this.#readBlock(place, address + at);
    }
  }

  *#readBlock(place: number, address: number): Task<void> {
    const request = new TaskIo(this.#disk.channel, this.#disk.bases[0]!);
    request.io.prepare(IoType.read, place * BLOCK_BYTES, BLOCK_BYTES, 0);
    request.io.addSegment(address, BLOCK_BYTES);
    yield* request.run();
  }

  // ---- making room

  #clean(): void {
    this.#isCleaning = true;
    const end = (): void => {
      this.#isCleaning = false;
    };
    startTask(this.#cleanOldest(), end, end);
  }

  /** What is alive in the oldest segment goes to the end, durably; then the segment is given back. */
  *#cleanOldest(): Task<void> {
    const { log, index } = this.#disk;
    const { historyTail, firstSegmentBlock, segmentBlocks } = log.superblock;
    const start = firstSegmentBlock + log.segmentOf(historyTail) * segmentBlocks;
    const alive = [...index.keys()].filter((lba) => index[lba]! >= start && index[lba]! < start + segmentBlocks);
    const address = this.#reactor.arena.allocate(BLOCK_BYTES, BLOCK_BYTES);
    const moving: { lba: number; from: number; bytes: Uint8Array }[] = [];
    try {
      for (const lba of alive) {
        const from = index[lba]!;
        yield* this.#readBlock(from, address);
        moving.push({ lba, from, bytes: this.#reactor.arena.view8(address, BLOCK_BYTES).slice() });
      }
    } finally {
      this.#reactor.arena.release(address);
    }
    const still = moving.filter(({ lba, from }) => index[lba] === from);
    if (still.length > 0) {
      yield {
        begin: (waiter) => {
          this.#mover = waiter;
          this.#moving = still;
        },
      };
    }
    const flush = new TaskIo({ submit: (io) => log.flush(io), close: () => undefined }, this.#disk);
    flush.io.prepare(IoType.flush, 0, 0, 0);
    yield* flush.run();
    // Who still reads there has to get it.
    const readers = [...this.#reads];
    while (readers.some((reader) => this.#reads.has(reader))) yield* nextStep(this.#reactor);
    yield* log.advance(historyTail + 1, historyTail + 1);
  }
}

export const logDiskModule: BdevModule<LogDiskConfig> = {
  name: 'logDisk',
  create: (config, context) => new LogDisk(config, context),
};

/** Makes an empty log on a bdev that is open. */
export function* newLog(
  reactor: Reactor,
  bdev: Bdev,
  channel: IoChannel,
  segmentBlocks: number,
  blocks: number,
): Task<void> {
  const volumes = [{ id: 1, flags: 0, blocks, baseUuid: '00'.repeat(16), name: 'disk' }];
  yield* createLog({ reactor, bdev, channel }, { segmentBlocks, volumes });
}
