/** The totals of a suite, for .ci/run: `.cache/results/<suite>.txt`, as scripts/stages.mjs leaves them. */
import { mkdirSync, writeFileSync } from 'node:fs';

const RESULTS = '.cache/results';

/** Lays `<passed> <failed>` and, below it, the remarks where they are looked for. */
export function leaveTotals(suite: string, passed: number, failed: number, remarks: readonly string[] = []): void {
  mkdirSync(RESULTS, { recursive: true });
  writeFileSync(`${RESULTS}/${suite}.txt`, [`${passed} ${failed}`, ...remarks, ''].join('\n'));
}
