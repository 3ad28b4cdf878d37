/**
 * Goal: the conversations that real front-ends have been recorded to hold go through word for word, from connecting to disk I/O
 * and the end.
 *
 * Method: each conversation is played to a controller on a real socket, with the payload lengths, flags and descriptors of the
 * recording; every reply is checked for its id and length, and that nothing else comes. Firecracker's is put together from what
 * is known of it.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { checkObject, native } from '../../native/index.js';
import type { DriverQueue } from '../frontend/driver-queue.js';
import type { Frontend } from '../frontend/frontend.js';
import {
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION_1,
  Feature,
  MessageId,
  ProtocolFeature,
  RequestType,
  Status,
  encodeInflight,
  encodeMessage,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { ServedDisk } from './served-disk.js';

let disk: ServedDisk;
let frontend: Frontend;

beforeEach(() => {
  disk = new ServedDisk({ queues: 2 });
});

afterEach(() => {
  frontend.close();
  disk.untilListening();
  expect(disk.complaints).toEqual([]);
  disk.close();
});

const NONE = Buffer.alloc(0);

/** A message without a reply. */
async function say(id: number, payload: Buffer = NONE, fds: readonly number[] = []): Promise<void> {
  await frontend.connection.send(encodeMessage(id, payload), fds);
}

/** A message whose sender asks for an acknowledgement, and gets a good one. */
async function sayAndWait(id: number, payload: Buffer = NONE, fds: readonly number[] = []): Promise<void> {
  const flags = FLAG_VERSION_1 | FLAG_NEED_REPLY;
  await frontend.connection.send(encodeMessage(id, payload, { flags }), fds);
  expect(await frontend.connection.receive()).toMatchObject({
    id,
    flags: FLAG_VERSION_1 | FLAG_REPLY,
    payload: u64(0),
  });
}

/** A message with a reply of its own. */
async function ask(id: number, payload: Buffer, replyBytes: number, flags = FLAG_VERSION_1): Promise<Buffer> {
  await frontend.connection.send(encodeMessage(id, payload, { flags }));
  const reply = await frontend.connection.receive();
  expect(reply).toMatchObject({ id, flags: FLAG_VERSION_1 | FLAG_REPLY });
  expect(reply.payload).toHaveLength(replyBytes);
  return reply.payload;
}

function ringAddresses(queue: DriverQueue): Buffer {
  const user = (address: number): Buffer => u64(frontend.memory.userAddress(address));
  return Buffer.concat([u32(queue.index, 0), user(queue.descriptors), user(queue.used), user(queue.available), u64(0)]);
}

function negotiated(features: bigint): void {
  frontend.features = features;
  for (const queue of frontend.queues) {
    queue.eventIdx = frontend.has(Feature.eventIdx);
    queue.indirect = frontend.has(Feature.indirectDescriptors);
  }
}

/** Writes, flushes and reads back on a queue. */
async function exercise(queue: DriverQueue): Promise<void> {
  const content = fresh(8192);
  expect(await queue.write(16, content)).toMatchObject({ status: Status.ok, usedBytes: 1 });
  expect(await queue.flush()).toMatchObject({ status: Status.ok });
  expectBytes((await queue.read(16, 8192)).data, content, 'read back');
}

