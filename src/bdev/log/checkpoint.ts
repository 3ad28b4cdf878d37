/** Checkpoints: which segment holds what, and where the chain of segments goes on. They take turns in two slots. */
import { native } from '../../../native/index.js';
import { BdevError } from '../bdev.js';
import type { Task } from '../task.js';
import { BLOCK_BYTES, FIRST_CHECKPOINT_BLOCK, getUInt64, putUInt64 } from './format.js';
import type { CheckpointHeader, Superblock } from './format.js';
import type { LogDevice } from './log-device.js';

/** Of a segment in a checkpoint. */
export const CHECKPOINT_ENTRY_BYTES = 8;
/** An ordinal that none has. */
export const NO_ORDINAL = -1;

export interface Checkpoint extends Pick<
  CheckpointHeader,
  'flushedSequence' | 'headIndex' | 'headOrdinal' | 'headFirstSequence' | 'headPreviousCrc'
> {
  /** Ordinal of each segment, NO_ORDINAL for one that holds nothing. */
  readonly ordinals: Float64Array;
}

/** Reads the checkpoint that the superblock names. Throws BdevError when it is damaged. */
export function* readCheckpoint(device: LogDevice, superblock: Superblock): Task<Checkpoint> {
  const { checkpointSlot, checkpointBlocks, checkpointGeneration, segmentCount } = superblock;
  const tableBytes = segmentCount * CHECKPOINT_ENTRY_BYTES;
  const memory = device.memory(checkpointBlocks);
  try {
    yield* device.read(placeOf(checkpointSlot, checkpointBlocks), checkpointBlocks, memory.address);
    const header = memory.view.readCheckpointHeader();
    const isItself =
      header !== null && header.generation === checkpointGeneration && header.segmentCount === segmentCount;
    if (!isItself || tableCrc(device, memory.address, tableBytes) !== header.tableCrc) throw damaged(device);
    const table = memory.view.bytes.subarray(BLOCK_BYTES);
    const ordinals = Float64Array.from({ length: segmentCount }, (_, i) => getUInt64(table, i * 8) - 1);
    if (header.headIndex >= segmentCount) throw damaged(device);
    return { ...header, ordinals };
  } finally {
    memory.release();
  }
}

/** Writes a checkpoint to the slot that does not count, durably; the superblock is to name it then. Returns its slot. Throws BdevError. */
export function* writeCheckpoint(
  device: LogDevice,
  superblock: Pick<Superblock, 'checkpointSlot' | 'checkpointBlocks' | 'segmentCount'>,
  generation: number,
  { ordinals, ...numbers }: Checkpoint,
): Task<number> {
  const { checkpointBlocks, segmentCount } = superblock;
  const slot = superblock.checkpointSlot === 1 ? 2 : 1;
  const memory = device.memory(checkpointBlocks);
  try {
    const table = memory.view.bytes.subarray(BLOCK_BYTES);
    table.fill(0);
    for (let i = 0; i < segmentCount; i++) putUInt64(table, i * CHECKPOINT_ENTRY_BYTES, ordinals[i]! + 1);
    const header: CheckpointHeader = {
      ...numbers,
      generation,
      segmentCount,
      tableCrc: tableCrc(device, memory.address, segmentCount * CHECKPOINT_ENTRY_BYTES),
    };
    memory.view.writeCheckpointHeader(header);
    yield* device.write(placeOf(slot, checkpointBlocks), checkpointBlocks, memory.address);
    yield* device.flush();
    return slot;
  } finally {
    memory.release();
  }
}

function placeOf(slot: number, checkpointBlocks: number): number {
  return FIRST_CHECKPOINT_BLOCK + (slot - 1) * checkpointBlocks;
}

function tableCrc(device: LogDevice, address: number, tableBytes: number): number {
  return native.crc32c(0, device.reactor.arena.baseAddress + address + BLOCK_BYTES, tableBytes);
}

function damaged({ bdev }: LogDevice): BdevError {
  const hint = 'look at the device; what is in its log can be listed with `strata log inspect`';
  return new BdevError('corrupt-log', 'base', `the checkpoint of the log on bdev ${bdev.name} is damaged`, hint);
}
