/** A process that runs the seeds it is sent, one after the other. */
import { makePlan } from './plan.js';
import { simulate } from './simulation.js';
import type { Outcome } from './simulation.js';

export interface SeedResult extends Outcome {
  readonly seed: number;
}

process.on('message', (seeds: readonly number[]) => {
  for (const seed of seeds) process.send!({ seed, ...simulate(makePlan(seed)) } satisfies SeedResult);
});
process.on('disconnect', () => process.exit());
