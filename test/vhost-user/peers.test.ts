/**
 * Goal: only the users and groups that are allowed become a disk's front-end, and one that is does not keep others waiting by
 * stopping in the middle of something.
 *
 * Method: a controller that is stepped by hand, on simulated time. Clients of other users and groups are processes of their own, which takes
 * root to make.
 */
import { chmodSync } from 'node:fs';
import { dirname } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { MessageId, Status, encodeMessage } from '../frontend/protocol.js';
import { canBeOthers, connectAs } from '../support/stranger.js';
import { ServedDisk, openDescriptors } from './served-disk.js';
import type { ServedDiskOptions } from './served-disk.js';

const uid = process.getuid!();
const gid = process.getgid!();
const NOBODY: number[] = [];
const DENIED = 'a front-end was denied: neither its user nor a group of its is allowed';
const SECOND_US = 1_000_000;

let disk: ServedDisk;

function serve(options: ServedDiskOptions): void {
  disk = new ServedDisk(options);
}

afterEach(() => disk.close());

describe('a peer', () => {
  it.each([
    ['its user', { uids: [uid], gids: NOBODY }],
    ['its group', { uids: NOBODY, gids: [gid] }],
    ['both, among others', { uids: [uid + 1, uid], gids: [gid + 1, gid] }],
  ])('is served when %s is allowed', async (_what, peers) => {
    serve({ peers });
    const frontend = await disk.connect();
    expect((await frontend.queue.read(0, 512)).status).toBe(Status.ok);
    frontend.close();
    disk.untilListening();
    expect(disk.stat(ControllerStat.peersDenied)).toBe(0);
  });

  it('is denied, named and counted when neither is', async () => {
    serve({ peers: { uids: [uid + 1], gids: [gid + 1] } });
    const before = openDescriptors();
    for (let i = 0; i < 5; i++) {
      const frontend = disk.open();
      await frontend.connection.disconnected();
      frontend.close();
    }
    expect(disk.stat(ControllerStat.peersDenied)).toBe(5);
    expect(disk.stat(ControllerStat.sessions)).toBe(0);
    expect(disk.log).toHaveLength(5);
    expect(disk.log[0]).toMatchObject({ level: 'warn', message: DENIED, fields: { pid: process.pid, uid, gid } });
    expect(openDescriptors()).toBe(before);
  });

  it('is denied when nobody is allowed', async () => {
    serve({ peers: { uids: NOBODY, gids: NOBODY } });
    const frontend = disk.open();
    await frontend.connection.disconnected();
    frontend.close();
    expect(disk.stat(ControllerStat.peersDenied)).toBe(1);
  });

  async function outcome(uid: number, gid: number, ...groups: number[]): Promise<string> {
    // Sockets of tests lie in folders for their owner alone.
    chmodSync(dirname(disk.socketPath), 0o755);
    chmodSync(disk.socketPath, 0o666);
    let result: string | undefined;
    const hello = encodeMessage(MessageId.getFeatures, Buffer.alloc(0));
    void connectAs({ uid, gid, groups }, disk.socketPath, hello).then((said) => (result = said));
    for (let i = 0; result === undefined && i < 20_000; i++) {
      disk.settle(1);
      await setTimeout(1);
    }
    return result ?? 'nothing';
  }

  it('is told by its user, its group and its supplementary groups as they are', async (context) => {
    if (!canBeOthers) context.skip('takes root: it runs clients as other users');
    serve({ peers: { uids: [7001], gids: [7002] } });
    expect(await outcome(7001, 7100)).toBe('answered');
    expect(await outcome(7100, 7002)).toBe('answered');
    expect(await outcome(7100, 7100, 7100, 7002)).toBe('answered');
    expect(await outcome(7100, 7100, 7100, 7003)).toBe('closed');
    // More groups than fit at first.
    const many = Array.from({ length: 200 }, (_, i) => 8000 + i);
    expect(await outcome(7100, 7100, ...many, 7002)).toBe('answered');
    expect(await outcome(7100, 7100, ...many)).toBe('closed');
    // A number of a user is none of a group.
    expect(await outcome(7002, 7001, 7001)).toBe('closed');
    expect(disk.stat(ControllerStat.peersDenied)).toBe(3);
  });

  it('that is denied takes nobody the place of the next front-end in turn', async (context) => {
    if (!canBeOthers) context.skip('takes root: it runs clients as other users');
    serve({ peers: { uids: [uid], gids: NOBODY } });
    const first = await disk.connect();
    expect(await outcome(7100, 7100)).toBe('closed');
    expect((await first.queue.read(0, 512)).status).toBe(Status.ok);
    expect(disk.stat(ControllerStat.frontEndsTurnedAway)).toBe(0);
    expect(disk.stat(ControllerStat.peersDenied)).toBe(1);
    first.close();
    disk.untilListening();
  });
});

