/**
 * What a process owes the image when it is killed: changes of the mapping that were answered and are not in the file yet. They are
 * written down in a file in memory (on a tmpfs), which outlives the process but not the host: what is lost in a power cut was not
 * flushed, and a guest knows that; what is lost by a kill the guest would never know.
 *
 *     header, 64 bytes                                record, 40 bytes
 *      0  8  magic "STRLOG1\0"                         0  8  sequence number, double; written last
 *      8  8  records there is room for, double         8  8  first cluster of the disk (table, host cluster), double
 *     16  8  number of the session, double            16  4  kind, and count << 8
 *     24  8  last sequence number that is in the file  20  4  zero
 *     32 32  zero                                     24 16  value: an L2 entry as on disk; an offset; a refcount
 *
 * Record `n` lies at place `n mod capacity`. A record holds values, not differences: to carry one out twice changes nothing.
 * The image says which log belongs to it by the number of the session in its autoclear bits, which every other program that writes
 * to the image has to clear (format.ts): a log is carried out only when it is the one of the image's session.
 *
 * Invariants
 * - A change is answered when its record is here. It is dropped when a round has made it durable.
 * - A record is published by one store, its sequence number, after all others: a kill leaves whole records.
 */
import { readdirSync, statSync, statfsSync, unlinkSync } from 'node:fs';
import { join } from 'node:path';
import { O_CREAT, O_EXCL, O_RDWR, SystemError, check, checkObject, native } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import { BdevError } from '../bdev.js';

const HEADER_BYTES = 64;
const RECORD_BYTES = 40;
const RECORD_DOUBLES = RECORD_BYTES / 8;
const RECORD_WORDS = RECORD_BYTES / 4;
const MAGIC = Buffer.from('STRLOG1\0', 'latin1');
const CAPACITY = 32_768;
const FILE_BYTES = HEADER_BYTES + CAPACITY * RECORD_BYTES;
/** What statfs(2) says of file systems in memory: tmpfs, ramfs. */
const IN_MEMORY = [0x01021994, 0x858458f6];
const COUNT_MAX = 2 ** 24 - 1;
const SWEPT_AFTER_MS = 60_000;
const ENOENT = 2;
const EEXIST = 17;
/** Numbers of sessions that are tried. */
const TRIES_MAX = 100;

/** Places in the header, in doubles. */
const CAPACITY_AT = 1;
const SESSION_AT = 2;
const COMMITTED_AT = 3;

export const RecordKind = {
  /** L2 entries of `count` clusters: `value`, each with a host cluster behind that of the one before. */
  map: 1,
  /** L2 entries of `count` clusters: `value`. */
  set: 2,
  /** The L1 entry `first`: the offset of its table. */
  table: 3,
  /** The refcount of the host cluster `first`. */
  refcount: 4,
} as const;
export type RecordKind = (typeof RecordKind)[keyof typeof RecordKind];

/** A record, as it is read back. */
export interface LogRecord {
  readonly kind: RecordKind;
  readonly first: number;
  readonly count: number;
  /** Two or four words. */
  readonly value: readonly number[];
}

export class RestartLog {
  readonly session: number;
  /** What is to be written, set before `append`: numbers as arguments would be boxed. */
  first = 0.5;
  readonly value = new Uint32Array(4);
  readonly #path: string;
  readonly #arena: Arena;
  readonly #address: number;
  readonly #fd: number;
  readonly #doubles: Float64Array;
  readonly #words: Uint32Array;
  #last = 0.5;
  /** Records up to here are being made durable: they are not extended any more. */
  #staged = 0.5;

  private constructor(path: string, session: number, arena: Arena, fd: number) {
    this.#path = path;
    this.session = session;
    this.#arena = arena;
    this.#fd = check(native.fileDuplicate(fd), `keep ${path} open`);
    this.#address = arena.mapFile(fd, 0, FILE_BYTES);
    this.#doubles = arena.viewF64(this.#address, FILE_BYTES / 8);
    this.#words = arena.view32(this.#address, FILE_BYTES / 4);
    this.#last = this.#doubles[COMMITTED_AT]!;
    this.#staged = this.#last;
  }

