/**
 * Goal: guest memory comes and goes as the front-end says, never below a request in flight; what cannot be mapped is refused,
 * and nothing a front-end says of its memory, or does to it, lets the device touch anything else or ends more than its session.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket, real memfds. A disk that holds its completions back
 * keeps requests in flight for as long as a test wants.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, openSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { F_SEAL_SHRINK, check, native } from '../../native/index.js';
import type { Completion, Request } from '../frontend/driver-queue.js';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import { Region } from '../frontend/guest-memory.js';
import {
  DescriptorFlag,
  MessageId,
  ProtocolFeature,
  RequestType,
  Status,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { isRoot } from '../support/loop-device.js';
import { uringFile } from '../bdev/stacks.js';
import { blkHeader, writeChain } from './chains.js';
import { ServedDisk, heldDisk, memoryDisk, openDescriptors } from './served-disk.js';
import type { ServedDiskOptions } from './served-disk.js';

const MIB = 2 ** 20;
/** Memory goes as a table, not region by region. */
const tables = { protocolFeatures: mask(ProtocolFeature.multiQueue, ProtocolFeature.replyAck, ProtocolFeature.config) };

let disk: ServedDisk;
let descriptorsBefore: number;
let arenaBefore: number;

function serve(options: ServedDiskOptions = {}): void {
  disk = new ServedDisk(options);
  descriptorsBefore = openDescriptors();
  arenaBefore = disk.rig.arena.usedBytes;
}

afterEach(() => {
  // Nothing of a session may be left.
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
  expect(disk.rig.arena.usedBytes).toBe(arenaBefore);
  disk.close();
});

interface RegionClaim {
  readonly guestAddress: number | bigint;
  readonly sizeBytes: number | bigint;
  readonly userAddress: number | bigint;
  readonly mmapOffset: number | bigint;
}

function encodeRegion({ guestAddress, sizeBytes, userAddress, mmapOffset }: RegionClaim): Buffer {
  return Buffer.concat([u64(guestAddress), u64(sizeBytes), u64(userAddress), u64(mmapOffset)]);
}

function addRegion(frontend: Frontend, claim: RegionClaim, fd: number): Promise<void> {
  return frontend.tell(MessageId.addMemReg, Buffer.concat([u64(0), encodeRegion(claim)]), [fd]);
}

function removeRegion(frontend: Frontend, claim: RegionClaim): Promise<void> {
  return frontend.tell(MessageId.remMemReg, Buffer.concat([u64(0), encodeRegion(claim)]));
}

async function withMemfd(sizeBytes: number, body: (fd: number) => Promise<void>): Promise<void> {
  const fd = check(native.memfdCreate('memory', sizeBytes), 'make a memfd');
  try {
    await body(fd);
  } finally {
    native.fileClose(fd);
  }
}

/** Whether a read goes through on the queue. */
async function works(frontend: Frontend, queue = frontend.queue): Promise<boolean> {
  return (await queue.read(0, 4096)).status === Status.ok;
}

function take(frontend: Frontend, request: Request): Completion | undefined {
  for (const queue of frontend.queues) while (queue.takeUsed() !== undefined);
  return request.completion;
}

