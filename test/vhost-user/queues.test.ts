/**
 * Goal: several rings of one disk work side by side, split or packed: each answers what was asked on it, all see the same disk, and
 * what happens to one does not happen to the others. And what is said of a ring by messages holds for both kinds.
 *
 * Method: front-ends with up to eight rings on one session, with load on all of them at once, and each of them stopped, disabled,
 * broken and started anew under the load of the others.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { Refused } from '../frontend/frontend.js';
import type { Frontend, FrontendOptions } from '../frontend/frontend.js';
import type { DriverQueue } from '../frontend/driver-queue.js';
import { MessageId, RequestType, Status, u32 } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { heldDisk, ServedDisk } from './served-disk.js';

const QUEUES = 8;
const BLOCK_BYTES = 4096;

let disk: ServedDisk;
afterEach(() => disk.close());

const kinds: readonly { readonly kind: string; readonly options: FrontendOptions }[] = [
  { kind: 'split', options: {} },
  { kind: 'packed', options: { packed: true } },
];

/** Writes a block of its own for each turn on a queue, reads it back, flushes. */
async function work(queue: DriverQueue, turns: number): Promise<void> {
  for (let turn = 0; turn < turns; turn++) {
    const sector = ((queue.index * turns + turn) * BLOCK_BYTES) / 512;
    const content = fresh(BLOCK_BYTES);
    expect(await queue.write(sector, content)).toMatchObject({ status: Status.ok, usedBytes: 1 });
    expect(await queue.flush()).toMatchObject({ status: Status.ok, usedBytes: 1 });
    expectBytes((await queue.read(sector, BLOCK_BYTES)).data, content, `queue ${queue.index}, turn ${turn}`);
  }
}

describe.each(kinds)('several $kind rings of one disk', ({ options }) => {
  async function connect(queues = QUEUES): Promise<Frontend> {
    return disk.connect({ queues, queueSize: 16, ...options });
  }

  it.each([1, 2, QUEUES])('answer each what was asked on it: %i', async (count) => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(count);
    await Promise.all(frontend.queues.map((queue) => work(queue, 12)));
    expect(disk.controller.info().queuesRunning).toBe(count);
    frontend.close();
  });

  it('see one disk: what one has written the others read', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect();
    const content = fresh(BLOCK_BYTES);
    await frontend.queues[3]!.write(64, content);
    for (const queue of frontend.queues) expectBytes((await queue.read(64, BLOCK_BYTES)).data, content, 'read');
    frontend.close();
  });

  it('give their answers on their own rings, and call for them there alone', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(4);
    for (const queue of frontend.queues) await queue.called();
    const [, second] = frontend.queues;
    const [request] = second!.submit({ type: RequestType.read, sector: 0, inBytes: 512 });
    await second!.called();
    expect((await second!.completion(request!)).status).toBe(Status.ok);
    for (const queue of frontend.queues.filter((other) => other !== second)) {
      expect(queue.takeUsed()).toBeUndefined();
      await expect(queue.called(20)).rejects.toThrow('not within');
    }
    frontend.close();
  });

  it('stop and start one by one, while the others go on', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(3);
    const [first, ...others] = frontend.queues as [DriverQueue, DriverQueue, DriverQueue];
    for (let round = 0; round < 4; round++) {
      const [base] = await Promise.all([frontend.stopQueue(first), ...others.map((queue) => work(queue, 4))]);
      expect(disk.controller.info().queuesRunning).toBe(2);
      await frontend.startQueue(first, base);
      await work(first, 5);
    }
    frontend.close();
  });

  it('wait for their own requests only when one is stopped', async () => {
    disk = new ServedDisk({ queues: QUEUES, configs: heldDisk() });
    const frontend = await connect(2);
    const [first, second] = frontend.queues as [DriverQueue, DriverQueue];
    const [held] = second.submit({ type: RequestType.read, sector: 0, inBytes: 512 });
    disk.settle();
    await frontend.stopQueue(first);
    expect(disk.controller.info().inflight).toBe(1);
    disk.release();
    expect((await second.completion(held!)).status).toBe(Status.ok);
    frontend.close();
  });

  it('take nothing while disabled, and all that was offered meanwhile when enabled', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(2);
    const [first, second] = frontend.queues as [DriverQueue, DriverQueue];
    await frontend.enableQueue(first, false);
    const requests = first.submit({ type: RequestType.flush }, { type: RequestType.read, sector: 0, inBytes: 512 });
    await work(second, 3);
    expect(first.takeUsed()).toBeUndefined();
    await frontend.enableQueue(first, true);
    for (const request of requests) expect((await first.completion(request)).status).toBe(Status.ok);
    frontend.close();
  });

  it('go on over a session that ends and a front-end that comes back', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(4);
    for (let round = 0; round < 3; round++) {
      await Promise.all(frontend.queues.map((queue) => work(queue, 3)));
      await frontend.reconnect();
    }
    await Promise.all(frontend.queues.map((queue) => work(queue, 3)));
    frontend.close();
  });

  it('go on where they were when all memory is shared anew', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(4);
    for (let round = 0; round < 3; round++) {
      await Promise.all(frontend.queues.map((queue) => work(queue, 3)));
      await frontend.shareMemoryTable();
    }
    await Promise.all(frontend.queues.map((queue) => work(queue, 3)));
    frontend.close();
  });

  it('are as many as the disk has, and no more', async () => {
    disk = new ServedDisk({ queues: 2 });
    const frontend = await connect(2);
    expect((await frontend.blkConfig()).numQueues).toBe(2);
    await expect(frontend.tell(MessageId.setVringNum, u32(2, 16))).rejects.toThrow(Refused);
    await Promise.all(frontend.queues.map((queue) => work(queue, 2)));
    frontend.close();
  });

  it('are broken one by one', async () => {
    disk = new ServedDisk({ queues: QUEUES });
    const frontend = await connect(3);
    const [first, ...others] = frontend.queues as [DriverQueue, DriverQueue, DriverQueue];
    const request = first.prepare({ type: RequestType.read, sector: 0, inBytes: 512, framing: { writable: [0] } });
    first.offer(request.head);
    await first.erred();
    expect(disk.controller.info().faults).toEqual(['ring 0: a request without a status byte']);
    await Promise.all(others.map((queue) => work(queue, 5)));
    for (const queue of others) await expect(queue.erred(20)).rejects.toThrow('not within');
    frontend.close();
  });
});

