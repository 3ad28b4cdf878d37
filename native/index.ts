/**
 * The one typed face of the addon. Nothing else touches the compiled file.
 *
 * Conventions
 * - Memory is named by arena offsets (`Arena`) above this folder and by absolute addresses (`arena.baseAddress` + offset)
 *   in the functions here.
 * - Functions that wrap a system call return its result, >= 0, or -errno; they do not throw for an outcome. `check`
 *   turns a negative outcome into a SystemError where the control plane wants an exception.
 * - Functions marked (hot) are raw V8 callbacks, cheap enough to be called once per batch; the others are for set-up.
 */
import { createRequire } from 'node:module';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { getSystemErrorName } from 'node:util';

export { Arena, ARENA_WINDOW_BYTES, HUGE_PAGE_BYTES, WINDOW_MASK, WINDOW_SCALE } from './arena.js';

/** Facts of an open file or block device. Sizes in bytes. */
export interface FileFacts {
  readonly kind: 'file' | 'block' | 'other';
  readonly sizeBytes: number;
  /** Space the file takes on its file system. */
  readonly allocatedBytes: number;
  readonly logicalBlockBytes: number;
  readonly physicalBlockBytes: number;
  /** What O_DIRECT asks of memory and offsets; 0 when the kernel does not say or the file cannot do it. */
  readonly directMemoryAlignmentBytes: number;
  readonly directOffsetAlignmentBytes: number;
  /** Device of a block device, else of the file system. */
  readonly deviceMajor: number;
  readonly deviceMinor: number;
  readonly inode: number;
  /** st_blksize; on hugetlbfs it is the page size. */
  readonly preferredIoBytes: number;
}

/** What io_uring_setup(2) answers: the descriptor and byte offsets into the ring mappings. */
export interface RingSetup {
  readonly fd: number;
  readonly features: number;
  readonly sqEntries: number;
  readonly cqEntries: number;
  readonly sqHead: number;
  readonly sqTail: number;
  readonly sqFlags: number;
  readonly sqArray: number;
  readonly cqHead: number;
  readonly cqTail: number;
  readonly cqCqes: number;
}

export interface PeerCredentials {
  readonly pid: number;
  readonly uid: number;
  readonly gid: number;
}

/** The addon as compiled: see the functions' comments in the .cc files of the same subject. */
export interface Native {
  // arena.cc. `length` and `address` are multiples of the page size.
  /** Reserves an address range, aligned to 1 GiB; its first page is committed: see arena.ts. */
  arenaReserve(sizeBytes: number): ArrayBuffer | number;
  arenaBase(buffer: ArrayBuffer): number;
  arenaMapAnonymous(address: number, length: number): number;
  /** Shared, readable and writable. */
  arenaMapFile(address: number, length: number, fd: number, fileOffset: number): number;
  arenaUnmap(address: number, length: number): number;

  // bytes.cc
  /**
   * (hot) Runs the first `count` entries of three doubles {destination, source (0: zeroes), length}, in order. Addresses are
   * absolute; source and destination of one entry may overlap.
   */
  copyList(entries: Float64Array, count: number): void;
  /** (hot) Whether all bytes are zero. */
  isZero(address: number, length: number): boolean;
  /** (hot) CRC-32C (Castagnoli) of the bytes, continued from `seed` (0 at the start). */
  crc32c(seed: number, address: number, length: number): number;

  // cipher.cc
  /**
   * Opens a cipher for jobs of this thread and of the pool. The keys are copied.
   * @param name OpenSSL's, as `aes-256-xts`; with `key` as long as it says
   * @param vectorKind 0 plain, 1 plain64, 2 ESSIV, for which there is another cipher with its key
   * @returns its handle, or -EINVAL
   */
  cipherOpen(name: string, key: Uint8Array, vectorKind: number, essivName: string, essivKey: Uint8Array): number;
  /** Wipes the keys. No job may use it any more. */
  cipherClose(cipher: number): number;

