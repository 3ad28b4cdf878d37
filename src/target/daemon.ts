/**
 * The daemon: reactors, bdevs and controllers of one configuration, from start to drain. It runs on the main thread and does nothing
 * unless asked: the data path is the reactors' own.
 *
 *     starting -> serving -> draining -> stopped
 *
 * Invariants
 * - No socket listens before every bdev and every controller exists. A start that fails leaves nothing behind: no socket, no thread.
 * - A reactor that ends by itself is a failure of the daemon, never passed over. One in a process of its own is started again.
 */
import { readFileSync, rmSync } from 'node:fs';
import { check, native } from '../../native/index.js';
import { IoStats } from '../bdev/io-stats.js';
import { SystemClock } from '../poller/clock.js';
import { FIRST_INHERITED_FD, ReactorProcess } from '../poller/process.js';
import { RemoteError } from '../poller/remote-reactor.js';
import type { RemoteReactor } from '../poller/remote-reactor.js';
import { ReactorThread } from '../poller/thread.js';
import { checkAccess, peerRules, socketGid } from './access.js';
import type { ControllerConfig, DaemonConfig } from './config/config.js';
import { basesOf } from './config/config.js';
import { ConfigError, Problems } from './config/problem.js';
import type { ConfigSource, FieldPath } from './config/problem.js';
import { planReactors } from './config/stacks.js';
import type { ReactorPlan } from './config/stacks.js';
import type { IsolationOptions } from './isolated-process.js';
import type { Log } from './log.js';
import { callReactor } from './reactor-calls.js';
import { REACTOR_ENTRY } from './reactor-entry.js';
import { Mirrors } from './mirrors.js';
import type { BdevInfo, ControllerInfo, ControllerSetup, Notices } from './reactor-calls.js';
import { toSnakeCase } from './rpc/rpc-error.js';
import { makeSocketPlace, socketPathRefusal } from './socket-path.js';
import { Jobs } from './state/jobs.js';
import type { JobRecord } from './state/jobs.js';
import { applyPivots, forgetPivot, moved } from './state/pivots.js';
import type { Pivot } from './state/pivots.js';
import { StateFolder } from './state/state-folder.js';
import { Supervisor } from './supervisor.js';

export type DaemonState = 'starting' | 'serving' | 'draining' | 'stopped';

export interface RunningReactor {
  readonly name: string;
  /** Replaced when an isolated one is started again. */
  thread: RemoteReactor;
  readonly plan: ReactorPlan;
  /** Why the thread died, when it did. */
  failure: Error | null;
  hasEnded: boolean;
  /** Of a reactor in a process of its own, else null. */
  readonly isolation: Isolation | null;
}

export interface Isolation {
  readonly supervisor: Supervisor;
  /** Sockets of its controllers, which outlive the process. */
  readonly sockets: ReadonlyMap<string, number>;
}

export interface RunningBdev {
  readonly name: string;
  readonly module: string;
  readonly uuid: string;
  sizeBytes: number;
  readonly blockSizeBytes: number;
  readonly reactor: string;
  readonly stats: IoStats;
}

export interface RunningController {
  /** With the bdev that the disk is by now. */
  config: ControllerConfig;
  readonly reactor: string;
  /** Counters in the order of CONTROLLER_STAT_NAMES: shared memory, or what an isolated one said last. */
  readonly stats: Float64Array;
  isListening: boolean;
}

/** What the reactors say of their controllers at one moment. */
export interface LiveInfo {
  /** By controller name. */
  readonly controllers: ReadonlyMap<string, ControllerInfo>;
  /** Names of the reactors that answered in time. */
  readonly answering: ReadonlySet<string>;
}

const ISOLATED_ENTRY = new URL('./isolated-process.js', import.meta.url);
/** A reactor that has not answered by then is held to be stuck. */
const ANSWER_TIMEOUT_MS = 2000;

export class Daemon {
  /** As it is by now: controllers may be on other bdevs than they were told to be. */
  config: DaemonConfig;
  readonly jobs: Jobs;
  readonly mirrors: Mirrors;
  readonly reactors: RunningReactor[] = [];
  readonly bdevs: RunningBdev[] = [];
  readonly controllers: RunningController[] = [];
  state: DaemonState = 'starting';
  /** A reactor ended while it should serve. */
  onFailure: (reactor: string, error: Error) => void = () => undefined;
  /** The front-end on a connected socket that was handed in has left. */
  onClosedByPeer: (controller: string) => void = () => undefined;

