/**
 * The soak: for as long as it is told, front-ends come to a daemon, put verified load on its disk, and go, orderly or not.
 * It passes when the disk held what it must at every read, and the daemon ends as it began.
 *
 *     npm run soak -- --minutes 10
 *     npm run soak -- --hours 8        half of the time for that, half for seeds of the simulator: see simulated.ts
 *     npm run soak -- --kills 20       daemons are killed under a real guest: test/guest/restart.test.ts
 *
 * What must return to where it was, with no front-end attached: descriptors and threads, exactly; resident memory up to
 * RSS_GROWTH_MAX_BYTES, from the end of the warm-up to the least of the last fifth of the time: between collections it goes
 * up and down.
 *
 * Prints a line of progress now and then, and at the end one line of JSON. Exits with 0 when it passed, 1 when not,
 * 130 when it was interrupted before the end, whatever it had found good until then.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Command } from 'commander';
import { SeededRandom } from '../../src/poller/clock.js';
import { numberOption, sizeOption } from '../../src/target/options.js';
import { Frontend } from '../frontend/frontend.js';
import type { FrontendOptions } from '../frontend/frontend.js';
import { runLoad } from '../frontend/load.js';
import { FEATURES_KNOWN, Feature, PROTOCOL_FEATURES_KNOWN, ProtocolFeature, mask } from '../frontend/protocol.js';
import { waitUntil } from '../guest/child.js';
import { startDisk } from '../guest/backend.js';
import type { Disk } from '../guest/backend.js';
import { runVerified, submitAndAbandon } from './load.js';
import type { LoadCounters } from './load.js';
import { runSimulator } from './simulated.js';
import { BLOCK_BYTES, StampedDisk } from './stamped-disk.js';

const RSS_GROWTH_MAX_BYTES = 32 * 2 ** 20;
/** The first cycles compile code and fill pools: a fifth of the time, and at least so many. */
const WARM_UP_PART = 0.2;
const WARM_UP_CYCLES = 3;
const LATE_PART = 0.8;
/** A busy machine may take its time to let go. */
const SETTLE_MS = 15_000;
const PROGRESS_MS = 10_000;
const QUEUES_MAX = 4;
const READS_SECONDS = 0.3;
const GUEST_REGION = { guestAddress: 0x8_0000_0000, sizeBytes: 2 ** 23, mmapOffset: 4096 };
const INTERRUPTED = 130;
/** Of the daemon's log, shown when something went wrong. */
const LOG_LINES = 20;

interface Options {
  readonly minutes: number;
  readonly seed: number;
  readonly dir: string;
  readonly size: number;
  readonly kills?: number;
  readonly hours?: number;
}

interface Footprint {
  readonly fds: number;
  readonly threads: number;
  readonly rssBytes: number;
}

interface Counters extends LoadCounters {
  cycles: number;
  detached: number;
  broken: number;
  tables: number;
}

function parseOptions(): Options {
  return new Command('soak')
    .description('Puts verified load on a daemon whose front-ends come and go, and checks that nothing leaks.')
    .option('--minutes <minutes>', 'how long', minutes, 10)
    .option('--hours <hours>', 'how long, half of it for the simulator', hours)
    .option('--seed <number>', 'of all that is random', numberOption(0, 0x7fffffff), Date.now() & 0x7fffffff)
    .option('--dir <folder>', 'where the disk is made', tmpdir())
    .option('--size <size>', 'of the disk', sizeOption, 2 ** 28)
    .option('--kills <number>', 'instead: kill daemons so often under a real guest', numberOption(1, 100_000))
    .parse()
    .opts();
}

/** Has the guest's own test do it, so often. Returns the exit code. */
function killUnderGuest(kills: number, seed: number): number {
  const vitest = fileURLToPath(new URL('../../node_modules/vitest/vitest.mjs', import.meta.url));
  const env = { ...process.env, STRATA_KILLS: String(kills), STRATA_SEED: String(seed) };
  const args = [vitest, 'run', '--project', 'guest', 'test/guest/restart.test.ts'];
  return spawnSync(process.execPath, args, { stdio: 'inherit', env }).status ?? 1;
}

function minutes(text: string): number {
  const value = Number(text);
  if (value > 0) return value;
  throw new Error(`--minutes ${text}: write a number above 0`);
}

function hours(text: string): number {
  const value = Number(text);
  if (value > 0) return value;
  throw new Error(`--hours ${text}: write a number above 0`);
}

function footprint(pid: number): Footprint {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const field = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(status)![1]);
  return { fds: readdirSync(`/proc/${pid}/fd`).length, threads: ownThreads(pid), rssBytes: field('VmRSS') * 1024 };
}

