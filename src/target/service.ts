/**
 * A daemon as a process: log, metrics page, signals, service manager, exit code.
 *
 *     SIGTERM, SIGINT   drain and exit 0; a second one ends the process at once with 1
 *     SIGHUP            on a terminal as SIGTERM (it was closed), else noted only
 *     SIGUSR1           the state is logged; Node would open its debugger
 */
import { SystemClock } from '../poller/clock.js';
import type { DaemonConfig } from './config/config.js';
import { ConfigError, Problems, formatProblem } from './config/problem.js';
import type { ConfigSource } from './config/problem.js';
import { Daemon } from './daemon.js';
import { HttpServer } from './http-server.js';
import type { Page } from './http-server.js';
import { openLog } from './log.js';
import type { Log } from './log.js';
import { Metrics } from './metrics.js';
import { RpcServer } from './rpc/rpc-server.js';
import { ServiceManager } from './service-manager.js';
import { endAtOnce, forbidCoreDumps } from './system.js';
import { VERSION } from './version.js';

/** Stopping a program on a terminal signals it several times over: the terminal itself, then each parent that passes it on. */
const SAME_SIGNAL_US = 250_000;

/** Where things can be found once the daemon serves. */
export interface Announcement {
  readonly daemon: Daemon;
  /** As `http://127.0.0.1:9464`, or null. */
  readonly httpUrl: string | null;
}

export class Service {
  readonly #source: ConfigSource;
  readonly #log: Log;
  readonly #daemon: Daemon;
  readonly #metrics: Metrics;
  readonly #manager: ServiceManager;
  readonly #clock = new SystemClock();
  readonly #startedUs = this.#clock.nowUs();
  #http: HttpServer | null = null;
  #rpc: RpcServer | null = null;
  /** When the first signal to stop came. */
  #stopSinceUs = Infinity;

  /** @param reactorEntry the code of a reactor thread, when it is not the usual one */
  constructor(config: DaemonConfig, source: ConfigSource, reactorEntry?: URL) {
    this.#source = source;
    this.#log = openLog(config.log, process.env);
    this.#daemon = new Daemon(config, source, this.#log, reactorEntry);
    this.#metrics = new Metrics(this.#daemon);
    this.#manager = new ServiceManager(process.env, this.#log);
  }

  /**
   * Starts, and calls `announce` when everything listens. The process ends by a signal.
   * Throws ConfigError when the start fails; nothing is left running then.
   */
  async run(announce: (announcement: Announcement) => void): Promise<void> {
    const { config } = this.#daemon;
    this.#takeSignals();
    if (!config.coreDumps) forbidCoreDumps();
    this.#daemon.onFailure = (reactor, error) => this.#fail(reactor, error);
    this.#daemon.onClosedByPeer = (controller) => {
      this.#log.info({ controller }, 'the front-end left and no other can come');
      this.#stop();
    };
    try {
      const problems = new Problems(this.#source);
      this.#daemon.checkHost(problems);
      await this.#serveHttp(problems);
      problems.throwIfAny();
      await this.#daemon.start();
      await this.#serveRpc(problems);
    } catch (error) {
      this.#http?.close();
      throw error;
    }
    const count = this.#daemon.controllers.length;
    const httpUrl = this.#http?.url ?? null;
    this.#log.info({ version: VERSION, pid: process.pid, controllers: count, http: httpUrl }, 'serving');
    announce({ daemon: this.#daemon, httpUrl });
    this.#manager.ready(`serving ${count} disk${count === 1 ? '' : 's'}`);
    this.#manager.watch(process.env, async () => {
      return this.#daemon.isAlive(await this.#daemon.live());
    });
    if (this.#stopSinceUs !== Infinity) await this.#drain('a signal during the start');
  }

  async #serveHttp(problems: Problems): Promise<void> {
    const address = this.#daemon.config.metrics;
    if (address === null) return;
    const pages = {
      '/metrics': async (): Promise<Page> => ({
        status: 200,
        contentType: this.#metrics.contentType,
        body: await this.#metrics.text(),
      }),
      '/healthz': () => this.#health(),
    };
    try {
      this.#http = await HttpServer.listen(address, pages);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      const where = `${address.host}:${address.port}`;
      const message = code === 'EADDRINUSE' ? `${where} is in use by another program` : `${where}: ${code}`;
      problems.add(['metrics', 'listen'], message, 'choose another HOST:PORT, or `off`');
    }
  }

