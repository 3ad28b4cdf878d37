/**
 * fio in the guest: random writes of 4 to 64 KiB, each block with its own CRC32C, read back and checked.
 */
import { expect } from 'vitest';
import type { Guest } from './guest.js';

export interface FioOptions {
  /** Total over all jobs. */
  readonly sizeMib: number;
  /** Jobs with an area each, each bound to a processor of its own so that each uses another queue. */
  readonly jobs?: number;
  readonly depth?: number;
  readonly seed?: number;
  readonly timeoutMs?: number;
}

interface FioReport {
  readonly jobs: readonly {
    readonly error: number;
    readonly read: { readonly io_bytes: number };
    readonly write: { readonly io_bytes: number };
  }[];
}

/** Fails unless every job wrote its whole area and read all of it back intact. `disk` is a name such as `vda`. */
export async function fioVerify(guest: Guest, disk: string, options: FioOptions): Promise<void> {
  const { sizeMib, jobs = 1, depth = 16, seed = 1, timeoutMs = 180_000 } = options;
  const jobMib = sizeMib / jobs;
  const { code, output } = await guest.run(
    [
      `fio --name=verify --filename=/dev/${disk} --ioengine=io_uring --direct=1 --iodepth=${depth}`,
      `--rw=randwrite --bsrange=4k-64k --randseed=${seed} --size=${jobMib}m --offset_increment=${jobMib}m`,
      `--numjobs=${jobs} --cpus_allowed=0-${jobs - 1} --cpus_allowed_policy=split`,
      '--verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=json',
    ].join(' '),
    { timeoutMs },
  );
  expect(code, output).toBe(0);
  // With several jobs a warning that they share a file comes first; their areas do not overlap.
  const report = JSON.parse(output.slice(output.indexOf('{'))) as FioReport;
  const whole = { error: 0, written: jobMib * 2 ** 20, verified: jobMib * 2 ** 20 };
  expect(
    report.jobs.map(({ error, write, read }) => ({ error, written: write.io_bytes, verified: read.io_bytes })),
  ).toEqual(Array.from({ length: jobs }, () => whole));
}
