/** A new image as a copy fills it: written in order, by plain system calls into the page cache. */
import { rmSync } from 'node:fs';
import { checkCreateOptions } from '../../bdev/qcow2/create.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { ImageWriter } from '../../bdev/qcow2/image-writer.js';
import type { Format } from './image-options.js';
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
  /** Completes it. @param isDurable whether it is on the disk afterwards */
  finish(isDurable: boolean): void;
  /** Closes it. What is not complete is removed. */
  close(): void;
}

const RAW_UNIT_BYTES = 4096;

/** @param options without preallocation and external data file. Throws BdevError. */
export function newImage(path: string, format: Format, options: CreateOptions): NewImage {
  // Before what is there is emptied.
  if (format === 'qcow2') checkCreateOptions(options);
  const file = new NodeFile(path, { mode: 'create' });
  try {
    return format === 'raw' ? new NewRaw(file, options.sizeBytes) : new NewQcow2(file, options);
  } catch (error) {
    file.close();
    rmSync(path);
    throw error;
  }
}

class NewRaw implements NewImage {
  readonly unitBytes = RAW_UNIT_BYTES;
  readonly keepsZeroes = true;
  readonly #file: NodeFile;
  readonly #sizeBytes: number;
  #isComplete = false;

  constructor(file: NodeFile, sizeBytes: number) {
    this.#file = file;
    this.#sizeBytes = sizeBytes;
    file.truncate(sizeBytes);
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
    closeFile(this.#file, this.#isComplete);
  }
}

class NewQcow2 implements NewImage {
  readonly unitBytes: number;
  /** Version 2 has no entry for zeroes that hide what is behind them. */
  readonly keepsZeroes: boolean;
  readonly #file: NodeFile;
  readonly #writer: ImageWriter;
  readonly #hasBacking: boolean;
  #isComplete = false;

  constructor(file: NodeFile, options: CreateOptions) {
    this.#file = file;
    this.#writer = new ImageWriter(file, options);
    this.#hasBacking = options.backingFile !== null;
    this.keepsZeroes = !this.#hasBacking || options.version === 3;
    this.unitBytes = this.#writer.clusterBytes;
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
    closeFile(this.#file, this.#isComplete);
  }
}

/** Removes what is not complete while it is still locked. */
function closeFile(file: NodeFile, isComplete: boolean): void {
  if (!isComplete) rmSync(file.path, { force: true });
  file.close();
}
