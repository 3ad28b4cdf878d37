/**
 * Goal: front-ends come, leave and come back in every way real and hostile ones do; one is served at a time, none is lost for
 * good, nobody else is disturbed, and nothing of a session stays behind.
 *
 * Method: controllers on a reactor that is stepped by hand, real sockets. A disk that holds its completions back keeps requests in
 * flight for as long as a test wants. After each test, descriptors and arena are counted.
 */
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { check, native } from '../../native/index.js';
import { Frontend } from '../frontend/frontend.js';
import { MessageId, RequestType, Status, encodeMessage, u32, u64 } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { seededRandom } from '../support/seed.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { ServedDisk, heldDisk, memoryDisk, openDescriptors } from './served-disk.js';
import type { ServedDiskOptions } from './served-disk.js';
import { Wire } from './wire.js';

const read = { type: RequestType.read, sector: 0, inBytes: 4096 };

let disk: ServedDisk;
let descriptorsBefore: number;
let arenaBefore: number;
let rangesBefore: number;

function serve(options: ServedDiskOptions = {}): void {
  disk = new ServedDisk(options);
  countWhatIsThere();
}

function countWhatIsThere(): void {
  descriptorsBefore = openDescriptors();
  arenaBefore = disk.rig.arena.usedBytes;
  rangesBefore = memoryRanges();
}

function expectNothingLeft(): void {
  disk.settle();
  expect(disk.state).toBe('listening');
  expect(memoryRanges()).toBe(rangesBefore);
  expect(openDescriptors()).toBe(descriptorsBefore);
  expect(disk.rig.arena.usedBytes).toBe(arenaBefore);
}

/** Number of guest memory ranges that the reactor knows of. */
function memoryRanges(): number {
  let count = 0;
  const counter = { onMemoryAdded: () => void count++, onMemoryRemoved: () => undefined };
  const { memory } = disk.rig.reactor;
  memory.subscribe(counter);
  memory.unsubscribe(counter);
  return count;
}

/** Whether a front-end is served now. */
async function serves(): Promise<boolean> {
  const frontend = await disk.connect();
  const { status } = await frontend.queue.read(0, 4096);
  frontend.close();
  disk.untilListening();
  return status === Status.ok;
}

afterEach(() => disk.close());

describe('a front-end', () => {
  it('may connect, say nothing and leave, as often as it likes', async () => {
    serve();
    for (let i = 0; i < 200; i++) {
      disk.open().close();
      if (i % 3 === 0) disk.settle(3);
    }
    disk.untilListening();
    expectNothingLeft();
    expect(await serves()).toBe(true);
    expect(disk.sessionFaults).toBe(0);
  });

  it('may probe first: connect, ask, close, and connect again', async () => {
    serve();
    const probe = disk.open();
    await probe.negotiate();
    const config = await probe.blkConfig();
    expect(config.capacitySectors).toBe(16384);
    probe.close();
    const frontend = await disk.connect();
    expect((await frontend.queue.read(0, 512)).status).toBe(Status.ok);
    frontend.close();
    disk.untilListening();
    expectNothingLeft();
  });

  it('leaves nothing behind, wherever in its set-up it leaves', async () => {
    serve();
    const steps: ((frontend: Frontend) => Promise<unknown>)[] = [
      (f) => f.negotiate(),
      (f) => f.shareMemory(),
      (f) => f.tell(MessageId.setVringNum, u32(0, 128)),
      (f) => f.tell(MessageId.setVringBase, u32(0, 0)),
      (f) => f.setQueueAddresses(f.queue),
      (f) => f.tell(MessageId.setVringCall, u64(0), [f.queue.callFd]),
      (f) => f.tell(MessageId.setVringErr, u64(0), [f.queue.errFd]),
      (f) => f.tell(MessageId.setVringKick, u64(0), [f.queue.kickFd]),
      (f) => f.enableQueue(f.queue, true),
      (f) => f.queue.read(0, 4096),
      (f) => f.enableQueue(f.queue, false),
      (f) => f.stopQueue(f.queue),
    ];
    for (let count = 0; count <= steps.length; count++) {
      const frontend = disk.open();
      for (const step of steps.slice(0, count)) await step(frontend);
      frontend.close();
      disk.untilListening();
      expectNothingLeft();
    }
    expect(disk.sessionFaults).toBe(0);
  });

  it('that leaves with requests in flight is waited for, and its memory kept until they are done', async () => {
    serve({ configs: heldDisk() });
    const frontend = await disk.connect({ queues: 2 });
    const mapped = disk.rig.arena.usedBytes;
    for (const queue of frontend.queues) queue.submit(read, read);
    disk.settle();
    frontend.disconnect();
    disk.settle();
    expect(disk.controller.info()).toMatchObject({ state: 'connected', inflight: 4, queuesRunning: 0 });
    expect(disk.rig.arena.usedBytes).toBe(mapped);
    disk.release();
    expect(disk.state).toBe('listening');
    expect(disk.rig.arena.usedBytes).toBe(arenaBefore);
    // Answered all the same: a driver that comes back with this memory finds its used ring right.
    expect(frontend.queues.map((queue) => queue.deviceUsedIndex)).toEqual([2, 2]);
    expect(frontend.queue.takeUsed()).toMatchObject({ lengthBytes: 4097 });
    frontend.close();
    expectNothingLeft();
  });

  it('that comes back takes up its rings where they were', async () => {
    serve();
    const frontend = await disk.connect();
    const content = fresh(4096);
    expect((await frontend.queue.write(0, content)).status).toBe(Status.ok);
    frontend.disconnect();
    disk.untilListening();
    await frontend.reconnect();
    expectBytes((await frontend.queue.read(0, 4096)).data, content, 'after reconnecting');
    frontend.close();
    disk.untilListening();
    expectNothingLeft();
  });
});

