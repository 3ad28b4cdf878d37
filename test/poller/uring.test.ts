/**
 * Goal: what is queued on the ring is done by the kernel and delivered once, to whom it belongs; a full queue and an overflowing
 * one lose nothing; tables say when they are full; and a closed ring holds on to nothing.
 *
 * Method: the kernel's io_uring, on temporary files, memfds, sockets and eventfds.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  Arena,
  EAGAIN,
  ECANCELED,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  O_CREAT,
  O_RDONLY,
  O_RDWR,
  POLLHUP,
  POLLIN,
  RWF_DSYNC,
  SystemError,
  check,
  checkObject,
  native,
} from '../../native/index.js';
import { RING_CQE_MORE } from '../../src/poller/ring.js';
import type { RingOp, RingRange } from '../../src/poller/ring.js';
import { Uring } from '../../src/poller/uring.js';
import type { UringOptions } from '../../src/poller/uring.js';
import { fresh } from '../support/bytes.js';

const EBADF = 9;
const EFAULT = 14;
const FILES_MAX = 1024;
const BUFFERS_MAX = 1024;
const NONE = new Int32Array(0);

/** Takes completions down. */
const range = (address: number, lengthBytes: number, offsetBytes: number): RingRange => ({
  address,
  lengthBytes,
  offsetBytes,
});

class Recorder implements RingOp {
  readonly results: number[] = [];
  readonly flags: number[] = [];

  onCompletion(result: number, flags: number): void {
    this.results.push(result);
    this.flags.push(flags);
  }
}

const arena = new Arena(2 ** 35);
const BYTES = 2 ** 20;
const memory = arena.allocate(BYTES);
const bytes = Buffer.from(arena.buffer, memory, BYTES);

let ring: Uring;
let folder: string;
let descriptors: number[];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  descriptors = [];
  ring = new Uring(arena);
});

afterEach(() => {
  ring.close();
  for (const fd of descriptors) native.fileClose(fd);
  rmSync(folder, { recursive: true });
});

function reopen(options: UringOptions): void {
  ring.close();
  ring = new Uring(arena, options);
}

/** Remembers a descriptor, to close it after the test. */
function held(fd: number, what = 'make a descriptor'): number {
  descriptors.push(check(fd, what));
  return fd;
}

const openFile = (flags = O_RDWR | O_CREAT): number =>
  held(native.fileOpen(join(folder, 'file'), flags, 0o600), 'open');

function recorder(): { slot: number; recorder: Recorder } {
  const recorder = new Recorder();
  return { slot: ring.attach(recorder), recorder };
}

/** Waits until nothing one-shot is in flight. */
function settle(): void {
  for (let i = 0; ring.inflight > 0; i++) {
    expect(i, 'waits until all has completed').toBeLessThan(10_000);
    ring.wait(100_000);
    ring.reap();
  }
}

/** Runs one request; returns its result. */
function run(queue: (slot: number) => boolean): number {
  const { slot, recorder: one } = recorder();
  expect(queue(slot)).toBe(true);
  settle();
  ring.detach(slot);
  expect(one.results).toHaveLength(1);
  return one.results[0]!;
}

/** A table of iovecs at the end of `memory` that points to pieces of it. */
function iovecs(pieces: readonly [offset: number, length: number][]): number {
  const table = memory + BYTES - 65536;
  pieces.forEach(([offset, length], i) => {
    const address = arena.baseAddress + memory + offset;
    arena.view32(table + i * 16, 4).set([address % 2 ** 32, Math.floor(address / 2 ** 32), length, 0]);
  });
  return table;
}

