/** The daemons under measurement, each with one disk and the benchmark's client attached to it. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Frontend } from '../test/frontend/frontend.js';
import { PROTOCOL_FEATURES_KNOWN, ProtocolFeature, mask } from '../test/frontend/protocol.js';
import { runLoad } from '../test/frontend/load.js';
import type { LoadResult } from '../test/frontend/load.js';
import { Child, waitUntil } from '../test/guest/child.js';
import { countSyscalls, cpuTimeUs } from './process-cost.js';
import { BLOCK_BYTES, READ_PERCENT } from './scenario.js';
import type { Backing, Sample, Workload } from './scenario.js';

/** What a disk is made of. */
export interface DiskSpec {
  readonly backing: Backing;
  readonly sizeBytes: number;
  /** Of a raw disk. */
  readonly path: string;
}

export interface DaemonOptions {
  /** Where the socket goes. */
  readonly directory: string;
  /** Core the daemon runs on, with all of its threads. */
  readonly core: number;
  /** See BenchOptions. */
  readonly qsd: 'iothread' | 'plain';
  /** Whether Strata writes down what is in flight, as it does for QEMU. Default false. */
  readonly inflight?: boolean;
}

export const PROGRAM = fileURLToPath(new URL('../dist/src/target/strata-vhost-user-blk.js', import.meta.url));
const START_TIMEOUT_MS = 15_000;
const STOP_GRACE_MS = 10_000;
const QUEUE_SIZE = 256;
const SYSCALL_SECONDS = 0.3;
/** The unmeasured run before each sample, as a part of it, and at most. */
const WARM_UP_PART = 0.25;
const WARM_UP_SECONDS_MAX = 0.5;

/** Throws when the daemon's program was not built. */
export function requireStrata(): void {
  if (!existsSync(PROGRAM)) throw new Error(`${PROGRAM} is missing; build it by: npm run build`);
}

/** Strata, as it is without options. */
export async function startStrata(disk: DiskSpec, options: DaemonOptions): Promise<Target> {
  const { inflight = false } = options;
  const socketPath = join(options.directory, `strata-${disk.backing}${inflight ? '-inflight' : ''}.sock`);
  const what =
    disk.backing === 'raw' ? [`--blk-file=${disk.path}`] : [`--bdev=${disk.backing}`, `--size=${disk.sizeBytes}`];
  const args = [
    '-c',
    String(options.core),
    process.execPath,
    PROGRAM,
    `--socket-path=${socketPath}`,
    ...what,
    '--num-queues=1',
  ];
  return Target.start('strata', new Child('taskset', args), socketPath, disk, inflight);
}

/** qemu-storage-daemon with the options that serve it best, or without an iothread: see docs/performance.md. */
export async function startQsd(disk: DiskSpec, options: DaemonOptions): Promise<Target> {
  const socketPath = join(options.directory, `qsd-${disk.backing}.sock`);
  const what =
    disk.backing === 'raw'
      ? // Both daemons hold the same file open, so it cannot be locked.
        `driver=file,filename=${disk.path},aio=io_uring,cache.direct=on,locking=off,discard=unmap`
      : `driver=null-co,size=${disk.sizeBytes},read-zeroes=off`;
  const isThreaded = options.qsd === 'iothread';
  const args = [
    ...['-c', String(options.core), 'qemu-storage-daemon'],
    ...(isThreaded ? ['--object', 'iothread,id=thread'] : []),
    ...['--blockdev', `${what},node-name=disk`],
    '--export',
    `vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=${socketPath},writable=on,num-queues=1` +
      (isThreaded ? ',iothread=thread' : ''),
  ];
  return Target.start('qsd', new Child('taskset', args), socketPath, disk, false);
}

/** A daemon with an attached client. */
export class Target implements AsyncDisposable {
  readonly name: 'strata' | 'qsd';
  readonly pid: number;
  readonly #child: Child;
  readonly #frontend: Frontend;
  readonly #disk: DiskSpec;

  private constructor(name: 'strata' | 'qsd', child: Child, frontend: Frontend, disk: DiskSpec) {
    this.name = name;
    this.pid = child.pid;
    this.#child = child;
    this.#frontend = frontend;
    this.#disk = disk;
  }

  /** Waits for the socket and attaches. Throws with the daemon's output when it does not come up. */
  static async start(
    name: 'strata' | 'qsd',
    child: Child,
    socketPath: string,
    disk: DiskSpec,
    inflight: boolean,
  ): Promise<Target> {
    await waitUntil(() => existsSync(socketPath) || !child.running, START_TIMEOUT_MS);
    try {
      const tracking = mask(ProtocolFeature.inflightShmfd);
      const protocolFeatures = inflight ? PROTOCOL_FEATURES_KNOWN : PROTOCOL_FEATURES_KNOWN & ~tracking;
      const frontend = await Frontend.connect(socketPath, { queueSize: QUEUE_SIZE, protocolFeatures });
      return new Target(name, child, frontend, disk);
    } catch (error) {
      await child.stop(STOP_GRACE_MS);
      throw new Error(`${name} did not come up:\n${child.stdout}${child.stderr}`, { cause: error });
    }
  }

  /** Writes all of the disk once, so that a disk in memory has its memory. */
  fill(): void {
    const { sizeBytes } = this.#disk;
    const blockBytes = 128 * 1024;
    const requestsMax = Math.ceil(sizeBytes / blockBytes);
    const options = { depth: 8, seconds: 600, blockBytes, rangeBytes: sizeBytes, readPercent: 0, requestsMax };
    this.#checked(runLoad(this.#frontend, this.#frontend.queue, { ...options, pattern: 'sequential' }));
  }

  /** One measurement, after a short warm-up that does not count. */
  sample(workload: Workload, depth: number, seconds: number, seed: number): Sample {
    this.#load(workload, depth, Math.min(seconds * WARM_UP_PART, WARM_UP_SECONDS_MAX), seed + 1);
    const cpuBeforeUs = cpuTimeUs(this.pid);
    const result = this.#load(workload, depth, seconds, seed);
    const cpuUs = cpuTimeUs(this.pid) - cpuBeforeUs;
    const { iops, p50Us, p99Us, errors } = result;
    return { iops, p50Us, p99Us, cpuUsPerRequest: cpuUs / result.requests, errors };
  }

  /** System calls per request, in a window that is not timed. */
  async syscallsPerRequest(workload: Workload, depth: number): Promise<number> {
    let requests = 0;
    const calls = await countSyscalls(this.pid, () => {
      requests = this.#load(workload, depth, SYSCALL_SECONDS, 1).requests;
    });
    return calls / requests;
  }

  /** Single reads with pauses between them: what a request meets that comes after some idling. */
  spacedReads(count: number, gapMs: number): LoadResult {
    return this.#checked(
      runLoad(this.#frontend, this.#frontend.queue, {
        depth: 1,
        seconds: 3600,
        rangeBytes: this.#disk.sizeBytes,
        requestsMax: count,
        gapUs: gapMs * 1000,
      }),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#frontend.close();
    await this.#child.stop(STOP_GRACE_MS);
  }

  #load(workload: Workload, depth: number, seconds: number, seed: number): LoadResult {
    const options = { depth, seconds, blockBytes: BLOCK_BYTES, rangeBytes: this.#disk.sizeBytes, seed };
    return this.#checked(
      runLoad(this.#frontend, this.#frontend.queue, { ...options, readPercent: READ_PERCENT[workload] }),
    );
  }

  #checked(result: LoadResult): LoadResult {
    if (result.errors > 0) throw new Error(`${this.name} failed ${result.errors} of ${result.requests} requests`);
    return result;
  }
}
