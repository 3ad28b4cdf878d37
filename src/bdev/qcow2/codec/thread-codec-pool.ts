/**
 * Gives jobs to threads, which are native and shared by all reactors of the process (native/codec-pool.cc): they come with
 * the first jobs, sleep when there are none, and go when the last pool is closed.
 *
 *     memory, in 64s   1    header: [0] the reactor sleeps and wants the eventfd to be signalled
 *                      N    jobs
 *                      ..   N completions of 4 bytes: 0, or the index of a job + 1; then N of 4 bytes for the threads
 *
 * Invariants
 * - The index of a job is free, or the job is in flight: with the threads, or in a completion that was not taken.
 * - Completions are set to 0 as they are taken, before their index is free.
 */
import assert from 'node:assert/strict';
import { availableParallelism } from 'node:os';
import { POLLIN, check, native } from '../../../../native/index.js';
import { FdWatch } from '../../../poller/fd-watch.js';
import { PollPhase } from '../../../poller/poller.js';
import type { Poller } from '../../../poller/poller.js';
import type { Reactor } from '../../../poller/reactor.js';
import { JobTable } from './codec-job.js';
import type { CodecJob, CodecPool } from './codec-job.js';

const JOBS_MAX = 256;
const HEADER_BYTES = 64;
const JOBS_AT = HEADER_BYTES;
const COMPLETIONS_AT = JOBS_AT + JOBS_MAX * JobTable.JOB_BYTES;
const MEMORY_BYTES = COMPLETIONS_AT + JOBS_MAX * 8;

/** More threads than that would take the cores from reactors and guests. */
export const CODEC_THREADS_DEFAULT = Math.min(4, availableParallelism());

export class ThreadCodecPool implements CodecPool, Poller {
  readonly #reactor: Reactor;
  readonly #memory: number;
  readonly #ring: number;
  readonly #eventFd: number;
  readonly #watch: FdWatch;
  readonly #table: JobTable;
  readonly #armed: Int32Array;
  readonly #completions: Int32Array;
  readonly #jobs: (CodecJob | null)[] = new Array<CodecJob | null>(JOBS_MAX).fill(null);
  /** Stack of free indices, the first `#freeCount`. */
  readonly #free = Int32Array.from({ length: JOBS_MAX }, (_, i) => i);
  #freeCount = JOBS_MAX;
  /** Place of the next completion. */
  #next = 0;

  /** @param threads of the process, at most. Throws SystemError. */
  constructor(reactor: Reactor, threads = CODEC_THREADS_DEFAULT) {
    const { arena, ring } = reactor;
    this.#reactor = reactor;
    this.#memory = arena.allocate(MEMORY_BYTES);
    this.#table = new JobTable(arena, this.#memory + JOBS_AT, JOBS_MAX);
    this.#armed = new Int32Array(arena.buffer, this.#memory, 1);
    this.#completions = new Int32Array(arena.buffer, this.#memory + COMPLETIONS_AT, JOBS_MAX);
    this.#eventFd = check(native.eventfdCreate(), 'create an eventfd');
    const opened = native.codecOpen(arena.baseAddress + this.#memory, JOBS_MAX, this.#eventFd, threads);
    if (opened < 0) this.#releaseMemory();
    this.#ring = check(opened, 'open a ring for compression threads');
    // That it wakes the reactor is all: completions are polled for.
    this.#watch = new FdWatch(ring, this.#eventFd, POLLIN, () => native.eventfdDrain(this.#eventFd));
    reactor.addPoller(this, PollPhase.take);
  }

  get inflight(): number {
    return JOBS_MAX - this.#freeCount;
  }

  submit(job: CodecJob): boolean {
    if (this.#freeCount === 0) return false;
    const index = this.#free[--this.#freeCount]!;
    this.#jobs[index] = job;
    this.#table.write(index, job);
    native.codecSubmit(this.#ring, index);
    return true;
  }

  poll(): boolean {
    if (this.#freeCount === JOBS_MAX) return false;
    const completions = this.#completions;
    let delivered = 0;
    // Owners submit more, which may be done at once: what is left is for the next step.
    while (delivered < JOBS_MAX) {
      const done = Atomics.load(completions, this.#next);
      if (done === 0) break;
      completions[this.#next] = 0;
      this.#next = (this.#next + 1) % JOBS_MAX;
      delivered++;
      this.#giveBack(done - 1);
    }
    return delivered > 0;
  }

  arm(): boolean {
    if (this.#freeCount === JOBS_MAX) return false;
    Atomics.store(this.#armed, 0, 1);
    return Atomics.load(this.#completions, this.#next) !== 0;
  }

  disarm(): void {
    this.#armed[0] = 0;
  }

  close(): void {
    assert.equal(this.inflight, 0, 'jobs are in flight');
    this.#reactor.removePoller(this);
    this.#watch.close();
    native.codecClose(this.#ring);
    this.#releaseMemory();
  }

  #giveBack(index: number): void {
    const job = this.#jobs[index]!;
    this.#jobs[index] = null;
    this.#table.readAnswer(index, job);
    this.#free[this.#freeCount++] = index;
    job.owner.onCodecDone(job);
  }

  #releaseMemory(): void {
    native.fileClose(this.#eventFd);
    this.#reactor.arena.release(this.#memory);
  }
}

interface Shared {
  readonly pool: ThreadCodecPool;
  users: number;
}
const sharedPools = new WeakMap<Reactor, Shared>();

/** The pool of a reactor, which all its images use; each one closes what it was given. */
export function shareCodecPool(reactor: Reactor, threads = CODEC_THREADS_DEFAULT): CodecPool {
  let shared = sharedPools.get(reactor);
  if (shared === undefined) {
    shared = { pool: new ThreadCodecPool(reactor, threads), users: 0 };
    sharedPools.set(reactor, shared);
  }
  const { pool } = shared;
  shared.users++;
  return {
    get inflight() {
      return pool.inflight;
    },
    submit: (job) => pool.submit(job),
    close: () => {
      if (--shared.users > 0) return;
      sharedPools.delete(reactor);
      pool.close();
    },
  };
}
