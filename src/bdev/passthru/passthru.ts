/** passthru: hands every request to its base unchanged. The template of a filter module: copy it and change `submit` and `onDone`. */
import type { Reactor } from '../../poller/reactor.js';
import type { Bdev, BdevConfig, BdevContext, BdevLimits, BdevModule, IoChannel, UseGuard } from '../bdev.js';
import { IoType } from '../bdev-io.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import type { BdevSize } from '../bdev-size.js';

export interface PassthruConfig extends BdevConfig {
  readonly module: 'passthru';
  /** Name of the bdev below. */
  readonly base: string;
}

class PassthruChannel implements IoChannel, IoOwner {
  readonly #base: IoChannel;

  constructor(base: IoChannel) {
    this.#base = base;
  }

  submit(io: BdevIo): void {
    io.push(this, 0);
    this.#base.submit(io);
  }

  onDone(io: BdevIo): void {
    io.complete(io.status, io.errno);
  }

  close(): void {
    this.#base.close();
  }
}

class PassthruBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'passthru';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly guard: UseGuard | undefined;
  readonly readOnly: boolean;
  readonly supportsFua: boolean;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[];
  readonly #base: Bdev;
  readonly #context: BdevContext;

  constructor(config: PassthruConfig, context: BdevContext) {
    const base = context.base(config.base, 'base');
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.blockSizeBytes = base.blockSizeBytes;
    this.size = base.size;
    this.guard = base.guard;
    this.readOnly = base.readOnly;
    this.supportsFua = base.supportsFua;
    this.limits = base.limits;
    this.bases = [base];
    this.#base = base;
    this.#context = context;
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type === IoType.reset || this.#base.supports(type);
  }

  openChannel(_reactor: Reactor): IoChannel {
    return new PassthruChannel(this.#context.open(this.#base));
  }

  describe(): Record<string, unknown> {
    return { base: this.#base.name };
  }

  destroy(): void {
    // The base has an owner of its own.
  }
}

export const passthruModule: BdevModule<PassthruConfig> = {
  name: 'passthru',
  create: (config, context) => new PassthruBdev(config, context),
};