  readonly #source: ConfigSource;
  readonly #log: Log;
  readonly #reactorEntry: URL;
  readonly #clock = new SystemClock();
  /** As it was given. */
  readonly #given: DaemonConfig;
  #state: StateFolder | null = null;

  /** @param reactorEntry the code of a reactor thread */
  constructor(config: DaemonConfig, source: ConfigSource, log: Log, reactorEntry: URL = REACTOR_ENTRY) {
    this.config = config;
    this.#given = config;
    this.#source = source;
    this.#log = log;
    this.jobs = new Jobs(log);
    this.mirrors = new Mirrors(this, log);
    this.#reactorEntry = reactorEntry;
  }

  /** Adds what can be found out before anything is touched. Call it before `start`. */
  checkHost(problems: Problems): void {
    const allowed = allowedCores();
    this.config.reactors.forEach(({ core }, i) => {
      if (core === undefined || allowed.includes(core)) return;
      problems.add(
        ['reactors', i, 'core'],
        `core ${core} is not there for this process`,
        `use one of: ${allowed.join(', ')}`,
      );
    });
    this.config.controllers.forEach((controller, i) => {
      checkAccess(controller, ['controllers', i], problems);
      if ('fd' in controller.address) return;
      const refusal = socketPathRefusal(controller.address.socketPath);
      if (refusal !== undefined) problems.add(['controllers', i, 'socket'], refusal.message, refusal.remedy);
    });
    const { rpc } = this.config;
    const refusal = rpc === null ? undefined : socketPathRefusal(rpc.socketPath);
    if (refusal !== undefined) problems.add(['rpc', 'socket'], refusal.message, refusal.remedy);
  }

  /** Throws ConfigError when anything cannot be had; then nothing runs any more. */
  async start(): Promise<void> {
    try {
      const obsolete = this.#takeUpState();
      for (const plan of planReactors(this.config)) this.reactors.push(this.#startReactor(plan));
      await this.#createAll();
      await this.#listenAll();
      for (const { isolation } of this.reactors) isolation?.supervisor.serving();
      this.state = 'serving';
      this.#forget(obsolete);
    } catch (error) {
      await this.#close();
      throw error;
    }
    await this.#resumeJobs(this.reactors);
  }

  /**
   * Takes no more requests, lets those in flight finish, and closes everything.
   * @returns whether all of them finished within the drain timeout
   */
  async drain(): Promise<boolean> {
    this.state = 'draining';
    await this.mirrors.settle();
    this.jobs.end();
    const drained = await this.#close();
    this.state = 'stopped';
    return drained;
  }

  /** Removes the socket files, for a process that ends without draining. */
  removeSockets(): void {
    for (const { config, isListening } of this.controllers) {
      if (isListening && 'socketPath' in config.address) rmSync(config.address.socketPath, { force: true });
    }
  }

  /** Asks every reactor for the state of its controllers. */
  async live(): Promise<LiveInfo> {
    const controllers = new Map<string, ControllerInfo>();
    const answering = new Set<string>();
    await Promise.all(
      this.reactors.map(async (reactor) => {
        if (reactor.hasEnded) return;
        const infos = await withTimeout(
          this.#controllerInfos(reactor).catch(() => undefined),
          ANSWER_TIMEOUT_MS,
        );
        if (infos === undefined) return;
        answering.add(reactor.name);
        for (const info of infos) controllers.set(info.name, info);
      }),
    );
    return { controllers, answering };
  }

  async #controllerInfos(reactor: RunningReactor): Promise<readonly ControllerInfo[]> {
    if (reactor.isolation !== null) await this.#refresh(reactor);
    return callReactor(reactor.thread, 'controllers', null);
  }

  /** Asks every reactor for its bdevs. Rejects with RemoteError. */
  async bdevInfos(): Promise<BdevInfo[]> {
    const lists = this.reactors
      .filter(({ hasEnded, isolation }) => isolation === null || !hasEnded)
      .map(({ thread }) => callReactor(thread, 'bdevs', null));
    return (await Promise.all(lists)).flat();
  }

