/**
 * The front-end's end of a socket for attacks: everything is synchronous, as a wait of the event loop would cost more than the attack.
 * Waiting is looking again until a deadline that only a device misses that hangs.
 */
import koffi from 'koffi';
import { EAGAIN, check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { FLAG_REPLY, FLAG_VERSION_1, MESSAGE_HEADER_BYTES } from '../frontend/protocol.js';
import { Finding } from './finding.js';

const libc = koffi.load(null);
const PollFd = koffi.struct('pollfd', { fd: 'int', events: 'short', revents: 'short' });
const shutdown = libc.func('int shutdown(int, int)');
const poll = libc.func('poll', 'int', [koffi.pointer(PollFd), 'ulong', 'int']);
const POLLIN = 1;
/** Looks before it sleeps: the device answers at once when it has a processor of its own. */
const LOOKS = 64;
const SLEEP_MS = 20;
const SHUT_WR = 1;
const NO_FDS = new Int32Array(0);
/** A device that takes longer hangs. */
export const ANSWER_MS = 20_000;
const OUT_BYTES = 256 * 1024;
const IN_BYTES = 64 * 1024;
const EPIPE = 32;
const ECONNRESET = 104;

/** Buffers of the connection there is: one at a time. */
export class Wires {
  readonly arena: Arena;
  readonly outOffset: number;
  readonly inOffset: number;
  readonly out: Buffer;
  readonly in: Buffer;

  constructor(arena: Arena) {
    this.arena = arena;
    this.outOffset = arena.allocate(OUT_BYTES);
    this.inOffset = arena.allocate(IN_BYTES);
    this.out = Buffer.from(arena.buffer, this.outOffset, OUT_BYTES);
    this.in = Buffer.from(arena.buffer, this.inOffset, IN_BYTES);
  }
}

export class RawConnection {
  /** Whole replies so far. */
  replies = 0;
  /** Called with the payload of each reply, which is valid during the call. */
  onReply: ((payload: Buffer) => void) | null = null;
  readonly #wires: Wires;
  readonly #fd: number;
  readonly #counts = new Int32Array(2);
  readonly #fds = new Int32Array(8);
  #pending = 0;
  #received = 0;
  #isEnded = false;
  #isClosed = false;

  constructor(wires: Wires, socketPath: string) {
    this.#wires = wires;
    this.#fd = check(native.socketConnect(socketPath), `connect to ${socketPath}`);
  }

  /** Where the next message is to be written in `wires.out`. */
  get at(): number {
    return this.#pending;
  }

  /** Whether the device has closed it, as far as it was seen. */
  get isEnded(): boolean {
    return this.#isEnded;
  }

  /** Adds what was written at `at` to what goes out with the next `flush`. */
  add(lengthBytes: number): void {
    this.#pending += lengthBytes;
    if (this.#pending > OUT_BYTES - 8192) this.flush();
  }

  /** Sends what is pending; descriptors go with its first byte. Returns false once the device has closed the connection. */
  flush(fds: Int32Array = NO_FDS): boolean {
    const length = this.#pending;
    this.#pending = 0;
    const deadline = performance.now() + ANSWER_MS;
    for (let done = 0; done < length && !this.#isEnded;) {
      const address = this.#wires.arena.baseAddress + this.#wires.outOffset + done;
      const sent = native.socketSend(this.#fd, address, length - done, done === 0 ? fds : NO_FDS);
      if (sent > 0) done += sent;
      else if (sent === -EPIPE || sent === -ECONNRESET) this.#isEnded = true;
      else if (sent === -EAGAIN) {
        // It may be full because nobody reads the answers.
        this.pull();
        if (performance.now() > deadline) throw new Finding('hang', 'the device reads no more messages');
      } else check(sent, 'send');
    }
    return !this.#isEnded;
  }

  /** Takes in what has arrived, as whole replies. */
  pull(): void {
    const { arena, inOffset } = this.#wires;
    while (!this.#isEnded) {
      const room = IN_BYTES - this.#received;
      const count = native.socketReceive(
        this.#fd,
        arena.baseAddress + inOffset + this.#received,
        room,
        this.#fds,
        this.#counts,
      );
      if (count === -EAGAIN) return;
      for (let i = 0; i < this.#counts[0]!; i++) native.fileClose(this.#fds[i]!);
      if (count <= 0) {
        this.#isEnded = true;
        return;
      }
      this.#received += count;
      this.#takeReplies();
    }
  }

  /** Waits for so many replies in all; false when the device closed the connection before. @param meanwhile called between looks */
  waitForReplies(count: number, meanwhile?: () => void): boolean {
    const deadline = performance.now() + ANSWER_MS;
    for (let looks = 0; this.replies < count; looks++) {
      this.pull();
      if (this.#isEnded) return this.replies >= count;
      meanwhile?.();
      if ((looks & 1023) === 1023 && performance.now() > deadline)
        throw new Finding('hang', 'the device does not answer');
    }
    return true;
  }

  /** Says that nothing more comes, and waits until the device has closed its end. */
  finish(): void {
    if (this.#isClosed) return;
    this.flush();
    shutdown(this.#fd, SHUT_WR);
    const deadline = performance.now() + ANSWER_MS;
    for (let looks = 0; !this.#isEnded; looks++) {
      this.pull();
      if (looks < LOOKS || this.#isEnded) continue;
      this.#sleep();
      if (performance.now() > deadline) throw new Finding('hang', 'a session does not end');
    }
    this.close();
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#isEnded = true;
    native.fileClose(this.#fd);
  }

  /** Lets others have the processor until there is something to read. */
  #sleep(): void {
    poll([{ fd: this.#fd, events: POLLIN, revents: 0 }], 1, SLEEP_MS);
  }

  #takeReplies(): void {
    const bytes = this.#wires.in;
    let at = 0;
    while (this.#received - at >= MESSAGE_HEADER_BYTES) {
      const length = MESSAGE_HEADER_BYTES + bytes.readUInt32LE(at + 8);
      if (length > IN_BYTES) throw new Finding('reply', `a reply of ${length} bytes`);
      const flags = bytes.readUInt32LE(at + 4);
      if (flags !== (FLAG_VERSION_1 | FLAG_REPLY)) throw new Finding('reply', `a reply with flags ${flags}`);
      if (this.#received - at < length) break;
      this.onReply?.(bytes.subarray(at + MESSAGE_HEADER_BYTES, at + length));
      this.replies++;
      at += length;
    }
    bytes.copyWithin(0, at, this.#received);
    this.#received -= at;
  }
}
