/**
 * The benchmark: Strata and qemu-storage-daemon side by side, on the same file, under the same client, in one run; and fio
 * straight on the file. docs/performance.md explains how to read what comes of it.
 *
 * Whatever it starts ends with it: the children are killed by the kernel when this process is gone, however it went.
 */
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { cpus, release, tmpdir } from 'node:os';
import { join } from 'node:path';
import { check, native } from '../native/index.js';
import { renderChart } from './chart.js';
import { measureIdle, renderIdle } from './idle.js';
import type { IdleResult } from './idle.js';
import { measureInflight, renderInflight } from './inflight.js';
import type { InflightResult } from './inflight.js';
import { measureCheck } from './check.js';
import { measureConvert } from './convert.js';
import { measureQcow2 } from './qcow2.js';
import { diskSpec, measureDisk, withDaemons } from './matrix.js';
import { parseOptions } from './options.js';
import type { BenchOptions } from './options.js';
import { requireProgram, requireSyscallCounter } from './process-cost.js';
import { renderReport } from './report.js';
import { measureRestart, renderRestart } from './restart.js';
import type { RunFacts } from './report.js';
import type { PointResult } from './scenario.js';
import { requireStrata } from './targets.js';

const IDLE_QUIET_MS = 10_000;
const IDLE_SAMPLES = 200;
const IDLE_GAP_MS = 20;
const INTERRUPTED = 130;

function versions(options: BenchOptions): Record<string, string> {
  const strata = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as { version: string };
  const firstLine = (command: string): string =>
    execFileSync(command, ['--version'], { encoding: 'utf8' }).split('\n')[0]!;
  return {
    strata: strata.version,
    node: process.versions.node,
    qsd: firstLine('qemu-storage-daemon').replace(/^.*version /, ''),
    ...(options.fio ? { fio: firstLine('fio').replace(/^fio-/, '') } : {}),
  };
}

async function requirePrograms(options: BenchOptions): Promise<void> {
  requireStrata();
  if (options.convert !== undefined || options.check) {
    requireProgram('qemu-img', 'qemu-utils');
    return;
  }
  requireProgram('qemu-storage-daemon', 'qemu-system-common');
  if (options.fio) requireProgram('fio', 'fio');
  requireProgram('taskset', 'util-linux');
  if (!options.idle) await requireSyscallCounter();
}

async function runMatrix(directory: string, options: BenchOptions): Promise<void> {
  const startedAt = new Date().toISOString();
  const results: PointResult[] = [];
  for (const backing of options.only) results.push(...(await measureDisk(backing, directory, options)));
  const cores = cpus();
  const facts: RunFacts = {
    startedAt,
    command: ['npm run bench --', ...process.argv.slice(2)].join(' '),
    rounds: options.rounds,
    secondsPerSample: options.seconds,
    machine: `${cores.length} x ${cores[0]?.model.trim()}, Linux ${release()}`,
    versions: versions(options),
  };
  const report = renderReport(facts, results);
  const title = `Strata, ${startedAt}: IOPS, median of ${options.rounds} rounds`;
  const base = join(options.out, startedAt.replaceAll(':', '').replace(/\..*/, ''));
  mkdirSync(options.out, { recursive: true });
  writeFileSync(`${base}.md`, report);
  writeFileSync(`${base}.json`, `${JSON.stringify({ facts, results }, null, 2)}\n`);
  writeFileSync(`${base}.svg`, renderChart(title, results));
  console.log(report);
  console.log(`Written to ${base}.md, .json and .svg`);
}

async function runIdle(directory: string, options: BenchOptions): Promise<void> {
  for (const backing of options.only) {
    await withDaemons(diskSpec(backing, options), directory, options, async (targets) => {
      const results: IdleResult[] = [];
      for (const target of targets) {
        results.push(await measureIdle(target, IDLE_QUIET_MS, IDLE_SAMPLES, IDLE_GAP_MS));
      }
      console.log(`${backing}\n\n${renderIdle(results)}\n`);
    });
  }
}

async function runInflight(directory: string, options: BenchOptions): Promise<void> {
  const results: InflightResult[] = [];
  // Two daemons cannot serve one file.
  for (const backing of options.only.filter((name) => name !== 'raw')) {
    results.push(...(await measureInflight(backing, directory, options)));
  }
  console.log(renderInflight(results));
}

async function runRestart(directory: string, options: BenchOptions): Promise<void> {
  console.log(renderRestart(await measureRestart(directory, options.rounds)));
}

async function runQcow2(directory: string, options: BenchOptions): Promise<void> {
  console.log(await measureQcow2(options.qcow2 ?? [], directory, options));
}

async function runConvert(directory: string, options: BenchOptions): Promise<void> {
  console.log(measureConvert(directory, options));
}

async function runCheck(directory: string, options: BenchOptions): Promise<void> {
  console.log(await measureCheck(directory, options));
}

/** What is asked for. */
function measurementOf(options: BenchOptions): (directory: string, options: BenchOptions) => Promise<void> {
  if (options.qcow2 !== undefined) return runQcow2;
  if (options.convert !== undefined) return runConvert;
  if (options.check) return runCheck;
  if (options.restart) return runRestart;
  if (options.idle) return runIdle;
  return options.inflight ? runInflight : runMatrix;
}

async function main(): Promise<void> {
  const options = parseOptions();
  const directory = mkdtempSync(join(tmpdir(), 'strata-bench-'));
  process.on('exit', () => rmSync(directory, { recursive: true, force: true }));
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => process.exit(INTERRUPTED));
  await requirePrograms(options);
  // A guest that waits leaves its core to the daemon; a conversion takes all there are.
  if (!options.restart && !options.check && options.convert === undefined)
    check(native.threadSetAffinity(options.clientCore), `run on core ${options.clientCore}`);
  await measurementOf(options)(directory, options);
}

main().catch((error: unknown) => {
  console.error(`bench: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
});
