/** The seed of all that is random in a test run: new each time, printed, and taken from STRATA_SEED to repeat a run. */
import { SeededRandom } from '../../src/poller/clock.js';

function chooseSeed(): number {
  const given = process.env['STRATA_SEED'];
  if (given !== undefined && given !== '') return Number(given) | 0;
  const fresh = Math.floor(Math.random() * 0x7fffffff);
  console.log(`random tests: repeat this run with STRATA_SEED=${fresh}`);
  return fresh;
}

export const seed = chooseSeed();

/** A source of its own for each user, so that one test's draws do not depend on another's. */
export function seededRandom(salt: number): SeededRandom {
  return new SeededRandom(seed + salt);
}