describe('QEMU 7.2', () => {
  const features = mask(
    ...[Feature.segMax, Feature.blkSize, Feature.flush, Feature.topology, Feature.configWce, Feature.multiQueue],
    ...[Feature.discard, Feature.writeZeroes, Feature.indirectDescriptors, Feature.eventIdx],
    ...[Feature.protocolFeatures, Feature.version1],
  );

  async function connect(): Promise<void> {
    await ask(MessageId.getFeatures, NONE, 8);
    const offered = (await ask(MessageId.getProtocolFeatures, NONE, 8)).readBigUInt64LE();
    const wanted = 0x9f2bn & offered;
    expect(wanted).toBe(
      mask(ProtocolFeature.multiQueue, ProtocolFeature.logShmfd, ProtocolFeature.replyAck, ProtocolFeature.backendReq) |
        mask(ProtocolFeature.config, ProtocolFeature.inflightShmfd, ProtocolFeature.configureMemSlots),
    );
    await say(MessageId.setProtocolFeatures, u64(wanted));
    expect(await ask(MessageId.getQueueNum, NONE, 8)).toEqual(u64(2));
    expect(await ask(MessageId.getMaxMemSlots, NONE, 8)).toEqual(u64(509));
    const channel = checkObject(native.socketPair(), 'make a channel');
    await sayAndWait(MessageId.setBackendReqFd, NONE, [channel[1]]);
    for (const fd of channel) native.fileClose(fd);
    await say(MessageId.setOwner);
    await ask(MessageId.getFeatures, NONE, 8);
    for (const queue of frontend.queues) {
      await say(MessageId.setVringCall, u64(queue.index), [queue.callFd]);
      await say(MessageId.setVringErr, u64(queue.index), [queue.errFd]);
    }
    const config = await ask(MessageId.getConfig, Buffer.concat([u32(0, 57, 0), Buffer.alloc(57)]), 69);
    expect(config.readBigUInt64LE(12)).toBe(16384n);
  }

  /** Features are sent twice, around the in-flight region, a new one for each driver, and the call descriptors. */
  async function driverComes(): Promise<void> {
    await say(MessageId.setFeatures, u64(features));
    if (frontend.inflightArea !== null) native.fileClose(frontend.inflightArea.fd);
    frontend.inflightArea = await frontend.getInflight(2, frontend.queue.size);
    await say(MessageId.setInflightFd, encodeInflight(frontend.inflightArea), [frontend.inflightArea.fd]);
    for (const queue of frontend.queues) await say(MessageId.setVringCall, u64(queue.index), [queue.callFd]);
    await say(MessageId.setFeatures, u64(features));
    negotiated(features);
  }

  async function startRing(queue: DriverQueue): Promise<void> {
    queue.reset();
    await say(MessageId.setVringNum, u32(queue.index, queue.size));
    await say(MessageId.setVringBase, u32(queue.index, 0));
    await say(MessageId.setVringAddr, ringAddresses(queue));
    await say(MessageId.setVringKick, u64(queue.index), [queue.kickFd]);
  }

  async function enableAll(enabled: boolean, needReply: boolean): Promise<void> {
    for (const { index } of frontend.queues) {
      await (needReply ? sayAndWait : say)(MessageId.setVringEnable, u32(index, enabled ? 1 : 0));
    }
  }

  /** QEMU 10 asks for an acknowledgement of SET_VRING_ENABLE, and has rings of 1024. */
  it.each([
    ['7.2', false, 128],
    ['10', true, 1024],
  ])('boots firmware, then Linux, then shuts down (version %s)', async (_version, needReply, queueSize) => {
    frontend = disk.open({ queues: 2, queueSize });
    await connect();

    // Firmware uses the first ring only; both are enabled.
    await driverComes();
    for (const region of frontend.memory.regions) {
      await sayAndWait(MessageId.addMemReg, Buffer.concat([u64(0), region.describe()]), [region.fd]);
    }
    const [first, second] = frontend.queues as [DriverQueue, DriverQueue];
    await startRing(first);
    await enableAll(true, needReply);
    await exercise(first);
    expect(disk.controller.info().queuesRunning).toBe(1);

    // Linux takes over: memory is not sent again.
    await enableAll(false, needReply);
    const base = await ask(MessageId.getVringBase, u32(0, 0), 8);
    expect(base).toEqual(u32(0, 3));
    await driverComes();
    await startRing(first);
    await startRing(second);
    await enableAll(true, needReply);
    await exercise(first);
    await exercise(second);

    await enableAll(false, needReply);
    for (const { index } of frontend.queues) {
      expect(await ask(MessageId.getVringBase, u32(index, 0), 8)).toEqual(u32(index, 3));
    }
  });
});

describe('libblkio 1.5', () => {
  const SET_FEATURES_FIRST = mask(Feature.flush, Feature.protocolFeatures, Feature.version1, Feature.multiQueue);

  async function introduce(): Promise<void> {
    await say(MessageId.setOwner);
    const offered = (await ask(MessageId.getFeatures, NONE, 8)).readBigUInt64LE();
    const features = offered & (SET_FEATURES_FIRST | mask(Feature.discard, Feature.writeZeroes, Feature.eventIdx));
    await say(MessageId.setFeatures, u64(features));
    await ask(MessageId.getProtocolFeatures, NONE, 8);
    await say(MessageId.setProtocolFeatures, u64(0x8209));
    negotiated(features);
  }

  it('probes, comes back, and shares its memory after it has enabled its ring', async () => {
    frontend = disk.open();
    await introduce();
    frontend.close();

    // Guest addresses are its own addresses; regions end where they end.
    const address = 0x7f12_3456_7000;
    const regions = [
      { guestAddress: address, userAddress: address, sizeBytes: 0x10000 },
      { guestAddress: 2 ** 46, userAddress: 2 ** 46, sizeBytes: 2 ** 20 },
    ];
    frontend = disk.open({ queues: 1, queueSize: 256, regions });
    await introduce();
    await ask(MessageId.getQueueNum, NONE, 8, FLAG_VERSION_1 | FLAG_NEED_REPLY);
    await ask(MessageId.getMaxMemSlots, NONE, 8, FLAG_VERSION_1 | FLAG_NEED_REPLY);
    await ask(MessageId.getConfig, Buffer.concat([u32(0, 60, 0), Buffer.alloc(60)]), 72);
    const { queue } = frontend;
    await sayAndWait(MessageId.setVringNum, u32(0, 256));
    await sayAndWait(MessageId.setVringBase, u32(0, 0));
    await sayAndWait(MessageId.setVringAddr, ringAddresses(queue));
    await sayAndWait(MessageId.setVringKick, u64(0), [queue.kickFd]);
    await sayAndWait(MessageId.setVringCall, u64(0), [queue.callFd]);
    await sayAndWait(MessageId.setVringEnable, u32(0, 1));
    // The region of the data first, so that the ring has to wait for its own.
    for (const region of [...frontend.memory.regions].reverse()) {
      await sayAndWait(MessageId.addMemReg, Buffer.concat([u64(0), region.describe()]), [region.fd]);
    }
    await exercise(queue);
    // REM_MEM_REG brings the region's descriptor along.
    const data = frontend.memory.dataRegion;
    await sayAndWait(MessageId.remMemReg, Buffer.concat([u64(0), data.describe()]), [data.fd]);
    expect(await ask(MessageId.getVringBase, u32(0, 0), 8)).toEqual(u32(0, 3));
  });

  it('shares regions whose size is not a multiple of the page', async () => {
    const address = 0x7f12_3456_7000;
    frontend = disk.open({ regions: [{ guestAddress: address, userAddress: address, sizeBytes: 0x10000 }] });
    await introduce();
    const { ringRegion } = frontend.memory;
    const describe = Buffer.concat([u64(address), u64(0xfb10), u64(address), u64(0)]);
    await sayAndWait(MessageId.addMemReg, Buffer.concat([u64(0), describe]), [ringRegion.fd]);
    await frontend.startQueue(frontend.queue);
    await frontend.enableQueue(frontend.queue, true);
    await exercise(frontend.queue);
  });
});

