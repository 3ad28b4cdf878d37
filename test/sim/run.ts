/**
 * `npm run sim`: the simulator's command line.
 *
 *     npm run sim                        the kept seeds and a thousand new ones
 *     npm run sim -- --seed 17           one seed, in this process; with --trace FILE every event of it
 *     npm run sim -- --seeds 10000       as many, on all cores; from --from on
 *     npm run sim -- --crashes 4         crash enumeration, every sequence of so many operations: see test/harness/
 *     npm run sim -- --mutations         puts known bugs into the source, one by one: each has to be found
 *
 * A failure prints seed, commit, step and the last events, and the fewest actions it takes. Exits with 0 when nothing failed, 1
 * when something did, 130 when it was interrupted. Leaves its totals in .cache/results/sim.txt.
 */
import { execFileSync } from 'node:child_process';
import { createWriteStream } from 'node:fs';
import { availableParallelism } from 'node:os';
import { Command, InvalidArgumentError } from 'commander';
import { numberOption } from '../../src/target/options.js';
import { CRASH_CASES } from '../harness/cases.js';
import { crashEnumeration } from '../harness/crash-enumeration.js';
import { leaveTotals } from '../support/totals.js';
import { catchAll } from './catch.js';
import type { Catch } from './catch.js';
import { MUTATIONS } from './mutations.js';
import { makePlan } from './plan.js';
import type { Plan } from './plan.js';
import { runSeeds } from './pool.js';
import { keptSeeds } from './seeds.js';
import { keepOnly, shrink } from './shrink.js';
import { simulate } from './simulation.js';
import type { Failure } from './simulation.js';
import { emptyTally } from './tally.js';
import type { Tally } from './tally.js';
import type { SeedResult } from './worker.js';

const SEED_MAX = 0x7fffffff;
const INTERRUPTED = 130;
const PROGRESS_MS = 500;
/** A bug that is not found in so many seeds is not found. */
const MUTATION_SEEDS_MAX = 1500;
/** Failures reported in full. */
const REPORTS_MAX = 3;
/** After so many failures there is no point in going on. */
const FAILURES_MAX = 10;

interface Options {
  readonly seed?: number;
  readonly seeds: number;
  readonly from: number;
  readonly jobs: number;
  readonly keep?: readonly number[];
  readonly trace?: string;
  readonly mutations?: string | true;
  readonly crashes?: number;
  readonly output: 'text' | 'json';
}

function parseOptions(): Options {
  return new Command('sim')
    .description('Runs the daemon on simulated ring, disk, clock and guest, one run for each seed.')
    .option('--seed <number>', 'run this one seed', numberOption(0, SEED_MAX))
    .option('--seeds <count>', 'run so many seeds, and the kept ones', numberOption(0, SEED_MAX), 1000)
    .option('--from <number>', 'the first of them', numberOption(0, SEED_MAX), 1)
    .option('--jobs <count>', 'processes', numberOption(1, 256), availableParallelism())
    .option('--keep <list>', 'of the one seed, these actions only, as 1,4,7', listOption)
    .option('--trace <file>', 'write every event of the one seed')
    .option('--mutations [text]', 'put known bugs in, those with the text in their names, and see that each is found')
    .option('--crashes <operations>', 'enumerate crashes in every sequence of so many operations', numberOption(1, 4))
    .option('-o, --output <format>', 'text or json', outputOption, 'text')
    .parse()
    .opts();
}

function listOption(text: string): number[] {
  if (/^\d+(,\d+)*$/.test(text)) return text.split(',').map(Number);
  throw new InvalidArgumentError('Write numbers with commas between.');
}

function outputOption(text: string): string {
  if (text === 'text' || text === 'json') return text;
  throw new InvalidArgumentError('Write text or json.');
}

function commit(): string {
  try {
    return execFileSync('git', ['describe', '--always', '--dirty'], { encoding: 'utf8' }).trim();
  } catch {
    return 'unknown';
  }
}

/** What is to be known of a failure, with the smallest plan that shows it. */
function report(plan: Plan, failure: Failure): string {
  const { setup, actions, seed } = plan;
  const small = shrink(plan, failure);
  return [
    `seed ${seed} failed at step ${failure.step}, commit ${commit()}: ${failure.message}`,
    `stack: ${setup.stack}; ${setup.queues} queues of ${setup.queueSize}, depth ${setup.depth}, ${setup.sectors} sectors`,
    'the last events:',
    ...failure.events,
    `with ${small.kept.length} of ${actions.length} actions it fails with: ${small.failure.message.split('\n')[0]}`,
    ...small.kept.map((i) => `    ${i}: ${JSON.stringify(actions[i])}`),
    `repeat: npm run sim -- --seed ${seed}    small: npm run sim -- --seed ${seed} --keep ${small.kept.join(',')}`,
  ].join('\n');
}

function add(total: Tally, tally: Tally): void {
  for (const key of Object.keys(total) as (keyof Tally)[]) total[key] += tally[key];
}

