/** Seeds on several processes. A process that dies or hangs fails the seed that it was at, and another takes its place. */
import { fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { Mutation } from './mutations.js';
import { emptyTally } from './tally.js';
import type { SeedResult } from './worker.js';

const WORKER = fileURLToPath(new URL('worker.ts', import.meta.url));
const MUTATE = new URL('mutate.mjs', import.meta.url).href;
/** A seed takes a fraction of a second. */
const SEED_MAX_MS = 60_000;

export interface PoolOptions {
  readonly jobs: number;
  /** The next seed to run, undefined when there is none. */
  readonly next: () => number | undefined;
  readonly onResult: (result: SeedResult) => void;
  /** Seeds sent at a time. */
  readonly batch?: number;
  /** A bug to run them with. */
  readonly mutation?: Mutation;
}

export async function runSeeds(options: PoolOptions): Promise<void> {
  await Promise.all(Array.from({ length: options.jobs }, () => runJob(options)));
}

async function runJob(options: PoolOptions): Promise<void> {
  for (;;) {
    const isDone = await runProcess(options);
    if (isDone) return;
  }
}

/** Returns whether there is nothing left to run. */
function runProcess(options: PoolOptions): Promise<boolean> {
  const { next, onResult, batch: batchSize = 4, mutation } = options;
  const env = { ...process.env, STRATA_SIM_MUTATION: JSON.stringify(mutation) };
  const loader = mutation === undefined ? [] : ['--import', MUTATE];
  return new Promise((resolve) => {
    let batch: number[] = [];
    let watchdog: NodeJS.Timeout | undefined;
    // It runs what the terminal's Ctrl-C is meant for, but is ended by us.
    const child = fork(WORKER, {
      env,
      execArgv: ['--import', 'tsx', ...loader],
      detached: true,
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    const send = (): void => {
      for (let seed = batch.length < batchSize ? next() : undefined; seed !== undefined; seed = next()) {
        batch.push(seed);
        if (batch.length === batchSize) break;
      }
      if (batch.length > 0) child.send(batch);
      else child.disconnect();
      watch();
    };
    const watch = (): void => {
      clearTimeout(watchdog);
      if (batch.length > 0) watchdog = setTimeout(() => child.kill('SIGKILL'), SEED_MAX_MS);
    };
    child.on('message', (result: SeedResult) => {
      batch = batch.filter((seed) => seed !== result.seed);
      onResult(result);
      if (batch.length === 0) send();
      else watch();
    });
    child.on('exit', (code, signal) => {
      clearTimeout(watchdog);
      const [seed] = batch;
      if (seed === undefined) {
        resolve(true);
        return;
      }
      onResult(failed(seed, `the process ended by ${signal ?? `exit code ${code}`}`));
      // The rest of the batch is lost with it: it is run by the next process.
      const rest = batch.slice(1);
      resolve(rest.length === 0 ? false : runProcess({ ...options, next: () => rest.shift() ?? next() }));
    });
    send();
  });
}

function failed(seed: number, message: string): SeedResult {
  return { seed, hash: '', tally: emptyTally(), failure: { message, step: 0, events: [] } };
}
