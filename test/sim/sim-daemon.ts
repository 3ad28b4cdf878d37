/** The daemon's side of a run: a real reactor with a real stack and a real controller, on a simulated ring. */
import type { BdevConfig, BdevModule, OpenBdev } from '../../src/bdev/bdev.js';
import type { IoStats } from '../../src/bdev/io-stats.js';
import { modules } from '../../src/bdev/modules.js';
import { BdevRegistry } from '../../src/bdev/registry.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import { BlkController } from '../../src/vhost-user/blk-controller.js';
import { qcow2On } from '../bdev/stacks.js';
import { unlocked } from '../harness/qcow2.js';
import { limitedModule } from '../support/limited.js';
import { Violation } from './oracle.js';
import { randomFor } from './plan.js';
import type { Setup } from './plan.js';
import { SECTOR_BYTES } from './sim-disk.js';
import { SERIAL } from './sim-guest.js';
import { SimReactor } from './sim-reactor.js';
import type { SimRing } from './sim-ring.js';
import type { Timeline } from './timeline.js';

const knownModules = [...modules, limitedModule] as unknown as readonly BdevModule<BdevConfig>[];

export interface DaemonOptions {
  readonly seed: number;
  /** Daemons before this one. */
  readonly lives: number;
  readonly timeline: Timeline;
  readonly diskPath: string;
  /** A folder on a tmpfs: what lies there outlives a daemon. */
  readonly memoryDir: string;
  /** Listening socket, taken over. */
  readonly listenFd: number;
  readonly log: (text: string) => void;
}

export class SimDaemon {
  readonly ring: SimRing;
  readonly reactor: SimReactor;
  readonly registry: BdevRegistry;
  readonly controller: BlkController;
  readonly listenFd: number;
  readonly #stats: IoStats[];

  constructor(setup: Setup, ring: SimRing, options: DaemonOptions) {
    this.listenFd = options.listenFd;
    this.ring = ring;
    this.reactor = new SimReactor({
      name: 'sim',
      arena: ring.arena,
      ring,
      clock: options.timeline,
      random: randomFor(options.seed, options.lives === 0 ? 'reactor' : `reactor ${options.lives}`),
      mode: setup.mode,
      pollUs: setup.pollUs,
    });
    this.registry = new BdevRegistry(this.reactor, knownModules);
    const configs = stackConfigs(setup, options);
    for (const config of configs) this.registry.create(config);
    const open: OpenBdev = this.registry.open(configs.at(-1)!.name, 'sim', 'bdev');
    this.#stats = configs.map(({ name }) => this.registry.stats(name)!);
    this.controller = new BlkController(
      this.reactor,
      open,
      { name: 'sim', serial: SERIAL, queues: setup.queues, readOnly: false, writeCache: true },
      (level, message, fields) => {
        // Of the fields those that are the same in every run.
        const facts = [fields?.['fault'], fields?.['error'], fields?.['reason']];
        options.log([`${level}: ${message}`, ...facts.filter((fact) => typeof fact === 'string')].join(' '));
      },
    );
  }

  listen(): void {
    this.controller.listen({ fd: this.listenFd });
  }

  /** Begins an operation on the image there is in the stack, between two steps. It may be refused. */
  edit(operation: string, params: Readonly<Record<string, unknown>>, onBegin: () => void): void {
    const bdevs = this.registry.names().map((name) => this.registry.get(name)!);
    const image = bdevs.find((bdev) => bdev.operate !== undefined)!;
    this.reactor.defer(() => {
      onBegin();
      image.operate!(operation, params).catch(() => undefined);
    });
  }

  /** After the orderly end. Throws Violation. */
  checkNothingLeft(): void {
    if (this.ring.inflight > 0) throw new Violation(`${this.ring.inflight} disk requests are left`);
    for (const { inflight } of this.#stats)
      if (inflight > 0) throw new Violation(`${inflight} requests of a bdev are left`);
    if (this.reactor.timersDue > 0) throw new Violation(`${this.reactor.timersDue} timers are left`);
  }
}

function stackConfigs(setup: Setup, { diskPath, memoryDir }: DaemonOptions): BdevConfig[] {
  const blockSizeBytes = (setup.blockSectors * SECTOR_BYTES) as 512 | 4096;
  const uring: UringConfig = {
    name: 'leaf',
    module: 'uring',
    path: diskPath,
    readOnly: false,
    create: null,
    blockSizeBytes,
    direct: false,
    iopoll: false,
    fixedBuffers: setup.fixedBuffers,
    lock: false,
  };
  const malloc = { name: 'leaf', module: 'malloc', sizeBytes: setup.sectors * SECTOR_BYTES, blockSizeBytes };
  const configs: BdevConfig[] = [setup.leaf === 'uring' ? uring : malloc];
  const { image } = setup;
  const filters = [...setup.filters];
  if (image !== null) {
    const restartDir = image.isLogged ? memoryDir : null;
    const key = image.isEncrypted ? { unlocked: unlocked() } : {};
    filters.splice(image.at, 0, qcow2On({ restartDir, codecThreads: 0, ...key }));
  }
  filters.forEach((filter, i) => configs.push(filter(`filter${i}`, configs.at(-1)!.name)));
  return configs;
}
