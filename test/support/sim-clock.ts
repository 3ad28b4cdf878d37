/** A clock that stands still until it is told to go on. */
import type { Clock } from '../../src/poller/clock.js';

export class SimClock implements Clock {
  /** An ordinary uptime: large enough that a sum of small times loses what it would lose in production. */
  #nowUs = 1e12 + 0.5;

  nowUs(): number {
    return this.#nowUs;
  }

  wallMs(): number {
    return 1.7e12 + this.#nowUs / 1000;
  }

  advance(us: number): void {
    this.#nowUs += us;
  }
}
