/** Configs of bdevs and stacks as tests use them, and the files and devices under them. */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { check, native } from '../../native/index.js';
import type { BdevConfig, BdevLimits } from '../../src/bdev/bdev.js';
import type { DelayConfig } from '../../src/bdev/delay/delay.js';
import type { ErrorConfig, ErrorRule } from '../../src/bdev/error/error.js';
import type { MallocConfig } from '../../src/bdev/malloc/malloc.js';
import type { NullConfig } from '../../src/bdev/null/null.js';
import type { PassthruConfig } from '../../src/bdev/passthru/passthru.js';
import type { Qcow2Config } from '../../src/bdev/qcow2/qcow2.js';
import type { QosConfig } from '../../src/bdev/qos/qos.js';
import type { UringConfig } from '../../src/bdev/uring/uring.js';
import type { LimitedConfig } from '../support/limited.js';
import { attachLoop } from '../support/loop-device.js';
import type { ReluctantConfig } from '../support/reluctant.js';

export const DISK_BYTES = 20 * 2 ** 20;

/** A disk for the suite. */
export interface Stack {
  /** Bases first; the last is the disk to be tested. */
  readonly configs: readonly BdevConfig[];
  /** Gives back files and devices, once the bdevs are gone. */
  readonly release: () => void;
}

/** A filter still without its place in a stack. */
export type Filter = (name: string, base: string) => BdevConfig;

/** Puts filters on a leaf; the first is the lowest. */
export function stack(leaf: Stack, ...filters: Filter[]): Stack {
  const configs = [...leaf.configs];
  filters.forEach((filter, i) => configs.push(filter(`filter${i}`, configs.at(-1)!.name)));
  return { configs, release: leaf.release };
}

const nothing = (): void => undefined;

export function malloc(blockSizeBytes: 512 | 4096 = 512, sizeBytes = DISK_BYTES): Stack {
  const config: MallocConfig = { name: 'leaf', module: 'malloc', sizeBytes, blockSizeBytes };
  return { configs: [config], release: nothing };
}

export function nulled(readZeroes: boolean): Stack {
  const config: NullConfig = { name: 'leaf', module: 'null', sizeBytes: DISK_BYTES, blockSizeBytes: 512, readZeroes };
  return { configs: [config], release: nothing };
}

/** A new sparse file. */
function temporaryFile(sizeBytes: number): { path: string; remove: () => void } {
  const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  const path = join(folder, 'disk');
  writeFileSync(path, '');
  truncateSync(path, sizeBytes);
  return { path, remove: () => rmSync(folder, { recursive: true }) };
}

export const uringDefaults = {
  name: 'leaf',
  module: 'uring',
  readOnly: false,
  create: null,
  blockSizeBytes: null,
  direct: false,
  iopoll: false,
  fixedBuffers: false,
  lock: true,
} as const satisfies Partial<UringConfig>;

export function uringFile(options: Partial<UringConfig> = {}, sizeBytes = DISK_BYTES): Stack {
  const file = temporaryFile(sizeBytes);
  const config: UringConfig = { ...uringDefaults, ...options, path: file.path };
  return { configs: [config], release: file.remove };
}

/** A file in memory, whose file system cannot zero a range: known only when it is tried. */
export function uringMemory(): Stack {
  const fd = check(native.memfdCreate('disk', DISK_BYTES), 'create a memfd');
  const config: UringConfig = { ...uringDefaults, path: `/proc/self/fd/${fd}` };
  return { configs: [config], release: () => void native.fileClose(fd) };
}

export function uringLoop(sectorBytes: 512 | 4096, options: Partial<UringConfig> = {}): Stack {
  const file = temporaryFile(DISK_BYTES);
  const device = attachLoop(file.path, sectorBytes);
  const config: UringConfig = { ...uringDefaults, ...options, path: device.path };
  return {
    configs: [config],
    release: () => {
      device.detach();
      file.remove();
    },
  };
}

/** An empty image on a leaf. @param options of `qemu-img create -o` */
export function qcow2(options = '', leaf: Partial<UringConfig> = {}, sizeBytes = DISK_BYTES): Stack {
  const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  const path = join(folder, 'disk.qcow2');
  const words = ['create', '-q', '-f', 'qcow2', ...(options === '' ? [] : ['-o', options]), path, String(sizeBytes)];
  execFileSync('qemu-img', words);
  const file: UringConfig = { ...uringDefaults, ...leaf, name: 'file', path };
  return {
    configs: [file, qcow2On()('leaf', 'file')],
    release: () => {
      const report = spawnSync('qemu-img', ['check', path], { encoding: 'utf8' });
      rmSync(folder, { recursive: true });
      if (report.status !== 0) throw new Error(`qemu-img check: ${report.stdout}${report.stderr}`);
    },
  };
}

export function qcow2On(options: Partial<Qcow2Config> = {}): Filter {
  const defaults = {
    backing: null,
    dataFile: null,
    imageDir: null,
    keyFile: null,
    readOnly: false,
    l2CacheBytes: 2 ** 25,
    restartDir: '/dev/shm',
    clusterCacheBytes: 2 ** 22,
    codecThreads: 2,
  };
  return (name, base) => ({ ...defaults, ...options, name, base, module: 'qcow2' }) satisfies Qcow2Config;
}

export const passthru: Filter = (name, base) => ({ name, base, module: 'passthru' }) satisfies PassthruConfig;

export function delay(options: Partial<DelayConfig> = {}): Filter {
  const times = { readUs: 0, writeUs: 0, flushUs: 0, discardUs: 0, jitterUs: 0 };
  return (name, base) => ({ ...times, ...options, name, base, module: 'delay' }) satisfies DelayConfig;
}

export function error(...rules: ErrorRule[]): Filter {
  return (name, base) => ({ name, base, module: 'error', rules }) satisfies ErrorConfig;
}

export function qos(options: Partial<QosConfig> = {}): Filter {
  const none = {
    readIops: 0,
    writeIops: 0,
    totalIops: 0,
    readBytesPerSecond: 0,
    writeBytesPerSecond: 0,
    totalBytesPerSecond: 0,
    burstSeconds: 0.001,
    group: null,
  };
  return (name, base) => ({ ...none, ...options, name, base, module: 'qos' }) satisfies QosConfig;
}

export function limited(limits: Partial<BdevLimits>, without: LimitedConfig['without'] = [], readOnly = false): Filter {
  return (name, base) => ({ name, base, module: 'limited', limits, without, readOnly }) satisfies LimitedConfig;
}

export function reluctant(refuse: ReluctantConfig['refuse'], capacity = Infinity): Filter {
  return (name, base) => ({ name, base, module: 'reluctant', refuse, capacity }) satisfies ReluctantConfig;
}
