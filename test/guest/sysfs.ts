/**
 * What the guest's kernel says of a virtio disk in sysfs.
 */
import type { Guest } from './guest.js';

/** Feature bits by number: VIRTIO 1.2, 5.2.3 (block device) and 6 (reserved feature bits). */
export const Feature = {
  segMax: 2,
  readOnly: 5,
  blockSize: 6,
  flush: 9,
  configWce: 11,
  multiQueue: 12,
  discard: 13,
  writeZeroes: 14,
  indirect: 28,
  eventIdx: 29,
  protocolFeatures: 30,
  version1: 32,
  ringPacked: 34,
} as const;

export interface DiskFacts {
  readonly sizeBytes: number;
  readonly serial: string;
  readonly readOnly: boolean;
  /** `write back` or `write through`. */
  readonly writeCache: string;
  /** Hardware queues the driver uses. */
  readonly queues: number;
  readonly features: ReadonlySet<number>;
  /** Numbers from `queue/`, by file name. */
  readonly limits: Readonly<Record<LimitName, number>>;
}

const LIMIT_NAMES = [
  'logical_block_size',
  'physical_block_size',
  'minimum_io_size',
  'max_segments',
  'max_segment_size',
  'max_sectors_kb',
  'max_hw_sectors_kb',
  'discard_granularity',
  'discard_max_bytes',
  'max_discard_segments',
  'write_zeroes_max_bytes',
] as const;

type LimitName = (typeof LIMIT_NAMES)[number];

/** Reads all of it in one go. `disk` is a name such as `vda`. */
export async function diskFacts(guest: Guest, disk: string): Promise<DiskFacts> {
  const files = ['size', 'serial', 'ro', 'queue/write_cache', 'device/features'];
  const output = await guest.sh(
    [
      `cd /sys/block/${disk}`,
      ...[...files, ...LIMIT_NAMES.map((name) => `queue/${name}`)].map((file) => `echo "$(cat ${file})"`),
      'ls mq | wc -l',
    ].join('\n'),
  );
  const [size = '', serial = '', ro = '', writeCache = '', features = '', ...numbers] = output.trimEnd().split('\n');
  const limits = Object.fromEntries(LIMIT_NAMES.map((name, index) => [name, Number(numbers[index])]));
  return {
    sizeBytes: Number(size) * 512,
    serial,
    readOnly: ro === '1',
    writeCache,
    queues: Number(numbers.at(-1)),
    // The kernel prints bit 0 first.
    features: new Set([...features].flatMap((bit, number) => (bit === '1' ? [number] : []))),
    limits: limits as Record<LimitName, number>,
  };
}

/** FLUSH requests the guest has completed on a disk (Linux block statistics, field 16). */
export async function flushCount(guest: Guest, disk: string): Promise<number> {
  const fields = (await guest.sh(`cat /sys/block/${disk}/stat`)).trim().split(/\s+/);
  return Number(fields[15]);
}

/** Kernel messages that no healthy disk causes. */
export async function kernelComplaints(guest: Guest): Promise<string> {
  return guest.sh('dmesg | grep -iE "I/O error|not a head|blocked for more|corrupt|call trace" || true');
}
