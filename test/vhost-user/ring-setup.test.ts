/**
 * Goal: a ring runs exactly while the front-end has it started and enabled, from whatever order of messages; what makes no sense
 * is refused; a ring that is stopped has answered everything and says where it is to go on.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket. A disk that holds its completions back keeps requests
 * in flight for as long as a test wants.
 */
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { check, native } from '../../native/index.js';
import type { DriverQueue } from '../frontend/driver-queue.js';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import {
  FEATURES_KNOWN,
  Feature,
  MessageId,
  RequestType,
  Status,
  VRING_NO_FD,
  encodeMessage,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { seed } from '../support/seed.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { ServedDisk, heldDisk } from './served-disk.js';

let disk: ServedDisk;
/** Let go of after each test. */
let frontends: Frontend[];

beforeEach(() => {
  frontends = [];
});

afterEach(() => {
  letGo();
  disk.close();
});

function letGo(): void {
  for (const frontend of frontends) frontend.close();
  frontends = [];
  disk.untilListening();
}

async function connect(options: Parameters<ServedDisk['connect']>[0] = {}): Promise<Frontend> {
  const frontend = await disk.connect(options);
  frontends.push(frontend);
  return frontend;
}

function open(options: Parameters<ServedDisk['open']>[0] = {}): Frontend {
  const frontend = disk.open(options);
  frontends.push(frontend);
  return frontend;
}

const flush = { type: RequestType.flush };
const read = { type: RequestType.read, sector: 0, inBytes: 512 };

/** Status of a flush, undefined when the queue does not take it. */
function tryFlush(queue: DriverQueue): number | undefined {
  const [request] = queue.submit(flush);
  disk.settle();
  while (queue.takeUsed() !== undefined);
  return request!.completion?.status;
}

describe('setting up a ring', () => {
  beforeEach(() => {
    disk = new ServedDisk();
  });

  it('takes sizes that are powers of two up to 1024, and refuses all others', async () => {
    const frontend = open();
    await frontend.negotiate();
    for (let exponent = 0; exponent <= 10; exponent++) {
      await frontend.tell(MessageId.setVringNum, u32(0, 2 ** exponent));
    }
    for (const size of [0, 3, 127, 129, 1023, 1025, 2048, 32768, 65536, 0x80000000, 0xffffffff]) {
      await expect(frontend.tell(MessageId.setVringNum, u32(0, size)), `${size}`).rejects.toThrow(Refused);
    }
  });

  it('takes any index of 16 bits to start at, and refuses larger ones', async () => {
    const frontend = open();
    await frontend.negotiate();
    for (const base of [0, 1, 0x7fff, 0xffff]) {
      await frontend.tell(MessageId.setVringBase, u32(1, base));
      expect(await frontend.ask(MessageId.getVringBase, u32(1, 0))).toEqual(u32(1, base));
    }
    for (const base of [0x10000, 0xffffffff]) {
      await expect(frontend.tell(MessageId.setVringBase, u32(1, base))).rejects.toThrow(Refused);
    }
  });

  it('refuses addresses that are misaligned or beyond 2^53, and flags that mean nothing', async () => {
    const frontend = open();
    await frontend.negotiate();
    const address = (flags: number, ...three: (number | bigint)[]): Promise<void> =>
      frontend.tell(MessageId.setVringAddr, Buffer.concat([u32(0, flags), ...three.map(u64), u64(0)]));
    await address(0, 0x10010, 0x20004, 0x30002);
    await expect(address(0, 0x10008, 0x20004, 0x30002)).rejects.toThrow(Refused);
    await expect(address(0, 0x10010, 0x20002, 0x30002)).rejects.toThrow(Refused);
    await expect(address(0, 0x10010, 0x20004, 0x30001)).rejects.toThrow(Refused);
    await expect(address(2, 0x10010, 0x20004, 0x30002)).rejects.toThrow(Refused);
    for (const huge of [2n ** 53n, 2n ** 63n, 2n ** 64n - 16n]) {
      await expect(address(0, huge, 0x20004, 0x30002)).rejects.toThrow(Refused);
    }
  });

  it('refuses rings that do not exist, for every message that names one', async () => {
    const frontend = open();
    await frontend.negotiate();
    await frontend.shareMemory();
    const { kickFd } = frontend.queue;
    for (const index of [2, 255, 256, 0x7fffffff, 0xffffffff]) {
      for (const id of [MessageId.setVringNum, MessageId.setVringBase, MessageId.setVringEnable]) {
        await expect(frontend.tell(id, u32(index, 1)), `${id} of ${index}`).rejects.toThrow(Refused);
      }
      const addresses = Buffer.concat([u32(index, 0), u64(0), u64(0), u64(0), u64(0)]);
      await expect(frontend.tell(MessageId.setVringAddr, addresses)).rejects.toThrow(Refused);
    }
    // 2^8 is the bit for "no descriptor"; what is above it means nothing.
    for (const value of [2n, 255n, 0x200n, 0x1_0000_0000n, 2n ** 63n]) {
      for (const id of [MessageId.setVringKick, MessageId.setVringCall, MessageId.setVringErr]) {
        await expect(frontend.tell(id, u64(value), [kickFd]), `${id} of ${value}`).rejects.toThrow(Refused);
      }
    }
    await expect(frontend.ask(MessageId.getVringBase, u32(2, 0))).rejects.toThrow('closed the connection');
  });

  it('refuses to change size, base and addresses of a started ring, which goes on', async () => {
    const frontend = await connect();
    await expect(frontend.tell(MessageId.setVringNum, u32(0, 64))).rejects.toThrow(Refused);
    await expect(frontend.tell(MessageId.setVringBase, u32(0, 5))).rejects.toThrow(Refused);
    const { descriptors, available, used } = frontend.queue;
    for (const other of [{ descriptors: descriptors + 16 }, { available: available + 2 }, { used: used + 4 }]) {
      const addresses = { index: 0, descriptors, available, used, ...other } as DriverQueue;
      await expect(frontend.setQueueAddresses(addresses)).rejects.toThrow(Refused);
    }
    await frontend.setQueueAddresses(frontend.queue);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    await frontend.stopQueue(frontend.queue);
    await frontend.startQueue(frontend.queue);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
  });

  it('works in whatever order it is said', async () => {
    // The base has to be known when the ring is kicked off.
    const kickOff = async (f: Frontend): Promise<void> => {
      await f.tell(MessageId.setVringBase, u32(0, 0));
      await f.tell(MessageId.setVringKick, u64(0), [f.queue.kickFd]);
    };
    const steps = [
      kickOff,
      (f: Frontend) => f.tell(MessageId.setVringNum, u32(0, f.queue.size)),
      (f: Frontend) => f.setQueueAddresses(f.queue),
      (f: Frontend) => f.enableQueue(f.queue, true),
      (f: Frontend) => f.shareRegion(f.memory.ringRegion),
    ];
    const everyOrder = fc.shuffledSubarray([...steps.keys()], { minLength: steps.length });
    const property = fc.asyncProperty(everyOrder, async (order) => {
      const frontend = open({ regions: [{ guestAddress: 2 ** 20, sizeBytes: 2 ** 20 }] });
      await frontend.negotiate();
      const request = frontend.queue.prepare(flush);
      for (const step of order) {
        if (step === order.at(-1)) frontend.queue.offer(request.head);
        disk.settle(2);
        expect(frontend.queue.deviceUsedIndex).toBe(0);
        await steps[step]!(frontend);
      }
      expect((await frontend.queue.completion(request)).status).toBe(Status.ok);
      letGo();
    });
    await fc.assert(property, { numRuns: 60, seed });
  });

  it('may not tell a ring what it cannot be: enabled by 2, or at all without protocol features', async () => {
    const frontend = await connect();
    await expect(frontend.tell(MessageId.setVringEnable, u32(0, 2))).rejects.toThrow(Refused);
    await expect(frontend.tell(MessageId.setVringEnable, u32(0, 0xffffffff))).rejects.toThrow(Refused);
    letGo();
    const plain = await connect({ features: FEATURES_KNOWN & ~mask(Feature.protocolFeatures) });
    await plain.tell(MessageId.setVringEnable, u32(0, 1));
    await plain.connection.disconnected();
    expect(disk.complaints[0]).toContain('without protocol features');
  });

  it('needs no SET_VRING_ENABLE when protocol features were not negotiated', async () => {
    const frontend = await connect({ features: FEATURES_KNOWN & ~mask(Feature.protocolFeatures) });
    expect(frontend.protocolFeatures).toBe(0n);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
  });
});

describe('a running ring', () => {
  beforeEach(() => {
    disk = new ServedDisk();
  });

  it('is not looked at while it is disabled, and is as soon as it is enabled, without a kick', async () => {
    const frontend = await connect({ queues: 2 });
    const [one, two] = frontend.queues as [DriverQueue, DriverQueue];
    await frontend.enableQueue(one, false);
    const request = one.prepare(flush);
    one.offer(request.head);
    native.eventfdDrain(one.kickFd);
    disk.settle();
    expect(one.takeUsed()).toBeUndefined();
    expect(tryFlush(two)).toBe(Status.ok);
    await frontend.enableQueue(one, true);
    expect((await one.completion(request)).status).toBe(Status.ok);
  });

  it('answers what was there before it was started, without a kick', async () => {
    const frontend = open();
    await frontend.negotiate();
    await frontend.shareMemory();
    const [request] = frontend.queue.submit(flush);
    native.eventfdDrain(frontend.queue.kickFd);
    await frontend.startQueue(frontend.queue);
    expect((await frontend.queue.completion(request!)).status).toBe(Status.ok);
  });

  it('takes nothing from a kick that brings nothing', async () => {
    const frontend = await connect();
    for (let i = 0; i < 10; i++) {
      frontend.queue.kick();
      disk.settle();
    }
    expect(disk.stat(ControllerStat.requests)).toBe(0);
    expect(disk.stat(ControllerStat.kicks)).toBeGreaterThan(0);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
  });

  it('works without a kick descriptor, and keeps its reactor awake', async () => {
    const frontend = open();
    await frontend.negotiate();
    await frontend.shareMemory();
    await frontend.startQueue(frontend.queue);
    await frontend.tell(MessageId.setVringKick, u64(VRING_NO_FD));
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    expect(disk.controller.info().faults).toEqual([]);
    const again = await frontend.stopQueue(frontend.queue);
    expect(again).toBe(1);
  });

  it('works without a call descriptor', async () => {
    const frontend = await connect();
    await frontend.tell(MessageId.setVringCall, u64(VRING_NO_FD));
    native.eventfdDrain(frontend.queue.callFd);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    expect(native.eventfdDrain(frontend.queue.callFd)).toBe(0);
  });

  it('raises a new call descriptor once, as the call for an answer may have gone to the old one', async () => {
    const frontend = await connect();
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    native.eventfdDrain(frontend.queue.callFd);
    const callFd = check(native.eventfdCreate(), 'make an eventfd');
    await frontend.tell(MessageId.setVringCall, u64(0), [callFd]);
    expect(native.eventfdDrain(callFd)).toBe(1);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    expect(native.eventfdDrain(callFd)).toBe(1);
    expect(native.eventfdDrain(frontend.queue.callFd)).toBe(0);
    native.fileClose(callFd);
  });

  it('may be given another kick descriptor', async () => {
    const frontend = await connect();
    const kickFd = check(native.eventfdCreate(), 'make an eventfd');
    await frontend.tell(MessageId.setVringKick, u64(0), [kickFd]);
    const before = disk.stat(ControllerStat.kicks);
    frontend.queue.kick();
    disk.settle();
    expect(disk.stat(ControllerStat.kicks)).toBe(before);
    native.eventfdSignal(kickFd);
    disk.settle();
    expect(disk.stat(ControllerStat.kicks)).toBe(before + 1);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    native.fileClose(kickFd);
  });

  it('that the guest breaks is signalled on its error descriptor, alone; a new start makes it whole', async () => {
    const frontend = await connect({ queues: 2 });
    const [one, two] = frontend.queues as [DriverQueue, DriverQueue];
    one.offer(one.size);
    expect(await one.erred()).toBe(1);
    expect(disk.controller.info().faults).toEqual(['ring 0: a head is beyond the ring']);
    expect(disk.stat(ControllerStat.queueFaults)).toBe(1);
    expect(native.eventfdDrain(two.errFd)).toBe(0);
    expect(tryFlush(two)).toBe(Status.ok);
    expect(tryFlush(one)).toBeUndefined();

    await frontend.stopQueue(one);
    expect(disk.controller.info().faults).toEqual([]);
    one.reset();
    await frontend.startQueue(one);
    expect(tryFlush(one)).toBe(Status.ok);
    expect(disk.sessionFaults).toBe(0);
  });

  it('that is broken stays stopped when memory changes', async () => {
    const frontend = await connect();
    frontend.queue.offer(frontend.queue.size);
    await frontend.queue.erred();
    await frontend.unshareRegion(frontend.memory.dataRegion);
    await frontend.shareRegion(frontend.memory.dataRegion);
    expect(disk.controller.info().queuesRunning).toBe(0);
    expect(disk.stat(ControllerStat.queueFaults)).toBe(1);
  });
});

describe('GET_VRING_BASE', () => {
  it('answers where an idle ring goes on, as often as it is asked', async () => {
    disk = new ServedDisk();
    const frontend = await connect();
    for (let i = 0; i < 5; i++) tryFlush(frontend.queue);
    expect(await frontend.stopQueue(frontend.queue)).toBe(5);
    expect(await frontend.stopQueue(frontend.queue)).toBe(5);
    expect(tryFlush(frontend.queue)).toBeUndefined();
  });

  it('waits for the requests of its ring only, has them answered and called, and says where to go on', async () => {
    disk = new ServedDisk({ configs: heldDisk() });
    const frontend = await connect({ queues: 2 });
    const [one, two] = frontend.queues as [DriverQueue, DriverQueue];
    one.submit(read, read, read);
    const [other] = two.submit(read);
    disk.settle();
    native.eventfdDrain(one.callFd);
    const stopping = frontend.stopQueue(one);
    disk.settle();
    // Taken no more from this ring; the other one goes on.
    const [late] = one.submit(flush);
    const [alive] = two.submit(flush);
    disk.settle();
    while (two.takeUsed() !== undefined);
    expect(alive!.completion?.status).toBe(Status.ok);
    expect(one.deviceUsedIndex).toBe(0);

    disk.release();
    expect(await stopping).toBe(3);
    expect(one.deviceUsedIndex).toBe(3);
    expect(native.eventfdDrain(one.callFd)).toBe(1);
    expect(late!.completion).toBeUndefined();
    disk.settle();
    while (two.takeUsed() !== undefined);
    expect(other!.completion?.status).toBe(Status.ok);

    await frontend.startQueue(one, 3);
    expect((await one.completion(late!)).status).toBe(Status.ok);
    expect(one.deviceUsedIndex).toBe(4);
  });

  it('holds up the messages behind it until its answer is out', async () => {
    disk = new ServedDisk({ configs: heldDisk() });
    const frontend = await connect();
    frontend.queue.submit(read);
    disk.settle();
    const { connection } = frontend;
    await connection.send(encodeMessage(MessageId.getVringBase, u32(0, 0)));
    await connection.send(encodeMessage(MessageId.getQueueNum, Buffer.alloc(0)));
    disk.settle();
    await expect(connection.receive(5)).rejects.toThrow('not within');
    disk.release();
    expect(await connection.receive()).toMatchObject({ id: MessageId.getVringBase, payload: u32(0, 1) });
    expect(await connection.receive()).toMatchObject({ id: MessageId.getQueueNum, payload: u64(2) });
  });

  it('counts on past 65535', async () => {
    disk = new ServedDisk();
    const frontend = await connect({ queueSize: 256 });
    await frontend.stopQueue(frontend.queue);
    frontend.queue.usedBytes.writeUInt16LE(0xfffe, 2);
    frontend.queue.availableBytes.writeUInt16LE(0xfffe, 2);
    frontend.queue.resume();
    await frontend.startQueue(frontend.queue, 0xfffe);
    for (let i = 0; i < 4; i++) expect(tryFlush(frontend.queue)).toBe(Status.ok);
    expect(await frontend.stopQueue(frontend.queue)).toBe(2);
    expect(frontend.queue.deviceUsedIndex).toBe(2);
  });

  it.each([true, false])('leaves the ring asking for kicks (event index: %s)', async (eventIdx) => {
    disk = new ServedDisk();
    const frontend = await connect({ features: eventIdx ? FEATURES_KNOWN : FEATURES_KNOWN & ~mask(Feature.eventIdx) });
    const { queue } = frontend;
    for (let i = 0; i < 3; i++) expect(tryFlush(queue)).toBe(Status.ok);
    const flags = (): number => queue.usedBytes.readUInt16LE(0);
    const event = (): number => queue.usedBytes.readUInt16LE(4 + 8 * queue.size);
    expect([flags(), event()]).toEqual(eventIdx ? [0, 0] : [1, 0]);
    await frontend.stopQueue(queue);
    expect([flags(), event()]).toEqual(eventIdx ? [0, 3] : [0, 0]);
  });

  it('lets other features be negotiated, which hold from the next start on', async () => {
    disk = new ServedDisk();
    const frontend = await connect();
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    await frontend.stopQueue(frontend.queue);
    frontend.features &= ~mask(Feature.eventIdx, Feature.indirectDescriptors);
    await frontend.tell(MessageId.setFeatures, u64(frontend.features));
    frontend.queue.eventIdx = false;
    frontend.queue.indirect = false;
    await frontend.startQueue(frontend.queue);
    expect(tryFlush(frontend.queue)).toBe(Status.ok);
    frontend.queue.indirect = true;
    expect(tryFlush(frontend.queue)).toBeUndefined();
    expect(disk.controller.info().faults).toEqual(['ring 0: an indirect descriptor without the feature']);
  });
});
