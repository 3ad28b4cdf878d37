/**
 * Goal: the simulator has teeth. Method: known bugs are put into the source, one by one, and it has to find each. This is the short
 * form; `npm run sim -- --mutations` has the whole list.
 */
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { catchAll } from './catch.js';
import type { Catch } from './catch.js';
import { MUTATIONS } from './mutations.js';

const SEEDS_MAX = 200;
const TIMEOUT_MS = 240_000;

describe('The simulator', () => {
  it('knows bugs that fit the source as it is', () => {
    const misfits = MUTATIONS.flatMap(({ name, file, edits }) => {
      const source = readFileSync(file, 'utf8');
      return edits.filter(([find]) => source.split(find).length !== 2).map(([find]) => `${name}: ${find}`);
    });
    expect(misfits).toEqual([]);
  });

  it('finds the bugs it is given', { timeout: TIMEOUT_MS }, async () => {
    const caught: Catch[] = [];
    const short = MUTATIONS.filter((mutation) => mutation.short === true);
    await catchAll(short, { jobs: 2, seedsMax: SEEDS_MAX }, (one) => caught.push(one));
    console.log(
      caught.map(({ mutation, seeds, message }) => `${seeds} seeds: ${mutation.name}: ${message}`).join('\n'),
    );
    expect(caught.filter(({ seeds }) => seeds === null).map(({ mutation }) => mutation.name)).toEqual([]);
    expect(caught.length).toBeGreaterThanOrEqual(15);
  });
});