describe('a memory region', () => {
  const FILE_BYTES = MIB;
  /** Beside a region at 1 MiB, of 4 MiB, at the user address 0x7e0000100000. */
  const other = { guestAddress: MIB, sizeBytes: 4 * MIB };
  const right: RegionClaim = { guestAddress: 2 ** 33, sizeBytes: 65536, userAddress: 2 ** 40, mmapOffset: 0 };

  it.each<readonly [string, Partial<RegionClaim>]>([
    ['that is empty', { sizeBytes: 0 }],
    ['that is larger than its file', { sizeBytes: FILE_BYTES + 1 }],
    ['that ends beyond its file', { sizeBytes: 4096, mmapOffset: FILE_BYTES - 4080 }],
    ['that begins beyond its file', { mmapOffset: FILE_BYTES + 4096 }],
    ['whose offset and size wrap around', { mmapOffset: 2n ** 64n - 4096n }],
    ['whose size is beyond any file', { sizeBytes: 2n ** 63n }],
    ['whose guest addresses wrap around', { guestAddress: 2n ** 64n - 4096n }],
    ['whose guest addresses cannot be counted exactly', { guestAddress: 2 ** 53 - 65536 }],
    ['whose user addresses wrap around', { userAddress: 2n ** 64n - 4096n }],
    ['whose user addresses cannot be counted exactly', { userAddress: 2 ** 53 - 65536 }],
    ['that overlaps the end of another in guest addresses', { guestAddress: 5 * MIB - 4096 }],
    ['that begins at the last byte of another', { guestAddress: 5 * MIB - 1 }],
    ['that overlaps the start of another in guest addresses', { guestAddress: MIB - 65535 }],
    ['that lies within another', { guestAddress: MIB + 4096, sizeBytes: 4096 }],
    ['that overlaps another in user addresses', { userAddress: 0x7e00_0000_0000 + 5 * MIB - 4096 }],
    ['that is aligned otherwise in its file than in user addresses', { userAddress: 2 ** 40 + 8 }],
  ])('%s is refused, alone and in a table', async (_what, change) => {
    serve();
    await withMemfd(FILE_BYTES, async (fd) => {
      const frontend = await disk.connect({ regions: [other] });
      const mapped = disk.rig.arena.usedBytes;
      const wrong = { ...right, ...change };
      await expect(addRegion(frontend, wrong, fd)).rejects.toThrow(Refused);
      expect(disk.rig.arena.usedBytes).toBe(mapped);
      expect(await works(frontend)).toBe(true);

      const { ringRegion } = frontend.memory;
      const table = Buffer.concat([u32(2, 0), ringRegion.describe(), encodeRegion(wrong)]);
      await expect(frontend.tell(MessageId.setMemTable, table, [ringRegion.fd, fd])).rejects.toThrow(Refused);
      // Half a table is none.
      expect(disk.controller.info()).toMatchObject({ queuesRunning: 0, guestMemoryBytes: 0 });
      await frontend.shareMemoryTable();
      expect(await works(frontend)).toBe(true);

      await addRegion(frontend, right, fd);
      frontend.close();
    });
  });

  it('is refused when its descriptor is not a file that can be shared for writing', async () => {
    serve();
    const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const path = join(folder, 'memory');
    writeFileSync(path, Buffer.alloc(65536));
    const frontend = await disk.connect();
    for (const [file, flags] of [
      [path, 'r'],
      [path, 'a'],
      [folder, 'r'],
      ['/dev/zero', 'r+'],
      ['/proc/self/status', 'r'],
    ] as const) {
      const fd = openSync(file, flags);
      const adding = addRegion(frontend, { ...right, sizeBytes: 4096 }, fd);
      await expect(adding, `${file}, ${flags}`).rejects.toThrow(Refused);
      closeSync(fd);
    }
    const event = check(native.eventfdCreate(), 'make an eventfd');
    await expect(addRegion(frontend, right, event)).rejects.toThrow(Refused);
    native.fileClose(event);
    expect(await works(frontend)).toBe(true);
    frontend.close();
    rmSync(folder, { recursive: true });
  });

  it('may have any size and any offset in its file: its last byte is used, the byte behind it is not', async () => {
    serve();
    const sizeBytes = 0x3b10;
    const region = { guestAddress: 2 ** 33 + 0x130, sizeBytes, userAddress: 2 ** 40 + 0x130, mmapOffset: 0x5130 };
    const frontend = await disk.connect();
    // The driver maps whole pages.
    const { arena } = frontend.memory;
    const file = new Region(arena, { guestAddress: 2 ** 33, mmapOffset: 0x5000, sizeBytes: 65536 });
    await addRegion(frontend, region, file.fd);
    const bytes = Buffer.from(arena.buffer, file.arenaOffset, 65536).fill(0xee);
    const status = 2 ** 33 + 0x130 + sizeBytes - 1;
    const header = frontend.memory.allocate(16);
    frontend.memory.bytes(header, 16).set(blkHeader(RequestType.flush));
    const chain = (lengthBytes: number): number =>
      writeChain(frontend.queue, [
        { address: header, lengthBytes: 16 },
        { address: status, lengthBytes, flags: DescriptorFlag.write },
      ]);
    const first = chain(1);
    frontend.queue.offer(first);
    disk.settle();
    expect(frontend.queue.takeRawUsed()).toEqual({ id: first, lengthBytes: 1 });
    expect(bytes[0x130 + sizeBytes - 1]).toBe(Status.ok);
    expect(bytes[0x130 + sizeBytes]).toBe(0xee);

    frontend.queue.offer(chain(2));
    disk.settle();
    expect(frontend.queue.takeRawUsed()).toBeUndefined();
    expect(disk.controller.info().faults).toEqual(['ring 0: a buffer is outside guest memory']);
    expect(bytes[0x130 + sizeBytes]).toBe(0xee);
    file.close();
    frontend.close();
  });

  it('may lie on a file system whose blocks are smaller than a page', async (context) => {
    if (!isRoot) context.skip('only root may mount a file system: run the tests as root');
    serve();
    const folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const [image, mountPoint] = [join(folder, 'image'), join(folder, 'mount')];
    writeFileSync(image, '');
    truncateSync(image, 4 * MIB);
    execFileSync('mkfs.ext4', ['-q', '-b', '1024', '-O', '^has_journal', image]);
    mkdirSync(mountPoint);
    execFileSync('mount', ['-o', 'loop', image, mountPoint]);
    try {
      const path = join(mountPoint, 'memory');
      const content = fresh(16384);
      writeFileSync(path, content);
      const fd = openSync(path, 'r+');
      const frontend = await disk.connect();
      await addRegion(frontend, { ...right, sizeBytes: 1000, mmapOffset: 4096 + 1024 }, fd);
      const header = frontend.memory.allocate(17);
      frontend.memory.bytes(header, 16).set(blkHeader(RequestType.write));
      const head = writeChain(frontend.queue, [
        { address: header, lengthBytes: 16 },
        { address: 2 ** 33, lengthBytes: 512 },
        { address: header + 16, lengthBytes: 1, flags: DescriptorFlag.write },
      ]);
      frontend.queue.offer(head);
      disk.settle();
      expect(frontend.queue.takeRawUsed()).toEqual({ id: head, lengthBytes: 1 });
      expectBytes((await frontend.queue.read(0, 512)).data, content.subarray(5120, 5632), 'what the region held');
      frontend.close();
      closeSync(fd);
      disk.untilListening();
    } finally {
      // Lazily: a test that failed may still have the file mapped.
      execFileSync('umount', ['-l', mountPoint]);
      rmSync(folder, { recursive: true });
    }
  });
});

