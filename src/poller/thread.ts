/**
 * A reactor on a thread of its own. Messages are structured clones (never transfers: detaching an ArrayBuffer anywhere slows every
 * typed array).
 *
 * The thread's code is an entry module of the caller's that calls `serveReactor` with its handlers.
 */
import { Worker } from 'node:worker_threads';
import { REACTOR_STAT_COUNT } from './reactor.js';
import { RemoteReactor } from './remote-reactor.js';
import type { Notice, RemoteReactorOptions, Reply, Request } from './remote-reactor.js';

/** The first message to the thread: what it is. */
export interface ThreadData {
  readonly options: RemoteReactorOptions;
  readonly stats: Float64Array;
}

export class ReactorThread extends RemoteReactor {
  readonly stats: Float64Array;
  readonly ended: Promise<string>;
  readonly #worker: Worker;
  /** Of a thread that nobody has taken yet. */
  static #prepared: { readonly entry: URL; readonly worker: Worker } | null = null;

  /**
   * Starts a thread before it is known what for; the next reactor with this entry takes it. Does not keep the process alive.
   * @param entry module that calls `serveReactor`
   */
  static prepare(entry: URL): void {
    const worker = new Worker(entry);
    worker.unref();
    // The next one will fail likewise, with somebody to tell.
    worker.on('error', () => {
      if (ReactorThread.#prepared?.worker === worker) ReactorThread.#prepared = null;
    });
    ReactorThread.#prepared = { entry, worker };
  }

  /** @param entry module that calls `serveReactor` */
  constructor(entry: URL, options: RemoteReactorOptions) {
    super(options.name);
    this.stats = new Float64Array(new SharedArrayBuffer(REACTOR_STAT_COUNT * 8));
    if (ReactorThread.#prepared?.entry.href !== entry.href) ReactorThread.prepare(entry);
    this.#worker = ReactorThread.#prepared!.worker;
    ReactorThread.#prepared = null;
    this.#worker.ref();
    this.#worker.on('message', (message: Reply | Notice) => this.receive(message));
    this.#worker.on('error', (error: Error) => this.onFailure(error));
    this.ended = new Promise((resolve) => {
      this.#worker.on('exit', (code) => {
        this.gone();
        resolve(`code ${code}`);
      });
    });
    const data: ThreadData = { options, stats: this.stats };
    this.#worker.postMessage(data);
  }

  async terminate(): Promise<void> {
    await this.#worker.terminate();
  }

  protected post(request: Request): void {
    this.#worker.postMessage(request);
  }
}
