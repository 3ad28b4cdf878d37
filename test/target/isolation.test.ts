/**
 * Goal: a disk with `isolate` runs in a process of its own under the same control plane: what befalls it is a metric, a log line and a
 * restart, and nothing that any other disk or the daemon notices; whatever ends the daemon ends it too.
 *
 * Method: the compiled program with an isolated disk and one that is not, real front-ends on both, real signals to the processes.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, readlinkSync, renameSync, rmdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { Program, STRATA, newFolder, runToEnd, until, writeConfig } from './programs.js';

const DIST = new URL('../../dist/src/target/', import.meta.url);
const CONFIG = `
bdevs:
  - {name: file, module: uring, path: disk.img, create: 8MiB, direct: false}
  - {name: plain, module: malloc, size: 8MiB}
controllers:
  - {name: vm1, bdev: file, socket: run/vm1.sock, isolate: true}
  - {name: vm2, bdev: plain, socket: run/vm2.sock}
metrics: {listen: "127.0.0.1:0"}
`;

async function serve(folder: string, config = CONFIG): Promise<Program> {
  return Program.serving(STRATA, ['serve', '--config', writeConfig(folder, config)], folder);
}

/** Processes that a process has started. */
function childrenOf(pid: number): number[] {
  return readdirSync(`/proc/${pid}/task`).flatMap((task) => {
    const list = readFileSync(`/proc/${pid}/task/${task}/children`, 'utf8').trim();
    return list === '' ? [] : list.split(' ').map(Number);
  });
}

function childOf(program: Program): number {
  const children = childrenOf(program.pid);
  expect(children).toHaveLength(1);
  return children[0]!;
}

function isAlive(pid: number): boolean {
  try {
    // A zombie has ended.
    return !readFileSync(`/proc/${pid}/stat`, 'utf8').includes(') Z ');
  } catch {
    return false;
  }
}

async function metrics(program: Program): Promise<(series: string) => number | undefined> {
  const text = await (await fetch(`${await program.url()}/metrics`)).text();
  return (series) => {
    const line = text.split('\n').find((candidate) => candidate.startsWith(`${series} `));
    return line === undefined ? undefined : Number(line.slice(series.length + 1));
  };
}

const content = (text: string): Buffer => Buffer.alloc(4096, text);

