/**
 * reluctant: a filter for tests that answers `again`: to every second request it is given, at once or in a later step; to all that
 * come while it holds as many as it can take; or to each when it first comes, and then to all but one per step. It keeps a journal of what it was given, to judge the core's retries by.
 */
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller } from '../../src/poller/poller.js';
import type { Reactor } from '../../src/poller/reactor.js';
import type { BdevContext, BdevModule, IoChannel } from '../../src/bdev/bdev.js';
import { IoQueue, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { BdevIo, IoOwner } from '../../src/bdev/bdev-io.js';
import { FilterBdev } from '../../src/bdev/filter-bdev.js';
import type { FilterConfig } from '../../src/bdev/filter-bdev.js';

export interface ReluctantConfig extends FilterConfig {
  readonly module: 'reluctant';
  readonly base: string;
  /** Every second request, at once or a step later; beyond `capacity`, at once; or each a step later, then all but one a step. */
  readonly refuse: 'now' | 'later' | 'beyondCapacity' | 'laterThenAllButOne';
  readonly capacity: number;
}

/** One request it was given. */
export interface Attempt {
  /** `offsetBytes` of the request: tests give each its own. */
  readonly offsetBytes: number;
  readonly step: number;
  readonly accepted: boolean;
}

const EAGAIN = 11;

class ReluctantChannel implements IoChannel, IoOwner, Poller {
  readonly #config: ReluctantConfig;
  readonly #journal: Attempt[];
  readonly #base: IoChannel;
  readonly #reactor: Reactor;
  readonly #refused = new IoQueue();
  #given = 0;
  #below = 0;
  #step = 0;
  /** Step of the latest request that was accepted. */
  #acceptedStep = -1;

  constructor(bdev: ReluctantBdev, base: IoChannel, reactor: Reactor) {
    this.#config = bdev.config;
    this.#journal = bdev.journal;
    this.#base = base;
    this.#reactor = reactor;
    reactor.addPoller(this, PollPhase.batch);
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.reset) {
      this.#base.submit(io);
      return;
    }
    const { refuse } = this.#config;
    const isNew = refuse === 'laterThenAllButOne' && !this.#journal.some((one) => one.offsetBytes === io.offsetBytes);
    const accepted = !isNew && this.#accepts();
    this.#journal.push({ offsetBytes: io.offsetBytes, step: this.#step, accepted });
    if (accepted) {
      this.#below++;
      io.push(this, 0);
      this.#base.submit(io);
    } else if (refuse === 'later' || isNew) {
      this.#refused.append(io);
    } else {
      io.complete(IoStatus.again, EAGAIN);
    }
  }

  #accepts(): boolean {
    switch (this.#config.refuse) {
      case 'now':
      case 'later':
        return this.#given++ % 2 === 1;
      case 'beyondCapacity':
        return this.#below < this.#config.capacity;
      case 'laterThenAllButOne': {
        const accepts = this.#acceptedStep !== this.#step;
        if (accepts) this.#acceptedStep = this.#step;
        return accepts;
      }
    }
  }

  onDone(io: BdevIo): void {
    this.#below--;
    io.complete(io.status, io.errno);
  }

  poll(): boolean {
    this.#step++;
    const count = this.#refused.length;
    for (let left = count; left > 0; left--) this.#refused.shift()!.complete(IoStatus.again, EAGAIN);
    return count > 0;
  }

  close(): void {
    this.#reactor.removePoller(this);
    this.#base.close();
  }
}

export class ReluctantBdev extends FilterBdev {
  readonly journal: Attempt[] = [];
  readonly config: ReluctantConfig;

  constructor(config: ReluctantConfig, context: BdevContext) {
    super(config, context);
    this.config = config;
  }

  openChannel(reactor: Reactor): IoChannel {
    return new ReluctantChannel(this, this.context.open(this.base), reactor);
  }
}

export const reluctantModule: BdevModule<ReluctantConfig> = {
  name: 'reluctant',
  create: (config, context) => new ReluctantBdev(config, context),
};
