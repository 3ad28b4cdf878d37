/**
 * Messages on a front-end's socket: reassembly, checks of shape, replies.
 *
 * Invariants
 * - Never reads beyond the message at hand, so descriptors belong to the message whose first byte they came with.
 * - A message handed out has exactly the payload size and number of descriptors its id asks for; whatever else was received
 *   is closed.
 */
import { EAGAIN, SystemError, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import {
  HEADER_BYTES,
  HEADER_NEED_REPLY,
  HEADER_REPLY,
  HEADER_VERSION,
  HEADER_VERSION_MASK,
  MESSAGE_FDS_MAX,
  MESSAGE_SHAPES,
  PAYLOAD_BYTES_MAX,
  ProtocolError,
} from './protocol.js';
import type { MessageShape } from './protocol.js';

/** The message at hand: valid until the next `receive`. */
export interface IncomingMessage {
  readonly id: number;
  readonly shape: MessageShape;
  readonly needReply: boolean;
  readonly payloadBytes: number;
}

const NO_FDS = new Int32Array(0);
const EPIPE = 32;
const ECONNRESET = 104;

export class MessageStream {
  readonly #arena: Arena;
  readonly #fd: number;
  readonly #buffer: number;
  readonly #header: Uint32Array;
  /** Payload as words and bytes. */
  readonly words: Uint32Array;
  readonly bytes: Uint8Array;
  readonly #reply: number;
  readonly #replyWords: Uint32Array;
  readonly #replyBytes: Uint8Array;
  readonly #fds = new Int32Array(MESSAGE_FDS_MAX);
  readonly #counts = new Int32Array(2);
  #fdCount = 0;
  #received = 0;

  /** @param fd connected socket, taken over */
  constructor(arena: Arena, fd: number) {
    this.#arena = arena;
    this.#fd = fd;
    this.#buffer = arena.allocate(3 * 4096);
    this.#header = arena.view32(this.#buffer, 3);
    this.words = arena.view32(this.#buffer + HEADER_BYTES, PAYLOAD_BYTES_MAX / 4);
    this.bytes = arena.view8(this.#buffer + HEADER_BYTES, PAYLOAD_BYTES_MAX);
    this.#reply = arena.allocate(3 * 4096);
    this.#replyWords = arena.view32(this.#reply, (HEADER_BYTES + PAYLOAD_BYTES_MAX) / 4);
    this.#replyBytes = arena.view8(this.#reply, HEADER_BYTES + PAYLOAD_BYTES_MAX);
  }

  /**
   * The next whole message; null when more bytes have to come first; 'end' at the end of the stream.
   * Throws ProtocolError, SystemError.
   */
  receive(): IncomingMessage | null | 'end' {
    for (;;) {
      const wanted = this.#wanted();
      if (wanted === this.#received) return this.#complete();
      const outcome = this.#read(wanted - this.#received);
      if (outcome === -EAGAIN) return null;
      if (outcome === 0) return 'end';
      this.#received += outcome;
      if (this.#received === HEADER_BYTES) this.#checkHeader();
    }
  }

  /** Takes descriptor `i` of the message out of its hands. */
  takeFd(i: number): number {
    const fd = this.#fds[i]!;
    this.#fds[i] = -1;
    return fd;
  }

  /** Whether a part of a message is there. */
  get isMidMessage(): boolean {
    return this.#received > 0;
  }

  get fdCount(): number {
    return this.#fdCount;
  }

  /** Descriptor `i`, still owned by the message. */
  fd(i: number): number {
    return this.#fds[i]!;
  }

  replyU64(id: number, lo: number, hi: number): void {
    this.#replyWords[3] = lo;
    this.#replyWords[4] = hi;
    this.#send(id, 8);
  }

  /**
   * Replies with the payload of the message itself, the first bytes of which may have been changed in place.
   * @param fds go along and stay the caller's
   */
  replyPayload(id: number, payloadBytes: number, fds = NO_FDS): void {
    this.#replyBytes.set(this.bytes.subarray(0, payloadBytes), HEADER_BYTES);
    this.#send(id, payloadBytes, fds);
  }

  /** Closes what the message brought and nobody took, and gets ready for the next. */
  finish(): void {
    for (let i = 0; i < this.#fdCount; i++) if (this.#fds[i]! >= 0) native.fileClose(this.#fds[i]!);
    this.#fdCount = 0;
    this.#received = 0;
  }

  close(): void {
    this.finish();
    native.fileClose(this.#fd);
    this.#arena.release(this.#buffer);
    this.#arena.release(this.#reply);
  }

  /** Bytes the message has, as far as that is known. */
  #wanted(): number {
    return this.#received < HEADER_BYTES ? HEADER_BYTES : HEADER_BYTES + this.#header[2]!;
  }

  #read(length: number): number {
    const isStart = this.#received === 0;
    const address = this.#arena.baseAddress + this.#buffer + this.#received;
    const fds = isStart ? this.#fds : NO_FDS;
    const outcome = native.socketReceive(this.#fd, address, length, fds, this.#counts);
    if (outcome === -EAGAIN) return outcome;
    // A peer that went away is the end, however it went.
    if (outcome === -ECONNRESET) return 0;
    if (outcome < 0) throw new SystemError(-outcome, 'receive a message');
    if (isStart) this.#fdCount = this.#counts[0]!;
    if (this.#counts[1] !== 0) {
      throw new ProtocolError(
        isStart ? 'more descriptors than any message has' : 'descriptors in the middle of a message',
      );
    }
    return outcome;
  }

  #checkHeader(): void {
    const id = this.#header[0]!;
    const flags = this.#header[1]!;
    const payloadBytes = this.#header[2]!;
    const shape = MESSAGE_SHAPES[id];
    if (shape === undefined) throw new ProtocolError(`message ${id} is not supported`);
    if ((flags & HEADER_VERSION_MASK) !== HEADER_VERSION)
      throw new ProtocolError(`${shape.name}: version ${flags & HEADER_VERSION_MASK}`);
    if ((flags & HEADER_REPLY) !== 0) throw new ProtocolError(`${shape.name}: a reply from the front-end`);
    if (payloadBytes < shape.payloadBytesMin || payloadBytes > shape.payloadBytesMax) {
      throw new ProtocolError(`${shape.name}: payload of ${payloadBytes} bytes`);
    }
    if (this.#fdCount < shape.fdsMin || this.#fdCount > shape.fdsMax) {
      throw new ProtocolError(`${shape.name}: ${this.#fdCount} descriptors`);
    }
  }

  #complete(): IncomingMessage {
    const id = this.#header[0]!;
    return {
      id,
      shape: MESSAGE_SHAPES[id]!,
      needReply: (this.#header[1]! & HEADER_NEED_REPLY) !== 0,
      payloadBytes: this.#header[2]!,
    };
  }

  #send(id: number, payloadBytes: number, fds = NO_FDS): void {
    this.#replyWords[0] = id;
    this.#replyWords[1] = HEADER_VERSION | HEADER_REPLY;
    this.#replyWords[2] = payloadBytes;
    const length = HEADER_BYTES + payloadBytes;
    const outcome = native.socketSend(this.#fd, this.#arena.baseAddress + this.#reply, length, fds);
    // The peer is gone: the end of the stream follows what it sent before.
    if (outcome === -EPIPE || outcome === -ECONNRESET) return;
    // Replies are far smaller than a socket's buffer: it is full only when the front-end never reads.
    if (outcome === -EAGAIN || (outcome >= 0 && outcome < length))
      throw new ProtocolError('the front-end does not read its replies');
    if (outcome < 0) throw new SystemError(-outcome, 'send a reply');
  }
}
