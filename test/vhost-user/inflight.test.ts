/**
 * Goal: the in-flight region is made as asked, taken only when it is whole and known, and what it says of the requests in flight is
 * done: again, oldest first, before anything new. It is the front-end's memory, so nothing in it is believed.
 *
 * Method: a controller on a real socket, and regions that are the device's own or written by hand; the layout is written down here
 * once more, from the protocol's text. That a process may die at any moment is shown by inflight-crash and kill.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Arena, F_SEAL_SHRINK, check, native } from '../../native/index.js';
import { Disconnected, Refused } from '../frontend/frontend.js';
import type { Frontend, FrontendOptions, InflightArea } from '../frontend/frontend.js';
import {
  ConfigAt,
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  RequestType,
  Status,
  encodeInflight,
  encodeMessage,
} from '../frontend/protocol.js';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { heldDisk, memoryDisk, openDescriptors, ServedDisk } from './served-disk.js';

const SIZE = 16;
/** Of a queue with SIZE entries, aligned to 64. */
const QUEUE_BYTES = 320;
/** Behind the queues of a region that the device made: magic and cache mode. */
const TAIL_BYTES = 64;
const TAIL_MAGIC = 'STCM';
const WRITE_THROUGH = 1;
const WRITE_BACK = 2;

let disk: ServedDisk;
let descriptorsBefore: number;
let arena: Arena | undefined;
let mapped = -1;

beforeEach(() => {
  arena ??= new Arena(2 ** 31);
});

afterEach(() => {
  if (mapped >= 0) arena!.release(mapped);
  mapped = -1;
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
  disk.close();
});

function serve(configs: readonly BdevConfig[] = memoryDisk(), queues = 2): void {
  disk = new ServedDisk({ configs, queues });
  descriptorsBefore = openDescriptors();
}

/** The front-end's own view of a region. */
function view(area: InflightArea): Buffer {
  mapped = arena!.mapFile(area.fd, 0, area.mmapSize);
  return Buffer.from(arena!.buffer, mapped, area.mmapSize);
}

async function negotiated(options: FrontendOptions = {}): Promise<Frontend> {
  const frontend = disk.open({ queueSize: SIZE, ...options });
  await frontend.negotiate();
  return frontend;
}

/** A region with one queue, written by hand. @param inflight heads and their counters */
function writeRegion(
  bytes: Buffer,
  fields: { readonly version?: number; readonly lastBatchHead?: number; readonly usedIdx?: number },
  inflight: readonly (readonly [number, bigint])[] = [],
): void {
  bytes.fill(0);
  bytes.writeUInt16LE(fields.version ?? 1, 8);
  bytes.writeUInt16LE(SIZE, 10);
  bytes.writeUInt16LE(fields.lastBatchHead ?? 0, 12);
  bytes.writeUInt16LE(fields.usedIdx ?? 0, 14);
  for (const [head, counter] of inflight) {
    bytes.writeUInt8(1, 16 + 16 * head);
    bytes.writeBigUInt64LE(counter, 16 + 16 * head + 8);
  }
}

describe('GET_INFLIGHT_FD', () => {
  it('makes a region that holds all queues, is empty, and cannot be cut short', async () => {
    serve();
    const frontend = await negotiated();
    const area = await frontend.getInflight(2, SIZE);
    const mmapSize = 2 * QUEUE_BYTES + TAIL_BYTES;
    expect(area).toMatchObject({ mmapSize, mmapOffset: 0, queues: 2, queueSize: SIZE });
    const expected = Buffer.alloc(mmapSize);
    expected.write(TAIL_MAGIC, 2 * QUEUE_BYTES);
    expect(view(area).equals(expected)).toBe(true);
    expect(native.memfdGetSeals(area.fd) & F_SEAL_SHRINK).toBe(F_SEAL_SHRINK);
    native.fileClose(area.fd);
    frontend.close();
  });

  it.each([
    ['no queues', 0, SIZE],
    ['more queues than there are', 3, SIZE],
    ['the most queues that can be said', 0xffff, 0xffff],
    ['rings of no entries', 1, 0],
    ['rings longer than any here', 1, 1025],
  ])('of %s ends the session', async (_what, queues, queueSize) => {
    serve();
    const frontend = await negotiated();
    await expect(frontend.getInflight(queues, queueSize)).rejects.toThrow(Disconnected);
    frontend.close();
    disk.untilListening();
    expect(disk.complaints[0]).toMatch(/an in-flight region for/);
  });
});