describe('a front-end that stops in the middle', () => {
  const getFeatures = encodeMessage(MessageId.getFeatures, Buffer.alloc(0));
  const setNum = encodeMessage(MessageId.setVringNum, Buffer.alloc(8));

  function pass(us: number): void {
    disk.rig.pass(us);
    disk.settle();
  }

  function expectTimedOut(): void {
    expect(disk.state).toBe('listening');
    expect(disk.stat(ControllerStat.messageTimeouts)).toBe(1);
    expect(disk.sessionFaults).toBe(1);
    expect(disk.complaints).toEqual(['no whole message came within 2 s']);
  }

  it('before its first message is sent away, and the next one is served', async () => {
    serve({ messageTimeoutUs: 2 * SECOND_US });
    const silent = disk.open();
    disk.settle();
    pass(1.9 * SECOND_US);
    expect(disk.state).toBe('connected');
    pass(0.2 * SECOND_US);
    expectTimedOut();
    expect(silent.connection.isOpen).toBe(false);
    silent.close();
    const next = await disk.connect();
    expect((await next.queue.read(0, 512)).status).toBe(Status.ok);
    next.close();
    disk.untilListening();
  });

  it.each([1, 11, 12, 19])('of a message, after %i bytes, is sent away', async (count) => {
    serve({ messageTimeoutUs: 2 * SECOND_US });
    const frontend = disk.open();
    await frontend.negotiate();
    pass(10 * SECOND_US);
    await frontend.connection.send(setNum.subarray(0, count));
    disk.settle();
    pass(1.9 * SECOND_US);
    expect(disk.state).toBe('connected');
    pass(0.2 * SECOND_US);
    expectTimedOut();
    frontend.close();
  });

  it('does not put it off by a byte now and then', async () => {
    serve({ messageTimeoutUs: 2 * SECOND_US });
    const frontend = disk.open();
    for (let at = 0; at < 4; at++) {
      await frontend.connection.send(getFeatures.subarray(at, at + 1));
      disk.settle();
      pass(0.6 * SECOND_US);
    }
    expectTimedOut();
    frontend.close();
  });

  it('but finishes in time is served, however often', async () => {
    serve({ messageTimeoutUs: 2 * SECOND_US });
    const frontend = disk.open();
    for (let i = 0; i < 5; i++) {
      await frontend.connection.send(getFeatures.subarray(0, 7));
      disk.settle();
      pass(1.5 * SECOND_US);
      await frontend.connection.send(getFeatures.subarray(7));
      expect((await frontend.connection.receive()).id).toBe(MessageId.getFeatures);
    }
    frontend.close();
    disk.untilListening();
    expect(disk.stat(ControllerStat.messageTimeouts)).toBe(0);
  });

  it('may be silent between messages for ever', async () => {
    serve({ messageTimeoutUs: 2 * SECOND_US });
    const frontend = await disk.connect();
    pass(100 * SECOND_US);
    expect((await frontend.queue.read(0, 512)).status).toBe(Status.ok);
    expect(disk.stat(ControllerStat.messageTimeouts)).toBe(0);
    frontend.close();
    disk.untilListening();
    // The deadline of a session that has ended is nobody's any more.
    pass(10 * SECOND_US);
    expect(disk.stat(ControllerStat.messageTimeouts)).toBe(0);
  });
});
