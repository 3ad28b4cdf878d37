/**
 * Measures every point of the matrix. Targets take turns within a round, and who begins changes from round to round, so that
 * what disturbs the machine for a while disturbs all of them alike. Only one is under load at a time.
 */
import { fioSample, fioSyscallsPerRequest } from './fio.js';
import type { BenchOptions } from './options.js';
import { rawFile } from './raw-file.js';
import { formatCount, medianOf } from './report.js';
import type { Backing, Point, PointResult, Sample, TargetName, Workload } from './scenario.js';
import { startQsd, startStrata } from './targets.js';
import type { DiskSpec, Target } from './targets.js';

/** Whoever is measured. */
interface Contender {
  readonly name: TargetName;
  sample(workload: Workload, depth: number, seconds: number, seed: number): Sample | Promise<Sample>;
  syscallsPerRequest(workload: Workload, depth: number): Promise<number>;
}

const NULL_DISK_BYTES = 10 * 2 ** 30;

export function diskSpec(backing: Backing, options: BenchOptions): DiskSpec {
  switch (backing) {
    case 'null':
      return { backing, sizeBytes: NULL_DISK_BYTES, path: '' };
    case 'malloc':
      return { backing, sizeBytes: options.memorySize, path: '' };
    case 'raw':
      return { backing, sizeBytes: options.fileSize, path: rawFile(options.dir, options.fileSize) };
  }
}

/** Runs `work` with the daemons of one disk, which are gone after it. @param directory where sockets go */
export async function withDaemons<T>(
  disk: DiskSpec,
  directory: string,
  options: BenchOptions,
  work: (targets: readonly Target[]) => Promise<T>,
): Promise<T> {
  const daemon = { directory, core: options.targetCore, qsd: options.qsd };
  const strata = await startStrata(disk, daemon);
  try {
    const qsd = await startQsd(disk, daemon);
    try {
      return await work([strata, qsd]);
    } finally {
      await qsd[Symbol.asyncDispose]();
    }
  } finally {
    await strata[Symbol.asyncDispose]();
  }
}

/** All points of one disk. @param directory where sockets go */
export async function measureDisk(backing: Backing, directory: string, options: BenchOptions): Promise<PointResult[]> {
  const disk = diskSpec(backing, options);
  return withDaemons(disk, directory, options, async (targets) => {
    if (backing === 'malloc') for (const target of targets) target.fill();
    const contenders: Contender[] = [...targets];
    if (backing === 'raw' && options.fio) contenders.push(fioContender(disk.path, options.targetCore));
    const results: PointResult[] = [];
    for (const workload of options.workload) {
      for (const depth of options.depth) {
        const result = await measurePoint({ backing, workload, depth }, contenders, options);
        const figures = result.series.map((own) => `${own.target} ${formatCount(medianOf(own, 'iops'))}`);
        console.error(`${backing} ${workload} depth ${depth}: ${figures.join(', ')}`);
        results.push(result);
      }
    }
    return results;
  });
}

function fioContender(path: string, core: number): Contender {
  return {
    name: 'fio',
    sample: (workload, depth, seconds) => fioSample({ path, core }, workload, depth, seconds),
    syscallsPerRequest: (workload, depth) => fioSyscallsPerRequest({ path, core }, workload, depth),
  };
}

async function measurePoint(
  point: Point,
  contenders: readonly Contender[],
  options: BenchOptions,
): Promise<PointResult> {
  const { workload, depth } = point;
  const samples = contenders.map((): Sample[] => []);
  for (let round = 0; round < options.rounds; round++) {
    for (let turn = 0; turn < contenders.length; turn++) {
      const who = (round + turn) % contenders.length;
      samples[who]!.push(await contenders[who]!.sample(workload, depth, options.seconds, round + 1));
    }
  }
  const series = [];
  for (const [who, contender] of contenders.entries()) {
    const syscallsPerRequest = await contender.syscallsPerRequest(workload, depth);
    series.push({ target: contender.name, samples: samples[who]!, syscallsPerRequest });
  }
  return { point, series };
}
