/** The results as a picture: for each disk, workload and depth one group of bars, scaled to the group's tallest. */
import { formatCount, medianOf } from './report.js';
import { TARGETS, TARGET_TITLES } from './scenario.js';
import type { PointResult, TargetName } from './scenario.js';

const COLOURS: Readonly<Record<TargetName, string>> = { strata: '#2a6f97', qsd: '#e07a5f', fio: '#9aa5b1' };
const BAR_PX = 14;
const GROUP_GAP_PX = 14;
const LABEL_PX = 150;
const PLOT_PX = 520;
const VALUE_PX = 110;
const TOP_PX = 58;

/** An SVG document. Bars are median IOPS; groups have scales of their own, as disks differ by orders of magnitude. */
export function renderChart(title: string, results: readonly PointResult[]): string {
  const parts: string[] = [];
  let y = TOP_PX;
  for (const { point, series } of results) {
    const tallest = Math.max(...series.map((own) => medianOf(own, 'iops')));
    const middle = y + (series.length * BAR_PX) / 2 + 4;
    parts.push(text(LABEL_PX - 10, middle, `${point.backing} ${point.workload}, depth ${point.depth}`, 'end'));
    for (const own of series) {
      const iops = medianOf(own, 'iops');
      const width = (PLOT_PX * iops) / tallest;
      parts.push(rectangle(LABEL_PX, y, width, BAR_PX - 2, COLOURS[own.target]));
      parts.push(text(LABEL_PX + width + 6, y + BAR_PX - 4, formatCount(iops), 'start'));
      y += BAR_PX;
    }
    y += GROUP_GAP_PX;
  }
  const width = LABEL_PX + PLOT_PX + VALUE_PX;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y}" font-family="sans-serif" font-size="11">`,
    rectangle(0, 0, width, y, '#ffffff'),
    text(10, 20, title, 'start'),
    ...legend(),
    ...parts,
    '</svg>',
    '',
  ].join('\n');
}

function legend(): string[] {
  return TARGETS.flatMap((target, i) => {
    const x = LABEL_PX + i * 160;
    return [rectangle(x, 32, 12, 12, COLOURS[target]), text(x + 18, 42, TARGET_TITLES[target], 'start')];
  });
}

function rectangle(x: number, y: number, width: number, height: number, fill: string): string {
  return `<rect x="${x}" y="${y}" width="${width.toFixed(1)}" height="${height}" fill="${fill}"/>`;
}

function text(x: number, y: number, content: string, anchor: 'start' | 'end'): string {
  const escaped = content.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}">${escaped}</text>`;
}
