/** A reactor that remembers its timers, so that those left over are found. */
import type { Timer } from '../../src/poller/poller.js';
import { Reactor } from '../../src/poller/reactor.js';

export class SimReactor extends Reactor {
  readonly #timers = new Set<Timer>();

  override schedule(timer: Timer, delayUs: number): void {
    this.#timers.add(timer);
    super.schedule(timer, delayUs);
  }

  override scheduleDue(timer: Timer): void {
    this.#timers.add(timer);
    super.scheduleDue(timer);
  }

  get timersDue(): number {
    return [...this.#timers].filter((timer) => timer.heapIndex >= 0).length;
  }
}
