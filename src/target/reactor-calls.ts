/** What the control plane asks of a reactor, and what a reactor reports unasked: names, parameters and results. */
import type { BdevConfig } from '../bdev/bdev.js';
import type { IO_TYPE_NAMES } from '../bdev/bdev-io.js';
import type { MirrorInfo } from '../bdev/mirror/mirror.js';
import type { RemoteReactor } from '../poller/remote-reactor.js';
import type { BlkControllerInfo, BlkControllerOptions, ListenAddress } from '../vhost-user/blk-controller.js';
import type { PeerRules } from '../vhost-user/peer-rules.js';
import type { LogLevel } from './config/config.js';
import type { JobEnd } from './state/jobs.js';

/** A bdev as it is at the moment. */
export interface BdevInfo {
  readonly name: string;
  readonly module: string;
  readonly uuid: string;
  readonly sizeBytes: number;
  readonly blockSizeBytes: number;
  readonly readOnly: boolean;
  /** Who writes to it: a bdev's or a controller's name. */
  readonly claimedBy: string | null;
  /** Requests that its module does itself. */
  readonly supports: readonly (typeof IO_TYPE_NAMES)[number][];
  /** What its module says of itself. */
  readonly facts: Record<string, unknown>;
}

/** A bdev that was created. */
export interface BdevFacts extends BdevInfo {
  /** The values of its IoStats: shared memory, or a copy of an isolated one's. */
  readonly stats: Float64Array;
}

export interface ControllerSetup {
  readonly bdev: string;
  readonly options: BlkControllerOptions;
  /** Messages below are not sent. */
  readonly logLevel: LogLevel;
}

export interface ControllerFacts {
  /** Counters in the order of CONTROLLER_STAT_NAMES: shared memory, or a copy of an isolated one's. */
  readonly stats: Float64Array;
}

export interface ListenParams {
  readonly name: string;
  readonly address: ListenAddress;
  /** Null lets everybody connect. */
  readonly peers: PeerRules | null;
}

/** A controller as it is at the moment. */
export interface ControllerInfo extends BlkControllerInfo {
  /** The last one. */
  readonly mirror: MirrorInfo | null;
}

export interface MirrorParams {
  readonly controller: string;
  /** Name of a bdev. */
  readonly target: string;
  /** 0: no limit. */
  readonly bytesPerSecond: number;
}

/** By name: the arrays of BdevFacts and ControllerFacts. */
export interface Counters {
  readonly reactor: Float64Array;
  readonly bdevs: ReadonlyMap<string, Float64Array>;
  readonly controllers: ReadonlyMap<string, Float64Array>;
}

interface Calls {
  /** Creates a bdev; its bases exist. */
  createBdev: { params: BdevConfig; result: BdevFacts };
  /** Creates a controller that does not listen yet. */
  createController: { params: ControllerSetup; result: ControllerFacts };
  listen: { params: ListenParams; result: void };
  controllers: { params: null; result: readonly ControllerInfo[] };
  bdevs: { params: null; result: readonly BdevInfo[] };
  /** Changes the size of a bdev, to that of its storage when it is null. Answers all bdevs, as others change with it. */
  resizeBdev: {
    params: { readonly name: string; readonly sizeBytes: number | null };
    result: readonly BdevInfo[];
  };
  /** Has a bdev carry out an operation of its module. */
  operate: {
    params: { readonly name: string; readonly operation: string; readonly params: Readonly<Record<string, unknown>> };
    result: unknown;
  };
  /** Starts to mirror the disk of a controller. */
  mirror: { params: MirrorParams; result: MirrorInfo };
  /** Ends a mirror. Answers when its target is written no more. */
  cancelMirror: { params: { readonly controller: string }; result: MirrorInfo };
  /** See Mirror: from its answer until one of the next two the controller's requests are held. */
  preparePivot: { params: { readonly controller: string }; result: MirrorInfo };
  commitPivot: { params: { readonly controller: string }; result: MirrorInfo };
  abortPivot: { params: { readonly controller: string }; result: MirrorInfo };
  /** What the counters say now, for a control plane that shares no memory. */
  counters: { params: null; result: Counters };
  /** All that is wanted has been opened: an isolated reactor opens no file from here on. */
  seal: { params: null; result: void };
  /** Drains and closes all controllers, then all bdevs. */
  close: { params: null; result: void };
}

/** Asks a reactor. Rejects with RemoteError. */
export async function callReactor<M extends keyof Calls>(
  reactor: RemoteReactor,
  method: M,
  params: Calls[M]['params'],
): Promise<Calls[M]['result']> {
  return await reactor.call(method, params);
}

/** The handlers a reactor must have. */
export type ReactorCallHandlers = {
  readonly [M in keyof Calls]: (params: Calls[M]['params']) => Calls[M]['result'] | Promise<Calls[M]['result']>;
};

export interface Notices {
  log: {
    readonly controller: string;
    readonly level: LogLevel;
    readonly message: string;
    readonly fields: Record<string, unknown>;
  };
  /** The front-end on a connected socket that was handed in has left. */
  closedByPeer: { readonly controller: string };
  /** A long job is over. */
  jobEnded: JobEnd;
}