describe('SET_MEM_TABLE', () => {
  it('takes up to 8 regions, and none at all', async () => {
    serve();
    const regions = Array.from({ length: 8 }, (_, i) => ({ guestAddress: (i + 1) * 16 * MIB, sizeBytes: MIB }));
    const frontend = await disk.connect({ ...tables, regions });
    for (let count = 0; count <= 8; count++) {
      await frontend.shareMemoryTable(frontend.memory.regions.slice(0, count));
      const running = count === 0 ? 0 : 1;
      expect(disk.controller.info()).toMatchObject({ queuesRunning: running, guestMemoryBytes: count * MIB });
    }
    expect(await works(frontend)).toBe(true);
    frontend.close();
  });

  it('that does not agree with its length or its descriptors is refused; with 9 regions it ends the session', async () => {
    serve();
    const frontend = await disk.connect(tables);
    const [first, second] = frontend.memory.regions.map((region) => region.describe()) as [Buffer, Buffer];
    const fds = frontend.memory.regions.map((region) => region.fd);
    for (const [payload, count] of [
      [Buffer.concat([u32(1, 0), first, second]), 2],
      [Buffer.concat([u32(1, 0), first, second]), 1],
      [Buffer.concat([u32(2, 0), first]), 1],
      [Buffer.concat([u32(2, 0), first, second]), 1],
      [Buffer.concat([u32(1, 0), first]), 2],
      [Buffer.concat([u32(0xffffffff, 0), first]), 1],
      [Buffer.concat([u32(0, 0), first]), 1],
    ] as const) {
      await expect(frontend.tell(MessageId.setMemTable, payload, fds.slice(0, count))).rejects.toThrow(Refused);
      expect(await works(frontend)).toBe(true);
    }
    const nine = Buffer.concat([u32(9, 0), ...Array.from({ length: 9 }, () => first)]);
    await expect(frontend.tell(MessageId.setMemTable, nine, fds)).rejects.toThrow('closed the connection');
    frontend.close();
  });

  it('waits for the requests in flight, answers them where they came from, then goes on in the new memory', async () => {
    serve({ configs: heldDisk() });
    const frontend = await disk.connect({ ...tables, queues: 2 });
    const content = fresh(4096);
    const requests = frontend.queues.map(
      (queue, i) => queue.submit({ type: RequestType.write, sector: 8 * i, out: content })[0]!,
    );
    disk.settle();
    expect(disk.controller.info().inflight).toBe(2);

    const telling = frontend.shareMemoryTable();
    disk.settle();
    const [late] = frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 4096 });
    disk.settle();
    expect(disk.journal.entries).toHaveLength(2);
    expect(requests.map((request) => take(frontend, request))).toEqual([undefined, undefined]);

    disk.release();
    await telling;
    for (const request of requests) expect(take(frontend, request)).toMatchObject({ status: Status.ok, usedBytes: 1 });
    disk.settle();
    expect(disk.controller.info()).toMatchObject({ queuesRunning: 2, inflight: 1 });
    disk.release();
    expectBytes(take(frontend, late!)!.data, content, 'read back');
    frontend.close();
  });

  it('raises the call descriptor for answers that came while it waited', async () => {
    serve({ configs: heldDisk() });
    const frontend = await disk.connect(tables);
    frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 512 });
    disk.settle();
    native.eventfdDrain(frontend.queue.callFd);
    const telling = frontend.shareMemoryTable();
    disk.settle();
    disk.release();
    await telling;
    // For the answer, and for the ring that goes on.
    expect(native.eventfdDrain(frontend.queue.callFd)).toBe(2);
    frontend.close();
  });

  it('that leaves a ring without memory stops it; the ring goes on where it was when the memory is back', async () => {
    serve();
    const frontend = await disk.connect({ ...tables, queues: 2 });
    expect(await works(frontend)).toBe(true);
    await frontend.shareMemoryTable([frontend.memory.dataRegion]);
    expect(disk.controller.info()).toMatchObject({
      queuesRunning: 0,
      faults: [0, 1].map((i) => `ring ${i}: its descriptor table is outside guest memory`),
    });
    const [request] = frontend.queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(take(frontend, request!)).toBeUndefined();
    await frontend.shareMemoryTable();
    disk.settle();
    expect(take(frontend, request!)).toMatchObject({ status: Status.ok });
    frontend.close();
  });

  it('that fails does not let any ring run on in memory that is gone', async () => {
    serve();
    const frontend = await disk.connect({ ...tables, queues: 2 });
    const { dataRegion } = frontend.memory;
    const wrong = Buffer.concat([u32(1, 0), encodeRegion({ ...dataRegion, sizeBytes: 2 ** 40 })]);
    await expect(frontend.tell(MessageId.setMemTable, wrong, [dataRegion.fd])).rejects.toThrow(Refused);
    for (const queue of frontend.queues) queue.submit({ type: RequestType.flush });
    disk.settle();
    expect(frontend.queues.map((queue) => queue.takeUsed())).toEqual([undefined, undefined]);
    frontend.close();
  });
});

