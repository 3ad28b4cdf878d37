/**
 * null: a disk that keeps nothing. Writes vanish, reads leave the buffer as it is (or zero it). For measuring what everything
 * above costs; the template of a leaf module.
 */
import { native } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import type { Bdev, BdevConfig, BdevLimits, BdevModule, IoChannel } from '../bdev.js';
import { unlimited } from '../bdev.js';
import { IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';

export interface NullConfig extends BdevConfig {
  readonly module: 'null';
  readonly sizeBytes: number;
  readonly blockSizeBytes: 512 | 4096;
  /** Reads return zeroes instead of what the buffer held. */
  readonly readZeroes: boolean;
}

class NullChannel implements IoChannel {
  submit(io: BdevIo): void {
    io.complete(IoStatus.success, 0);
  }

  close(): void {
    // Holds nothing.
  }
}

class ZeroChannel implements IoChannel {
  readonly #reactor: Reactor;
  readonly #entry = new Float64Array(512);

  constructor(reactor: Reactor) {
    this.#reactor = reactor;
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.read) {
      const base = this.#reactor.arena.baseAddress;
      for (let i = 0; i < io.segmentCount; i++) {
        this.#entry[0] = base + io.segmentAddresses[i]!;
        this.#entry[1] = 0;
        this.#entry[2] = io.segmentLengths[i]!;
        native.copyList(this.#entry, 1);
      }
    }
    io.complete(IoStatus.success, 0);
  }

  close(): void {
    // Holds nothing.
  }
}

class NullBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'null';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly readOnly = false;
  readonly supportsFua = true;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[] = [];
  readonly #readZeroes: boolean;

  constructor(config: NullConfig) {
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.blockSizeBytes = config.blockSizeBytes;
    this.size = new BdevSize(config.blockSizeBytes, { sizeBytes: () => config.sizeBytes, resize: () => undefined });
    this.limits = unlimited(config.blockSizeBytes);
    this.#readZeroes = config.readZeroes;
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type !== IoType.reset;
  }

  openChannel(reactor: Reactor): IoChannel {
    return this.#readZeroes ? new ZeroChannel(reactor) : new NullChannel();
  }

  describe(): Record<string, unknown> {
    return { readZeroes: this.#readZeroes };
  }

  destroy(): void {
    // Holds nothing.
  }
}

export const nullModule: BdevModule<NullConfig> = {
  name: 'null',
  create: (config) => new NullBdev(config),
};
