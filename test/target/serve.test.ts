/**
 * Goal: `strata serve` behaves as a service should from start to stop: it starts whole or not at all, says what it serves, drains on
 * the first signal, ends on the second, and leaves no socket behind.
 *
 * Method: the compiled program is run as a process of its own, attached to by a real front-end, and stopped by real signals.
 */
import { existsSync, mkdirSync, readFileSync, readdirSync, readlinkSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { RequestType } from '../frontend/protocol.js';
import { Program, STRATA, newFolder, runToEnd, until, writeConfig } from './programs.js';

/** One null disk. @param more lines of the config's top level */
const nullDisk = (...more: string[]): string =>
  [
    'bdevs: [{name: disk, module: null, size: 1GiB}]',
    'controllers: [{name: vm, bdev: disk, socket: run/vm.sock}]',
    ...(more.some((line) => line.startsWith('metrics')) ? [] : ['metrics: {listen: off}']),
    ...more,
  ].join('\n');

/** One disk whose reads take a while. */
const slowDisk = (readUs: number, ...more: string[]): string =>
  [
    'bdevs:',
    '  - {name: fast, module: null, size: 1GiB}',
    `  - {name: slow, module: delay, base: fast, read_us: ${readUs}}`,
    'controllers: [{name: vm, bdev: slow, socket: vm.sock}]',
    'metrics: {listen: "127.0.0.1:0"}',
    ...more,
  ].join('\n');

async function serve(folder: string, text: string, options = {}): Promise<Program> {
  return Program.serving(STRATA, ['serve', '--config', writeConfig(folder, text)], folder, options);
}

const isSocket = (path: string): boolean => statSync(path, { throwIfNoEntry: false })?.isSocket() === true;
const modeOf = (path: string): string => (statSync(path).mode & 0o7777).toString(8);

describe('strata serve, without a config file', () => {
  it('serves a sparse 10 GiB disk from ./data on a socket in ./run, and prints lines that attach a guest', async () => {
    const folder = newFolder();
    const program = await Program.serving(STRATA, ['serve', '--metrics', '127.0.0.1:0'], folder);
    const stats = statSync(join(folder, 'data/disk0.img'));
    expect(stats.size).toBe(10 * 2 ** 30);
    expect(stats.blocks * 512).toBeLessThan(2 ** 20);
    const socket = join(folder, 'run/disk0.sock');
    expect(isSocket(socket)).toBe(true);
    await until('the printed lines', () => (program.stdout.includes('is_root_device') ? true : undefined));
    for (const monitor of ['QEMU', 'libvirt', 'cloud-hypervisor', 'Firecracker'])
      expect(program.stdout).toContain(`# ${monitor}`);
    expect(program.stdout.split(socket)).toHaveLength(6);
    expect(program.stdout).toContain(await program.url());

    const frontend = await Frontend.connect(socket);
    const data = Buffer.alloc(4096, 'strata');
    expect((await frontend.queue.write(8, data)).status).toBe(0);
    expect((await frontend.queue.flush()).status).toBe(0);
    expect(Buffer.compare((await frontend.queue.read(8, 4096)).data, data)).toBe(0);
    frontend.close();
    expect((await program.stop()).exitCode).toBe(0);
    expect(isSocket(socket)).toBe(false);
  });

  it('says where it is as JSON', async () => {
    const folder = newFolder();
    const program = await Program.serving(STRATA, ['serve', '-o', 'json', '--metrics', 'off'], folder);
    const announced = await until('the announcement', () =>
      program.stdout.endsWith('\n}\n') ? program.stdout : undefined,
    );
    expect(JSON.parse(announced)).toMatchObject({
      status: 'serving',
      pid: program.pid,
      http: null,
      disks: [{ name: 'disk0', module: 'uring', sizeBytes: 10 * 2 ** 30, socket: join(folder, 'run/disk0.sock') }],
    });
    expect(listeningPorts(program.pid)).toEqual([]);
  });

  it('names the option when the port of the metrics page is taken', async () => {
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    const folder = newFolder();
    const ended = runToEnd(STRATA, ['serve', '-o', 'json', '--metrics', `127.0.0.1:${port}`], folder);
    server.close();
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/^--metrics: 127\.0\.0\.1:\d+ is in use by another program\n {4}-> choose another/);
    expect(JSON.parse(ended.stdout)).toMatchObject({ errors: [{ field: '--metrics' }] });
    expect(existsSync(join(folder, 'run'))).toBe(false);
    expect(existsSync(join(folder, 'data/disk0.img'))).toBe(false);
  });

  it('explains a folder it may not use', () => {
    const folder = newFolder();
    writeFileSync(join(folder, 'data'), '');
    const ended = runToEnd(STRATA, ['serve', '--metrics', 'off'], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/data: cannot be used: ENOTDIR\n {4}-> run it in a folder of this user/);
  });
});

