/** Binary heap of timers by due time; positions live in the timers, so cancelling is O(log n) and nothing allocates. */
import type { Timer } from './poller.js';

/** How much later than those that fire now a timer is due at least that they schedule. */
const NEXT_RUN_US = 1;

export class TimerHeap {
  readonly #heap: Timer[] = [];
  #length = 0;
  /** While timers fire: the earliest that another one may be due. */
  #earliestUs = -Infinity;

  /** Due time of the first timer, Infinity when there is none. */
  get nextDueUs(): number {
    return this.#length === 0 ? Infinity : this.#heap[0]!.dueUs;
  }

  schedule(timer: Timer, wantedUs: number): void {
    if (timer.heapIndex < 0) {
      timer.dueUs = wantedUs;
      this.insert(timer);
      return;
    }
    const dueUs = Math.max(wantedUs, this.#earliestUs);
    const sooner = dueUs < timer.dueUs;
    timer.dueUs = dueUs;
    if (sooner) this.#up(timer.heapIndex);
    else this.#down(timer.heapIndex);
  }

  /** Schedules a timer that is not scheduled, as its `dueUs` says. */
  insert(timer: Timer): void {
    if (timer.dueUs < this.#earliestUs) timer.dueUs = this.#earliestUs;
    this.#place(timer, this.#length++);
    this.#up(timer.heapIndex);
  }

  cancel(timer: Timer): void {
    const at = timer.heapIndex;
    if (at < 0) return;
    timer.heapIndex = -1;
    const last = this.#heap[--this.#length]!;
    if (last === timer) return;
    this.#place(last, at);
    this.#up(at);
    this.#down(last.heapIndex);
  }

  /** Fires everything due at `nowUs`; timers scheduled meanwhile wait for a later run. Returns whether any fired. */
  run(nowUs: number): boolean {
    let fired = false;
    this.#earliestUs = nowUs + NEXT_RUN_US;
    while (this.#length > 0 && this.#heap[0]!.dueUs <= nowUs) {
      const timer = this.#heap[0]!;
      this.cancel(timer);
      timer.onTimer();
      fired = true;
    }
    this.#earliestUs = -Infinity;
    return fired;
  }

  #place(timer: Timer, at: number): void {
    this.#heap[at] = timer;
    timer.heapIndex = at;
  }

  #up(at: number): void {
    const heap = this.#heap;
    const timer = heap[at]!;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (heap[parent]!.dueUs <= timer.dueUs) break;
      this.#place(heap[parent]!, at);
      at = parent;
    }
    this.#place(timer, at);
  }

  #down(at: number): void {
    const heap = this.#heap;
    const timer = heap[at]!;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= this.#length) break;
      if (child + 1 < this.#length && heap[child + 1]!.dueUs < heap[child]!.dueUs) child++;
      if (heap[child]!.dueUs >= timer.dueUs) break;
      this.#place(heap[child]!, at);
      at = child;
    }
    this.#place(timer, at);
  }
}
