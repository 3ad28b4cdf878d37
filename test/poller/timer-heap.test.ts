/**
 * Goal: timers fire once, when due, in order, and each exactly as often as it was scheduled; what is scheduled while others fire
 * waits for the next run.
 *
 * Method: random commands on the heap and on a plain list.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { TimerHeap } from '../../src/poller/timer-heap.js';
import type { Timer } from '../../src/poller/poller.js';
import { seed } from '../support/seed.js';

class TestTimer implements Timer {
  heapIndex = -1;
  dueUs = -0.5;
  action: () => void = () => undefined;
  readonly #fired: TestTimer[];

  constructor(
    readonly id: number,
    fired: TestTimer[],
  ) {
    this.#fired = fired;
  }

  onTimer(): void {
    this.#fired.push(this);
    this.action();
  }
}

const TIMERS = 12;

type Command =
  | { readonly kind: 'schedule'; readonly timer: number; readonly dueUs: number }
  | { readonly kind: 'cancel'; readonly timer: number }
  | { readonly kind: 'run'; readonly nowUs: number };

const timer = fc.nat(TIMERS - 1);
const time = fc.integer({ min: 0, max: 40 });
const command: fc.Arbitrary<Command> = fc.oneof(
  { weight: 5, arbitrary: fc.record({ kind: fc.constant('schedule' as const), timer, dueUs: time }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('cancel' as const), timer }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('run' as const), nowUs: time }) },
);

describe('the heap', () => {
  it('agrees with a list', () => {
    fc.assert(
      fc.property(fc.array(command, { maxLength: 100 }), (commands) => {
        const fired: TestTimer[] = [];
        const heap = new TimerHeap();
        const timers = Array.from({ length: TIMERS }, (_, id) => new TestTimer(id, fired));
        const model = new Map<number, number>();
        for (const command of commands) {
          fired.length = 0;
          if (command.kind === 'schedule') {
            heap.schedule(timers[command.timer]!, command.dueUs);
            model.set(command.timer, command.dueUs);
          } else if (command.kind === 'cancel') {
            heap.cancel(timers[command.timer]!);
            model.delete(command.timer);
          } else {
            const due = [...model].filter(([, dueUs]) => dueUs <= command.nowUs);
            for (const [id] of due) model.delete(id);
            expect(heap.run(command.nowUs)).toBe(due.length > 0);
            const times = fired.map(({ dueUs }) => dueUs);
            expect(times).toEqual([...times].sort((a, b) => a - b));
            expect(fired.map(({ id }) => id).sort()).toEqual(due.map(([id]) => id).sort());
          }
          expect(heap.nextDueUs).toBe(Math.min(Infinity, ...model.values()));
          for (const { id, heapIndex } of timers) expect(heapIndex >= 0).toBe(model.has(id));
        }
      }),
      { seed, numRuns: 500 },
    );
  });

  it('is empty at first and after the last timer', () => {
    const heap = new TimerHeap();
    expect(heap.nextDueUs).toBe(Infinity);
    expect(heap.run(1e15)).toBe(false);
    const timer = new TestTimer(0, []);
    heap.schedule(timer, 5);
    heap.cancel(timer);
    heap.cancel(timer);
    expect(heap.nextDueUs).toBe(Infinity);
  });
});

describe('a timer that schedules while it fires', () => {
  it('itself, at once, fires again in the next run only', () => {
    const fired: TestTimer[] = [];
    const heap = new TimerHeap();
    const timers = [0, 1, 2, 3].map((id) => new TestTimer(id, fired));
    for (const timer of timers) {
      timer.action = () => heap.schedule(timer, timer.dueUs);
      heap.schedule(timer, 5);
    }
    for (let run = 1; run <= 3; run++) {
      heap.run(4 + run);
      expect(
        fired
          .splice(0)
          .map(({ id }) => id)
          .sort(),
      ).toEqual([0, 1, 2, 3]);
    }
  });

  it('another, that was due too, does not fire that one before the next run', () => {
    const fired: TestTimer[] = [];
    const heap = new TimerHeap();
    const first = new TestTimer(0, fired);
    const second = new TestTimer(1, fired);
    first.action = () => heap.schedule(second, 2);
    heap.schedule(first, 1);
    heap.schedule(second, 3);
    heap.run(10);
    expect(fired).toEqual([first]);
    heap.run(11);
    expect(fired).toEqual([first, second]);
  });

  it('or cancels another, which then does not fire', () => {
    const fired: TestTimer[] = [];
    const heap = new TimerHeap();
    const first = new TestTimer(0, fired);
    const second = new TestTimer(1, fired);
    first.action = () => heap.cancel(second);
    heap.schedule(first, 1);
    heap.schedule(second, 2);
    heap.run(10);
    expect(fired).toEqual([first]);
    expect(heap.nextDueUs).toBe(Infinity);
  });
});
