/**
 * Goal: clusters that QEMU compressed come out as they went in, QEMU reads what we compress, and no stream, whatever is in it, does
 * harm. Threads come when there are jobs, wake the reactor, and go; a job allocates nothing.
 *
 * Method: compressed clusters are taken from images of qemu-img, as long as their descriptors say they are, and put through both pools;
 * ours are put in their place, for qemu-img to read. Streams are damaged at random between guard bytes.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GCProfiler } from 'node:v8';
import { createInflateRaw, deflateRawSync } from 'node:zlib';
import { CCtx, CParameter, DCtx, EndDirective } from 'zstd-napi/binding.js';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  CodecJob,
  CodecOperation,
  CodecStatus,
  DEFLATE_LEVEL,
  ZSTD_LEVEL,
  compressionOf,
  decompressionOf,
} from '../../../src/bdev/qcow2/codec/codec-job.js';
import type { CodecOwner, CodecPool } from '../../../src/bdev/qcow2/codec/codec-job.js';
import { SyncCodecPool } from '../../../src/bdev/qcow2/codec/sync-codec-pool.js';
import { ThreadCodecPool, shareCodecPool } from '../../../src/bdev/qcow2/codec/thread-codec-pool.js';
import { CompressionType } from '../../../src/bdev/qcow2/format.js';
import { SystemClock } from '../../../src/poller/clock.js';
import { Reactor, ReactorStat } from '../../../src/poller/reactor.js';
import { expectBytes } from '../../support/bytes.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { makeCompressedImage, mixedData, readByQemu } from './compressed-image.js';

const GUARD = 0xa5;
const GUARD_BYTES = 64;
const SOURCE_BYTES_MAX = 4 * 2 ** 20;
const MEMORY_BYTES = 16 * 2 ** 20;
const MUTANTS = 4000;

const folder = mkdtempSync(join(tmpdir(), 'strata-codec-'));
afterAll(() => rmSync(folder, { recursive: true }));

interface Outcome {
  readonly status: CodecStatus;
  readonly bytes: Buffer;
}

/** Memory for one job at a time, and for some. */
class Bench implements CodecOwner {
  readonly rig = new Rig('codec');
  readonly memory = this.rig.arena.allocate(MEMORY_BYTES);
  readonly bytes = Buffer.from(this.rig.arena.buffer, this.memory, MEMORY_BYTES);
  done = 0;

  onCodecDone(): void {
    this.done++;
  }

  /** Runs one job. Throws when a byte beyond the capacity was changed. */
  run(pool: CodecPool, operation: CodecOperation, source: Buffer, capacityBytes: number, level = 0): Outcome {
    const at = SOURCE_BYTES_MAX;
    source.copy(this.bytes);
    this.bytes.fill(GUARD, at - GUARD_BYTES, at + capacityBytes + GUARD_BYTES);
    const job = new CodecJob(this);
    Object.assign(job, { operation, level, source: this.memory, sourceBytes: source.length });
    Object.assign(job, { destination: this.memory + at, capacityBytes });
    const doneBefore = this.done;
    expect(pool.submit(job)).toBe(true);
    expect(this.done, 'comes back at once').toBe(doneBefore);
    this.until(pool, () => this.done > doneBefore);
    const guards = [at - GUARD_BYTES, at + capacityBytes].map((from) => this.bytes.subarray(from, from + GUARD_BYTES));
    if (!guards.every((guard) => guard.every((byte) => byte === GUARD))) throw new Error('a guard byte was changed');
    return { status: job.status, bytes: Buffer.from(this.bytes.subarray(at, at + job.producedBytes)) };
  }

  /** Steps until something is reached, asleep where there is nothing to do. */
  until(pool: CodecPool, reached: () => boolean): void {
    while (!reached()) {
      if (this.rig.step() || !(pool instanceof ThreadCodecPool)) continue;
      if (!pool.arm()) expect(this.rig.ring.wait(10_000_000), 'the reactor is woken').toBe(true);
      pool.disarm();
    }
  }

  close(): void {
    this.rig.arena.release(this.memory);
    this.rig.close();
  }
}

let bench: Bench;
beforeEach(() => (bench = new Bench()));
afterEach(() => bench.close());

function eachPool(then: (pool: CodecPool) => void): void {
  for (const make of [() => new SyncCodecPool(bench.rig.reactor), () => new ThreadCodecPool(bench.rig.reactor, 2)]) {
    const pool = make();
    then(pool);
    pool.close();
  }
}

