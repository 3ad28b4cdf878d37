/** The daemon under attack: a process of its own with several disks, what it holds, and what it says of itself. */
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Child, waitUntil } from '../guest/child.js';
import { Finding } from './finding.js';

const PROGRAM = fileURLToPath(new URL('../../dist/src/target/strata.js', import.meta.url));
const START_MS = 60_000;
const STOP_MS = 20_000;
export const DISK_BYTES = 8 * 2 ** 20;
const LOG_LINES = 12;

export interface Target {
  readonly name: string;
  readonly socketPath: string;
  readonly isReadOnly: boolean;
}

/** Disks that are attacked, one of them in a process of its own, and their neighbours: one on the same reactor, one on another. */
const ATTACKED = ['memory', 'file', 'slow', 'sealed', 'alone'] as const;
const WITNESSES = ['near', 'far'] as const;

const config = `
reactors: [{name: attacked}, {name: other}]
bdevs:
  - {name: memory, module: malloc, size: 8MiB}
  - {name: file, module: uring, path: file.img, create: 8MiB, direct: false}
  - {name: slow-base, module: malloc, size: 8MiB}
  - {name: slow, module: delay, base: slow-base, read_us: 20, write_us: 20, flush_us: 20, discard_us: 20, jitter_us: 100}
  - {name: sealed, module: malloc, size: 8MiB}
  - {name: alone, module: uring, path: alone.img, create: 8MiB, direct: false}
  - {name: near, module: uring, path: near.img, create: 8MiB, direct: false}
  - {name: far, module: malloc, size: 8MiB}
controllers:
${[...ATTACKED, ...WITNESSES]
  .map((name) => {
    const reactor = name === 'far' ? 'other' : 'attacked';
    const flags = `read_only: ${name === 'sealed'}, isolate: ${name === 'alone'}`;
    return `  - {name: ${name}, bdev: ${name}, socket: ${name}.sock, queues: 8, reactor: ${reactor}, ${flags}}`;
  })
  .join('\n')}
metrics: {listen: "127.0.0.1:0"}
log: {level: warn, format: json}
`;

/** What the daemon and the process of the isolated disk hold. */
export interface Footprint {
  readonly fds: number;
  /** Without the kernel's own workers, which come and go. */
  readonly threads: number;
  /** Mappings of memory that front-ends gave. */
  readonly sharedMappings: number;
  readonly mappings: number;
  readonly rssBytes: number;
}

export class Daemon {
  readonly attacked: readonly Target[];
  readonly witnesses: readonly Target[];
  readonly #child: Child;
  #url = '';
  #isolatedPid = -1;

  private constructor(child: Child, folder: string) {
    this.#child = child;
    const target = (name: string): Target => ({
      name,
      socketPath: join(folder, `${name}.sock`),
      isReadOnly: name === 'sealed',
    });
    this.attacked = ATTACKED.map(target);
    this.witnesses = WITNESSES.map(target);
  }

  static async start(folder: string): Promise<Daemon> {
    const path = join(folder, 'strata.yaml');
    writeFileSync(path, config);
    const child = new Child(process.execPath, [PROGRAM, 'serve', '--config', path, '-o', 'json'], true);
    const daemon = new Daemon(child, folder);
    await waitUntil(() => child.stdout.endsWith('\n}\n') || !child.running, START_MS);
    if (!child.running) throw new Error(`the daemon did not come up:\n${child.stderr}`);
    daemon.#isolatedPid = childrenOf(child.pid)[0]!;
    daemon.#url = (JSON.parse(child.stdout) as { http: string }).http;
    return daemon;
  }

  get pid(): number {
    return this.#child.pid;
  }

  get isolatedPid(): number {
    return this.#isolatedPid;
  }

  get isRunning(): boolean {
    return this.#child.running;
  }

  /** The daemon runs, and so does the process of the isolated disk that it started first. */
  get isWhole(): boolean {
    return this.isRunning && childrenOf(this.pid).includes(this.#isolatedPid);
  }

  /** The newest lines of its log. */
  get log(): string {
    return this.#child.stderr.split('\n').slice(-LOG_LINES).join('\n');
  }

  footprint(): Footprint {
    const all = [this.pid, this.#isolatedPid].map(footprintOf);
    const sum = (of: (one: Footprint) => number): number => all.reduce((n, one) => n + of(one), 0);
    return {
      fds: sum(({ fds }) => fds),
      threads: sum(({ threads }) => threads),
      sharedMappings: sum(({ sharedMappings }) => sharedMappings),
      mappings: sum(({ mappings }) => mappings),
      rssBytes: sum(({ rssBytes }) => rssBytes),
    };
  }

  /** Counters and gauges by series, as `strata_controller_sessions_total{controller="file"}`. */
  async metrics(): Promise<ReadonlyMap<string, number>> {
    const response = await fetch(`${this.#url}/metrics`, { headers: { connection: 'close' } });
    const samples = new Map<string, number>();
    for (const line of (await response.text()).split('\n')) {
      const end = line.lastIndexOf(' ');
      if (line !== '' && !line.startsWith('#')) samples.set(line.slice(0, end), Number(line.slice(end + 1)));
    }
    return samples;
  }

  /** What it says of its disks now, for people; what kept it from saying it. */
  async state(): Promise<string> {
    try {
      const response = await fetch(`${this.#url}/healthz`, { signal: AbortSignal.timeout(5_000) });
      const live = [...(await this.metrics())].filter(([name]) => /_(now|running|connected)\{/.test(name));
      return `${await response.text()}${live.map(([name, value]) => `${name} ${value}`).join('\n')}`;
    } catch (error) {
      return `no state: ${String(error)}`;
    }
  }

  async stop(): Promise<void> {
    const { code, signal } = await this.#child.stop(STOP_MS);
    if (code !== 0)
      throw new Finding('crash', `the daemon ended with ${code ?? signal} instead of draining\n${this.log}`);
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.#child.exited;
  }
}

/** Processes that a process has started and that have not ended. */
function childrenOf(pid: number): number[] {
  return readdirSync(`/proc/${pid}/task`).flatMap((task) => {
    const list = readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').trim().split(' ').map(Number);
    return list.filter((child) => child > 0 && isAlive(child));
  });
}

function isAlive(pid: number): boolean {
  try {
    // A zombie has ended.
    return !readFileSync(`/proc/${pid}/stat`, 'utf8').includes(') Z ');
  } catch {
    return false;
  }
}

function footprintOf(pid: number): Footprint {
  const maps = readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n');
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const threads = readdirSync(`/proc/${pid}/task`).filter((task) => {
    try {
      return !readFileSync(`/proc/${pid}/task/${task}/comm`, 'utf8').startsWith('iou-');
    } catch {
      return false;
    }
  });
  return {
    fds: readdirSync(`/proc/${pid}/fd`).length,
    threads: threads.length,
    sharedMappings: maps.filter((line) => /memfd:(fuzz|guest)|\/plain|\/dev\/zero/.test(line)).length,
    mappings: maps.length,
    rssBytes: Number(/^VmRSS:\s+(\d+)/m.exec(status)![1]) * 1024,
  };
}