describe('a second front-end', () => {
  it('is turned away while one is connected, which is not disturbed', async () => {
    serve();
    const first = await disk.connect();
    for (let i = 0; i < 5; i++) {
      const second = disk.open();
      await second.connection.disconnected();
      second.close();
      expect((await first.queue.read(0, 4096)).status).toBe(Status.ok);
    }
    const self = { pid: process.pid, uid: process.getuid!(), gid: process.getgid!() };
    const words = disk.log.filter((entry) => entry.message === 'a second front-end was turned away');
    expect(words.map(({ fields }) => fields)).toEqual(Array(5).fill({ connected: self, turnedAway: self }));
    expect(disk.stat(ControllerStat.frontEndsTurnedAway)).toBe(5);
    expect(disk.stat(ControllerStat.sessions)).toBe(1);
    first.close();
    disk.untilListening();
    expect(await serves()).toBe(true);
    expectNothingLeft();
  });

  it('is served when the first has just left', async () => {
    serve();
    const first = await disk.connect();
    first.close();
    // Nothing was stepped in between: both are noticed at once.
    const second = await disk.connect();
    expect((await second.queue.read(0, 4096)).status).toBe(Status.ok);
    second.close();
    disk.untilListening();
    expect(disk.log.map((entry) => entry.message)).not.toContain('a second front-end was turned away');
    expectNothingLeft();
  });

  it('is served when the first leaves at the moment it is noticed', async () => {
    for (let steps = 0; steps < 4; steps++) {
      serve();
      const first = await disk.connect();
      const second = disk.open();
      disk.settle(steps);
      const turnedAway = disk.log.length > 0 && disk.log.at(-1)!.message === 'a second front-end was turned away';
      const logged = disk.log.length;
      first.close();
      if (!turnedAway) {
        await second.negotiate();
        const since = disk.log.slice(logged).map((entry) => entry.message);
        expect(since, `after ${steps} steps`).toEqual(['session ended', 'front-end connected']);
      }
      expect(turnedAway).toBe(steps > 1);
      second.close();
      disk.untilListening();
      expectNothingLeft();
      disk.close();
    }
  });

  it('waits while requests of the first, which has left, are in flight', async () => {
    serve({ configs: heldDisk() });
    const first = await disk.connect();
    first.queue.submit(read);
    disk.settle();
    first.close();
    disk.settle();
    const second = disk.open();
    const negotiating = second.negotiate();
    disk.settle();
    expect(second.connection.isOpen).toBe(true);
    disk.release();
    await negotiating;
    second.close();
    disk.untilListening();
    expectNothingLeft();
  });

  it.each([
    ['GET_VRING_BASE', MessageId.getVringBase, u32(0, 0)],
    ['SET_MEM_TABLE', MessageId.setMemTable, u32(0, 0)],
  ])('waits when the first has left behind a %s that waits for requests in flight', async (_name, id, payload) => {
    for (const noticed of [false, true]) {
      serve({ configs: heldDisk() });
      const first = await disk.connect();
      first.queue.submit(read);
      disk.settle();
      await first.connection.send(encodeMessage(id, payload));
      if (noticed) disk.settle();
      first.close();
      if (noticed) disk.settle();
      const second = disk.open();
      const negotiating = second.negotiate();
      disk.settle();
      expect(second.connection.isOpen).toBe(true);
      disk.release();
      await negotiating;
      second.close();
      disk.untilListening();
      expect(disk.sessionFaults).toBe(0);
      expectNothingLeft();
      disk.close();
    }
  });

  it('is served after many that came and left while the first was there', async () => {
    serve();
    const first = await disk.connect();
    const crowd = Array.from({ length: 10 }, () => disk.open());
    for (const frontend of crowd) frontend.close();
    first.close();
    expect(await serves()).toBe(true);
    disk.settle();
    expectNothingLeft();
  });
});

