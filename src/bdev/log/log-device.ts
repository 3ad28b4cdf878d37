/** The device of a log, in blocks, for slow operations. */
import type { Reactor } from '../../poller/reactor.js';
import type { Bdev, IoChannel } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import { TaskIo } from '../task-io.js';
import type { Task } from '../task.js';
import { BLOCK_BYTES, LogBlock } from './format.js';

export class LogDevice {
  readonly reactor: Reactor;
  readonly bdev: Bdev;
  readonly channel: IoChannel;

  constructor(reactor: Reactor, bdev: Bdev, channel: IoChannel) {
    this.reactor = reactor;
    this.bdev = bdev;
    this.channel = channel;
  }

  get blocks(): number {
    return Math.floor((this.bdev.blockCount * this.bdev.blockSizeBytes) / BLOCK_BYTES);
  }

  /** Memory for so many blocks, which whoever asks for it releases. */
  memory(blocks: number): { readonly address: number; readonly view: LogBlock; release(): void } {
    const { arena } = this.reactor;
    const address = arena.allocate(blocks * BLOCK_BYTES, BLOCK_BYTES);
    const view = new LogBlock(arena, address, blocks * BLOCK_BYTES);
    return { address, view, release: () => arena.release(address) };
  }

  /** Throws BdevError. */
  read(block: number, blocks: number, address: number): Task<void> {
    return this.#transfer(IoType.read, block, blocks, address);
  }

  /** Throws BdevError. */
  write(block: number, blocks: number, address: number): Task<void> {
    return this.#transfer(IoType.write, block, blocks, address);
  }

  /** Throws BdevError. */
  *flush(): Task<void> {
    const request = new TaskIo(this.channel, this.bdev);
    request.io.prepare(IoType.flush, 0, 0, 0);
    yield* request.run();
  }

  *#transfer(type: IoType, block: number, blocks: number, address: number): Task<void> {
    const request = new TaskIo(this.channel, this.bdev);
    request.io.prepare(type, block * BLOCK_BYTES, blocks * BLOCK_BYTES, 0);
    request.io.addSegment(address, blocks * BLOCK_BYTES);
    yield* request.run();
  }
}
