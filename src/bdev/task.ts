/**
 * Slow operations on an image, written as one would write them with async functions, but driven by the completions of a reactor:
 * a task yields what it waits for and goes on when that has happened, on the same stack and with no turn of the event loop
 * between. So the same code runs on a reactor, in a simulation that knows no event loop, and over plain files.
 *
 *     function* load(file: ImageFile): Task<Buffer> {
 *       const bytes = Buffer.alloc(4096);
 *       yield* file.read(0, bytes);
 *       return bytes;
 *     }
 *
 * Not for the data path: a task allocates.
 */
import type { Reactor } from '../poller/reactor.js';

/** Something that a task waits for. */
export interface Wait {
  /** Starts it; `waiter.wake()` is called once when it is over, perhaps before this returns. */
  begin(waiter: Waiter): void;
}

export interface Waiter {
  wake(): void;
}

export type Task<T> = Generator<Wait, T, void>;

/** Runs a task. Exactly one of the two is called, perhaps before this returns. */
export function startTask<T>(task: Task<T>, onEnd: (result: T) => void, onError: (error: unknown) => void): void {
  new RunningTask(task, onEnd, onError).wake();
}

/**
 * Runs a task to its end.
 * @param step makes things go on, called while the task waits. Throws what the task throws.
 */
export function completeTask<T>(task: Task<T>, step: () => void): T {
  const outcome: { result?: { readonly value: T }; error?: { readonly value: unknown } } = {};
  startTask(
    task,
    (value) => void (outcome.result = { value }),
    (value) => void (outcome.error = { value }),
  );
  for (;;) {
    if (outcome.error !== undefined) throw outcome.error.value;
    if (outcome.result !== undefined) return outcome.result.value;
    step();
  }
}

/** Runs a task while the reactor goes on. Rejects with what it throws. */
export function runOnReactor<T>(reactor: Pick<Reactor, 'endSlice'>, task: Task<T>): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    // What waits for the promise is run by the event loop.
    const end = (): void => reactor.endSlice();
    startTask(
      task,
      (value) => {
        end();
        resolve(value);
      },
      (error) => {
        end();
        reject(error instanceof Error ? error : new Error(String(error)));
      },
    );
  });
}

/** Waits for the reactor's next step. */
export function* nextStep(reactor: Pick<Reactor, 'defer'>): Task<void> {
  yield { begin: (waiter) => reactor.defer(() => waiter.wake()) };
}

class RunningTask<T> implements Waiter {
  readonly #task: Task<T>;
  readonly #onEnd: (result: T) => void;
  readonly #onError: (error: unknown) => void;
  #isRunning = false;
  /** Woken while it was running: what it waited for was over at once. */
  #isWoken = false;

  constructor(task: Task<T>, onEnd: (result: T) => void, onError: (error: unknown) => void) {
    this.#task = task;
    this.#onEnd = onEnd;
    this.#onError = onError;
  }

  wake(): void {
    this.#isWoken = true;
    if (this.#isRunning) return;
    this.#isRunning = true;
    let end: (() => void) | null = null;
    while (this.#isWoken && end === null) {
      this.#isWoken = false;
      end = this.#advance();
    }
    this.#isRunning = false;
    // Last, and outside of the task: what is told may throw, or start the next one.
    end?.();
  }

  /** Returns what is to be called when the task is over, else null. */
  #advance(): (() => void) | null {
    try {
      const { done, value } = this.#task.next();
      if (done === true) return () => this.#onEnd(value);
      value.begin(this);
      return null;
    } catch (error) {
      return () => this.#onError(error);
    }
  }
}