describe('requests', () => {
  it('read and write one buffer, at any place of a file', () => {
    const file = ring.registerFile(openFile());
    for (const offset of [0, 4096, 2 ** 31 + 512, 2 ** 32, 2 ** 40 + 12345]) {
      const data = fresh(4096);
      data.copy(bytes);
      expect(run((slot) => ring.write(slot, file, range(memory, 4096, offset), 0))).toBe(4096);
      expect(run((slot) => ring.read(slot, file, range(memory + 8192, 4096, offset), 0))).toBe(4096);
      expect(bytes.subarray(8192, 12288).equals(data)).toBe(true);
    }
    expect(run((slot) => ring.write(slot, file, range(memory, 4096, 0), RWF_DSYNC))).toBe(4096);
    expect(run((slot) => ring.fdatasync(slot, file))).toBe(0);
  });

  it('read and write many buffers', () => {
    const file = ring.registerFile(openFile());
    const data = fresh(6000);
    data.copy(bytes, 100);
    const from = iovecs([
      [100, 1000],
      [1100, 4999],
      [6099, 1],
    ]);
    expect(run((slot) => ring.writev(slot, file, range(from, 0, 2 ** 33), 3, 0))).toBe(6000);
    const to = iovecs([
      [20000, 1],
      [30000, 3000],
      [40000, 2999],
    ]);
    expect(run((slot) => ring.readv(slot, file, range(to, 0, 2 ** 33), 3, 0))).toBe(6000);
    const read = Buffer.concat([
      bytes.subarray(20000, 20001),
      bytes.subarray(30000, 33000),
      bytes.subarray(40000, 42999),
    ]);
    expect(read.equals(data)).toBe(true);
  });

  it('punch holes', () => {
    const fd = openFile();
    const file = ring.registerFile(fd);
    bytes.fill(1, 0, 65536);
    expect(run((slot) => ring.write(slot, file, range(memory, 65536, 2 ** 32), 0))).toBe(65536);
    const mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    expect(run((slot) => ring.fallocate(slot, file, range(0, 8192, 2 ** 32 + 4096), mode))).toBe(0);
    expect(run((slot) => ring.read(slot, file, range(memory + 65536, 65536, 2 ** 32), 0))).toBe(65536);
    const expected = Buffer.alloc(65536, 1).fill(0, 4096, 12288);
    expect(bytes.subarray(65536, 131072).equals(expected)).toBe(true);
    // Longer than 32 bits hold.
    expect(run((slot) => ring.fallocate(slot, file, range(0, 2 ** 34, 0), mode))).toBe(0);
    expect(run((slot) => ring.read(slot, file, range(memory, 65536, 2 ** 32), 0))).toBe(65536);
    expect(bytes.subarray(0, 65536).every((byte) => byte === 0)).toBe(true);
  });

  it('say what they moved at the end of a file, and why they failed', () => {
    const fd = openFile();
    native.fileTruncate(fd, 1000);
    const file = ring.registerFile(fd);
    expect(run((slot) => ring.read(slot, file, range(memory, 4096, 0), 0))).toBe(1000);
    expect(run((slot) => ring.read(slot, file, range(memory, 4096, 1000), 0))).toBe(0);
    const readOnly = ring.registerFile(openFile(O_RDONLY));
    expect(run((slot) => ring.write(slot, readOnly, range(memory, 512, 0), 0))).toBe(-EBADF);
    ring.unregisterFile(readOnly);
    expect(run((slot) => ring.read(slot, readOnly, range(memory, 512, 0), 0))).toBe(-EBADF);
    const nowhere = arena.allocate(4096);
    arena.release(nowhere);
    expect(run((slot) => ring.read(slot, file, range(nowhere, 512, 0), 0))).toBe(-EFAULT);
  });

  it('into memory whose file was truncated fail, and the process lives', () => {
    const guest = held(native.memfdCreate('guest', 8192));
    const region = arena.mapFile(guest, 0, 8192);
    native.fileTruncate(guest, 0);
    const fd = openFile();
    native.fileTruncate(fd, 4096);
    const file = ring.registerFile(fd);
    expect(run((slot) => ring.read(slot, file, range(region, 4096, 0), 0))).toBe(-EFAULT);
    expect(run((slot) => ring.write(slot, file, range(region, 4096, 0), 0))).toBe(-EFAULT);
    arena.release(region);
  });

  it('read with threads of the kernel what is long, and other things as ever', () => {
    reopen({ threadedReads: true });
    const file = ring.registerFile(openFile());
    const half = BYTES / 2;
    const data = fresh(half);
    data.copy(bytes);
    expect(run((slot) => ring.write(slot, file, range(memory, half, 0), 0))).toBe(half);
    for (const length of [4096, 128 * 1024, half]) {
      bytes.fill(0, half);
      expect(run((slot) => ring.read(slot, file, range(memory + half, length, 0), 0))).toBe(length);
      expect(bytes.subarray(half, half + length).equals(data.subarray(0, length))).toBe(true);
    }
    expect(run((slot) => ring.read(slot, file, range(memory + half, half, half), 0))).toBe(0);
    expect(run((slot) => ring.fdatasync(slot, file))).toBe(0);
  });

  it('complete to their own op, many at once', () => {
    const file = ring.registerFile(openFile());
    const ops = Array.from({ length: 300 }, () => recorder());
    ops.forEach(({ slot }, i) => expect(ring.write(slot, file, range(memory, i + 1, i * 512), 0)).toBe(true));
    expect(ring.inflight).toBe(300);
    settle();
    ops.forEach(({ recorder: one }, i) => expect(one.results).toEqual([i + 1]));
  });

  it('reach the kernel when the ring is entered, and cost no system call when there are none', () => {
    const file = ring.registerFile(openFile());
    const { slot, recorder: one } = recorder();
    ring.write(slot, file, range(memory, 512, 0), 0);
    expect(ring.reap()).toBe(0);
    const enters = ring.enters;
    settle();
    expect(one.results).toEqual([512]);
    const after = ring.enters;
    expect(after).toBeGreaterThan(enters);
    for (let i = 0; i < 100; i++) ring.enter();
    expect(ring.enters).toBe(after);
  });
});