  // codec.cc: jobs are described in codec.h
  /** (hot) Carries out the job at the start of the array on this thread. */
  codecRun(job: Int32Array): void;
  // codec-pool.cc
  /**
   * Opens a ring of jobs for the threads of the process, in memory that stays where it is: 64 bytes, then 72 for each entry.
   * @param entries power of two
   * @param eventFd signalled when a job is done and the first word of the memory is not 0, which is then set to 0
   * @param threadsMax how many threads the process may have for jobs from now on
   * @returns its number
   */
  codecOpen(address: number, entries: number, eventFd: number, threadsMax: number): number;
  /** Waits for the job that is being carried out; those that wait are dropped. The memory may be released then. */
  codecClose(ring: number): number;
  /** (hot) Hands over a job, by its index. */
  codecSubmit(ring: number, job: number): void;

  // file.cc
  /** open(2) with O_CLOEXEC. */
  fileOpen(path: string, flags: number, mode: number): number;
  /** openat2(2): nothing on the way, no link either, leads out of the folder. -EXDEV when something does. */
  fileOpenBeneath(folderFd: number, path: string, flags: number): number;
  fileClose(fd: number): number;
  /** dup(2) with FD_CLOEXEC. */
  fileDuplicate(fd: number): number;
  fileTruncate(fd: number, sizeBytes: number): number;
  /** fdatasync(2). */
  fileSync(fd: number): number;
  fileAllocate(fd: number, mode: number, offset: number, length: number): number;
  /** lseek(2), to find data and holes. @param whence SEEK_DATA or SEEK_HOLE. @returns -ENXIO behind the last data */
  fileSeek(fd: number, offset: number, whence: number): number;
  fileRead(fd: number, address: number, length: number, offset: number): number;
  fileWrite(fd: number, address: number, length: number, offset: number): number;
  /** Takes or gives back an open-file-description lock without waiting. @param kind 0 shared, 1 exclusive, 2 none; length 0 is to the end */
  fileLock(fd: number, kind: number, start: number, length: number): number;
  /** @returns 1 when another open file holds a lock on some of these bytes, else 0 */
  fileLockTest(fd: number, start: number, length: number): number;
  /** F_GETFL. */
  fileFlags(fd: number): number;
  fileStat(fd: number): FileFacts | number;
  /** Non-blocking eventfd, counter 0. */
  eventfdCreate(): number;
  /** (hot) Adds 1. */
  eventfdSignal(fd: number): number;
  /** Reads and clears the counter; 0 when it was clear. */
  eventfdDrain(fd: number): number;
  /** memfd of `sizeBytes`, sealable. */
  memfdCreate(name: string, sizeBytes: number): number;
  memfdGetSeals(fd: number): number;
  memfdAddSeals(fd: number, seals: number): number;

  // ring.cc
  ringSetup(entries: number, cqEntries: number, flags: number): RingSetup | number;
  /** Maps ring memory; unmapped when the ArrayBuffer is collected. */
  ringMap(fd: number, offset: number, length: number): ArrayBuffer | number;
  ringRegister(fd: number, opcode: number, address: number, count: number): number;
  /** (hot) Submits and lets the kernel post completions; never sleeps. */
  ringEnter(fd: number, toSubmit: number, flags: number): number;
  /** (hot) As ringEnter, then sleeps until a completion or the timeout (-ETIME) or a signal (-EINTR). */
  ringWait(fd: number, toSubmit: number, flags: number, timeoutUs: number): number;

