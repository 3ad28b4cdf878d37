/** Watching a descriptor: a multishot poll on the ring that is renewed when the kernel ends it, until it is closed. */
import { ECANCELED } from '../../native/index.js';
import { RING_CQE_MORE } from './ring.js';
import type { Ring, RingOp } from './ring.js';

export class FdWatch implements RingOp {
  readonly #ring: Ring;
  readonly #fd: number;
  readonly #events: number;
  readonly #onReady: (events: number) => void;
  readonly #slot: number;
  #closed = false;

  /**
   * @param fd stays the caller's; it may be closed once the watch is
   * @param events of poll(2)
   * @param onReady called at each wake-up of the descriptor with the events there are, at once if there are some already
   */
  constructor(ring: Ring, fd: number, events: number, onReady: (events: number) => void) {
    this.#ring = ring;
    this.#fd = fd;
    this.#events = events;
    this.#onReady = onReady;
    this.#slot = ring.attach(this);
    ring.poll(this.#slot, fd, events);
  }

  onCompletion(result: number, flags: number): void {
    if (this.#closed) return;
    // The kernel ends a multishot poll when the completion queue overflows.
    if ((flags & RING_CQE_MORE) === 0 && result !== -ECANCELED) this.#ring.poll(this.#slot, this.#fd, this.#events);
    if (result > 0) this.#onReady(result);
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#ring.cancelPoll(this.#slot);
    this.#ring.detach(this.#slot);
  }
}
