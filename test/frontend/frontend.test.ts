/**
 * Goal: the front-end does what it says, so that a test built on it fails for its device's reasons only.
 *
 * Method: it drives a disk in memory through every feature it can negotiate or leave out, and what it wrote one way
 * is read back another way.
 */
import { afterEach, describe, expect, it } from 'vitest';
import type { MallocConfig } from '../../src/bdev/malloc/malloc.js';
import { LocalDevice } from './local-device.js';
import { Frontend } from './frontend.js';
import type { FrontendOptions } from './frontend.js';
import { runLoad } from './load.js';
import {
  FEATURES_KNOWN,
  Feature,
  ID_BYTES,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  RequestType,
  Status,
  mask,
} from './protocol.js';
import { WaitTimeout } from './waiting.js';

const DISK_BYTES = 16 * 2 ** 20;
const QUEUES = 3;
const DISK: MallocConfig = { name: 'disk', module: 'malloc', sizeBytes: DISK_BYTES, blockSizeBytes: 512 };

const closers: (() => void | Promise<void>)[] = [];

afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

function serve(): LocalDevice {
  const device = new LocalDevice([DISK], { queues: QUEUES, serial: 'front-end test' });
  closers.push(() => device[Symbol.asyncDispose]());
  return device;
}

async function attach(device: LocalDevice, options: FrontendOptions = {}): Promise<Frontend> {
  const frontend = await Frontend.connect(device.socketPath, { step: device.step, ...options });
  closers.push(() => frontend.close());
  return frontend;
}

/** Bytes that differ from place to place. */
function pattern(lengthBytes: number, salt: number): Buffer {
  return Buffer.from(Uint8Array.from({ length: lengthBytes }, (_, i) => i * 7 + (i >> 8) * 13 + salt));
}

const without = (...bits: number[]): bigint => FEATURES_KNOWN & ~mask(...bits);