/** Threads of the process, without the kernel's workers: io_uring may keep one of each kind for as long as a ring is open. */
function ownThreads(pid: number): number {
  const tasks = `/proc/${pid}/task`;
  return readdirSync(tasks).filter((task) => {
    try {
      return !readFileSync(join(tasks, task, 'comm'), 'utf8').startsWith('iou-');
    } catch {
      // It has just ended.
      return false;
    }
  }).length;
}

/** Waits until the daemon has let go of its last front-end, and says what it holds then. */
async function settled(pid: number, like: Footprint): Promise<Footprint> {
  const isBack = (): boolean => {
    const { fds, threads } = footprint(pid);
    return fds === like.fds && threads === like.threads;
  };
  await waitUntil(isBack, SETTLE_MS);
  return footprint(pid);
}

/** A front-end of some kind or other. */
function randomFrontend(random: SeededRandom): FrontendOptions {
  const features = [Feature.eventIdx, Feature.indirectDescriptors].filter(() => random.below(3) === 0);
  const protocol = [ProtocolFeature.configureMemSlots, ProtocolFeature.replyAck].filter(() => random.below(3) === 0);
  return {
    queues: 1 + random.below(QUEUES_MAX),
    queueSize: 64 << random.below(4),
    features: FEATURES_KNOWN & ~mask(...features),
    protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~mask(...protocol),
    // Anything the daemon does with a request in flight is over long before.
    timeoutMs: 30_000,
  };
}

class Soak {
  readonly counters: Counters = { cycles: 0, requests: 0, detached: 0, broken: 0, tables: 0 };
  readonly stamped: StampedDisk;
  readonly #disk: Disk;
  readonly #random: SeededRandom;
  readonly #sizeBytes: number;