describe('ADD_MEM_REG and REM_MEM_REG', () => {
  it('hold 509 regions, as GET_MAX_MEM_SLOTS says, and refuse the next', async () => {
    serve();
    await withMemfd(MIB, async (fd) => {
      const frontend = await disk.connect();
      expect(await frontend.askU64(MessageId.getMaxMemSlots)).toBe(509n);
      const slot = (i: number): RegionClaim => ({
        guestAddress: 2 ** 34 + ((i * 131) % 509) * 65536,
        sizeBytes: 4096,
        userAddress: 2 ** 41 + i * 65536,
        mmapOffset: 0,
      });
      for (let i = 2; i < 509; i++) await addRegion(frontend, slot(i), fd);
      await expect(addRegion(frontend, slot(509), fd)).rejects.toThrow(Refused);
      expect(await works(frontend)).toBe(true);
      for (let i = 508; i >= 2; i -= 2) await removeRegion(frontend, slot(i));
      await addRegion(frontend, slot(2), fd);
      expect(await works(frontend)).toBe(true);
      frontend.close();
    });
  });

  it('refuse to remove what is not there', async () => {
    serve();
    const frontend = await disk.connect();
    const { dataRegion } = frontend.memory;
    const { guestAddress, sizeBytes, userAddress, mmapOffset } = dataRegion;
    const there: RegionClaim = { guestAddress, sizeBytes, userAddress, mmapOffset };
    for (const change of [
      { guestAddress: guestAddress + 4096 },
      { sizeBytes: sizeBytes - 4096 },
      { userAddress: userAddress - 4096 },
    ]) {
      await expect(removeRegion(frontend, { ...there, ...change })).rejects.toThrow(Refused);
      expect(await works(frontend)).toBe(true);
    }
    await removeRegion(frontend, there);
    await expect(removeRegion(frontend, there)).rejects.toThrow(Refused);
    frontend.close();
  });

  it('stop a ring whose memory is removed, not the others, and let it go on when the memory is back', async () => {
    serve();
    const regions = [
      { guestAddress: MIB, sizeBytes: MIB },
      { guestAddress: 4 * MIB, sizeBytes: MIB },
      { guestAddress: 8 * MIB, sizeBytes: MIB },
    ];
    const frontend = await disk.connect({ regions, queues: 2 });
    // The second ring moves to the second region.
    const [one, two] = frontend.queues as [typeof frontend.queue, typeof frontend.queue];
    const spare = frontend.memory.regions[1]!;
    expect(await works(frontend, one)).toBe(true);
    await frontend.stopQueue(two);
    const bytes = frontend.memory.bytes(spare.guestAddress + 0x80000, 0x10000).fill(0);
    const user = (at: number): Buffer => u64(spare.userAddress + 0x80000 + at);
    await frontend.tell(
      MessageId.setVringAddr,
      Buffer.concat([u32(1, 0), user(0), user(0x2000), user(0x1000), u64(0)]),
    );
    await frontend.tell(MessageId.setVringKick, u64(1), [two.kickFd]);
    expect(disk.controller.info().queuesRunning).toBe(2);

    await frontend.unshareRegion(spare);
    expect(disk.controller.info()).toMatchObject({
      queuesRunning: 1,
      faults: ['ring 1: its descriptor table is outside guest memory'],
    });
    const [flush] = one.submit({ type: RequestType.flush });
    disk.settle();
    expect(take(frontend, flush!)).toMatchObject({ status: Status.ok });

    // The chain of one indirect descriptor that `flush` used, now on the other ring.
    const again = one.prepare({ type: RequestType.flush });
    frontend.memory.bytes(one.descriptors + 16 * again.head, 16).copy(bytes, 0);
    bytes.writeUInt16LE(1, 0x1000 + 2);
    await frontend.shareRegion(spare);
    disk.settle();
    expect(bytes.readUInt16LE(0x2000 + 2)).toBe(1);
    expect(disk.controller.info()).toMatchObject({ queuesRunning: 2, faults: [] });
    frontend.close();
  });

  it('wait for the requests in flight before a region goes; then its addresses break a ring', async () => {
    serve({ configs: heldDisk() });
    const frontend = await disk.connect();
    const { dataRegion } = frontend.memory;
    const [request] = frontend.queue.submit({ type: RequestType.read, sector: 0, inBytes: 4096 });
    disk.settle();
    const mapped = disk.rig.arena.usedBytes;
    const removing = frontend.unshareRegion(dataRegion);
    disk.settle();
    expect(disk.rig.arena.usedBytes).toBe(mapped);
    disk.release();
    await removing;
    expect(disk.rig.arena.usedBytes).toBe(mapped - dataRegion.sizeBytes);
    expect(take(frontend, request!)).toMatchObject({ status: Status.ok, usedBytes: 4097 });

    const gone = frontend.queue.prepare({ type: RequestType.read, sector: 0, inBytes: 4096, indirectFrom: Infinity });
    frontend.queue.offer(gone.head);
    disk.settle();
    expect(disk.controller.info().faults).toEqual(['ring 0: a buffer is outside guest memory']);
    frontend.close();
  });

  it('may come after the rings were kicked off, in any order: a ring waits for the memory it lies in', async () => {
    serve();
    const frontend = disk.open({ queues: 2 });
    await frontend.negotiate();
    for (const queue of frontend.queues) await frontend.startQueue(queue);
    expect(disk.controller.info().queuesRunning).toBe(0);
    const [request] = frontend.queue.submit({ type: RequestType.flush });
    await frontend.shareRegion(frontend.memory.dataRegion);
    expect(disk.controller.info().queuesRunning).toBe(0);
    await frontend.shareRegion(frontend.memory.ringRegion);
    expect(disk.controller.info().queuesRunning).toBe(2);
    expect(await frontend.queue.completion(request!)).toMatchObject({ status: Status.ok });
    frontend.close();
  });
});

