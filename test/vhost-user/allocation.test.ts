/**
 * Goal: from the virtqueue to the bdev and back, a request allocates nothing at steady state, so that nothing is ever
 * collected.
 *
 * Method: a million requests of the native load generator over the real socket and shared memory, on a device process
 * that counts its garbage collections and the growth of its heap meanwhile. The smallest object takes 12 bytes, so one
 * per request would show twelvefold.
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { afterEach, describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { runLoad } from '../frontend/load.js';
import type { Order, Report } from './allocation-device.js';

const REQUESTS = 1_000_000;
const WARM_UP_REQUESTS = 200_000;
const BYTES_PER_REQUEST_MAX = 1;
/** Code is compiled anew for a while: the best of some rounds counts. */
const ROUNDS_MAX = 4;
const TIMEOUT_MS = 240_000;

interface Round {
  readonly collections: number;
  readonly bytesPerRequest: number;
}

const closers: (() => void | Promise<unknown>)[] = [];

afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

async function startDevice(...args: string[]): Promise<{ child: ChildProcess; socketPath: string }> {
  const entry = new URL('allocation-device.ts', import.meta.url);
  const child = fork(entry, args, { execArgv: ['--import', 'tsx', '--expose-gc'] });
  closers.push(async () => {
    const exited = once(child, 'exit');
    child.disconnect();
    await exited;
  });
  const { socketPath } = (await answer(child)) as { socketPath: string };
  return { child, socketPath };
}

async function answer(child: ChildProcess): Promise<Report> {
  const [report] = (await Promise.race([
    once(child, 'message'),
    once(child, 'exit').then(() => Promise.reject(new Error('the device ended'))),
  ])) as [Report];
  return report;
}

/** Runs rounds until one is clean, and returns the best. */
async function bestRound(readPercent: number, roundsMax: number, ...args: string[]): Promise<Round> {
  const { child, socketPath } = await startDevice(...args);
  const frontend = await Frontend.connect(socketPath);
  closers.push(() => frontend.close());
  const load = (requestsMax: number): void => {
    const limits = { seconds: TIMEOUT_MS / 1000, requestsMax, rangeBytes: 2 ** 24 };
    const { requests, errors } = runLoad(frontend, frontend.queue, {
      depth: 128,
      readPercent,
      polite: true,
      ...limits,
    });
    expect([requests, errors]).toEqual([requestsMax, 0]);
  };
  load(WARM_UP_REQUESTS);
  let best: Round = { collections: Infinity, bytesPerRequest: Infinity };
  for (let round = 0; round < roundsMax && !isClean(best); round++) {
    const began = answer(child);
    child.send({ requests: REQUESTS } satisfies Order);
    expect(await began).toEqual({ began: true });
    const reported = answer(child);
    load(REQUESTS);
    const { collections, grownBytes } = (await reported) as Extract<Report, { collections: number }>;
    const bytesPerRequest = grownBytes / REQUESTS;
    if (collections <= best.collections && bytesPerRequest < best.bytesPerRequest) {
      best = { collections, bytesPerRequest };
    }
  }
  return best;
}

function isClean({ collections, bytesPerRequest }: Round): boolean {
  return collections === 0 && bytesPerRequest < BYTES_PER_REQUEST_MAX;
}

describe('a million requests over the socket', { timeout: TIMEOUT_MS }, () => {
  it.each([
    ['reads of a null disk', 100, 'null'],
    ['writes and reads of a disk in memory', 50, 'malloc'],
  ])('allocate nothing: %s', async (_, readPercent, module) => {
    const { collections, bytesPerRequest } = await bestRound(readPercent, ROUNDS_MAX, module);
    expect(collections).toBe(0);
    expect(bytesPerRequest).toBeLessThan(BYTES_PER_REQUEST_MAX);
  });

  it('and a single small object for each would be noticed', async () => {
    const { collections } = await bestRound(100, 1, 'null', 'waste');
    expect(collections).toBeGreaterThan(0);
  });
});
