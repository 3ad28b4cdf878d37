/**
 * How long a front-end may keep the device waiting in the middle of something: between connecting and its first whole message, and
 * between the first byte of a message and its last. Between messages it may be silent for ever: virtual machines are.
 */
import type { Timer } from '../poller/poller.js';
import type { Reactor } from '../poller/reactor.js';

export class MessageDeadline implements Timer {
  heapIndex = -1;
  dueUs = 0.5;
  readonly limitUs: number;
  readonly #reactor: Reactor;
  readonly #onMissed: () => void;

  /** Runs from now on. @param limitUs Infinity for none */
  constructor(reactor: Reactor, limitUs: number, onMissed: () => void) {
    this.limitUs = limitUs;
    this.#reactor = reactor;
    this.#onMissed = onMissed;
    this.begin();
  }

  /** A message has begun, or went on: bytes that trickle in do not put the deadline off. */
  begin(): void {
    if (this.heapIndex < 0 && this.limitUs !== Infinity) this.#reactor.schedule(this, this.limitUs);
  }

  /** The message is whole, or nobody waits for it any more. */
  met(): void {
    if (this.heapIndex >= 0) this.#reactor.cancel(this);
  }

  onTimer(): void {
    this.#onMissed();
  }
}
