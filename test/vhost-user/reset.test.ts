/**
 * Goal: a reset answers what is in flight, stops every ring and forgets what the driver said, and nothing else, so that a driver
 * can come again; the device status keeps to its rules; the state that a migration
 * carries is the guest's choice of cache mode.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket, a disk that holds its completions back.
 */
import { readSync, writeSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { check, checkObject, native } from '../../native/index.js';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import {
  FEATURES_KNOWN,
  Feature,
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  RequestType,
  Status,
  encodeMessage,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { ServedDisk, heldDisk, openDescriptors } from './served-disk.js';

const NONE = Buffer.alloc(0);
const WRITEBACK_AT = 32;
/** Device status bits, VIRTIO 1.2, 2.1. */
const ACKNOWLEDGE = 1;
const DRIVER = 2;
const DRIVER_OK = 4;
const FEATURES_OK = 8;

let disk: ServedDisk;
let frontends: Frontend[];
let descriptorsBefore: number;

beforeEach(() => {
  disk = new ServedDisk({ configs: heldDisk() });
  frontends = [];
  descriptorsBefore = openDescriptors();
});

afterEach(() => {
  for (const frontend of frontends) frontend.close();
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
  disk.close();
});

async function connect(options: Parameters<ServedDisk['connect']>[0] = {}): Promise<Frontend> {
  const frontend = await disk.connect(options);
  frontends.push(frontend);
  return frontend;
}

const setStatus = (frontend: Frontend, status: number | bigint): Promise<void> =>
  frontend.tell(MessageId.setStatus, u64(status));
const getStatus = async (frontend: Frontend): Promise<bigint> => frontend.askU64(MessageId.getStatus);

const reset = (frontend: Frontend): Promise<void> => frontend.tell(MessageId.resetDevice);

describe('RESET_DEVICE', () => {
  it('waits for the requests in flight, which are answered', async () => {
    const frontend = await connect({ queues: 2 });
    const requests = frontend.queues.map((queue) => queue.submit({ type: RequestType.read, inBytes: 512 })[0]!);
    disk.settle();
    let isDone = false;
    const resetting = reset(frontend).then(() => (isDone = true));
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(isDone).toBe(false);
    disk.release();
    await resetting;
    for (const [i, queue] of frontend.queues.entries()) {
      expect((await queue.completion(requests[i]!)).status).toBe(Status.ok);
      expect(await queue.called()).toBeGreaterThan(0);
    }
    expect(disk.controller.info()).toMatchObject({ queuesRunning: 0, features: [], inflight: 0 });
  });

  it('forgets rings and features, and takes nothing from a ring until it is set up whole again', async () => {
    const frontend = await connect();
    const { queue } = frontend;
    expect((await queue.flush()).status).toBe(Status.ok);
    await reset(frontend);
    // Size, addresses and base have to be said again, not only the kick.
    await frontend.tell(MessageId.setVringKick, u64(0), [queue.kickFd]);
    queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(queue.takeRawUsed()).toBeUndefined();
    await expect(frontend.enableQueue(queue, true)).rejects.toThrow(Refused);
  });

  it('lets the driver come again, with other features, on the same memory and call descriptors', async () => {
    const frontend = await connect();
    const { queue } = frontend;
    for (let round = 0; round < 3; round++) {
      await reset(frontend);
      queue.reset();
      const features =
        FEATURES_KNOWN & frontend.offeredFeatures & ~mask(...(round % 2 === 0 ? [Feature.eventIdx] : []));
      await frontend.setFeatures(features);
      queue.eventIdx = frontend.has(Feature.eventIdx);
      await frontend.tell(MessageId.setVringNum, u32(0, queue.size));
      await frontend.tell(MessageId.setVringBase, u32(0, 0));
      await frontend.setQueueAddresses(queue);
      await frontend.tell(MessageId.setVringKick, u64(0), [queue.kickFd]);
      await frontend.enableQueue(queue, true);
      native.eventfdDrain(queue.callFd);
      expect((await queue.flush()).status).toBe(Status.ok);
      expect(await queue.called()).toBeGreaterThan(0);
    }
  });

  it('leaves the cache mode as the guest chose it: the front-end does not say it again', async () => {
    const frontend = await connect();
    await frontend.setConfig(WRITEBACK_AT, Buffer.from([0]));
    await reset(frontend);
    expect((await frontend.blkConfig()).writeback).toBe(0);
    // Nothing is negotiated: every write is made durable.
    expect(disk.controller.info().writeback).toBe(false);
  });

  it('makes a broken ring whole', async () => {
    const frontend = await connect();
    const { queue } = frontend;
    queue.offer(queue.size);
    await queue.erred();
    await reset(frontend);
    queue.reset();
    await frontend.setFeatures(frontend.features);
    await frontend.startQueue(queue, 0);
    expect((await queue.flush()).status).toBe(Status.ok);
  });

  it('may come at any time, any number of times', async () => {
    const frontend = disk.open();
    frontends.push(frontend);
    await frontend.negotiate();
    for (let i = 0; i < 3; i++) await reset(frontend);
    await frontend.setFeatures(frontend.features);
    await frontend.shareMemory();
    await reset(frontend);
    await frontend.setFeatures(frontend.features);
    await frontend.startQueue(frontend.queue);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
  });

  it('of a front-end that leaves meanwhile ends with it', async () => {
    const frontend = await connect();
    frontend.queue.submit({ type: RequestType.read, inBytes: 512 });
    disk.settle();
    await frontend.connection.send(encodeMessage(MessageId.resetDevice, NONE));
    disk.settle();
    frontend.close();
    disk.settle();
    disk.release();
    disk.untilListening();
    expect(disk.sessionFaults).toBe(0);
  });

  it('that was not negotiated is refused', async () => {
    const without = mask(ProtocolFeature.resetDevice, ProtocolFeature.status);
    const frontend = await connect({ protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~without });
    await expect(reset(frontend)).rejects.toThrow(Refused);
    await expect(setStatus(frontend, 1)).rejects.toThrow(Refused);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
  });
});

describe('the device status', () => {
  it('is what was set, bit by bit, and 0 after a reset', async () => {
    const frontend = await connect();
    expect(await getStatus(frontend)).toBe(0n);
    for (const status of [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 11, 15]) {
      await setStatus(frontend, status);
      expect(await getStatus(frontend)).toBe(BigInt(status));
    }
    await setStatus(frontend, 0);
    expect(await getStatus(frontend)).toBe(0n);
    await setStatus(frontend, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    await frontend.tell(MessageId.resetDevice);
    expect(await getStatus(frontend)).toBe(0n);
  });

  it('takes no bits back but by a reset, and none beyond a byte', async () => {
    const frontend = await connect();
    await setStatus(frontend, ACKNOWLEDGE | DRIVER);
    for (const wrong of [DRIVER, FEATURES_OK, 0x100n, 2n ** 32n, 2n ** 63n]) {
      await expect(setStatus(frontend, wrong)).rejects.toThrow(Refused);
    }
    expect(await getStatus(frontend)).toBe(BigInt(ACKNOWLEDGE | DRIVER));
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
  });

  it('of 0 leaves rings and features alone: QEMU 7.2 asks for the positions of its rings after it', async () => {
    const frontend = await connect();
    const { queue } = frontend;
    await setStatus(frontend, 15);
    const [request] = queue.submit({ type: RequestType.read, inBytes: 512 });
    disk.settle();
    await setStatus(frontend, 0);
    await frontend.enableQueue(queue, false);
    disk.release();
    expect(await frontend.stopQueue(queue)).toBe(1);
    expect((await queue.completion(request!)).status).toBe(Status.ok);
    expect(await getStatus(frontend)).toBe(0n);
  });

  it('of a session is not that of the next', async () => {
    const frontend = await connect();
    await setStatus(frontend, ACKNOWLEDGE);
    await frontend.reconnect();
    expect(await getStatus(frontend)).toBe(0n);
  });
});

describe('the state of the device', () => {
  const SAVE = 0;
  const LOAD = 1;
  const NO_FD = 0x100n;

  /** A socket pair: [the test's end, the device's]. */
  const channel = (): [number, number] => checkObject(native.socketPair(), 'make a channel');

  async function suspended(): Promise<Frontend> {
    const frontend = await connect();
    await frontend.stopQueue(frontend.queue);
    return frontend;
  }

  async function transfer(frontend: Frontend, direction: number, fd: number, phase = 0): Promise<bigint> {
    const reply = await frontend.ask(MessageId.setDeviceStateFd, u32(direction, phase), [fd]);
    return reply.readBigUInt64LE();
  }

  async function save(frontend: Frontend): Promise<Buffer> {
    const [near, far] = channel();
    expect(await transfer(frontend, SAVE, far)).toBe(NO_FD);
    native.fileClose(far);
    const bytes = Buffer.alloc(64);
    const count = readSync(near, bytes);
    // The device closed its end.
    expect(readSync(near, Buffer.alloc(1))).toBe(0);
    native.fileClose(near);
    expect(await frontend.askU64(MessageId.checkDeviceState)).toBe(0n);
    return bytes.subarray(0, count);
  }

  /** @returns what CHECK_DEVICE_STATE says */
  async function load(frontend: Frontend, bytes: Buffer, close = true): Promise<bigint> {
    const [near, far] = channel();
    expect(await transfer(frontend, LOAD, far)).toBe(NO_FD);
    native.fileClose(far);
    if (bytes.length > 0) expect(writeSync(near, bytes)).toBe(bytes.length);
    if (close) native.fileClose(near);
    const outcome = await frontend.askU64(MessageId.checkDeviceState);
    if (!close) native.fileClose(near);
    return outcome;
  }

  it('carries the cache mode from one device to the other', async () => {
    for (const writeback of [0, 1]) {
      const frontend = await suspended();
      await frontend.setConfig(WRITEBACK_AT, Buffer.from([writeback]));
      const state = await save(frontend);
      await frontend.setConfig(WRITEBACK_AT, Buffer.from([1 - writeback]));
      expect(await load(frontend, state)).toBe(0n);
      expect((await frontend.blkConfig()).writeback).toBe(writeback);
      frontend.close();
      disk.untilListening();
    }
  });

  it('that is not one changes nothing, and is reported', async () => {
    const frontend = await suspended();
    const state = await save(frontend);
    const wrong = (at: number, value: number): Buffer => {
      const bytes = Buffer.from(state);
      bytes.writeUInt32LE(value, at);
      return bytes;
    };
    const before = (await frontend.blkConfig()).writeback;
    for (const bytes of [
      ...[NONE, state.subarray(0, 11), Buffer.concat([state, NONE, Buffer.alloc(1)]), Buffer.alloc(4096)],
      ...[wrong(0, 0), wrong(4, 2), wrong(8, 2), wrong(8, 0xffffffff)],
    ]) {
      expect(await load(frontend, bytes)).toBe(1n);
    }
    expect(await load(frontend, state, false)).toBe(1n);
    expect((await frontend.blkConfig()).writeback).toBe(before);
    expect(await load(frontend, state)).toBe(0n);
  });

  it('is not moved while rings run, in an unknown direction or phase, or through anything but a pipe or socket', async () => {
    const frontend = await connect();
    const [near, far] = channel();
    expect(await transfer(frontend, SAVE, far)).toBe(NO_FD | 1n);
    await frontend.stopQueue(frontend.queue);
    expect(await transfer(frontend, 2, far)).toBe(NO_FD | 1n);
    expect(await transfer(frontend, SAVE, far, 1)).toBe(NO_FD | 1n);
    expect(await frontend.askU64(MessageId.checkDeviceState)).toBe(1n);
    for (const fd of [near, far]) native.fileClose(fd);
    await expect(transfer(frontend, SAVE, frontend.memory.ringRegion.fd)).rejects.toThrow('closed the connection');
  });

  it('that nobody reads is no reason to wait', async () => {
    const frontend = await suspended();
    const [near, far] = channel();
    const buffer = disk.rig.arena.allocate(65536);
    const full = (): boolean =>
      native.socketSend(far, disk.rig.arena.baseAddress + buffer, 65536, new Int32Array(0)) < 0;
    while (!full());
    expect(await transfer(frontend, SAVE, far)).toBe(NO_FD | 1n);
    disk.rig.arena.release(buffer);
    for (const fd of [near, far]) check(native.fileClose(fd), 'close');
  });
});
