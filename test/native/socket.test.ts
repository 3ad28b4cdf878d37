/**
 * Goal: unix sockets carry bytes and descriptors without losing or leaking any, and their files have exactly the mode asked for.
 *
 * Method: real sockets in this process; descriptors are counted in /proc/self/fd.
 */
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import { Arena, EAGAIN, EINVAL, check, checkObject, native } from '../../native/index.js';
import { closesOnExec, openDescriptors } from '../support/descriptors.js';

const E2BIG = 7;
const ENOENT = 2;
const ENOTSOCK = 88;
const EPIPE = 32;
const EADDRINUSE = 98;
const ECONNREFUSED = 111;
const ENAMETOOLONG = 36;
/** What the kernel takes in one message. */
const DESCRIPTORS_MAX = 253;
const none = new Int32Array(0);

const arena = new Arena(2 ** 31);
const BYTES = 2 ** 20;
const memory = arena.allocate(BYTES);
const address = arena.baseAddress + memory;
const bytes = Buffer.from(arena.buffer, memory, BYTES);
const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));

/** Every test closes what it opened: seen after it. */
beforeEach(() => {
  const before = openDescriptors();
  return () => expect(openDescriptors()).toEqual(before);
});

afterAll(() => rmSync(folder, { recursive: true }));

function withPair(action: (one: number, two: number) => void): void {
  const [one, two] = checkObject(native.socketPair(), 'make a pair');
  action(one, two);
  native.fileClose(one);
  native.fileClose(two);
}

function send(fd: number, text: string, fds: Int32Array = none): number {
  return native.socketSend(fd, address, bytes.write(text), fds);
}

interface Received {
  readonly outcome: number;
  readonly text: string;
  readonly fds: number[];
  readonly isCut: boolean;
}

/** @param room descriptors that fit @param length bytes that fit */
function receive(fd: number, room = 8, length = 4096): Received {
  const fds = new Int32Array(room).fill(-1);
  const counts = new Int32Array(2).fill(-1);
  const outcome = native.socketReceive(fd, address + 4096, length, fds, counts);
  const text = bytes.toString('latin1', 4096, 4096 + Math.max(outcome, 0));
  return { outcome, text, fds: [...fds.subarray(0, counts[0])], isCut: counts[1] === 1 };
}

const close = (fds: readonly number[]): void => fds.forEach((fd) => native.fileClose(fd));
const eventfds = (count: number): Int32Array => Int32Array.from({ length: count }, () => native.eventfdCreate());

describe('bytes', () => {
  it('go through, both ways, in order and in parts', () => {
    withPair((one, two) => {
      expect(receive(one).outcome).toBe(-EAGAIN);
      expect(send(one, 'hello ')).toBe(6);
      expect(send(one, 'world')).toBe(5);
      expect(receive(two, 8, 4)).toMatchObject({ outcome: 4, text: 'hell', fds: [], isCut: false });
      expect(receive(two).text).toBe('o world');
      send(two, 'back');
      expect(receive(one).text).toBe('back');
    });
  });

  it('end with the peer', () => {
    const [one, two] = checkObject(native.socketPair(), 'make a pair');
    send(one, 'last');
    native.fileClose(one);
    expect(receive(two).text).toBe('last');
    expect(receive(two).outcome).toBe(0);
    // No SIGPIPE: the process lives.
    expect(send(two, 'too late')).toBe(-EPIPE);
    native.fileClose(two);
  });

  it('that find no room are not waited for', () => {
    withPair((one, two) => {
      let sent = 0;
      for (let outcome = 1; outcome > 0; sent += Math.max(outcome, 0))
        outcome = native.socketSend(one, address, 65536, none);
      expect(native.socketSend(one, address, 65536, none)).toBe(-EAGAIN);
      let received = 0;
      for (let outcome = 1; outcome > 0; received += Math.max(outcome, 0)) outcome = receive(two, 0, 65536).outcome;
      expect(received).toBe(sent);
    });
  });
});

describe('descriptors', () => {
  it('arrive with the bytes they were sent with, and work', () => {
    withPair((one, two) => {
      const [sent] = eventfds(1);
      expect(send(one, 'x', Int32Array.of(sent!))).toBe(1);
      native.eventfdSignal(sent!);
      native.fileClose(sent!);
      const { fds, isCut, text } = receive(two);
      expect([fds.length, isCut, text]).toEqual([1, false, 'x']);
      expect(closesOnExec(fds[0]!)).toBe(true);
      expect(native.eventfdDrain(fds[0]!)).toBe(1);
      close(fds);
    });
  });

  it('arrive in their order, as many as the kernel takes', () => {
    withPair((one, two) => {
      const sent = eventfds(DESCRIPTORS_MAX);
      sent.forEach((fd, i) => {
        for (let n = 0; n <= i % 5; n++) native.eventfdSignal(fd);
      });
      expect(send(one, 'many', sent)).toBe(4);
      close([...sent]);
      const { fds, isCut } = receive(two, DESCRIPTORS_MAX);
      expect([fds.length, isCut]).toEqual([DESCRIPTORS_MAX, false]);
      fds.forEach((fd, i) => expect(native.eventfdDrain(fd)).toBe(1 + (i % 5)));
      close(fds);
    });
  });

  it('that do not fit are closed, and that is told', () => {
    withPair((one, two) => {
      for (const [count, room] of [
        [9, 8],
        [1, 0],
        [100, 3],
        [DESCRIPTORS_MAX, DESCRIPTORS_MAX - 1],
      ] as const) {
        const sent = eventfds(count);
        send(one, 'x', sent);
        close([...sent]);
        const before = openDescriptors().length;
        const received = receive(two, room);
        expect([received.fds.length, received.isCut, received.text]).toEqual([room, true, 'x']);
        expect(openDescriptors().length).toBe(before + room);
        close(received.fds);
      }
    });
  });

  it('beyond what one message takes are refused, and nothing is sent', () => {
    withPair((one, two) => {
      const many = new Int32Array(DESCRIPTORS_MAX + 1).fill(one);
      expect(send(one, 'x', many)).toBe(-E2BIG);
      expect(receive(two).outcome).toBe(-EAGAIN);
    });
  });

  it('that nobody receives are closed with the socket', () => {
    withPair((one) => {
      const sent = eventfds(5);
      send(one, 'x', sent);
      close([...sent]);
    });
  });

  it('stay with their own message', () => {
    withPair((one, two) => {
      const sent = eventfds(2);
      send(one, 'a', sent.subarray(0, 1));
      send(one, 'b', sent.subarray(1));
      send(one, 'c');
      close([...sent]);
      const first = receive(two);
      expect([first.text, first.fds.length]).toEqual(['a', 1]);
      const second = receive(two);
      expect([second.text[0], second.fds.length]).toEqual(['b', 1]);
      close([...first.fds, ...second.fds]);
    });
  });
});

