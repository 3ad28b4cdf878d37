/**
 * Goal: what was appended to a log and told of is found when it is opened again, as a prefix of what was appended; a segment is used
 * again only when it was given back; what was durable and is gone is reported, and not passed over.
 *
 * Method: random records on a real reactor, over memory and over a file with delays; the log is opened again without having been closed;
 * bytes of the device are changed in between. A model keeps what was appended.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { BLOCK_BYTES, ExtentType } from '../../../src/bdev/log/format.js';
import type { LogBlock } from '../../../src/bdev/log/format.js';
import { createLog, openLog } from '../../../src/bdev/log/log.js';
import type { Log } from '../../../src/bdev/log/log.js';
import type { LogRecord, RecordOwner } from '../../../src/bdev/log/log-record.js';
import type { FoundSegment } from '../../../src/bdev/log/recovery.js';
import { BdevIo, IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import { BdevError } from '../../../src/bdev/bdev.js';
import { IoCounter } from '../../../src/bdev/io-stats.js';
import type { OpenBdev } from '../../../src/bdev/bdev.js';
import { startTask } from '../../../src/bdev/task.js';
import type { Task } from '../../../src/bdev/task.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { delay, malloc, stack } from '../stacks.js';
import type { Stack } from '../stacks.js';

const SEGMENT_BLOCKS = 1024;
const DEVICE_BYTES = 120 * 2 ** 20;
const VOLUME = { id: 1, flags: 0, blocks: 1000, baseUuid: '00'.repeat(16), name: 'disk' };

interface Appended {
  readonly sequence: number;
  readonly lba: number;
  readonly blocks: number;
  /** In every byte. */
  readonly value: number;
}

interface Found extends Appended {
  readonly ordinal: number;
}

let bench: Bench | null = null;
afterEach(() => {
  bench?.close();
  bench = null;
});

/** A log on a device, and what was appended to it. */
class Bench implements RecordOwner {
  readonly rig = new Rig('log');
  readonly device: OpenBdev;
  readonly appended: Appended[] = [];
  /** Sequence numbers in the order they were told of. */
  readonly told: number[] = [];
  failures = 0;
  found: Found[] = [];
  log: Log | null = null;
  readonly #stack: Stack;