/** Returns the exit code. */
function runOne(options: Options, seed: number): number {
  const whole = makePlan(seed);
  const plan = options.keep === undefined ? whole : keepOnly(whole, options.keep);
  const stream = options.trace === undefined ? null : createWriteStream(options.trace);
  const { hash, tally, failure } = simulate(plan, stream === null ? null : (line) => stream.write(`${line}\n`));
  stream?.end();
  if (options.output === 'json') {
    console.log(JSON.stringify({ seed, commit: commit(), stack: plan.setup.stack, hash, tally, failure }));
  } else if (failure === null) {
    console.log(`seed ${seed} passed: ${plan.setup.stack}; ${describe(tally)}; trace ${hash}`);
  } else {
    console.log(report(plan, failure));
  }
  return failure === null ? 0 : 1;
}

function describe(tally: Tally): string {
  return (
    `${tally.requests} requests, ${tally.sectorsChecked} sectors checked, ${tally.ios} disk requests, ${tally.faults} faults, ` +
    `${tally.kills} kills, ${tally.powerCuts} power cuts, ${tally.stops} stops, ${tally.controls} session changes, ${tally.edits} edits of images, ${tally.pivots} moves to another disk`
  );
}

/** Returns the exit code. */
async function runMany(options: Options): Promise<number> {
  const kept = keptSeeds();
  const seeds = [...kept, ...Array.from({ length: options.seeds }, (_, i) => options.from + i)];
  const total = emptyTally();
  const failures: { seed: number; failure: Failure }[] = [];
  const startMs = performance.now();
  let done = 0;
  let at = 0;
  let interrupted = false;
  process.on('SIGINT', () => (interrupted = true)).on('SIGTERM', () => (interrupted = true));
  const progress = (): string => {
    const seconds = (performance.now() - startMs) / 1000;
    return `${done} of ${seeds.length} seeds, ${failures.length} failed, ${seconds.toFixed(0)} s`;
  };
  const isLive = process.stderr.isTTY && options.output === 'text';
  const ticker = setInterval(() => isLive && process.stderr.write(`\r${progress()} `), PROGRESS_MS);
  await runSeeds({
    jobs: Math.min(options.jobs, seeds.length),
    next: () => (interrupted || failures.length >= FAILURES_MAX ? undefined : seeds[at++]),
    onResult: ({ seed, tally, failure }: SeedResult) => {
      done++;
      add(total, tally);
      if (failure !== null) failures.push({ seed, failure });
    },
  });
  clearInterval(ticker);
  if (isLive) process.stderr.write('\r');
  failures.sort((a, b) => a.seed - b.seed);
  // What ended its process cannot be looked at in this one.
  const reports = failures
    .slice(0, REPORTS_MAX)
    .map(({ seed, failure }) =>
      failure.events.length === 0 ? `seed ${seed} failed: ${failure.message}` : report(makePlan(seed), failure),
    );
  if (options.output === 'json') {
    console.log(JSON.stringify({ commit: commit(), seeds: done, interrupted, tally: total, failures }));
  } else {
    for (const text of reports) console.log(`${text}\n`);
    console.log(`${progress()}: ${describe(total)}`);
    if (failures.length > 0) console.log(`failed: ${failures.map(({ seed }) => seed).join(' ')}`);
  }
  const remarks = failures.map(({ seed, failure }) => `FAILED sim: seed ${seed}: ${failure.message.split('\n')[0]}`);
  leaveTotals('sim', done - failures.length, failures.length, remarks);
  return failures.length > 0 ? 1 : interrupted ? INTERRUPTED : 0;
}

/** Returns the exit code. */
async function runMutations(options: Options): Promise<number> {
  const caught: Catch[] = [];
  const text = typeof options.mutations === 'string' ? options.mutations : '';
  const mutations = MUTATIONS.filter(({ name }) => name.includes(text));
  await catchAll(mutations, { jobs: options.jobs, seedsMax: MUTATION_SEEDS_MAX }, (one) => {
    caught.push(one);
    if (options.output === 'json') return;
    const verdict = one.seeds === null ? 'NOT FOUND' : `${one.seeds} seeds`;
    console.log(`${verdict.padEnd(10)} ${one.mutation.name}: ${one.message}`);
  });
  const remarks = caught.filter(({ seeds }) => seeds === null).map(({ mutation }) => `NOT FOUND ${mutation.name}`);
  const missed = remarks.length;
  leaveTotals('mutations', caught.length - missed, missed, remarks);
  if (options.output === 'json') {
    console.log(JSON.stringify(caught.map(({ mutation: { name }, seeds, message }) => ({ name, seeds, message }))));
  } else {
    console.log(`${caught.length - missed} of ${caught.length} bugs found`);
  }
  return missed > 0 ? 1 : 0;
}

/** Returns the exit code. */
function runCrashes(length: number): number {
  for (const { name, ...rest } of CRASH_CASES) {
    console.log(`${name}: ${JSON.stringify(crashEnumeration({ ...rest, length }))}`);
  }
  return 0;
}

const options = parseOptions();
if (options.crashes !== undefined) process.exitCode = runCrashes(options.crashes);
else if (options.mutations !== undefined) process.exitCode = await runMutations(options);
else process.exitCode = options.seed === undefined ? await runMany(options) : runOne(options, options.seed);
