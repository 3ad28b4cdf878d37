/**
 * Goal: the configuration space reads the same in every length and at every offset front-ends ask for, and only the one field
 * that a guest may write can be written.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket; the space is written down here from VIRTIO 1.2, 5.2.4.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import { Feature, MessageId, encodeMessage, mask, u32 } from '../frontend/protocol.js';
import { DISK_BYTES, ServedDisk, memoryDisk } from './served-disk.js';
import type { ServedDiskOptions } from './served-disk.js';

const WRITEBACK_AT = 32;

let disk: ServedDisk;
let frontend: Frontend;

async function connect(options: ServedDiskOptions = {}): Promise<void> {
  disk = new ServedDisk(options);
  frontend = disk.open();
  await frontend.negotiate();
}

afterEach(() => {
  frontend.close();
  disk.close();
});

/** The space of a disk of DISK_BYTES in memory, 256 bytes. */
function expectedSpace(blockBytes: number, queues: number): Buffer {
  const space = Buffer.alloc(256);
  space.writeBigUInt64LE(BigInt(DISK_BYTES / 512), 0);
  space.writeUInt32LE(4 * 2 ** 20, 8); // size_max
  space.writeUInt32LE(126, 12); // seg_max
  space.writeUInt32LE(blockBytes, 20);
  space.writeUInt8(0, 24); // physical_block_exp
  space.writeUInt16LE(1, 26); // min_io_size
  space.writeUInt8(1, WRITEBACK_AT);
  space.writeUInt16LE(queues, 34);
  space.writeUInt32LE(4 * 2 ** 20, 36); // max_discard_sectors: 2 GiB
  space.writeUInt32LE(16, 40); // max_discard_seg
  space.writeUInt32LE(blockBytes / 512, 44); // discard_sector_alignment
  space.writeUInt32LE(4 * 2 ** 20, 48); // max_write_zeroes_sectors
  space.writeUInt32LE(16, 52); // max_write_zeroes_seg
  space.writeUInt8(1, 56); // write_zeroes_may_unmap
  return space;
}

describe('GET_CONFIG', () => {
  it('answers any length from 1 to 256 bytes, with zeroes beyond the struct', async () => {
    await connect({ queues: 3 });
    const space = expectedSpace(512, 3);
    for (let length = 1; length <= 256; length++) {
      expect(await frontend.getConfig(0, length), `${length} bytes`).toEqual(space.subarray(0, length));
    }
  });

  it('tells of blocks of 4096 bytes in sectors of 512', async () => {
    await connect({ configs: memoryDisk(4096) });
    expect(await frontend.getConfig(0, 60)).toEqual(expectedSpace(4096, 2).subarray(0, 60));
  });

  it('answers at any offset, and at 0x100 as at 0', async () => {
    await connect();
    const space = expectedSpace(512, 2);
    for (const offset of [1, 8, 20, WRITEBACK_AT, 59, 95, 255]) {
      expect(await frontend.getConfig(offset, 256 - offset)).toEqual(space.subarray(offset));
    }
    expect(await frontend.getConfig(0x100, 96)).toEqual(space.subarray(0, 96));
  });

  it('answers zeroes for what lies beyond 256 bytes, up to a page at once', async () => {
    await connect();
    const page = await frontend.getConfig(0, 4096);
    expect(page.subarray(0, 256)).toEqual(expectedSpace(512, 2));
    expect(page.subarray(256).equals(Buffer.alloc(4096 - 256))).toBe(true);
    for (const offset of [257, 4096, 0x7fffffff, 0xffffffff]) {
      expect(await frontend.getConfig(offset, 16)).toEqual(Buffer.alloc(16));
    }
  });

  it('echoes offset, size and flags in its reply', async () => {
    await connect();
    const reply = await frontend.ask(MessageId.getConfig, Buffer.concat([u32(8, 4, 1), Buffer.alloc(4)]));
    expect(reply).toEqual(Buffer.concat([u32(8, 4, 1), u32(4 * 2 ** 20)]));
  });

  it('answers an empty payload when its size is not that of the payload, and ends the session when it asks for none', async () => {
    await connect();
    for (const size of [0, 3, 5, 0xffffffff]) {
      expect(await frontend.ask(MessageId.getConfig, Buffer.concat([u32(0, size, 0), Buffer.alloc(4)]))).toHaveLength(
        0,
      );
    }
    await frontend.connection.send(encodeMessage(MessageId.getConfig, u32(0, 0, 0)));
    await frontend.connection.disconnected();
  });

  it('tells of what the disk is: read-only disks offer no way to write', async () => {
    await connect({ readOnly: true });
    expect(frontend.offeredFeatures & mask(Feature.readOnly)).toBe(mask(Feature.readOnly));
    expect(frontend.offeredFeatures & mask(Feature.discard, Feature.writeZeroes)).toBe(0n);
  });
});

describe('SET_CONFIG', () => {
  it('writes the write-back field, and GET_CONFIG tells of it', async () => {
    await connect();
    for (const value of [0, 1, 0, 0, 1]) {
      await frontend.setConfig(WRITEBACK_AT, Buffer.from([value]));
      expect(await frontend.getConfig(WRITEBACK_AT, 1)).toEqual(Buffer.from([value]));
    }
  });

  it('refuses every other field, value and purpose, and changes nothing', async () => {
    await connect();
    const refused = async (offset: number, bytes: Buffer, flags = 0): Promise<void> => {
      await expect(frontend.setConfig(offset, bytes, flags), `${bytes.length} at ${offset}`).rejects.toThrow(Refused);
    };
    for (let offset = 0; offset < 96; offset++) if (offset !== WRITEBACK_AT) await refused(offset, Buffer.from([0]));
    for (const value of [2, 255]) await refused(WRITEBACK_AT, Buffer.from([value]));
    await refused(WRITEBACK_AT, Buffer.alloc(2));
    await refused(WRITEBACK_AT, Buffer.alloc(4096));
    await refused(WRITEBACK_AT - 1, Buffer.alloc(2));
    await refused(0x100 + WRITEBACK_AT, Buffer.alloc(1));
    await refused(0, Buffer.alloc(60));
    for (const flags of [1, 2, 0xffffffff]) await refused(WRITEBACK_AT, Buffer.from([0]), flags);
    await expect(
      frontend.tell(MessageId.setConfig, Buffer.concat([u32(WRITEBACK_AT, 2, 0), Buffer.alloc(1)])),
    ).rejects.toThrow(Refused);
    expect(await frontend.getConfig(0, 256)).toEqual(expectedSpace(512, 2));
  });

  it('is remembered for the next front-end, which is not told of it by the guest again', async () => {
    await connect();
    await frontend.setConfig(WRITEBACK_AT, Buffer.from([0]));
    frontend.close();
    disk.untilListening();
    frontend = disk.open();
    await frontend.negotiate();
    expect(await frontend.getConfig(WRITEBACK_AT, 1)).toEqual(Buffer.from([0]));
  });
});