describe('SET_INFLIGHT_FD', () => {
  const good = { mmapSize: 2 * QUEUE_BYTES, mmapOffset: 0, queues: 2, queueSize: SIZE };

  it.each([
    ['no queues', { queues: 0 }],
    ['more queues than there are', { queues: 3 }],
    ['rings of no entries', { queueSize: 0 }],
    ['rings longer than any here', { queueSize: 1025 }],
    ['a byte less than its queues take', { mmapSize: 2 * QUEUE_BYTES - 1 }],
    ['no bytes', { mmapSize: 0 }],
    ['more bytes than its file has', { mmapSize: 2 * QUEUE_BYTES + TAIL_BYTES + 1 }],
    ['more bytes than any disk needs', { mmapSize: 2 ** 40 }],
    ['a size that wraps', { mmapSize: 2n ** 64n - 1n }],
    ['an offset beyond its file', { mmapOffset: 2 * TAIL_BYTES }],
    ['an offset that wraps', { mmapOffset: 2n ** 64n - 64n }],
    ['an offset that cannot be counted', { mmapOffset: 2n ** 53n }],
    ['an offset that is misaligned', { mmapOffset: 8, mmapSize: 2 * QUEUE_BYTES }],
  ])('with %s is refused, and the session goes on', async (_what, wrong) => {
    serve();
    const frontend = await negotiated();
    const area = await frontend.getInflight(2, SIZE);
    const claim = encodeInflight({ ...good, ...wrong });
    await expect(frontend.tell(MessageId.setInflightFd, claim, [area.fd])).rejects.toThrow(Refused);
    await frontend.setInflight(area);
    native.fileClose(area.fd);
    frontend.close();
  });

  it('takes a region at an offset of its file, and a larger one than it needs', async () => {
    serve();
    const frontend = await negotiated({ queues: 2 });
    const fd = check(native.memfdCreate('inflight', 65536), 'make a region');
    frontend.inflightArea = { ...good, fd, mmapOffset: 4096 + 64, mmapSize: 8192 };
    const bytes = view({ ...good, fd, mmapSize: 65536 });
    await frontend.setUp();
    expect((await frontend.queues[1]!.flush()).status).toBe(Status.ok);
    // Both queues have made their part their own.
    expect(bytes.readUInt16LE(4096 + 64 + 8)).toBe(1);
    expect(bytes.readUInt16LE(4096 + 64 + QUEUE_BYTES + 8)).toBe(1);
    expect(bytes.readUInt16LE(4096 + 64 + 2 * QUEUE_BYTES + 8)).toBe(0);
    frontend.close();
  });

  describe('and the cache mode', () => {
    const tailAt = 2 * QUEUE_BYTES;

    it('is written down when the region comes, and when the guest changes it', async () => {
      serve();
      const frontend = await negotiated();
      const area = await frontend.getInflight(2, SIZE);
      const bytes = view(area);
      await frontend.setInflight(area);
      expect(bytes.readUInt32LE(tailAt + 4)).toBe(WRITE_BACK);
      await frontend.setConfig(ConfigAt.writeback, Buffer.of(0));
      expect(bytes.readUInt32LE(tailAt + 4)).toBe(WRITE_THROUGH);
      await frontend.setConfig(ConfigAt.writeback, Buffer.of(1));
      expect(bytes.readUInt32LE(tailAt + 4)).toBe(WRITE_BACK);
      native.fileClose(area.fd);
      frontend.close();
    });

    it.each([
      ['write-through', WRITE_THROUGH, 0],
      ['write-back', WRITE_BACK, 1],
      ['one that there is not, which is safe', 77, 0],
    ])('is taken from the region, not from the configuration: %s', async (_what, mode, writeback) => {
      disk = new ServedDisk({ configs: memoryDisk(), queues: 2, writeCache: writeback === 0 });
      descriptorsBefore = openDescriptors();
      const frontend = await negotiated();
      const area = await frontend.getInflight(2, SIZE);
      view(area).writeUInt32LE(mode, tailAt + 4);
      await frontend.setInflight(area);
      expect((await frontend.blkConfig()).writeback).toBe(writeback);
      native.fileClose(area.fd);
      frontend.close();
    });

    it.each([
      ['that ends with its queues', { mmapSize: tailAt }],
      ['that ends in the tail', { mmapSize: tailAt + TAIL_BYTES - 1 }],
      ['without the magic', { mmapSize: tailAt + TAIL_BYTES }],
    ])('is neither read from nor written to a region %s', async (_what, size) => {
      serve();
      const frontend = await negotiated();
      const fd = check(native.memfdCreate('inflight', 4096), 'make a region');
      const bytes = view({ ...good, fd, mmapSize: 4096 });
      if (size.mmapSize < tailAt + TAIL_BYTES) bytes.write(TAIL_MAGIC, tailAt);
      bytes.writeUInt32LE(WRITE_THROUGH, tailAt + 4);
      const before = Buffer.from(bytes);
      await frontend.setInflight({ ...good, ...size, fd });
      expect((await frontend.blkConfig()).writeback).toBe(1);
      await frontend.setConfig(ConfigAt.writeback, Buffer.of(0));
      await frontend.setConfig(ConfigAt.writeback, Buffer.of(1));
      expect(bytes.equals(before)).toBe(true);
      native.fileClose(fd);
      frontend.close();
    });
  });

  it('refuses anything but a file', async () => {
    serve();
    const frontend = await negotiated();
    const payload = encodeInflight(good);
    await expect(frontend.tell(MessageId.setInflightFd, payload, [frontend.queue.kickFd])).rejects.toThrow(Refused);
    frontend.close();
  });

  it.each([
    ['a version that is not known', (bytes: Buffer) => bytes.writeUInt16LE(2, QUEUE_BYTES + 8)],
    ['features that are not known', (bytes: Buffer) => bytes.writeUInt32LE(1, QUEUE_BYTES + 4)],
    ['another number of entries than it is said to have', (bytes: Buffer) => bytes.writeUInt16LE(8, QUEUE_BYTES + 10)],
  ])('says which queue has %s, and refuses', async (_what, spoil) => {
    serve();
    const frontend = await negotiated();
    const area = await frontend.getInflight(2, SIZE);
    const bytes = view(area);
    writeRegion(bytes.subarray(QUEUE_BYTES), {});
    await frontend.setInflight(area);
    spoil(bytes);
    await expect(frontend.setInflight(area)).rejects.toThrow(Refused);
    expect(disk.complaints[0]).toMatch(/the in-flight region of ring 1 has/);
    native.fileClose(area.fd);
    frontend.close();
  });

  it('is refused while a ring is started, which goes on', async () => {
    serve();
    const frontend = await disk.connect({ queueSize: SIZE });
    await expect(frontend.setInflight(frontend.inflightArea!)).rejects.toThrow(Refused);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    frontend.close();
  });

  it('of a file that is cut short later ends the session, not the daemon', async () => {
    serve();
    const frontend = await negotiated();
    const fd = check(native.memfdCreate('inflight', 8192), 'make a region');
    frontend.inflightArea = { ...good, fd, mmapSize: 8192 };
    await frontend.setUp();
    check(native.fileTruncate(fd, 0), 'cut the region short');
    frontend.queue.submit({ type: RequestType.flush });
    await frontend.connection.disconnected();
    frontend.close();
    disk.untilListening();
    expect(disk.complaints[0]).toMatch(/the in-flight region ends before/);
    const next = await disk.connect();
    expect((await next.queue.flush()).status).toBe(Status.ok);
    next.close();
  });
});