describe('a listening socket', () => {
  const path = join(folder, 'socket');

  it('takes connections and tells who it is', () => {
    const listener = check(native.socketListen(path, 0o600), 'listen');
    expect(native.socketAccept(listener)).toBe(-EAGAIN);
    const client = check(native.socketConnect(path), 'connect');
    const server = check(native.socketAccept(listener), 'accept');
    send(client, 'hello');
    expect(receive(server).text).toBe('hello');
    const self = { pid: process.pid, uid: process.getuid!(), gid: process.getgid!() };
    expect(native.socketPeer(server)).toEqual(self);
    expect(native.socketPeer(client)).toEqual(self);
    for (const fd of [listener, client, server]) expect(closesOnExec(fd)).toBe(true);
    close([server, client, listener]);
    rmSync(path);
  });

  it('has exactly its mode, whatever the umask', () => {
    for (const umask of [0o777, 0o022, 0]) {
      for (const mode of [0o600, 0o660, 0o666]) {
        const previous = process.umask(umask);
        const listener = check(native.socketListen(path, mode), 'listen');
        process.umask(previous);
        expect(statSync(path).mode & 0o7777).toBe(mode);
        native.fileClose(listener);
        rmSync(path);
      }
    }
  });

  it('tells the supplementary groups of who connects', () => {
    const listener = check(native.socketListen(path, 0o600), 'listen');
    const client = check(native.socketConnect(path), 'connect');
    const server = check(native.socketAccept(listener), 'accept');
    const groups = checkObject(native.socketPeerGroups(server), 'read the groups');
    // Node adds the effective group to the list.
    expect(new Set([...groups, process.getegid!()])).toEqual(new Set(process.getgroups!()));
    close([server, client, listener]);
    rmSync(path);
  });

  it('has the group it was given, and exactly its mode all the same', () => {
    // A group that is given away loses the file its set-group-id bit: the mode has to be set afterwards.
    const gid = process.geteuid!() === 0 ? 12345 : process.getgid!();
    const listener = check(native.socketListen(path, 0o2660, gid), 'listen');
    expect(statSync(path)).toMatchObject({ gid, uid: process.geteuid!() });
    expect(statSync(path).mode & 0o7777).toBe(0o2660);
    native.fileClose(listener);
    rmSync(path);
  });

  it('does not take the place of anything', () => {
    const listener = check(native.socketListen(path, 0o600), 'listen');
    expect(native.socketListen(path, 0o600)).toBe(-EADDRINUSE);
    native.fileClose(listener);
    // A socket that nobody listens on any more stays, too: removing it is the caller's decision.
    expect(native.socketListen(path, 0o600)).toBe(-EADDRINUSE);
    expect(native.socketConnect(path)).toBe(-ECONNREFUSED);
    rmSync(path);
    writeFileSync(path, 'a file');
    expect(native.socketListen(path, 0o600)).toBe(-EADDRINUSE);
    expect(statSync(path).isFile()).toBe(true);
    rmSync(path);
  });

  it('that cannot be made leaves no file', () => {
    expect(native.socketListen(join(folder, 'x'.repeat(120)), 0o600)).toBe(-ENAMETOOLONG);
    expect(native.socketConnect(join(folder, 'x'.repeat(120)))).toBe(-ENAMETOOLONG);
    expect(native.socketListen(join(folder, 'nowhere', 'socket'), 0o600)).toBe(-ENOENT);
    expect(native.socketConnect(path)).toBe(-ENOENT);
    expect(existsSync(path)).toBe(false);
  });
});

describe('what is no socket', () => {
  it('is told', () => {
    const [fd] = eventfds(1);
    expect(native.socketAccept(fd!)).toBe(-ENOTSOCK);
    expect(native.socketPeer(fd!)).toBe(-ENOTSOCK);
    expect(native.socketPeerGroups(fd!)).toBe(-ENOTSOCK);
    expect(send(fd!, 'x')).toBe(-ENOTSOCK);
    expect(receive(fd!).outcome).toBe(-ENOTSOCK);
    native.fileClose(fd!);
    withPair((one) => expect(native.socketAccept(one)).toBe(-EINVAL));
  });
});

describe('a socket made by others', () => {
  it('is made non-blocking', () => {
    const O_NONBLOCK = 0o4000;
    withPair((one) => {
      expect(native.socketSetNonblocking(one)).toBe(0);
      expect(native.fileFlags(one) & O_NONBLOCK).toBe(O_NONBLOCK);
    });
    expect(native.socketSetNonblocking(99999)).toBeLessThan(0);
  });
});
