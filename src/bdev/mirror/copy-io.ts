/** What the copying of a mirror waits for: its own requests, and that something comes true. */
import type { IoChannel } from '../bdev.js';
import { BdevIo, IoFlag, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import { PollPhase } from '../../poller/poller.js';
import type { Poller } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { Wait, Waiter } from '../task.js';

/** One request after the other; the io says what became of the last. */
export class CopyIo implements IoOwner {
  readonly io = new BdevIo();
  #isDone = true;
  #waiter: Waiter | null = null;

  get isDone(): boolean {
    return this.#isDone;
  }

  /** Waits for the request. @param address where the data is, 0 for none */
  run(channel: IoChannel, type: IoType, offsetBytes: number, lengthBytes: number, address: number): Wait {
    return {
      begin: (waiter) => {
        this.#waiter = waiter;
        this.submit(channel, type, offsetBytes, lengthBytes, address);
      },
    };
  }

  /** Waits for nothing. */
  submit(channel: IoChannel, type: IoType, offsetBytes: number, lengthBytes: number, address: number): void {
    this.#isDone = false;
    this.io.prepare(type, offsetBytes, lengthBytes, type === IoType.writeZeroes ? IoFlag.unmap : 0);
    if (address !== 0) this.io.addSegment(address, lengthBytes);
    this.io.push(this, 0);
    channel.submit(this.io);
  }

  onDone(): void {
    const waiter = this.#waiter;
    this.#isDone = true;
    this.#waiter = null;
    waiter?.wake();
  }
}

/** Asks in each step of the reactor. What changes the answer is a completion, a timer or a call, which end its sleep. */
export class Until implements Wait, Poller {
  readonly #reactor: Reactor;
  readonly #isTrue: () => boolean;
  #waiter: Waiter | null = null;

  constructor(reactor: Reactor, isTrue: () => boolean) {
    this.#reactor = reactor;
    this.#isTrue = isTrue;
  }

  begin(waiter: Waiter): void {
    if (this.#isTrue()) {
      waiter.wake();
      return;
    }
    this.#waiter = waiter;
    this.#reactor.addPoller(this, PollPhase.take);
  }

  poll(): boolean {
    const waiter = this.#waiter;
    if (waiter === null || !this.#isTrue()) return false;
    this.#waiter = null;
    this.#reactor.removePoller(this);
    waiter.wake();
    return true;
  }

  arm(): boolean {
    return this.#isTrue();
  }

  disarm(): void {
    // Nothing was armed.
  }
}
