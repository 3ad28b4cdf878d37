/**
 * Keeps the process of an isolated disk alive: when it ends by itself that is logged and counted, and after a while another one takes its
 * place, with the same listening sockets. Whoever connects meanwhile waits in their backlog.
 */
import type { Log } from './log.js';

/** Until the first restart; each one that comes soon after doubles it. */
const FIRST_DELAY_MS = 100;
const LONGEST_DELAY_MS = 10_000;
/** A process that lived so long has started well. */
const SETTLED_MS = 30_000;

export class Supervisor {
  /** Times the process ended by itself. */
  aborts = 0;
  readonly #name: string;
  readonly #log: Log;
  readonly #restart: () => Promise<void>;
  #delayMs = FIRST_DELAY_MS;
  #timer: NodeJS.Timeout | null = null;
  #settling: NodeJS.Timeout | null = null;
  #isStopped = false;
  #isRestarting = false;

  /** @param restart starts another process; rejects when it cannot do its work */
  constructor(name: string, log: Log, restart: () => Promise<void>) {
    this.#name = name;
    this.#log = log;
    this.#restart = restart;
  }

  /** The process serves. */
  serving(): void {
    this.#settling = setTimeout(() => (this.#delayMs = FIRST_DELAY_MS), SETTLED_MS).unref();
  }

  /** The process has ended. @param cause an error of its own, if it told of one */
  ended(how: string, cause: Error | null): void {
    // The end of one that is just being started is the end of that attempt.
    if (this.#isStopped || this.#isRestarting) return;
    this.aborts++;
    const delayMs = this.#delayMs;
    const error = cause === null ? {} : { error: cause.message };
    this.#log.error(
      { isolated: this.#name, how, ...error, restartMs: delayMs },
      'an isolated disk died; it is started again',
    );
    this.#later();
  }

  /** No more restarts. */
  stop(): void {
    this.#isStopped = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
    if (this.#settling !== null) clearTimeout(this.#settling);
  }

  #later(): void {
    if (this.#settling !== null) clearTimeout(this.#settling);
    this.#timer = setTimeout(() => void this.#try(), this.#delayMs);
    this.#delayMs = Math.min(this.#delayMs * 2, LONGEST_DELAY_MS);
  }

  async #try(): Promise<void> {
    this.#timer = null;
    this.#isRestarting = true;
    try {
      await this.#restart();
      this.#isRestarting = false;
      this.serving();
      this.#log.warn({ isolated: this.#name }, 'an isolated disk is served again');
    } catch (error) {
      this.#isRestarting = false;
      if (this.#isStopped) return;
      const { message } = error as Error;
      this.#log.error(
        { isolated: this.#name, error: message, restartMs: this.#delayMs },
        'an isolated disk cannot be started',
      );
      this.#later();
    }
  }
}
