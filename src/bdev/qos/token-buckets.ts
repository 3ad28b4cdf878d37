/**
 * The token buckets of one set of limits: operations and bytes, each for reads, for writes and for both together.
 *
 * A bucket fills at its rate up to its depth, rate * burstSeconds. A request may pass when no bucket it draws from is in
 * debt, and is then charged in full: one larger than a bucket passes by debt and later ones pay for it, so that nothing is
 * too large to pass. Over any time T at most depth + rate * T passes, plus the request that went into debt.
 *
 * A bucket without a limit holds Infinity and fills at Infinity: the arithmetic needs no exception for it.
 *
 * Times that a call works out are left in a field: a double that is returned is boxed, which allocates.
 */
import type { Reactor } from '../../poller/reactor.js';
import type { BdevIo } from '../bdev-io.js';
import { IoType } from '../bdev-io.js';

/** 0 stands for "no limit". */
export interface QosLimits {
  readonly readIops: number;
  readonly writeIops: number;
  readonly totalIops: number;
  readonly readBytesPerSecond: number;
  readonly writeBytesPerSecond: number;
  readonly totalBytesPerSecond: number;
  /** Depth of the buckets: how long a disk at rest may exceed its limits for, in seconds at the limit. */
  readonly burstSeconds: number;
}

export const Direction = { read: 0, write: 1 } as const;
export type Direction = (typeof Direction)[keyof typeof Direction];

// Indices of the buckets; those of a direction lie at its number.
const OPS = 0;
const TOTAL_OPS = 2;
const BYTES = 3;
const TOTAL_BYTES = 5;
const BUCKETS = 6;

export class TokenBuckets {
  /** Tokens per microsecond. */
  readonly #rates = new Float64Array(BUCKETS);
  readonly #depths = new Float64Array(BUCKETS);
  readonly #levels = new Float64Array(BUCKETS).fill(Infinity);
  readonly #reactor: Reactor;
  #filledUs = 0.5;
  /** Answer of `weigh`. */
  costUs = 0.5;
  /** Answer of `lookAhead`. */
  waitUs = 0.5;

  constructor(limits: QosLimits, reactor: Reactor) {
    this.#reactor = reactor;
    this.#filledUs = reactor.nowUs;
    this.setLimits(limits);
  }

  /** Puts other limits in place: buckets new to a limit start full, debts stay. */
  setLimits(limits: QosLimits): void {
    this.fill();
    const perSecond = [
      limits.readIops,
      limits.writeIops,
      limits.totalIops,
      limits.readBytesPerSecond,
      limits.writeBytesPerSecond,
      limits.totalBytesPerSecond,
    ];
    perSecond.forEach((limit, i) => {
      this.#rates[i] = limit === 0 ? Infinity : limit * 1e-6;
      this.#depths[i] = limit === 0 ? Infinity : limit * limits.burstSeconds;
      this.#levels[i] = limit === 0 ? Infinity : Math.min(this.#levels[i]!, this.#depths[i]);
    });
  }

  /** Adds the tokens due since the last call. */
  fill(): void {
    const { nowUs } = this.#reactor;
    const elapsedUs = nowUs - this.#filledUs;
    if (elapsedUs <= 0) return;
    this.#filledUs = nowUs;
    for (let i = 0; i < BUCKETS; i++) {
      this.#levels[i] = Math.min(this.#depths[i]!, this.#levels[i]! + this.#rates[i]! * elapsedUs);
    }
  }

  /** Whether a request in this direction may pass now. */
  mayPass(direction: Direction): boolean {
    const levels = this.#levels;
    return (
      levels[OPS + direction]! >= 0 &&
      levels[TOTAL_OPS]! >= 0 &&
      levels[BYTES + direction]! >= 0 &&
      levels[TOTAL_BYTES]! >= 0
    );
  }

  /** Takes a request's tokens. */
  charge(direction: Direction, io: BdevIo): void {
    const levels = this.#levels;
    const bytes = bytesMoved(io);
    levels[OPS + direction]! -= 1;
    levels[TOTAL_OPS]! -= 1;
    levels[BYTES + direction]! -= bytes;
    levels[TOTAL_BYTES]! -= bytes;
  }

  /** Sets `costUs` to a request's share of what is limited: the time that the tightest limit takes to make its tokens. */
  weigh(direction: Direction, io: BdevIo): void {
    const rates = this.#rates;
    const bytes = bytesMoved(io);
    this.costUs = Math.max(
      1 / rates[OPS + direction]!,
      1 / rates[TOTAL_OPS]!,
      bytes / rates[BYTES + direction]!,
      bytes / rates[TOTAL_BYTES]!,
    );
  }

  /** Sets `waitUs` to the time until a request in this direction may pass, 0 when it may. */
  lookAhead(direction: Direction): void {
    this.waitUs = 0;
    this.#awaitDebt(OPS + direction);
    this.#awaitDebt(TOTAL_OPS);
    this.#awaitDebt(BYTES + direction);
    this.#awaitDebt(TOTAL_BYTES);
  }

  #awaitDebt(bucket: number): void {
    const level = this.#levels[bucket]!;
    if (level < 0) this.waitUs = Math.max(this.waitUs, -level / this.#rates[bucket]!);
  }
}

/** A discard and a writeZeroes that the base does by itself move no data: they count as operations only. */
function bytesMoved(io: BdevIo): number {
  return io.type === IoType.read || io.type === IoType.write ? io.lengthBytes : 0;
}
