/** Waiting for something inside the engine, without allocation: whoever waits is a link of the list. */
import type { Task, Wait, Waiter } from '../task.js';

/** Waits for at most one thing at a time. */
export abstract class Sleeper {
  nextSleeper: Sleeper | null = null;
  /** What was waited for has happened, or failed. @param errno 0: it has happened */
  abstract wakeUp(errno: number): void;
}

export class WaitList {
  #head: Sleeper | null = null;
  #tail: Sleeper | null = null;

  get isEmpty(): boolean {
    return this.#head === null;
  }

  add(sleeper: Sleeper): void {
    sleeper.nextSleeper = null;
    if (this.#tail === null) this.#head = sleeper;
    else this.#tail.nextSleeper = sleeper;
    this.#tail = sleeper;
  }

  /** Wakes those that wait now, in order; who starts to wait meanwhile waits on. */
  wakeAll(errno: number): void {
    let sleeper = this.#head;
    this.#head = null;
    this.#tail = null;
    while (sleeper !== null) {
      const next = sleeper.nextSleeper;
      sleeper.nextSleeper = null;
      sleeper.wakeUp(errno);
      sleeper = next;
    }
  }
}

/** Lets a task wait as a sleeper does. */
class TaskSleeper extends Sleeper implements Wait {
  errno = 0;
  readonly #goToSleep: (sleeper: Sleeper) => void;
  #waiter: Waiter | null = null;

  constructor(goToSleep: (sleeper: Sleeper) => void) {
    super();
    this.#goToSleep = goToSleep;
  }

  begin(waiter: Waiter): void {
    this.#waiter = waiter;
    this.#goToSleep(this);
  }

  wakeUp(errno: number): void {
    this.errno = errno;
    this.#waiter!.wake();
  }
}

/** @param goToSleep enters the sleeper wherever it is to be woken. Returns the errno it was woken with. */
export function* sleep(goToSleep: (sleeper: Sleeper) => void): Task<number> {
  const sleeper = new TaskSleeper(goToSleep);
  yield sleeper;
  return sleeper.errno;
}
