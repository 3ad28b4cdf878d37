/** The daemon's side of a run: a real reactor with a real stack and a real controller, on a simulated ring. */
import { BdevError } from '../../src/bdev/bdev.js';
import type { BdevConfig, BdevModule, OpenBdev } from '../../src/bdev/bdev.js';
import type { IoStats } from '../../src/bdev/io-stats.js';
import { Mirror } from '../../src/bdev/mirror/mirror.js';
import { modules } from '../../src/bdev/modules.js';
import { BdevRegistry } from '../../src/bdev/registry.js';
import { startTask } from '../../src/bdev/task.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import { BlkController } from '../../src/vhost-user/blk-controller.js';
import { qcow2On } from '../bdev/stacks.js';
import { unlocked } from '../harness/qcow2.js';
import { limitedModule } from '../support/limited.js';
import { Violation } from './oracle.js';
import { randomFor } from './plan.js';
import type { MirrorStep, Setup } from './plan.js';
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
  /** Of the other disk, if there is one. */
  readonly otherPath: string;
  /** The guest's disk was moved to the other one. */
  readonly isMoved: boolean;
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
  readonly #chunkBytes: number;
  /** Names of the guest's disk and of the other one. */
  #names: readonly [string, string];
  #mirror: Mirror | null = null;
  #isEnding = false;

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
    const others = otherConfigs(setup, options);
    for (const config of [...configs, ...others]) this.registry.create(config);
    const names = [configs.at(-1)!.name, others.at(-1)?.name ?? ''] as const;
    this.#names = options.isMoved ? [names[1], names[0]] : names;
    this.#chunkBytes = Math.max(setup.blockSectors, setup.sectors / (setup.mirror?.chunks ?? 1)) * SECTOR_BYTES;
    const open: OpenBdev = this.registry.open(this.#names[0], 'sim', 'bdev');
    this.#stats = [...configs, ...others].map(({ name }) => this.registry.stats(name)!);
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
    const image = bdevs.find((bdev) => bdev.operate !== undefined);
    // It is being closed.
    if (image === undefined) return;
    this.reactor.defer(() => {
      onBegin();
      image.operate!(operation, params).catch(() => undefined);
    });
  }

  /** An operator's step, between two of the reactor's. It may be refused. @param onPivot called when the move is to be written down */
  mirror(step: MirrorStep, onPivot: () => void): void {
    this.reactor.defer(() => {
      switch (step) {
        case 'start':
          this.#startMirror();
          return;
        case 'cancel':
          this.#mirror?.cancel().catch(() => undefined);
          return;
        case 'pivot':
          if (this.#mirror !== null) this.#pivot(this.#mirror, onPivot);
      }
    });
  }

  #startMirror(): void {
    if (this.#isEnding || this.#mirror?.isOver === false) return;
    const { registry, reactor, controller } = this;
    const [, target] = this.#names;
    const options = { user: controller, registry, reactor, target, bytesPerSecond: 0, chunkBytes: this.#chunkBytes };
    try {
      this.#mirror = new Mirror(options);
    } catch (error) {
      // The other disk can do less.
      if (!(error instanceof BdevError)) throw error;
    }
  }

  #pivot(mirror: Mirror, onPivot: () => void): void {
    const commit = (): void => {
      onPivot();
      mirror.commitPivot();
      this.#names = [this.#names[1], this.#names[0]];
    };
    startTask(mirror.prepare(), commit, (error) => {
      if (!(error instanceof BdevError)) throw error;
    });
  }

  /** Ends a mirror. @param step lets the reactor go on */
  endMirror(step: () => void): void {
    this.#isEnding = true;
    const mirror = this.#mirror;
    if (mirror === null) return;
    while (mirror.isPivoting) step();
    if (mirror.isActive) mirror.cancel().catch(() => undefined);
    while (!mirror.isOver) step();
  }

  /** After the orderly end. Throws Violation. */
  checkNothingLeft(): void {
    if (this.ring.inflight > 0) throw new Violation(`${this.ring.inflight} disk requests are left`);
    for (const { inflight } of this.#stats)
      if (inflight > 0) throw new Violation(`${inflight} requests of a bdev are left`);
    if (this.reactor.timersDue > 0) throw new Violation(`${this.reactor.timersDue} timers are left`);
  }
}

function leafConfig(name: string, path: string, setup: Setup): UringConfig {
  return {
    name,
    module: 'uring',
    path,
    readOnly: false,
    create: null,
    blockSizeBytes: (setup.blockSectors * SECTOR_BYTES) as 512 | 4096,
    direct: false,
    iopoll: false,
    fixedBuffers: setup.fixedBuffers,
    lock: false,
  };
}

/** The disk that the guest's may be moved to. */
function otherConfigs(setup: Setup, { otherPath }: DaemonOptions): BdevConfig[] {
  if (setup.mirror === null) return [];
  const configs: BdevConfig[] = [leafConfig('other', otherPath, setup)];
  setup.mirror.filters.forEach((filter, i) => configs.push(filter(`other${i}`, configs.at(-1)!.name)));
  return configs;
}

function stackConfigs(setup: Setup, { diskPath, memoryDir }: DaemonOptions): BdevConfig[] {
  const blockSizeBytes = (setup.blockSectors * SECTOR_BYTES) as 512 | 4096;
  const uring = leafConfig('leaf', diskPath, setup);
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
