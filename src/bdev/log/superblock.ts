/** The superblock of a log: found among its copies, and written to the next of them. */
import { BdevError } from '../bdev.js';
import type { Task } from '../task.js';
import { SUPERBLOCK_COPIES } from './format.js';
import type { Superblock } from './format.js';
import type { LogDevice } from './log-device.js';

/** The valid copy with the highest generation. Throws BdevError when there is none. */
export function* readSuperblock(device: LogDevice): Task<Superblock> {
  const memory = device.memory(1);
  let found: Superblock | null = null;
  try {
    for (let copy = 0; copy < SUPERBLOCK_COPIES; copy++) {
      yield* device.read(copy, 1, memory.address);
      const superblock = memory.view.readSuperblock();
      if (superblock !== null && superblock.generation > (found?.generation ?? -1)) found = superblock;
    }
  } finally {
    memory.release();
  }
  if (found === null) {
    const hint =
      'check that it is the right device; `strata log create` makes a log, and forgets what the device holds';
    throw new BdevError('no-log', 'base', `bdev ${device.bdev.name} holds no log of a version that is known`, hint);
  }
  if (found.deviceBlocks > device.blocks) {
    const words = `bdev ${device.bdev.name} is smaller than its log: ${device.blocks} blocks of ${found.deviceBlocks}`;
    throw new BdevError('too-small', 'base', words, 'give it back its size');
  }
  return found;
}

/** Writes a superblock, which is durable when this returns. Throws BdevError. */
export function* writeSuperblock(device: LogDevice, superblock: Superblock): Task<void> {
  const memory = device.memory(1);
  try {
    memory.view.writeSuperblock(superblock);
    yield* device.write(superblock.generation % SUPERBLOCK_COPIES, 1, memory.address);
    yield* device.flush();
  } finally {
    memory.release();
  }
}
