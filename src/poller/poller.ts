/** What a reactor runs. Nothing in this folder knows of storage. */

/** When in a step a poller runs, in this order; the ring's completions are delivered before, and it is entered after. */
export const PollPhase = {
  /** Takes new work: virtqueues. */
  take: 0,
  /** Carries out work that modules have gathered in this step: copy lists, group commits. */
  batch: 1,
  /** Publishes what was completed: used rings. */
  publish: 2,
} as const;
export type PollPhase = (typeof PollPhase)[keyof typeof PollPhase];

export interface Poller {
  /** Does what there is to do without blocking. Returns whether there was anything. */
  poll(): boolean;
  /**
   * The reactor is about to sleep: ask for a wake-up. Returns true when work came in meanwhile, which calls the sleep off.
   * A poller without it needs no wake-up of its own.
   */
  arm?(): boolean;
  /** The reactor is awake again. Called on exactly the pollers whose `arm` was called. */
  disarm?(): void;
}

/** A one-shot timer: kept by its owner, scheduled and rescheduled without allocation. */
export interface Timer {
  /** Position in the reactor's heap, -1 when not scheduled. Only the reactor writes it. */
  heapIndex: number;
  /** Due time, `Clock.nowUs` scale. Only the reactor writes it, but for `scheduleDue`. */
  dueUs: number;
  onTimer(): void;
}
