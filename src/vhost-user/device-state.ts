/**
 * State of the device that a migration carries along (vhost-user.rst, "Migrating back-end state"), for front-ends that ask for it.
 * A block device has little: rings and requests are the front-end's business, data is on the disk. What remains is the cache mode
 * that the guest chose.
 *
 *     0 u32 magic "STDS"     4 u32 version 1     8 u32 writeback 0, 1
 *
 * The channel is a pipe or a socket of the front-end's, and nothing here waits for it: the state fits into any, and has been
 * written and closed when the front-end asks what became of it.
 */
import { readSync, writeSync } from 'node:fs';
import { native } from '../../native/index.js';
import type { BlkDevice } from './blk-device.js';

const MAGIC = 0x53445453;
const VERSION = 1;
const STATE_BYTES = 12;

export class DeviceStateTransfer {
  readonly #device: BlkDevice;
  /** The channel that a state is to be read from; negative when none is. */
  #loadFd = -1;
  #succeeded = false;

  constructor(device: BlkDevice) {
    this.#device = device;
  }

  /** Writes the state. @param fd taken over, non-blocking. @returns whether it was taken whole */
  save(fd: number): boolean {
    const bytes = Buffer.alloc(STATE_BYTES);
    bytes.writeUInt32LE(MAGIC, 0);
    bytes.writeUInt32LE(VERSION, 4);
    bytes.writeUInt32LE(this.#device.writeback ? 1 : 0, 8);
    this.close();
    this.#succeeded = attempt(() => writeSync(fd, bytes)) === STATE_BYTES;
    native.fileClose(fd);
    return this.#succeeded;
  }

  /** A state will be written to the channel. @param fd taken over, non-blocking */
  load(fd: number): void {
    this.close();
    this.#succeeded = false;
    this.#loadFd = fd;
  }

  /** The transfer is over: whether it went well. A state that was to be loaded is in force then. */
  check(): boolean {
    if (this.#loadFd >= 0) {
      this.#succeeded = this.#read();
      this.close();
    }
    return this.#succeeded;
  }

  /** Lets go of a channel that nobody asked about. */
  close(): void {
    if (this.#loadFd >= 0) native.fileClose(this.#loadFd);
    this.#loadFd = -1;
  }

  #read(): boolean {
    // One byte more than there may be: the end has to follow.
    const bytes = Buffer.alloc(STATE_BYTES + 1);
    let received = 0;
    while (received < bytes.length) {
      const count = attempt(() => readSync(this.#loadFd, bytes, received, bytes.length - received, null));
      if (count < 0) return false;
      if (count === 0) break;
      received += count;
    }
    const writeback = bytes.readUInt32LE(8);
    if (received !== STATE_BYTES || bytes.readUInt32LE(0) !== MAGIC || bytes.readUInt32LE(4) !== VERSION) return false;
    if (writeback > 1) return false;
    this.#device.writeback = writeback === 1;
    return true;
  }
}

/** Bytes moved, or -1. */
function attempt(move: () => number): number {
  try {
    return move();
  } catch {
    return -1;
  }
}
