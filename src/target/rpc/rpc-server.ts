/**
 * The control socket: JSON-RPC 2.0 on a unix socket, framed as SPDK frames it (see json-frames.ts), so that its rpc.py can be used.
 * Whoever may open the socket may do everything; its mode is what protects it.
 *
 * Invariants
 * - Requests of a connection are carried out and answered one after the other, in order.
 * - No client can make the daemon hold more than a message, and what it does not read is not produced.
 */
import { rmSync } from 'node:fs';
import { createServer } from 'node:net';
import type { Server, Socket } from 'node:net';
import { once } from 'node:events';
import { z } from 'zod';
import { check, native } from '../../../native/index.js';
import type { RpcConfig } from '../config/config.js';
import { Problems, optionSource } from '../config/problem.js';
import { addSchemaProblems } from '../config/schema-problems.js';
import { suggest } from '../config/suggest.js';
import type { Daemon } from '../daemon.js';
import type { Log } from '../log.js';
import { makeSocketPlace } from '../socket-path.js';
import { FramingError, JsonFrames } from './json-frames.js';
import { METHODS } from './methods.js';
import type { RpcMethod } from './methods.js';
import { RpcCode, RpcError, toErrorBody } from './rpc-error.js';
import type { RpcErrorBody } from './rpc-error.js';

/** Longest request: far above any there is. */
const REQUEST_BYTES_MAX = 256 * 1024;
const CONNECTIONS_MAX = 64;

type RequestId = string | number | null;

const requestSchema = z.object({
  jsonrpc: z.literal('2.0'),
  method: z.string(),
  params: z.record(z.string(), z.unknown()).optional(),
  id: z.union([z.string(), z.number(), z.null()]).optional(),
});

export class RpcServer {
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #socketPath: string;

  private constructor(server: Server, socketPath: string) {
    this.#server = server;
    this.#socketPath = socketPath;
  }

  /** Throws SystemError and errors of fs. */
  static async listen({ socketPath, mode }: RpcConfig, daemon: Daemon, log: Log): Promise<RpcServer> {
    makeSocketPlace(socketPath);
    // Made natively, as it must never be there with other rights than those.
    const fd = check(native.socketListen(socketPath, mode), `listen on ${socketPath}`);
    const server = createServer();
    server.maxConnections = CONNECTIONS_MAX;
    server.listen({ fd });
    await once(server, 'listening');
    const rpc = new RpcServer(server, socketPath);
    server.on('connection', (socket) => rpc.#serve(socket, daemon, log));
    return rpc;
  }

  close(): void {
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
    rmSync(this.#socketPath, { force: true });
  }

  #serve(socket: Socket, daemon: Daemon, log: Log): void {
    this.#sockets.add(socket);
    socket.on('close', () => this.#sockets.delete(socket));
    // A client that went away is its own loss.
    socket.on('error', () => undefined);
    void converse(socket, daemon, log);
  }
}

/** Reads requests and answers them until the client leaves or says what cannot be understood. */
async function converse(socket: Socket, daemon: Daemon, log: Log): Promise<void> {
  const frames = new JsonFrames(REQUEST_BYTES_MAX);
  try {
    // Reading by iteration: no more is read while a request is carried out, or while its answer is not taken.
    for await (const chunk of socket.iterator({ destroyOnReturn: false })) {
      for (const text of frames.push(chunk as Buffer)) await send(socket, await answer(text, daemon, log));
    }
  } catch (error) {
    if (!(error instanceof FramingError)) return;
    const problem = { field: '', message: error.message, remedy: 'send one JSON object for each request' };
    await send(socket, failure(null, toErrorBody(new RpcError(RpcCode.parseError, problem)))).catch(() => undefined);
  } finally {
    // What is written is on its way then; what is unread is of no interest.
    socket.end(() => socket.destroy());
  }
}

async function send(socket: Socket, response: object | null): Promise<void> {
  if (response === null || socket.destroyed) return;
  if (!socket.write(`${JSON.stringify(response)}\n`)) {
    await Promise.race([once(socket, 'drain'), once(socket, 'close')]);
  }
}

/** The response to a request; null to one without an id, which wants none. */
async function answer(text: string, daemon: Daemon, log: Log): Promise<object | null> {
  let id: RequestId | undefined = null;
  try {
    const request = parseRequest(text);
    id = request.id;
    const method = findMethod(request.method);
    const params = parseParams(method, request.params ?? {});
    const result = await method.call(daemon, params);
    log.debug({ method: method.name }, 'control request');
    return id === undefined ? null : { jsonrpc: '2.0', id, result };
  } catch (error) {
    const body = toErrorBody(error);
    log.warn({ error: body.message }, 'control request failed');
    return id === undefined ? null : failure(id, body);
  }
}

function failure(id: RequestId, error: RpcErrorBody): object {
  return { jsonrpc: '2.0', id, error };
}

function parseRequest(text: string): z.infer<typeof requestSchema> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const { message } = error as Error;
    throw new RpcError(RpcCode.parseError, { field: '', message, remedy: 'send JSON' });
  }
  const parsed = requestSchema.safeParse(value, { reportInput: true });
  if (parsed.success) return parsed.data;
  throw new RpcError(
    RpcCode.invalidRequest,
    ...parsed.error.issues.map(({ path, message }) => ({
      field: path.join('.'),
      message,
      remedy: 'send {"jsonrpc": "2.0", "id": 1, "method": NAME, "params": {...}}',
    })),
  );
}

function findMethod(name: string): RpcMethod {
  const method = METHODS.find((candidate) => candidate.name === name);
  if (method !== undefined) return method;
  const names = METHODS.map((candidate) => candidate.name);
  throw new RpcError(RpcCode.methodNotFound, {
    field: 'method',
    message: `there is no method ${name}`,
    remedy: suggest(name, names, 'method'),
  });
}

/** Throws ConfigError with everything that is wrong with the parameters. */
function parseParams(method: RpcMethod, params: Record<string, unknown>): Record<string, unknown> {
  const result = method.params.safeParse(params, { reportInput: true });
  if (result.success) return result.data;
  const problems = new Problems(optionSource({}));
  addSchemaProblems(problems, result.error.issues, params, method.params);
  problems.throwIfAny();
  throw new Error('unreachable: the schema found no problem after all');
}
