/** Errors as JSON-RPC 2.0 answers them; where SPDK has a code of its own for the case, that one is used. */
import { BdevError } from '../../bdev/bdev.js';
import { RemoteError } from '../../poller/remote-reactor.js';
import { ConfigError } from '../config/problem.js';

export const RpcCode = {
  parseError: -32700,
  invalidRequest: -32600,
  methodNotFound: -32601,
  invalidParams: -32602,
  internalError: -32603,
  /** As SPDK: the negative errno. */
  noSuchDevice: -19,
  invalidArgument: -22,
} as const;

/** One thing that is wrong. */
export interface RpcProblem {
  /** Parameter at fault, or ''. */
  readonly field: string;
  readonly message: string;
  /** Next step. */
  readonly remedy: string;
}

export interface RpcErrorBody {
  readonly code: number;
  /** All problems in words. */
  readonly message: string;
  readonly data?: readonly RpcProblem[];
}

export class RpcError extends Error {
  readonly problems: readonly RpcProblem[];

  constructor(
    readonly code: number,
    ...problems: readonly RpcProblem[]
  ) {
    super(problems.map(inWords).join('\n'));
    this.name = 'RpcError';
    this.problems = problems;
  }
}

/** What any failure of a method is answered by. */
export function toErrorBody(error: unknown): RpcErrorBody {
  const { code, message, problems } = toRpcError(error);
  return { code, message, data: problems };
}

function toRpcError(error: unknown): RpcError {
  if (error instanceof RpcError) return error;
  if (error instanceof ConfigError) return new RpcError(RpcCode.invalidParams, ...error.problems.map(onlyProblem));
  const message = error instanceof Error ? error.message : String(error);
  if (isBdevError(error)) {
    const { field, hint } = (error instanceof RemoteError ? error.fields : error) as { field: string; hint: string };
    return new RpcError(RpcCode.invalidArgument, { field: toSnakeCase(field), message, remedy: hint });
  }
  return new RpcError(RpcCode.internalError, { field: '', message, remedy: "see the daemon's log" });
}

/** One of ours, or of a reactor. */
function isBdevError(error: unknown): boolean {
  return error instanceof BdevError || (error instanceof RemoteError && error.name === 'BdevError');
}

function onlyProblem({ field, message, remedy }: RpcProblem): RpcProblem {
  return { field, message, remedy };
}

function inWords({ field, message, remedy }: RpcProblem): string {
  return `${field === '' ? '' : `${field}: `}${message} -> ${remedy}`;
}

/** Field names of modules as parameters spell them. */
export function toSnakeCase(name: string): string {
  return name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
