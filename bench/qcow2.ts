/**
 * qcow2 images: Strata and qemu-storage-daemon on the same image, or on twins where writing changes it, under the same client.
 *
 *     mapped       all clusters are there: beside them Strata on the same data as a raw file
 *     thin         an empty image: every write takes a cluster. A new image and new daemons for each sample
 *     compressed   zlib clusters: within 32 MiB, which caches hold, and all over the disk
 */
import { execFileSync } from 'node:child_process';
import { existsSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Child } from '../test/guest/child.js';
import type { BenchOptions } from './options.js';
import { rawFile } from './raw-file.js';
import { formatCount, markdownTable } from './report.js';
import type { Sample, Workload } from './scenario.js';
import { median, pairedRatio } from './statistics.js';
import { Target } from './targets.js';

const PROGRAM = fileURLToPath(new URL('../dist/src/target/strata.js', import.meta.url));
const THIN_BYTES = 64 * 2 ** 30;
const COMPRESSED_BYTES = 2 ** 30;
const HOT_BYTES = 32 * 2 ** 20;

export const QCOW2_CASES = ['mapped', 'thin', 'compressed', 'hot'] as const;
export type Qcow2Case = (typeof QCOW2_CASES)[number];

interface Contender {
  readonly name: string;
  readonly start: (round: number) => Promise<Target>;
}

interface Case {
  readonly contenders: readonly Contender[];
  readonly workloads: readonly Workload[];
  readonly depths: readonly number[];
  /** A sample changes the image: each has daemons and images of its own. */
  readonly isFresh: boolean;
}

export async function measureQcow2(
  names: readonly Qcow2Case[],
  directory: string,
  options: BenchOptions,
): Promise<string> {
  const lines: string[] = [];
  for (const name of names) {
    const subject = makeCase(name, directory, options);
    const rows: string[][] = [];
    const running = subject.isFresh ? [] : await startAll(subject.contenders);
    try {
      for (const workload of subject.workloads) {
        for (const depth of subject.depths) {
          const samples = subject.contenders.map((): Sample[] => []);
          for (let round = 0; round < options.rounds; round++) {
            for (let turn = 0; turn < subject.contenders.length; turn++) {
              const who = (round + turn) % subject.contenders.length;
              samples[who]!.push(await take(subject, running, who, { workload, depth, round }, options.seconds));
            }
          }
          console.error(
            `${name} ${workload} depth ${depth}: ${samples.map((own) => formatCount(iops(own))).join(', ')}`,
          );
          rows.push(...rowsOf(subject, workload, depth, samples));
        }
      }
    } finally {
      for (const target of running) await target[Symbol.asyncDispose]();
    }
    const columns = ['workload', 'depth', 'target', 'IOPS', 'p50 us', 'p99 us', 'CPU us/req', 'Strata to it'];
    lines.push(`## qcow2, ${name}`, '', ...markdownTable(columns, rows), '');
  }
  return lines.join('\n');
}

async function startAll(contenders: readonly Contender[]): Promise<Target[]> {
  const running: Target[] = [];
  for (const { start } of contenders) running.push(await start(0));
  return running;
}

interface Point {
  readonly workload: Workload;
  readonly depth: number;
  readonly round: number;
}

async function take(
  subject: Case,
  running: readonly Target[],
  who: number,
  point: Point,
  seconds: number,
): Promise<Sample> {
  const { workload, depth, round } = point;
  if (!subject.isFresh) return running[who]!.sample(workload, depth, seconds, round + 1);
  const target = await subject.contenders[who]!.start(round);
  try {
    return target.sample(workload, depth, seconds, round + 1);
  } finally {
    await target[Symbol.asyncDispose]();
  }
}

function rowsOf({ contenders }: Case, workload: Workload, depth: number, samples: readonly Sample[][]): string[][] {
  return contenders.map(({ name }, i) => {
    const own = samples[i]!;
    const ratio =
      i === 0
        ? ''
        : (({ median: middle, min, max }) => `${middle.toFixed(2)} (${min.toFixed(2)}..${max.toFixed(2)})`)(
            pairedRatio(
              samples[0]!.map((sample) => sample.iops),
              own.map((sample) => sample.iops),
            ),
          );
    const figure = (what: keyof Sample): string => median(own.map((sample) => sample[what])).toFixed(1);
    return [
      workload,
      String(depth),
      name,
      formatCount(iops(own)),
      figure('p50Us'),
      figure('p99Us'),
      figure('cpuUsPerRequest'),
      ratio,
    ];
  });
}

function iops(samples: readonly Sample[]): number {
  return median(samples.map((sample) => sample.iops));
}

