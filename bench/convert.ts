/**
 * `strata img convert` beside `qemu-img convert`: the same source, one after the other in each round, in turns first. The sources are a
 * quarter text, a quarter noise and half holes, and in the page cache. A sample is what a user waits for, with the start of the program.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { closeSync, ftruncateSync, openSync, rmSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { BenchOptions } from './options.js';
import { markdownTable } from './report.js';
import { median, pairedRatio } from './statistics.js';

const PROGRAM = fileURLToPath(new URL('../dist/src/target/strata.js', import.meta.url));
const PIECE_BYTES = 2 ** 20;

interface Sample {
  readonly seconds: number;
  readonly fileBytes: number;
}

export const CONVERT_CASES = ['raw-raw', 'raw-qcow2', 'qcow2-raw', 'qcow2-qcow2', 'zstd', 'zlib'] as const;
export type ConvertCase = (typeof CONVERT_CASES)[number];

const CASES: readonly (readonly [ConvertCase, 'raw' | 'qcow2', readonly string[]])[] = [
  ['raw-raw', 'raw', ['-O', 'raw']],
  ['raw-qcow2', 'raw', ['-O', 'qcow2']],
  ['qcow2-raw', 'qcow2', ['-O', 'raw']],
  ['qcow2-qcow2', 'qcow2', ['-O', 'qcow2']],
  ['zstd', 'raw', ['-c', '-O', 'qcow2', '-o', 'compression_type=zstd']],
  ['zlib', 'raw', ['-c', '-O', 'qcow2']],
];

export function measureConvert(directory: string, options: BenchOptions): string {
  const sources = { raw: join(directory, 'source.raw'), qcow2: join(directory, 'source.qcow2') };
  makeSource(sources.raw, options.fileSize);
  execFileSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', sources.raw, sources.qcow2]);
  const output = join(directory, 'output');
  const programs = [[process.execPath, PROGRAM, 'img'], ['qemu-img']] as const;
  const { convert } = options;
  const wanted = CASES.filter(([name]) => convert === true || convert?.includes(name) === true);
  const rows = wanted.map(([name, format, args]) => {
    const samples: Sample[][] = programs.map(() => []);
    for (let round = 0; round < options.rounds; round++) {
      for (let turn = 0; turn < programs.length; turn++) {
        const who = (round + turn) % programs.length;
        const words = ['convert', '-f', format, ...args, sources[format], output];
        samples[who]!.push(take([...programs[who]!, ...words], output));
      }
    }
    const [ours, theirs] = samples.map((own) => own.map(({ seconds }) => seconds)) as [number[], number[]];
    const { median: ratio, min, max } = pairedRatio(theirs, ours);
    const [ourBytes, theirBytes] = samples.map((own) => own[0]!.fileBytes / 2 ** 20) as [number, number];
    console.error(`${name}: ${median(ours).toFixed(2)} s, qemu-img ${median(theirs).toFixed(2)} s`);
    return [
      name,
      `${median(ours).toFixed(2)} s, ${ourBytes.toFixed(0)} MiB`,
      `${median(theirs).toFixed(2)} s, ${theirBytes.toFixed(0)} MiB`,
      `${ratio.toFixed(2)} (${min.toFixed(2)}..${max.toFixed(2)})`,
    ];
  });
  return ['## convert', '', ...markdownTable(['case', 'Strata', 'qemu-img', 'times as fast'], rows), ''].join('\n');
}

function take(command: readonly string[], output: string): Sample {
  rmSync(output, { force: true });
  const start = performance.now();
  const { status, stderr } = spawnSync(command[0]!, command.slice(1), { encoding: 'utf8' });
  const seconds = (performance.now() - start) / 1000;
  if (status !== 0) throw new Error(`${command.join(' ')}: ${stderr}`);
  return { seconds, fileBytes: statSync(output).blocks * 512 };
}

function makeSource(path: string, sizeBytes: number): void {
  const fd = openSync(path, 'w');
  const bytes = Buffer.alloc(PIECE_BYTES);
  ftruncateSync(fd, sizeBytes);
  for (let at = 0, piece = 0; at + PIECE_BYTES <= sizeBytes; at += PIECE_BYTES, piece++) {
    if (piece % 4 === 1) randomFillSync(bytes);
    // Numbers in words: two thirds of it can be saved.
    else if (piece % 4 === 0) for (let i = 0; i < PIECE_BYTES; i += 16) bytes.write(`${Math.random()}\n`.slice(-16), i);
    else continue;
    writeSync(fd, bytes, 0, PIECE_BYTES, at);
  }
  closeSync(fd);
}
