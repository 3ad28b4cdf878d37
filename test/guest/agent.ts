/**
 * The host's end of the guest's command port (scripts/guest/init.sh describes the protocol).
 *
 * It listens, QEMU connects: so the port is open before the guest looks at it. Requests are numbered and answered in
 * order; an answer to a request that was given up is dropped.
 */
import { createServer, type Server, type Socket } from 'node:net';

export interface CommandResult {
  readonly code: number;
  /** stdout and stderr as they came, mixed. */
  readonly output: string;
}

const READY_ID = 0;

export class Agent implements AsyncDisposable {
  readonly #server: Server;
  readonly #waiting = new Map<number, PromiseWithResolvers<CommandResult>>();
  #socket: Socket | undefined;
  #received = '';
  #nextId = READY_ID + 1;

  /** Resolves when the guest answers for the first time. */
  readonly ready: Promise<unknown>;

  private constructor(server: Server) {
    this.#server = server;
    this.ready = this.#wait(READY_ID);
    server.once('connection', (socket) => this.#attach(socket));
  }

  static async listen(path: string): Promise<Agent> {
    const server = createServer();
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
    });
    return new Agent(server);
  }

  /** Runs a shell script in the guest. */
  request(script: string): Promise<CommandResult> {
    const id = this.#nextId++;
    const result = this.#wait(id);
    this.#socket?.write(`${id} ${Buffer.from(script).toString('base64')}\n`);
    return result;
  }

  /** Fails everything that still waits. */
  abort(reason: Error): void {
    for (const { reject } of this.#waiting.values()) reject(reason);
    this.#waiting.clear();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.abort(new Error('The guest was ended'));
    this.#socket?.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  #wait(id: number): Promise<CommandResult> {
    const pending = withResolvers<CommandResult>();
    // Whoever gave up on a request leaves its promise unobserved.
    pending.promise.catch(() => undefined);
    this.#waiting.set(id, pending);
    return pending.promise;
  }

  #attach(socket: Socket): void {
    this.#socket = socket;
    // A reset comes with QEMU's death, which is noticed by its exit.
    socket.on('error', () => undefined);
    socket.setEncoding('latin1').on('data', (text: string) => {
      this.#received += text;
      let end: number;
      while ((end = this.#received.indexOf('\n')) >= 0) {
        this.#answer(this.#received.slice(0, end));
        this.#received = this.#received.slice(end + 1);
      }
    });
  }

  #answer(line: string): void {
    const [id = '', code = '', output = ''] = line.split(' ');
    const pending = this.#waiting.get(Number(id));
    this.#waiting.delete(Number(id));
    pending?.resolve({ code: Number(code), output: Buffer.from(output, 'base64').toString() });
  }
}

interface PromiseWithResolvers<T> {
  readonly promise: Promise<T>;
  readonly resolve: (value: T) => void;
  readonly reject: (reason: Error) => void;
}

function withResolvers<T>(): PromiseWithResolvers<T> {
  let resolve!: (value: T) => void;
  let reject!: (reason: Error) => void;
  const promise = new Promise<T>((onResolve, onReject) => {
    resolve = onResolve;
    reject = onReject;
  });
  return { promise, resolve, reject };
}
