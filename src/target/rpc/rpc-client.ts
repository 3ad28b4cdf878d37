/** A client of the control socket, for `strata rpc`: one request, one response. */
import { connect } from 'node:net';
import { JsonFrames } from './json-frames.js';
import type { RpcErrorBody } from './rpc-error.js';

const RESPONSE_BYTES_MAX = 64 * 2 ** 20;

export type RpcResponse = { readonly result: unknown } | { readonly error: RpcErrorBody };

/** Rejects with the error of connect(2), or when the daemon closes the connection without an answer. */
export function callRpc(socketPath: string, method: string, params: Record<string, unknown>): Promise<RpcResponse> {
  return new Promise((resolve, reject) => {
    const socket = connect(socketPath);
    const frames = new JsonFrames(RESPONSE_BYTES_MAX);
    socket.on('connect', () => socket.write(JSON.stringify({ jsonrpc: '2.0', id: 1, method, params })));
    socket.on('data', (chunk: Buffer) => {
      try {
        const [text] = frames.push(chunk);
        if (text === undefined) return;
        resolve(JSON.parse(text) as RpcResponse);
        socket.destroy();
      } catch (error) {
        socket.destroy(error as Error);
      }
    });
    socket.on('error', reject);
    socket.on('close', () => reject(new Error('the daemon closed the connection without an answer')));
  });
}

/**
 * Parameters from the command line: one JSON object, or `key=value` words whose values are JSON where they can be, else text.
 * Throws Error with what to write instead.
 */
export function parseParamWords(words: readonly string[]): Record<string, unknown> {
  const [first] = words;
  if (words.length === 1 && first!.trimStart().startsWith('{')) {
    try {
      return JSON.parse(first!) as Record<string, unknown>;
    } catch (error) {
      throw new Error(`the parameters are no JSON object: ${(error as Error).message}`, { cause: error });
    }
  }
  return Object.fromEntries(
    words.map((word) => {
      const at = word.indexOf('=');
      if (at < 1) throw new Error(`${word} is no parameter: write key=value, or one JSON object in quotes`);
      return [word.slice(0, at), valueOf(word.slice(at + 1))];
    }),
  );
}

function valueOf(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch {
    return text;
  }
}
