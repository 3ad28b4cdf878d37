/**
 * A reactor in a process of its own: whatever befalls it ends that process and nothing else. Messages go over the channel that Node
 * opens to a child; nothing is shared but the descriptors it inherits.
 *
 * The process's code is an entry module of the caller's that calls `serveReactor` with its handlers.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { REACTOR_STAT_COUNT } from './reactor.js';
import { RemoteError, RemoteReactor } from './remote-reactor.js';
import type { Notice, RemoteReactorOptions, Reply, Request, SerializedError } from './remote-reactor.js';

/** What the process is started with, as the argument of its entry module in JSON. */
export interface ProcessData {
  readonly options: RemoteReactorOptions;
  /** The control plane's process. */
  readonly parentPid: number;
  /** Whatever else the entry module wants to know. */
  readonly extra: unknown;
}

/** The notice of an error that ends the process. */
export const FAILURE = 'failure';
/** Descriptors handed over begin here: behind the standard ones and the channel. */
export const FIRST_INHERITED_FD = 4;

const STDERR = 2;

export class ReactorProcess extends RemoteReactor {
  readonly stats = new Float64Array(REACTOR_STAT_COUNT);
  readonly ended: Promise<string>;
  readonly #child: ChildProcess;

  /**
   * @param entry module that calls `serveReactor`
   * @param extra JSON for the entry module
   * @param fds descriptors that the process inherits as FIRST_INHERITED_FD and on; they stay the caller's
   */
  constructor(entry: URL, options: RemoteReactorOptions, extra: unknown, fds: readonly number[]) {
    super(options.name);
    const data: ProcessData = { options, parentPid: process.pid, extra };
    this.#child = spawn(process.execPath, [fileURLToPath(entry), JSON.stringify(data)], {
      // What Node itself has to say before it ends goes to the log's place.
      stdio: ['ignore', STDERR, STDERR, 'ipc', ...fds],
      serialization: 'advanced',
    });
    this.#child.on('message', (message: Reply | Notice) => this.receive(message));
    this.ended = new Promise((resolve) => {
      const end = (how: string): void => {
        this.gone();
        resolve(how);
      };
      this.#child.on('error', (error) => {
        this.onFailure(error);
        // Without a process there is no exit; with one, the channel is broken and it is of no use.
        if (this.#child.pid === undefined) end('no process');
      });
      this.#child.on('exit', (code, signal) => end(signal ?? `code ${code}`));
    });
  }

  async terminate(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.ended;
  }

  protected post(request: Request): void {
    // A message that cannot be sent is answered by the end of the process.
    this.#child.send(request, () => undefined);
  }

  protected override receive(message: Reply | Notice): void {
    if ('event' in message && message.event === FAILURE)
      this.onFailure(new RemoteError(message.data as SerializedError));
    else super.receive(message);
  }
}