describe('a fixed buffer', () => {
  it('is read into and written from', () => {
    const file = ring.registerFile(openFile());
    const index = check(ring.registerBuffer(memory, 65536), 'register a buffer');
    const data = fresh(4096);
    data.copy(bytes, 512);
    expect(run((slot) => ring.writeFixed(slot, file, range(memory + 512, 4096, 8192), RWF_DSYNC, index))).toBe(4096);
    expect(run((slot) => ring.readFixed(slot, file, range(memory + 16384, 4096, 8192), index))).toBe(4096);
    expect(bytes.subarray(16384, 20480).equals(data)).toBe(true);
    // What lies outside is refused.
    expect(run((slot) => ring.readFixed(slot, file, range(memory + 65536 - 512, 4096, 8192), index))).toBe(-EFAULT);
    ring.unregisterBuffer(index);
    expect(run((slot) => ring.readFixed(slot, file, range(memory, 4096, 8192), index))).toBe(-EFAULT);
  });

  it('that cannot be had is said to, and others can', () => {
    const nowhere = arena.allocate(4096);
    arena.release(nowhere);
    expect(ring.registerBuffer(nowhere, 4096)).toBe(-EFAULT);
    const index = check(ring.registerBuffer(memory, 4096), 'register a buffer');
    ring.unregisterBuffer(index);
    expect(ring.registerBuffer(memory, 4096)).toBe(index);
  });

  it('has its place in a table of bounded length', () => {
    const indices = Array.from({ length: BUFFERS_MAX }, () => check(ring.registerBuffer(memory, 4096), 'register'));
    expect(new Set(indices).size).toBe(BUFFERS_MAX);
    expect(ring.registerBuffer(memory, 4096)).toBeLessThan(0);
    ring.unregisterBuffer(indices[7]!);
    expect(ring.registerBuffer(memory, 4096)).toBe(indices[7]);
  });
});

describe('the file table', () => {
  it('is bounded, and says when it is full', () => {
    const fd = openFile();
    const files = Array.from({ length: FILES_MAX }, () => ring.registerFile(fd));
    expect(new Set(files).size).toBe(FILES_MAX);
    expect(() => ring.registerFile(fd)).toThrow(SystemError);
    ring.unregisterFile(files[500]!);
    expect(ring.registerFile(fd)).toBe(files[500]);
  });

  it('keeps its place when a descriptor is refused', () => {
    const fd = openFile();
    const file = ring.registerFile(fd);
    ring.unregisterFile(file);
    expect(() => ring.registerFile(99999)).toThrow('EBADF');
    expect(ring.registerFile(fd)).toBe(file);
  });
});