  /** The daemon serves already: a control socket that cannot be had takes it down again. */
  async #serveRpc(problems: Problems): Promise<void> {
    const { rpc } = this.#daemon.config;
    if (rpc === null) return;
    try {
      this.#rpc = await RpcServer.listen(rpc, this.#daemon, this.#log);
    } catch (error) {
      await this.#daemon.drain();
      problems.add(['rpc', 'socket'], (error as Error).message, 'choose a path in a folder that this user may use');
      problems.throwIfAny();
    }
  }

  async #health(): Promise<Page> {
    const daemon = this.#daemon;
    const live = await daemon.live();
    const isServing = daemon.state === 'serving';
    const isHealthy = isServing && daemon.isAlive(live);
    const body = {
      status: isServing && !isHealthy ? 'stuck' : daemon.state,
      version: VERSION,
      uptimeSeconds: Math.floor((this.#clock.nowUs() - this.#startedUs) / 1e6),
      reactors: daemon.reactors.map(({ name }) => ({ name, answers: live.answering.has(name) })),
      controllers: daemon.controllers.map(({ config, reactor }) => {
        const info = live.controllers.get(config.name);
        return { name: config.name, bdev: config.bdev, reactor, state: info?.state ?? 'unknown', faults: info?.faults };
      }),
    };
    const status = isHealthy ? 200 : 503;
    return { status, contentType: 'application/json', body: `${JSON.stringify(body)}\n` };
  }

  #takeSignals(): void {
    process.on('SIGTERM', (signal) => this.#onStopSignal(signal));
    process.on('SIGINT', (signal) => this.#onStopSignal(signal));
    process.on('SIGHUP', (signal) => {
      if (process.stderr.isTTY) this.#onStopSignal(signal);
      else this.#log.warn('SIGHUP: a changed config takes effect after a restart only');
    });
    process.on('SIGUSR1', () => void this.#logState());
  }

  #onStopSignal(signal: string): void {
    const nowUs = this.#clock.nowUs();
    if (this.#stopSinceUs === Infinity) {
      this.#log.info({ signal }, 'stopping: requests in flight finish first, a second signal ends the daemon at once');
      this.#stop();
    } else if (nowUs - this.#stopSinceUs > SAME_SIGNAL_US) {
      this.#log.warn({ signal }, 'stopped at once');
      this.#removeSockets();
      endAtOnce(1);
    }
  }

  /** While starting, the start goes on to its end first: it is short, and knows how to take down what it made. */
  #stop(): void {
    if (this.#stopSinceUs !== Infinity) return;
    this.#stopSinceUs = this.#clock.nowUs();
    if (this.#daemon.state === 'serving') void this.#drain('asked to stop');
  }

  async #drain(reason: string): Promise<never> {
    this.#manager.stopping(`draining: ${reason}`);
    this.#rpc?.close();
    const drained = await this.#daemon.drain();
    if (drained) this.#log.info('stopped');
    else this.#log.error({ timeoutSeconds: this.#daemon.config.drainTimeoutS }, 'stopped with requests in flight');
    this.#http?.close();
    endAtOnce(drained ? 0 : 1);
  }

  #fail(reactor: string, error: Error): void {
    this.#log.fatal({ reactor, error: error.message, stack: error.stack }, 'a reactor died');
    this.#removeSockets();
    endAtOnce(1);
  }

  #removeSockets(): void {
    this.#daemon.removeSockets();
    this.#rpc?.close();
  }

  async #logState(): Promise<void> {
    const live = await this.#daemon.live();
    for (const info of live.controllers.values()) {
      const { name, bdev, state, peer, queuesRunning, inflight } = info;
      this.#log.info({ controller: name, bdev, state, peerPid: peer?.pid ?? null, queuesRunning, inflight }, 'state');
    }
    for (const { name, hasEnded } of this.#daemon.reactors) {
      if (!hasEnded && !live.answering.has(name)) this.#log.error({ reactor: name }, 'the reactor does not answer');
    }
  }
}

/** Runs `action`; a ConfigError is shown as its problems, and ends the process with 1. */
export async function orExplain<T>(action: () => T | Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    process.stderr.write(`${error.problems.map(formatProblem).join('\n')}\n`);
    process.exit(1);
  }
}
