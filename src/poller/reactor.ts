/**
 * A reactor: one thread's loop over pollers, timers and its ring. It shares nothing with other reactors.
 *
 * One step: read the clock, deliver ring completions, run due timers, run the pollers phase by phase, enter the ring. `step()`
 * never sleeps, so a test or a simulator drives it by hand; `runSlice()` is the production loop around it.
 *
 * Invariants
 * - A reactor sleeps only after every armable poller has asked its source for a wake-up and found no work after asking:
 *   no wake-up is lost.
 * - Nothing here allocates per step.
 */
import { POLLIN } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import type { Clock, Random } from './clock.js';
import { FdWatch } from './fd-watch.js';
import { MemoryRanges } from './memory-ranges.js';
import type { PollPhase, Poller, Timer } from './poller.js';
import type { Ring } from './ring.js';
import { TimerHeap } from './timer-heap.js';

/** adaptive: spin for `pollUs` after work, then sleep. busy: never sleep. interrupt: never spin. */
export type ReactorMode = 'adaptive' | 'busy' | 'interrupt';

export interface ReactorOptions {
  readonly name: string;
  readonly arena: Arena;
  readonly ring: Ring;
  readonly clock: Clock;
  readonly random: Random;
  readonly mode: ReactorMode;
  /** How long an adaptive reactor spins without work before it sleeps. */
  readonly pollUs: number;
  /** Where the counters go, REACTOR_STAT_COUNT entries; shared memory lets another thread read them. */
  readonly stats?: Float64Array;
}

/** Indices into the counters of a reactor. */
export const ReactorStat = { busyUs: 0, idleUs: 1, sleepUs: 2, steps: 3, sleeps: 4 } as const;
export const REACTOR_STAT_COUNT = 5;

/** Longest sleep: bounds what a lost wake-up of the event loop could cost. */
const SLEEP_MAX_US = 1_000_000;
/** A guest that polls answers a completion with its next request within this time. */
const ANSWER_US = 3;
const COMPLETION_WAIT_MAX_US = 1_000;
/** From this many requests in flight on, a completion is expected any moment. */
const DEEP_INFLIGHT = 8;
/** Longest that a guest's new request may lie unseen while others are in flight. */
const UNARMED_SLEEP_US = 50;
/** The event loop is served at least this often while the reactor is busy; sooner when its descriptor says so. A turn allocates. */
const SLICE_MAX_US = 20_000;
/** What is left of a slice after a sleep, at least: what woke us comes first. */
const SLICE_AFTER_SLEEP_US = 250;

/** First value of fields that change often: a field that once held undefined or an integer boxes every double stored to it. */
const DOUBLE = 0.5;

export class Reactor {
  readonly name: string;
  readonly arena: Arena;
  readonly ring: Ring;
  readonly clock: Clock;
  readonly random: Random;
  readonly mode: ReactorMode;
  readonly stats: Float64Array;
  /** Guest memory mapped into the arena. */
  readonly memory = new MemoryRanges();
  /** Time at the start of this step: what the data path stamps requests with. */
  nowUs = DOUBLE;

  readonly #pollUs: number;
  readonly #phases: Poller[][] = [[], [], []];
  readonly #sleepers: Poller[] = [];
  readonly #timers = new TimerHeap();
  #deferred: (() => void)[] = [];
  #wasBusy = false;
  /** Running mean of the time without work before a completion. */
  #completionWaitUs = DOUBLE;
  /** The last unarmed sleep ended without a completion. */
  #unarmedInVain = false;
  #lastBusyUs = DOUBLE;
  #yieldDueUs = DOUBLE;
  #yieldWanted = false;

  constructor(options: ReactorOptions) {
    this.name = options.name;
    this.arena = options.arena;
    this.ring = options.ring;
    this.clock = options.clock;
    this.random = options.random;
    this.mode = options.mode;
    this.#pollUs = options.pollUs;
    this.stats = options.stats ?? new Float64Array(REACTOR_STAT_COUNT);
    this.nowUs = this.clock.nowUs();
    this.#lastBusyUs = this.nowUs;
    this.#yieldDueUs = this.nowUs;
  }

