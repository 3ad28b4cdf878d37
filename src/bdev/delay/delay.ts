/**
 * delay: a slower disk. Each request goes to the base at once; its completion is held here for the time configured for its
 * type, plus jitter, which makes requests complete out of order. For tests, and to imitate a device.
 *
 * Invariants
 * - What is held is done below: a held write has been written, it is only not acknowledged yet.
 * - A reset gives back what is held as aborted, after the base has been reset.
 * - Holding allocates only until there are as many timers as there were ever requests held at once.
 */
import type { Timer } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { BdevContext, BdevModule, IoChannel } from '../bdev.js';
import { IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import { FilterBdev, wholeRequests } from '../filter-bdev.js';
import type { FilterConfig } from '../filter-bdev.js';

export interface DelayConfig extends FilterConfig {
  readonly module: 'delay';
  readonly readUs: number;
  /** For writes and writeZeroes. */
  readonly writeUs: number;
  readonly flushUs: number;
  readonly discardUs: number;
  /** Bound of what is added to each request: whole microseconds, drawn evenly from [0, jitterUs). */
  readonly jitterUs: number;
}

const ECANCELED = 125;

/** One request on hold. */
class HeldIo implements Timer {
  heapIndex = -1;
  dueUs = -0.5;
  io: BdevIo | null = null;
  readonly #channel: DelayChannel;

  constructor(channel: DelayChannel) {
    this.#channel = channel;
  }

  onTimer(): void {
    const io = this.#channel.take(this);
    io.complete(io.status, io.errno);
  }
}

class DelayChannel implements IoChannel, IoOwner {
  readonly #base: IoChannel;
  readonly #reactor: Reactor;
  /** Delay by IoType. */
  readonly #delaysUs: Float64Array;
  readonly #jitterUs: number;
  /** Every timer made so far; those in the reactor's heap hold a request. */
  readonly #timers: HeldIo[] = [];
  readonly #freeTimers: HeldIo[] = [];

  constructor(base: IoChannel, reactor: Reactor, delaysUs: Float64Array, jitterUs: number) {
    this.#base = base;
    this.#reactor = reactor;
    this.#delaysUs = delaysUs;
    this.#jitterUs = jitterUs;
  }

  submit(io: BdevIo): void {
    io.push(this, 0);
    this.#base.submit(io);
  }

  onDone(io: BdevIo): void {
    if (io.type === IoType.reset) {
      this.#abortHeld();
      io.complete(io.status, io.errno);
      return;
    }
    const jitterUs = this.#jitterUs > 0 ? this.#reactor.random.below(this.#jitterUs) : 0;
    if (this.#delaysUs[io.type]! + jitterUs > 0) this.#hold(io, jitterUs);
    else io.complete(io.status, io.errno);
  }

  close(): void {
    this.#base.close();
  }

  /** Ends a hold: the timer is free again. */
  take(timer: HeldIo): BdevIo {
    const io = timer.io!;
    timer.io = null;
    this.#freeTimers.push(timer);
    return io;
  }

  /** @param jitterUs an integer */
  #hold(io: BdevIo, jitterUs: number): void {
    let timer = this.#freeTimers.pop();
    if (timer === undefined) {
      timer = new HeldIo(this);
      this.#timers.push(timer);
    }
    timer.io = io;
    timer.dueUs = this.#reactor.nowUs + this.#delaysUs[io.type]! + jitterUs;
    this.#reactor.scheduleDue(timer);
  }

  #abortHeld(): void {
    const count = this.#timers.length;
    for (let i = 0; i < count; i++) {
      const timer = this.#timers[i]!;
      if (timer.io === null) continue;
      this.#reactor.cancel(timer);
      this.take(timer).complete(IoStatus.aborted, ECANCELED);
    }
  }
}

class DelayBdev extends FilterBdev {
  readonly #config: DelayConfig;

  constructor(config: DelayConfig, context: BdevContext) {
    // Requests are split below, so that each is delayed once and not by piece.
    super(config, context, (base) => ({ limits: wholeRequests(base) }));
    this.#config = config;
  }

  openChannel(reactor: Reactor): IoChannel {
    const { readUs, writeUs, flushUs, discardUs, jitterUs } = this.#config;
    // In the order of IoType.
    const delaysUs = Float64Array.of(readUs, writeUs, flushUs, discardUs, writeUs, 0);
    return new DelayChannel(this.context.open(this.base), reactor, delaysUs, jitterUs);
  }

  override describe(): Record<string, unknown> {
    const { base, readUs, writeUs, flushUs, discardUs, jitterUs } = this.#config;
    return { base, readUs, writeUs, flushUs, discardUs, jitterUs };
  }
}

export const delayModule: BdevModule<DelayConfig> = {
  name: 'delay',
  create: (config, context) => new DelayBdev(config, context),
};
