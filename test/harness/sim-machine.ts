/**
 * A bdev stack on simulated disks, without a guest: disks that outlive processes, and processes that use them and end, orderly or
 * at any request.
 */
import { mkdtempSync, readFileSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { BdevConfig, BdevModule } from '../../src/bdev/bdev.js';
import { modules } from '../../src/bdev/modules.js';
import { BdevRegistry } from '../../src/bdev/registry.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import type { SeededRandom } from '../../src/poller/clock.js';
import { randomFor } from '../sim/plan.js';
import type { SimDisk } from '../sim/sim-disk.js';
import { SimArena, SimProcess } from '../sim/sim-process.js';
import { SimReactor } from '../sim/sim-reactor.js';
import { SimRing } from '../sim/sim-ring.js';
import type { Fault, SimRequest } from '../sim/sim-ring.js';
import { Timeline } from '../sim/timeline.js';
import { Trace } from '../sim/trace.js';
import type { OpenDisk } from '../support/rig.js';
import { limitedModule } from '../support/limited.js';
import { logDiskModule } from '../support/log-disk.js';

const knownModules = [...modules, limitedModule, logDiskModule] as unknown as readonly BdevModule<BdevConfig>[];
const ARENA_BYTES = 2 ** 34;
const LATENCY_US = 20;
const STEP_US = 2;
const STEPS_MAX = 100_000;

let arena: SimArena | null = null;
/**
 * Makers of bdevs over the files at some paths, bases first; the last is the one to be used. What lies in `memoryDir` outlives a
 * process and not the host.
 */
export type Stack = (paths: readonly string[], memoryDir: string) => readonly BdevConfig[];

/** Thrown where a process dies. */
export class Died extends Error {}

export type MemoryFiles = ReadonlyMap<string, Buffer>;

/** The disks of one host. */
export class SimMachine {
  readonly disks: readonly SimDisk[];
  /** Files whose size is all that is used of them: `disk0`, `disk1`, ... of a folder, which images may name. */
  readonly paths: readonly string[];
  /** A folder on a tmpfs. */
  readonly memoryDir = mkdtempSync('/dev/shm/strata-test-');
  readonly #folder = mkdtempSync('/dev/shm/strata-test-');
  readonly #inodes: readonly number[];

  /** @param memory files of the memory folder by name */
  constructor(disks: readonly SimDisk[], memory: MemoryFiles = new Map()) {
    for (const [name, bytes] of memory) writeFileSync(join(this.memoryDir, name), bytes);
    this.disks = disks;
    this.paths = disks.map((_, i) => join(this.#folder, `disk${i}`));
    this.#inodes = this.paths.map((path, i) => {
      writeFileSync(path, '');
      truncateSync(path, disks[i]!.sizeBytes);
      return statSync(path).ino;
    });
  }

  diskOf(inode: number): SimDisk {
    return this.disks[this.#inodes.indexOf(inode)]!;
  }

  /** What lies in the memory folder. */
  memory(): MemoryFiles {
    return new Map(readdirSync(this.memoryDir).map((name) => [name, readFileSync(join(this.memoryDir, name))]));
  }

  close(): void {
    rmSync(this.#folder, { recursive: true });
    rmSync(this.memoryDir, { recursive: true });
  }
}

export interface LifeOptions {
  readonly seed: number;
  readonly fault?: (request: SimRequest) => Fault | null;
  /** Dies before this submission or completion, counted from 1. */
  readonly diesAt?: number;
}

/** One process's life with a stack on a machine. */
export class SimLife {
  readonly arena: SimArena;
  readonly ring: SimRing;
  readonly reactor: SimReactor;
  readonly open: OpenDisk;
  /** Submissions and completions so far. */
  events = 0;
  readonly #process = new SimProcess();
  readonly #diesAt: number;
  readonly #registry: BdevRegistry;
  readonly #timeline = new Timeline();

  /** Opens the stack, which may take requests. Throws Died. */
  constructor(machine: SimMachine, stack: Stack, options: LifeOptions) {
    arena ??= new SimArena(ARENA_BYTES);
    this.arena = arena;
    this.#diesAt = options.diesAt ?? Infinity;
    const stepUs = randomFor(options.seed, 'steps');
    this.ring = new SimRing({
      arena,
      timeline: this.#timeline,
      trace: new Trace(),
      random: randomFor(options.seed, 'disk'),
      diskOf: (inode) => machine.diskOf(inode),
      latencyUs: latencyOf(randomFor(options.seed, 'latency')),
      fault: options.fault ?? (() => null),
      pass: (untilUs, enough) => this.#process.outside(() => this.#timeline.passUntil(untilUs, enough)),
      stepUs: () => stepUs.next() * STEP_US,
      beforeIo: () => {
        this.events++;
        this.#dieWhenDue();
      },
      entries: 64,
    });
    this.reactor = new SimReactor({
      name: 'harness',
      arena,
      ring: this.ring,
      clock: this.#timeline,
      random: randomFor(options.seed, 'reactor'),
      mode: 'busy',
      pollUs: 0,
    });
    this.#registry = new BdevRegistry(this.reactor, knownModules);
    try {
      this.open = this.#process.run(() => {
        const configs = stack(machine.paths, machine.memoryDir);
        for (const config of configs) this.#registry.create(config);
        return this.#registry.open(configs.at(-1)!.name, 'harness', 'name');
      });
    } catch (error) {
      this.kill();
      throw error;
    }
  }

  /** Steps until `reached`. Throws Died, or when it takes too long. */
  until(reached: () => boolean, what: string): void {
    for (let steps = 0; !reached(); steps++) {
      if (steps === STEPS_MAX) throw new Error(`${what}: not reached in ${steps} steps`);
      this.#process.run(() => this.reactor.step());
      // A task may have kept it to itself.
      this.#dieWhenDue();
    }
  }

  /** One step of the reactor. */
  step(): void {
    this.#process.run(() => this.reactor.step());
  }

  /** Runs something that an operator asks of the process. Throws Died. */
  perform<T>(work: () => T): T {
    const result = this.#process.run(work);
    this.#dieWhenDue();
    return result;
  }

  /** Whoever is dead does nothing any more. */
  #dieWhenDue(): void {
    if (this.events >= this.#diesAt) throw new Died();
  }

  /** The orderly end. Throws when anything is left. */
  close(): void {
    const { inflight } = this.open.stats;
    this.#process.run(() => {
      this.open.close();
      this.#registry.destroyAll();
    });
    const { timersDue } = this.reactor;
    const left = [inflight, this.ring.inflight, timersDue, this.#process.openDescriptors, this.arena.heldBytes];
    this.kill();
    if (left.some((count) => count > 0)) {
      throw new Error(`left over: ${left.join(', ')} (requests, on the ring, timers, descriptors, bytes of memory)`);
    }
  }

  /** The end of the process, wherever it is. @param part of a change that was with the kernel, the sectors that still happen */
  kill(part?: (sectors: number) => number): void {
    this.ring.abandon(part);
    this.#process.reclaim();
    this.arena.reclaim();
  }
}

function latencyOf(random: SeededRandom): () => number {
  return () => 1 + random.next() * LATENCY_US;
}

/** A uring leaf on a simulated disk. */
export function simDisk(name: string, path: string, options: Partial<UringConfig> = {}): UringConfig {
  return {
    name,
    module: 'uring',
    path,
    readOnly: false,
    create: null,
    blockSizeBytes: 512,
    direct: false,
    iopoll: false,
    fixedBuffers: false,
    lock: false,
    ...options,
  };
}