describe('a full queue', () => {
  it('of submissions is handed to the kernel to make room', () => {
    reopen({ entries: 8, cqEntries: 4096 });
    const file = ring.registerFile(openFile());
    const ops = Array.from({ length: 1000 }, () => recorder());
    for (const { slot } of ops) expect(ring.write(slot, file, range(memory, 512, 0), 0)).toBe(true);
    settle();
    for (const { recorder: one } of ops) expect(one.results).toEqual([512]);
  });

  it('of completions loses none, however late they are reaped', () => {
    reopen({ entries: 64, cqEntries: 128 });
    const file = ring.registerFile(openFile());
    const ops = Array.from({ length: 2000 }, () => recorder());
    // A request that the queue has no room for is tried again, as the bdev core does.
    let refused = 0;
    for (const { slot } of ops) {
      for (let tries = 0; !ring.write(slot, file, range(memory, 512, 0), 0); tries++) {
        refused++;
        expect(tries).toBeLessThan(100);
        ring.wait(1000);
        ring.reap();
      }
      ring.enter();
    }
    settle();
    for (const { recorder: one } of ops) expect(one.results).toEqual([512]);
    expect(refused).toBeLessThan(2000);
  });
});

describe('a poll', () => {
  it('tells of each event, until it is cancelled', () => {
    const fd = held(native.eventfdCreate());
    const { slot, recorder: one } = recorder();
    expect(ring.poll(slot, fd, POLLIN)).toBe(true);
    expect(ring.inflight).toBe(0);
    ring.enter();
    expect(ring.reap()).toBe(0);
    for (let i = 1; i <= 5; i++) {
      native.eventfdSignal(fd);
      expect(ring.wait(1_000_000)).toBe(true);
      ring.reap();
      expect(native.eventfdDrain(fd)).toBe(1);
      expect(one.results).toHaveLength(i);
      expect(one.results.at(-1)! & POLLIN).toBe(POLLIN);
      expect(one.flags.at(-1)! & RING_CQE_MORE).toBe(RING_CQE_MORE);
    }
    expect(ring.inflight).toBe(0);
    expect(ring.cancelPoll(slot)).toBe(true);
    ring.enter();
    ring.reap();
    expect(one.results.slice(5)).toEqual([-ECANCELED]);
    expect(one.flags.at(-1)! & RING_CQE_MORE).toBe(0);
    native.eventfdSignal(fd);
    ring.enter();
    ring.reap();
    expect(one.results).toHaveLength(6);
  });

  it('tells of what is there already, and of a peer that goes', () => {
    const [mine, theirs] = checkObject(native.socketPair(), 'make a pair');
    held(mine);
    native.socketSend(theirs, arena.baseAddress + memory, 1, NONE);
    const { slot, recorder: one } = recorder();
    ring.poll(slot, mine, POLLIN);
    ring.wait(1_000_000);
    ring.reap();
    expect(one.results.at(-1)! & POLLIN).toBe(POLLIN);
    native.fileClose(theirs);
    ring.wait(1_000_000);
    ring.reap();
    expect(one.results.at(-1)! & POLLHUP).toBe(POLLHUP);
    ring.cancelPoll(slot);
    ring.enter();
    ring.reap();
  });
});

describe('a poll that is cancelled', () => {
  // The kernel knows of the wake-up and has not told yet: it does when it is entered.
  it('lets go of its file, also when it is just being woken', () => {
    for (let i = 0; i < 100; i++) {
      const [mine, theirs] = checkObject(native.socketPair(), 'make a pair');
      const { slot } = recorder();
      ring.poll(slot, mine, POLLIN);
      ring.enter();
      native.socketSend(theirs, arena.baseAddress + memory, 1, NONE);
      ring.cancelPoll(slot);
      ring.detach(slot);
      native.fileClose(mine);
      ring.enter();
      ring.reap();
      // Closed with something unread: the other end hears of a reset, or of the end.
      const outcome = native.socketReceive(theirs, arena.baseAddress + memory, 1, new Int32Array(1), new Int32Array(2));
      expect(outcome).not.toBe(-EAGAIN);
      native.fileClose(theirs);
    }
  });
});

