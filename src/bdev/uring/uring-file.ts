/**
 * Opening the file or block device under a uring bdev: what kind it is, how it must be aligned, what it can deallocate, and the
 * lock that keeps a second writer out.
 */
import { readFileSync, statSync } from 'node:fs';
import {
  EINVAL,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  O_CREAT,
  O_DIRECT,
  O_EXCL,
  O_RDONLY,
  O_RDWR,
  SystemError,
  check,
  checkObject,
  native,
} from '../../../native/index.js';
import type { Arena, FileFacts } from '../../../native/index.js';
import type { BdevConfig, UseGuard } from '../bdev.js';
import { BdevError } from '../bdev.js';
import { lockFile } from '../file-lock.js';

export interface UringConfig extends BdevConfig {
  readonly module: 'uring';
  /** A regular file or a block device. */
  readonly path: string;
  readonly readOnly: boolean;
  /** Make a sparse file of this size when there is none at `path`. */
  readonly create: { readonly sizeBytes: number } | null;
  /** Sector size shown upwards; null takes the smallest the file allows. */
  readonly blockSizeBytes: 512 | 4096 | null;
  /** O_DIRECT: past the host's page cache. */
  readonly direct: boolean;
  /** Poll the device for completions instead of taking interrupts. Needs a device with poll queues, and `direct`. */
  readonly iopoll: boolean;
  /** Register guest memory with the kernel: cheaper requests, but the memory is pinned. */
  readonly fixedBuffers: boolean;
  /**
   * Take a lock that keeps other writers (other Strata processes, QEMU) out: for as long as the file is open, or only while a
   * guest's rings run, so that a live migration can have it open on both sides.
   */
  readonly lock: boolean | 'running';
}

const LOCK_TRIES = 200;
const LOCK_PAUSE_MS = 10;

/** An open file with what the bdev must know of it. */
export interface UringFile {
  readonly fd: number;
  readonly facts: FileFacts;
  readonly blockSizeBytes: 512 | 4096;
  /** What O_DIRECT asks of memory; 1 without it. */
  readonly memoryAlignmentBytes: number;
  readonly canDiscard: boolean;
}

/** Throws BdevError; nothing stays open then. */
export function openUringFile(config: UringConfig, arena: Arena): UringFile {
  const fd = openPath(config);
  try {
    const facts = checkObject(native.fileStat(fd), `stat ${config.path}`);
    if (facts.kind === 'other') {
      throw new BdevError(
        'not-a-disk',
        'path',
        `${config.path} is neither a regular file nor a block device`,
        'name a file or a device',
      );
    }
    if (config.lock === true) takeLock(fd, config);
    const alignment = config.direct ? directAlignment(fd, facts, arena) : { memory: 1, offset: 1 };
    return {
      fd,
      facts,
      blockSizeBytes: chooseBlockSize(config, facts, Math.max(alignment.offset, alignment.memory)),
      memoryAlignmentBytes: alignment.memory,
      canDiscard: !config.readOnly && canDiscard(fd, facts),
    };
  } catch (error) {
    native.fileClose(fd);
    throw error instanceof SystemError
      ? new BdevError('open-failed', 'path', error.message, 'check the path, its permissions and the device')
      : error;
  }
}

/** Bytes the file or device has by now. Throws BdevError. */
export function fileSize({ fd }: Pick<UringFile, 'fd'>, { path }: UringConfig): number {
  const facts = native.fileStat(fd);
  if (typeof facts !== 'number') return facts.sizeBytes;
  throw new BdevError('stat-failed', 'name', new SystemError(-facts, `stat ${path}`).message, 'check the device');
}

