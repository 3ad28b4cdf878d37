/**
 * Goal: /metrics counts what happened, under names that Prometheus' own rules have nothing against.
 *
 * Method: a daemon serves known requests of a real front-end; its page is taken apart line by line, held against the rules of
 * the exposition format, given to promtool, and scraped by a Prometheus.
 */
import { spawn, spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { Program, STRATA, newFolder, writeConfig } from './programs.js';

const CONFIG = `
reactors: [{name: left}, {name: right}]
bdevs:
  - {name: file, module: uring, path: disk.img, create: 1MiB, direct: false}
  - {name: top, module: passthru, base: file}
  - {name: other, module: null, size: 1MiB}
controllers:
  - {name: vm, bdev: top, socket: vm.sock}
  - {name: idle, bdev: other, socket: idle.sock}
metrics: {listen: "127.0.0.1:0"}
`;

/** Of an answer of Prometheus. */
interface Series {
  readonly metric: Readonly<Record<string, string>>;
  readonly value: readonly [number, string];
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Asks again until there is something. */
async function until<T>(look: () => Promise<T | undefined>): Promise<T> {
  for (;;) {
    const found = await look();
    if (found !== undefined) return found;
    await setTimeout(50);
  }
}

/** A page after 3 reads, 2 writes, 1 flush, 1 discard, 1 writeZeroes and 1 request beyond the end. */
async function scrape(): Promise<string> {
  const folder = newFolder();
  const program = await Program.serving(STRATA, ['serve', '-c', writeConfig(folder, CONFIG)], folder);
  const frontend = await Frontend.connect(join(folder, 'vm.sock'));
  const { queue } = frontend;
  for (let i = 0; i < 3; i++) await queue.read(i, 512);
  for (let i = 0; i < 2; i++) await queue.write(i, Buffer.alloc(4096));
  await queue.flush();
  await queue.discard({ sector: 0, sectors: 8 });
  await queue.writeZeroes({ sector: 0, sectors: 16 });
  expect((await queue.read(4096, 512)).status).toBe(1);
  const response = await fetch(`${await program.url()}/metrics`);
  expect(response.headers.get('content-type')).toMatch(/^text\/plain; version=0\.0\.4/);
  const text = await response.text();
  frontend.close();
  expect((await program.stop()).exitCode).toBe(0);
  return text;
}

interface Sample {
  readonly series: string;
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

interface Family {
  readonly name: string;
  readonly help: string;
  readonly type: string;
  readonly samples: Sample[];
}

/** The page as families of samples. Throws when a line is not of the format or stands in the wrong place. */
function parse(text: string): Family[] {
  const families: Family[] = [];
  let help = ['', ''];
  for (const line of text.split('\n')) {
    const comment = /^# (HELP|TYPE) ([a-zA-Z_:][\w:]*) (.+)$/.exec(line);
    if (comment?.[1] === 'HELP') help = [comment[2]!, comment[3]!];
    else if (comment !== null) {
      if (help[0] !== comment[2]) throw new Error(`TYPE without HELP: ${line}`);
      families.push({ name: comment[2]!, help: help[1]!, type: comment[3]!, samples: [] });
    } else if (line !== '') families.at(-1)!.samples.push(parseSample(line, families.at(-1)!));
  }
  return families;
}

function parseSample(line: string, family: Family): Sample {
  const match = /^([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)$/.exec(line);
  if (match === null) throw new Error(`no sample: ${line}`);
  const [, name = '', labelText = '', value = ''] = match;
  const suffix = family.type === 'histogram' ? '(_bucket|_sum|_count)' : '';
  if (!new RegExp(`^${family.name}${suffix}$`).test(name)) throw new Error(`${line} stands below ${family.name}`);
  const labels = Object.fromEntries([...labelText.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, k, v]) => [k!, v!]));
  return {
    series: line.slice(0, line.lastIndexOf(' ')),
    name,
    labels,
    value: Number(value.replace('Inf', 'Infinity')),
  };
}

describe('the metrics page', () => {
  it('counts requests, bytes, errors and sessions', async () => {
    const families = parse(await scrape());
    const samples = new Map(families.flatMap((family) => family.samples.map(({ series, value }) => [series, value])));
    for (const bdev of ['top', 'file']) {
      const of = (name: string): number | undefined => samples.get(`strata_bdev_${name}{bdev="${bdev}"}`);
      expect(of('reads_completed_total')).toBe(3);
      expect(of('read_bytes_total')).toBe(1536);
      expect(of('read_time_seconds_total')).toBeGreaterThan(0);
      expect(of('writes_completed_total')).toBe(2);
      expect(of('written_bytes_total')).toBe(8192);
      expect(of('flush_requests_total')).toBe(1);
      expect(of('discards_completed_total')).toBe(1);
      expect(of('discarded_bytes_total')).toBe(4096);
      expect(of('write_zeroes_completed_total')).toBe(1);
      expect(of('write_zeroes_bytes_total')).toBe(8192);
      expect(of('io_now')).toBe(0);
      expect(of('size_bytes')).toBe(2 ** 20);
      expect(samples.get(`strata_bdev_io_latency_seconds_count{bdev="${bdev}",op="read"}`)).toBe(3);
    }
    const controller = (name: string): number | undefined => samples.get(`strata_controller_${name}{controller="vm"}`);
    expect(controller('connected')).toBe(1);
    expect(controller('queues_running')).toBe(1);
    expect(controller('requests_total')).toBe(9);
    expect(controller('request_errors_total')).toBe(1);
    expect(controller('sessions_total')).toBe(1);
    expect(controller('guest_memory_bytes')).toBeGreaterThan(0);
    expect(samples.get('strata_controller_connected{controller="idle"}')).toBe(0);
    for (const reactor of ['left', 'right']) {
      expect(samples.get(`strata_reactor_up{reactor="${reactor}"}`)).toBe(1);
      expect(samples.get(`strata_reactor_steps_total{reactor="${reactor}"}`)).toBeGreaterThan(0);
    }
    const build = families.find(({ name }) => name === 'strata_build_info')!.samples[0]!;
    expect(build).toMatchObject({ value: 1, labels: { node: process.versions.node } });
    expect(samples.get('process_open_fds')).toBeGreaterThan(5);
  });

  it('keeps to the rules for names, types and histograms', async () => {
    const families = parse(await scrape());
    const names = families.map(({ name }) => name);
    expect(new Set(names).size).toBe(names.length);
    for (const { name, type, help, samples } of families) {
      expect(help.length, name).toBeGreaterThan(5);
      expect(name.endsWith('_total'), `${name} is a ${type}`).toBe(type === 'counter');
      expect(name, 'a name tells the unit in full, and not the type').not.toMatch(
        /_(ms|us|ns|sec|s|milliseconds|microseconds|kb|mb|kib|mib|counter|gauge|histogram|count|sum|bucket)(_total)?$/,
      );
      const series = samples.map((sample) => sample.series);
      expect(new Set(series).size, name).toBe(series.length);
      for (const { value } of samples) expect(Number.isNaN(value), name).toBe(false);
      if (type === 'counter') for (const { value } of samples) expect(value, name).toBeGreaterThanOrEqual(0);
    }
    const latency = families.find(({ name }) => name === 'strata_bdev_io_latency_seconds')!;
    expect(latency.type).toBe('histogram');
    const isRead = ({ labels }: Sample): boolean => labels['bdev'] === 'top' && labels['op'] === 'read';
    const buckets = latency.samples.filter((sample) => isRead(sample) && sample.name.endsWith('_bucket'));
    const bounds = buckets.map(({ labels }) => Number(labels['le']!.replace('+Inf', 'Infinity')));
    expect(bounds).toEqual([...bounds].sort((a, b) => a - b));
    expect(bounds.at(0)).toBe(1e-6);
    expect(bounds.at(-1)).toBe(Infinity);
    const counts = buckets.map(({ value }) => value);
    expect(counts).toEqual([...counts].sort((a, b) => a - b));
    expect(counts.at(-1)).toBe(3);
  });

  it('passes `promtool check metrics`', async () => {
    const checked = spawnSync('promtool', ['check', 'metrics'], { input: await scrape(), encoding: 'utf8' });
    expect(checked.stdout + checked.stderr).toBe('');
    expect(checked.status, `promtool: ${checked.error?.message ?? ''} (apt-get install prometheus)`).toBe(0);
  });

  it('is scraped by Prometheus', { timeout: 60_000 }, async () => {
    const folder = newFolder();
    const program = await Program.serving(STRATA, ['serve', '-c', writeConfig(folder, CONFIG)], folder);
    const target = new URL(await program.url()).host;
    const config = `scrape_configs: [{job_name: strata, scrape_interval: 100ms, static_configs: [{targets: ["${target}"]}]}]`;
    writeFileSync(join(folder, 'prometheus.yml'), config);
    const address = `127.0.0.1:${await freePort()}`;
    const args = ['--config.file=prometheus.yml', '--storage.tsdb.path=tsdb', `--web.listen-address=${address}`];
    const prometheus = spawn('prometheus', args, { cwd: folder, stdio: 'ignore' });
    const ended = new Promise((resolve) => prometheus.on('close', resolve).on('error', resolve));
    const ask = async (query: string): Promise<readonly Series[]> => {
      const response = await fetch(`http://${address}/api/v1/query?query=${query}`);
      return ((await response.json()) as { data: { result: Series[] } }).data.result;
    };
    try {
      // It is not there at once, and has scraped nothing when it is.
      const series = await Promise.race([
        ended.then(() => Promise.reject(new Error('prometheus ended: apt-get install prometheus'))),
        until(async () => {
          const found = await ask('strata_bdev_io_now').catch(() => []);
          return found.length === 0 ? undefined : found;
        }),
      ]);
      expect(series.map(({ metric }) => metric['bdev']).sort()).toEqual(['file', 'other', 'top']);
      expect((await ask('up')).map(({ value }) => value[1])).toEqual(['1']);
    } finally {
      prometheus.kill();
      await ended;
    }
    expect((await program.stop()).exitCode).toBe(0);
  });
});