describe('all the address space that there is', () => {
  it('is not for one front-end: what other disks of its reactor need is left to them', async () => {
    serve();
    const neighbour = new ServedDisk({ beside: disk, configs: memoryDisk(512, 'other') });
    // What it holds is there until the reactor's bdevs go.
    arenaBefore = disk.rig.arena.usedBytes;
    const frontend = await neighbour.connect();
    const greedy = await disk.connect();
    const fd = check(native.memfdCreate('sparse', 2 ** 40), 'make a sparse file');
    let guestAddress = 2 ** 41;
    let refused = 0;
    for (let sizeBytes = 2 ** 39; sizeBytes >= MIB;) {
      const claim = { guestAddress, sizeBytes, userAddress: guestAddress, mmapOffset: 0 };
      try {
        await addRegion(greedy, claim, fd);
        guestAddress += sizeBytes;
      } catch (error) {
        expect(error).toBeInstanceOf(Refused);
        refused++;
        sizeBytes /= 2;
      }
    }
    expect(refused).toBe(20);
    expect(disk.complaints[0]).toMatch(/more than there is address space for/);
    const content = fresh(4096);
    expect((await frontend.queue.run({ type: RequestType.write, out: content, shiftBytes: 1 })).status).toBe(Status.ok);
    const { data } = await frontend.queue.run({ type: RequestType.read, inBytes: 4096, shiftBytes: 3 });
    expectBytes(data, content, 'beside a greedy front-end');
    frontend.close();
    neighbour.untilListening();
    // Whoever comes now is heard, too, though there is no room for its memory.
    const next = neighbour.open();
    await next.negotiate();
    next.close();
    neighbour.untilListening();
    native.fileClose(fd);
    greedy.close();
    neighbour.close();
  });
});

