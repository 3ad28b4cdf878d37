/** The benchmark's command line. */
import { cpus } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command, InvalidArgumentError, Option } from 'commander';
import { numberOption, sizeOption } from '../src/target/options.js';
import { CONVERT_CASES } from './convert.js';
import type { ConvertCase } from './convert.js';
import { QCOW2_CASES } from './qcow2.js';
import type { Qcow2Case } from './qcow2.js';
import { BACKINGS, DEPTHS, WORKLOADS } from './scenario.js';
import type { Backing, Workload } from './scenario.js';

export interface BenchOptions {
  readonly only: readonly Backing[];
  readonly workload: readonly Workload[];
  readonly depth: readonly number[];
  readonly rounds: number;
  /** Length of a sample. */
  readonly seconds: number;
  /** Where the raw file is made. */
  readonly dir: string;
  /** Bytes of the raw file, and of the malloc disk. */
  readonly fileSize: number;
  readonly memorySize: number;
  readonly targetCore: number;
  readonly clientCore: number;
  /** Where the results go. */
  readonly out: string;
  /** Whether qemu-storage-daemon serves from a thread of its own, which it does best, or from its main loop, as it does unasked. */
  readonly qsd: 'iothread' | 'plain';
  /** Measure the floor. */
  readonly fio: boolean;
  readonly idle: boolean;
  readonly inflight: boolean;
  readonly restart: boolean;
  /** Some of the cases, or true: all. */
  readonly convert?: true | readonly ConvertCase[];
  readonly check: boolean;
  readonly qcow2?: readonly Qcow2Case[];
}

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const SECONDS_MAX = 3600;
const DEPTH_MAX = 128;

/** What --quick stands for, where the command line says nothing else. */
const QUICK = { rounds: 1, seconds: 0.25, fileSize: 2 ** 28, memorySize: 2 ** 26, depth: [1, 32] };

/** Parses the command line of the process; ends the process when it is wrong. */
export function parseOptions(): BenchOptions {
  const cores = cpus().length;
  const core = numberOption(0, cores - 1);
  const program = new Command('bench')
    .description('Compares Strata with qemu-storage-daemon, and with fio straight on the file.')
    .option('--only <disks>', `some of ${BACKINGS.join(',')}`, someOf(BACKINGS), [...BACKINGS])
    .option('--workload <names>', `some of ${WORKLOADS.join(',')}`, someOf(WORKLOADS), [...WORKLOADS])
    .option('--depth <depths>', 'requests in flight, as 1,32', depths, DEPTHS)
    .option('--rounds <number>', 'rounds per point', numberOption(1, 1000), 5)
    .option('--seconds <seconds>', 'length of a sample', seconds, 2)
    .option('--dir <folder>', 'where the raw file is made', join(ROOT, '.cache', 'bench'))
    .option('--file-size <size>', 'of the raw file', sizeOption, 2 ** 32)
    .option('--memory-size <size>', 'of the malloc disk', sizeOption, 2 ** 29)
    .option('--target-core <number>', 'core of the daemons and of fio', core, 0)
    .option('--client-core <number>', 'core of the client', core, Math.min(1, cores - 1))
    .option('--out <folder>', 'where the results go', join(ROOT, 'bench', 'results'))
    .addOption(
      new Option('--qsd <how>', 'qemu-storage-daemon with an iothread, its best, or as it is')
        .choices(['iothread', 'plain'])
        .default('iothread'),
    )
    .option('--no-fio', 'leave the floor out')
    .option('--quick', 'a smoke test: few points, short, small')
    .option('--idle', 'measure idle daemons instead')
    .option('--inflight', 'measure what it costs to track requests in flight instead (not on raw disks)')
    .option(
      '--restart',
      'measure how long a guest waits while Strata is killed and started again, once a round, instead',
    )
    .option(
      '--convert [cases]',
      `measure how long images take to be converted instead: some of ${CONVERT_CASES.join(',')}`,
      someOf(CONVERT_CASES),
    )
    .option('--check', 'measure how long a large image takes to be checked instead')
    .option('--qcow2 <cases>', `measure qcow2 images instead: some of ${QCOW2_CASES.join(',')}`, someOf(QCOW2_CASES))
    .parse();
  const given = program.opts<BenchOptions & { readonly quick?: boolean }>();
  if (given.quick !== true) return given;
  const isOpen = ([name]: [string, unknown]): boolean => program.getOptionValueSource(name) === 'default';
  return { ...given, ...Object.fromEntries(Object.entries(QUICK).filter(isOpen)) };
}

function someOf<T extends string>(known: readonly T[]): (text: string) => T[] {
  return (text) =>
    text.split(',').map((name) => {
      const found = known.find((candidate) => candidate === name);
      if (found === undefined) throw new InvalidArgumentError(`Write some of ${known.join(',')}.`);
      return found;
    });
}

function depths(text: string): number[] {
  return text.split(',').map(numberOption(1, DEPTH_MAX));
}

function seconds(text: string): number {
  const value = Number(text);
  if (value > 0 && value <= SECONDS_MAX) return value;
  throw new InvalidArgumentError(`Write a number of seconds up to ${SECONDS_MAX}.`);
}