describe('a descriptor handed in', () => {
  const getQueueNum = encodeMessage(MessageId.getQueueNum, Buffer.alloc(0));

  it('of a connected socket serves that one front-end; when it leaves, the owner is told', () => {
    const wire = new Wire();
    serve({ listen: { fd: wire.far } });
    let told = 0;
    disk.controller.onClosedByPeer = () => told++;
    wire.send(getQueueNum);
    disk.settle();
    expect(wire.receive()).toEqual(encodeMessage(MessageId.getQueueNum, u64(2), { flags: 5 }));
    expect(disk.controller.info().peer).toMatchObject({ pid: process.pid });
    wire.close();
    disk.settle();
    expect(told).toBe(1);
  });

  it('of a connected socket ends its session at the first wrong message', () => {
    const wire = new Wire();
    serve({ listen: { fd: wire.far } });
    let told = 0;
    disk.controller.onClosedByPeer = () => told++;
    wire.send(encodeMessage(99, Buffer.alloc(0)));
    disk.settle();
    expect(wire.receive()).toBeNull();
    expect(told).toBe(1);
    wire.close();
  });

  it('of a listening socket serves whoever connects, those included that came before', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const path = join(folder, 'socket');
    const listening = check(native.socketListen(path, 0o600), 'listen');
    const waiting = Frontend.open(path, { step: () => disk.step() });
    serve({ listen: { fd: listening } });
    await waiting.negotiate();
    waiting.close();
    disk.untilListening();
    const next = Frontend.open(path, { step: disk.step });
    await next.setUp();
    expect((await next.queue.read(0, 512)).status).toBe(Status.ok);
    next.close();
    disk.untilListening();
    // The path is its maker's to remove.
    disk.close();
    expect(existsSync(path)).toBe(true);
    rmSync(folder, { recursive: true });
  });
});

