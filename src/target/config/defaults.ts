/** What `strata serve` does without a config file: one disk in a sparse file, below the current folder. */
import { resolve } from 'node:path';
import type { AccessConfig, DaemonConfig } from './config.js';
import type { LoadedConfig } from './load.js';
import { optionSource } from './problem.js';
import {
  DEFAULT_DRAIN_TIMEOUT_S,
  DEFAULT_HANDSHAKE_TIMEOUT_S,
  DEFAULT_METRICS,
  DEFAULT_POLL_US,
  DEFAULT_QUEUES,
  DEFAULT_SOCKET_MODE,
} from './schema.js';

export const DEFAULT_DISK_PATH = 'data/disk0.img';
const DISK_BYTES = 10 * 2 ** 30;
const SOCKET_PATH = 'run/disk0.sock';
/** The control socket, and where an installed service has it. */
export const DEFAULT_RPC_SOCKET = 'run/strata.sock';
export const SERVICE_RPC_SOCKET = '/run/strata/strata.sock';

/** Settings that the defaults, the one-disk program and tests share. */
export const BASE_CONFIG = {
  reactors: [{ name: 'reactor0', mode: 'adaptive', pollUs: DEFAULT_POLL_US }],
  rpc: null,
  log: { level: 'info', format: 'auto' },
  drainTimeoutS: DEFAULT_DRAIN_TIMEOUT_S,
  coreDumps: false,
  stateDir: null,
} as const satisfies Partial<DaemonConfig>;

export const DEFAULT_ACCESS = {
  allow: null,
  socketGroup: null,
  handshakeTimeoutS: DEFAULT_HANDSHAKE_TIMEOUT_S,
} as const satisfies AccessConfig;

/** @param folder what data/ and run/ are created in */
export function defaultConfig(folder: string): LoadedConfig {
  const config: DaemonConfig = {
    ...BASE_CONFIG,
    bdevs: [
      {
        name: 'disk0',
        module: 'uring',
        path: resolve(folder, DEFAULT_DISK_PATH),
        readOnly: false,
        create: { sizeBytes: DISK_BYTES },
        blockSizeBytes: null,
        direct: true,
        iopoll: false,
        fixedBuffers: false,
        lock: true,
      },
    ],
    controllers: [
      {
        name: 'disk0',
        bdev: 'disk0',
        address: { socketPath: resolve(folder, SOCKET_PATH), mode: DEFAULT_SOCKET_MODE },
        serial: 'disk0',
        queues: DEFAULT_QUEUES,
        readOnly: false,
        writeCache: true,
        reactor: null,
        isolate: false,
        targets: [],
        ...DEFAULT_ACCESS,
      },
    ],
    metrics: DEFAULT_METRICS,
    rpc: { socketPath: resolve(folder, DEFAULT_RPC_SOCKET), mode: DEFAULT_SOCKET_MODE },
  };
  return { config, source: optionSource({ 'metrics.listen': '--metrics' }) };
}
