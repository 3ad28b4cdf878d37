/**
 * Mirrors as the control plane sees them: started, ended, and turned into a move of the disk that holds after a restart.
 *
 *     requests held, both legs the same -> written down -> the target is the disk -> requests go on
 */
import { BdevError } from '../bdev/bdev.js';
import type { MirrorInfo } from '../bdev/mirror/mirror.js';
import type { Daemon, RunningController } from './daemon.js';
import type { Log } from './log.js';
import { callReactor } from './reactor-calls.js';
import type { MirrorParams } from './reactor-calls.js';
import { forgetPivot, storageOf, writePivot } from './state/pivots.js';
import type { StateFolder } from './state/state-folder.js';

export class Mirrors {
  readonly #daemon: Daemon;
  readonly #log: Log;
  readonly #pivots = new Set<Promise<unknown>>();

  constructor(daemon: Daemon, log: Log) {
    this.#daemon = daemon;
    this.#log = log;
  }

  /** Rejects with RemoteError or BdevError. */
  async start(controller: RunningController, target: string, bytesPerSecond: number): Promise<MirrorInfo> {
    const { name, bdev: source } = controller.config;
    this.#checkTarget(controller, target);
    const params: MirrorParams = { controller: name, target, bytesPerSecond };
    const info = await callReactor(this.#threadOf(controller), 'mirror', params);
    this.#daemon.jobs.began({
      owner: 'controller',
      name,
      operation: 'mirror',
      params: { source, target, bytesPerSecond },
    });
    this.#log.info({ controller: name, ...info }, 'the disk is mirrored');
    return info;
  }

  /** Starts again what was under way when the daemon ended. Rejects when that cannot be. */
  async resume(name: string, { source, target, bytesPerSecond }: Readonly<Record<string, unknown>>): Promise<void> {
    const controller = this.#daemon.controllers.find(({ config }) => config.name === name);
    if (controller === undefined) throw new Error(`there is no controller ${name}`);
    if (controller.config.bdev !== source) throw new Error(`${name} is ${controller.config.bdev} now`);
    await this.start(controller, String(target), Number(bytesPerSecond));
  }

  /** Rejects with RemoteError. */
  cancel(controller: RunningController): Promise<MirrorInfo> {
    return callReactor(this.#threadOf(controller), 'cancelMirror', { controller: controller.config.name });
  }

  /** The last one, or null. */
  async info(controller: RunningController): Promise<MirrorInfo | Readonly<Record<string, unknown>> | null> {
    const { name } = controller.config;
    const { controllers } = await this.#daemon.live();
    return controllers.get(name)?.mirror ?? this.#daemon.jobs.lost('controller', name);
  }

  /** Moves the disk to the target of its mirror. Rejects with RemoteError or BdevError; then it is where it was. */
  async pivot(controller: RunningController): Promise<MirrorInfo> {
    const pivot = this.#pivot(controller);
    this.#pivots.add(pivot);
    try {
      return await pivot;
    } finally {
      this.#pivots.delete(pivot);
    }
  }

  /** No pivot is halfway when it resolves. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#pivots);
  }

  async #pivot(controller: RunningController): Promise<MirrorInfo> {
    const { name } = controller.config;
    const { config, stateFolder: state } = this.#daemon;
    if (state === null) {
      throw new BdevError(
        'no-state-dir',
        '',
        'without a state folder a restart would bring the old disk back',
        'set `state_dir` in the config and restart the daemon; a mirror can be started again then',
      );
    }
    const thread = this.#threadOf(controller);
    const mirror = (await callReactor(thread, 'controllers', null)).find((info) => info.name === name)?.mirror;
    // Without a mirror the next call says so.
    const to = mirror?.target ?? '';
    const file = storageOf(config.bdevs, to);
    if (mirror?.state !== undefined && file === null) {
      throw new BdevError(
        'not-durable',
        'target',
        `what ${to} holds is gone when the daemon ends`,
        'mirror to a bdev that ends in a file or device',
      );
    }
    await callReactor(thread, 'preparePivot', { controller: name });
    const from = this.#daemon.namedBdevOf(name);
    try {
      this.#writeDown(state, { controller: name, from, to, file: file ?? '' });
    } catch (error) {
      await callReactor(thread, 'abortPivot', { controller: name });
      const message = `the pivot cannot be written down: ${(error as Error).message}`;
      throw new BdevError('no-record', '', message, `look at ${state.path}; nothing has changed`);
    }
    // From here on the target is the disk, also for a process that takes the place of this reactor's.
    this.#daemon.moveController(controller, to);
    this.#daemon.jobs.forget('controller', name);
    if (from === to) this.#log.info({ controller: name, bdev: to }, 'the disk is moved back to what the config names');
    else this.warn(name, from, to);
    return callReactor(thread, 'commitPivot', { controller: name });
  }

  /** Durable when it returns; or throws, and leaves no record that names the target. */
  #writeDown(state: StateFolder, pivot: { controller: string; from: string; to: string; file: string }): void {
    const { controller, from, to } = pivot;
    // Back on what the config names, where no record leads astray.
    if (from === to) {
      forgetPivot(state, controller);
      return;
    }
    try {
      writePivot(state, { ...pivot, switchedAt: this.#daemon.nowText() });
    } catch (error) {
      const before = this.#daemon.bdevOf(controller);
      if (before === from) forgetPivot(state, controller);
      else this.#restore(state, controller, from, before);
      throw error;
    }
  }

  /** The record of the move before this one, which holds on. */
  #restore(state: StateFolder, controller: string, from: string, to: string): void {
    const file = storageOf(this.#daemon.config.bdevs, to) ?? '';
    writePivot(state, { controller, from, to, file, switchedAt: this.#daemon.nowText() });
  }

  /** Says what is to be done about a disk that the config names another bdev for. */
  warn(controller: string, from: string, to: string): void {
    const advice = `write \`bdev: ${to}\` for controller ${controller} in the config`;
    this.#log.warn({ controller, from, to, advice }, 'the config names the bdev that the disk was on before a pivot');
  }

  /** What a reactor cannot tell: that a bdev is known, but lives elsewhere. */
  #checkTarget(controller: RunningController, target: string): void {
    const { name } = controller.config;
    const bdev = this.#daemon.bdevs.find((candidate) => candidate.name === target);
    if (bdev === undefined || bdev.reactor === controller.reactor) return;
    throw new BdevError(
      'other-reactor',
      'target',
      `${target} lives on reactor ${bdev.reactor}, ${name} on ${controller.reactor}`,
      `write \`targets: [${target}]\` for controller ${name} in the config and restart the daemon`,
    );
  }

  #threadOf({ reactor }: RunningController): Parameters<typeof callReactor>[0] {
    return this.#daemon.reactors.find(({ name }) => name === reactor)!.thread;
  }
}