  addPoller(poller: Poller, phase: PollPhase): void {
    // Copy on write: a poller may add or remove pollers while they are being run.
    this.#phases[phase] = [...this.#phases[phase]!, poller];
    if (poller.arm !== undefined && !this.#sleepers.includes(poller)) this.#sleepers.push(poller);
  }

  /** Removes the poller from every phase. */
  removePoller(poller: Poller): void {
    for (let phase = 0; phase < this.#phases.length; phase++) {
      this.#phases[phase] = this.#phases[phase]!.filter((p) => p !== poller);
    }
    const at = this.#sleepers.indexOf(poller);
    if (at >= 0) this.#sleepers.splice(at, 1);
  }

  /** (Re)schedules `timer` to fire once, `delayUs` after the start of this step. */
  schedule(timer: Timer, delayUs: number): void {
    this.#timers.schedule(timer, this.nowUs + delayUs);
  }

  /** Schedules `timer`, which is not scheduled, as its `dueUs` says. For the data path: an argument would be boxed. */
  scheduleDue(timer: Timer): void {
    this.#timers.insert(timer);
  }

  cancel(timer: Timer): void {
    this.#timers.cancel(timer);
  }

  /** Runs `task` in the next step. Control path: it allocates. */
  defer(task: () => void): void {
    this.#deferred.push(task);
  }

  /** One pass over everything that may be ready, without sleeping. Returns whether there was work. */
  step(): boolean {
    const nowUs = this.clock.nowUs();
    const stats = this.stats;
    stats[this.#wasBusy ? ReactorStat.busyUs : ReactorStat.idleUs]! += nowUs - this.nowUs;
    stats[ReactorStat.steps]!++;
    this.nowUs = nowUs;

    const isAwaiting = this.ring.inflight > 0;
    let busy = this.ring.reap() > 0;
    if (busy && isAwaiting) {
      const waitedUs = Math.min(nowUs - this.#lastBusyUs, COMPLETION_WAIT_MAX_US);
      this.#completionWaitUs += (waitedUs - this.#completionWaitUs) / 8;
    }
    if (this.#deferred.length > 0) {
      this.#runDeferred();
      busy = true;
    }
    if (this.#timers.nextDueUs <= nowUs && this.#timers.run(nowUs)) busy = true;
    for (let phase = 0; phase < 3; phase++) {
      const pollers = this.#phases[phase]!;
      for (let i = 0; i < pollers.length; i++) {
        if (pollers[i]!.poll()) busy = true;
      }
    }
    this.ring.enter();
    this.#wasBusy = busy;
    if (busy) {
      this.#lastBusyUs = nowUs;
      this.#unarmedInVain = false;
    }
    return busy;
  }

  /**
   * Runs steps, sleeping as the mode says, until the event loop of the thread wants its turn.
   * The caller hands control to the event loop and comes back.
   */
  runSlice(): void {
    this.#yieldDueUs = this.clock.nowUs() + SLICE_MAX_US;
    this.#yieldWanted = false;
    do {
      if (!this.step() && this.mode !== 'busy') this.rest();
    } while (!this.#yieldWanted && this.nowUs < this.#yieldDueUs);
  }

  /** Ends the slice after this step: something was left for the event loop, as a promise that was settled. */
  endSlice(): void {
    this.#yieldWanted = true;
  }

  /** Watches the thread's own event loop, so that a slice or a sleep ends when it has something to do. */
  watchEventLoop(backendFd: number): void {
    new FdWatch(this.ring, backendFd, POLLIN, () => {
      this.#yieldWanted = true;
    });
  }

  /**
   * For whoever runs steps himself, after one without work.
   *
   * Nothing to do in this step: come back at once to look again, or sleep. See docs/decisions/0003.
   *
   * With many requests in flight a completion comes any moment, and guests answer it at once or much later: look for their
   * answer for a moment, then sleep until the next completion without asking for kicks, which would cost the guests and wake us
   * for single requests. With few or none in flight spin for `pollUs`, unless completions have lately taken longer than that.
   */
  rest(): void {
    const inflight = this.ring.inflight;
    const quietUs = this.nowUs - this.#lastBusyUs;
    const isDeep = inflight >= DEEP_INFLIGHT;
    if (this.mode === 'adaptive') {
      const spinUs = isDeep ? ANSWER_US : this.#pollUs;
      const inVain = inflight > 0 && !isDeep && this.#completionWaitUs > spinUs;
      if (quietUs < spinUs && !inVain) return;
    }
    if (isDeep && !this.#unarmedInVain) this.#sleepUnarmed();
    else this.#sleepArmed();
  }

  #sleepUnarmed(): void {
    this.#unarmedInVain = !this.#wait(Math.min(UNARMED_SLEEP_US, this.#timers.nextDueUs - this.nowUs));
  }

  #sleepArmed(): void {
    const sleepers = this.#sleepers;
    let armed = 0;
    let workFound = this.#deferred.length > 0;
    while (!workFound && armed < sleepers.length) workFound = sleepers[armed++]!.arm!();
    if (!workFound) this.#wait(Math.min(this.#timers.nextDueUs - this.nowUs, SLEEP_MAX_US));
    for (let i = 0; i < armed; i++) sleepers[i]!.disarm!();
  }

  /** Sleeps until something completes or time is up. Returns whether something did. */
  #wait(timeoutUs: number): boolean {
    if (timeoutUs <= 0) return false;
    const beforeUs = this.clock.nowUs();
    const woken = this.ring.wait(Math.ceil(timeoutUs));
    const afterUs = this.clock.nowUs();
    this.stats[ReactorStat.idleUs]! += beforeUs - this.nowUs;
    this.stats[ReactorStat.sleepUs]! += afterUs - beforeUs;
    this.stats[ReactorStat.sleeps]!++;
    this.nowUs = afterUs;
    // A long sleep is no reason to make what woke us wait for the event loop.
    this.#yieldDueUs = Math.max(this.#yieldDueUs, afterUs + SLICE_AFTER_SLEEP_US);
    // Timers of the event loop are not watched: it gets its turn at least this often.
    if (afterUs - beforeUs >= SLEEP_MAX_US) this.#yieldWanted = true;
    return woken;
  }

  #runDeferred(): void {
    const tasks = this.#deferred;
    this.#deferred = [];
    for (const task of tasks) task();
  }
}