function withSync<T>(then: (pool: CodecPool) => T): T {
  const pool = new SyncCodecPool(bench.rig.reactor);
  try {
    return then(pool);
  } finally {
    pool.close();
  }
}

/** As QEMU compresses. */
function compress(type: CompressionType, data: Buffer): Buffer {
  const deflate = type === CompressionType.deflate;
  const level = deflate ? DEFLATE_LEVEL : ZSTD_LEVEL;
  const { status, bytes } = withSync((pool) => bench.run(pool, compressionOf(type), data, data.length * 2, level));
  expect(status).toBe(CodecStatus.ok);
  return bytes;
}

const TYPES = [
  ['deflate', CompressionType.deflate, 'zlib'],
  ['zstd', CompressionType.zstd, 'zstd'],
] as const;
const CLUSTERS = [512, 4096, 65536, 2 ** 21];
const CASES = TYPES.flatMap(([name, , option]) => CLUSTERS.map((bytes) => [name, bytes, option] as const));

describe('clusters of qemu-img', () => {
  it.each(CASES)('are decompressed: %s, %i bytes', (_, clusterBytes, option) => {
    const options = `cluster_size=${clusterBytes},compression_type=${option}`;
    const data = mixedData(Math.max(4 * clusterBytes, 2 ** 18), clusterBytes);
    const image = makeCompressedImage(folder, options, data);
    expect(image.clusters.length).toBeGreaterThan(2);
    eachPool((pool) => {
      for (const { index, offset, lengthBytes } of image.clusters) {
        const source = image.file.subarray(offset, offset + lengthBytes);
        const { status, bytes } = bench.run(pool, decompressionOf(image.type), source, clusterBytes);
        expect(status).toBe(CodecStatus.ok);
        const from = index * clusterBytes;
        expectBytes(bytes, Buffer.from(data.subarray(from, from + clusterBytes)), `cluster ${index}`);
      }
    });
  });

  it('are decompressed in part, from their start, when they are deflated', () => {
    const image = makeCompressedImage(folder, 'cluster_size=64k', mixedData(2 ** 18, 1));
    const { index, offset, lengthBytes } = image.clusters[1]!;
    const source = image.file.subarray(offset, offset + lengthBytes);
    for (const wanted of [1, 512, 4096, 40_000]) {
      const { status, bytes } = withSync((pool) => bench.run(pool, CodecOperation.inflate, source, wanted));
      expect(status).toBe(CodecStatus.ok);
      expectBytes(bytes, Buffer.from(image.data.subarray(index * 65536, index * 65536 + wanted)), `${wanted} bytes`);
    }
  });
});

describe('clusters that we compress', () => {
  it.each(TYPES)('are read by QEMU: %s', (_, type, option) => {
    const clusterBytes = 65536;
    const image = makeCompressedImage(folder, `compression_type=${option}`, mixedData(2 ** 20, 2));
    const file = Buffer.from(image.file);
    const expected = Buffer.from(image.data);
    for (const { index, offset, lengthBytes } of image.clusters) {
      // Half of what was there, twice: too far apart for a window of 12 bits, so what is left to save is the second half of zeroes.
      const from = index * clusterBytes;
      const half = image.data.subarray(from, from + clusterBytes / 2);
      const data = Buffer.concat([half, Buffer.alloc(clusterBytes / 2)]);
      const stream = compress(type, data);
      expect(stream.length).toBeLessThanOrEqual(lengthBytes);
      file.fill(0, offset, offset + lengthBytes);
      // Clusters share sectors: what follows is written after this one.
      stream.copy(file, offset);
      data.copy(expected, from);
    }
    const path = join(folder, `ours-${option}.qcow2`);
    writeFileSync(path, file);
    expectBytes(readByQemu(path, folder), expected, 'the disk');
  });

  it('keep to a window of 4 KiB, which other programs count on, when they are deflated', async () => {
    const data = Buffer.concat([mixedData(40_000, 3), mixedData(40_000, 3)]);
    // Output in small pieces: nothing but its window is left of what went before.
    const inflate = createInflateRaw({ windowBits: 12, chunkSize: 128 });
    const pieces: Buffer[] = [];
    inflate.on('data', (piece: Buffer) => pieces.push(piece));
    const ended = new Promise((resolve, reject) => inflate.on('end', resolve).on('error', reject));
    inflate.end(compress(CompressionType.deflate, data));
    await ended;
    expectBytes(Buffer.concat(pieces), data, 'what was compressed');
  });

  it.each(TYPES)('are refused when they do not become smaller: %s', (_, type) => {
    const noise = Buffer.from(
      Array.from(
        { length: 4096 },
        (
          (random) => () =>
            random.below(256)
        )(seededRandom(4)),
      ),
    );
    withSync((pool) => {
      const { status } = bench.run(pool, compressionOf(type), noise, noise.length - 1, 1);
      expect(status).toBe(CodecStatus.tooLong);
      expect(bench.run(pool, compressionOf(type), Buffer.alloc(4096), 4095, 1).status).toBe(CodecStatus.ok);
    });
  });

  it('come in any order of operations and levels', () => {
    const data = mixedData(65536, 5);
    withSync((pool) => {
      for (const [level, operation, back] of [
        [1, CodecOperation.deflate, CodecOperation.inflate],
        [9, CodecOperation.deflate, CodecOperation.inflate],
        [1, CodecOperation.zstdCompress, CodecOperation.zstdDecompress],
        [9, CodecOperation.zstdCompress, CodecOperation.zstdDecompress],
        [1, CodecOperation.deflate, CodecOperation.inflate],
      ] as const) {
        const { bytes } = bench.run(pool, operation, data, data.length, level);
        expectBytes(bench.run(pool, back, bytes, data.length).bytes, data, 'what was compressed');
      }
    });
  });
});