  /** A new log of a session of its own. Throws BdevError. */
  static create(folder: string, { arena, random, clock }: Pick<Reactor, 'arena' | 'random' | 'clock'>): RestartLog {
    const nowMs = clock.wallMs();
    sweep(folder, nowMs);
    let session = 0;
    let path = '';
    let fd = -EEXIST;
    for (let tries = 0; fd === -EEXIST && tries < TRIES_MAX; tries++) {
      session = 1 + Math.floor(random.next() * (2 ** 32 - 1));
      path = pathOf(folder, session);
      fd = native.fileOpen(path, O_RDWR | O_CREAT | O_EXCL, 0o600);
    }
    if (fd < 0) throw unusable(path, `create ${path}: ${new SystemError(-fd, 'open').code}`);
    try {
      checkFolder(folder);
      check(native.fileTruncate(fd, FILE_BYTES), `set the size of ${path}`);
      // A file system that is full is noticed here, not in the middle of a store.
      check(native.fileAllocate(fd, 0, 0, FILE_BYTES), `allocate ${path}`);
      const log = new RestartLog(path, session, arena, fd);
      log.#doubles[CAPACITY_AT] = CAPACITY;
      log.#doubles[SESSION_AT] = session;
      arena.view8(log.#address, MAGIC.length).set(MAGIC);
      return log;
    } catch (error) {
      unlinkSync(path);
      throw error instanceof SystemError ? unusable(path, error.message) : error;
    } finally {
      native.fileClose(fd);
    }
  }

  /** The log that a session left, or null. Throws BdevError. */
  static open(folder: string, session: number, arena: Arena): RestartLog | null {
    const path = pathOf(folder, session);
    const fd = native.fileOpen(path, O_RDWR, 0);
    if (fd === -ENOENT) return null;
    if (fd < 0) throw unusable(path, `open ${path}: ${new SystemError(-fd, 'open').code}`);
    try {
      const { sizeBytes } = checkObject(native.fileStat(fd), `stat ${path}`);
      // It was being made: nothing was answered then.
      if (sizeBytes !== FILE_BYTES) return null;
      const log = new RestartLog(path, session, arena, fd);
      const isWhole =
        MAGIC.equals(Buffer.from(arena.view8(log.#address, MAGIC.length))) &&
        log.#doubles[SESSION_AT] === session &&
        log.#doubles[CAPACITY_AT] === CAPACITY;
      if (isWhole) return log;
      log.abandon();
      return null;
    } catch (error) {
      throw error instanceof SystemError ? unusable(path, error.message) : error;
    } finally {
      native.fileClose(fd);
    }
  }

  /** Removes what a session left, which belongs to nothing any more. */
  static discard(folder: string, session: number): void {
    try {
      unlinkSync(pathOf(folder, session));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
  }

  /** Records there is room for. */
  get room(): number {
    return CAPACITY - (this.#last - this.#doubles[COMMITTED_AT]!);
  }

  /** More than half is used: a round is due. */
  get isFilling(): boolean {
    return this.room < CAPACITY / 2;
  }

  /** Writes `first` and `value` down, as one of `kind`. There is room. */
  append(kind: RecordKind, count: number): void {
    if (kind === RecordKind.set && this.#extend(count)) return;
    const sequence = this.#last + 1;
    const place = sequence % CAPACITY;
    const doubles = HEADER_BYTES / 8 + place * RECORD_DOUBLES;
    const words = HEADER_BYTES / 4 + place * RECORD_WORDS;
    this.#doubles[doubles + 1] = this.first;
    this.#words[words + 4] = kind + count * 256;
    this.#words[words + 5] = 0;
    this.#words[words + 6] = this.value[0]!;
    this.#words[words + 7] = this.value[1]!;
    this.#words[words + 8] = this.value[2]!;
    this.#words[words + 9] = this.value[3]!;
    this.#doubles[doubles] = sequence;
    this.#last = sequence;
  }

  /** Makes the last record one longer when this is its continuation. */
  #extend(count: number): boolean {
    if (this.#last <= this.#staged) return false;
    const place = this.#last % CAPACITY;
    const words = HEADER_BYTES / 4 + place * RECORD_WORDS;
    const head = this.#words[words + 4]!;
    const itsCount = head >>> 8;
    if ((head & 0xff) !== RecordKind.set || itsCount + count > COUNT_MAX) return false;
    if (this.#doubles[HEADER_BYTES / 8 + place * RECORD_DOUBLES + 1]! + itsCount !== this.first) return false;
    for (let i = 0; i < 4; i++) if (this.#words[words + 6 + i] !== this.value[i]) return false;
    this.#words[words + 4] = RecordKind.set + (itsCount + count) * 256;
    return true;
  }

  /** A round takes all changes up to now. */
  stage(): void {
    this.#staged = this.#last;
  }

  /** The round that was staged is durable. */
  commit(): void {
    this.#doubles[COMMITTED_AT] = this.#staged;
  }

  /** What was answered and is not in the file, in order. */
  *records(): Generator<LogRecord> {
    const committed = this.#doubles[COMMITTED_AT]!;
    if (!Number.isSafeInteger(committed) || committed < 0) return;
    for (let sequence = committed + 1; sequence <= committed + CAPACITY; sequence++) {
      const place = sequence % CAPACITY;
      const doubles = HEADER_BYTES / 8 + place * RECORD_DOUBLES;
      const words = HEADER_BYTES / 4 + place * RECORD_WORDS;
      if (this.#doubles[doubles] !== sequence) return;
      this.#last = sequence;
      const head = this.#words[words + 4]!;
      yield {
        kind: (head & 0xff) as RecordKind,
        first: this.#doubles[doubles + 1]!,
        count: head >>> 8,
        value: [...this.#words.subarray(words + 6, words + 10)],
      };
    }
  }

  /** All is in the file: the log ends. */
  close(): void {
    // An isolated reactor may not remove files: an empty one is left, which `sweep` finds.
    native.fileTruncate(this.#fd, 0);
    this.abandon();
    try {
      unlinkSync(this.#path);
    } catch (error) {
      if (!['EACCES', 'EPERM'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
    }
  }

  /** Leaves the log where it is, for whoever opens the image next. */
  abandon(): void {
    this.#arena.release(this.#address);
    native.fileClose(this.#fd);
  }
}

function pathOf(folder: string, session: number): string {
  return join(folder, `strata-${session.toString(16).padStart(8, '0')}`);
}

/** Removes empty logs, which nobody could remove when they ended. Those that are being made are younger. */
function sweep(folder: string, nowMs: number): void {
  try {
    for (const name of readdirSync(folder)) {
      if (!/^strata-[0-9a-f]{8}(-bits)?$/.test(name)) continue;
      const { size, mtimeMs } = statSync(join(folder, name));
      if (size === 0 && nowMs - mtimeMs > SWEPT_AFTER_MS) unlinkSync(join(folder, name));
    }
  } catch {
    // Another process was faster, or the folder is not to be read: what is left takes no room.
  }
}

/** On a disk it would outlive the host, and what it says would not be true any more. Throws BdevError. */
function checkFolder(folder: string): void {
  if (!IN_MEMORY.includes(statfsSync(folder).type)) throw unusable(folder, `${folder} is not on a tmpfs`);
}

function unusable(path: string, reason: string): BdevError {
  return new BdevError(
    'restart-log',
    'restart_dir',
    `the log that outlives a kill cannot be used: ${reason}`,
    `make ${path} possible, name another folder on a tmpfs, or set \`restart_dir: null\`: then changes are made durable before they are answered`,
  );
}
