/** Long work on a disk in use, in steps between which requests are served: how far it is, how fast it may go, and how it ends. */
import type { Timer } from '../poller/poller.js';
import type { Reactor } from '../poller/reactor.js';
import { BdevError } from './bdev.js';
import type { Task, Wait, Waiter } from './task.js';

export type JobState = 'running' | 'done' | 'failed' | 'cancelled';

const DOUBLE = 0.5;

class Pause implements Wait, Timer {
  heapIndex = -1;
  dueUs = DOUBLE;
  readonly #reactor: Reactor;
  readonly #delayUs: number;
  #waiter: Waiter | null = null;

  constructor(reactor: Reactor, delayUs: number) {
    this.#reactor = reactor;
    this.#delayUs = delayUs;
  }

  begin(waiter: Waiter): void {
    this.#waiter = waiter;
    this.#reactor.schedule(this, this.#delayUs);
  }

  onTimer(): void {
    this.end();
  }

  /** Ends it before its time. */
  end(): void {
    const waiter = this.#waiter;
    this.#waiter = null;
    if (this.heapIndex >= 0) this.#reactor.cancel(this);
    waiter?.wake();
  }
}

export class Job {
  readonly type: string;
  readonly totalBytes: number;
  doneBytes = 0;
  state: JobState = 'running';
  /** Why it failed. */
  error: string | null = null;
  readonly #reactor: Reactor;
  #bytesPerSecond: number;
  #isCancelled = false;
  #pause: Pause | null = null;
  #nextUs: number;

  /** @param bytesPerSecond 0: no limit */
  constructor(type: string, totalBytes: number, reactor: Reactor, bytesPerSecond: number) {
    this.type = type;
    this.totalBytes = totalBytes;
    this.#reactor = reactor;
    this.#bytesPerSecond = bytesPerSecond;
    this.#nextUs = reactor.nowUs;
  }

  get isRunning(): boolean {
    return this.state === 'running';
  }

  /** How fast it may go from now on. @param bytesPerSecond 0: no limit */
  setPace(bytesPerSecond: number): void {
    this.#bytesPerSecond = bytesPerSecond;
    this.#nextUs = this.#reactor.nowUs;
    this.#pause?.end();
  }

  /** It ends at its next step. */
  cancel(): void {
    this.#isCancelled = true;
    this.#pause?.end();
  }

  /** So much more is done: waits as the limit says. Throws BdevError when the job was cancelled. */
  *advance(bytes: number): Task<void> {
    this.doneBytes += bytes;
    if (this.#bytesPerSecond > 0) {
      this.#nextUs = Math.max(this.#nextUs, this.#reactor.nowUs) + (bytes / this.#bytesPerSecond) * 1e6;
      const waitUs = this.#nextUs - this.#reactor.nowUs;
      if (waitUs > 0 && !this.#isCancelled) {
        this.#pause = new Pause(this.#reactor, waitUs);
        yield this.#pause;
        this.#pause = null;
      }
    }
    if (this.#isCancelled)
      throw new BdevError('cancelled', '', `${this.type} was cancelled`, 'start it again: it goes on');
  }

  end(error: unknown): void {
    if (error === null) {
      this.state = 'done';
      return;
    }
    this.state = error instanceof BdevError && error.code === 'cancelled' ? 'cancelled' : 'failed';
    this.error = error instanceof Error ? error.message : 'unknown';
  }

  describe(): Record<string, unknown> {
    const { type, state, doneBytes, totalBytes, error } = this;
    return { type, state, doneBytes, totalBytes, ...(error === null ? {} : { error }) };
  }
}