  // socket.cc: unix stream sockets, non-blocking
  /**
   * Binds with exactly `mode` and listens. -EADDRINUSE when the path exists.
   * @param gid group of the file; the kernel's choice when left out
   */
  socketListen(path: string, mode: number, gid?: number): number;
  /** The first half of `socketListen`: whoever connects is refused. */
  socketBind(path: string, mode: number, gid?: number): number;
  /** The second half, for whoever holds the socket. */
  socketStartListening(fd: number): number;
  socketConnect(path: string): number;
  socketPair(): [number, number] | number;
  /** -EAGAIN when nobody waits, -EINVAL when `fd` does not listen. */
  socketAccept(fd: number): number;
  /** For sockets handed in from outside. */
  socketSetNonblocking(fd: number): number;
  /**
   * @param fds receives up to its length of descriptors
   * @param counts [0] descriptors received, [1] 1 when some were cut off (those are closed)
   * @returns bytes, 0 at the end of the stream, -EAGAIN when there is nothing
   */
  socketReceive(fd: number, address: number, length: number, fds: Int32Array, counts: Int32Array): number;
  /** @param fds descriptors to send along, at most 253 */
  socketSend(fd: number, address: number, length: number, fds: Int32Array): number;
  /** Of the process that connected, as it was then. */
  socketPeer(fd: number): PeerCredentials | number;
  /** Supplementary groups of that process. */
  socketPeerGroups(fd: number): number[] | number;

  // thread.cc
  threadSetAffinity(cpu: number): number;
  /** At most 15 bytes are kept. */
  threadSetName(name: string): number;
  threadCpuUs(): number;
  /** (hot) Writes CLOCK_MONOTONIC in microseconds to cell[0]. `cell` is over a buffer of its own. */
  clockRead(cell: Float64Array): void;
  /** Readable when the thread's event loop has something to do. */
  eventLoopFd(): number;
}

function addonPath(): string {
  const override = process.env['STRATA_ADDON'];
  if (override !== undefined && override !== '') return override;
  // This file runs from native/ (tests) and from dist/native/ (production).
  let folder = dirname(fileURLToPath(import.meta.url));
  for (;;) {
    const candidate = join(folder, 'build', 'Release', 'strata.node');
    if (existsSync(candidate)) return candidate;
    const parent = dirname(folder);
    if (parent === folder)
      throw new Error('strata.node is not built: run `npm ci` (or `npm run install`) in the package folder');
    folder = parent;
  }
}

export const native = createRequire(import.meta.url)(addonPath()) as Native;

/** A system call that failed, for the control plane. */
export class SystemError extends Error {
  /** As `ENOENT`. */
  readonly code: string;

  constructor(
    readonly errno: number,
    /** What was tried, as `open /x`. */
    readonly action: string,
  ) {
    const code = getSystemErrorName(-errno);
    super(`${action}: ${code}`);
    this.name = 'SystemError';
    this.code = code;
  }
}

/** Passes a result >= 0 on; throws a SystemError for -errno. */
export function check(outcome: number, action: string): number {
  if (outcome < 0) throw new SystemError(-outcome, action);
  return outcome;
}

/** As `check`, for functions that answer an object or -errno. */
export function checkObject<T extends object>(outcome: T | number, action: string): T {
  if (typeof outcome === 'number') throw new SystemError(-outcome, action);
  return outcome;
}

/** Flags of open(2), fcntl(2), fallocate(2) and preadv2(2) that are used, x86-64 and arm64 Linux. */
export const O_RDONLY = 0;
export const O_DIRECTORY = process.arch === 'arm64' ? 0o40000 : 0o200000;
export const O_RDWR = 2;
export const O_CREAT = 0o100;
export const O_EXCL = 0o200;
export const O_DIRECT = process.arch === 'arm64' ? 0o200000 : 0o40000;
export const FALLOC_FL_KEEP_SIZE = 1;
export const FALLOC_FL_PUNCH_HOLE = 2;
export const FALLOC_FL_ZERO_RANGE = 16;
export const SEEK_DATA = 3;
export const SEEK_HOLE = 4;
export const RWF_DSYNC = 2;
export const RWF_HIPRI = 1;
export const F_SEAL_SHRINK = 2;
export const POLLIN = 1;
export const POLLHUP = 16;
export const POLLERR = 8;

/** errno values the data path tells apart. */
export const EINTR = 4;
export const EIO = 5;
export const ENXIO = 6;
export const EAGAIN = 11;
export const EACCES = 13;
export const ENOMEM = 12;
export const EBUSY = 16;
export const EINVAL = 22;
export const EROFS = 30;
export const ENOSPC = 28;
export const ETIME = 62;
export const EOPNOTSUPP = 95;
export const ECANCELED = 125;
