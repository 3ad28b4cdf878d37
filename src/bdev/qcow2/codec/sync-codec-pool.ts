/** Does each job at once, on the reactor, and gives it back in the reactor's next step: the same in every run, for simulations and tests. */
import { PollPhase } from '../../../poller/poller.js';
import type { Poller } from '../../../poller/poller.js';
import type { Reactor } from '../../../poller/reactor.js';
import { InlineCodec } from './codec-job.js';
import type { CodecJob, CodecPool } from './codec-job.js';

const JOBS_MAX = 256;

export class SyncCodecPool implements CodecPool, Poller {
  readonly #reactor: Reactor;
  readonly #codec: InlineCodec;
  readonly #done: (CodecJob | null)[] = new Array<CodecJob | null>(JOBS_MAX).fill(null);
  #first = 0;
  inflight = 0;

  constructor(reactor: Reactor) {
    this.#reactor = reactor;
    this.#codec = new InlineCodec(reactor.arena);
    reactor.addPoller(this, PollPhase.take);
  }

  submit(job: CodecJob): boolean {
    if (this.inflight === JOBS_MAX) return false;
    this.#codec.run(job);
    this.#done[(this.#first + this.inflight++) % JOBS_MAX] = job;
    return true;
  }

  poll(): boolean {
    // Only what is here now: an owner may submit more, which belongs to the next step.
    const count = this.inflight;
    for (let i = 0; i < count; i++) {
      const job = this.#done[this.#first]!;
      this.#done[this.#first] = null;
      this.#first = (this.#first + 1) % JOBS_MAX;
      this.inflight--;
      job.owner.onCodecDone(job);
    }
    return count > 0;
  }

  /** What is done may be given back yet. */
  arm(): boolean {
    return this.inflight > 0;
  }

  disarm(): void {}

  close(): void {
    this.#reactor.removePoller(this);
    this.#codec.close();
  }
}