  /** Changes the size of a bdev; null takes up that of its storage. Rejects with RemoteError when that cannot be. */
  async resizeBdev(bdev: RunningBdev, sizeBytes: number | null): Promise<void> {
    const { thread } = this.reactors.find((reactor) => reactor.name === bdev.reactor)!;
    this.#takeSizes(await callReactor(thread, 'resizeBdev', { name: bdev.name, sizeBytes }));
  }

  /** Has a bdev carry out an operation of its module. Rejects with RemoteError. */
  async operate(bdev: RunningBdev, operation: string, params: Readonly<Record<string, unknown>>): Promise<unknown> {
    const { thread } = this.reactors.find((reactor) => reactor.name === bdev.reactor)!;
    const result = await callReactor(thread, 'operate', { name: bdev.name, operation, params });
    // Before its end can be told.
    if (isRunningJob(result, operation)) this.jobs.began({ owner: 'bdev', name: bdev.name, operation, params });
    this.#takeSizes(await callReactor(thread, 'bdevs', null));
    this.#log.info({ bdev: bdev.name, operation, ...params }, 'operation done');
    return result;
  }

  /** The bdev that the config file names for a controller. */
  namedBdevOf(controller: string): string {
    return this.#given.controllers.find(({ name }) => name === controller)!.bdev;
  }

  /** The bdev that a controller's disk is by now. */
  bdevOf(controller: string): string {
    return this.config.controllers.find(({ name }) => name === controller)!.bdev;
  }

  /** The time, for people. */
  nowText(): string {
    return new Date(this.#clock.wallMs()).toISOString();
  }

  /** The folder of what has to outlive the daemon, null when there is none. */
  get stateFolder(): StateFolder | null {
    return this.#state;
  }

  /** The disk is another bdev from now on, also after its reactor was started again. */
  moveController(controller: RunningController, to: string): void {
    const before = controller.config;
    const after = moved(before, to);
    controller.config = after;
    const replace = (list: readonly ControllerConfig[]): ControllerConfig[] =>
      list.map((candidate) => (candidate === before ? after : candidate));
    this.config = { ...this.config, controllers: replace(this.config.controllers) };
    for (const { plan } of this.reactors) plan.controllers.splice(0, Infinity, ...replace(plan.controllers));
  }

  // ---- What outlives the daemon

  /** Opens the state folder, and puts disks where pivots have moved them. Throws ConfigError. @returns what is to be forgotten */
  #takeUpState(): readonly Pivot[] {
    const { stateDir } = this.config;
    if (stateDir === null) return [];
    const problems = new Problems(this.#source);
    try {
      this.#state = StateFolder.open(stateDir);
      const { config, applied, obsolete } = applyPivots(this.config, this.#state, problems);
      problems.throwIfAny();
      this.config = config;
      for (const { controller, from, to } of applied) this.mirrors.warn(controller, from, to);
      this.jobs.keepIn(this.#state);
      return obsolete;
    } catch (error) {
      if (error instanceof ConfigError) throw error;
      problems.add(['state_dir'], (error as Error).message, 'make it a folder of its own that this user may write to');
      problems.throwIfAny();
      return [];
    }
  }

  /** The config names by itself what these say: they are of no more use. */
  #forget(pivots: readonly Pivot[]): void {
    for (const { controller } of pivots) {
      try {
        forgetPivot(this.#state!, controller);
      } catch (error) {
        this.#log.warn({ controller, error: (error as Error).message }, 'the record of a pivot cannot be removed');
      }
    }
  }

  /** Starts the jobs again that were under way on these reactors. */
  async #resumeJobs(reactors: readonly RunningReactor[]): Promise<void> {
    const isHere = (reactor: string | undefined): boolean =>
      // What is nowhere any more is found out once.
      reactor === undefined ? reactors === this.reactors : reactors.some(({ name }) => name === reactor);
    const bdevOf = (name: string): RunningBdev | undefined => this.bdevs.find((bdev) => bdev.name === name);
    await this.jobs.resume(
      ({ owner, name }) =>
        isHere(
          owner === 'bdev'
            ? bdevOf(name)?.reactor
            : this.controllers.find(({ config }) => config.name === name)?.reactor,
        ),
      async ({ owner, name, operation, params }: JobRecord) => {
        if (owner === 'controller') return this.mirrors.resume(name, params);
        const bdev = bdevOf(name);
        if (bdev === undefined) throw new Error(`there is no bdev ${name}`);
        return this.operate(bdev, operation, params);
      },
    );
  }

  #takeSizes(infos: readonly BdevInfo[]): void {
    for (const info of infos) {
      const running = this.bdevs.find((candidate) => candidate.name === info.name);
      if (running === undefined || running.sizeBytes === info.sizeBytes) continue;
      this.#log.info({ bdev: info.name, fromBytes: running.sizeBytes, toBytes: info.sizeBytes }, 'resized');
      running.sizeBytes = info.sizeBytes;
    }
  }

  /** Whether all reactors answer that the daemon cannot do without. */
  isAlive({ answering }: LiveInfo): boolean {
    return this.reactors.every(({ name, isolation }) => isolation !== null || answering.has(name));
  }

  #startReactor(plan: ReactorPlan): RunningReactor {
    const { name } = plan.reactor;
    const isolation = plan.isIsolated ? this.#isolate(plan) : null;
    const thread =
      isolation === null ? new ReactorThread(this.#reactorEntry, plan.reactor) : this.#spawn(plan, isolation);
    const reactor: RunningReactor = { name, thread, plan, failure: null, hasEnded: false, isolation };
    this.#attach(reactor, thread);
    return reactor;
  }

  /** Takes notice of what becomes of a reactor's thread, which may not be its last. */
  #attach(reactor: RunningReactor, thread: RemoteReactor): void {
    reactor.thread = thread;
    reactor.failure = null;
    reactor.hasEnded = false;
    thread.onNotice = (event, data) => this.#onNotice(event, data);
    thread.onFailure = (error) => {
      reactor.failure = error;
    };
    void thread.ended.then((how) => {
      reactor.hasEnded = true;
      if (reactor.isolation !== null) this.#onIsolatedEnd(reactor, reactor.isolation, how);
      else if (this.state === 'serving') {
        this.onFailure(reactor.name, reactor.failure ?? new Error(`the thread ended with ${how}`));
      }
    });
  }