  constructor(disk: Disk, options: Options) {
    this.#disk = disk;
    this.#random = new SeededRandom(options.seed);
    this.#sizeBytes = options.size;
    this.stamped = new StampedDisk(options.size / BLOCK_BYTES, this.#random);
  }

  /** One front-end from its coming to its going. */
  async cycle(): Promise<void> {
    const frontend = await Frontend.connect(this.#disk.socketPath, randomFrontend(this.#random));
    try {
      await this.#verifiedLoad(frontend);
      await this.#changeMemory(frontend);
      this.#reads(frontend);
      if (this.#random.below(2) === 0) {
        await frontend.detach();
        this.counters.detached++;
      } else {
        await this.#breakOff(frontend);
        this.counters.broken++;
      }
    } finally {
      frontend.close();
    }
    this.counters.cycles++;
  }

  async #verifiedLoad(frontend: Frontend, count = 50 + this.#random.below(150)): Promise<void> {
    const { stamped, counters } = this;
    const options = { count, depth: 1 + this.#random.below(8) };
    await Promise.all(frontend.queues.map((queue) => runVerified(queue, stamped, this.#random, counters, options)));
  }

  /** Under load: a new memory table where tables are the way, else a region that comes and goes. */
  async #changeMemory(frontend: Frontend): Promise<void> {
    this.counters.tables++;
    if (!frontend.hasProtocol(ProtocolFeature.configureMemSlots)) {
      await Promise.all([this.#verifiedLoad(frontend), frontend.shareMemoryTable()]);
      return;
    }
    const region = frontend.memory.addRegion(GUEST_REGION);
    await Promise.all([this.#verifiedLoad(frontend), frontend.shareRegion(region)]);
    await runVerified(frontend.queue, this.stamped, this.#random, this.counters, { count: 50, depth: 4, region });
    await Promise.all([this.#verifiedLoad(frontend), frontend.unshareRegion(region)]);
    frontend.memory.removeRegion(region);
  }

  /** The native generator, at full speed. It only reads: what it would write is not stamped. */
  #reads(frontend: Frontend): void {
    const { requests, errors } = runLoad(frontend, frontend.queue, {
      depth: 16,
      seconds: READS_SECONDS,
      rangeBytes: this.#sizeBytes,
      seed: this.counters.cycles + 1,
      polite: true,
    });
    if (errors > 0) throw new Error(`${errors} of ${requests} reads failed`);
    this.counters.requests += requests;
  }

  /** Closes the connection with requests of all queues in flight. */
  async #breakOff(frontend: Frontend): Promise<void> {
    for (const queue of frontend.queues) submitAndAbandon(queue, this.stamped, this.#random, 1 + this.#random.below(8));
    const delayMs = this.#random.below(4);
    if (delayMs > 0) await setTimeout(delayMs - 1);
    frontend.disconnect();
  }
}

/** Returns what went wrong, or undefined. */
async function run(options: Options, disk: Disk, isInterrupted: () => boolean): Promise<string | undefined> {
  const soak = new Soak(disk, options);
  const started = footprint(disk.pid);
  const startMs = performance.now();
  const elapsedMs = (): number => performance.now() - startMs;
  const totalMs = options.minutes * 60_000;
  let warm: Footprint | undefined;
  let lateRssBytes = Infinity;
  let reportedMs = 0;
  let problem: string | undefined;
  try {
    while (elapsedMs() < totalMs && !isInterrupted()) {
      await soak.cycle();
      if (warm === undefined && soak.counters.cycles >= WARM_UP_CYCLES && elapsedMs() >= totalMs * WARM_UP_PART) {
        warm = await settled(disk.pid, started);
      }
      if (elapsedMs() > totalMs * LATE_PART) lateRssBytes = Math.min(lateRssBytes, footprint(disk.pid).rssBytes);
      if (elapsedMs() - reportedMs > PROGRESS_MS) {
        reportedMs = elapsedMs();
        const { fds, threads, rssBytes } = footprint(disk.pid);
        console.error(
          `${Math.round(elapsedMs() / 1000)} s: ${soak.counters.cycles} cycles, ${soak.counters.requests} requests, ` +
            `${soak.stamped.verified} blocks verified; ${fds} fds, ${threads} threads, ${toMiB(rssBytes)} MiB`,
        );
      }
    }
    if (warm === undefined && !isInterrupted()) problem = 'too short to say anything about memory';
  } catch (error) {
    problem = error instanceof Error ? `${error.name}: ${error.message}` : String(error);
  }
  const ended = disk.running ? await settled(disk.pid, started) : undefined;
  problem ??= difference(started, (warm ?? started).rssBytes, ended, lateRssBytes);
  const result = {
    result: problem === undefined ? (isInterrupted() ? 'interrupted' : 'passed') : 'failed',
    ...(problem !== undefined && { problem }),
    seed: options.seed,
    seconds: Math.round(elapsedMs() / 1000),
    ...soak.counters,
    blocksVerified: soak.stamped.verified,
    started,
    warm: warm ?? null,
    ended: ended ?? null,
  };
  console.log(JSON.stringify(result));
  return problem;
}

/** What the daemon holds that it did not before. */
function difference(
  started: Footprint,
  warmRssBytes: number,
  ended: Footprint | undefined,
  lateRssBytes: number,
): string | undefined {
  if (ended === undefined) return 'the daemon is gone';
  if (ended.fds !== started.fds) return `descriptors: ${started.fds} before, ${ended.fds} after`;
  if (ended.threads !== started.threads) return `threads: ${started.threads} before, ${ended.threads} after`;
  const grownBytes = Math.min(ended.rssBytes, lateRssBytes) - warmRssBytes;
  if (grownBytes > RSS_GROWTH_MAX_BYTES) return `memory: grown by ${toMiB(grownBytes)} MiB`;
  return undefined;
}

function toMiB(bytes: number): string {
  return (bytes / 2 ** 20).toFixed(1);
}

async function main(): Promise<void> {
  const given = parseOptions();
  const options = given.hours === undefined ? given : { ...given, minutes: (given.hours * 60) / 2 };
  if (options.kills !== undefined) {
    process.exitCode = killUnderGuest(options.kills, options.seed);
    return;
  }
  const directory = mkdtempSync(join(options.dir, 'strata-soak-'));
  let interrupted = false;
  const onSignal = (): void => {
    // The second one does not wait for the cycle to end.
    if (interrupted) process.exit(INTERRUPTED);
    interrupted = true;
  };
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);
  process.on('exit', () => rmSync(directory, { recursive: true, force: true }));
  const path = join(directory, 'disk');
  const disk = await startDisk({ path, sizeBytes: options.size, numQueues: QUEUES_MAX });
  try {
    const problem = await run(options, disk, () => interrupted);
    if (problem !== undefined) console.error(`soak: ${problem}\n${disk.log.split('\n').slice(-LOG_LINES).join('\n')}`);
    process.exitCode = problem !== undefined ? 1 : interrupted ? INTERRUPTED : 0;
  } finally {
    await disk.stop();
  }
  if (options.hours === undefined || interrupted) return;
  const problem = await runSimulator(options.minutes, options.seed, () => interrupted);
  if (problem !== undefined) console.error(`soak: ${problem}`);
  if (problem !== undefined) process.exitCode = 1;
  else if (interrupted) process.exitCode ||= INTERRUPTED;
}

main().catch((error: unknown) => {
  console.error(`soak: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
});
