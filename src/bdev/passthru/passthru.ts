/** passthru: hands every request to its base unchanged. The template of a filter module: copy it and change `submit` and `onDone`. */
import type { Reactor } from '../../poller/reactor.js';
import type { BdevModule, IoChannel } from '../bdev.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import { FilterBdev } from '../filter-bdev.js';
import type { FilterConfig } from '../filter-bdev.js';

export interface PassthruConfig extends FilterConfig {
  readonly module: 'passthru';
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

class PassthruBdev extends FilterBdev {
  openChannel(_reactor: Reactor): IoChannel {
    return new PassthruChannel(this.context.open(this.base));
  }
}

export const passthruModule: BdevModule<PassthruConfig> = {
  name: 'passthru',
  create: (config, context) => new PassthruBdev(config, context),
};
