/**
 * A reactor elsewhere - on a thread of this process or in a process of its own - and the messages between it and the control plane:
 * plain calls with a reply, and notices. What carries them is the business of thread.ts and process.ts.
 */
import type { Reactor, ReactorMode } from './reactor.js';

export interface RemoteReactorOptions {
  readonly name: string;
  readonly mode: ReactorMode;
  /** How long an adaptive reactor spins before it sleeps. */
  readonly pollUs: number;
  /** Core to run on, or undefined to leave it to the kernel. */
  readonly core?: number | undefined;
}

export type Request = { readonly id: number; readonly method: string; readonly params: unknown };
export type Reply = { readonly id: number; readonly result?: unknown; readonly error?: SerializedError };
export type Notice = { readonly event: string; readonly data: unknown };

/** An error as it crosses threads: message, name and the own fields of typed errors (code, field, hint). */
export interface SerializedError {
  readonly name: string;
  readonly message: string;
  readonly fields: Record<string, unknown>;
}

/** A failure where the reactor is, as the control plane sees it. */
export class RemoteError extends Error {
  readonly fields: Record<string, unknown>;

  constructor(error: SerializedError) {
    super(error.message);
    this.name = error.name;
    this.fields = error.fields;
  }
}

/** Control-plane side. */
export abstract class RemoteReactor {
  readonly name: string;
  /** The reactor's counters (see ReactorStat): shared with a thread, a copy of a process's. */
  abstract readonly stats: Float64Array;
  /** Resolves when the reactor is no more, with how it ended: `code 1`, `SIGKILL`. */
  abstract readonly ended: Promise<string>;
  /** Called for each notice; set it before the first call. */
  onNotice: (event: string, data: unknown) => void = () => undefined;
  /** Called when it dies of an uncaught error. */
  onFailure: (error: Error) => void = () => undefined;

  readonly #pending = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void }>();
  #nextId = 1;
  #hasEnded = false;

  constructor(name: string) {
    this.name = name;
  }

  /** Calls a handler. Rejects with RemoteError when it throws, with Error when the reactor ends before it answers. */
  call(method: string, params: unknown): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#hasEnded) {
        reject(this.#gone());
        return;
      }
      const request: Request = { id: this.#nextId++, method, params };
      this.#pending.set(request.id, { resolve, reject });
      this.post(request);
    });
  }

  /** Ends it at once. */
  abstract terminate(): Promise<void>;

  protected abstract post(request: Request): void;

  protected receive(message: Reply | Notice): void {
    if ('event' in message) {
      this.onNotice(message.event, message.data);
      return;
    }
    const call = this.#pending.get(message.id);
    this.#pending.delete(message.id);
    if (message.error !== undefined) call?.reject(new RemoteError(message.error));
    else call?.resolve(message.result);
  }

  /** Nothing is answered any more. */
  protected gone(): void {
    this.#hasEnded = true;
    for (const call of this.#pending.values()) call.reject(this.#gone());
    this.#pending.clear();
  }

  #gone(): Error {
    return new Error(`reactor ${this.name} ended`);
  }
}

/** Handlers where the reactor is, by method name. */
export type ReactorHandlers = Readonly<Record<string, (params: unknown) => unknown>>;

/** What makes the handlers gets: the reactor, and ways to tell the control plane something. */
export interface ReactorHost {
  readonly reactor: Reactor;
  /** Whether it has the process to itself. */
  readonly isIsolated: boolean;
  notify(event: string, data: unknown): void;
  /** Counters in shared memory as they may stand in an answer: themselves to a thread's control plane, else a copy. */
  share(counters: Float64Array): Float64Array;
}

/** Carries out a call. */
export async function answer(handlers: ReactorHandlers, request: Request): Promise<Reply> {
  try {
    const handler = handlers[request.method];
    if (handler === undefined) throw new Error(`no handler for ${request.method}`);
    return { id: request.id, result: await handler(request.params) };
  } catch (error) {
    return { id: request.id, error: serializeError(error) };
  }
}

export function serializeError(error: unknown): SerializedError {
  if (!(error instanceof Error)) return { name: 'Error', message: String(error), fields: {} };
  const fields: Record<string, unknown> = {};
  for (const key of ['code', 'field', 'hint', 'errno']) {
    const value: unknown = (error as unknown as Record<string, unknown>)[key];
    if (typeof value === 'string' || typeof value === 'number') fields[key] = value;
  }
  return { name: error.name, message: error.message, fields };
}
