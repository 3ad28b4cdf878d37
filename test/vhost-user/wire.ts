/**
 * One end of a socket pair, for a controller that is handed the other end: messages out, replies in, no driver behind it.
 * `Frontend` does more, but only where there is a path to connect to.
 */
import { Arena, EAGAIN, check, checkObject, native } from '../../native/index.js';

const BUFFER_BYTES = 64 * 1024;
const NO_FDS = new Int32Array(0);

let arena: Arena | undefined;

export class Wire {
  /** For the controller. */
  readonly far: number;
  readonly #near: number;
  readonly #buffer: number;
  readonly #counts = new Int32Array(2);
  readonly #arena: Arena;

  constructor() {
    this.#arena = arena ??= new Arena(2 ** 31);
    [this.#near, this.far] = checkObject(native.socketPair(), 'make a socket pair');
    this.#buffer = this.#arena.allocate(BUFFER_BYTES);
  }

  send(bytes: Uint8Array): void {
    this.#arena.view8(this.#buffer, bytes.length).set(bytes);
    check(native.socketSend(this.#near, this.#arena.baseAddress + this.#buffer, bytes.length, NO_FDS), 'send');
  }

  /** What has arrived; null at the end of the stream. */
  receive(): Buffer | null {
    const address = this.#arena.baseAddress + this.#buffer;
    const count = native.socketReceive(this.#near, address, BUFFER_BYTES, NO_FDS, this.#counts);
    if (count === -EAGAIN) return Buffer.alloc(0);
    if (check(count, 'receive') === 0) return null;
    return Buffer.from(this.#arena.view8(this.#buffer, count));
  }

  close(): void {
    native.fileClose(this.#near);
    this.#arena.release(this.#buffer);
  }
}