describe('a ring', () => {
  it('lies in one region with all its parts, to their last byte, or does not start', async () => {
    serve();
    const region = { guestAddress: MIB, sizeBytes: 65536 };
    const frontend = disk.open({ regions: [region] });
    await frontend.negotiate();
    await frontend.shareMemory();
    const user = frontend.memory.ringRegion.userAddress;
    const end = user + region.sizeBytes;
    const size = 16;
    // Event fields included.
    const lengths = { descriptors: 16 * size, available: 6 + 2 * size, used: 6 + 8 * size };
    const alignments = { descriptors: 16, available: 2, used: 4 };
    const inside = { descriptors: user, available: user + 0x1000, used: user + 0x2000 };
    const start = async (places: typeof inside): Promise<readonly string[]> => {
      await frontend.tell(MessageId.setVringNum, u32(0, size));
      const addresses = [u64(places.descriptors), u64(places.used), u64(places.available), u64(0)];
      await frontend.tell(MessageId.setVringAddr, Buffer.concat([u32(0, 0), ...addresses]));
      await frontend.tell(MessageId.setVringKick, u64(0), [frontend.queue.kickFd]);
      const { faults } = disk.controller.info();
      await frontend.stopQueue(frontend.queue);
      return faults;
    };
    expect(await start(inside)).toEqual([]);
    for (const [part, what] of [
      ['descriptors', 'descriptor table'],
      ['available', 'available ring'],
      ['used', 'used ring'],
    ] as const) {
      const step = alignments[part];
      const last = Math.floor((end - lengths[part]) / step) * step;
      expect(await start({ ...inside, [part]: last }), part).toEqual([]);
      for (const outside of [last + step, end, user - step, 0, 2 ** 52]) {
        const faults = await start({ ...inside, [part]: outside });
        expect(faults, `${part} at ${outside}`).toEqual([`ring 0: its ${what} is outside guest memory`]);
      }
    }
    frontend.close();
  });
});

