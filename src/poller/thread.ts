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

/** What the thread is started with. */
export interface ThreadData {
  readonly options: RemoteReactorOptions;
  readonly stats: Float64Array;
}

export class ReactorThread extends RemoteReactor {
  readonly stats: Float64Array;
  readonly ended: Promise<string>;
  readonly #worker: Worker;

  /** @param entry module that calls `serveReactor` */
  constructor(entry: URL, options: RemoteReactorOptions) {
    super(options.name);
    this.stats = new Float64Array(new SharedArrayBuffer(REACTOR_STAT_COUNT * 8));
    const data: ThreadData = { options, stats: this.stats };
    this.#worker = new Worker(entry, { workerData: data, name: options.name });
    this.#worker.on('message', (message: Reply | Notice) => this.receive(message));
    this.#worker.on('error', (error: Error) => this.onFailure(error));
    this.ended = new Promise((resolve) => {
      this.#worker.on('exit', (code) => {
        this.gone();
        resolve(`code ${code}`);
      });
    });
  }

  async terminate(): Promise<void> {
    await this.#worker.terminate();
  }

  protected post(request: Request): void {
    this.#worker.postMessage(request);
  }
}
