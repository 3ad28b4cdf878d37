/** fio straight on the file: the floor, what the kernel alone makes of the same requests. */
import { Child } from '../test/guest/child.js';
import { runCountingSyscalls } from './process-cost.js';
import { BLOCK_BYTES } from './scenario.js';
import type { Sample, Workload } from './scenario.js';

export interface FioOptions {
  readonly path: string;
  /** It runs where the daemons run. */
  readonly core: number;
}

const RW: Readonly<Record<Workload, readonly string[]>> = {
  read: ['--rw=randread'],
  write: ['--rw=randwrite'],
  mix: ['--rw=randrw', '--rwmixread=70'],
};
const WARM_UP_SECONDS = 0.5;
const SYSCALL_SECONDS = 1;

interface FioDirection {
  readonly total_ios: number;
  readonly iops: number;
  readonly lat_ns: { readonly percentile?: Readonly<Record<string, number>> };
}

interface FioJob {
  readonly read: FioDirection;
  readonly write: FioDirection;
  /** Milliseconds. */
  readonly job_runtime: number;
  /** Percent of the run time. */
  readonly usr_cpu: number;
  readonly sys_cpu: number;
  readonly error: number;
}

/** As plain as can be: io_uring, O_DIRECT, one thread, a registered file. */
function fioCommand({ path, core }: FioOptions, workload: Workload, depth: number, extra: readonly string[]): string[] {
  return [
    ...['-c', String(core), 'fio', '--name=floor', `--filename=${path}`, ...RW[workload]],
    ...['--ioengine=io_uring', '--direct=1', '--registerfiles=1', `--bs=${BLOCK_BYTES}`, `--iodepth=${depth}`],
    ...['--thread', '--norandommap', '--randrepeat=0', '--disable_clat=1', '--disable_slat=1', '--lat_percentiles=1'],
    ...['--output-format=json', ...extra],
  ];
}

/** Throws with fio's output when it fails. */
export async function fioSample(
  options: FioOptions,
  workload: Workload,
  depth: number,
  seconds: number,
): Promise<Sample> {
  const timing = ['--time_based', `--runtime=${time(seconds)}`, `--ramp_time=${time(WARM_UP_SECONDS)}`];
  const child = new Child('taskset', fioCommand(options, workload, depth, timing));
  const { code } = await child.exited;
  if (code !== 0) throw new Error(`fio failed:\n${child.stdout}${child.stderr}`);
  const job = parseJob(child.stdout);
  const cpuUs = ((job.usr_cpu + job.sys_cpu) / 100) * job.job_runtime * 1000;
  // fio keeps the latencies of a mix apart: the larger part speaks for the whole.
  const main = job.read.total_ios >= job.write.total_ios ? job.read : job.write;
  const percentileUs = (name: string): number => main.lat_ns.percentile![name]! / 1000;
  return {
    iops: job.read.iops + job.write.iops,
    p50Us: percentileUs('50.000000'),
    p99Us: percentileUs('99.000000'),
    cpuUsPerRequest: cpuUs / requestsOf(job),
    errors: job.error,
  };
}

/** Of a whole run, less those of a run that does next to nothing. */
export async function fioSyscallsPerRequest(options: FioOptions, workload: Workload, depth: number): Promise<number> {
  const run = async (extra: readonly string[]): Promise<{ calls: number; requests: number }> => {
    const { calls, stdout } = await runCountingSyscalls('taskset', fioCommand(options, workload, depth, extra));
    return { calls, requests: requestsOf(parseJob(stdout)) };
  };
  const long = await run(['--time_based', `--runtime=${time(SYSCALL_SECONDS)}`]);
  const short = await run([`--io_size=${BLOCK_BYTES * depth}`]);
  return (long.calls - short.calls) / (long.requests - short.requests);
}

function parseJob(output: string): FioJob {
  // Warnings may come before the document.
  const { jobs } = JSON.parse(output.slice(output.indexOf('{'))) as { readonly jobs: readonly FioJob[] };
  return jobs[0]!;
}

function requestsOf(job: FioJob): number {
  return job.read.total_ios + job.write.total_ios;
}

/** As fio reads it: a number without a unit is cut to whole seconds, and 0 of them never end. */
const time = (seconds: number): string => `${Math.round(seconds * 1000)}ms`;
