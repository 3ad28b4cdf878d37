/**
 * The rings of one session on their reactor:
 *
 *     step:  take    pop requests of all running rings and hand them to the bdev
 *            publish make the answers of this step visible, notify
 *     sleep: arm     ask the guest for kicks, look once more       disarm: ask for none
 */
import type { Arena } from '../../native/index.js';
import { PollPhase } from '../poller/poller.js';
import type { Poller } from '../poller/poller.js';
import type { Reactor } from '../poller/reactor.js';
import type { Vring } from './vring.js';

export class VringPoller implements Poller {
  /** Rings to take requests from. Replaced, never changed in place: a step in progress holds on to it. */
  running: readonly Vring[] = [];
  /** Called when an access to memory beyond the end of its file was caught, in whosever memory it was. */
  onMemoryFault: (() => void) | null = null;

  readonly #reactor: Reactor;
  readonly #arena: Arena;
  readonly #vrings: readonly Vring[];
  readonly #publisher: Poller;
  #faultsSeen: number;

  constructor(reactor: Reactor, vrings: readonly Vring[]) {
    this.#reactor = reactor;
    this.#arena = reactor.arena;
    this.#vrings = vrings;
    this.#publisher = { poll: () => this.#publish() };
    this.#faultsSeen = this.#arena.faults;
  }

  start(): void {
    this.#reactor.addPoller(this, PollPhase.take);
    this.#reactor.addPoller(this.#publisher, PollPhase.publish);
  }

  stop(): void {
    this.#reactor.removePoller(this);
    this.#reactor.removePoller(this.#publisher);
  }

  poll(): boolean {
    if (this.#arena.faults !== this.#faultsSeen) {
      this.#faultsSeen = this.#arena.faults;
      this.onMemoryFault?.();
    }
    const running = this.running;
    let busy = false;
    for (let i = 0; i < running.length; i++) {
      const queue = running[i]!.queue;
      if (queue !== null && queue.poll()) busy = true;
    }
    return busy;
  }

  arm(): boolean {
    const running = this.running;
    let found = false;
    for (let i = 0; i < running.length; i++) {
      const vring = running[i]!;
      const queue = vring.queue!;
      if (queue.broken) continue;
      if (queue.virtqueue.setNotification(true) || vring.pollOnly) found = true;
    }
    return found;
  }

  disarm(): void {
    const running = this.running;
    for (let i = 0; i < running.length; i++) running[i]!.queue!.virtqueue.setNotification(false);
  }

  #publish(): boolean {
    const vrings = this.#vrings;
    for (let i = 0; i < vrings.length; i++) vrings[i]!.publish();
    return false;
  }
}