describe('a socket', () => {
  it.each(['000', '077'])(
    'has the mode of the config under umask %s, in a folder for its group only',
    async (umask) => {
      const folder = newFolder();
      const through = ['sh', '-c', `umask ${umask}; exec "$@"`, 'sh'];
      await serve(folder, nullDisk(), { through });
      expect(modeOf(join(folder, 'run/vm.sock'))).toBe('660');
      expect(modeOf(join(folder, 'run'))).toBe(umask === '000' ? '750' : '700');
    },
  );

  it('that a dead daemon left is replaced', async () => {
    const folder = newFolder();
    const first = await serve(folder, nullDisk());
    await first.stop('SIGKILL');
    expect(isSocket(join(folder, 'run/vm.sock'))).toBe(true);
    await serve(folder, nullDisk());
    (await Frontend.connect(join(folder, 'run/vm.sock'))).close();
  });

  it('that somebody listens on is left alone, and the listener named', async () => {
    const folder = newFolder();
    const first = await serve(folder, nullDisk());
    const ended = runToEnd(STRATA, ['serve', '--config', join(folder, 'strata.yaml')], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/strata\.yaml:2: controllers\[0\]\.socket: process \d+ \(.+\) listens on/);
    expect(ended.stderr).toContain(`process ${first.pid} `);
    (await Frontend.connect(join(folder, 'run/vm.sock'))).close();
  });

  it('needs a folder', () => {
    const folder = newFolder();
    writeFileSync(join(folder, 'run'), '');
    const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, nullDisk())], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/strata\.yaml:2: controllers\[0\]\.socket: .*ENOTDIR/);
  });

  it('does not take the place of another file', () => {
    const folder = newFolder();
    mkdirSync(join(folder, 'run'));
    writeFileSync(join(folder, 'run/vm.sock'), 'precious');
    const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, nullDisk())], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/exists and is not a socket/);
    expect(statSync(join(folder, 'run/vm.sock')).size).toBe(8);
  });
});