describe("SPDK's initiator", () => {
  it('enables a ring before it says anything else of it, and waits by asking for the features', async () => {
    // Its guest addresses are its own.
    const address = 0x2000_0020_0000;
    frontend = disk.open({
      queues: 2,
      queueSize: 512,
      regions: [{ guestAddress: address, userAddress: address, sizeBytes: 4 * 2 ** 20 }],
    });
    await say(MessageId.setOwner);
    const offered = (await ask(MessageId.getFeatures, NONE, 8)).readBigUInt64LE();
    await ask(MessageId.getProtocolFeatures, NONE, 8);
    await say(MessageId.setProtocolFeatures, u64(mask(ProtocolFeature.config, ProtocolFeature.multiQueue)));
    // Also when MQ was not negotiated.
    expect(await ask(MessageId.getQueueNum, NONE, 8)).toEqual(u64(2));
    const config = await ask(MessageId.getConfig, Buffer.concat([u32(0, 256, 0), Buffer.alloc(256)]), 268);
    expect(config.readBigUInt64LE(12)).toBe(16384n);
    expect(config.subarray(12 + 96).equals(Buffer.alloc(160))).toBe(true);
    const features = offered & ~mask(Feature.indirectDescriptors, Feature.ringPacked);
    await say(MessageId.setFeatures, u64(features));
    negotiated(features);

    for (const { index, callFd } of frontend.queues) {
      await say(MessageId.setVringEnable, u32(index, 1));
      await say(MessageId.setVringCall, u64(index), [callFd]);
    }
    const [region] = frontend.memory.regions;
    await say(MessageId.setMemTable, Buffer.concat([u32(1, 0), region!.describe()]), [region!.fd]);
    await ask(MessageId.getFeatures, NONE, 8);
    for (const queue of frontend.queues) {
      await say(MessageId.setVringNum, u32(queue.index, queue.size));
      await say(MessageId.setVringBase, u32(queue.index, 0));
      await say(MessageId.setVringAddr, ringAddresses(queue));
      await say(MessageId.setVringKick, u64(queue.index), [queue.kickFd]);
    }
    for (const queue of frontend.queues) await exercise(queue);
    for (const { index } of frontend.queues) {
      expect(await ask(MessageId.getVringBase, u32(index, 0), 8)).toEqual(u32(index, 3));
    }
  });
});

describe('Firecracker', () => {
  it('asks for 60 bytes of configuration and uses one ring, with nothing but CONFIG', async () => {
    frontend = disk.open({ queueSize: 256, regions: [{ guestAddress: 0, sizeBytes: 4 * 2 ** 20 }] });
    await say(MessageId.setOwner);
    const offered = (await ask(MessageId.getFeatures, NONE, 8)).readBigUInt64LE();
    const features =
      offered & mask(Feature.readOnly, Feature.flush, Feature.eventIdx, Feature.version1, Feature.protocolFeatures);
    await ask(MessageId.getProtocolFeatures, NONE, 8);
    await say(MessageId.setProtocolFeatures, u64(mask(ProtocolFeature.config)));
    await ask(MessageId.getConfig, Buffer.concat([u32(0, 60, 0), Buffer.alloc(60)]), 72);
    await say(MessageId.setFeatures, u64(features));
    negotiated(features);
    const [region] = frontend.memory.regions;
    await say(MessageId.setMemTable, Buffer.concat([u32(1, 0), region!.describe()]), [region!.fd]);
    const { queue } = frontend;
    await say(MessageId.setVringNum, u32(0, 256));
    await say(MessageId.setVringAddr, ringAddresses(queue));
    await say(MessageId.setVringBase, u32(0, 0));
    await say(MessageId.setVringCall, u64(0), [queue.callFd]);
    await say(MessageId.setVringKick, u64(0), [queue.kickFd]);
    await say(MessageId.setVringEnable, u32(0, 1));
    await exercise(queue);
    expect(await queue.run({ type: RequestType.getId, inBytes: 20 })).toMatchObject({ status: Status.ok });
  });
});