  // ---- Isolated reactors

  /** Binds the sockets of a stack: its process inherits them, and so do those that come after it. Throws ConfigError. */
  #isolate(plan: ReactorPlan): Isolation {
    const sockets = new Map<string, number>();
    const problems = new Problems(this.#source);
    for (const config of plan.controllers) {
      if ('fd' in config.address) continue;
      const { socketPath, mode } = config.address;
      try {
        const gid = socketGid(config);
        makeSocketPlace(socketPath, gid);
        const fd = gid === undefined ? native.socketBind(socketPath, mode) : native.socketBind(socketPath, mode, gid);
        sockets.set(config.name, check(fd, `bind ${socketPath}`));
      } catch (error) {
        const path = ['controllers', this.config.controllers.indexOf(config), 'socket'];
        problems.add(path, (error as Error).message, 'choose a path in a folder that this user may use');
      }
    }
    const supervisor = new Supervisor(plan.reactor.name, this.#log, () => this.#restart(plan.reactor.name));
    const isolation = { supervisor, sockets };
    try {
      problems.throwIfAny();
    } catch (error) {
      closeSockets(plan, isolation);
      throw error;
    }
    return isolation;
  }

  #spawn(plan: ReactorPlan, { sockets }: Isolation): ReactorProcess {
    const extra: IsolationOptions = { coreDumps: this.config.coreDumps };
    return new ReactorProcess(ISOLATED_ENTRY, plan.reactor, extra, [...sockets.values()]);
  }

