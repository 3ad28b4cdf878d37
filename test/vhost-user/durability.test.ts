/**
 * Goal: a write is answered only when it is as durable as its driver was told (VIRTIO 1.2, 5.2.5.2 and 5.2.6.2): at once where
 * the driver cannot or will not flush, at the next FLUSH elsewhere.
 *
 * Method: every combination of what is offered, negotiated and chosen, on a real socket; the journal of the disk says which
 * writes were asked to be durable (FUA), and in which order requests reached it.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { DelayConfig } from '../../src/bdev/delay/delay.js';
import type { Frontend } from '../frontend/frontend.js';
import { FEATURES_KNOWN, Feature, MessageId, RequestType, Status, mask, u32, u64 } from '../frontend/protocol.js';
import { HELD_US, ServedDisk, heldDisk, memoryDisk } from './served-disk.js';
import type { ServedDiskOptions } from './served-disk.js';

const WRITEBACK_AT = 32;

let disk: ServedDisk;
let frontend: Frontend | undefined;

beforeEach(() => {
  frontend = undefined;
});

afterEach(() => {
  frontend?.close();
  disk.close();
});

async function connect(features: readonly number[], options: ServedDiskOptions = {}): Promise<Frontend> {
  disk = new ServedDisk(options);
  const others = FEATURES_KNOWN & ~mask(Feature.flush, Feature.configWce);
  frontend = await disk.connect({ features: others | mask(...features) });
  return frontend;
}

/** Whether a write that is made now is asked to be durable when it completes. */
async function writesThrough({ queue }: Frontend): Promise<boolean> {
  expect((await queue.write(0, Buffer.alloc(512))).status).toBe(Status.ok);
  const { type, flags } = disk.journal.entries.at(-1)!;
  expect(type).toBe(IoType.write);
  return (flags & IoFlag.fua) !== 0;
}

describe('a write', () => {
  const negotiable = [[], [Feature.flush], [Feature.configWce], [Feature.flush, Feature.configWce]];
  const cases = negotiable.flatMap((features) =>
    [true, false].flatMap((writeCache) =>
      [undefined, 0, 1]
        // A guest can choose only what it negotiated.
        .filter((chosen) => chosen === undefined || features.includes(Feature.configWce))
        .map((chosen) => {
          const cached = chosen === undefined ? writeCache : chosen === 1;
          const canFlush = features.length > 0;
          return {
            features,
            writeCache,
            chosen,
            negotiated: features.map((f) => (f === Feature.flush ? 'FLUSH' : 'CONFIG_WCE')).join(' and ') || 'neither',
            durable: canFlush ? !cached : true,
          };
        }),
    ),
  );

  it.each(cases)(
    'is durable at once: $durable, with $negotiated negotiated, a write cache: $writeCache, writeback set to $chosen',
    async ({ features, writeCache, chosen, durable }) => {
      const guest = await connect(features, { writeCache });
      if (chosen !== undefined) await guest.setConfig(WRITEBACK_AT, Buffer.from([chosen]));
      expect(await writesThrough(guest)).toBe(durable);
      expect(disk.controller.info().writeback).toBe(chosen === undefined ? writeCache : chosen === 1);
    },
  );

  it('is durable at once before any feature was negotiated, whatever the session before had', async () => {
    const guest = await connect([Feature.flush]);
    expect(await writesThrough(guest)).toBe(false);
    guest.close();
    disk.untilListening();
    frontend = disk.open();
    await frontend.shareMemoryTable();
    await frontend.startQueue(frontend.queue);
    expect(await writesThrough(frontend)).toBe(true);
  });

  it('is durable at once from the moment the guest turns write-back off, until it turns it on', async () => {
    const guest = await connect([Feature.flush, Feature.configWce]);
    expect(await writesThrough(guest)).toBe(false);
    await guest.setConfig(WRITEBACK_AT, Buffer.from([0]));
    expect(await writesThrough(guest)).toBe(true);
    await guest.setConfig(WRITEBACK_AT, Buffer.from([1]));
    expect(await writesThrough(guest)).toBe(false);
  });

  it('is durable at once again after a reconnect, when the guest had turned write-back off', async () => {
    const guest = await connect([Feature.flush, Feature.configWce]);
    await guest.setConfig(WRITEBACK_AT, Buffer.from([0]));
    disk.settle();
    await guest.reconnect();
    expect(await writesThrough(guest)).toBe(true);
  });

  it('follows the features of its own session, not those of the one before', async () => {
    const guest = await connect([Feature.flush]);
    expect(await writesThrough(guest)).toBe(false);
    guest.close();
    disk.untilListening();
    frontend = await disk.connect({ features: FEATURES_KNOWN & ~mask(Feature.flush, Feature.configWce) });
    expect(await writesThrough(frontend)).toBe(true);
  });

  it('follows the features a driver negotiates anew after a reset', async () => {
    const guest = await connect([Feature.flush, Feature.configWce]);
    await guest.stopQueue(guest.queue);
    guest.features &= ~mask(Feature.flush, Feature.configWce);
    await guest.tell(MessageId.setFeatures, u64(guest.features));
    await guest.startQueue(guest.queue);
    expect(await writesThrough(guest)).toBe(true);
  });

  it('of zeroes is as durable as one of data; an unmap flag is passed on', async () => {
    const guest = await connect([]);
    await guest.queue.writeZeroes({ sector: 0, sectors: 8, unmap: true });
    expect(disk.journal.entries.at(-1)).toMatchObject({ type: IoType.writeZeroes, flags: IoFlag.fua | IoFlag.unmap });
    await guest.queue.writeZeroes({ sector: 0, sectors: 8 });
    expect(disk.journal.entries.at(-1)).toMatchObject({ type: IoType.writeZeroes, flags: IoFlag.fua });
  });

  it('that has not been flushed asks nothing more of the disk', async () => {
    const guest = await connect([Feature.flush]);
    for (let i = 0; i < 10; i++) await guest.queue.write(8 * i, Buffer.alloc(4096));
    expect(disk.journal.entries.map((entry) => entry.type)).toEqual(Array(10).fill(IoType.write));
  });
});