describe('an isolated disk', () => {
  it('lives in a process of its own, with its metrics, health and log on those of the daemon', async () => {
    const folder = newFolder();
    const program = await serve(folder);
    const child = childOf(program);
    expect(readFileSync(`/proc/${child}/comm`, 'utf8').trim()).toBe('vm1');
    const opens = (pid: number): boolean => openFiles(pid).includes(join(folder, 'disk.img'));
    expect([opens(program.pid), opens(child)]).toEqual([false, true]);

    const frontend = await Frontend.connect(join(folder, 'run/vm1.sock'));
    expect((await frontend.queue.write(0, content('a'))).status).toBe(Status.ok);
    for (let i = 0; i < 3; i++) expect((await frontend.queue.read(0, 4096)).data).toEqual(content('a'));
    const value = await metrics(program);
    expect(value('strata_bdev_reads_completed_total{bdev="file"}')).toBe(3);
    expect(value('strata_bdev_written_bytes_total{bdev="file"}')).toBe(4096);
    expect(value('strata_controller_requests_total{controller="vm1"}')).toBe(4);
    expect(value('strata_controller_connected{controller="vm1"}')).toBe(1);
    expect(value('strata_reactor_up{reactor="vm1"}')).toBe(1);
    expect(value('strata_reactor_steps_total{reactor="vm1"}')).toBeGreaterThan(0);
    expect(value('strata_reactor_aborts_total{reactor="vm1"}')).toBe(0);
    const health = (await (await fetch(`${await program.url()}/healthz`)).json()) as { controllers: unknown };
    expect(health.controllers).toEqual(
      expect.arrayContaining([
        expect.objectContaining({ name: 'vm1', reactor: 'vm1', state: 'connected' }),
        expect.objectContaining({ name: 'vm2', reactor: 'reactor0', state: 'listening' }),
      ]),
    );
    const word = program.log.find((entry) => entry.message === 'front-end connected');
    expect(word).toMatchObject({ controller: 'vm1', pid: process.pid });
    frontend.close();
    expect((await program.stop()).exitCode).toBe(0);
    expect(isAlive(child)).toBe(false);
    expect(readdirSync(join(folder, 'run'))).toEqual([]);
  });

  it('has given up what it has no use for', async () => {
    const folder = newFolder();
    const program = await serve(folder);
    const child = childOf(program);
    const status = readFileSync(`/proc/${child}/status`, 'utf8');
    expect(status).toMatch(/^NoNewPrivs:\s+1$/m);
    // The other disk's socket, the metrics page and the log's file are not its own.
    const sockets = openFiles(child).filter((file) => file.startsWith('socket:'));
    const ofDaemon = openFiles(program.pid);
    const shared = sockets.filter((socket) => ofDaemon.includes(socket));
    // Its listening socket, and what the standard descriptors and the channel are.
    expect(shared.length).toBeLessThanOrEqual(3);
    expect(openFiles(child).some((file) => file.endsWith('disk.img'))).toBe(true);
    await program.stop();
  });

  it.each(['SIGKILL', 'SIGABRT', 'SIGSEGV'] as const)(
    'that dies of %s under load is served again, and nobody else notices',
    async (signal) => {
      const folder = newFolder();
      const program = await serve(folder);
      const isolated = await Frontend.connect(join(folder, 'run/vm1.sock'), { timeoutMs: 20_000 });
      const other = await Frontend.connect(join(folder, 'run/vm2.sock'), { timeoutMs: 20_000 });
      expect((await isolated.queue.write(0, content('kept'))).status).toBe(Status.ok);
      const inode = statSync(join(folder, 'run/vm1.sock')).ino;
      let stop = false;
      let answered = 0;
      const load = (async () => {
        for (let i = 0; !stop; i++) {
          const data = content(`${i} `);
          expect((await other.queue.write(i % 2000, data)).status).toBe(Status.ok);
          expect((await other.queue.read(i % 2000, 4096)).data).toEqual(data);
          answered++;
        }
      })();
      isolated.queue.submit(
        ...Array.from({ length: 16 }, () => ({ type: RequestType.read, sector: 0, inBytes: 4096 })),
      );
      const child = childOf(program);
      process.kill(child, signal);
      expect(await program.logged('an isolated disk died; it is started again')).toMatchObject({
        level: 'error',
        isolated: 'vm1',
        how: signal,
      });
      await isolated.connection.disconnected();
      isolated.close();
      // The socket never went away: whoever connects now waits for the next process.
      expect(statSync(join(folder, 'run/vm1.sock')).ino).toBe(inode);
      const again = await Frontend.connect(join(folder, 'run/vm1.sock'), { timeoutMs: 20_000 });
      expect((await again.queue.read(0, 4096)).data).toEqual(content('kept'));
      await program.logged('an isolated disk is served again');
      expect(childOf(program)).not.toBe(child);
      const before = answered;
      await until('more answers on the other disk', () => (answered > before + 10 ? true : undefined));
      stop = true;
      await load;
      expect(other.connection.isOpen).toBe(true);
      const value = await metrics(program);
      expect(value('strata_reactor_aborts_total{reactor="vm1"}')).toBe(1);
      expect(value('strata_reactor_up{reactor="vm1"}')).toBe(1);
      expect(value('strata_controller_sessions_total{controller="vm2"}')).toBe(1);
      expect((await fetch(`${await program.url()}/healthz`)).status).toBe(200);
      again.close();
      other.close();
      expect((await program.stop()).exitCode).toBe(0);
    },
  );

  it('that cannot be started again is tried again, and the daemon is healthy meanwhile', async () => {
    const folder = newFolder();
    const program = await serve(folder);
    const disk = join(folder, 'disk.img');
    const other = await Frontend.connect(join(folder, 'run/vm2.sock'));
    renameSync(disk, `${disk}.away`);
    mkdirSync(disk);
    process.kill(childOf(program), 'SIGKILL');
    const word = await program.logged('an isolated disk cannot be started');
    expect(word).toMatchObject({ level: 'error', isolated: 'vm1' });
    expect((await fetch(`${await program.url()}/healthz`)).status).toBe(200);
    expect((await metrics(program))('strata_reactor_up{reactor="vm1"}')).toBe(0);
    expect((await other.queue.read(0, 4096)).status).toBe(Status.ok);
    rmdirSync(disk);
    renameSync(`${disk}.away`, disk);
    await program.logged('an isolated disk is served again');
    const frontend = await Frontend.connect(join(folder, 'run/vm1.sock'));
    expect((await frontend.queue.read(0, 4096)).status).toBe(Status.ok);
    frontend.close();
    other.close();
    expect((await program.stop()).exitCode).toBe(0);
  });

  it('drains with the daemon', async () => {
    const folder = newFolder();
    const slow = CONFIG.replace('bdev: file,', 'bdev: slow,').replace(
      'bdevs:',
      'bdevs:\n  - {name: slow, module: delay, base: file, read_us: 2000000}',
    );
    const program = await serve(folder, slow);
    const frontend = await Frontend.connect(join(folder, 'run/vm1.sock'), { timeoutMs: 20_000 });
    const read = frontend.queue.read(0, 4096);
    await frontend.barrier();
    program.child.kill('SIGTERM');
    expect((await read).status).toBe(Status.ok);
    expect((await program.ended).exitCode).toBe(0);
    frontend.close();
  });

  it('ends with the daemon, however that ends', async () => {
    const folder = newFolder();
    const program = await serve(folder);
    const child = childOf(program);
    await program.stop('SIGKILL');
    await until('the end of the isolated process', () => (isAlive(child) ? undefined : true));
    // The socket that is left does not keep the next daemon from its place, nor does the lock of the file.
    const next = await serve(folder);
    (await Frontend.connect(join(folder, 'run/vm1.sock'))).close();
    expect((await next.stop()).exitCode).toBe(0);
  });

  it('leaves signals to the whole group to the daemon', async () => {
    const folder = newFolder();
    const program = await serve(folder);
    const child = childOf(program);
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'] as const) process.kill(child, signal);
    const frontend = await Frontend.connect(join(folder, 'run/vm1.sock'));
    expect((await frontend.queue.read(0, 4096)).status).toBe(Status.ok);
    expect(childOf(program)).toBe(child);
    frontend.close();
    const ended = await program.stop();
    expect(ended.exitCode).toBe(0);
    expect(ended.stderr).not.toMatch(/Debugger/);
  });

  it('that cannot be had is a problem of the config, and leaves nothing behind', () => {
    const folder = newFolder();
    const config = CONFIG.replace('create: 8MiB, ', '');
    const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, config)], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/bdevs\[0\]\.path: .*disk\.img does not exist\n {4}-> create it, or set `create`/);
    expect(readdirSync(join(folder, 'run'))).toEqual([]);
  });
});