  #onIsolatedEnd(reactor: RunningReactor, { supervisor }: Isolation, how: string): void {
    // What is not there any more counts nothing.
    for (const bdev of this.bdevs) if (bdev.reactor === reactor.name) bdev.stats.values.fill(0);
    for (const controller of this.controllers) if (controller.reactor === reactor.name) controller.stats.fill(0);
    if (this.state === 'serving') supervisor.ended(how, reactor.failure);
  }

  /** Lets another process take the place of one that has ended. Rejects when it cannot do its work. */
  async #restart(name: string): Promise<void> {
    const reactor = this.reactors.find((candidate) => candidate.name === name)!;
    const thread = this.#spawn(reactor.plan, reactor.isolation!);
    this.#attach(reactor, thread);
    try {
      for (const config of reactor.plan.bdevs) {
        const running = this.bdevs.find((bdev) => bdev.name === config.name)!;
        // An identity that was made up at the start is kept.
        const facts = await callReactor(thread, 'createBdev', { ...config, uuid: running.uuid });
        running.sizeBytes = facts.sizeBytes;
      }
      for (const config of reactor.plan.controllers) {
        await callReactor(thread, 'createController', this.#setUpOf(config));
      }
      await callReactor(thread, 'seal', null);
      for (const config of reactor.plan.controllers) await this.#listen(reactor, config);
    } catch (error) {
      await thread.terminate();
      throw error;
    }
    await this.#resumeJobs([reactor]);
  }

  /** Takes over what an isolated reactor counted; the others count in memory that is shared. */
  async #refresh({ thread }: RunningReactor): Promise<void> {
    const { reactor, bdevs, controllers } = await callReactor(thread, 'counters', null);
    thread.stats.set(reactor);
    for (const { name, stats } of this.bdevs) if (bdevs.has(name)) stats.values.set(bdevs.get(name)!);
    for (const { config, stats } of this.controllers) {
      if (controllers.has(config.name)) stats.set(controllers.get(config.name)!);
    }
  }

  // ---- Setting up

  #setUpOf(config: ControllerConfig): ControllerSetup {
    const { name, bdev, serial, queues, readOnly, writeCache } = config;
    const messageTimeoutUs = config.handshakeTimeoutS * 1e6;
    const migratable = isHandedOver(this.config.bdevs, bdev);
    return {
      bdev,
      options: { name, serial, queues, readOnly, writeCache, migratable, messageTimeoutUs },
      logLevel: this.config.log.level,
    };
  }

  async #listen({ thread, isolation }: RunningReactor, config: ControllerConfig): Promise<void> {
    const { name, address } = config;
    const socket = isolation?.sockets.get(name);
    if (isolation !== null && socket !== undefined) {
      check(native.socketStartListening(socket), 'listen');
      const inherited = FIRST_INHERITED_FD + [...isolation.sockets.keys()].indexOf(name);
      await callReactor(thread, 'listen', { name, address: { fd: inherited }, peers: peerRules(config) });
      return;
    }
    const gid = socketGid(config);
    if ('socketPath' in address) makeSocketPlace(address.socketPath, gid);
    const withGroup = gid === undefined || 'fd' in address ? address : { ...address, gid };
    await callReactor(thread, 'listen', { name, address: withGroup, peers: peerRules(config) });
  }

  async #createAll(): Promise<void> {
    const problems = new Problems(this.#source);
    for (const reactor of this.reactors) {
      const failed = new Set<string>();
      for (const bdev of reactor.plan.bdevs) {
        // What stands on a failed bdev has no problem of its own.
        if (basesOf(bdev).some(({ name }) => failed.has(name))) failed.add(bdev.name);
        if (failed.has(bdev.name)) continue;
        const path = ['bdevs', this.config.bdevs.indexOf(bdev)];
        const facts = await this.#try(reactor, path, problems, () => callReactor(reactor.thread, 'createBdev', bdev));
        if (facts === undefined) failed.add(bdev.name);
        else {
          const { name, module, uuid, sizeBytes, blockSizeBytes, stats } = facts;
          const running = { name, module, uuid, sizeBytes, blockSizeBytes, stats: new IoStats(stats) };
          this.bdevs.push({ ...running, reactor: reactor.name });
        }
      }
      for (const controller of reactor.plan.controllers) {
        if (failed.has(controller.bdev)) continue;
        const path = ['controllers', this.config.controllers.indexOf(controller)];
        const facts = await this.#try(reactor, path, problems, () =>
          callReactor(reactor.thread, 'createController', this.#setUpOf(controller)),
        );
        if (facts === undefined) continue;
        this.controllers.push({ config: controller, reactor: reactor.name, stats: facts.stats, isListening: false });
      }
    }
    problems.throwIfAny();
  }

  async #listenAll(): Promise<void> {
    const problems = new Problems(this.#source);
    await Promise.all(this.reactors.map(({ thread }) => callReactor(thread, 'seal', null)));
    for (const controller of this.controllers) {
      const { config } = controller;
      const reactor = this.reactors.find((candidate) => candidate.name === controller.reactor)!;
      const path = ['controllers', this.config.controllers.indexOf(config), 'socket'];
      await this.#try(reactor, path, problems, async () => {
        await this.#listen(reactor, config);
        controller.isListening = true;
      });
    }
    problems.throwIfAny();
  }

  /** Runs a step; what it throws becomes a problem of `path`, and the answer is undefined. */
  async #try<T>(
    reactor: RunningReactor,
    path: FieldPath,
    problems: Problems,
    step: () => Promise<T>,
  ): Promise<T | undefined> {
    try {
      if (reactor.hasEnded) throw new Error(`reactor ${reactor.name} ended`);
      return await step();
    } catch (error) {
      if (reactor.hasEnded) {
        const place =
          reactor.isolation === null
            ? ['reactors', this.config.reactors.indexOf(reactor.plan.reactor)]
            : ['controllers', this.config.controllers.indexOf(reactor.plan.controllers[0]!)];
        const cause = reactor.failure ?? (error as Error);
        throw new ConfigError([
          {
            ...this.#source.locate(place),
            message: `reactor ${reactor.name} cannot run: ${cause.message}`,
            remedy: 'run `strata doctor`: it says what this host lacks',
          },
        ]);
      }
      const fields: Record<string, unknown> = error instanceof RemoteError ? error.fields : { ...(error as object) };
      const { field, hint } = fields;
      const inner = typeof field === 'string' && field !== '' ? [toSnakeCase(field)] : [];
      const remedy = typeof hint === 'string' ? hint : 'check the path and the permissions of this user';
      problems.add([...path, ...inner], (error as Error).message, remedy);
      return undefined;
    }
  }

  /** @returns whether the requests in flight finished in time */
  async #close(): Promise<boolean> {
    const closings = this.reactors.map(async (reactor) => {
      reactor.isolation?.supervisor.stop();
      // An isolated one that is down has nothing in flight.
      if (reactor.hasEnded) return reactor.isolation !== null;
      try {
        await callReactor(reactor.thread, 'close', null);
        return true;
      } catch (error) {
        this.#log.error({ reactor: reactor.name, error: (error as Error).message }, 'closing failed');
        return false;
      }
    });
    const outcomes = await withTimeout(Promise.all(closings), this.config.drainTimeoutS * 1000);
    this.removeSockets();
    for (const { thread, plan, isolation } of this.reactors) {
      await thread.terminate();
      if (isolation !== null) closeSockets(plan, isolation);
    }
    this.#state?.close();
    this.#state = null;
    return outcomes?.every((closed) => closed) ?? false;
  }

  #onNotice(event: string, data: unknown): void {
    switch (event as keyof Notices) {
      case 'log': {
        const { controller, level, message, fields } = data as Notices['log'];
        this.#log[level]({ controller, ...fields }, message);
        return;
      }
      case 'closedByPeer':
        this.onClosedByPeer((data as Notices['closedByPeer']).controller);
        return;
      case 'jobEnded':
        this.jobs.ended(data as Notices['jobEnded']);
        return;
    }
  }
}

