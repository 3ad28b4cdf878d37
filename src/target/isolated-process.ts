/**
 * The entry of the process of an isolated disk: gives up what it has no use for, then does what a reactor thread does.
 *
 * - It dies with the daemon, and only the daemon ends it in an orderly way: signals to the whole group are the daemon's to act on.
 * - Whatever it executes gains no privileges; see also the call `seal`.
 */
import type { ProcessData } from '../poller/process.js';
import { dieWithParent, forbidCoreDumps, forbidNewPrivileges } from './system.js';

export interface IsolationOptions {
  readonly coreDumps: boolean;
}

const { parentPid, extra } = JSON.parse(process.argv[2]!) as ProcessData;

// SIGUSR1 would open Node's debugger.
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'] as const) process.on(signal, () => undefined);
if (!dieWithParent(parentPid)) process.exit(1);
forbidNewPrivileges();
if (!(extra as IsolationOptions).coreDumps) forbidCoreDumps();
await import('./reactor-worker.js');