/** Makes the file longer, by a hole; one that is long enough stays as it is. Throws BdevError. */
export function growFile(file: Pick<UringFile, 'fd' | 'facts'>, config: UringConfig, sizeBytes: number): void {
  const { path } = config;
  const nowBytes = fileSize(file, config);
  if (file.facts.kind === 'block') {
    if (sizeBytes <= nowBytes) return;
    throw new BdevError(
      'device-size',
      'newSize',
      `${path} is a device of ${nowBytes} bytes`,
      'make the device larger first, then ask for that size or rescan it',
    );
  }
  if (sizeBytes < nowBytes) {
    throw new BdevError(
      'shrinks',
      'newSize',
      `${path} has ${nowBytes} bytes, of which none are cut off`,
      'choose a larger size; or cut the file while the daemon is stopped',
    );
  }
  if (config.readOnly) {
    throw new BdevError('read-only', 'name', `${path} is open for reading only`, 'make it longer and rescan it');
  }
  const outcome = native.fileTruncate(file.fd, sizeBytes);
  if (outcome === 0) return;
  const { message } = new SystemError(-outcome, `set the size of ${path} to ${sizeBytes}`);
  throw new BdevError('resize-failed', 'newSize', message, 'choose a size that the file system allows');
}

function openPath(config: UringConfig): number {
  const access = config.readOnly ? O_RDONLY : O_RDWR;
  const direct = config.direct ? O_DIRECT : 0;
  // A block device opened O_EXCL cannot be mounted or in use by another exclusive user meanwhile.
  const isBlockDevice = statSync(config.path, { throwIfNoEntry: false })?.isBlockDevice() === true;
  const exclusive = isBlockDevice && !config.readOnly && config.lock !== 'running' ? O_EXCL : 0;
  const fd = native.fileOpen(config.path, access | direct | exclusive, 0);
  if (fd >= 0) return fd;
  switch (new SystemError(-fd, 'open').code) {
    case 'ENOENT':
      if (config.create !== null && !config.readOnly)
        return createFile(config, access | direct, config.create.sizeBytes);
      throw new BdevError(
        'no-such-file',
        'path',
        `${config.path} does not exist`,
        'create it, or set `create` with a size',
      );
    case 'EACCES':
    case 'EPERM':
      throw new BdevError(
        'no-access',
        'path',
        `${config.path} may not be opened`,
        'give this user access, or set `read_only: true`',
      );
    case 'EROFS':
      throw new BdevError(
        'read-only-fs',
        'path',
        `${config.path} is on a read-only file system`,
        'set `read_only: true`',
      );
    case 'EINVAL':
      if (config.direct) throw noDirect(config.path);
      break;
    case 'EBUSY':
      throw new BdevError(
        'busy',
        'path',
        `${config.path} is mounted or in exclusive use`,
        'unmount it, or end its other user',
      );
    case 'EISDIR':
      throw new BdevError('not-a-disk', 'path', `${config.path} is a directory`, 'name a file or a block device');
    default:
  }
  throw new BdevError('open-failed', 'path', new SystemError(-fd, `open ${config.path}`).message, 'check the path');
}

function createFile(config: UringConfig, flags: number, sizeBytes: number): number {
  const fd = native.fileOpen(config.path, flags | O_CREAT | O_EXCL, 0o600);
  if (fd === -EINVAL && config.direct) throw noDirect(config.path);
  if (fd < 0) {
    const { message } = new SystemError(-fd, `create ${config.path}`);
    throw new BdevError('create-failed', 'path', message, 'check that its folder exists and may be written');
  }
  const outcome = native.fileTruncate(fd, sizeBytes);
  if (outcome < 0) {
    native.fileClose(fd);
    const { message } = new SystemError(-outcome, `set the size of ${config.path} to ${sizeBytes}`);
    throw new BdevError('create-failed', 'create', message, 'choose a size the file system allows');
  }
  return fd;
}

function noDirect(path: string): BdevError {
  return new BdevError('no-direct-io', 'direct', `the file system of ${path} has no direct I/O`, 'set `direct: false`');
}

/**
 * The lock of a process that was killed lasts until the kernel is through with its last request. That long its successor has to wait:
 * a write of then must not come after one of now.
 */
function takeLock(fd: number, config: UringConfig): void {
  const pause = new Int32Array(new SharedArrayBuffer(4));
  for (let tries = 1; !lockFile(fd, config.path, !config.readOnly); tries++) {
    if (tries === LOCK_TRIES) {
      throw new BdevError(
        'locked',
        'path',
        `${config.path} is in use by another process`,
        'end that process; or, if it only reads, set `lock: false`',
      );
    }
    Atomics.wait(pause, 0, 0, LOCK_PAUSE_MS);
  }
}

