/** Signals that end a command early, once it has put away what it began. They are heard when the event loop has its turn. */
import { BdevError } from '../../bdev/bdev.js';

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

export class Interruption {
  readonly #hear = (signal: NodeJS.Signals): void => {
    this.#heard ??= signal;
    this.#interrupt(this.#error());
  };
  readonly #hint: string;
  #interrupt: (error: BdevError) => void = () => undefined;
  #heard: NodeJS.Signals | null = null;

  /** @param hint what to do next */
  constructor(hint: string) {
    this.#hint = hint;
    for (const signal of SIGNALS) process.on(signal, this.#hear);
  }

  /** @param interrupt is called when there is a signal, also when there was one */
  onSignal(interrupt: (error: BdevError) => void): void {
    this.#interrupt = interrupt;
    if (this.#heard !== null) interrupt(this.#error());
  }

  /** Everything is put away: whoever waits for the process sees that a signal ended it. */
  end(): void {
    for (const signal of SIGNALS) process.off(signal, this.#hear);
    if (this.#heard !== null) process.kill(process.pid, this.#heard);
  }

  #error(): BdevError {
    return new BdevError('interrupted', 'filename', `ended by ${this.#heard}`, this.#hint);
  }
}
