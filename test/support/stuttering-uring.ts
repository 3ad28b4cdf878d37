/**
 * A real ring whose transfers stop halfway or have to be tried again, as the kernel may let them: for tests of what goes on with
 * the rest.
 */
import type { RingFile, RingOp, RingRange } from '../../src/poller/ring.js';
import { Uring } from '../../src/poller/uring.js';
import { seededRandom } from './seed.js';

const EINTR = 4;
const EAGAIN = 11;
const SECTOR_BYTES = 4096;

export class StutteringUring extends Uring {
  /** Transfers that were cut short, and completions that were replaced by a failure that passes. */
  cuts = 0;
  hiccups = 0;
  readonly #random = seededRandom(2);

  override attach(op: RingOp): number {
    return super.attach({
      onCompletion: (result, flags) => {
        const isHiccup = this.#random.next() < 0.1;
        if (isHiccup) this.hiccups++;
        op.onCompletion(isHiccup ? -(this.#random.next() < 0.5 ? EINTR : EAGAIN) : result, flags);
      },
    });
  }

  override read(slot: number, file: RingFile, range: RingRange, flags: number): boolean {
    return super.read(slot, file, this.#cut(range), flags);
  }

  override write(slot: number, file: RingFile, range: RingRange, flags: number): boolean {
    return super.write(slot, file, this.#cut(range), flags);
  }

  override readv(slot: number, file: RingFile, range: RingRange, count: number, flags: number): boolean {
    return super.readv(slot, file, range, this.#cutCount(count), flags);
  }

  override writev(slot: number, file: RingFile, range: RingRange, count: number, flags: number): boolean {
    return super.writev(slot, file, range, this.#cutCount(count), flags);
  }

  #cut({ address, lengthBytes, offsetBytes }: RingRange): RingRange {
    return { address, lengthBytes: this.#cutBytes(lengthBytes), offsetBytes };
  }

  #cutBytes(length: number): number {
    if (length <= SECTOR_BYTES || this.#random.next() < 0.5) return length;
    this.cuts++;
    return SECTOR_BYTES * (1 + this.#random.below(Math.floor(length / SECTOR_BYTES)));
  }

  #cutCount(count: number): number {
    if (count === 1 || this.#random.next() < 0.5) return count;
    this.cuts++;
    return 1 + this.#random.below(count);
  }
}
