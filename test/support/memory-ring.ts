/** A ring without a kernel, for tests of what drives a ring: it keeps a journal, and a test completes what it likes. */
import type { Arena } from '../../native/index.js';
import type { Ring, RingFile, RingOp } from '../../src/poller/ring.js';

export class MemoryRing implements Ring {
  inflight = 0;
  /** What was asked of the ring, in order: `enter`, `wait 100`, `reap`. */
  readonly journal: string[] = [];
  /** Called in the middle of a sleep: the place for what wakes it. */
  onWait: (timeoutUs: number) => void = () => undefined;
  readonly #ops: RingOp[] = [];
  #posted: (() => void)[] = [];

  /** None of its buffers are real. */
  get arena(): Arena {
    throw new Error('memory ring: has no arena');
  }

  /** Posts a completion, to be delivered by the next `reap`. */
  post(slot: number, result: number, flags = 0): void {
    this.#posted.push(() => this.#ops[slot]!.onCompletion(result, flags));
  }

  attach(op: RingOp): number {
    return this.#ops.push(op) - 1;
  }

  detach(slot: number): void {
    this.#ops[slot] = { onCompletion: () => undefined };
  }

  registerFile(fd: number): RingFile {
    return fd;
  }

  unregisterFile(): void {
    // Has no table.
  }

  read = notHere;
  write = notHere;
  readv = notHere;
  writev = notHere;
  readFixed = notHere;
  writeFixed = notHere;
  fdatasync = notHere;
  fallocate = notHere;

  poll(slot: number, fd: number): boolean {
    this.journal.push(`poll ${fd} by ${slot}`);
    return true;
  }

  cancelPoll(): boolean {
    return true;
  }

  registerBuffer(): number {
    return -1;
  }

  unregisterBuffer(): void {
    // Has no table.
  }

  enter(): void {
    this.journal.push('enter');
  }

  wait(timeoutUs: number): boolean {
    this.journal.push(`wait ${timeoutUs}`);
    this.onWait(timeoutUs);
    return this.#posted.length > 0;
  }

  reap(): number {
    const posted = this.#posted;
    this.#posted = [];
    for (const deliver of posted) deliver();
    return posted.length;
  }

  close(): void {
    // Holds nothing.
  }
}

function notHere(): never {
  throw new Error('memory ring: takes no requests');
}
