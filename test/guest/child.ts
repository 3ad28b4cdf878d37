/**
 * A child process that cannot outlive the test: it dies with this process (PR_SET_PDEATHSIG), and `stop` ends it
 * by its pid. Its output is kept for failure messages, the newest 64 KiB of each stream.
 */
import { spawn, type ChildProcessByStdio } from 'node:child_process';
import type { Readable } from 'node:stream';

const KEEP_CHARACTERS = 64 * 1024;

export interface ChildExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export class Child {
  readonly #name: string;
  readonly #process: ChildProcessByStdio<null, Readable, Readable>;
  #stdout = '';
  #stderr = '';

  /** Resolves when the process has ended and its output is complete; never rejects. */
  readonly exited: Promise<ChildExit>;

  /** @param ownGroup keeps the signals of our terminal from it: we end it ourselves */
  constructor(command: string, args: readonly string[], ownGroup = false) {
    this.#name = command;
    this.#process = spawn('setpriv', ['--pdeathsig', 'KILL', '--', command, ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: ownGroup,
    });
    this.#process.stdout.setEncoding('utf8').on('data', (text: string) => {
      this.#stdout = (this.#stdout + text).slice(-KEEP_CHARACTERS);
    });
    this.#process.stderr.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-KEEP_CHARACTERS);
    });
    this.exited = new Promise((resolve) => {
      this.#process.once('error', (error) => {
        this.#stderr += error.message;
        resolve({ code: null, signal: null });
      });
      this.#process.once('close', (code, signal) => resolve({ code, signal }));
    });
  }

  get pid(): number {
    const { pid } = this.#process;
    if (pid === undefined) throw new Error(`${this.#name} did not start: ${this.#stderr}`);
    return pid;
  }

  get running(): boolean {
    return this.#process.pid !== undefined && this.#process.exitCode === null && this.#process.signalCode === null;
  }

  get stdout(): string {
    return this.#stdout;
  }

  get stderr(): string {
    return this.#stderr;
  }

  kill(signal: NodeJS.Signals): void {
    if (this.running) this.#process.kill(signal);
  }

  /** Asks with SIGTERM, insists with SIGKILL after `graceMs`; resolves when the process is gone. */
  async stop(graceMs: number): Promise<ChildExit> {
    this.kill('SIGTERM');
    const insist = setTimeout(() => this.kill('SIGKILL'), graceMs);
    try {
      return await this.exited;
    } finally {
      clearTimeout(insist);
    }
  }
}

/** Polls `condition` every 20 ms; resolves with false when it is not met within `timeoutMs`. */
export async function waitUntil(condition: () => boolean, timeoutMs: number): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  while (!condition()) {
    if (performance.now() > deadline) return false;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return true;
}