describe('a start that fails', () => {
  it('leaves no socket, and says all that is wrong with the disks', () => {
    const folder = newFolder();
    writeFileSync(join(folder, 'small.img'), Buffer.alloc(4096));
    const config = writeConfig(
      folder,
      [
        'bdevs:',
        '  - {name: good, module: null, size: 1MiB}',
        '  - {name: gone, module: uring, path: gone.img}',
        '  - {name: top, module: passthru, base: gone}',
        '  - {name: folder, module: uring, path: /}',
        'controllers:',
        '  - {name: a, bdev: good, socket: a.sock}',
        '  - {name: b, bdev: top, socket: b.sock}',
        '  - {name: c, bdev: folder, socket: c.sock}',
        'reactors: [{name: r0}, {name: r1}]',
        'metrics: {listen: off}',
      ].join('\n'),
    );
    const ended = runToEnd(STRATA, ['serve', '--config', config], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stdout).toBe('');
    expect(ended.stderr).toMatch(
      /strata\.yaml:3: bdevs\[1\]\.path: .*gone\.img does not exist\n {4}-> create it, or set `create`/,
    );
    expect(ended.stderr).toMatch(/strata\.yaml:5: bdevs\[3\]\.path: \/ is/);
    expect(ended.stderr.match(/->/g)).toHaveLength(2);
    expect(readdirSync(folder).sort()).toEqual(['small.img', 'strata.yaml']);
  });

  it('takes back the sockets that listened already', () => {
    const folder = newFolder();
    const config = writeConfig(
      folder,
      [
        'bdevs: [{name: x, module: null, size: 1MiB}, {name: y, module: null, size: 1MiB}]',
        'controllers:',
        '  - {name: a, bdev: x, socket: a.sock}',
        '  - {name: b, bdev: y, socket: /proc/nowhere/b.sock}',
        'metrics: {listen: off}',
      ].join('\n'),
    );
    const ended = runToEnd(STRATA, ['serve', '--config', config], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/strata\.yaml:4: controllers\[1\]\.socket: .*ENOENT/);
    expect(readdirSync(folder)).toEqual(['strata.yaml']);
  });

  it('names the file that another daemon has locked', async () => {
    const folder = newFolder();
    const disk = (socket: string): string =>
      [
        'bdevs: [{name: disk, module: uring, path: disk.img, create: 1MiB}]',
        `controllers: [{name: vm, bdev: disk, socket: ${socket}}]`,
        'metrics: {listen: off}',
      ].join('\n');
    await serve(folder, disk('one.sock'));
    const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, disk('two.sock'), 'two.yaml')], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/two\.yaml:1: bdevs\[0\]\.path: .*disk\.img is in use by another process/);
    expect(isSocket(join(folder, 'two.sock'))).toBe(false);
  });

  it('names a core that this process may not use', () => {
    const folder = newFolder();
    const config = writeConfig(folder, nullDisk('reactors: [{name: r0, core: 4095}]'));
    const ended = runToEnd(STRATA, ['serve', '--config', config], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/reactors\[0\]\.core: core 4095 is not there for this process\n {4}-> use one of: 0/);
  });

  it('says so when a reactor cannot run at all', async () => {
    const folder = newFolder();
    const config = writeConfig(folder, nullDisk());
    const program = new Program(STRATA, ['serve', '--config', config], folder, {
      through: ['prlimit', '--as=300000000000'],
    });
    const ended = await program.ended;
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/reactors\[0\]: reactor reactor0 cannot run: .*ENOMEM\n {4}-> run `strata doctor`/);
    expect(isSocket(join(folder, 'run/vm.sock'))).toBe(false);
  });
});