describe('a ring with an in-flight region', () => {
  it('marks requests from when they are taken until their answer is seen', async () => {
    serve(heldDisk());
    const frontend = await disk.connect({ queueSize: SIZE });
    const bytes = view(frontend.inflightArea!);
    const marks = (): number[] => Array.from({ length: SIZE }, (_, i) => bytes[16 + 16 * i]!);
    const requests = frontend.queue.submit(
      { type: RequestType.read, sector: 0, inBytes: 512 },
      { type: RequestType.read, sector: 1, inBytes: 512 },
    );
    disk.settle();
    const heads = requests.map(({ head }) => head);
    expect(
      marks()
        .flatMap((mark, head) => (mark === 1 ? [head] : []))
        .sort(),
    ).toEqual([...heads].sort());
    const [first, second] = heads.map((head) => bytes.readBigUInt64LE(16 + 16 * head + 8));
    expect(second! - first!).toBe(1n);
    disk.release();
    expect(marks().every((mark) => mark === 0)).toBe(true);
    expect(bytes.readUInt16LE(14)).toBe(2);
    frontend.close();
  });

  it('does what was in flight again, oldest first, before what is new; its call is raised for answers nobody told of', async () => {
    serve();
    const frontend = await negotiated();
    const area = await frontend.getInflight(1, SIZE);
    frontend.inflightArea = area;
    const { queue } = frontend;
    const at = (sector: number): number =>
      queue.submit({ type: RequestType.read, sector, inBytes: 512, indirectFrom: 0 })[0]!.head;
    // Five were offered and taken; the answers of the third and fourth were published, and one was not marked so yet.
    const [a, b, c, d, e] = [at(1), at(2), at(3), at(4), at(5)];
    for (const [i, head] of [c, d].entries()) {
      queue.usedBytes.writeUInt32LE(head, 4 + 8 * i);
      queue.usedBytes.writeUInt32LE(1, 8 + 8 * i);
    }
    queue.usedBytes.writeUInt16LE(2, 2);
    const bytes = view(area);
    writeRegion(bytes, { lastBatchHead: d, usedIdx: 1 }, [
      [a, 9n],
      [b, 2n ** 32n],
      [e, 3n],
      [d, 7n],
    ]);
    await frontend.shareInflight();
    await frontend.shareMemory();
    const late = at(6);
    await frontend.startQueue(queue);
    disk.settle();
    expect(disk.journal.entries.map(({ offsetBytes }) => offsetBytes / 512)).toEqual([5, 1, 2, 6]);
    expect(disk.stat(ControllerStat.resubmitted)).toBe(3);
    expect(await queue.called()).toBeGreaterThan(0);
    const answered = new Set<number>();
    for (let used = queue.takeUsed(); used !== undefined; used = queue.takeUsed()) answered.add(used.id);
    expect(answered).toEqual(new Set([a, b, c, d, e, late]));
    // New requests count on from the newest of before.
    expect(bytes.readBigUInt64LE(16 + 16 * late + 8)).toBe(2n ** 32n + 1n);
    frontend.close();
  });

  it.each([
    ['more answers than the ring has entries', { usedIdx: 0xff00 }, []],
    ['a batch that leaves the ring', { usedIdx: 0xffff, lastBatchHead: SIZE }, []],
  ] as const)('that tells of %s is broken, alone', async (_what, fields, inflight) => {
    serve();
    const frontend = await negotiated({ queues: 2 });
    const area = await frontend.getInflight(2, SIZE);
    frontend.inflightArea = area;
    const bytes = view(area);
    writeRegion(bytes.subarray(0, QUEUE_BYTES), fields, inflight);
    await frontend.setUp();
    await frontend.queue.erred();
    expect(disk.controller.info().faults).toEqual(['ring 0: the in-flight region does not fit the ring']);
    expect((await frontend.queues[1]!.flush()).status).toBe(Status.ok);
    frontend.close();
  });

  it('believes no head that the guest has wrecked since', async () => {
    serve();
    const frontend = await negotiated();
    const area = await frontend.getInflight(1, SIZE);
    frontend.inflightArea = area;
    writeRegion(view(area), {}, [[3, 1n]]);
    frontend.queue.writeDescriptor(3, { address: 2n ** 40n, lengthBytes: 512 });
    await frontend.setUp();
    await frontend.queue.erred();
    expect(disk.controller.info().faults).toEqual(['ring 0: a buffer is outside guest memory']);
    frontend.close();
  });

  it('waits for a region of its kind and length, and says so', async () => {
    serve();
    const frontend = await negotiated();
    frontend.inflightArea = await frontend.getInflight(1, SIZE / 2);
    await frontend.setUp();
    disk.settle();
    expect(disk.controller.info().faults[0]).toMatch(/ring 0: its in-flight region was made for/);
    frontend.close();
  });

  it('may be shorter than the region', async () => {
    serve();
    const frontend = await negotiated();
    frontend.inflightArea = await frontend.getInflight(1, 1024);
    await frontend.setUp();
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    frontend.close();
  });

  it('that was stopped with an answer starts anew where it is told to; its region is empty then', async () => {
    serve();
    const frontend = await disk.connect({ queueSize: SIZE });
    const bytes = view(frontend.inflightArea!);
    for (let i = 0; i < 5; i++) await frontend.queue.flush();
    expect(bytes.readUInt16LE(8)).toBe(1);
    expect(await frontend.stopQueue(frontend.queue)).toBe(5);
    await frontend.barrier();
    expect(bytes.readUInt16LE(8)).toBe(0);
    // As a driver does that starts from the beginning.
    frontend.queue.reset();
    await frontend.startQueue(frontend.queue);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    expect(bytes.readUInt16LE(14)).toBe(1);
    frontend.close();
  });

  it('stays in order over sessions that end, and over a back-end that is stopped', async () => {
    serve(heldDisk());
    const frontend = await disk.connect({ queueSize: SIZE });
    for (let round = 0; round < 3; round++) {
      frontend.queue.submit({ type: RequestType.read, sector: round, inBytes: 512 });
      disk.settle();
      frontend.disconnect();
      disk.settle();
      disk.release();
      disk.untilListening();
      await frontend.reconnect();
      // It was in flight when the front-end left, and answered after that.
      expect(frontend.queue.takeUsed()).toBeDefined();
      expect(disk.stat(ControllerStat.resubmitted)).toBe(0);
    }
    frontend.close();
  });

  it('is not tracked when its indices are apart at its first start, as nobody could tell later where it was', async () => {
    serve();
    const frontend = await negotiated();
    frontend.inflightArea = await frontend.getInflight(1, SIZE);
    const bytes = view(frontend.inflightArea);
    await frontend.shareInflight();
    await frontend.shareMemory();
    frontend.queue.publishIndex(7);
    frontend.queue.resume();
    await frontend.startQueue(frontend.queue, 7);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    expect(bytes.readUInt16LE(8)).toBe(0);
    frontend.close();
  });

  it('is not asked for by a front-end that has not negotiated it', async () => {
    serve();
    const frontend = await disk.connect({ protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~(1n << 12n) });
    expect(frontend.inflightArea).toBeNull();
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    await frontend.connection.send(encodeMessage(MessageId.setOwner, Buffer.alloc(0)));
    await frontend.barrier();
    frontend.close();
  });
});
