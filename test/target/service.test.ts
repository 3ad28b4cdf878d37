/**
 * Goal: the daemon is a good service: the manager hears when it is ready, alive and stopping; the journal gets priorities; a terminal
 * gets text; nobody can fill the log.
 *
 * Method: a stand-in for the service manager receives the daemon's datagrams; formatting and rate limits are tried by themselves.
 */
import { spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { LogFunction } from '../../src/vhost-user/log.js';
import { formatEntry } from '../../src/target/log.js';
import { limitRate } from '../../src/target/rate-limit.js';
import { sendDatagram } from '../../src/target/system.js';
import { SimClock } from '../support/sim-clock.js';
import { Program, STRATA, newFolder, until, writeConfig } from './programs.js';

const CONFIG =
  'bdevs: [{name: d, module: null, size: 1MiB}]\ncontrollers: [{name: vm, bdev: d, socket: s}]\nmetrics: {listen: off}\n';

/** Prints each datagram that arrives at a unix socket as a line of JSON. Node has no datagram sockets of its own. */
const RECEIVER = `
import json, socket, sys
name = sys.argv[1]
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("\\0" + name[1:] if name[0] == "@" else name)
print(json.dumps("bound"), flush=True)
while True: print(json.dumps(receiver.recv(4096).decode()), flush=True)
`;

/** Runs `use` while datagrams to `name` are collected. */
async function receiving(name: string, use: (datagrams: () => string[]) => Promise<void>): Promise<void> {
  const receiver = spawn('python3', ['-c', RECEIVER, name], { stdio: ['ignore', 'pipe', 'inherit'] });
  let output = '';
  receiver.stdout.on('data', (data: Buffer) => (output += data.toString()));
  const lines = (): string[] =>
    output
      .split('\n')
      .slice(0, -1)
      .map((line) => JSON.parse(line) as string);
  try {
    await until('the receiver', () => (lines().length > 0 ? true : undefined));
    await use(() => lines().slice(1));
  } finally {
    receiver.kill();
  }
}

describe('the service manager', () => {
  it('hears when the daemon is ready, alive and stopping', async () => {
    const folder = newFolder();
    const socket = join(folder, 'notify');
    await receiving(socket, async (datagrams) => {
      const env = { NOTIFY_SOCKET: socket, WATCHDOG_USEC: '1000000' };
      const program = await Program.serving(STRATA, ['serve', '-c', writeConfig(folder, CONFIG)], folder, { env });
      await until('READY', () => (datagrams().length > 0 ? true : undefined));
      expect(datagrams()[0]).toBe('READY=1\nSTATUS=serving 1 disk');
      await until('a sign of life', () => datagrams().find((text) => text === 'WATCHDOG=1'));
      expect((await program.stop()).exitCode).toBe(0);
      expect(datagrams().at(-1)).toMatch(/^STOPPING=1\nSTATUS=draining/);
    });
  });

  it('hears nothing when the start fails', async () => {
    const folder = newFolder();
    const socket = join(folder, 'notify');
    await receiving(socket, async (datagrams) => {
      const config = writeConfig(folder, CONFIG.replace('socket: s}', 'socket: /proc/no/s}'));
      const program = new Program(STRATA, ['serve', '-c', config], folder, { env: { NOTIFY_SOCKET: socket } });
      expect((await program.ended).exitCode).toBe(1);
      expect(datagrams()).toEqual([]);
    });
  });

  it('may listen on an abstract name', async () => {
    const name = `@strata-test-${process.pid}`;
    await receiving(name, async (datagrams) => {
      expect(sendDatagram(name, 'READY=1')).toBe(0);
      expect(await until('the datagram', () => datagrams()[0])).toBe('READY=1');
    });
    expect(sendDatagram('/nowhere/at/all', 'x')).toBe(2);
  });
});

describe('the memory of the daemon', () => {
  // Whoever may trace a process may read its memory, and root may trace any: this right is dropped on both sides.
  const through = process.getuid?.() === 0 ? ['setpriv', '--bounding-set=-sys_ptrace'] : [];

  /** Whether a process of the same user may look into it, as the writer of a core dump does. */
  async function isOpen(config: string): Promise<boolean> {
    const folder = newFolder();
    const program = await Program.serving(STRATA, ['serve', '-c', writeConfig(folder, config)], folder, { through });
    const [command = '', ...args] = [...through, 'readlink', '-v', `/proc/${program.pid}/exe`];
    const { status, stderr } = spawnSync(command, args, { encoding: 'utf8' });
    if (status !== 0) expect(stderr).toMatch(/Permission denied/);
    return status === 0;
  }

  it('is closed to others of its user, and to core dumps', async () => {
    expect(await isOpen(CONFIG)).toBe(false);
  });

  it('is open when the config says so', async () => {
    expect(await isOpen(`${CONFIG}core_dumps: true\n`)).toBe(true);
  });
});

describe('the log', () => {
  it('is a line of text for people', () => {
    const entry = {
      level: 'info',
      time: 'T',
      message: 'front-end connected',
      controller: 'vm',
      pid: 7,
      why: 'a b',
      at: null,
    };
    expect(formatEntry(entry)).toBe('T info  front-end connected controller=vm pid=7 why="a b" at=null\n');
  });

  it('is text when the config says so, and below the level silent', async () => {
    const folder = newFolder();
    const config = writeConfig(folder, `${CONFIG}log: {format: text, level: warn}\n`);
    const program = new Program(STRATA, ['serve', '-c', config], folder);
    await until('the socket', () => (program.stdout.includes('# QEMU') ? true : undefined));
    program.child.kill('SIGHUP');
    await until('the warning', () => (program.stderr.includes('SIGHUP') ? true : undefined));
    const { stderr } = await program.stop();
    expect(stderr).toMatch(/^\d{4}-\d\d-\d\dT\S+ warn {2}SIGHUP: .*\n$/);
  });
});

describe('limitRate', () => {
  function setUp(): { clock: SimClock; log: LogFunction; written: unknown[] } {
    const clock = new SimClock();
    const written: unknown[] = [];
    const log = limitRate((_level, message, fields) => written.push([message, fields]), clock);
    return { clock, log, written };
  }

  it('lets a burst pass, then one message a second, and counts the rest', () => {
    const { clock, log, written } = setUp();
    for (let i = 0; i < 100; i++) log('warn', `m${i}`);
    expect(written).toHaveLength(20);
    clock.advance(999_000);
    log('warn', 'early');
    expect(written).toHaveLength(20);
    clock.advance(2_000);
    log('warn', 'late', { ring: 1 });
    expect(written.at(-1)).toEqual(['late', { ring: 1, messagesLeftOut: 81 }]);
    clock.advance(1_000_001);
    log('warn', 'next');
    expect(written.at(-1)).toEqual(['next', undefined]);
  });

  it('never saves up more than one burst', () => {
    const { clock, log, written } = setUp();
    clock.advance(86_400e6);
    for (let i = 0; i < 100; i++) log('warn', 'm');
    expect(written).toHaveLength(20);
  });
});