  constructor(stackOf: Stack) {
    this.#stack = stackOf;
    this.device = this.rig.open(stackOf.configs);
    this.run(createLog(this.#place(), { segmentBlocks: SEGMENT_BLOCKS, volumes: [VOLUME] }));
  }

  #place(): { reactor: Rig['reactor']; bdev: OpenBdev['bdev']; channel: OpenBdev['channel'] } {
    return { reactor: this.rig.reactor, bdev: this.device.bdev, channel: this.device.channel };
  }

  run<T>(task: Task<T>): T {
    let outcome: { readonly value?: T; readonly error?: unknown } | null = null;
    startTask(
      task,
      (value) => (outcome = { value }),
      (error) => (outcome = { error }),
    );
    this.rig.until(() => outcome !== null, 'a task');
    const { value, error } = outcome!;
    if (error !== undefined) throw error as Error;
    return value as T;
  }

  open(): Log {
    this.found = [];
    this.log = this.run(
      openLog({
        ...this.#place(),
        reader: { onSegment: (segment, entries) => this.#onSegment(segment, entries) },
        onRoom: () => undefined,
      }),
    );
    return this.log;
  }

  /** The process is gone; what was under way has ended by then. */
  kill(): void {
    const { log } = this;
    this.rig.until(() => log!.writer.isIdle, 'what is under way');
    log!.writer.release();
    this.log = null;
  }

  #onSegment(segment: FoundSegment, entries: LogBlock): void {
    const { superblock } = { superblock: this.log?.superblock };
    void superblock;
    const all = Array.from({ length: segment.entryCount }, (_, i) => entries.readExtent(i, 0));
    all.sort((a, b) => a.place - b.place);
    for (const { lba, blocks, word } of all) {
      this.found.push({ ordinal: segment.ordinal, sequence: word, lba, blocks, value: this.#valueOf(word) });
    }
  }

  #valueOf(sequence: number): number {
    return this.appended.find((one) => one.sequence === sequence)?.value ?? -1;
  }

  /** Appends a record of one extent for each number of blocks. Returns null when there is no room. */
  get superblock(): Log['superblock'] {
    return this.log!.superblock;
  }

  append(isDurable: boolean, ...lengths: readonly number[]): LogRecord | null {
    const record = this.log!.take();
    if (record === null) return null;
    const value = 1 + (this.appended.length % 255);
    lengths.forEach((blocks, i) => {
      const place = record.add(1, ExtentType.data, 10 * i + blocks, blocks, blocks, 0);
      this.rig.arena.view8(record.payload + place * BLOCK_BYTES, blocks * BLOCK_BYTES).fill(value);
    });
    this.log!.append(record, this, isDurable);
    lengths.forEach((blocks, i) =>
      this.appended.push({ sequence: record.sequence, lba: 10 * i + blocks, blocks, value }),
    );
    return record;
  }

  onAppended(record: LogRecord, errno: number): void {
    if (errno === 0) this.told.push(record.sequence);
    else this.failures++;
  }

  flush(): void {
    const io = new BdevIo();
    let status: IoStatus | null = null;
    io.prepare(IoType.flush, 0, 0, 0);
    io.push({ onDone: (done: BdevIo) => (status = done.status) }, 0);
    this.log!.flush(io);
    this.rig.until(() => status !== null, 'a flush');
    expect(status).toBe(IoStatus.success);
  }

  settle(): void {
    this.rig.until(() => this.log!.writer.isIdle, 'what is under way');
  }

  /** Changes a byte of the device. */
  poke(offset: number): void {
    const address = this.rig.arena.allocate(BLOCK_BYTES, BLOCK_BYTES);
    const io = new BdevIo();
    for (const type of [IoType.read, IoType.write]) {
      let isDone = false;
      io.prepare(type, offset - (offset % BLOCK_BYTES), BLOCK_BYTES, 0);
      io.addSegment(address, BLOCK_BYTES);
      io.push({ onDone: () => (isDone = true) }, 0);
      this.device.channel.submit(io);
      this.rig.until(() => isDone, 'a poke');
      this.rig.arena.view8(address, BLOCK_BYTES)[offset % BLOCK_BYTES]! ^= 1;
    }
    this.rig.arena.release(address);
  }

  close(): void {
    if (this.log !== null) {
      this.settle();
      this.run(this.log.close());
    }
    this.device.close();
    this.rig.close();
    this.#stack.release();
  }

  expectFound(expected: readonly Appended[]): void {
    const plain = this.found.map(({ sequence, lba, blocks, value }) => ({ sequence, lba, blocks, value }));
    expect(plain).toEqual(expected);
  }
}

const overMemory = (): Bench => new Bench(malloc(4096, DEVICE_BYTES));
const overSlowDevice = (): Bench =>
  new Bench(stack(malloc(512, DEVICE_BYTES), delay({ writeUs: 100, flushUs: 50, jitterUs: 400 })));

describe('A log', () => {
  it('that is empty is opened any number of times', () => {
    bench = overMemory();
    for (let i = 0; i < 5; i++) {
      bench.open();
      bench.expectFound([]);
      if (i % 2 === 0) bench.kill();
      else {
        bench.run(bench.log!.close());
        bench.log = null;
      }
    }
  });

  it.each([
    ['memory', overMemory],
    ['a slow device that completes in any order', overSlowDevice],
  ])('has what was appended when it is opened again, over %s', (_, make) => {
    bench = make();
    const random = seededRandom(5);
    for (let life = 0; life < 6; life++) {
      bench.open();
      bench.expectFound(bench.appended);
      for (let i = random.below(60); i > 0; i--) {
        const lengths = Array.from({ length: 1 + random.below(5) }, () => 1 + random.below(12));
        for (let tries = 0; bench.append(random.below(4) === 0, ...lengths) === null; tries++) {
          if (tries > 10_000) throw new Error('no room in the log');
          bench.rig.step();
        }
        if (random.below(5) === 0) bench.flush();
      }
      bench.settle();
      // In order, each once.
      expect(bench.told).toEqual(bench.told.map((_one, i) => i + 1));
      expect(bench.told.at(-1)).toBe(bench.appended.at(-1)?.sequence);
      if (random.below(3) === 0) {
        bench.run(bench.log!.close());
        bench.log = null;
      } else bench.kill();
    }
  });

  it('fills segments one after the other, and uses those again that were given back', () => {
    bench = overMemory();
    const log = bench.open();
    const { segmentCount } = log.superblock;
    let refused = 0;
    for (let i = 0; i < segmentCount * 40; i++) {
      if (bench.append(false, 200) === null) {
        refused++;
        bench.settle();
        const tail = log.superblock.historyTail + 2;
        bench.run(log.advance(tail, tail));
        expect(bench.append(false, 200)).not.toBeNull();
      }
      bench.rig.step();
    }
    expect(refused).toBeGreaterThan(5);
    bench.kill();
    bench.open();
    const first = bench.found[0]!.sequence;
    bench.expectFound(bench.appended.filter(({ sequence }) => sequence >= first));
    expect(bench.found[0]!.ordinal).toBe(bench.log!.superblock.historyTail);
  });

  it('writes a record with one request, and a flush is one sync', () => {
    bench = overMemory();
    bench.open();
    const stats = bench.rig.registry.stats('leaf')!;
    const count = (): number[] => [
      stats.counter(IoType.write, IoCounter.completed),
      stats.counter(IoType.flush, IoCounter.completed),
    ];
    const [writes, flushes] = count();
    for (let i = 0; i < 20; i++) {
      bench.append(false, 1);
      bench.settle();
      bench.flush();
    }
    expect(count()).toEqual([writes! + 20, flushes! + 20]);
  });

  it('ends before a record that is damaged, and what is appended then is not followed by what was there', () => {
    bench = overMemory();
    bench.open();
    const records = Array.from({ length: 8 }, () => bench!.append(false, 3)!.place);
    bench.kill();
    bench.poke(records[5]! * BLOCK_BYTES + 5000);
    bench.open();
    bench.expectFound(bench.appended.slice(0, 5));
    bench.appended.splice(5);
    bench.append(false, 3);
    bench.kill();
    bench.open();
    bench.expectFound(bench.appended);
  });

  it('that has lost what was durable is not opened', () => {
    bench = overMemory();
    bench.open();
    const places = Array.from({ length: 4 }, () => bench!.append(false, 3)!.place);
    bench.settle();
    bench.flush();
    bench.append(false, 1);
    bench.kill();
    bench.poke(places[2]! * BLOCK_BYTES);
    expect(() => bench!.open()).toThrow(BdevError);
    expect(() => bench!.open()).toThrow(/damaged/);
  });

  it('that has lost a segment which something later says was durable is not opened', () => {
    bench = overMemory();
    bench.open();
    const places: number[] = [];
    for (let i = 0; i < 6; i++) {
      places.push(bench.append(false, 250)!.place);
      bench.settle();
    }
    bench.flush();
    const { firstSegmentBlock } = bench.superblock;
    // In the next segment, whose header does not fit any more.
    for (let i = 0; i < 2; i++) bench.append(false, 250);
    bench.kill();
    bench.poke(places[1]! * BLOCK_BYTES);
    // The first segment was sealed: its trailer goes, too.
    bench.poke((firstSegmentBlock + SEGMENT_BLOCKS) * BLOCK_BYTES - 1);
    for (let tries = 0; tries < 2; tries++) expect(() => bench!.open()).toThrow(/damaged/);
  });

  it('is found by any copy of its superblock', () => {
    bench = overMemory();
    for (let i = 0; i < 8; i++) {
      bench.open();
      bench.append(false, 1);
      bench.settle();
      const { generation } = bench.superblock;
      bench.kill();
      // The newest one is damaged: by the one before it the same is found.
      if (i % 2 === 1) bench.poke((generation % 4) * BLOCK_BYTES + 100);
      bench.open();
      bench.expectFound(bench.appended);
      bench.kill();
    }
  });
});
