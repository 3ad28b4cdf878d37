/** The mirrors of one reactor's controllers, on the reactor's side: the last one of each controller. */
import { BdevError } from '../bdev/bdev.js';
import type { Bdev } from '../bdev/bdev.js';
import { Mirror } from '../bdev/mirror/mirror.js';
import type { MirrorInfo } from '../bdev/mirror/mirror.js';
import type { BdevRegistry } from '../bdev/registry.js';
import type { Reactor } from '../poller/reactor.js';
import type { BlkController } from '../vhost-user/blk-controller.js';
import type { MirrorParams } from './reactor-calls.js';

/** Operations that change what a disk holds behind the back of whoever mirrors it. */
const REWRITING = new Set(['applySnapshot']);

export class ReactorMirrors {
  readonly #reactor: Reactor;
  readonly #registry: BdevRegistry;
  readonly #mirrors = new Map<string, Mirror>();
  readonly #onEnd: (controller: string, info: MirrorInfo) => void;

  constructor(reactor: Reactor, registry: BdevRegistry, onEnd: (controller: string, info: MirrorInfo) => void) {
    this.#reactor = reactor;
    this.#registry = registry;
    this.#onEnd = onEnd;
  }

  /** Throws BdevError. */
  start(user: BlkController, { target, bytesPerSecond }: MirrorParams): MirrorInfo {
    const { name } = user;
    if (this.#mirrors.get(name)?.isActive === true) {
      throw new BdevError('busy', 'name', `${name} is mirrored already`, 'pivot or cancel that first');
    }
    const onEnd = (info: MirrorInfo): void => this.#onEnd(name, info);
    const mirror = new Mirror({
      user,
      registry: this.#registry,
      reactor: this.#reactor,
      target,
      bytesPerSecond,
      onEnd,
    });
    this.#mirrors.set(name, mirror);
    return mirror.info;
  }

  /** Throws BdevError when there is none. */
  get(controller: string): Mirror {
    const mirror = this.#mirrors.get(controller);
    if (mirror !== undefined) return mirror;
    throw new BdevError('no-mirror', 'name', `${controller} is not mirrored`, 'start one with `controller_mirror`');
  }

  info(controller: string): MirrorInfo | null {
    return this.#mirrors.get(controller)?.info ?? null;
  }

  /** Throws BdevError when the operation would let the legs of a mirror differ. */
  checkOperation(bdev: Bdev, operation: string): void {
    if (!REWRITING.has(operation)) return;
    for (const [controller, mirror] of this.#mirrors) {
      if (!mirror.involves(bdev)) continue;
      throw new BdevError('busy', 'name', `${bdev.name} is a part of the mirror of ${controller}`, 'cancel that first');
    }
  }

  /** Ends all. */
  async stop(): Promise<void> {
    const active = [...this.#mirrors.values()].filter(({ isActive }) => isActive);
    await Promise.all(active.map((mirror) => mirror.cancel()));
  }
}
