/** Making a failure small: the fewest actions, and the plainest stack, with which a plan still fails. */
import type { Plan } from './plan.js';
import { simulate } from './simulation.js';
import type { Failure } from './simulation.js';

export interface Shrunk {
  readonly plan: Plan;
  /** Numbers of the actions that are left, as the seed made them. */
  readonly kept: readonly number[];
  readonly failure: Failure;
}

/** @param runsMax bound of what it may cost */
export function shrink(plan: Plan, failure: Failure, runsMax = 400): Shrunk {
  let best: Shrunk = { plan, kept: plan.actions.map((_, i) => i), failure };
  let runs = 0;
  const attempt = (kept: readonly number[], setup: Plan['setup']): boolean => {
    if (runs++ >= runsMax) return false;
    const smaller = { ...plan, setup, actions: kept.map((i) => plan.actions[i]!) };
    const outcome = simulate(smaller);
    if (outcome.failure === null) return false;
    best = { plan: smaller, kept, failure: outcome.failure };
    return true;
  };
  for (let i = plan.setup.filters.length - 1; i >= 0; i--) {
    const { setup } = best.plan;
    attempt(best.kept, { ...setup, filters: setup.filters.filter((_, k) => k !== i), stack: `${setup.stack} (less)` });
  }
  // Delta debugging: ever smaller parts are left out as long as it fails without them.
  for (let parts = 2; best.kept.length > 1 && runs < runsMax;) {
    const { kept } = best;
    const size = Math.ceil(kept.length / parts);
    let found = false;
    for (let at = 0; at < kept.length && !found; at += size) {
      found = attempt([...kept.slice(0, at), ...kept.slice(at + size)], best.plan.setup);
    }
    if (found) parts = Math.max(parts - 1, 2);
    else if (size === 1) break;
    else parts = Math.min(parts * 2, kept.length);
  }
  return best;
}

/** A plan with some of its actions only. */
export function keepOnly(plan: Plan, kept: readonly number[]): Plan {
  return { ...plan, actions: kept.map((i) => plan.actions[i]!).filter((action) => action !== undefined) };
}
