/**
 * Goal: a reactor that sleeps does not miss work that comes at any moment, be it between its last look and its sleep.
 *
 * Method: another thread brings work at random moments the way a guest does: it writes to shared memory and signals an eventfd
 * only if it has been asked to. The reactor sleeps on the real ring. A wake-up that was lost would show as a sleep that lasts
 * until its time is up; such sleeps are counted, none may occur while there is work.
 */
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { Arena, POLLIN, check, native } from '../../native/index.js';
import { SystemClock } from '../../src/poller/clock.js';
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller } from '../../src/poller/poller.js';
import { Reactor } from '../../src/poller/reactor.js';
import type { ReactorMode } from '../../src/poller/reactor.js';
import { Uring } from '../../src/poller/uring.js';
import { seededRandom } from '../support/seed.js';

const PIECES = 3000;

// Words of the shared memory.
const BROUGHT = 0;
const TAKEN = 1;
const WANTED = 2;

/** The other side: waits until its last piece was taken, lets a random moment pass, brings the next. */
const producer = `
  const { workerData } = require('node:worker_threads');
  const { writeSync } = require('node:fs');
  const { shared, eventfd, pieces, seed } = workerData;
  const words = new Int32Array(shared);
  const one = Buffer.from([1, 0, 0, 0, 0, 0, 0, 0]);
  let state = seed | 1;
  for (let piece = 1; piece <= pieces; piece++) {
    while (Atomics.load(words, ${TAKEN}) < piece - 1) Atomics.wait(words, ${TAKEN}, piece - 2, 5);
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    for (let spin = (state >>> 16) % 3000; spin > 0; spin--) Atomics.load(words, ${TAKEN});
    Atomics.store(words, ${BROUGHT}, piece);
    if (Atomics.load(words, ${WANTED}) === 1) writeSync(eventfd, one);
  }
`;

/** Takes what was brought; asks for signals only while it sleeps. */
class Consumer implements Poller {
  readonly words: Int32Array;
  readonly #eventfd: number;

  constructor(words: Int32Array, eventfd: number) {
    this.words = words;
    this.#eventfd = eventfd;
  }

  get taken(): number {
    return Atomics.load(this.words, TAKEN);
  }

  poll(): boolean {
    if (!this.#hasWork()) return false;
    Atomics.store(this.words, TAKEN, Atomics.load(this.words, BROUGHT));
    Atomics.notify(this.words, TAKEN);
    return true;
  }

  arm(): boolean {
    native.eventfdDrain(this.#eventfd);
    Atomics.store(this.words, WANTED, 1);
    return this.#hasWork();
  }

  disarm(): void {
    Atomics.store(this.words, WANTED, 0);
  }

  #hasWork(): boolean {
    return Atomics.load(this.words, BROUGHT) !== Atomics.load(this.words, TAKEN);
  }
}

/** A ring that counts the sleeps whose time was up. */
class CountingUring extends Uring {
  sleeps = 0;
  timedOut = 0;

  override wait(timeoutUs: number): boolean {
    this.sleeps++;
    const woken = super.wait(timeoutUs);
    if (!woken) this.timedOut++;
    return woken;
  }
}

async function serve(mode: ReactorMode, pollUs: number): Promise<CountingUring> {
  const arena = new Arena(2 ** 31);
  const ring = new CountingUring(arena);
  const random = seededRandom(3);
  const reactor = new Reactor({ name: mode, arena, ring, clock: new SystemClock(), random, mode, pollUs });
  const eventfd = check(native.eventfdCreate(), 'make an eventfd');
  const shared = new SharedArrayBuffer(16);
  const consumer = new Consumer(new Int32Array(shared), eventfd);
  reactor.addPoller(consumer, PollPhase.take);
  reactor.watchEventLoop(check(native.eventLoopFd(), 'find the event loop'));
  ring.poll(ring.attach({ onCompletion: () => undefined }), eventfd, POLLIN);

  const workerData = { shared, eventfd, pieces: PIECES, seed: random.below(2 ** 31) };
  const worker = new Worker(producer, { eval: true, workerData });
  const ended = new Promise((resolve) => worker.once('exit', resolve));
  while (consumer.taken < PIECES) {
    reactor.runSlice();
    await new Promise((resolve) => setImmediate(resolve));
  }
  await ended;
  ring.close();
  native.fileClose(eventfd);
  return ring;
}

describe('no wake-up is lost', () => {
  it('by a reactor that sleeps whenever it can', async () => {
    const { sleeps, timedOut } = await serve('interrupt', 0);
    expect(sleeps).toBeGreaterThan(PIECES / 10);
    expect(timedOut).toBe(0);
  });

  it('by a reactor that spins for a moment first', async () => {
    const { sleeps, timedOut } = await serve('adaptive', 5);
    expect(sleeps).toBeGreaterThan(0);
    expect(timedOut).toBe(0);
  });

  it('by a reactor that never sleeps', async () => {
    const { sleeps } = await serve('busy', 0);
    expect(sleeps).toBe(0);
  });
});