/** Whether an operation has begun a job, which goes on. */
function isRunningJob(result: unknown, operation: string): boolean {
  if (typeof result !== 'object' || result === null) return false;
  const { type, state } = result as { readonly type?: unknown; readonly state?: unknown };
  return type === operation && state === 'running';
}

/** Sockets that the daemon holds for a process: closed, and their files removed. */
function closeSockets({ controllers }: ReactorPlan, { sockets }: Isolation): void {
  for (const { name, address } of controllers) {
    const fd = sockets.get(name);
    if (fd === undefined) continue;
    native.fileClose(fd);
    if ('socketPath' in address) rmSync(address.socketPath, { force: true });
  }
}

/** The promise's value, or undefined when it takes longer. */
async function withTimeout<T>(promise: Promise<T>, timeoutMs: number): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), timeoutMs);
  });
  try {
    return await Promise.race([promise, timeout]);
  } finally {
    clearTimeout(timer);
  }
}

/** Cores this process may run on. */
export function allowedCores(): number[] {
  const list = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '';
  return list.split(',').flatMap((range) => {
    const [first = 0, last = first] = range.split('-').map(Number);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
}

/** Whether another daemon may have the disk's file open, to take over from this one. */
function isHandedOver(bdevs: DaemonConfig['bdevs'], name: string): boolean {
  const bdev = bdevs.find((candidate) => candidate.name === name);
  if (bdev === undefined) return false;
  if ('base' in bdev) return isHandedOver(bdevs, bdev.base);
  return 'lock' in bdev && bdev.lock === 'running';
}
