/** The results as people read them: tables in Markdown. */
import { BARS, TARGET_TITLES } from './scenario.js';
import type { Bar, PointResult, Sample, Series, TargetName } from './scenario.js';
import { median, pairedRatio } from './statistics.js';
import type { Spread } from './statistics.js';

/** What a reader needs to judge a run, and to repeat it. */
export interface RunFacts {
  readonly startedAt: string;
  readonly command: string;
  readonly rounds: number;
  readonly secondsPerSample: number;
  readonly machine: string;
  readonly versions: Readonly<Record<string, string>>;
}

/** A report in Markdown: the facts, the bars, a table per disk. */
export function renderReport(facts: RunFacts, results: readonly PointResult[]): string {
  const versions = Object.entries(facts.versions).map(([name, version]) => `${name} ${version}`);
  const backings = [...new Set(results.map(({ point }) => point.backing))];
  return [
    `# Benchmark of ${facts.startedAt}`,
    '',
    `- \`${facts.command}\``,
    `- ${facts.machine}; ${versions.join(', ')}`,
    `- medians of ${facts.rounds} interleaved rounds of ${facts.secondsPerSample} s; ratios: median (min..max) of the rounds`,
    '',
    ...renderBars(results),
    ...backings.flatMap((backing) => [
      `## ${backing}`,
      '',
      ...renderTable(results.filter(({ point }) => point.backing === backing)),
      '',
    ]),
  ].join('\n');
}

const COLUMNS = [
  'workload',
  'depth',
  'target',
  'IOPS',
  'p50 us',
  'p99 us',
  'CPU us/req',
  'syscalls/req',
  'vs qsd',
  'vs fio',
];

function renderTable(results: readonly PointResult[]): string[] {
  const rows = results.flatMap(({ point, series }) =>
    series.map((own) => [
      point.workload,
      String(point.depth),
      TARGET_TITLES[own.target],
      formatCount(medianOf(own, 'iops')),
      formatSmall(medianOf(own, 'p50Us')),
      formatSmall(medianOf(own, 'p99Us')),
      formatSmall(medianOf(own, 'cpuUsPerRequest')),
      formatSmall(own.syscallsPerRequest),
      ...(['qsd', 'fio'] as const).map((other) => ratioCell(own, series, other)),
    ]),
  );
  return markdownTable(COLUMNS, rows);
}

function ratioCell(own: Series, series: readonly Series[], other: TargetName): string {
  const ratio = own.target === 'strata' ? ratioOf(series, other, 'iops') : undefined;
  return ratio === undefined ? '' : formatSpread(ratio);
}

/** How far each bar is reached, as far as the run covers it. Empty when it covers none. */
function renderBars(results: readonly PointResult[]): string[] {
  const rows = BARS.flatMap((bar) => barRows(bar, results));
  if (rows.length === 0) return [];
  return ['## Bars', '', ...markdownTable(['disk', 'workload', 'depth', 'bar', 'ratio', ''], rows), ''];
}

function barRows(bar: Bar, results: readonly PointResult[]): string[][] {
  const covered = results.filter(
    ({ point }) =>
      point.backing === bar.backing && bar.workloads.includes(point.workload) && bar.depths.includes(point.depth),
  );
  return covered.flatMap(({ point, series }) => {
    const ratio = ratioOf(series, bar.against, bar.what);
    if (ratio === undefined) return [];
    const reached = bar.what === 'iops' ? ratio.median >= bar.ratio : ratio.median <= bar.ratio;
    const what = bar.what === 'iops' ? 'IOPS at least' : 'CPU per request at most';
    const goal = `${what} ${bar.ratio} x ${TARGET_TITLES[bar.against]}`;
    return [
      [point.backing, point.workload, String(point.depth), goal, formatSpread(ratio), reached ? 'reached' : 'MISSED'],
    ];
  });
}

/** Strata's figure to the other's, round by round; undefined when either was not measured. */
export function ratioOf(
  series: readonly Series[],
  other: TargetName,
  what: 'iops' | 'cpuUsPerRequest',
): Spread | undefined {
  const ours = series.find(({ target }) => target === 'strata');
  const theirs = series.find(({ target }) => target === other);
  if (ours === undefined || theirs === undefined) return undefined;
  return pairedRatio(
    ours.samples.map((sample) => sample[what]),
    theirs.samples.map((sample) => sample[what]),
  );
}

export function medianOf(series: Series, what: keyof Sample): number {
  return median(series.samples.map((sample) => sample[what]));
}

/** A table in Markdown, its columns padded so that it reads well as plain text too. */
export function markdownTable(columns: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const widths = columns.map((title, i) => Math.max(3, title.length, ...rows.map((row) => row[i]!.length)));
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell, i) => cell.padEnd(widths[i]!)).join(' | ')} |`;
  return [line(columns), line(widths.map((width) => '-'.repeat(width))), ...rows.map(line)];
}

/** As `1,234,567`. */
export function formatCount(value: number): string {
  return Math.round(value).toLocaleString('en-US');
}

/** Three significant digits. */
export function formatSmall(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(value >= 0.1 ? 2 : 4);
}

function formatSpread(ratio: Spread): string {
  return `${ratio.median.toFixed(2)} (${ratio.min.toFixed(2)}..${ratio.max.toFixed(2)})`;
}
