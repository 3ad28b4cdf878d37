/** Requests as tasks wait for them. */
import { BdevError } from './bdev.js';
import type { Bdev, IoChannel } from './bdev.js';
import { BdevIo, IO_TYPE_NAMES, IoStatus } from './bdev-io.js';
import type { IoOwner } from './bdev-io.js';
import type { Task, Wait, Waiter } from './task.js';

/** One request that a task waits for. */
export class TaskIo implements Wait, IoOwner {
  readonly io = new BdevIo();
  readonly #channel: IoChannel;
  readonly #bdev: Bdev;
  #waiter: Waiter | null = null;

  constructor(channel: IoChannel, bdev: Bdev) {
    this.#channel = channel;
    this.#bdev = bdev;
  }

  /** Submits the io, which is prepared, and waits for it. Throws BdevError. */
  *run(): Task<void> {
    yield this;
    const { type, status, errno, offsetBytes, lengthBytes } = this.io;
    // Only what may be left out says that it is not supported.
    if (status === IoStatus.success || status === IoStatus.notSupported) return;
    const words = `${IO_TYPE_NAMES[type]} of ${lengthBytes} bytes at ${offsetBytes} of bdev ${this.#bdev.name}`;
    const code = status === IoStatus.noSpace ? 'no-space' : 'io-error';
    const hint = status === IoStatus.noSpace ? 'make room' : 'look at the device and the log of the kernel';
    throw new BdevError(code, 'base', `${words} failed: errno ${errno}`, hint);
  }

  begin(waiter: Waiter): void {
    this.#waiter = waiter;
    this.io.push(this, 0);
    this.#channel.submit(this.io);
  }

  onDone(): void {
    this.#waiter!.wake();
  }
}
