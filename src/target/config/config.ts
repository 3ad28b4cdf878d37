/**
 * What the daemon is told to do, checked and typed. It is made from a config file (load.ts), from the embedded defaults
 * (defaults.ts) or from the options of the one-disk program; nothing behind it knows which.
 */
import type { DelayConfig } from '../../bdev/delay/delay.js';
import type { ErrorConfig } from '../../bdev/error/error.js';
import type { MallocConfig } from '../../bdev/malloc/malloc.js';
import type { NullConfig } from '../../bdev/null/null.js';
import type { PassthruConfig } from '../../bdev/passthru/passthru.js';
import type { Qcow2Config } from '../../bdev/qcow2/qcow2.js';
import type { QosConfig } from '../../bdev/qos/qos.js';
import type { UringConfig } from '../../bdev/uring/uring.js';
import type { RemoteReactorOptions } from '../../poller/remote-reactor.js';
import type { ListenAddress } from '../../vhost-user/blk-controller.js';

export type AnyBdevConfig =
  NullConfig | MallocConfig | UringConfig | PassthruConfig | DelayConfig | ErrorConfig | QosConfig | Qcow2Config;

export type ReactorConfig = RemoteReactorOptions;

/** Users and groups by name or number. */
export interface PeersConfig {
  readonly users: readonly (string | number)[];
  readonly groups: readonly (string | number)[];
}

/** Who gets at a controller. */
export interface AccessConfig {
  /** Who may connect; null: the daemon's own user, root, and whoever is in the socket's group. */
  readonly allow: PeersConfig | null;
  /** Group of the socket and of a folder made for it, by name or number; null leaves it to the kernel. */
  readonly socketGroup: string | number | null;
  /** Longest time a front-end may take to its first whole message, and from the first byte of any to its last, in seconds. */
  readonly handshakeTimeoutS: number;
}

/** One virtual disk on one socket. */
export interface ControllerConfig extends AccessConfig {
  readonly name: string;
  /** Name of the bdev it shows. */
  readonly bdev: string;
  /** The group of its socket is not in it: see `socketGroup`. */
  readonly address: ListenAddress;
  /** What the guest reads as the disk's serial number: printable ASCII, at most 20 characters. */
  readonly serial: string;
  /** Request queues on offer. */
  readonly queues: number;
  readonly readOnly: boolean;
  /** Write-back caching until the guest says otherwise; false: every write is durable when it completes. */
  readonly writeCache: boolean;
  /** Name of the reactor to run on; null leaves the choice to the daemon. */
  readonly reactor: string | null;
  /** Its whole stack gets a process of its own, with a reactor that has the settings of the one named. */
  readonly isolate: boolean;
  /** Names of bdevs that the disk may be copied or moved to: they live on its reactor. */
  readonly targets: readonly string[];
}

export interface NetworkAddress {
  readonly host: string;
  /** 0 takes any free port. */
  readonly port: number;
}

/** Where the control socket is. */
export interface RpcConfig {
  /** Absolute. */
  readonly socketPath: string;
  readonly mode: number;
}

export const LOG_LEVELS = ['debug', 'info', 'warn', 'error'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];
/** auto: text on a terminal, JSON elsewhere. */
export const LOG_FORMATS = ['auto', 'json', 'text'] as const;
export type LogFormat = (typeof LOG_FORMATS)[number];

export interface LogConfig {
  readonly level: LogLevel;
  readonly format: LogFormat;
}

export interface DaemonConfig {
  readonly reactors: readonly ReactorConfig[];
  readonly bdevs: readonly AnyBdevConfig[];
  readonly controllers: readonly ControllerConfig[];
  /** Where /metrics and /healthz are served; null: nowhere. */
  readonly metrics: NetworkAddress | null;
  /** null: there is none. */
  readonly rpc: RpcConfig | null;
  readonly log: LogConfig;
  /** Longest time that requests in flight may take to finish when the daemon stops, in seconds. */
  readonly drainTimeoutS: number;
  /** Whether the kernel may write the daemon's memory, which holds guests' data, into a core dump. */
  readonly coreDumps: boolean;
  /** Folder, absolute, for what has to outlive the daemon; null: nothing does. */
  readonly stateDir: string | null;
}

/** A bdev that another stands on. */
export interface BaseReference {
  readonly name: string;
  /** Key of the config that names it. */
  readonly field: 'base' | 'backing' | 'data_file';
  /** It is read only, and nobody may write to it meanwhile. */
  readonly isRead: boolean;
}

/** Whether a bdev shows a snapshot, and so is only read. */
export function isSnapshot(bdev: AnyBdevConfig): boolean {
  return bdev.module === 'qcow2' && (bdev.snapshot ?? null) !== null;
}

/** The bdevs directly below one, none for a leaf. */
export function basesOf(bdev: AnyBdevConfig): BaseReference[] {
  switch (bdev.module) {
    case 'null':
    case 'malloc':
    case 'uring':
      return [];
    case 'qcow2': {
      const { base, backing, dataFile } = bdev;
      const isRead = bdev.readOnly || isSnapshot(bdev);
      return [
        { name: base, field: 'base', isRead },
        ...(dataFile === null ? [] : [{ name: dataFile, field: 'data_file', isRead } as const]),
        ...(backing === null ? [] : [{ name: backing, field: 'backing', isRead: true } as const]),
      ];
    }
    default:
      return [{ name: bdev.base, field: 'base', isRead: false }];
  }
}