describe('a memory file that is cut short', () => {
  const { guestAddress, sizeBytes } = { guestAddress: MIB, sizeBytes: 4 * MIB };
  const truncate = (frontend: Frontend, length: number): void =>
    void check(native.fileTruncate(frontend.memory.regions.at(-1)!.fd, length), 'truncate');
  const regions = [
    { guestAddress, sizeBytes },
    { guestAddress: 16 * MIB, sizeBytes },
  ];
  let bystander: ServedDisk;
  let other: Frontend;

  beforeEach(async () => {
    serve();
    bystander = new ServedDisk({ beside: disk, configs: memoryDisk(512, 'other') });
    other = await bystander.connect();
    descriptorsBefore = openDescriptors();
    arenaBefore = disk.rig.arena.usedBytes;
  });

  afterEach(async () => {
    expect(bystander.sessionFaults).toBe(0);
    expect(await works(other)).toBe(true);
    // And whoever comes next is served.
    const next = await disk.connect();
    expect(await works(next)).toBe(true);
    next.close();
    other.close();
    disk.untilListening();
    bystander.close();
    descriptorsBefore = openDescriptors();
    arenaBefore = disk.rig.arena.usedBytes;
  });

  async function expectFailed(frontend: Frontend): Promise<void> {
    await frontend.connection.disconnected();
    expect(disk.complaints[0]).toContain('its file was truncated');
    frontend.close();
    disk.untilListening();
    expect(openDescriptors()).toBe(descriptorsBefore);
    expect(disk.rig.arena.usedBytes).toBe(arenaBefore);
  }

  it('below the data of a request ends the session', async () => {
    const frontend = await disk.connect({ regions });
    frontend.queue.submit({ type: RequestType.write, sector: 0, out: fresh(65536), indirectFrom: Infinity });
    truncate(frontend, 0);
    await expectFailed(frontend);
  });

  it('below the tables of requests ends the session', async () => {
    const frontend = await disk.connect({ regions });
    frontend.queue.submit({ type: RequestType.flush });
    truncate(frontend, 0);
    await expectFailed(frontend);
  });

  it('below a ring that nobody uses ends the session', async () => {
    const frontend = await disk.connect({ regions: [regions[0]!] });
    truncate(frontend, 0);
    await expectFailed(frontend);
  });

  it('below data that the kernel moves fails the request', async () => {
    const { configs, release } = uringFile();
    const file = new ServedDisk({ beside: disk, configs });
    const frontend = await file.connect({ regions });
    const { ringRegion } = frontend.memory;
    const header = frontend.memory.allocate(16, 16, ringRegion);
    const status = frontend.memory.allocate(1, 1, ringRegion);
    frontend.memory.bytes(header, 16).set(blkHeader(RequestType.write));
    truncate(frontend, 0);
    const head = writeChain(frontend.queue, [
      { address: header, lengthBytes: 16 },
      { address: frontend.memory.dataRegion.guestAddress, lengthBytes: 4096 },
      { address: status, lengthBytes: 1, flags: DescriptorFlag.write },
    ]);
    frontend.queue.offer(head);
    file.until(() => frontend.queue.takeRawUsed()?.id === head, 'the answer');
    expect(frontend.memory.bytes(status, 1)[0]).toBe(Status.ioError);
    expect(file.sessionFaults).toBe(0);
    frontend.close();
    file.close();
    release();
  });

  it('below what a front-end only shares ends nothing', async () => {
    const frontend = await disk.connect({ regions });
    const beyond = new Region(frontend.memory.arena, { guestAddress: 32 * MIB, sizeBytes });
    await frontend.shareRegion(beyond);
    check(native.fileTruncate(beyond.fd, 0), 'truncate');
    disk.settle();
    expect(await frontend.queue.flush()).toMatchObject({ status: Status.ok });
    beyond.close();
    frontend.close();
    disk.untilListening();
  });

  it('cannot happen to a sealed one, which is taken as any other', async () => {
    const frontend = disk.open({ regions });
    for (const region of frontend.memory.regions) check(native.memfdAddSeals(region.fd, F_SEAL_SHRINK), 'seal');
    await frontend.setUp();
    expect(await works(frontend)).toBe(true);
    frontend.close();
    disk.untilListening();
  });
});
