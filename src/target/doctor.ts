/** Looks at the host for what the daemon needs: what is missing, what would help, and the remedy for each. Changes nothing. */
import { accessSync, constants, existsSync, readFileSync, statSync } from 'node:fs';
import { release } from 'node:os';
import { dirname, resolve } from 'node:path';
import { Arena, SystemError } from '../../native/index.js';
import { Uring } from '../poller/uring.js';
import { allowedCores } from './daemon.js';
import { Resource, limitOf } from './system.js';

/** fail: the daemon cannot run. warn: it can, not at its best. */
export type Verdict = 'ok' | 'warn' | 'fail';

export interface Finding {
  readonly check: string;
  readonly verdict: Verdict;
  readonly found: string;
  /** Empty when there is nothing to do. */
  readonly remedy: string;
}

/** Sparse file tables (RSRC_REGISTER_SPARSE) came with 5.19, completions without interrupts (DEFER_TASKRUN) with 6.1. */
const KERNEL_NEEDED = '5.19';
const KERNEL_WANTED = '6.1';
const NODE_NEEDED = '20.19';
/** Two eventfds for each queue, and a few for each disk: room for some hundred disks. */
const OPEN_FILES_WANTED = 4096;

/** All checks, in the order of reading. @param folder where data/ and run/ would be made */
export function examine(folder: string): Finding[] {
  return [
    checkNode(process.versions.node),
    checkKernel(release()),
    checkProcessor(),
    checkIoUring(),
    checkOpenFiles(limitOf(Resource.openFiles).hard),
    checkLockedMemory(limitOf(Resource.lockedBytes).hard),
    checkHugePages(),
    checkCores(allowedCores().length),
    checkFolder(folder),
  ];
}

/** As lines of text, the remedy below each finding that has one. */
export function formatFindings(findings: readonly Finding[]): string {
  const width = Math.max(...findings.map(({ check }) => check.length));
  return findings
    .map(({ check, verdict, found, remedy }) => {
      const line = `${verdict.padEnd(4)}  ${check.padEnd(width)}  ${found}\n`;
      return remedy === '' ? line : `${line}      -> ${remedy}\n`;
    })
    .join('');
}

export function checkNode(version: string): Finding {
  const isEnough = !isOlder(version, NODE_NEEDED);
  const remedy = isEnough ? '' : `install Node ${NODE_NEEDED} or newer`;
  return { check: 'node', verdict: isEnough ? 'ok' : 'fail', found: version, remedy };
}

export function checkKernel(version: string): Finding {
  const check = 'kernel';
  const found = `Linux ${version}`;
  if (isOlder(version, KERNEL_NEEDED)) {
    return { check, verdict: 'fail', found, remedy: `boot Linux ${KERNEL_NEEDED} or newer, best ${KERNEL_WANTED}` };
  }
  if (isOlder(version, KERNEL_WANTED)) {
    return { check, verdict: 'warn', found, remedy: `Linux ${KERNEL_WANTED} or newer costs less for each request` };
  }
  return { check, verdict: 'ok', found, remedy: '' };
}

function checkProcessor(): Finding {
  const check = 'processor';
  const cpuinfo = readText('/proc/cpuinfo');
  const model = /^model name\s*:\s*(.+)$/m.exec(cpuinfo)?.[1] ?? process.arch;
  if (process.arch === 'x64' && !/^flags\s*:.*\bsse4_2\b/m.test(cpuinfo)) {
    return {
      check,
      verdict: 'fail',
      found: `${model} without SSE 4.2`,
      remedy: 'use a processor (or CPU model) with SSE 4.2',
    };
  }
  if (process.arch !== 'x64' && process.arch !== 'arm64') {
    return { check, verdict: 'fail', found: process.arch, remedy: 'use x86-64 or 64-bit ARM' };
  }
  return { check, verdict: 'ok', found: model, remedy: '' };
}

