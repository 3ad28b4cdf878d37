/**
 * qcow2 images on simulated disks: which one a seed has, and their bytes. An image is made once for each kind and size, in memory.
 */
import type { SeededRandom } from '../../src/poller/clock.js';
import { CREATE_DEFAULTS, createImage } from '../../src/bdev/qcow2/create.js';
import type { CreateOptions } from '../../src/bdev/qcow2/create.js';
import { createSnapshot } from '../../src/bdev/qcow2/edit/snapshots.js';
import { completeTask } from '../../src/bdev/task.js';
import { LUKS_HEADER } from '../harness/qcow2.js';
import { RecordingFile } from '../bdev/qcow2/recording-file.js';

/** Of the seeds with a disk one in so many has an image on it. */
const ONE_IN = 5;
/** Room on the disk: the file of an image grows by a MiB at first, and by as much again in each life of a daemon. */
export const IMAGE_DISK_BYTES = 24 * 2 ** 20;
const BLOCK_BYTES = 512;

const FORMATS: Readonly<Record<string, Partial<CreateOptions>>> = {
  'clusters of 512': { clusterBits: 9 },
  'clusters of 512, counters of 64 bits': { clusterBits: 9, refcountOrder: 6 },
  'clusters of 4096': { clusterBits: 12 },
  'clusters of 4096, counters of 2 bits': { clusterBits: 12, refcountOrder: 1 },
  'clusters of 64k': {},
  'version 2, clusters of 4096': { version: 2, clusterBits: 12 },
  'subclusters of 512': { clusterBits: 14, extendedL2: true },
  'subclusters of 2048': { extendedL2: true },
};

/** What the image holds before anybody writes to it; it reads as zeroes in any case. */
type Contents = 'nothing' | 'tables' | 'snapshot';

export interface SimImage {
  /** In words. */
  readonly name: string;
  readonly format: Partial<CreateOptions>;
  readonly contents: Contents;
  /** Filters below it. */
  readonly at: number;
  readonly isEncrypted: boolean;
  /** Changes of the mapping are written down in memory that outlives the daemon, else they are durable before they are answered. */
  readonly isLogged: boolean;
}

/** @param filters names, the lowest first. Returns null: none. */
export function chooseImage(random: SeededRandom, blockSectors: number, filters: readonly string[]): SimImage | null {
  if (random.below(ONE_IN) > 0) return null;
  const blockBits = Math.log2(blockSectors * BLOCK_BYTES);
  const fitting = Object.entries(FORMATS).filter(([, { clusterBits = 16 }]) => clusterBits >= blockBits);
  const [name, format] = fitting[random.below(fitting.length)]!;
  const contents = (['nothing', 'nothing', 'tables', 'snapshot'] as const)[random.below(4)]!;
  // A disk that fails one of the first requests of each daemon is one that no image on it can be opened of.
  const firstError = filters.indexOf('error');
  const at = random.below((firstError < 0 ? filters.length : firstError) + 1);
  const isLogged = random.below(4) > 0;
  // Storage that nothing was written to would be read as anything.
  const isEncrypted = contents === 'nothing' && format.version !== 2 && random.below(4) === 0;
  const facts = [name, contents === 'nothing' ? '' : contents, isLogged ? '' : 'no log', isEncrypted ? 'LUKS' : ''];
  const remarks = facts.filter((text) => text !== '').join(', ');
  return { name: `qcow2 (${remarks})`, format, contents, at, isEncrypted, isLogged };
}

const made = new Map<string, Buffer>();

/** The bytes of an image of a disk of so many sectors, which are not to be changed. */
export function imageBytes({ format, contents, isEncrypted }: SimImage, sectors: number): Buffer {
  const key = JSON.stringify([format, contents, isEncrypted, sectors]);
  let bytes = made.get(key);
  if (bytes === undefined) {
    const file = new RecordingFile(Buffer.alloc(0));
    const preallocation = contents === 'nothing' ? 'off' : 'metadata';
    const encryption = isEncrypted ? { luksHeader: LUKS_HEADER } : {};
    const options: CreateOptions = {
      ...CREATE_DEFAULTS,
      ...format,
      ...encryption,
      sizeBytes: sectors * BLOCK_BYTES,
      preallocation,
    };
    run(createImage(file, options));
    // All clusters and tables have two users from here on.
    if (contents === 'snapshot') run(createSnapshot(file, { name: 'before', seconds: 1, nanoseconds: 1 }));
    bytes = Buffer.from(file.bytes);
    made.set(key, bytes);
  }
  return bytes;
}

function run(task: Parameters<typeof completeTask>[0]): void {
  completeTask(task, () => undefined);
}