function makeCase(name: Qcow2Case, directory: string, options: BenchOptions): Case {
  const raw = rawFile(options.dir, options.fileSize);
  switch (name) {
    case 'mapped': {
      const image = convert(raw, join(options.dir, `mapped-${options.fileSize}.qcow2`), []);
      const sizeBytes = options.fileSize;
      return {
        contenders: [
          { name: 'strata', start: () => startStrata(image, sizeBytes, directory, options) },
          { name: 'qsd', start: () => startQsd(image, sizeBytes, directory, options) },
          { name: 'strata, raw', start: () => startStrata(raw, sizeBytes, directory, options) },
        ],
        workloads: ['read', 'write'],
        depths: options.depth,
        isFresh: false,
      };
    }
    case 'thin': {
      const thin = (who: string): string => {
        const path = join(options.dir, `thin-${who}.qcow2`);
        rmSync(path, { force: true });
        execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(THIN_BYTES)]);
        return path;
      };
      return {
        contenders: [
          { name: 'strata', start: () => startStrata(thin('strata'), THIN_BYTES, directory, options) },
          { name: 'qsd', start: () => startQsd(thin('qsd'), THIN_BYTES, directory, options) },
        ],
        workloads: ['write'],
        depths: options.depth,
        isFresh: true,
      };
    }
    case 'compressed':
    case 'hot': {
      const image = compressedImage(options.dir);
      const sizeBytes = name === 'hot' ? HOT_BYTES : COMPRESSED_BYTES;
      return {
        contenders: [
          { name: 'strata', start: () => startStrata(image, sizeBytes, directory, options) },
          { name: 'qsd', start: () => startQsd(image, sizeBytes, directory, options) },
        ],
        workloads: ['read'],
        depths: options.depth,
        isFresh: false,
      };
    }
  }
}

function convert(source: string, path: string, words: readonly string[]): string {
  if (existsSync(path)) return path;
  execFileSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', ...words, source, `${path}.part`]);
  renameSync(`${path}.part`, path);
  return path;
}

/** Half of it can be compressed to a third, as text and programs can. */
function compressedImage(directory: string): string {
  const path = join(directory, 'compressed.qcow2');
  if (existsSync(path)) return path;
  const source = join(directory, 'compressible.img');
  const words = Array.from({ length: 4096 }, (_, i) => `${(i * 2654435761) % 65536} `.repeat(1 + (i % 3)));
  const chunk = Buffer.alloc(2 ** 20);
  const all = Buffer.alloc(COMPRESSED_BYTES);
  let state = 1;
  for (let at = 0; at < COMPRESSED_BYTES; at += chunk.length) {
    let text = '';
    while (text.length < chunk.length) {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      text += words[state >>> 20]!;
    }
    chunk.write(text, 'latin1');
    chunk.copy(all, at);
  }
  writeFileSync(source, all);
  convert(source, path, ['-c']);
  rmSync(source);
  return path;
}

async function startStrata(path: string, sizeBytes: number, directory: string, options: BenchOptions): Promise<Target> {
  const isRaw = path.endsWith('.img');
  const socketPath = join(directory, `strata-${isRaw ? 'raw' : 'qcow2'}.sock`);
  rmSync(socketPath, { force: true });
  const file = { name: 'file', module: 'uring', path, lock: false };
  const bdevs = isRaw ? [file] : [file, { name: 'disk', module: 'qcow2', base: 'file' }];
  const controllers = [{ name: 'disk', bdev: bdevs.at(-1)!.name, socket: socketPath, queues: 1 }];
  const config = join(directory, `strata-${isRaw ? 'raw' : 'qcow2'}.json`);
  writeFileSync(config, JSON.stringify({ bdevs, controllers, metrics: { listen: 'off' } }));
  const args = ['-c', String(options.targetCore), process.execPath, PROGRAM, 'serve', '-c', config];
  const disk = { backing: 'raw', sizeBytes, path } as const;
  return Target.start('strata', new Child('taskset', args), socketPath, disk, false);
}

async function startQsd(path: string, sizeBytes: number, directory: string, options: BenchOptions): Promise<Target> {
  const socketPath = join(directory, 'qsd-qcow2.sock');
  rmSync(socketPath, { force: true });
  const l2Cache = 'l2-cache-size=33554432';
  const args = [
    ...['-c', String(options.targetCore), 'qemu-storage-daemon', '--object', 'iothread,id=thread'],
    ...[
      '--blockdev',
      `driver=file,filename=${path},aio=io_uring,cache.direct=on,locking=off,discard=unmap,node-name=file`,
    ],
    ...['--blockdev', `driver=qcow2,file=file,${l2Cache},node-name=disk`],
    '--export',
    `vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=${socketPath},writable=on,num-queues=1,iothread=thread`,
  ];
  return Target.start('qsd', new Child('taskset', args), socketPath, { backing: 'raw', sizeBytes, path }, false);
}