describe('FLUSH', () => {
  /** A disk that holds back flushes. */
  const slowFlush = (): ServedDiskOptions => {
    const delay: DelayConfig = {
      name: 'disk',
      module: 'delay',
      base: 'base',
      readUs: 0,
      writeUs: 0,
      flushUs: HELD_US,
      discardUs: 0,
      jitterUs: 0,
    };
    return { configs: [...memoryDisk(512, 'base'), delay] };
  };

  it('reaches the disk once, after every write that was answered before it', async () => {
    const guest = await connect([Feature.flush], { configs: memoryDisk() });
    for (let i = 0; i < 5; i++) await guest.queue.write(8 * i, Buffer.alloc(4096));
    expect((await guest.queue.flush()).status).toBe(Status.ok);
    const types = disk.journal.entries.map((entry) => entry.type);
    expect(types).toEqual([...Array<number>(5).fill(IoType.write), IoType.flush]);
    expect(disk.journal.entries.every((entry) => entry.status === IoStatus.success)).toBe(true);
  });

  it('is answered only when the disk has flushed', async () => {
    const guest = await connect([Feature.flush], slowFlush());
    await guest.queue.write(0, Buffer.alloc(4096));
    const [request] = guest.queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(disk.journal.entries.at(-1)).toMatchObject({ type: IoType.flush, status: undefined });
    expect(guest.queue.takeUsed()).toBeUndefined();
    disk.release();
    expect(await guest.queue.completion(request!)).toMatchObject({ status: Status.ok, usedBytes: 1 });
  });

  it('waits for no write in flight: it promises nothing of them', async () => {
    const guest = await connect([Feature.flush], { configs: heldDisk() });
    guest.queue.submit({ type: RequestType.write, sector: 0, out: Buffer.alloc(4096) });
    disk.settle();
    expect((await guest.queue.flush()).status).toBe(Status.ok);
    expect(disk.journal.entries.map(({ status }) => status)).toEqual([undefined, IoStatus.success]);
  });

  it('works whether or not it was negotiated, and on a read-only disk', async () => {
    const guest = await connect([], { readOnly: true });
    expect((await guest.queue.flush()).status).toBe(Status.ok);
    expect(disk.journal.entries).toHaveLength(1);
  });

  it('is not asked of the disk by anything else: stopping rings and ending a session leave the cache to the disk', async () => {
    const guest = await connect([Feature.flush]);
    await guest.queue.write(0, Buffer.alloc(4096));
    await guest.ask(MessageId.getVringBase, u32(0, 0));
    guest.close();
    frontend = undefined;
    disk.untilListening();
    expect(disk.journal.entries.map((entry) => entry.type)).toEqual([IoType.write]);
  });
});
