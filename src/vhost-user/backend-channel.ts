/**
 * The channel on which we speak first (vhost-user.rst, "Back-end communication"): a second socket, from SET_BACKEND_REQ_FD, for
 * what the front-end did not ask for. One message is in use: the configuration space has changed.
 *
 * Invariants
 * - Nothing here waits for the front-end: a message that finds no room is dropped, as one like it lies unread before it.
 * - At most one message waits for an answer; a change meanwhile is told once the answer is there.
 * - Whatever the front-end sends that is no answer to what was asked ends its session.
 */
import type { SystemError } from '../../native/index.js';
import { EAGAIN, POLLIN, native } from '../../native/index.js';
import { FdWatch } from '../poller/fd-watch.js';
import type { Reactor } from '../poller/reactor.js';
import {
  BackendMessage,
  HEADER_BYTES,
  HEADER_NEED_REPLY,
  HEADER_REPLY,
  HEADER_VERSION,
  ProtocolError,
} from './protocol.js';

const REPLY_BYTES = HEADER_BYTES + 8;
const BUFFER_BYTES = 4096;
const NO_FDS = new Int32Array(0);

export class BackendChannel {
  /** The front-end broke the protocol, or the socket. */
  onFault: (error: ProtocolError | SystemError) => void = () => undefined;
  /** The front-end could not use what it was told. */
  onRefusal: () => void = () => undefined;

  readonly #reactor: Reactor;
  readonly #fd: number;
  readonly #needsReply: boolean;
  readonly #watch: FdWatch;
  /** One page: the message at its start, the answer in its second half. */
  readonly #buffer: number;
  readonly #message: Uint32Array;
  readonly #reply: Uint32Array;
  readonly #counts = new Int32Array(2);
  #received = 0;
  #awaitsReply = false;
  #changedMeanwhile = false;
  #ended = false;

  /**
   * @param fd taken over: a socket
   * @param needsReply ask for an answer to each message, which takes REPLY_ACK
   */
  constructor(reactor: Reactor, fd: number, needsReply: boolean) {
    this.#reactor = reactor;
    this.#fd = fd;
    this.#needsReply = needsReply;
    this.#buffer = reactor.arena.allocate(BUFFER_BYTES);
    this.#message = reactor.arena.view32(this.#buffer, HEADER_BYTES / 4);
    this.#reply = reactor.arena.view32(this.#buffer + BUFFER_BYTES / 2, REPLY_BYTES / 4);
    this.#watch = new FdWatch(reactor.ring, fd, POLLIN, () => this.#onReadable());
  }

  /** Tells the front-end that the configuration space is to be read again. */
  configChanged(): void {
    if (this.#ended) return;
    if (this.#awaitsReply) {
      this.#changedMeanwhile = true;
      return;
    }
    this.#message[0] = BackendMessage.configChange;
    this.#message[1] = this.#needsReply ? HEADER_VERSION | HEADER_NEED_REPLY : HEADER_VERSION;
    this.#message[2] = 0;
    const address = this.#reactor.arena.baseAddress + this.#buffer;
    const outcome = native.socketSend(this.#fd, address, HEADER_BYTES, NO_FDS);
    if (outcome === HEADER_BYTES) this.#awaitsReply = this.#needsReply;
    else if (outcome >= 0) this.onFault(new ProtocolError('a message to the front-end was cut short'));
    // Full of messages that say the same; or closed by the front-end, which may do that.
    else if (outcome !== -EAGAIN) this.#ended = true;
  }

  close(): void {
    this.#watch.close();
    native.fileClose(this.#fd);
    this.#reactor.arena.release(this.#buffer);
  }

  #onReadable(): void {
    // Ends: an answer that is not due is a fault, and only our own messages make one due.
    while (!this.#ended && this.#receive());
  }

  /** Takes in what there is, up to the end of an answer. @returns whether there was anything */
  #receive(): boolean {
    const address = this.#reactor.arena.baseAddress + this.#buffer + BUFFER_BYTES / 2 + this.#received;
    const outcome = native.socketReceive(this.#fd, address, REPLY_BYTES - this.#received, NO_FDS, this.#counts);
    if (outcome === -EAGAIN) return false;
    if (outcome <= 0) {
      this.#ended = true;
      return false;
    }
    this.#received += outcome;
    if (!this.#awaitsReply || this.#counts[1] !== 0) {
      this.#fail('the front-end speaks on the channel on which it is to answer');
    } else if (this.#received === REPLY_BYTES) {
      this.#received = 0;
      this.#takeReply();
    }
    return true;
  }

  #takeReply(): void {
    const [id, flags, payloadBytes, lo, hi] = this.#reply;
    if (id !== BackendMessage.configChange || flags !== (HEADER_VERSION | HEADER_REPLY) || payloadBytes !== 8) {
      this.#fail('the front-end answers what it was not asked');
      return;
    }
    this.#awaitsReply = false;
    if (lo !== 0 || hi !== 0) this.onRefusal();
    if (!this.#changedMeanwhile) return;
    this.#changedMeanwhile = false;
    this.configChanged();
  }

  #fail(message: string): void {
    this.#ended = true;
    this.onFault(new ProtocolError(message));
  }
}
