/**
 * How long a guest waits while the daemon under it is killed and started again: from kill -9 to the answer of a request that it
 * made meanwhile. The listening socket outlives the daemon, as under a service manager, so that the front-end need not look for
 * it: what remains is the daemon's own time, from its start over the take-over of the session to the answer.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { check, native } from '../native/index.js';
import { Frontend } from '../test/frontend/frontend.js';
import { RequestType } from '../test/frontend/protocol.js';
import { median } from './statistics.js';
import { PROGRAM } from './targets.js';

const DISK_BYTES = 2 ** 24;
/** Of the socket in the daemon. */
const SOCKET_FD = 3;

/** @returns milliseconds, one for each round */
export async function measureRestart(directory: string, rounds: number): Promise<number[]> {
  const socketPath = join(directory, 'restart.sock');
  const diskPath = join(directory, 'restart.img');
  writeFileSync(diskPath, Buffer.alloc(DISK_BYTES));
  const listenFd = check(native.socketListen(socketPath, 0o600), `listen on ${socketPath}`);
  const start = (): ChildProcess =>
    spawn(
      'setpriv',
      ['--pdeathsig', 'KILL', '--', process.execPath, PROGRAM, `--fd=${SOCKET_FD}`, `--blk-file=${diskPath}`],
      { stdio: ['ignore', 'ignore', 'ignore', listenFd] },
    );
  let daemon = start();
  const frontend = await Frontend.connect(socketPath);
  const waitsMs: number[] = [];
  try {
    for (let round = 0; round < rounds; round++) {
      const killedMs = performance.now();
      daemon.kill('SIGKILL');
      await once(daemon, 'exit');
      const request = frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 4096 })[0]!;
      daemon = start();
      await frontend.reconnect();
      await frontend.queue.completion(request);
      waitsMs.push(performance.now() - killedMs);
    }
  } finally {
    frontend.close();
    daemon.kill('SIGKILL');
    native.fileClose(listenFd);
  }
  return waitsMs;
}

export function renderRestart(waitsMs: readonly number[]): string {
  const [least, most] = [Math.min(...waitsMs), Math.max(...waitsMs)].map(Math.round);
  return `from kill -9 to the next answer, ${waitsMs.length} times: median ${Math.round(median(waitsMs))} ms (${least}..${most})`;
}
