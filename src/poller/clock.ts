/**
 * Time and chance, handed in from outside: production passes the real ones, a simulator its own. Nothing else in
 * src/ reads a clock or a random source.
 */
import { native } from '../../native/index.js';

export interface Clock {
  /** Monotonic microseconds since an arbitrary start; fractions allowed. */
  nowUs(): number;
  /** Wall-clock milliseconds since 1970, for logs and timestamps only. */
  wallMs(): number;
}

export interface Random {
  /** Uniform in [0, 1). */
  next(): number;
  /** Uniform integer in [0, bound). */
  below(bound: number): number;
}

export class SystemClock implements Clock {
  /** Large enough to lie outside the JavaScript heap, where it does not move. */
  readonly #cell = new Float64Array(512);

  nowUs(): number {
    native.clockRead(this.#cell);
    return this.#cell[0]!;
  }

  wallMs(): number {
    return Date.now();
  }
}

/** splitmix32: seedable, small, even enough for jitter and tests. Not for secrets. */
export class SeededRandom implements Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed | 0;
  }

  next(): number {
    this.#state = (this.#state + 0x9e3779b9) | 0;
    let z = this.#state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return ((z ^ (z >>> 15)) >>> 0) * 2 ** -32;
  }

  below(bound: number): number {
    return Math.floor(this.next() * bound);
  }
}