describe('a hostile stream', () => {
  it.each(TYPES)('is an answer and no harm, whatever is in it: %s', (_, type) => {
    const random = seededRandom(6);
    const seen = new Map<number, number>();
    withSync((pool) => {
      const original = Buffer.from(compressWith(pool, type, mixedData(8192, 6)));
      for (let i = 0; i < MUTANTS; i++) {
        const mutant = mutate(original, random);
        const capacity = [512, 4096, 8191, 8192, 8193, 65536][random.below(6)]!;
        const { status, bytes } = bench.run(pool, decompressionOf(type), mutant, capacity);
        expect(bytes.length).toBeLessThanOrEqual(capacity);
        if (status === CodecStatus.ok) expect(bytes.length).toBe(capacity);
        seen.set(status, (seen.get(status) ?? 0) + 1);
      }
      // And the next one is not disturbed.
      expectBytes(bench.run(pool, decompressionOf(type), original, 8192).bytes, mixedData(8192, 6), 'the next cluster');
    });
    expect(seen.get(CodecStatus.damaged)).toBeGreaterThan(MUTANTS / 10);
    expect(seen.get(CodecStatus.ok)).toBeGreaterThan(0);
    expect(seen.get(CodecStatus.failed)).toBeUndefined();
  });

  it.each(TYPES)('is told apart when it is too short, or too long for zstd: %s', (_, type) => {
    const data = mixedData(4096, 7);
    const stream = compress(type, data);
    withSync((pool) => {
      const operation = decompressionOf(type);
      expect(bench.run(pool, operation, stream, 4097).status).toBe(CodecStatus.short);
      expect(bench.run(pool, operation, stream.subarray(0, stream.length / 2), 4096).status).toBe(CodecStatus.damaged);
      const long = bench.run(pool, operation, stream, 4095).status;
      expect(long).toBe(type === CompressionType.zstd ? CodecStatus.tooLong : CodecStatus.ok);
    });
  });

  it('of many zstd frames is taken when they fill the cluster together, and a cluster in one frame of unknown size, too', () => {
    const data = mixedData(8192, 8);
    const zstd = CompressionType.zstd;
    const frames = Buffer.concat([data.subarray(0, 4096), data.subarray(4096)].map((half) => compress(zstd, half)));
    const parts = Buffer.concat([streamed(data, 17), Buffer.alloc(300)]);
    withSync((pool) => {
      expectBytes(bench.run(pool, CodecOperation.zstdDecompress, frames, 8192).bytes, data, 'two frames');
      expectBytes(bench.run(pool, CodecOperation.zstdDecompress, parts, 8192).bytes, data, 'unknown size');
    });
  });

  it('that asks for a window of 128 MiB is refused, and no memory is taken for it', () => {
    const before = process.memoryUsage().rss;
    const { status } = withSync((pool) =>
      bench.run(pool, CodecOperation.zstdDecompress, streamed(mixedData(8192, 9), 27), 8192),
    );
    expect(status).toBe(CodecStatus.damaged);
    expect(process.memoryUsage().rss - before).toBeLessThan(64 * 2 ** 20);
  });
});