describe('forbidOpeningFiles', () => {
  it('lets a process use what it has open, and open nothing else', (context) => {
    const script = `
      const { readFileSync, openSync, readSync, writeFileSync } = await import('node:fs');
      const { forbidNewPrivileges, forbidOpeningFiles } = await import(${JSON.stringify(new URL('system.js', DIST))});
      const open = openSync('/proc/self/status');
      const tried = (action) => { try { action(); return 'done'; } catch ({ code }) { return code; } };
      forbidNewPrivileges();
      const has = forbidOpeningFiles();
      const outcomes = [() => readFileSync('/etc/passwd'), () => writeFileSync('x', ''), () => readSync(open, Buffer.alloc(10))];
      console.log(JSON.stringify([has, ...outcomes.map(tried)]));`;
    const cwd = newFolder();
    const ended = spawnSync(process.execPath, ['--input-type=module', '-e', script], { cwd, encoding: 'utf8' });
    const [has, ...outcomes] = JSON.parse(ended.stdout) as [boolean, ...string[]];
    if (!has) context.skip('this kernel has no Landlock');
    expect(outcomes).toEqual(['EACCES', 'EACCES', 'done']);
    expect(readdirSync(cwd)).toEqual([]);
  });
});

/** What the descriptors of a process lead to. */
function openFiles(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/${pid}/fd/${fd}`)];
    } catch {
      return [];
    }
  });
}