describe('a controller', () => {
  it('makes its socket with the mode it was given, and removes it', () => {
    serve();
    expect(statSync(disk.socketPath).mode & 0o7777).toBe(0o600);
    disk.close();
    expect(existsSync(disk.socketPath)).toBe(false);
  });

  it('closes also when its socket was removed by somebody else', () => {
    serve();
    rmSync(disk.socketPath);
    disk.close();
    expect(disk.state).toBe('closed');
  });

  it('that closes answers what is in flight, then ends the session', async () => {
    serve({ configs: heldDisk() });
    const frontend = await disk.connect();
    const [request] = frontend.queue.submit(read);
    disk.settle();
    let closed = false;
    const closing = disk.controller.close().then(() => (closed = true));
    const [late] = frontend.queue.submit(read);
    disk.settle();
    await Promise.resolve();
    expect(closed).toBe(false);
    expect(frontend.connection.isOpen).toBe(true);
    disk.release();
    await closing;
    await frontend.connection.disconnected();
    expect(frontend.queue.takeUsed()).toMatchObject({ lengthBytes: 4097 });
    expect(request!.completion?.status).toBe(Status.ok);
    expect(late!.completion).toBeUndefined();
    frontend.close();
  });

  it('that closes lets go of a front-end that waits for its turn', async () => {
    serve({ configs: heldDisk() });
    const first = await disk.connect();
    first.queue.submit(read);
    disk.settle();
    first.close();
    disk.settle();
    const second = disk.open();
    disk.settle();
    disk.close();
    await second.connection.disconnected();
    second.close();
  });

  it('counts sessions, requests and errors', async () => {
    serve();
    const frontend = await disk.connect();
    await frontend.queue.read(0, 512);
    await frontend.queue.read(1e9, 512);
    frontend.close();
    disk.untilListening();
    expect(disk.stat(ControllerStat.sessions)).toBe(1);
    expect(disk.stat(ControllerStat.requests)).toBe(2);
    expect(disk.stat(ControllerStat.requestErrors)).toBe(1);
    expect(disk.stat(ControllerStat.notifications)).toBeGreaterThan(0);
  });
});

describe('hostile front-ends', () => {
  /** One message of any shape, mostly nearly right. */
  function anyMessage(random: ReturnType<typeof seededRandom>, frontend: Frontend): [Buffer, number[]] {
    const pick = <T>(...values: readonly T[]): T => values[random.below(values.length)]!;
    const id = pick(...Object.values(MessageId), random.below(64));
    const { queue, memory } = frontend;
    const u64s = [0, 1, 0x100, 0x101, 2 ** 40, memory.ringRegion.userAddress, memory.userAddress(queue.used), -1];
    const payload = pick(
      () => Buffer.alloc(0),
      () => u32(random.below(3), pick(0, 1, 2, 64, 128, 1024, 0xffff, 0xffffffff)),
      () => u64(pick(...u64s)),
      () => Buffer.concat([u32(random.below(3), random.below(2)), ...[0, 1, 2, 3].map(() => u64(pick(...u64s)))]),
      () => Buffer.concat([u64(0), pick(...memory.regions).describe()]),
      () => Buffer.concat([u32(2, 0), ...memory.regions.map((region) => region.describe())]),
      () => Buffer.concat([u32(random.below(300), 1, 0), Buffer.alloc(1)]),
      () => fresh(random.below(80)),
    )();
    const fds = Array.from({ length: pick(0, 0, 1, 1, 2, 9) }, () =>
      pick(queue.kickFd, queue.callFd, memory.ringRegion.fd, memory.dataRegion.fd),
    );
    const flags = pick(1, 9, 9, 9, random.below(16));
    return [encodeMessage(id, payload, { flags }), fds];
  }

  it('end their own sessions by any sequence of messages, and leave nothing behind', async () => {
    serve();
    const bystander = new ServedDisk({ beside: disk, configs: memoryDisk(512, 'other') });
    const other = await bystander.connect();
    countWhatIsThere();
    const random = seededRandom(77);
    for (let round = 0; round < 150; round++) {
      const frontend = random.below(2) === 0 ? disk.open({ queues: 2 }) : await disk.connect({ queues: 2 });
      // Rings of a front-end gone mad: whatever lies in its memory.
      frontend.memory.bytes(frontend.memory.ringRegion.guestAddress, 65536).set(fresh(65536));
      for (let i = 0; i < 30 && frontend.connection.isOpen; i++) {
        const [bytes, fds] = anyMessage(random, frontend);
        await frontend.connection.send(bytes, fds).catch(() => undefined);
        disk.settle(random.below(3));
      }
      const content = fresh(512);
      expect((await other.queue.write(round, content)).status).toBe(Status.ok);
      expectBytes((await other.queue.read(round, 512)).data, content, 'the bystander');
      frontend.close();
      disk.untilListening();
      expectNothingLeft();
    }
    expect(bystander.sessionFaults).toBe(0);
    expect(disk.sessionFaults).toBeGreaterThan(50);
    expect(await serves()).toBe(true);
    other.close();
    bystander.close();
  });
});
