/**
 * Goal: each virtio-blk request (VIRTIO 1.2, 5.2.6) does what it says and nothing else, is answered by one status byte and a used
 * length that is what was written plus that byte, and is refused where the disk or the request does not allow it.
 *
 * Method: requests on a ring without a socket, over a disk in memory whose journal says what reached it.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import type { ErrorConfig } from '../../src/bdev/error/error.js';
import type { LimitedConfig } from '../support/limited.js';
import { encodeRanges } from '../frontend/driver-queue.js';
import type { Completion, SectorRange } from '../frontend/driver-queue.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { blkHeader } from './chains.js';
import { RingDevice } from './ring-device.js';
import type { RingDeviceOptions } from './ring-device.js';
import { DISK_BYTES, memoryDisk } from './served-disk.js';

const SECTORS = DISK_BYTES / 512;

let ring: RingDevice;

function start(options: RingDeviceOptions = {}): void {
  ring = new RingDevice(options);
}

afterEach(() => ring.close());

const read = (sector: number | bigint, inBytes: number): Completion =>
  ring.run({ type: RequestType.read, sector, inBytes });
const write = (sector: number | bigint, out: Uint8Array): Completion =>
  ring.run({ type: RequestType.write, sector, out });
const ranges = (type: number, ...list: SectorRange[]): Completion => ring.run({ type, out: encodeRanges(list) });

const answered = (status: number, usedBytes: number): unknown => expect.objectContaining({ status, usedBytes });
const OK = answered(Status.ok, 1);
const IO_ERROR = answered(Status.ioError, 1);
const UNSUPPORTED = answered(Status.unsupported, 1);

describe('a read and a write', () => {
  it('move data of every length, and say exactly how much was written', () => {
    start();
    for (const lengthBytes of [512, 1024, 4096, 65536, 2 ** 20]) {
      const content = fresh(lengthBytes);
      expect(write(3, content)).toEqual(OK);
      const { status, usedBytes, data } = read(3, lengthBytes);
      expect([status, usedBytes]).toEqual([Status.ok, lengthBytes + 1]);
      expectBytes(data, content, `${lengthBytes} bytes`);
    }
  });

  it('reach the first and the last sector, and none beyond', () => {
    start();
    const content = fresh(512);
    for (const sector of [0, SECTORS - 1]) {
      expect(write(sector, content)).toEqual(OK);
      expectBytes(read(sector, 512).data, content, `sector ${sector}`);
    }
    for (const [sector, lengthBytes] of [
      [SECTORS, 512],
      [SECTORS - 1, 1024],
      [SECTORS - 7, 4096],
      [SECTORS + 1000, 512],
    ] as const) {
      expect(write(sector, fresh(lengthBytes))).toEqual(IO_ERROR);
      const { status, usedBytes, data } = read(sector, lengthBytes);
      expect([status, usedBytes]).toEqual([Status.ioError, 1]);
      expect(data.every((byte) => byte === 0xff)).toBe(true);
    }
    expectBytes(read(SECTORS - 1, 512).data, content, 'the last sector');
  });

  it.each([2n ** 32n, 2n ** 44n - 1n, 2n ** 44n, 2n ** 55n, 2n ** 63n, 2n ** 64n - 1n])(
    'of sector %i, whose byte offset may wrap, are errors',
    (sector) => {
      start();
      expect(read(sector, 512)).toEqual(IO_ERROR);
      expect(write(sector, fresh(512))).toEqual(IO_ERROR);
      expect(ring.journal.entries.every((entry) => entry.status !== IoStatus.success)).toBe(true);
    },
  );

  it.each([1, 511, 513, 1000, 4095])('of %i bytes, which are not whole sectors, are errors', (lengthBytes) => {
    start();
    expect(read(0, lengthBytes)).toEqual(IO_ERROR);
    expect(write(0, fresh(lengthBytes))).toEqual(IO_ERROR);
    expectBytes(read(0, 4096).data, Buffer.alloc(4096), 'the disk');
  });

  it('on a disk of 4096-byte blocks are errors when they are not whole blocks', () => {
    start({ configs: memoryDisk(4096) });
    const content = fresh(8192);
    expect(write(8, content)).toEqual(OK);
    for (const [sector, lengthBytes] of [
      [8, 512],
      [9, 4096],
      [12, 8192],
      [8, 4608],
    ] as const) {
      expect(read(sector, lengthBytes)).toEqual(IO_ERROR);
      expect(write(sector, fresh(lengthBytes))).toEqual(IO_ERROR);
    }
    expectBytes(read(8, 8192).data, content, 'the blocks');
  });

  it('of no data do nothing, within the disk', () => {
    start();
    expect(read(0, 0)).toEqual(OK);
    expect(write(0, Buffer.alloc(0))).toEqual(OK);
    expect(read(SECTORS + 1, 0)).toEqual(IO_ERROR);
  });

  it.each([5, 28, 61, 125])('that fail below, with errno %i, are errors and claim none of the data', (errno) => {
    const rule = { type: 'any', action: 'fail', first: 1, count: null, errno } as const;
    const failing: ErrorConfig = { name: 'disk', module: 'error', base: 'base', rules: [rule] };
    start({ configs: [...memoryDisk(512, 'base'), failing] });
    expect(read(0, 4096)).toEqual(IO_ERROR);
    expect(write(0, fresh(4096))).toEqual(IO_ERROR);
    expect(ring.run({ type: RequestType.flush })).toEqual(IO_ERROR);
  });

  it('that the disk cannot do are not supported', () => {
    start();
    ring.journal.submit = (io) => io.complete(IoStatus.notSupported, 0);
    expect(read(0, 4096)).toEqual(UNSUPPORTED);
    expect(write(0, fresh(4096))).toEqual(UNSUPPORTED);
    expect(ranges(RequestType.writeZeroes, { sector: 0, sectors: 8 }, { sector: 8, sectors: 8 })).toEqual(UNSUPPORTED);
  });

  it('leave alone what the driver offered beside what they need', () => {
    start();
    // A write with room to write into, a read with data to read.
    const room = ring.writable(512);
    const status = ring.writable(1);
    const content = ring.readable(fresh(512));
    expect(ring.offerChain(ring.readable(blkHeader(RequestType.write)), content, room, status)).toBe(1);
    expect(ring.bytes(room).every((byte) => byte === 0xff)).toBe(true);
    expect(ring.bytes(status)[0]).toBe(Status.ok);
    const data = ring.writable(512);
    expect(ring.offerChain(ring.readable(blkHeader(RequestType.read)), ring.readable(fresh(512)), data, status)).toBe(
      513,
    );
    expectBytes(ring.bytes(data), ring.bytes(content), 'read back');
  });
});

describe('a request', () => {
  it.each([0, 1, 8, 15])('whose header has only %i bytes is an error', (length) => {
    start();
    const header = length === 0 ? [] : [ring.readable(blkHeader(RequestType.read).subarray(0, length))];
    const data = ring.writable(512);
    const status = ring.writable(1);
    // Taken for the rest of the header, this would be a good one.
    ring.bytes(data).fill(0);
    expect(ring.offerChain(...header, data, status)).toBe(1);
    expect(ring.bytes(status)[0]).toBe(Status.ioError);
    expect(ring.faults).toEqual([]);
    expect(ring.journal.entries).toEqual([]);
  });

  it('of a type that is not known is not supported, and leaves its buffers alone', () => {
    start();
    for (const type of [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 99, 0x7fffffff]) {
      const { status, usedBytes, data } = ring.run({ type, inBytes: 512 });
      expect([type, status, usedBytes]).toEqual([type, Status.unsupported, 1]);
      expect(data.every((byte) => byte === 0xff)).toBe(true);
    }
    expect(ring.journal.entries).toEqual([]);
  });

  it('may have the legacy barrier bit set, which changes nothing', () => {
    start();
    const content = fresh(512);
    expect(ring.run({ type: 0x80000000 + RequestType.write, sector: 0, out: content })).toEqual(OK);
    expectBytes(ring.run({ type: 0x80000000, sector: 0, inBytes: 512 }).data, content, 'read back');
    expect(ring.run({ type: 0x80000000 + 99 })).toEqual(UNSUPPORTED);
  });

  it('that is in flight may have its header written over', () => {
    start();
    const header = ring.readable(blkHeader(RequestType.write, 5));
    const content = ring.readable(fresh(512));
    const status = ring.writable(1);
    // Taken in the take phase; the disk copies in the batch phase of the same step.
    expect(ring.offerChain(header, content, status)).toBe(1);
    ring.bytes(header).set(blkHeader(RequestType.read, 7));
    expectBytes(read(5, 512).data, ring.bytes(content), 'sector 5');
  });
});

describe('FLUSH', () => {
  it('reaches the disk, whatever sector it names', () => {
    start();
    expect(ring.run({ type: RequestType.flush, sector: 2n ** 64n - 1n })).toEqual(OK);
    expect(ring.journal.entries).toMatchObject([{ type: IoType.flush, status: IoStatus.success }]);
  });
});

describe('GET_ID', () => {
  const id = (inBytes: number): Completion => ring.run({ type: RequestType.getId, inBytes });

  it.each([
    ['a serial shorter than 20 bytes', 'abc', 'abc'],
    ['a serial of 20 bytes', '01234567890123456789', '01234567890123456789'],
    ['a serial longer than 20 bytes', '0123456789012345678901234', '01234567890123456789'],
    ['a serial beyond ASCII', 'Größe-№1', 'Größe-№1'],
    ['a serial beyond ASCII that does not fit', 'ü'.repeat(11), 'ü'.repeat(10)],
    ['a serial whose last letter does not fit', `${'x'.repeat(19)}ü`, 'x'.repeat(19)],
    ['no serial', '', ''],
  ])('gives %s, padded with zeroes, cut between letters', (_what, serial, expected) => {
    start({ serial });
    const padded = Buffer.alloc(20);
    padded.write(expected, 'utf8');
    const { status, usedBytes, data } = id(20);
    expect([status, usedBytes]).toEqual([Status.ok, 21]);
    expect(data).toEqual(padded);
  });

  it('fills shorter buffers and no more than 20 bytes of longer ones', () => {
    start({ serial: '01234567890123456789' });
    for (const length of [0, 1, 5, 19]) {
      const { usedBytes, data } = id(length);
      expect(usedBytes).toBe(length + 1);
      expect(data.toString()).toBe('01234567890123456789'.slice(0, length));
    }
    const { usedBytes, data } = id(64);
    expect(usedBytes).toBe(21);
    expect(data.subarray(0, 20).toString()).toBe('01234567890123456789');
    expect(data.subarray(20).every((byte) => byte === 0xff)).toBe(true);
  });
});

describe.each([
  ['DISCARD', RequestType.discard, IoType.discard],
  ['WRITE_ZEROES', RequestType.writeZeroes, IoType.writeZeroes],
])('%s', (_name, type, ioType) => {
  const MAX_SECTORS = 4 * 2 ** 20;

  it('zeroes its ranges and nothing else, 1 to 16 of them', () => {
    start();
    for (const count of [1, 2, 15, 16]) {
      const content = fresh(65536);
      write(0, content);
      const list = Array.from({ length: count }, (_, i) => ({ sector: 8 * i + 1, sectors: 3 }));
      expect(ranges(type, ...list)).toEqual(OK);
      for (const { sector, sectors } of list) content.fill(0, sector * 512, (sector + sectors) * 512);
      expectBytes(read(0, 65536).data, content, `${count} ranges`);
    }
  });

  it('takes its ranges one after the other, and stops at the first that fails', () => {
    start();
    write(0, fresh(4096));
    ring.journal.entries.length = 0;
    expect(ranges(type, { sector: 0, sectors: 1 }, { sector: SECTORS, sectors: 1 }, { sector: 2, sectors: 1 })).toEqual(
      IO_ERROR,
    );
    expect(ring.journal.entries.map(({ type: t, status }) => [t, status])).toEqual([
      [ioType, IoStatus.success],
      [ioType, IoStatus.ioError],
    ]);
  });

  it('takes ranges of no length, and ranges that overlap', () => {
    start();
    expect(ranges(type, { sector: 0, sectors: 0 }, { sector: 0, sectors: 8 }, { sector: 4, sectors: 8 })).toEqual(OK);
  });

  it('is an error with no range, part of one, or more than 16', () => {
    start();
    write(0, Buffer.alloc(4096, 1));
    const bytes = encodeRanges(Array.from({ length: 17 }, () => ({ sector: 0, sectors: 8 })));
    for (const length of [0, 1, 15, 17, 16 * 16 + 1, 16 * 17]) {
      expect(ring.run({ type, out: bytes.subarray(0, length) }), `${length} bytes`).toEqual(IO_ERROR);
    }
    expectBytes(read(0, 4096).data, Buffer.alloc(4096, 1), 'the disk');
  });

  it('is an error when a range is longer than was announced, ends beyond the disk, or wraps', () => {
    start();
    write(0, Buffer.alloc(4096, 1));
    ring.journal.entries.length = 0;
    expect(ranges(type, { sector: 0, sectors: MAX_SECTORS + 1 })).toEqual(IO_ERROR);
    expect(ranges(type, { sector: 0, sectors: 0xffffffff })).toEqual(IO_ERROR);
    // Ranges are checked before the first is carried out.
    expect(ranges(type, { sector: 0, sectors: 8 }, { sector: 0, sectors: MAX_SECTORS + 1 })).toEqual(IO_ERROR);
    expect(ring.journal.entries).toEqual([]);
    expect(ranges(type, { sector: SECTORS - 1, sectors: 2 })).toEqual(IO_ERROR);
    expect(ranges(type, { sector: SECTORS, sectors: 1 })).toEqual(IO_ERROR);
    const wrapping = encodeRanges([{ sector: 0, sectors: 8 }]);
    for (const sector of [2n ** 44n, 2n ** 55n, 2n ** 64n - 8n]) {
      wrapping.writeBigUInt64LE(sector, 0);
      ring.journal.entries.length = 0;
      expect(ring.run({ type, out: wrapping })).toEqual(IO_ERROR);
      expect(ring.journal.entries).toEqual([]);
    }
    expectBytes(read(0, 4096).data, Buffer.alloc(4096, 1), 'the disk');
  });

  it('with flags that are not known is not supported, and does nothing', () => {
    start();
    write(0, Buffer.alloc(4096, 1));
    ring.journal.entries.length = 0;
    const bytes = encodeRanges([
      { sector: 0, sectors: 8 },
      { sector: 0, sectors: 8 },
    ]);
    for (const flags of [2, 3, 0x80000000, 0xffffffff]) {
      bytes.writeUInt32LE(flags, 28);
      expect(ring.run({ type, out: bytes }), `flags ${flags}`).toEqual(UNSUPPORTED);
    }
    expect(ring.journal.entries).toEqual([]);
  });

  it('on blocks of 4096 bytes is an error when it is not whole blocks', () => {
    start({ configs: memoryDisk(4096) });
    expect(ranges(type, { sector: 8, sectors: 8 })).toEqual(OK);
    expect(ranges(type, { sector: 8, sectors: 7 })).toEqual(IO_ERROR);
    expect(ranges(type, { sector: 9, sectors: 8 })).toEqual(IO_ERROR);
  });

  it('on a read-only disk is an error, and does nothing', () => {
    start({ readOnly: true });
    expect(ranges(type, { sector: 0, sectors: 8 })).toEqual(IO_ERROR);
    expect(ring.journal.entries).toEqual([]);
  });
});

describe('the unmap flag', () => {
  it('on a DISCARD is not supported', () => {
    start();
    expect(ranges(RequestType.discard, { sector: 0, sectors: 8, unmap: true })).toEqual(UNSUPPORTED);
    expect(ring.journal.entries).toEqual([]);
  });

  it('on WRITE_ZEROES leaves zeroes behind all the same', () => {
    start();
    write(0, Buffer.alloc(4096, 1));
    expect(ranges(RequestType.writeZeroes, { sector: 0, sectors: 8, unmap: true })).toEqual(OK);
    expectBytes(read(0, 4096).data, Buffer.alloc(4096), 'the disk');
  });
});

describe('a disk that cannot discard', () => {
  const poor = (): BdevConfig[] => {
    const limited: LimitedConfig = {
      name: 'disk',
      module: 'limited',
      base: 'base',
      limits: {},
      without: ['discard', 'writeZeroes', 'fua'],
      readOnly: false,
    };
    return [...memoryDisk(512, 'base'), limited];
  };

  it('does not support DISCARD, and zeroes ranges as long as it announced by writing', () => {
    start({ configs: poor() });
    expect(ranges(RequestType.discard, { sector: 0, sectors: 8 })).toEqual(UNSUPPORTED);
    write(0, Buffer.alloc(65536, 1));
    expect(ranges(RequestType.writeZeroes, { sector: 0, sectors: 8192 })).toEqual(OK);
    expect(ranges(RequestType.writeZeroes, { sector: 0, sectors: 8193 })).toEqual(IO_ERROR);
    expectBytes(read(0, 65536).data, Buffer.alloc(65536), 'the disk');
  });
});

describe('a read-only disk', () => {
  it('is read, flushed and named, and never written', () => {
    start({ readOnly: true });
    expect(write(0, fresh(512))).toEqual(IO_ERROR);
    expect(ring.journal.entries).toEqual([]);
    expectBytes(read(0, 512).data, Buffer.alloc(512), 'the disk');
    expect(ring.run({ type: RequestType.flush })).toEqual(OK);
    expect(ring.run({ type: RequestType.getId, inBytes: 20 }).usedBytes).toBe(21);
  });

  it('refuses writes also of a driver that has not acknowledged that it is read-only', () => {
    start({ readOnly: true });
    ring.device.acknowledge(0, 0);
    expect(write(0, fresh(512))).toEqual(IO_ERROR);
    expect(ring.journal.entries).toEqual([]);
  });
});
