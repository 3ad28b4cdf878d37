/**
 * An image file on a bdev: metadata is moved through a buffer in the arena, so the bytes may lie anywhere.
 *
 * Invariant: what is not a whole block is read, changed and written as one; two writes to the same block never overlap, as the
 * users of one file's metadata take turns.
 */
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';
import type { Bdev, IoChannel } from '../bdev.js';
import { IoFlag, IoType } from '../bdev-io.js';
import type { ImageFile } from './image-file.js';
import { TaskIo } from '../task-io.js';
import type { Task } from '../task.js';

const BUFFER_BYTES = 256 * 1024;

export class ChannelFile implements ImageFile {
  readonly bdev: Bdev;
  readonly channel: IoChannel;
  readonly #reactor: Reactor;

  constructor(bdev: Bdev, channel: IoChannel, reactor: Reactor) {
    this.bdev = bdev;
    this.channel = channel;
    this.#reactor = reactor;
  }

  get sizeBytes(): number {
    return this.bdev.blockCount * this.bdev.blockSizeBytes;
  }

  *read(offset: number, bytes: Uint8Array): Task<void> {
    const there = Math.max(0, Math.min(bytes.length, this.sizeBytes - offset));
    bytes.fill(0, there);
    yield* this.#inPieces(offset, there, function* (file, request, address, piece) {
      yield* file.#transfer(request, IoType.read, piece.start, piece.length, address);
      bytes.set(file.#view(address + piece.skip, piece.bytes), piece.done);
    });
  }

  *write(offset: number, bytes: Uint8Array): Task<void> {
    if (offset + bytes.length > this.sizeBytes) {
      throw new BdevError(
        'too-small',
        'base',
        `bdev ${this.bdev.name} ends before ${offset + bytes.length}`,
        'make it larger',
      );
    }
    yield* this.#inPieces(offset, bytes.length, function* (file, request, address, piece) {
      const isWhole = piece.skip === 0 && piece.bytes === piece.length;
      if (!isWhole) yield* file.#transfer(request, IoType.read, piece.start, piece.length, address);
      file.#view(address + piece.skip, piece.bytes).set(bytes.subarray(piece.done, piece.done + piece.bytes));
      yield* file.#transfer(request, IoType.write, piece.start, piece.length, address);
    });
  }

  *sync(): Task<void> {
    const request = new TaskIo(this.channel, this.bdev);
    request.io.prepare(IoType.flush, 0, 0, 0);
    yield* request.run();
  }

  *grow(sizeBytes: number): Task<void> {
    const { blockSizeBytes, size } = this.bdev;
    const wanted = Math.ceil(sizeBytes / blockSizeBytes) * blockSizeBytes;
    if (wanted > this.sizeBytes) size.resize(wanted);
  }

  /** Has the storage allocate whole blocks that read as zeroes, where it can do so without writing. Throws BdevError. */
  *allocate(offset: number, lengthBytes: number): Task<void> {
    yield* this.#clear(IoType.writeZeroes, offset, lengthBytes, IoFlag.noFallback);
  }

  /** Has the storage give whole blocks back, if it can. Throws BdevError. */
  *deallocate(offset: number, lengthBytes: number): Task<void> {
    yield* this.#clear(IoType.discard, offset, lengthBytes, 0);
  }

  *#clear(type: IoType, offset: number, lengthBytes: number, flags: number): Task<void> {
    if (!this.bdev.supports(type)) return;
    const request = new TaskIo(this.channel, this.bdev);
    request.io.prepare(type, offset, lengthBytes, flags);
    yield* request.run();
  }

  *#inPieces(
    offset: number,
    lengthBytes: number,
    each: (file: ChannelFile, request: TaskIo, address: number, piece: Piece) => Task<void>,
  ): Task<void> {
    if (lengthBytes === 0) return;
    const block = this.bdev.blockSizeBytes;
    const bufferBytes = Math.min(BUFFER_BYTES, Math.ceil(lengthBytes / block) * block + block);
    const address = this.#reactor.arena.allocate(bufferBytes);
    try {
      const request = new TaskIo(this.channel, this.bdev);
      for (let done = 0; done < lengthBytes;) {
        const skip = (offset + done) % block;
        const bytes = Math.min(lengthBytes - done, bufferBytes - skip);
        const length = Math.ceil((skip + bytes) / block) * block;
        const fits = length <= bufferBytes ? bytes : bytes - ((skip + bytes) % block);
        const wholeLength = Math.ceil((skip + fits) / block) * block;
        yield* each(this, request, address, {
          start: offset + done - skip,
          length: wholeLength,
          skip,
          bytes: fits,
          done,
        });
        done += fits;
      }
    } finally {
      this.#reactor.arena.release(address);
    }
  }

  *#transfer(request: TaskIo, type: IoType, offset: number, lengthBytes: number, address: number): Task<void> {
    request.io.prepare(type, offset, lengthBytes, 0);
    request.io.addSegment(address, lengthBytes);
    yield* request.run();
  }

  #view(address: number, lengthBytes: number): Uint8Array {
    return this.#reactor.arena.view8(address, lengthBytes);
  }
}

/** Part of a transfer that fits the buffer. */
interface Piece {
  /** First whole block, and the length of the whole blocks. */
  readonly start: number;
  readonly length: number;
  /** Where in them the bytes are, and how many. */
  readonly skip: number;
  readonly bytes: number;
  /** Bytes before these. */
  readonly done: number;
}
