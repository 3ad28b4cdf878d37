/**
 * Goal: the config decides who gets at a disk's socket: its group and mode, its folder, who may connect, and how long somebody may connect
 * and say nothing.
 *
 * Method: the compiled program on real sockets. Clients of other users are processes of their own, which takes root to make.
 */
import { spawnSync } from 'node:child_process';
import { chmodSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { MessageId, Status, encodeMessage } from '../frontend/protocol.js';
import { canBeOthers, connectAs } from '../support/stranger.js';
import type { Identity } from '../support/stranger.js';
import { Program, STRATA, newFolder, runToEnd, until, writeConfig } from './programs.js';

const STRANGER: Identity = { uid: 7001, gid: 7001 };

/** @param settings more lines of the controller */
function oneDisk(...settings: string[]): string {
  return [
    'bdevs: [{name: d, module: malloc, size: 1MiB}]',
    'controllers:',
    '  - name: vm',
    '    bdev: d',
    '    socket: run/vm.sock',
    ...settings.map((line) => `    ${line}`),
    'metrics: {listen: "127.0.0.1:0"}',
  ].join('\n');
}

async function serve(folder: string, ...settings: string[]): Promise<Program> {
  return Program.serving(STRATA, ['serve', '--config', writeConfig(folder, oneDisk(...settings))], folder);
}

async function metric(program: Program, name: string): Promise<number> {
  const text = await (await fetch(`${await program.url()}/metrics`)).text();
  const line = text.split('\n').find((candidate) => candidate.startsWith(`strata_controller_${name}{controller="vm"}`));
  if (line === undefined) throw new Error(`no metric ${name}`);
  return Number(line.split(' ')[1]);
}

/** What becomes of somebody else who connects: `answered`, `closed`, or the error. */
function tryAs(identity: Identity, socket: string): Promise<string> {
  return connectAs(identity, socket, encodeMessage(MessageId.getFeatures, Buffer.alloc(0)));
}

async function serves(socket: string): Promise<boolean> {
  const frontend = await Frontend.connect(socket);
  const { status } = await frontend.queue.read(0, 512);
  frontend.close();
  return status === Status.ok;
}

describe('allow', () => {
  it('lets in the users of the list, by name or number, and counts and names the others', async () => {
    const folder = newFolder();
    const program = await serve(folder, 'allow: {users: [nobody, 4242]}');
    const socket = join(folder, 'run/vm.sock');
    for (let i = 0; i < 2; i++) {
      const frontend = Frontend.open(socket);
      await frontend.connection.disconnected();
      frontend.close();
    }
    expect(await metric(program, 'peers_denied_total')).toBe(2);
    expect(await metric(program, 'sessions_total')).toBe(0);
    const word = program.log.find((entry) => entry.message.startsWith('a front-end was denied'));
    expect(word).toMatchObject({ level: 'warn', controller: 'vm', pid: process.pid, uid: process.getuid!() });
  });

  it('takes names of users and groups from this host', async () => {
    const folder = newFolder();
    const group = process.getgid!();
    const name = spawnSync('id', ['-un'], { encoding: 'utf8' }).stdout.trim();
    await serve(folder, `allow: {users: [${name}]}`);
    expect(await serves(join(folder, 'run/vm.sock'))).toBe(true);
    const other = newFolder();
    const groupName = spawnSync('id', ['-gn'], { encoding: 'utf8' }).stdout.trim();
    await serve(other, `allow: {groups: [${groupName}, ${group + 1}]}`);
    expect(await serves(join(other, 'run/vm.sock'))).toBe(true);
  });

  it('tells of names that this host does not know, all of them', () => {
    const folder = newFolder();
    const settings = [
      'allow:',
      '  users: [root, no-such-user]',
      '  groups: [no-such-group]',
      'socket_group: none-such',
    ];
    const ended = runToEnd(STRATA, ['serve', '-c', writeConfig(folder, oneDisk(...settings))], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/yaml:7: controllers\[0\]\.allow\.users\[1\]: there is no user no-such-user\n {4}-> /);
    expect(ended.stderr).toMatch(/yaml:8: controllers\[0\]\.allow\.groups\[0\]: there is no group no-such-group\n/);
    expect(ended.stderr).toMatch(/yaml:9: controllers\[0\]\.socket_group: there is no group none-such\n/);
    expect(ended.stderr.match(/->/g)).toHaveLength(3);
  });

  it('is, when left out, the user of the daemon, root, and the group of the socket, whatever the mode', async (context) => {
    if (!canBeOthers) context.skip('takes root: it runs clients as other users');
    const folder = newFolder();
    const program = await serve(folder, 'socket_mode: "0666"', 'socket_group: 7002');
    const socket = join(folder, 'run/vm.sock');
    chmodSync(folder, 0o755);
    chmodSync(join(folder, 'run'), 0o755);
    expect(await serves(socket)).toBe(true);
    expect(await tryAs(STRANGER, socket)).toBe('closed');
    expect(await tryAs({ ...STRANGER, groups: [7002] }, socket)).toBe('answered');
    expect(await tryAs({ uid: 7001, gid: 7002 }, socket)).toBe('answered');
    expect(await metric(program, 'peers_denied_total')).toBe(1);
  });
});

describe('socket_group', () => {
  it('owns the socket, and the folder that is made for it', async (context) => {
    if (!canBeOthers) context.skip('takes root: it gives files to a group it is not in');
    const folder = newFolder();
    await serve(folder, 'socket_group: 7002');
    const socket = join(folder, 'run/vm.sock');
    for (const [path, mode] of [
      [socket, 0o660],
      [join(folder, 'run'), 0o750],
    ] as const) {
      expect(statSync(path)).toMatchObject({ uid: 0, gid: 7002 });
      expect(statSync(path).mode & 0o7777, path).toBe(mode);
    }
    expect(statSync(folder).gid).toBe(0);
    // Folder and mode alone keep others out.
    chmodSync(folder, 0o755);
    expect(await tryAs(STRANGER, socket)).toBe('EACCES');
    expect(await tryAs({ ...STRANGER, groups: [7002] }, socket)).toBe('answered');
  });

  it('has to be one of the groups of the daemon', (context) => {
    if (!canBeOthers) context.skip('takes root: it runs a part of the daemon as another user');
    // The folder of the program may be closed to others: it is loaded before the identity is given up.
    const script = `
      const { checkAccess } = await import(${JSON.stringify(new URL('../../dist/src/target/access.js', import.meta.url))});
      process.setgroups([7003]); process.setgid(7001); process.setuid(7001);
      for (const socketGroup of [7001, 7002, 7003])
        checkAccess({ allow: null, socketGroup }, ['c'], { add: (...problem) => console.log(problem.join('|')) });`;
    const ended = spawnSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' });
    expect(ended.stderr).toBe('');
    expect(ended.stdout).toMatch(/^c,socket_group\|this user is not in the group 7002\|add it to the group.*\n$/);
  });
});

describe('handshake_timeout_s', () => {
  it('sends away who connects and says nothing, and who stops in a message, and nobody else', async () => {
    const folder = newFolder();
    const program = await serve(folder, 'handshake_timeout_s: 0.2');
    const socket = join(folder, 'run/vm.sock');
    const silent = Frontend.open(socket, { timeoutMs: 20_000 });
    await silent.connection.disconnected();
    silent.close();
    const halting = Frontend.open(socket, { timeoutMs: 20_000 });
    await halting.negotiate();
    await halting.connection.send(Buffer.alloc(5, 1));
    await halting.connection.disconnected();
    halting.close();
    const frontend = await Frontend.connect(socket);
    await until('both in the metrics', async () =>
      (await metric(program, 'message_timeouts_total')) === 2 ? true : undefined,
    );
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect((await frontend.queue.read(0, 512)).status).toBe(Status.ok);
    expect(await metric(program, 'sessions_total')).toBe(3);
    frontend.close();
  });
});