/** The only sure answer is to set a ring up: sysctl, seccomp filters and old kernels all say no in their own way. */
function checkIoUring(): Finding {
  const check = 'io_uring';
  try {
    const arena = new Arena(2 ** 31);
    new Uring(arena).close();
    return { check, verdict: 'ok', found: 'allowed', remedy: '' };
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    return { check, verdict: 'fail', found: error.message, remedy: ioUringRemedy(error.code) };
  }
}

export function ioUringRemedy(code: string): string {
  const setting = Number(readText('/proc/sys/kernel/io_uring_disabled'));
  switch (code) {
    case 'EPERM':
    case 'EACCES':
      if (setting > 0) return 'run `sysctl kernel.io_uring_disabled=0`, or allow it to this group (io_uring_group)';
      return 'the sandbox forbids it: allow the io_uring system calls in the seccomp profile of the container or service';
    case 'ENOSYS':
      return `boot Linux ${KERNEL_NEEDED} or newer, with CONFIG_IO_URING`;
    case 'ENOMEM':
      return 'give the process more memory: raise the memory limit of its cgroup, or `ulimit -v`';
    default:
      return `boot Linux ${KERNEL_NEEDED} or newer`;
  }
}

export function checkOpenFiles(limit: number): Finding {
  const isEnough = limit >= OPEN_FILES_WANTED;
  return {
    check: 'open files',
    verdict: isEnough ? 'ok' : 'warn',
    found: `up to ${limit}`,
    remedy: isEnough ? '' : `for many disks set LimitNOFILE=${OPEN_FILES_WANTED} or more (\`ulimit -Hn\`)`,
  };
}

/** Only registered guest memory counts as locked; rings do not, since Linux 5.12. */
export function checkLockedMemory(limitBytes: number): Finding {
  const isUnlimited = limitBytes === Infinity;
  return {
    check: 'locked memory',
    verdict: 'ok',
    found: isUnlimited ? 'unlimited' : `up to ${Math.floor(limitBytes / 2 ** 20)} MiB`,
    remedy: isUnlimited ? '' : 'for `fixed_buffers: true` set LimitMEMLOCK to the size of all guests, or infinity',
  };
}

function checkHugePages(): Finding {
  const free = Number(/^HugePages_Free:\s*(\d+)/m.exec(readText('/proc/meminfo'))?.[1] ?? 0);
  return {
    check: 'huge pages',
    verdict: 'ok',
    found: `${free} free`,
    remedy: free > 0 ? '' : 'a hint: guests on huge pages attach and run faster (`sysctl vm.nr_hugepages=N`)',
  };
}

export function checkCores(count: number): Finding {
  const isEnough = count >= 2;
  return {
    check: 'cores',
    verdict: isEnough ? 'ok' : 'warn',
    found: `${count} for this process`,
    remedy: isEnough ? '' : 'give it two or more: a reactor that polls takes one from the guest',
  };
}

export function checkFolder(folder: string): Finding {
  const check = 'permissions';
  for (const name of ['data', 'run']) {
    const path = nearestExisting(resolve(folder, name));
    if (!statSync(path).isDirectory()) {
      return {
        check,
        verdict: 'warn',
        found: `${path} is not a folder`,
        remedy: 'move it away, or serve from another folder',
      };
    }
    try {
      accessSync(path, constants.W_OK | constants.X_OK);
    } catch {
      const remedy = 'run it from a folder of this user, or with a config file that names others';
      return { check, verdict: 'warn', found: `${path} cannot be written to`, remedy };
    }
  }
  return { check, verdict: 'ok', found: `${folder} can be written to`, remedy: '' };
}

function nearestExisting(path: string): string {
  return existsSync(path) ? path : nearestExisting(dirname(path));
}

/** Compares major and minor numbers. */
function isOlder(version: string, than: string): boolean {
  const [major = 0, minor = 0] = version.split('.').map((part) => parseInt(part, 10));
  const [thanMajor = 0, thanMinor = 0] = than.split('.').map(Number);
  return major < thanMajor || (major === thanMajor && minor < thanMinor);
}

function readText(path: string): string {
  return existsSync(path) ? readFileSync(path, 'utf8') : '';
}