describe('the front-end', () => {
  it.each<[string, FrontendOptions]>([
    ['everything', {}],
    ['no event index', { features: without(Feature.eventIdx) }],
    ['no indirect descriptors', { features: without(Feature.indirectDescriptors) }],
    ['no protocol features', { features: without(Feature.protocolFeatures) }],
    ['a memory table', { protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.configureMemSlots) }],
    ['no acknowledgements', { protocolFeatures: mask(ProtocolFeature.config, ProtocolFeature.multiQueue) }],
    ['rings of 4', { queueSize: 4 }],
    ['one region', { regions: [{ guestAddress: 0, sizeBytes: 2 ** 24 }] }],
  ])('writes and reads back with %s', async (_, options) => {
    const frontend = await attach(serve(), options);
    const data = pattern(16384, 1);
    expect(await frontend.queue.write(24, data)).toMatchObject({ status: Status.ok, usedBytes: 1 });
    const { status, usedBytes, data: read } = await frontend.queue.read(24, 16384);
    expect([status, usedBytes]).toEqual([Status.ok, 16385]);
    expect(read.equals(data)).toBe(true);
  });

  it('negotiates only what it is told to', async () => {
    const features = mask(Feature.version1, Feature.flush, Feature.protocolFeatures);
    const frontend = await attach(serve(), { features, protocolFeatures: mask(ProtocolFeature.config) });
    expect(frontend.features).toBe(features);
    expect(frontend.protocolFeatures).toBe(mask(ProtocolFeature.config));
    expect(frontend.offeredFeatures & mask(Feature.eventIdx)).not.toBe(0n);
    expect([frontend.queue.eventIdx, frontend.queue.indirect]).toEqual([false, false]);
  });

  it('reads the configuration', async () => {
    const frontend = await attach(serve());
    expect(await frontend.blkConfig()).toMatchObject({
      capacitySectors: DISK_BYTES / 512,
      numQueues: QUEUES,
      writeback: 1,
    });
  });

  it.each([
    ['header and data in one piece', [16 + 1024], [1]],
    ['a header of sixteen pieces', [...Array<number>(16).fill(1), 1024], [1]],
    ['the header cut where the data begins', [10, 6 + 1000, 24], [1]],
  ])('cuts a write into %s', async (_, readable, writable) => {
    const frontend = await attach(serve());
    const out = pattern(1024, 2);
    const written = await frontend.queue.run({
      type: RequestType.write,
      sector: 3,
      out,
      framing: { readable, writable },
    });
    expect(written.status).toBe(Status.ok);
    expect((await frontend.queue.read(3, 1024)).data.equals(out)).toBe(true);
  });

  it.each([0, 1, 2, 3, Infinity])('describes a read by a table from piece %d on', async (indirectFrom) => {
    const frontend = await attach(serve());
    const data = pattern(2048, 3);
    await frontend.queue.write(100, data);
    const framing = { readable: [7, 9], writable: [1000, 1048 + 1] };
    const request = { type: RequestType.read, sector: 100, inBytes: 2048, framing, indirectFrom };
    const read = await frontend.queue.run(request);
    expect([read.status, read.usedBytes]).toEqual([Status.ok, 2049]);
    expect(read.data.equals(data)).toBe(true);
  });

  it('places data where it is told to, aligned or not', async () => {
    const frontend = await attach(serve());
    const out = pattern(1536, 4);
    const region = frontend.memory.ringRegion;
    await frontend.queue.run({ type: RequestType.write, sector: 9, out, region, shiftBytes: 3 });
    expect((await frontend.queue.read(9, 1536)).data.equals(out)).toBe(true);
  });

  it('flushes, discards, zeroes and asks for the serial', async () => {
    const frontend = await attach(serve());
    const { queue } = frontend;
    await queue.write(0, pattern(4096, 5));
    expect((await queue.flush()).status).toBe(Status.ok);
    expect((await queue.discard({ sector: 0, sectors: 2 })).status).toBe(Status.ok);
    expect((await queue.writeZeroes({ sector: 2, sectors: 3, unmap: true })).status).toBe(Status.ok);
    const { data } = await queue.read(0, 4096);
    expect(data.subarray(0, 5 * 512).every((byte) => byte === 0)).toBe(true);
    expect(data.subarray(5 * 512).equals(pattern(4096, 5).subarray(5 * 512))).toBe(true);
    const id = await queue.getId();
    expect(id.data.toString('latin1')).toBe('front-end test'.padEnd(ID_BYTES, '\0'));
  });

  it('keeps many requests on several queues apart', async () => {
    const frontend = await attach(serve(), { queues: QUEUES });
    const writes = frontend.queues.map((queue, q) =>
      queue.submit(
        ...Array.from({ length: 20 }, (_, i) => ({
          type: RequestType.write,
          sector: 100 * q + i,
          out: pattern(512, 20 * q + i),
        })),
      ),
    );
    for (const [q, requests] of writes.entries()) {
      for (const request of requests) {
        expect((await frontend.queues[q]!.completion(request)).status).toBe(Status.ok);
      }
    }
    for (let q = 0; q < QUEUES; q++) {
      const { data } = await frontend.queue.read(100 * q, 20 * 512);
      for (let i = 0; i < 20; i++) {
        expect(data.subarray(512 * i, 512 * (i + 1)).equals(pattern(512, 20 * q + i))).toBe(true);
      }
    }
  });

  it('is called when it wants to be, and only then', async () => {
    const frontend = await attach(serve(), { timeoutMs: 200 });
    const { queue } = frontend;
    // Setting the call descriptor of a started ring raises it once.
    await queue.called();
    queue.suppressCalls(true);
    for (let i = 0; i < 300; i++) await queue.read(0, 512);
    await expect(queue.called()).rejects.toThrow(WaitTimeout);
    queue.suppressCalls(false);
    await queue.read(0, 512);
    expect(await queue.called()).toBe(1);
  });

  it('goes on where it was after it connects anew', async () => {
    const device = serve();
    const frontend = await attach(device, { queues: 2 });
    await frontend.queues[1]!.write(0, pattern(512, 6));
    await frontend.reconnect();
    expect((await frontend.queues[1]!.read(0, 512)).data.equals(pattern(512, 6))).toBe(true);
    await frontend.detach();
    await frontend.reconnect();
    expect((await frontend.queue.read(0, 512)).data.equals(pattern(512, 6))).toBe(true);
  });

  it('sees that the back-end is gone', async () => {
    const device = serve();
    const frontend = await attach(device);
    expect(frontend.connection.isOpen).toBe(true);
    void device.controller.close();
    await frontend.connection.disconnected();
    expect(frontend.connection.isOpen).toBe(false);
  });
});

describe('the load generator', () => {
  it('notices a device that does not answer', async () => {
    const frontend = await attach(serve());
    // Nobody steps the device while the generator runs.
    const load = (): unknown =>
      runLoad(frontend, frontend.queue, { depth: 4, seconds: 10, rangeBytes: DISK_BYTES, stallSeconds: 0.05 });
    expect(load).toThrow('wait for the device to answer: ETIMEDOUT');
  });

  it('takes no more requests than the ring has room for', async () => {
    const frontend = await attach(serve(), { queueSize: 16, features: without(Feature.indirectDescriptors) });
    const load = (): unknown => runLoad(frontend, frontend.queue, { depth: 6, seconds: 1, rangeBytes: DISK_BYTES });
    expect(load).toThrow('a queue of 16 has no room for 6 requests');
  });
});