describe('a slot that is given back', () => {
  it('drops the completion to come, also when another op has taken it', () => {
    const path = join(folder, 'pipe');
    execFileSync('mkfifo', [path]);
    const pipe = held(native.fileOpen(path, O_RDWR, 0), 'open the pipe');
    const file = ring.registerFile(pipe);
    const first = recorder();
    ring.read(first.slot, file, range(memory, 16, 0), 0);
    ring.enter();
    expect([ring.reap(), ring.inflight]).toEqual([0, 1]);
    ring.detach(first.slot);
    const again = recorder();
    expect(again.slot).toBe(first.slot);
    // The read ends only now.
    bytes.write('data', 4096);
    expect(run((slot) => ring.write(slot, file, range(memory + 4096, 4, 0), 0))).toBe(4);
    expect([first.recorder.results, again.recorder.results]).toEqual([[], []]);
    expect(bytes.toString('latin1', 0, 4)).toBe('data');
  });

  it('drops the events of a poll', () => {
    const fd = held(native.eventfdCreate());
    const first = recorder();
    ring.poll(first.slot, fd, POLLIN);
    ring.enter();
    ring.detach(first.slot);
    const again = recorder();
    expect(again.slot).toBe(first.slot);
    native.eventfdSignal(fd);
    expect(ring.wait(1_000_000)).toBe(true);
    expect(ring.reap()).toBe(1);
    expect([first.recorder.results, again.recorder.results]).toEqual([[], []]);
  });

  it('drops one-shot completions that are posted and not yet delivered', () => {
    const file = ring.registerFile(openFile());
    const { slot, recorder: first } = recorder();
    ring.write(slot, file, range(memory, 512, 0), 0);
    ring.wait(1_000_000);
    ring.detach(slot);
    const again = recorder();
    expect(again.slot).toBe(slot);
    settle();
    expect([first.results, again.recorder.results]).toEqual([[], []]);
    expect(run((other) => ring.write(other, file, range(memory, 100, 0), 0))).toBe(100);
    ring.write(again.slot, file, range(memory, 200, 0), 0);
    settle();
    expect(again.recorder.results).toEqual([200]);
  });
});

describe('waiting', () => {
  it('ends when its time is up, and says that nothing came', () => {
    expect(ring.wait(2000)).toBe(false);
    expect(ring.wait(1)).toBe(false);
    expect(ring.reap()).toBe(0);
  });

  it('does not begin when a completion is there', () => {
    const file = ring.registerFile(openFile());
    const { slot, recorder: one } = recorder();
    ring.write(slot, file, range(memory, 512, 0), 0);
    ring.wait(1_000_000);
    // Not reaped yet: another wait, for hours, must come back.
    expect(ring.wait(1e10)).toBe(true);
    ring.reap();
    expect(one.results).toEqual([512]);
  });

  it('ends with an event on a polled descriptor', () => {
    const fd = held(native.eventfdCreate());
    const { slot } = recorder();
    ring.poll(slot, fd, POLLIN);
    native.eventfdSignal(fd);
    expect(ring.wait(1e10)).toBe(true);
    ring.reap();
    ring.cancelPoll(slot);
    ring.enter();
    ring.reap();
  });
});

describe('closing', () => {
  it('lets go of the files that were registered', () => {
    const other = new Uring(arena);
    const [mine, theirs] = checkObject(native.socketPair(), 'make a pair');
    held(mine);
    other.registerFile(theirs);
    native.fileClose(theirs);
    const receive = (): number =>
      native.socketReceive(mine, arena.baseAddress + memory, 1, new Int32Array(1), new Int32Array(2));
    expect(receive()).toBe(-EAGAIN);
    other.close();
    // The kernel lets go in the background.
    for (let i = 0; i < 200 && receive() !== 0; i++) ring.wait(10_000);
    expect(receive()).toBe(0);
  });

  it('may be done as often as rings are made', () => {
    const used = arena.usedBytes;
    for (let i = 0; i < 40; i++) {
      const other = new Uring(arena, { entries: 8, cqEntries: 16 });
      other.enter();
      other.close();
    }
    expect(arena.usedBytes).toBe(used);
  });
});