/** Threads of this process that do jobs. */
function codecThreads(): { readonly state: string; readonly ticks: number }[] {
  return readdirSync('/proc/self/task').flatMap((task) => {
    try {
      const stat = readFileSync(`/proc/self/task/${task}/stat`, 'latin1');
      const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
      return stat.includes('(strata-codec)')
        ? [{ state: fields[0]!, ticks: Number(fields[11]) + Number(fields[12]) }]
        : [];
    } catch {
      return [];
    }
  });
}

async function eventually(reached: () => boolean, what: string): Promise<void> {
  const deadline = performance.now() + 10_000;
  while (!reached()) {
    if (performance.now() > deadline) throw new Error(`${what}: not reached`);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

describe('threads', () => {
  it('come with the first job, sleep when there is none, and go with the last pool', async () => {
    await eventually(() => codecThreads().length === 0, 'no threads of the tests before');
    const one = shareCodecPool(bench.rig.reactor, 2);
    const other = shareCodecPool(bench.rig.reactor, 2);
    expect(codecThreads()).toEqual([]);
    const job = new CodecJob(bench);
    Object.assign(job, { operation: CodecOperation.deflate, source: bench.memory, sourceBytes: 4096 });
    Object.assign(job, { destination: bench.memory + 8192, capacityBytes: 4096 });
    one.submit(job);
    const isDone = (): boolean => (bench.rig.step(), bench.done === 1);
    await eventually(isDone, 'the job');
    await eventually(() => codecThreads().every(({ state }) => state === 'S'), 'all threads sleep');
    expect(codecThreads().length).toBeGreaterThan(0);
    expect(codecThreads().length).toBeLessThanOrEqual(2);
    one.close();
    expect(codecThreads().length).toBeGreaterThan(0);
    other.close();
    await eventually(() => codecThreads().length === 0, 'no threads');
  });

  it('do every job of several reactors exactly once', () => {
    const rigs = [bench.rig, new Rig('other'), new Rig('third')];
    const pools = rigs.map((rig) => new ThreadCodecPool(rig.reactor, 3));
    const data = mixedData(512, 10);
    data.copy(bench.bytes);
    const source = deflateRawSync(data);
    source.copy(bench.bytes, 4096);
    let back = 0;
    let submitted = 0;
    const JOBS = 20_000;
    const inflight = new Set<CodecJob>();
    const submit = (pool: CodecPool, job: CodecJob): void => {
      if (submitted === JOBS) return;
      // A full ring says so, and has room again later.
      if (!pool.submit(job)) return;
      submitted++;
      inflight.add(job);
    };
    const jobs = pools.map((pool, p) =>
      Array.from({ length: 300 }, (_, i) => {
        const owner: CodecOwner = {
          onCodecDone: (job) => {
            expect(inflight.delete(job)).toBe(true);
            expect(job.status).toBe(CodecStatus.ok);
            back++;
            submit(pool, job);
          },
        };
        const job = new CodecJob(owner);
        Object.assign(job, {
          operation: CodecOperation.inflate,
          source: bench.memory + 4096,
          sourceBytes: source.length,
        });
        Object.assign(job, { destination: bench.memory + 8192 + (p * 300 + i) * 512, capacityBytes: 512 });
        return job;
      }),
    );
    pools.forEach((pool, p) => jobs[p]!.forEach((job) => submit(pool, job)));
    expect(inflight.size).toBe(3 * 256);
    while (back < JOBS) rigs.forEach((rig) => rig.step());
    expect(inflight.size).toBe(0);
    for (let i = 0; i < 3 * 300; i++) {
      if (i % 300 >= 256) continue;
      const at = 8192 + i * 512;
      expectBytes(Buffer.from(bench.bytes.subarray(at, at + 512)), data, `job ${i}`);
    }
    pools.forEach((pool) => pool.close());
    rigs.slice(1).forEach((rig) => rig.close());
  });

  it('leave the process unharmed when the reactor that gave them work is ended', () => {
    const script = join(import.meta.dirname, 'ended-codec-reactor.mjs');
    const output = execFileSync(process.execPath, [script], { encoding: 'utf8', timeout: 25_000 });
    expect(output).toBe('alive\n');
  });
});

describe('a reactor that sleeps', () => {
  it.each([
    ['threads', (reactor: Reactor) => new ThreadCodecPool(reactor, 1)],
    ['itself', (reactor: Reactor) => new SyncCodecPool(reactor)],
  ])('gets its job back from %s', (_, make) => {
    const { arena, ring, random } = bench.rig.reactor;
    const parts = { arena, ring, random, clock: new SystemClock(), pollUs: 0 };
    const reactor = new Reactor({ ...parts, name: 'sleeper', mode: 'interrupt' });
    const pool = make(reactor);
    const done: CodecJob[] = [];
    const onCodecDone = (job: CodecJob): void => {
      done.push(job);
      reactor.endSlice();
    };
    for (let i = 1; i <= 20; i++) {
      const job = new CodecJob({ onCodecDone });
      const range = { source: bench.memory, destination: bench.memory + 2 ** 20, sourceBytes: 2 ** 18 };
      Object.assign(job, { operation: CodecOperation.deflate, ...range, capacityBytes: 2 ** 18 });
      pool.submit(job);
      // Until it is given back, or for as long as a slice may last.
      for (let slices = 0; done.length < i && slices < 10; slices++) reactor.runSlice();
      expect(done.length).toBe(i);
    }
    expect(reactor.stats[ReactorStat.sleeps]).toBeLessThan(200);
    pool.close();
  });
});

describe('a job', () => {
  const JOBS = 50_000;
  const BYTES_PER_JOB_MAX = 12;

  it.each([
    ['on threads', (rig: Rig) => new ThreadCodecPool(rig.reactor, 1)],
    ['in the reactor', (rig: Rig) => new SyncCodecPool(rig.reactor)],
  ])('allocates nothing, %s', (_, make) => {
    const pool = make(bench.rig);
    const source = deflateRawSync(Buffer.alloc(64));
    source.copy(bench.bytes);
    let submitted = 0;
    let back = 0;
    const owner: CodecOwner = {
      onCodecDone: (job) => {
        back++;
        if (submitted < JOBS) {
          submitted++;
          pool.submit(job);
        }
      },
    };
    const jobs = Array.from({ length: 64 }, () => {
      const job = new CodecJob(owner);
      job.source = bench.memory;
      job.sourceBytes = source.length;
      job.destination = bench.memory + 4096;
      job.capacityBytes = 64;
      return job;
    });
    const bytesPerJob = (): number => {
      submitted = jobs.length;
      back = 0;
      const profiler = new GCProfiler();
      profiler.start();
      const before = process.memoryUsage().heapUsed;
      for (const job of jobs) pool.submit(job);
      while (back < JOBS) bench.rig.reactor.step();
      const grown = process.memoryUsage().heapUsed - before;
      return profiler.stop().statistics.length > 0 ? Infinity : grown / JOBS;
    };
    let least = Infinity;
    for (let round = 0; round < 15 && least > BYTES_PER_JOB_MAX; round++) least = Math.min(least, bytesPerJob());
    expect(least).toBeLessThan(BYTES_PER_JOB_MAX);
    pool.close();
  });
});

function compressWith(pool: CodecPool, type: CompressionType, data: Buffer): Buffer {
  return bench.run(pool, compressionOf(type), data, data.length * 2, 3).bytes;
}

/** A frame that does not say how much is in it. */
function streamed(data: Buffer, windowBits: number): Buffer {
  const context = new CCtx();
  context.setParameter(CParameter.windowLog, windowBits);
  const out = Buffer.alloc(data.length * 2);
  const half = data.length / 2;
  const [, first] = context.compressStream2(out, data.subarray(0, half), EndDirective.flush);
  const [, second] = context.compressStream2(out.subarray(first), data.subarray(half), EndDirective.end);
  const frame = out.subarray(0, first + second);
  const check = Buffer.alloc(data.length);
  if (windowBits <= 17) expect(new DCtx().decompress(check, frame)).toBe(data.length);
  return Buffer.from(frame);
}

function mutate(original: Buffer, random: { below(limit: number): number }): Buffer {
  const mutant = Buffer.from(original);
  const kind = random.below(5);
  if (kind === 0) return mutant.subarray(0, random.below(mutant.length));
  if (kind === 1) return Buffer.from(Array.from({ length: random.below(600) }, () => random.below(256)));
  if (kind === 2) return Buffer.concat([mutant, Buffer.from([random.below(256), random.below(256)])]);
  for (let flips = 1 + random.below(kind === 3 ? 2 : 40); flips > 0; flips--) {
    // The first bytes decide most: codes, sizes, windows.
    const at = random.below(random.below(2) === 0 ? 24 : mutant.length);
    mutant[at]! ^= 1 << random.below(8);
  }
  return mutant;
}
