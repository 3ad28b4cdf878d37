/**
 * What it costs to write down which requests are in flight: one daemon with it beside one without, taking turns on the same core.
 */
import type { BenchOptions } from './options.js';
import { diskSpec } from './matrix.js';
import { markdownTable } from './report.js';
import { BLOCK_BYTES } from './scenario.js';
import type { Backing, Workload } from './scenario.js';
import { pairedRatio } from './statistics.js';
import type { Spread } from './statistics.js';
import { startStrata } from './targets.js';

export interface InflightResult {
  readonly backing: Backing;
  readonly workload: Workload;
  readonly depth: number;
  /** Requests per second with tracking, as a part of those without. */
  readonly ratio: Spread;
}

export async function measureInflight(
  backing: Backing,
  directory: string,
  options: BenchOptions,
): Promise<InflightResult[]> {
  const disk = diskSpec(backing, options);
  const daemon = { directory, core: options.targetCore, qsd: options.qsd };
  const without = await startStrata(disk, daemon);
  try {
    const having = await startStrata(disk, { ...daemon, inflight: true });
    try {
      if (backing === 'malloc') for (const target of [without, having]) target.fill();
      const results: InflightResult[] = [];
      for (const workload of options.workload) {
        for (const depth of options.depth) {
          const iops = { having: [] as number[], without: [] as number[] };
          for (let round = 0; round < options.rounds; round++) {
            const sample = (name: 'having' | 'without'): void => {
              const target = name === 'having' ? having : without;
              iops[name].push(target.sample(workload, depth, options.seconds, round + 1).iops);
            };
            // Who begins changes from round to round.
            for (const name of round % 2 === 0 ? (['without', 'having'] as const) : (['having', 'without'] as const))
              sample(name);
          }
          results.push({ backing, workload, depth, ratio: pairedRatio(iops.having, iops.without) });
        }
      }
      return results;
    } finally {
      await having[Symbol.asyncDispose]();
    }
  } finally {
    await without[Symbol.asyncDispose]();
  }
}

export function renderInflight(results: readonly InflightResult[]): string {
  const columns = ['disk', `${BLOCK_BYTES} bytes`, 'depth', 'IOPS, with / without', 'least', 'most'];
  const rows = results.map(({ backing, workload, depth, ratio }) => [
    backing,
    workload,
    String(depth),
    ...[ratio.median, ratio.min, ratio.max].map((value) => value.toFixed(3)),
  ]);
  return markdownTable(columns, rows).join('\n');
}
