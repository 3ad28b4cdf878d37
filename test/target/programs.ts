/**
 * Runs the compiled programs as an operator would: in a folder of their own, by plain node, with signals. Whatever a test leaves
 * running is ended after it.
 */
import { spawn, spawnSync } from 'node:child_process';
import type { ChildProcess, StdioOptions } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach } from 'vitest';

const programs = fileURLToPath(new URL('../../dist/src/target/', import.meta.url));
export const STRATA = join(programs, 'strata.js');
export const ONE_DISK = join(programs, 'strata-vhost-user-blk.js');

if (!existsSync(STRATA)) throw new Error(`${STRATA} is missing: run \`npm run build\``);

const WAIT_MS = 15_000;

const running = new Set<Program>();
const folders: string[] = [];

afterEach(async () => {
  for (const program of running) await program.kill();
  running.clear();
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true, force: true });
});

/** A new empty folder, gone after the test. */
export function newFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'strata-'));
  folders.push(folder);
  return folder;
}

/** Writes a config file into `folder` and returns its path. */
export function writeConfig(folder: string, text: string, name = 'strata.yaml'): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

export interface Ended {
  readonly exitCode: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a program that ends by itself. */
export function runToEnd(file: string, args: readonly string[], cwd: string): Ended {
  const result = spawnSync(process.execPath, [file, ...args], { cwd, encoding: 'utf8', timeout: WAIT_MS });
  return { exitCode: result.status, signal: result.signal, stdout: result.stdout, stderr: result.stderr };
}

export interface StartOptions {
  readonly env?: Readonly<Record<string, string>>;
  /** Descriptors the program inherits, as 3, 4, ... */
  readonly fds?: readonly number[];
  /** A command that runs node with its arguments, such as `sh -c 'umask 0; exec "$@"' sh`. */
  readonly through?: readonly string[];
}

/** A program that runs until it is told to stop. */
export class Program {
  readonly child: ChildProcess;
  readonly ended: Promise<Ended>;
  #stdout = '';
  #stderr = '';
  #hasEnded = false;

  constructor(file: string, args: readonly string[], cwd: string, options: StartOptions = {}) {
    const [command = process.execPath, ...rest] = [...(options.through ?? []), process.execPath, file, ...args];
    const stdio: StdioOptions = ['ignore', 'pipe', 'pipe', ...(options.fds ?? [])];
    this.child = spawn(command, rest, { cwd, stdio, env: { ...process.env, ...options.env } });
    this.child.stdout!.on('data', (data: Buffer) => (this.#stdout += data.toString()));
    this.child.stderr!.on('data', (data: Buffer) => (this.#stderr += data.toString()));
    this.ended = new Promise((resolve, reject) => {
      this.child.on('error', reject);
      this.child.on('close', (exitCode, signal) => {
        this.#hasEnded = true;
        resolve({ exitCode, signal, stdout: this.#stdout, stderr: this.#stderr });
      });
    });
    running.add(this);
  }

  /** Starts a program and waits until it serves. */
  static async serving(file: string, args: readonly string[], cwd: string, options?: StartOptions): Promise<Program> {
    const program = new Program(file, args, cwd, options);
    await program.logged('serving');
    return program;
  }

  get pid(): number {
    return this.child.pid!;
  }

  get stdout(): string {
    return this.#stdout;
  }

  get stderr(): string {
    return this.#stderr;
  }

  /** The log so far. Lines that are no JSON are left out. */
  get log(): LogEntry[] {
    const entries: LogEntry[] = [];
    for (const line of this.#stderr.split('\n')) if (line.startsWith('{')) entries.push(JSON.parse(line) as LogEntry);
    return entries;
  }

  /** Waits for a log entry with this message. */
  async logged(message: string): Promise<LogEntry> {
    return until(`"${message}" in the log`, () => {
      const entry = this.log.find((candidate) => candidate.message === message);
      if (entry === undefined && this.#hasEnded) throw new Error(`ended without "${message}": ${this.#stderr}`);
      return entry;
    });
  }

  /** Address of the metrics page. */
  async url(): Promise<string> {
    return (await this.logged('serving'))['http'] as string;
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<Ended> {
    this.child.kill(signal);
    return this.ended;
  }

  async kill(): Promise<void> {
    if (!this.#hasEnded) await this.stop('SIGKILL');
  }
}

export interface LogEntry {
  readonly level: string;
  readonly message: string;
  readonly [field: string]: unknown;
}

/** Waits until `look` has an answer. */
export async function until<T>(what: string, look: () => T | undefined | Promise<T | undefined>): Promise<T> {
  const deadline = Date.now() + WAIT_MS;
  for (;;) {
    const answer = await look();
    if (answer !== undefined) return answer;
    if (Date.now() > deadline) throw new Error(`waited ${WAIT_MS} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
