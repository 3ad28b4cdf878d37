/** A new image as a copy fills it: written in order, by plain system calls into the page cache. */
import { rmSync } from 'node:fs';
import { checkCreateOptions } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { ImageWriter } from '../../bdev/qcow2/image-writer.js';
import type { Format } from './image-options.js';
import { forgetResumption } from './resume.js';
import { NodeFile, runTask } from './node-file.js';

/** Offsets are those of the disk. Throws BdevError. */
export interface NewImage {
  /** What is written at once at least, and what zeroes are left out by. */
  readonly unitBytes: number;
  /** @param bytes whole units */
  write(offset: number, bytes: Uint8Array): void;
  /** One unit, compressed to less. */
  writeCompressed(offset: number, bytes: Uint8Array): void;
  /** Whole units that are zero, although something may be behind them. Not where `keepsZeroes` is false. */
  writeZeroes(offset: number, lengthBytes: number): void;
  /** Whether zeroes can be left out. */
  readonly keepsZeroes: boolean;
  /** Nothing more comes for what is before this offset. */
  settle(offset: number): void;
  /** Makes all that was written durable. @returns what `newImage` needs to go on from there */
  checkpoint(): Buffer;
  /** Completes it. @param isDurable whether it is on the disk afterwards */
  finish(isDurable: boolean): void;
  /** Closes it. What is not complete is removed, unless it can go on. */
  close(): void;
}

const RAW_UNIT_BYTES = 4096;

/** An output that goes on where it was when it is cut off. */
export interface Resumption {
  /** All before it is in the output. */
  readonly offset: number;
  /** What `checkpoint` said then; null: it is to be begun. */
  readonly state: Buffer | null;
}

/**
 * @param options without preallocation and external data file
 * @param resumption null for an output that is removed when it is not completed. Throws BdevError.
 */
export function newImage(
  path: string,
  format: Format,
  options: CreateOptions,
  resumption: Resumption | null = null,
): NewImage {
  // Before what is there is emptied.
  if (format === 'qcow2') checkCreateOptions(options);
  if (resumption === null) forgetResumption(path);
  const isBegun = resumption !== null && resumption.state !== null;
  const file = new NodeFile(path, { mode: isBegun ? 'write' : 'create' });
  try {
    return format === 'raw' ? new NewRaw(file, options.sizeBytes, resumption) : new NewQcow2(file, options, resumption);
  } catch (error) {
    file.close();
    if (resumption === null) rmSync(path);
    throw error;
  }
}

class NewRaw implements NewImage {
  readonly unitBytes = RAW_UNIT_BYTES;
  readonly keepsZeroes = true;
  readonly #file: NodeFile;
  readonly #sizeBytes: number;
  readonly #isKept: boolean;
  #isComplete = false;

  constructor(file: NodeFile, sizeBytes: number, resumption: Resumption | null) {
    this.#file = file;
    this.#sizeBytes = sizeBytes;
    this.#isKept = resumption !== null;
    // Zeroes are left out: what was written behind that point has to go.
    if (resumption !== null) file.truncate(Math.min(resumption.offset, sizeBytes));
    file.truncate(sizeBytes);
  }

  checkpoint(): Buffer {
    runTask(this.#file.sync());
    return Buffer.alloc(0);
  }

  write(offset: number, bytes: Uint8Array): void {
    this.#file.writeNow(offset, bytes.subarray(0, this.#sizeBytes - offset));
  }

  writeCompressed(): void {
    throw new Error('raw images are not compressed');
  }

  /** Nothing is behind it. */
  writeZeroes(): void {}

  settle(): void {}

  finish(isDurable: boolean): void {
    if (isDurable) runTask(this.#file.sync());
    this.#isComplete = true;
  }

  close(): void {
    closeFile(this.#file, this.#isComplete || this.#isKept);
  }
}

class NewQcow2 implements NewImage {
  readonly unitBytes: number;
  /** Version 2 has no entry for zeroes that hide what is behind them. */
  readonly keepsZeroes: boolean;
  readonly #file: NodeFile;
  readonly #writer: ImageWriter;
  readonly #hasBacking: boolean;
  readonly #isKept: boolean;
  #isComplete = false;

  constructor(file: NodeFile, options: CreateOptions, resumption: Resumption | null) {
    this.#file = file;
    this.#writer = new ImageWriter(file, options);
    this.#isKept = resumption !== null;
    if (resumption !== null && resumption.state !== null) file.truncate(this.#writer.restore(resumption.state));
    this.#hasBacking = options.backingFile !== null;
    this.keepsZeroes = !this.#hasBacking || options.version === 3;
    this.unitBytes = this.#writer.clusterBytes;
  }

  checkpoint(): Buffer {
    runTask(this.#file.sync());
    return this.#writer.save();
  }

  write(offset: number, bytes: Uint8Array): void {
    runTask(this.#writer.writePlain(offset, bytes));
  }

  writeCompressed(offset: number, bytes: Uint8Array): void {
    runTask(this.#writer.writeCompressed(offset, bytes));
  }

  writeZeroes(offset: number, lengthBytes: number): void {
    if (!this.#hasBacking) return;
    for (let at = 0; at < lengthBytes; at += this.unitBytes) this.#writer.setZero(offset + at);
  }

  settle(offset: number): void {
    runTask(this.#writer.settle(offset));
  }

  finish(isDurable: boolean): void {
    runTask(this.#writer.finish(isDurable));
    this.#isComplete = true;
  }

  close(): void {
    closeFile(this.#file, this.#isComplete || this.#isKept);
  }
}

/** Removes what is of no use while it is still locked. */
function closeFile(file: NodeFile, isKept: boolean): void {
  if (!isKept) rmSync(file.path, { force: true });
  file.close();
}
