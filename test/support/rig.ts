/**
 * A real reactor on a real io_uring, driven by hand: what bdev tests run on. Time is simulated, so that timers cost none; only
 * the kernel's completions are waited for.
 */
import { Arena } from '../../native/index.js';
import type { BdevConfig, BdevModule, OpenBdev } from '../../src/bdev/bdev.js';
import type { IoStats } from '../../src/bdev/io-stats.js';
import { modules as productModules } from '../../src/bdev/modules.js';
import { BdevRegistry } from '../../src/bdev/registry.js';
import type { Ring } from '../../src/poller/ring.js';
import { Reactor } from '../../src/poller/reactor.js';
import { Uring } from '../../src/poller/uring.js';
import { limitedModule } from './limited.js';
import { reluctantModule } from './reluctant.js';
import { seededRandom } from './seed.js';
import { SimClock } from './sim-clock.js';

const modules = [...productModules, limitedModule, reluctantModule] as unknown as readonly BdevModule<BdevConfig>[];

const ARENA_BYTES = 2 ** 35;
/** Simulated time that passes in each step, and in each one that found nothing to do. */
const STEP_US = 1;
const IDLE_STEP_US = 25;
/** Real time that a step without work waits for the kernel. */
const KERNEL_WAIT_US = 2_000;
/** Steps until what is waited for must have happened. */
const STEPS_MAX = 2_000_000;
/** Steps in vain after which threads of the process get a moment. */
const THREAD_STEPS = 1_000;
const THREAD_WAIT_MS = 1;
const pause = new Int32Array(new SharedArrayBuffer(4));
/** Waits for the kernel that were in vain. */
const KERNEL_WAITS_MAX = 5_000;

let arena: Arena | null = null;
let ring: Ring | null = null;

/** One arena and one ring per test file: they outlive every rig. */
export const sharedArena = (): Arena => (arena ??= new Arena(ARENA_BYTES));
const sharedRing = (): Ring => (ring ??= new Uring(sharedArena()));

export type OpenDisk = OpenBdev & { readonly stats: IoStats };

export class Rig {
  readonly clock = new SimClock();
  readonly arena: Arena;
  readonly ring: Ring;
  readonly reactor: Reactor;
  readonly registry: BdevRegistry;
  /** Steps taken so far. */
  steps = 0;
  readonly #usedBytesBefore: number;

  /** @param ring one over the shared arena; the shared one when left out */
  constructor(name: string, ring: Ring = sharedRing()) {
    const { arena } = ring;
    this.arena = arena;
    this.ring = ring;
    this.#usedBytesBefore = arena.usedBytes;
    const random = seededRandom(0);
    this.reactor = new Reactor({ name, arena, ring, clock: this.clock, random, mode: 'busy', pollUs: 0 });
    this.registry = new BdevRegistry(this.reactor, modules);
  }

  /** Creates bdevs, bases first, and opens the last one. */
  open(configs: readonly BdevConfig[]): OpenDisk {
    for (const config of configs) this.registry.create(config);
    return this.registry.open(configs.at(-1)!.name, 'test', 'name');
  }

  /** Steps once; simulated time goes on. */
  step(): boolean {
    this.steps++;
    const busy = this.reactor.step();
    this.clock.advance(busy ? STEP_US : IDLE_STEP_US);
    return busy;
  }

  /** Steps until `reached`; throws when it takes too long. */
  until(reached: () => boolean, what: string): void {
    let kernelWaits = 0;
    for (let steps = 0; !reached(); steps++) {
      const { inflight } = this.ring;
      if ((steps >= STEPS_MAX && inflight === 0) || kernelWaits === KERNEL_WAITS_MAX) {
        throw new Error(`${what}: not reached in ${steps} steps, ${inflight} requests with the kernel`);
      }
      const busy = this.step();
      // Threads may be at work for it, on cores that others want, too.
      if (!busy && steps % THREAD_STEPS === THREAD_STEPS - 1) Atomics.wait(pause, 0, 0, THREAD_WAIT_MS);
      // What is tried again in every step is work, too, and may wait for a slow disk.
      if (this.ring.inflight === 0 || (busy && steps < STEPS_MAX)) continue;
      if (!this.ring.wait(KERNEL_WAIT_US)) kernelWaits++;
    }
  }

  /** Lets `us` of simulated time pass, in steps of at most 100 us. */
  pass(us: number): void {
    const end = this.clock.nowUs() + us;
    while (this.clock.nowUs() < end) {
      this.clock.advance(Math.min(100, end - this.clock.nowUs()));
      this.steps++;
      this.reactor.step();
    }
  }

  /** Ends all bdevs; throws when they left memory in use or requests with the kernel. */
  close(): void {
    this.registry.destroyAll();
    if (this.ring.inflight > 0) throw new Error(`rig: ${this.ring.inflight} requests are still with the kernel`);
    const leaked = this.arena.usedBytes - this.#usedBytesBefore;
    if (leaked !== 0) throw new Error(`rig: ${leaked} bytes of the arena are still in use`);
  }
}
