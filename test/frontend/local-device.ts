/**
 * A disk served in this very thread: the real controller on a real reactor, socket and io_uring, stepped by hand. Give `step`
 * to the front-end, whose waits then drive the device.
 *
 *     const device = new LocalDevice([{ name: 'disk', module: 'malloc', ... }]);
 *     const frontend = await Frontend.connect(device.socketPath, { step: device.step });
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { Arena } from '../../native/index.js';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { modules } from '../../src/bdev/modules.js';
import { BdevRegistry } from '../../src/bdev/registry.js';
import { SeededRandom, SystemClock } from '../../src/poller/clock.js';
import { Reactor } from '../../src/poller/reactor.js';
import type { ReactorMode } from '../../src/poller/reactor.js';
import { Uring } from '../../src/poller/uring.js';
import { BlkController } from '../../src/vhost-user/blk-controller.js';
import type { BlkControllerOptions } from '../../src/vhost-user/blk-controller.js';
import type { LogFunction } from '../../src/vhost-user/log.js';

export interface LogEntry {
  readonly level: string;
  readonly message: string;
  readonly fields: unknown;
}

const ARENA_BYTES = 2 ** 36;

export class LocalDevice implements AsyncDisposable {
  readonly socketPath: string;
  readonly reactor: Reactor;
  readonly registry: BdevRegistry;
  readonly controller: BlkController;
  /** What the controller logged. */
  readonly log: LogEntry[] = [];
  /** Drives the device by one step. */
  readonly step = (): void => {
    this.reactor.step();
  };
  readonly #directory = mkdtempSync(join(tmpdir(), 'strata-'));

  /** Creates the bdevs, bases first, and serves the last one. @param mode matters to `reactor.runSlice` only */
  constructor(bdevs: readonly BdevConfig[], options: Partial<BlkControllerOptions> = {}, mode: ReactorMode = 'busy') {
    this.socketPath = join(this.#directory, 'disk.sock');
    const arena = new Arena(ARENA_BYTES);
    this.reactor = new Reactor({
      name: 'local',
      arena,
      ring: new Uring(arena),
      clock: new SystemClock(),
      random: new SeededRandom(1),
      mode,
      pollUs: 100,
    });
    this.registry = new BdevRegistry(this.reactor, modules);
    for (const config of bdevs) this.registry.create(config);
    const open = this.registry.open(bdevs.at(-1)!.name, 'local', 'bdev');
    const log: LogFunction = (level, message, fields) => this.log.push({ level, message, fields });
    const defaults = { name: 'local', serial: 'local-device', queues: 1, readOnly: false, writeCache: true };
    this.controller = new BlkController(this.reactor, open, { ...defaults, ...options }, log);
    this.controller.listen({ socketPath: this.socketPath, mode: 0o600 });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    let closed = false;
    void this.controller.close().then(() => (closed = true));
    while (!closed) {
      this.step();
      await setImmediate();
    }
    this.registry.destroyAll();
    this.reactor.ring.close();
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
