/** salvage: a disk whose sectors that cannot be read are zeroes, each named by a warning. For `convert --salvage`. */
import assert from 'node:assert/strict';
import type { Reactor } from '../../poller/reactor.js';
import type { BdevModule, IoChannel } from '../../bdev/bdev.js';
import { BdevIo, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import { FilterBdev } from '../../bdev/filter-bdev.js';
import type { FilterConfig } from '../../bdev/filter-bdev.js';

export interface SalvageConfig extends FilterConfig {
  readonly module: 'salvage';
  /** Called with the offset of each sector that is given up. */
  readonly onLoss: (offset: number, errno: number) => void;
}

class SalvageBdev extends FilterBdev {
  readonly #config: SalvageConfig;

  constructor(config: SalvageConfig, context: ConstructorParameters<typeof FilterBdev>[1]) {
    super(config, context, () => ({ readOnly: true }));
    this.#config = config;
  }

  openChannel(reactor: Reactor): IoChannel {
    return new SalvageChannel(this.context.open(this.base), reactor, this.blockSizeBytes, this.#config.onLoss);
  }
}

class SalvageChannel implements IoChannel, IoOwner {
  readonly base: IoChannel;
  readonly reactor: Reactor;
  readonly blockBytes: number;
  readonly onLoss: SalvageConfig['onLoss'];

  constructor(base: IoChannel, reactor: Reactor, blockBytes: number, onLoss: SalvageConfig['onLoss']) {
    this.base = base;
    this.reactor = reactor;
    this.blockBytes = blockBytes;
    this.onLoss = onLoss;
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.read) io.push(this, 0);
    this.base.submit(io);
  }

  onDone(io: BdevIo): void {
    if (io.status === IoStatus.success || io.status === IoStatus.again) io.complete(io.status, io.errno);
    else new SectorReader(this, io).next();
  }

  close(): void {
    this.base.close();
  }
}

/** Reads the sectors of a request that failed one after the other. */
class SectorReader implements IoOwner {
  readonly #channel: SalvageChannel;
  readonly #failed: BdevIo;
  readonly #io = new BdevIo();
  #done = 0;

  constructor(channel: SalvageChannel, failed: BdevIo) {
    assert(failed.segmentCount === 1, 'requests of the tool have one segment');
    this.#channel = channel;
    this.#failed = failed;
  }

  next(): void {
    if (this.#done === this.#failed.lengthBytes) {
      this.#failed.complete(IoStatus.success, 0);
      return;
    }
    const { blockBytes, base } = this.#channel;
    this.#io.prepare(IoType.read, this.#failed.offsetBytes + this.#done, blockBytes, 0);
    this.#io.addSegment(this.#failed.segmentAddresses[0]! + this.#done, blockBytes);
    this.#io.push(this, 0);
    base.submit(this.#io);
  }

  onDone(io: BdevIo): void {
    const { blockBytes, reactor, onLoss } = this.#channel;
    if (io.status !== IoStatus.success) {
      reactor.arena.view8(this.#failed.segmentAddresses[0]! + this.#done, blockBytes).fill(0);
      onLoss(io.offsetBytes, io.errno);
    }
    this.#done += blockBytes;
    // Not from within the completion: a disk that answers at once would nest them without end.
    reactor.defer(() => this.next());
  }
}

export const salvageModule: BdevModule<SalvageConfig> = {
  name: 'salvage',
  create: (config, context) => new SalvageBdev(config, context),
};
