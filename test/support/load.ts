/** A load that keeps a number of requests in flight on a disk: each that completes is submitted again in the next step. */
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller } from '../../src/poller/poller.js';
import type { Reactor } from '../../src/poller/reactor.js';
import { BdevIo, IoStatus } from '../../src/bdev/bdev-io.js';
import type { IoOwner, IoType } from '../../src/bdev/bdev-io.js';
import type { IoChannel } from '../../src/bdev/bdev.js';

export interface LoadOptions {
  readonly type: IoType;
  readonly lengthBytes: number;
  readonly depth: number;
  /** Arena offset of memory for the data; all requests share it. */
  readonly memory: number;
}

export class Load implements IoOwner, Poller {
  /** Requests completed so far, those that failed included. */
  done = 0;
  failed = 0;
  inflight = 0;
  readonly #reactor: Reactor;
  readonly #channel: IoChannel;
  readonly #options: LoadOptions;
  /** To be submitted in the next step. */
  readonly #ready: BdevIo[];

  constructor(reactor: Reactor, channel: IoChannel, options: LoadOptions) {
    this.#reactor = reactor;
    this.#channel = channel;
    this.#options = options;
    this.#ready = Array.from({ length: options.depth }, () => new BdevIo());
  }

  start(): void {
    this.#reactor.addPoller(this, PollPhase.take);
  }

  /** Submits nothing more. */
  stop(): void {
    this.#reactor.removePoller(this);
  }

  poll(): boolean {
    const { type, lengthBytes, memory } = this.#options;
    const count = this.#ready.length;
    for (let i = 0; i < count; i++) {
      const io = this.#ready.pop()!;
      io.prepare(type, 0, lengthBytes, 0);
      if (lengthBytes > 0) io.addSegment(memory, lengthBytes);
      io.push(this, 0);
      this.inflight++;
      this.#channel.submit(io);
    }
    return count > 0;
  }

  onDone(io: BdevIo): void {
    this.inflight--;
    this.done++;
    if (io.status !== IoStatus.success) this.failed++;
    this.#ready.push(io);
  }
}
