/**
 * The front-end's end of a vhost-user socket: bytes and descriptors out, whole messages in. It says what it is told to say,
 * however wrong.
 */
import { EAGAIN, check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { MESSAGE_HEADER_BYTES } from './protocol.js';
import type { Waiter } from './waiting.js';

/** The other side closed the connection. */
export class Disconnected extends Error {
  constructor() {
    super('the back-end closed the connection');
    this.name = 'Disconnected';
  }
}

export interface Reply {
  readonly id: number;
  readonly flags: number;
  readonly payload: Buffer;
  /** Descriptors that came with it. They are closed with the connection, unless `keep` takes them out of its hands. */
  readonly fds: readonly number[];
}

const BUFFER_BYTES = 64 * 1024;
const FDS_MAX = 8;
const EPIPE = 32;
const ECONNRESET = 104;

export class Connection {
  readonly fd: number;
  readonly #arena: Arena;
  readonly #buffer: number;
  readonly #waiter: Waiter;
  readonly #noFds = new Int32Array(0);
  readonly #someFds = new Int32Array(FDS_MAX);
  readonly #counts = new Int32Array(2);
  /** Came with the message being received, as the back-end sends one at a time. */
  #fds: number[] = [];
  readonly #owned = new Set<number>();
  #received = Buffer.alloc(0);
  #ended = false;
  #closed = false;

  /** Connects. Throws SystemError. */
  constructor(socketPath: string, arena: Arena, waiter: Waiter) {
    this.fd = check(native.socketConnect(socketPath), `connect to ${socketPath}`);
    this.#arena = arena;
    this.#buffer = arena.allocate(BUFFER_BYTES);
    this.#waiter = waiter;
  }

  /** Sends all bytes; the descriptors go with the first of them and stay the caller's. Throws Disconnected. */
  async send(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    const address = this.#arena.baseAddress + this.#buffer;
    for (let at = 0; at < bytes.length;) {
      const part = bytes.subarray(at, at + BUFFER_BYTES);
      this.#arena.view8(this.#buffer, part.length).set(part);
      const withFds = at === 0 ? Int32Array.from(fds) : this.#noFds;
      at += await this.#waiter.until('room in the socket', () => {
        const sent = native.socketSend(this.fd, address, part.length, withFds);
        if (sent === -EPIPE || sent === -ECONNRESET) throw new Disconnected();
        return sent === -EAGAIN ? undefined : check(sent, 'send to the back-end');
      });
    }
  }

  /** The next message of the back-end. Throws Disconnected, WaitTimeout. */
  async receive(timeoutMs?: number): Promise<Reply> {
    const header = await this.#take(MESSAGE_HEADER_BYTES, timeoutMs);
    const payload = await this.#take(header.readUInt32LE(8), timeoutMs);
    return { id: header.readUInt32LE(0), flags: header.readUInt32LE(4), payload, fds: this.#fds.splice(0) };
  }

  /** A descriptor that came with a message is the caller's from now on. */
  keep(fd: number): number {
    this.#owned.delete(fd);
    return fd;
  }

  /** Waits until the back-end has closed the connection. Throws WaitTimeout when it does not. */
  async disconnected(timeoutMs?: number): Promise<void> {
    await this.#waiter.until(
      'end of the connection',
      () => {
        this.#pull();
        return this.#ended || undefined;
      },
      timeoutMs,
    );
  }

  /** Whether the connection stands, as far as can be seen now. */
  get isOpen(): boolean {
    if (!this.#closed) this.#pull();
    return !this.#closed && !this.#ended;
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    native.fileClose(this.fd);
    for (const fd of this.#owned) native.fileClose(fd);
    this.#arena.release(this.#buffer);
  }

  async #take(lengthBytes: number, timeoutMs?: number): Promise<Buffer> {
    return this.#waiter.until(
      `${lengthBytes} bytes from the back-end`,
      () => {
        this.#pull();
        if (this.#received.length < lengthBytes) {
          if (this.#ended) throw new Disconnected();
          return undefined;
        }
        const taken = Buffer.from(this.#received.subarray(0, lengthBytes));
        this.#received = this.#received.subarray(lengthBytes);
        return taken;
      },
      timeoutMs,
    );
  }

  /** Takes in what has arrived. */
  #pull(): void {
    while (!this.#ended) {
      const address = this.#arena.baseAddress + this.#buffer;
      const count = native.socketReceive(this.fd, address, BUFFER_BYTES, this.#someFds, this.#counts);
      if (count === -EAGAIN) return;
      if (count === 0 || count === -ECONNRESET) this.#ended = true;
      else check(count, 'receive from the back-end');
      for (const fd of this.#someFds.subarray(0, this.#counts[0])) {
        this.#fds.push(fd);
        this.#owned.add(fd);
      }
      if (count > 0) this.#received = Buffer.concat([this.#received, this.#arena.view8(this.#buffer, count)]);
    }
  }
}
