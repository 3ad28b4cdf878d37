/** `strata img check` beside `qemu-img check`: a thin disk of 1 TiB, 100 GiB of it mapped to storage that was never written. */
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { BenchOptions } from './options.js';
import { markdownTable } from './report.js';
import { median, pairedRatio } from './statistics.js';

const PROGRAM = fileURLToPath(new URL('../dist/src/target/strata.js', import.meta.url));
const LOOK_MS = 5;

interface Sample {
  readonly seconds: number;
  /** The most memory it had. */
  readonly bytes: number;
}

export async function measureCheck(directory: string, options: BenchOptions): Promise<string> {
  const image = join(directory, 'large.qcow2');
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, '100G']);
  execFileSync('qemu-img', ['resize', '-q', '-f', 'qcow2', image, '1T']);
  const programs = [[process.execPath, PROGRAM, 'img'], ['qemu-img']] as const;
  const samples: Sample[][] = programs.map(() => []);
  for (let round = 0; round < options.rounds; round++) {
    for (let turn = 0; turn < programs.length; turn++) {
      const who = (round + turn) % programs.length;
      samples[who]!.push(await take([...programs[who]!, 'check', '-f', 'qcow2', image]));
    }
  }
  const [ours, theirs] = samples.map((own) => own.map(({ seconds }) => seconds)) as [number[], number[]];
  const [ourBytes, theirBytes] = samples.map((own) => Math.max(...own.map(({ bytes }) => bytes)) / 1e6) as [
    number,
    number,
  ];
  const { median: ratio, min, max } = pairedRatio(theirs, ours);
  const row = [
    `${median(ours).toFixed(2)} s, ${ourBytes.toFixed(0)} MB`,
    `${median(theirs).toFixed(2)} s, ${theirBytes.toFixed(0)} MB`,
    `${ratio.toFixed(2)} (${min.toFixed(2)}..${max.toFixed(2)})`,
  ];
  return ['## check', '', ...markdownTable(['Strata', 'qemu-img', 'times as fast'], [row]), ''].join('\n');
}

async function take(command: readonly string[]): Promise<Sample> {
  const start = performance.now();
  const child = spawn(command[0]!, command.slice(1), { stdio: 'ignore' });
  const ended = once(child, 'exit') as Promise<[number | null]>;
  let bytes = 0;
  let isRunning = true;
  void ended.then(() => (isRunning = false));
  while (isRunning) {
    bytes = Math.max(bytes, peakBytes(child.pid!));
    await Promise.race([ended, setTimeout(LOOK_MS)]);
  }
  const seconds = (performance.now() - start) / 1000;
  const [code] = await ended;
  if (code !== 0) throw new Error(`${command.join(' ')} ended with ${code}`);
  return { seconds, bytes };
}

/** The most memory that a process has had so far; 0 when it is gone. */
function peakBytes(pid: number): number {
  try {
    const found = /VmHWM:\s*(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'));
    return Number(found?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}
