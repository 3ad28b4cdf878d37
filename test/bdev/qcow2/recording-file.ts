/** An image's file in memory that writes down what is done to it, and the files that a loss of power could leave. */
import { createHash } from 'node:crypto';
import { completeTask } from '../../../src/bdev/task.js';
import type { Task } from '../../../src/bdev/task.js';
import type { ImageFile } from '../../../src/bdev/qcow2/image-file.js';
import type { Random } from '../../../src/poller/clock.js';

type Operation =
  | { readonly type: 'write'; readonly offset: number; readonly bytes: Buffer }
  | { readonly type: 'grow'; readonly sizeBytes: number }
  | { readonly type: 'sync' };

const SECTOR_BYTES = 512;

export class RecordingFile implements ImageFile {
  readonly operations: Operation[] = [];
  readonly #initial: Buffer;
  /** Longer than the file, so that it grows without being copied each time. */
  #room: Buffer;
  #sizeBytes: number;

  constructor(bytes: Buffer) {
    this.#initial = Buffer.from(bytes);
    this.#room = Buffer.from(bytes);
    this.#sizeBytes = bytes.length;
  }

  get bytes(): Buffer {
    return this.#room.subarray(0, this.#sizeBytes);
  }

  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  *read(offset: number, bytes: Uint8Array): Task<void> {
    bytes.fill(0);
    if (offset < this.#sizeBytes) bytes.set(this.bytes.subarray(offset, offset + bytes.length));
  }

  *write(offset: number, bytes: Uint8Array): Task<void> {
    if (offset + bytes.length > this.#sizeBytes) throw new Error(`write at ${offset} ends beyond the file`);
    this.operations.push({ type: 'write', offset, bytes: Buffer.from(bytes) });
    this.#room.set(bytes, offset);
  }

  *sync(): Task<void> {
    this.operations.push({ type: 'sync' });
  }

  *grow(sizeBytes: number): Task<void> {
    if (sizeBytes <= this.#sizeBytes) return;
    this.operations.push({ type: 'grow', sizeBytes });
    this.#sizeBytes = sizeBytes;
    if (sizeBytes <= this.#room.length) return;
    const larger = Buffer.alloc(sizeBytes * 2);
    this.#room.copy(larger);
    this.#room = larger;
  }

  /** As zeroes that are written: what is still needed would be missed. */
  *deallocate(offset: number, lengthBytes: number): Task<void> {
    yield* this.write(offset, Buffer.alloc(lengthBytes));
  }

  get writes(): number {
    return this.operations.filter(({ type }) => type === 'write').length;
  }

  /**
   * What a crash at any moment may leave: after each operation, with all that is not yet synced lost, with all of it kept, and
   * with random parts of it, in units of 512 bytes. The same bytes are given once.
   */
  crashes(random: Random, randomPerMoment: number): { readonly when: string; readonly bytes: Buffer }[] {
    const found = new Map<string, { when: string; bytes: Buffer }>();
    let durable = this.#initial;
    let pending: Operation[] = [];
    const add = (when: string, keep: () => boolean): void => {
      const bytes = apply(durable, pending, keep);
      found.set(createHash('sha1').update(bytes).digest('hex'), { when, bytes });
    };
    add('before anything', () => true);
    this.operations.forEach((operation, i) => {
      if (operation.type === 'sync') {
        durable = apply(durable, pending, () => true);
        pending = [];
        return;
      }
      pending.push(operation);
      const when = `at operation ${i} of ${this.operations.length}`;
      add(`${when}, all lost`, () => false);
      add(`${when}, all kept`, () => true);
      for (let n = 0; n < randomPerMoment; n++) add(`${when}, random ${n}`, () => random.below(2) === 0);
    });
    return [...found.values()];
  }
}

function apply(before: Buffer, operations: readonly Operation[], keep: () => boolean): Buffer {
  let bytes = Buffer.from(before);
  const grow = (sizeBytes: number): void => {
    if (sizeBytes > bytes.length) bytes = Buffer.concat([bytes, Buffer.alloc(sizeBytes - bytes.length)]);
  };
  for (const operation of operations) {
    if (operation.type === 'grow' && keep()) grow(operation.sizeBytes);
    if (operation.type !== 'write') continue;
    for (let at = 0; at < operation.bytes.length;) {
      const start = operation.offset + at;
      const length = Math.min(operation.bytes.length - at, SECTOR_BYTES - (start % SECTOR_BYTES));
      if (keep()) {
        grow(start + length);
        operation.bytes.copy(bytes, start, at, at + length);
      }
      at += length;
    }
  }
  return bytes;
}

/** Runs a task that never has to wait. Throws what it throws. */
export function runTask<T>(task: Task<T>): T {
  return completeTask(task, () => {
    throw new Error('the task waits for something that nobody does');
  });
}
