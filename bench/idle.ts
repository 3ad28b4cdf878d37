/**
 * What a disk costs that nobody uses, and how soon it answers when somebody does again: the CPU time of the daemon over
 * a quiet while with a front-end attached, then single reads with pauses between them.
 */
import { setTimeout } from 'node:timers/promises';
import { cpuTimeUs } from './process-cost.js';
import { formatSmall, markdownTable } from './report.js';
import { TARGET_TITLES } from './scenario.js';
import type { Target } from './targets.js';

export interface IdleResult {
  readonly target: 'strata' | 'qsd';
  /** Of one core. */
  readonly cpuPercent: number;
  /** From making the request available to its used entry. */
  readonly firstP50Us: number;
  readonly firstP99Us: number;
}

/** Time for what the last request left behind to settle. */
const SETTLE_MS = 1000;

export async function measureIdle(
  target: Target,
  quietMs: number,
  samples: number,
  gapMs: number,
): Promise<IdleResult> {
  // The first request ever is not the first after idling.
  target.spacedReads(10, 1);
  await setTimeout(SETTLE_MS);
  const cpuBeforeUs = cpuTimeUs(target.pid);
  const startMs = performance.now();
  await setTimeout(quietMs);
  const quietUs = (performance.now() - startMs) * 1000;
  const cpuPercent = (100 * (cpuTimeUs(target.pid) - cpuBeforeUs)) / quietUs;
  const { p50Us, p99Us } = target.spacedReads(samples, gapMs);
  return { target: target.name, cpuPercent, firstP50Us: p50Us, firstP99Us: p99Us };
}

/** @param results median over the rounds, one per target */
export function renderIdle(results: readonly IdleResult[]): string {
  const columns = ['target', 'CPU % idle', 'first request p50 us', 'p99 us'];
  const rows = results.map((result) => [
    TARGET_TITLES[result.target],
    result.cpuPercent.toFixed(3),
    formatSmall(result.firstP50Us),
    formatSmall(result.firstP99Us),
  ]);
  return markdownTable(columns, rows).join('\n');
}
