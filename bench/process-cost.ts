/** What a process costs: its CPU time, and the system calls it makes. */
import { spawnSync } from 'node:child_process';
import { readFileSync, readdirSync } from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { Child } from '../test/guest/child.js';

/** CPU time of all live threads of a process since it started, in microseconds. */
export function cpuTimeUs(pid: number): number {
  let ns = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    try {
      // {time on a core, time waiting for one, time slices}
      ns += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ')[0]);
    } catch {
      // The thread ended while we looked: io_uring's workers come and go.
    }
  }
  return ns / 1000;
}

interface SyscallCounter {
  readonly command: string;
  readonly options: readonly string[];
  /** Picks the number out of what the program printed to stderr. */
  readonly pattern: RegExp;
}

/** The one that disturbs less comes first. */
const COUNTERS: readonly SyscallCounter[] = [
  { command: 'perf', options: ['stat', '-x,', '-e', 'raw_syscalls:sys_enter'], pattern: /^(\d+),[^\n]*raw_syscalls/m },
  { command: 'strace', options: ['-f', '-c'], pattern: /^\s*100\.00\s.*?(\d+)(?:\s+\d+)?\s+total$/m },
];
/** Time the counter gets to attach to a process. */
const ATTACH_MS = 400;

/** The first counter that works here. Throws with the line that installs one. */
async function findCounter(): Promise<SyscallCounter> {
  for (const counter of COUNTERS) {
    const child = new Child(counter.command, [...counter.options, 'true']);
    await child.exited;
    if (counter.pattern.test(child.stderr)) return counter;
  }
  throw new Error('neither perf nor strace can count system calls here; as root: apt-get install -y linux-perf strace');
}

let found: Promise<SyscallCounter> | undefined;
const syscallCounter = (): Promise<SyscallCounter> => (found ??= findCounter());

/** Throws with the line that installs what is missing. */
export async function requireSyscallCounter(): Promise<void> {
  await syscallCounter();
}

/** System calls that all threads of a process make while `work` runs. It runs slower for that. */
export async function countSyscalls(pid: number, work: () => void): Promise<number> {
  const counter = await syscallCounter();
  const child = new Child(counter.command, [...counter.options, '-p', String(pid)]);
  await setTimeout(ATTACH_MS);
  try {
    work();
  } finally {
    child.kill('SIGINT');
    await child.exited;
  }
  return countIn(child, counter);
}

/** Runs a program to its end. Returns the system calls it made from its start, and its output. */
export async function runCountingSyscalls(
  command: string,
  args: readonly string[],
): Promise<{ readonly calls: number; readonly stdout: string }> {
  const counter = await syscallCounter();
  const child = new Child(counter.command, [...counter.options, command, ...args]);
  const { code } = await child.exited;
  if (code !== 0) throw new Error(`${command} failed:\n${child.stdout}${child.stderr}`);
  return { calls: countIn(child, counter), stdout: child.stdout };
}

function countIn(child: Child, counter: SyscallCounter): number {
  const count = counter.pattern.exec(child.stderr)?.[1];
  if (count === undefined) throw new Error(`${counter.command} did not count system calls:\n${child.stderr}`);
  return Number(count);
}

/** Throws with the line that installs it when a program is missing. */
export function requireProgram(command: string, debianPackage: string): void {
  const { error } = spawnSync(command, ['--version'], { stdio: 'ignore' });
  if (error !== undefined) throw new Error(`${command} is missing; as root: apt-get install -y ${debianPackage}`);
}
