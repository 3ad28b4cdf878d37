/**
 * Simulated time: a clock that jumps from event to event. What the simulated world does is an event here; the daemon gives time
 * to it by passing time at the ring.
 */
import type { Clock } from '../../src/poller/clock.js';

/** An ordinary uptime, so that sums of small times lose what they lose in production. */
export const START_US = 1e9 + 0.5;
const WALL_START_MS = 1.7e12;

interface Event {
  readonly dueUs: number;
  /** Of two that are due at once the earlier made comes first. */
  readonly order: number;
  readonly run: () => void;
}

export class Timeline implements Clock {
  #nowUs = START_US;
  #made = 0;
  /** Binary heap. */
  readonly #heap: Event[] = [];

  nowUs(): number {
    return this.#nowUs;
  }

  wallMs(): number {
    return WALL_START_MS + this.#nowUs / 1000;
  }

  /** Infinity when nothing is to come. */
  get nextDueUs(): number {
    return this.#heap[0]?.dueUs ?? Infinity;
  }

  after(delayUs: number, run: () => void): void {
    this.#push({ dueUs: this.#nowUs + delayUs, order: this.#made++, run });
  }

  /** Lets time go on to `untilUs`, event by event; stops early, at the time of an event, when `enough` says so after it. */
  passUntil(untilUs: number, enough?: () => boolean): void {
    while (this.nextDueUs <= untilUs) {
      const event = this.#pop();
      this.#nowUs = Math.max(this.#nowUs, event.dueUs);
      event.run();
      if (enough?.() === true) return;
    }
    this.#nowUs = Math.max(this.#nowUs, untilUs);
  }

  #push(event: Event): void {
    const heap = this.#heap;
    let at = heap.push(event) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!isBefore(event, heap[parent]!)) break;
      heap[at] = heap[parent]!;
      at = parent;
    }
    heap[at] = event;
  }

  #pop(): Event {
    const heap = this.#heap;
    const first = heap[0]!;
    const last = heap.pop()!;
    let at = 0;
    for (let child = 1; child < heap.length; child = 2 * at + 1) {
      if (child + 1 < heap.length && isBefore(heap[child + 1]!, heap[child]!)) child++;
      if (!isBefore(heap[child]!, last)) break;
      heap[at] = heap[child]!;
      at = child;
    }
    if (heap.length > 0) heap[at] = last;
    return first;
  }
}

function isBefore(a: Event, b: Event): boolean {
  return a.dueUs < b.dueUs || (a.dueUs === b.dueUs && a.order < b.order);
}