/**
 * The lock for `lock: running`. It belongs to a second open file of its own, so that closing that one lets go of it.
 */
export class RunningLock implements UseGuard {
  readonly #file: Pick<UringFile, 'fd'>;
  readonly #config: UringConfig;
  readonly #onAcquired: () => void;
  #fd = -1;

  /** @param onAcquired called when nobody else can change the file any more: it may be longer than it was */
  constructor(file: Pick<UringFile, 'fd'>, config: UringConfig, onAcquired: () => void) {
    this.#file = file;
    this.#config = config;
    this.#onAcquired = onAcquired;
  }

  acquire(): string | null {
    const { path, readOnly } = this.#config;
    const fd = native.fileOpen(`/proc/self/fd/${this.#file.fd}`, readOnly ? O_RDONLY : O_RDWR, 0);
    try {
      check(fd, `open ${path} to lock it`);
      if (!lockFile(fd, path, !readOnly)) {
        native.fileClose(fd);
        return `${path} is in use by another process`;
      }
      this.#fd = fd;
      this.#onAcquired();
      return null;
    } catch (error) {
      if (fd >= 0) native.fileClose(fd);
      this.#fd = -1;
      return (error as Error).message;
    }
  }

  release(): void {
    if (this.#fd >= 0) native.fileClose(this.#fd);
    this.#fd = -1;
  }
}

/** What O_DIRECT asks for: as the kernel says (statx, 6.1), else found out by trying. */
function directAlignment(fd: number, facts: FileFacts, arena: Arena): { memory: number; offset: number } {
  if (facts.directOffsetAlignmentBytes > 0) {
    return { memory: facts.directMemoryAlignmentBytes, offset: facts.directOffsetAlignmentBytes };
  }
  if (facts.kind === 'block') return { memory: facts.logicalBlockBytes, offset: facts.logicalBlockBytes };
  const buffer = arena.allocate(8192);
  const outcome = native.fileRead(fd, arena.baseAddress + buffer + 512, 512, 0);
  arena.release(buffer);
  return outcome === -EINVAL ? { memory: 4096, offset: 4096 } : { memory: 512, offset: 512 };
}

/** @param directAlignment a block must be a multiple of it, in offset and in memory */
function chooseBlockSize(config: UringConfig, facts: FileFacts, directAlignment: number): 512 | 4096 {
  const least = Math.max(directAlignment, facts.kind === 'block' ? facts.logicalBlockBytes : 512);
  const hint = 'set `block_size: 4096`, or `direct: false`';
  if (least > 4096) {
    throw new BdevError(
      'alignment',
      'direct',
      `${config.path} wants direct I/O in units of ${least} bytes`,
      'set `direct: false`',
    );
  }
  if (config.blockSizeBytes === null) return least <= 512 ? 512 : 4096;
  if (config.blockSizeBytes < least) {
    const message = `${config.path} wants direct I/O in units of ${least} bytes, block_size is ${config.blockSizeBytes}`;
    throw new BdevError('alignment', 'block_size', message, hint);
  }
  return config.blockSizeBytes;
}

function canDiscard(fd: number, facts: FileFacts): boolean {
  if (facts.kind === 'block') {
    const device = `/sys/dev/block/${facts.deviceMajor}:${facts.deviceMinor}`;
    // A partition has no queue of its own.
    for (const path of [`${device}/queue/discard_max_bytes`, `${device}/../queue/discard_max_bytes`]) {
      try {
        return Number(readFileSync(path, 'utf8')) > 0;
      } catch {
        // Not there: try the next place.
      }
    }
    return false;
  }
  // Punching beyond the end changes nothing, and fails where it cannot be done.
  const beyond = Math.ceil((facts.sizeBytes + 1) / 4096) * 4096;
  return native.fileAllocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, beyond, 4096) >= 0;
}
