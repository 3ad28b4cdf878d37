/** The soak's second half: seeds of the simulator that were never run, one after the other, until the time is up. */
import { runSeeds } from '../sim/pool.js';
import { emptyTally } from '../sim/tally.js';
import type { Tally } from '../sim/tally.js';

const JOBS = 2;
const PROGRESS_MS = 60_000;
/** After so many failures there is no point in going on. */
const FAILURES_MAX = 10;
/** Beyond the seeds that are run every day. */
const FIRST_SEED = 1_000_000;

/** Returns what went wrong, or undefined. Prints a line of JSON. */
export async function runSimulator(
  minutes: number,
  seed: number,
  isInterrupted: () => boolean,
): Promise<string | undefined> {
  const endMs = performance.now() + minutes * 60_000;
  const first = FIRST_SEED + (seed % 1_000_000_000);
  const failed: number[] = [];
  const total: Tally = emptyTally();
  let next = first;
  let done = 0;
  let reportedMs = performance.now();
  await runSeeds({
    jobs: JOBS,
    next: () => (isInterrupted() || performance.now() >= endMs || failed.length >= FAILURES_MAX ? undefined : next++),
    onResult: (result) => {
      done++;
      for (const key of Object.keys(total) as (keyof Tally)[]) total[key] += result.tally[key];
      if (result.failure !== null) {
        failed.push(result.seed);
        console.error(`seed ${result.seed}: ${result.failure.message}\n    npm run sim -- --seed ${result.seed}`);
      }
      if (performance.now() - reportedMs < PROGRESS_MS) return;
      reportedMs = performance.now();
      console.error(`${done} seeds of the simulator from ${first} on, ${failed.length} failed`);
    },
  });
  console.log(JSON.stringify({ simulator: { firstSeed: first, seeds: done, failed, ...total } }));
  return failed.length > 0 ? `${failed.length} seeds of the simulator failed: ${failed.join(' ')}` : undefined;
}
