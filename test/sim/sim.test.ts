/**
 * Goal: whatever the disk, the guest and the power do, the daemon keeps its promises: nothing that was answered is lost, nothing
 * is read that nobody wrote, every request is answered once.
 *
 * Method: the simulator on the seeds that once failed and on some others, spread; `npm run sim -- --seeds 10000` runs the rest.
 */
import { execFileSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { CONTROLS, makePlan } from './plan.js';
import { keptSeeds } from './seeds.js';
import { simulate } from './simulation.js';
import { emptyTally } from './tally.js';

const SEEDS = 150;
/** Distance of the seeds: other ones than the long form begins with. */
const STRIDE = 7919;
const WITHIN = { timeout: 240_000 };
/** Deaths that are tried in a conversation and the requests around it. */
const EVENTS_MAX = 100;
/** Longer than any conversation takes, the first one included. */
const CONVERSATION_US = 5_000;

describe('The simulator', () => {
  it('finds no broken promise', WITHIN, () => {
    const total = emptyTally();
    for (const seed of [...keptSeeds(), ...Array.from({ length: SEEDS }, (_, i) => i * STRIDE)]) {
      const { failure, tally } = simulate(makePlan(seed));
      expect(failure, `seed ${seed}: look with npm run sim -- --seed ${seed}`).toBeNull();
      for (const key of Object.keys(total) as (keyof typeof total)[]) total[key] += tally[key];
    }
    // A simulator in which nothing happens finds nothing.
    for (const [what, count] of Object.entries(total)) expect(count, what).toBeGreaterThan(10);
  });

  it.each(['split', 'packed'])('finds none when the daemon dies anywhere in a conversation: %s', WITHIN, (kind) => {
    const { seed, setup } = makePlan(0);
    const plain = { leaf: 'uring', queues: 2, packed: kind === 'packed', watchesStores: true } as const;
    const complete = { ...setup, ...plain, withoutFeatures: [], withoutProtocolFeatures: [] };
    const write = { pauseUs: 0, seed: 0, kind: 'request', type: 'write', queue: 0, sector: 8, sectors: 8 } as const;
    const late = { seed: 0, pauseUs: CONVERSATION_US };
    for (const control of CONTROLS) {
      const talk = { pauseUs: 0, seed: 0, kind: 'control', control, queue: 0 } as const;
      let kills = 0;
      do {
        const end = { ...late, kind: 'end', end: 'kill', afterEvents: kills + 1 } as const;
        const actions = [write, { ...write, ...late }, end, write, talk, { ...write, ...late }, write];
        const { failure, tally } = simulate({ seed, setup: complete, actions });
        expect(failure, `${control}, after ${kills} events`).toBeNull();
        if (tally.kills === 0) break;
        kills++;
      } while (kills < EVENTS_MAX);
      expect(kills, control).toBeGreaterThan(10);
    }
  });

  // A raw disk cannot notice: that the oracle does shows what it would see of a module that promised to.
  it.each(['flip', 'lose', 'misdirect'] as const)('sees a device that does this to data: %s', (fault) => {
    const seen = Array.from({ length: 20 }, (_, seed) => {
      const plan = makePlan(seed);
      const faults = Array.from({ length: 10 }, (_, i) => ({ kind: 'fault', fault, afterIos: 1 + i * 3 }) as const);
      const actions = faults.map((one) => ({ ...one, pauseUs: 0, seed: 0 }));
      return simulate({ ...plan, setup: { ...plan.setup, leaf: 'uring' }, actions: [...actions, ...plan.actions] });
    });
    expect(seen.filter(({ failure }) => failure !== null).length).toBeGreaterThan(10);
    expect(seen.some(({ failure }) => /holds/.test(failure?.message ?? ''))).toBe(true);
  });

  it('does exactly the same again, in this process and in others', WITHIN, () => {
    // The last ones with an image on the disk.
    const seeds = [3, 14, 15, 22, 55];
    expect(seeds.map((seed) => makePlan(seed).setup.image !== null)).toEqual([false, false, false, true, true]);
    const here = seeds.map((seed) => simulate(makePlan(seed)).hash);
    expect(new Set(here).size).toBe(seeds.length);
    expect(seeds.map((seed) => simulate(makePlan(seed)).hash)).toEqual(here);
    const elsewhere = seeds.map((seed) => {
      const args = ['--import', 'tsx', 'test/sim/run.ts', '--seed', String(seed), '-o', 'json'];
      return (JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })) as { hash: string }).hash;
    });
    expect(elsewhere).toEqual(here);
  });
});
