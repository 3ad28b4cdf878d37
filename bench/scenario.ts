/** What is measured: disks, workloads, depths, and the bars that Strata has set itself. */

/** null: requests are answered at once. malloc: a disk in memory. raw: a file, without the page cache. */
export const BACKINGS = ['null', 'malloc', 'raw'] as const;
export type Backing = (typeof BACKINGS)[number];

/** Random requests of 4 KiB. mix: 70 % reads. */
export const WORKLOADS = ['read', 'write', 'mix'] as const;
export type Workload = (typeof WORKLOADS)[number];

export const READ_PERCENT: Readonly<Record<Workload, number>> = { read: 100, write: 0, mix: 70 };
export const DEPTHS = [1, 8, 32, 128];
export const BLOCK_BYTES = 4096;

export const TARGETS = ['strata', 'qsd', 'fio'] as const;
export type TargetName = (typeof TARGETS)[number];
export const TARGET_TITLES: Readonly<Record<TargetName, string>> = {
  strata: 'Strata',
  qsd: 'qemu-storage-daemon',
  fio: 'fio (floor)',
};

/** One place of the matrix. */
export interface Point {
  readonly backing: Backing;
  readonly workload: Workload;
  readonly depth: number;
}

/** One target at one point in one round. */
export interface Sample {
  readonly iops: number;
  readonly p50Us: number;
  readonly p99Us: number;
  /** CPU time of all threads of the target. */
  readonly cpuUsPerRequest: number;
  readonly errors: number;
}

/** A target at a point: its rounds, in order, and the system calls of a window of its own. */
export interface Series {
  readonly target: TargetName;
  readonly samples: readonly Sample[];
  readonly syscallsPerRequest: number;
}

export interface PointResult {
  readonly point: Point;
  readonly series: readonly Series[];
}

/** A ratio that is to be reached: of Strata's median IOPS, or of its CPU time per request, to another target's. */
export interface Bar {
  readonly what: 'iops' | 'cpuUsPerRequest';
  readonly backing: Backing;
  readonly workloads: readonly Workload[];
  readonly depths: readonly number[];
  readonly against: TargetName;
  /** At least so much of `iops`, at most so much of `cpuUsPerRequest`. */
  readonly ratio: number;
}

export const BARS: readonly Bar[] = [
  { what: 'iops', backing: 'null', workloads: WORKLOADS, depths: [32], against: 'qsd', ratio: 2.5 },
  { what: 'iops', backing: 'null', workloads: WORKLOADS, depths: [1], against: 'qsd', ratio: 5 },
  { what: 'iops', backing: 'malloc', workloads: ['read', 'write'], depths: [32], against: 'qsd', ratio: 0.8 },
  { what: 'iops', backing: 'raw', workloads: ['read'], depths: [1, 32, 128], against: 'qsd', ratio: 1.3 },
  { what: 'iops', backing: 'raw', workloads: ['read'], depths: [32, 128], against: 'fio', ratio: 0.95 },
  { what: 'cpuUsPerRequest', backing: 'raw', workloads: ['read'], depths: [32], against: 'fio', ratio: 1.3 },
];