describe('while it serves', () => {
  it('answers /healthz and nothing but GET', async () => {
    const folder = newFolder();
    const program = await serve(folder, nullDisk('metrics: {listen: "127.0.0.1:0"}'));
    const url = await program.url();
    const health = await fetch(`${url}/healthz`);
    expect(health.status).toBe(200);
    expect(await health.json()).toMatchObject({
      status: 'serving',
      reactors: [{ name: 'reactor0', answers: true }],
      controllers: [{ name: 'vm', bdev: 'disk', reactor: 'reactor0', state: 'listening' }],
    });
    const frontend = await Frontend.connect(join(folder, 'run/vm.sock'));
    expect(await (await fetch(`${url}/healthz`)).json()).toMatchObject({ controllers: [{ state: 'connected' }] });
    frontend.close();
    expect((await fetch(`${url}/`)).status).toBe(404);
    expect((await fetch(`${url}/toString`)).status).toBe(404);
    expect((await fetch(`${url}/metrics`, { method: 'POST' })).status).toBe(405);
    const head = await fetch(`${url}/metrics`, { method: 'HEAD' });
    expect(head.status).toBe(200);
    expect(await head.text()).toBe('');
  });

  it('spreads stacks over its reactors', async () => {
    const folder = newFolder();
    const program = await serve(
      folder,
      [
        'reactors: [{name: left}, {name: right, mode: interrupt}]',
        'bdevs: [{name: x, module: null, size: 1MiB}, {name: y, module: malloc, size: 1MiB}]',
        'controllers: [{name: a, bdev: x, socket: a.sock}, {name: b, bdev: y, socket: b.sock}]',
        'metrics: {listen: "127.0.0.1:0"}',
      ].join('\n'),
    );
    const { controllers } = (await (await fetch(`${await program.url()}/healthz`)).json()) as { controllers: unknown };
    expect(controllers).toMatchObject([
      { name: 'a', reactor: 'left' },
      { name: 'b', reactor: 'right' },
    ]);
    for (const socket of ['a.sock', 'b.sock']) {
      const frontend = await Frontend.connect(join(folder, socket));
      expect((await frontend.queue.write(0, Buffer.alloc(512))).status).toBe(0);
      frontend.close();
    }
  });

  it('shows serial, size and queues of the config to the guest', async () => {
    const folder = newFolder();
    await serve(
      folder,
      [
        'bdevs: [{name: d, module: malloc, size: 3MiB, block_size: 4096}]',
        'controllers: [{name: vm, bdev: d, socket: s, serial: ABC-123, queues: 3, write_cache: false}]',
        'metrics: {listen: off}',
      ].join('\n'),
    );
    const frontend = await Frontend.connect(join(folder, 's'));
    expect(await frontend.blkConfig()).toMatchObject({
      capacitySectors: 6144,
      blkSizeBytes: 4096,
      numQueues: 3,
      writeback: 0,
    });
    expect((await frontend.queue.getId()).data.toString()).toMatch(/^ABC-123\0+$/);
    frontend.close();
  });

  it('logs its state on SIGUSR1 and opens no debugger', async () => {
    const folder = newFolder();
    const program = await serve(folder, nullDisk());
    program.child.kill('SIGUSR1');
    expect(await program.logged('state')).toMatchObject({ controller: 'vm', state: 'listening' });
    expect((await program.stop()).stderr).not.toMatch(/Debugger/);
  });

  it('goes on after SIGHUP, which a terminal did not send', async () => {
    const program = await serve(newFolder(), nullDisk());
    program.child.kill('SIGHUP');
    await until('a word on SIGHUP', () => program.log.find(({ message }) => message.startsWith('SIGHUP')));
    expect((await program.stop()).exitCode).toBe(0);
  });

  it('logs a front-end that misbehaves without letting it fill the log', async () => {
    const folder = newFolder();
    const program = await serve(folder, nullDisk());
    for (let i = 0; i < 60; i++) {
      const frontend = Frontend.open(join(folder, 'run/vm.sock'));
      await frontend.connection.send(Buffer.alloc(12, 0xff));
      await frontend.connection.disconnected();
      frontend.close();
    }
    const ended = await program.stop();
    expect(ended.exitCode).toBe(0);
    const entries = program.log.filter((entry) => entry['controller'] === 'vm');
    expect(entries.length).toBeGreaterThan(3);
    expect(entries.length).toBeLessThan(40);
  });
});