describe('a packed ring, by messages', () => {
  it('may have any size up to 1024', async () => {
    for (const queueSize of [1, 7, 100, 1023, 1024]) {
      disk = new ServedDisk();
      const frontend = await disk.connect({ packed: true, queueSize });
      expect((await frontend.queue.run({ type: RequestType.flush, indirectFrom: 0 })).status).toBe(Status.ok);
      frontend.close();
      if (queueSize < 1024) disk.close();
    }
  });

  it('of more than 1024 entries is refused', async () => {
    disk = new ServedDisk();
    const frontend = disk.open({ packed: true });
    await frontend.negotiate();
    await expect(frontend.tell(MessageId.setVringNum, u32(0, 1025))).rejects.toThrow(Refused);
    frontend.close();
  });

  it('is stopped and goes on with both of its places and laps', async () => {
    disk = new ServedDisk();
    const frontend = await disk.connect({ packed: true, queueSize: 4 });
    for (let count = 1; count <= 9; count++) {
      await frontend.queue.run({ type: RequestType.flush, indirectFrom: 0 });
      const base = await frontend.stopQueue(frontend.queue);
      const half = (count % 4) | (Math.floor(count / 4) % 2 === 0 ? 0x8000 : 0);
      expect(base).toBe((half | (half << 16)) >>> 0);
      await frontend.startQueue(frontend.queue, base);
    }
    frontend.close();
  });

  it.each([
    ['its base is beyond its size', 4, 0x8004_8000],
    ['its base is beyond its size', 4, 0x8000_8004],
    ['its positions are further apart than it is long', 4, 0x8002_8001],
  ])('does not start where it cannot be: %s', async (fault, queueSize, base) => {
    disk = new ServedDisk();
    const protocolFeatures = 0x8209n;
    const frontend = disk.open({ packed: true, queueSize, protocolFeatures });
    await frontend.negotiate();
    await frontend.shareMemory();
    await frontend.startQueue(frontend.queue, base);
    disk.settle();
    expect(disk.controller.info().faults).toEqual([`ring 0: ${fault}`]);
    frontend.close();
  });

  it('of a size that only packed rings have does not start as a split one', async () => {
    disk = new ServedDisk();
    const frontend = disk.open({ packed: true, queueSize: 7, protocolFeatures: 0x8209n });
    await frontend.negotiate();
    await frontend.shareMemory();
    await frontend.tell(MessageId.setVringNum, u32(0, 7));
    // Another driver comes, before anything has started.
    frontend.features &= ~(1n << 34n);
    const words = Buffer.alloc(8);
    words.writeBigUInt64LE(frontend.features);
    await frontend.tell(MessageId.setFeatures, words);
    await frontend.setQueueAddresses(frontend.queue);
    const kick = Buffer.alloc(8);
    await frontend.tell(MessageId.setVringKick, kick, [frontend.queue.kickFd]);
    expect(disk.controller.info().faults).toEqual(['ring 0: its size is not a power of two']);
    frontend.close();
  });
});
