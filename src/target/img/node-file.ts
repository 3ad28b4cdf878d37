/**
 * An image file for the tools: a plain file or block device by synchronous calls of node:fs. Its tasks never wait, so they are run by
 * `runTask`.
 *
 * Invariant: a file that is open for writing is locked against the daemon and QEMU, unless locking was turned off.
 */
import { closeSync, constants, fdatasyncSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, O_RDONLY, native } from '../../../native/index.js';
import { BdevError } from '../../bdev/bdev.js';
import type { ImageFile } from '../../bdev/qcow2/image-file.js';
import { completeTask } from '../../bdev/task.js';
import type { Task } from '../../bdev/task.js';
import { lockFile } from '../../bdev/file-lock.js';

/** Runs a task over files of this kind. Throws what it throws. */
export function runTask<T>(task: Task<T>): T {
  return completeTask(task, () => {
    throw new Error('a task over plain files waits for nothing');
  });
}

export interface NodeFileOptions {
  readonly mode: 'read' | 'write' | 'create';
  /** Leave locks of others alone, as `--force-share` asks; for reading only. */
  readonly forceShare?: boolean;
  /** Write also to an image that a killed daemon has not finished; see `openImage`. */
  readonly discardSession?: boolean;
}

export class NodeFile implements ImageFile {
  readonly path: string;
  readonly fd: number;
  readonly isDevice: boolean;
  #sizeBytes: number;

  /** Opens a file; `create` empties it. Throws BdevError. */
  constructor(path: string, options: NodeFileOptions) {
    this.path = path;
    this.fd = openPath(path, options.mode);
    try {
      const facts = fstatSync(this.fd);
      if (!facts.isFile() && !facts.isBlockDevice()) {
        throw new BdevError('not-a-disk', 'filename', `${path} is neither a file nor a block device`, 'name a file');
      }
      this.isDevice = facts.isBlockDevice();
      if (options.forceShare !== true) takeLock(this.fd, path, options.mode);
      // Only now, with the lock: what another one uses is not emptied.
      // A file that is emptied is written out by ext4 when it is closed: one that is empty is left alone.
      if (options.mode === 'create' && !this.isDevice && fstatSync(this.fd).size > 0) ftruncateSync(this.fd, 0);
      this.#sizeBytes = this.isDevice ? deviceBytes(this.fd, path) : fstatSync(this.fd).size;
    } catch (error) {
      closeSync(this.fd);
      throw error;
    }
  }

  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  get growsByWriting(): boolean {
    return !this.isDevice;
  }

  /** Space it takes on its file system. */
  get allocatedBytes(): number {
    return fstatSync(this.fd).blocks * 512;
  }

  close(): void {
    closeSync(this.fd);
  }

  /** As `read`, without a task. Throws BdevError. */
  readNow(offset: number, bytes: Uint8Array): void {
    let done = 0;
    while (done < bytes.length) {
      const count = this.#attempt('read', offset + done, () =>
        readSync(this.fd, bytes, done, bytes.length - done, offset + done),
      );
      if (count === 0) break;
      done += count;
    }
    bytes.fill(0, done);
  }

  /** As `write`, without a task. Throws BdevError. */
  writeNow(offset: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length;) {
      done += this.#attempt('write', offset + done, () =>
        writeSync(this.fd, bytes, done, bytes.length - done, offset + done),
      );
    }
    if (!this.isDevice) this.#sizeBytes = Math.max(this.#sizeBytes, offset + bytes.length);
  }

  *read(offset: number, bytes: Uint8Array): Task<void> {
    this.readNow(offset, bytes);
  }

  *write(offset: number, bytes: Uint8Array): Task<void> {
    this.writeNow(offset, bytes);
  }

  *sync(): Task<void> {
    this.#attempt('sync', 0, () => fdatasyncSync(this.fd));
  }

  *grow(sizeBytes: number): Task<void> {
    if (sizeBytes <= this.#sizeBytes) return;
    if (this.isDevice) {
      const message = `${this.path} has ${this.#sizeBytes} bytes, ${sizeBytes} are needed`;
      throw new BdevError('too-small', 'filename', message, 'use a larger device');
    }
    this.truncate(sizeBytes);
  }

  *allocate(offset: number, lengthBytes: number): Task<void> {
    const outcome = native.fileAllocate(this.fd, this.isDevice ? FALLOC_FL_KEEP_SIZE : 0, offset, lengthBytes);
    if (outcome < 0) throw ioError(this.path, 'reserve space', offset, -outcome);
    if (!this.isDevice) this.#sizeBytes = Math.max(this.#sizeBytes, offset + lengthBytes);
  }

  *deallocate(offset: number, lengthBytes: number): Task<void> {
    const outcome = native.fileAllocate(this.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, lengthBytes);
    if (outcome < 0) throw ioError(this.path, 'give space back', offset, -outcome);
  }

  /** Sets the size of a plain file. Throws BdevError. */
  truncate(sizeBytes: number): void {
    this.#attempt('set the size', sizeBytes, () => ftruncateSync(this.fd, sizeBytes));
    this.#sizeBytes = sizeBytes;
  }

  #attempt<T>(action: string, offset: number, call: () => T): T {
    try {
      return call();
    } catch (error) {
      throw ioError(this.path, action, offset, (error as NodeJS.ErrnoException).code ?? (error as Error).message);
    }
  }
}

function ioError(path: string, action: string, offset: number, reason: string | number): BdevError {
  const isFull = reason === 'ENOSPC' || reason === 28;
  const hint = isFull ? 'make room' : 'look at the device and the log of the kernel';
  const words = typeof reason === 'number' ? `errno ${reason}` : reason;
  return new BdevError(isFull ? 'no-space' : 'io-error', 'filename', `${path}: ${action} at ${offset}: ${words}`, hint);
}

function openPath(path: string, mode: NodeFileOptions['mode']): number {
  const { O_CREAT, O_RDWR } = constants;
  const flags = { read: O_RDONLY, write: O_RDWR, create: O_RDWR | O_CREAT }[mode];
  try {
    return openSync(path, flags, 0o644);
  } catch (error) {
    const { code = 'failed' } = error as NodeJS.ErrnoException;
    const hint = code === 'ENOENT' ? 'check the path' : 'check its permissions';
    throw new BdevError('open-failed', 'filename', `Could not open '${path}': ${code}`, hint);
  }
}

/** A block device says its size to those who seek; it is found in the kernel's own list. */
function deviceBytes(fd: number, path: string): number {
  const facts = native.fileStat(fd);
  if (typeof facts !== 'number') return facts.sizeBytes;
  throw new BdevError('open-failed', 'filename', `${path}: its size is not known: errno ${-facts}`, 'check the device');
}

function takeLock(fd: number, path: string, mode: NodeFileOptions['mode']): void {
  if (lockFile(fd, path, mode !== 'read')) return;
  throw new BdevError(
    'locked',
    'filename',
    `${path} is in use by another process`,
    mode === 'read' ? 'end that process; or read all the same with --force-share' : 'end that process',
  );
}
