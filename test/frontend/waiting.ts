/**
 * Waiting for what the other side does. The device may be a process of its own, or a reactor in this very thread that only goes
 * on when it is stepped: then `step` does that.
 */
import { setImmediate, setTimeout } from 'node:timers/promises';

/** Something that was to happen did not. */
export class WaitTimeout extends Error {
  constructor(what: string, timeoutMs: number) {
    super(`${what}: not within ${timeoutMs} ms`);
    this.name = 'WaitTimeout';
  }
}

export class Waiter {
  /** Default time until a wait fails. */
  readonly timeoutMs: number;
  readonly #step: (() => void) | undefined;

  /** @param step drives the device by a little, when it lives in this thread */
  constructor(timeoutMs: number, step?: () => void) {
    this.timeoutMs = timeoutMs;
    this.#step = step;
  }

  /**
   * Calls `look` until it returns something other than undefined, and returns that. Throws WaitTimeout.
   * Looks again at once for a millisecond, then every millisecond.
   */
  async until<T>(what: string, look: () => T | undefined, timeoutMs = this.timeoutMs): Promise<T> {
    const startMs = performance.now();
    for (;;) {
      const found = look();
      if (found !== undefined) return found;
      const waitedMs = performance.now() - startMs;
      if (waitedMs > timeoutMs) throw new WaitTimeout(what, timeoutMs);
      if (this.#step !== undefined) {
        this.#step();
        await setImmediate();
      } else {
        await (waitedMs < 1 ? setImmediate() : setTimeout(1));
      }
    }
  }
}
