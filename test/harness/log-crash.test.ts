/**
 * Goal: after a crash at any request a log holds what it may, a prefix of what was appended with all that was flushed in it, and it can be
 * opened; also when the crash comes while it is opened, or while segments are given back.
 *
 * Method: crash enumeration and failing every request, on a disk that is nothing but a log (test/support/log-disk.ts), of segments so
 * small that they are given back all the time.
 */
import { describe, expect, it } from 'vitest';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { BdevIo, IoType } from '../../src/bdev/bdev-io.js';
import { SimDisk } from '../sim/sim-disk.js';
import { newLog } from '../support/log-disk.js';
import type { LogDiskConfig } from '../support/log-disk.js';
import { completeTask } from '../../src/bdev/task.js';
import { crashEnumeration } from './crash-enumeration.js';
import { failNth } from './fail-nth.js';
import { SimLife, SimMachine, simDisk } from './sim-machine.js';
import type { Stack } from './sim-machine.js';
import type { Operation } from './volume.js';

const TIMEOUT_MS = 240_000;
const BLOCKS = 3;
const SECTORS = BLOCKS * 8;
const SEGMENT_BLOCKS = 16;
const DEVICE_BYTES = (12 + 9 * SEGMENT_BLOCKS) * 4096;

const leaf = (path: string): BdevConfig => simDisk('leaf', path, { blockSizeBytes: 4096 });

const logDisk: Stack = ([path]) => {
  const config: LogDiskConfig = {
    name: 'volume',
    module: 'logDisk',
    base: 'leaf',
    blocks: BLOCKS,
    segmentBlocks: SEGMENT_BLOCKS,
  };
  return [leaf(path!), config];
};

/** A device with an empty log. */
function emptyLog(): Uint8Array {
  const machine = new SimMachine([new SimDisk(DEVICE_BYTES)]);
  const life = new SimLife(machine, ([path]) => [leaf(path!)], { seed: 1 });
  const { bdev, channel } = life.open;
  completeTask(newLog(life.reactor, bdev, channel, SEGMENT_BLOCKS, BLOCKS), () => life.step());
  life.close();
  const bytes = machine.disks[0]!.view.slice();
  machine.close();
  return bytes;
}

/** One whose segments are used up, so that they are given back with every few writes. It reads as zeroes. */
function worn(image: Uint8Array): Uint8Array {
  const machine = new SimMachine([new SimDisk(DEVICE_BYTES, image)]);
  const life = new SimLife(machine, logDisk, { seed: 1 });
  const address = life.arena.allocate(BLOCKS * 4096);
  const io = new BdevIo();
  for (let writes = 0; writes < 30; writes++) {
    let isDone = false;
    io.prepare(IoType.write, 0, BLOCKS * 4096, 0);
    io.addSegment(address, BLOCKS * 4096);
    io.push({ onDone: () => (isDone = true) }, 0);
    life.open.channel.submit(io);
    life.until(() => isDone, 'a write');
  }
  life.arena.release(address);
  life.close();
  const bytes = machine.disks[0]!.view.slice();
  machine.close();
  return bytes;
}

const empty = emptyLog();
const IMAGES = [
  ['that is empty', empty],
  ['whose segments are used up', worn(empty)],
] as const;
const OPERATIONS: readonly Operation[] = [
  { name: 'write a', type: 'write', sector: 0, sectors: 8 },
  { name: 'write all', type: 'write', sector: 0, sectors: 24 },
  { name: 'write b', type: 'write', sector: 16, sectors: 8 },
  { name: 'write through', type: 'write', sector: 8, sectors: 8, fua: true },
  { name: 'flush', type: 'flush' },
];
const options = { diskBytes: [DEVICE_BYTES], stack: logDisk, sectors: SECTORS };

describe('After a crash anywhere a log', () => {
  it.each(IMAGES)('%s holds what it may', { timeout: TIMEOUT_MS }, (name, image) => {
    const limits = { operations: OPERATIONS, length: 2, imagesMax: 3, openingsMax: 2 };
    const one = crashEnumeration({ ...options, ...limits, images: [image] });
    console.log(`${name}: ${JSON.stringify(one)}`);
    expect(one.images).toBeGreaterThan(100);
  });

  it.each(IMAGES)('%s holds what it may, when all comes at once', { timeout: TIMEOUT_MS }, (name, image) => {
    const limits = { operations: OPERATIONS, length: 2, imagesMax: 3, openingsMax: 1, together: true };
    const one = crashEnumeration({ ...options, ...limits, images: [image] });
    console.log(`${name}: ${JSON.stringify(one)}`);
    expect(one.images).toBeGreaterThan(50);
  });
});

describe('When one request of its device fails a log', () => {
  it.each(IMAGES)('%s keeps what was answered', { timeout: TIMEOUT_MS }, (name, image) => {
    for (const together of [false, true]) {
      const scenario = [...OPERATIONS, ...OPERATIONS, { name: 'flush', type: 'flush' } as const];
      const coverage = failNth({ ...options, images: [image], scenario, together });
      console.log(`${name}: ${JSON.stringify(coverage)}`);
      expect(coverage.failures).toBeGreaterThan(10);
    }
  });
});