describe('SIGTERM', () => {
  it.each(['SIGTERM', 'SIGINT'] as const)('(as %s) ends the daemon with 0, and its socket is gone', async (signal) => {
    const folder = newFolder();
    const program = await serve(folder, nullDisk());
    const ended = await program.stop(signal);
    expect(ended.exitCode).toBe(0);
    expect(readdirSync(join(folder, 'run'))).toEqual([]);
    expect(program.log.at(-1)).toMatchObject({ message: 'stopped' });
  });

  it('lets requests in flight finish, tells them so, and answers probes meanwhile', async () => {
    const folder = newFolder();
    const program = await serve(folder, slowDisk(3_000_000));
    const url = await program.url();
    const frontend = await Frontend.connect(join(folder, 'vm.sock'), { timeoutMs: 20_000 });
    const read = frontend.queue.read(0, 512);
    await until('the request in flight', async () => {
      const text = await (await fetch(`${url}/metrics`)).text();
      return /strata_controller_requests_now\{controller="vm"\} 1/.test(text) ? true : undefined;
    });
    program.child.kill('SIGTERM');
    const health = await until('the drain', async () => {
      const response = await fetch(`${url}/healthz`);
      return response.status === 503 ? response : undefined;
    });
    expect(await health.json()).toMatchObject({ status: 'draining' });
    expect(isSocket(join(folder, 'vm.sock'))).toBe(false);
    expect((await read).status).toBe(0);
    expect((await program.ended).exitCode).toBe(0);
    frontend.close();
  });

  it('a second time ends the daemon at once, with 1', async () => {
    const folder = newFolder();
    const program = await serve(folder, slowDisk(60_000_000, 'drain_timeout_s: 60'));
    const frontend = await Frontend.connect(join(folder, 'vm.sock'));
    frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 512 });
    await frontend.barrier();
    program.child.kill('SIGTERM');
    // The same key press may arrive several times over; a second one comes later.
    program.child.kill('SIGTERM');
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect(program.child.exitCode).toBeNull();
    expect((await program.stop()).exitCode).toBe(1);
    expect(program.log.at(-1)).toMatchObject({ message: 'stopped at once' });
    expect(isSocket(join(folder, 'vm.sock'))).toBe(false);
    frontend.close();
  });

  it('does not wait longer than the drain timeout', async () => {
    const folder = newFolder();
    const program = await serve(folder, slowDisk(60_000_000, 'drain_timeout_s: 0.5'));
    const frontend = await Frontend.connect(join(folder, 'vm.sock'));
    frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 512 });
    await frontend.barrier();
    expect((await program.stop()).exitCode).toBe(1);
    expect(program.log.at(-1)).toMatchObject({ level: 'error', message: 'stopped with requests in flight' });
    frontend.close();
  });

  it('during the start ends the daemon once it has started', async () => {
    const folder = newFolder();
    const program = new Program(STRATA, ['serve', '--config', writeConfig(folder, nullDisk())], folder);
    await until('the reactor thread', () => threadNames(program.pid).includes('reactor0') || undefined);
    expect((await program.stop()).exitCode).toBe(0);
    expect(isSocket(join(folder, 'run/vm.sock'))).toBe(false);
  });
});

describe('a reactor that dies', () => {
  it('ends the daemon with 1, loudly, and its socket is gone', async () => {
    const folder = newFolder();
    const program = fileURLToPath(new URL('serve-dying-reactor.mjs', import.meta.url));
    const serving = await Program.serving(program, [writeConfig(folder, nullDisk())], folder);
    const ended = await serving.stop('SIGUSR1');
    expect(ended.exitCode).toBe(1);
    expect(serving.log.at(-1)).toMatchObject({
      level: 'fatal',
      message: 'a reactor died',
      reactor: 'reactor0',
      error: 'an assertion of ours failed',
    });
    expect(isSocket(join(folder, 'run/vm.sock'))).toBe(false);
  });
});

function threadNames(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).map((thread) =>
    readFileSync(`/proc/${pid}/task/${thread}/comm`, 'utf8').trim(),
  );
}

/** Inodes of the TCP sockets a process listens on. */
function listeningPorts(pid: number): string[] {
  const LISTEN = '0A';
  const listening = ['tcp', 'tcp6'].flatMap((file) =>
    readFileSync(`/proc/net/${file}`, 'utf8')
      .split('\n')
      .map((line) => line.trim().split(/\s+/))
      .filter((columns) => columns[3] === LISTEN)
      .map((columns) => `socket:[${columns[9]}]`),
  );
  const owned = readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`));
  return owned.filter((target) => listening.includes(target));
}
