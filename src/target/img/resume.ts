/**
 * `convert --resume`: a copy that was cut off goes on where it was. Beside the output lies a file, `OUTPUT.strata-resume`, that says how
 * far it got, from which source, by which options. One JSON object:
 *
 *     version   1
 *     source    what the copy depends on: see `Identity`
 *     output    device and inode of the output
 *     offset    of the disk: all that is before it is in the output
 *     state     of the output's tables, deflated, in base64: see `ImageWriter.save`
 *     digest    SHA-256 of offset and state
 *
 * Invariants
 * - What it says is on the disk before it is: the output is synced, then the file is written beside, synced and renamed.
 * - It is removed when the output is complete and on the disk. Until then the output is not to be used.
 */
import {
  closeSync,
  fsyncSync,
  openSync,
  readFileSync,
  readSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { createHash } from 'node:crypto';
import { dirname } from 'node:path';
import { deflateSync, inflateSync } from 'node:zlib';
import { BdevError } from '../../bdev/bdev.js';
import type { CreateOptions } from '../../bdev/qcow2/create.js';
import { isQcow2 } from '../../bdev/qcow2/format.js';
import type { DiskSource } from './disk-source.js';
import type { Format } from './image-options.js';
import { usage } from './words.js';

const SUFFIX = '.strata-resume';
const VERSION = 1;
/** Tables of a disk as large as can be. */
const STATE_BYTES_MAX = 2 ** 30;

/** What a copy is made from and by; when any of it changes, what was copied is of no use. By names for messages. */
export type Identity = Readonly<Record<string, unknown>>;

interface Contents {
  readonly version: number;
  readonly source: Identity;
  readonly output: string;
  readonly offset: number;
  readonly state: string;
  readonly digest: string;
}

/** @param options of the output. Throws BdevError for a source that has no identity. */
export function identityOf(source: DiskSource, format: Format, options: CreateOptions, others: Identity): Identity {
  if (source.chain.length === 0) {
    throw usage('--resume', `${source.path} is a bdev: nobody knows whether it has changed`, 'leave --resume out');
  }
  const files: Record<string, unknown> = {};
  for (const { file, format: sourceFormat, header } of source.chain) {
    const { size, mtimeNs, ino, dev } = statSync(file.path, { bigint: true });
    const dataFile = header?.dataFile ?? null;
    if (dataFile !== null) throw usage('--resume', `${file.path} has its data in ${dataFile}`, 'leave --resume out');
    const facts = [sourceFormat, size, mtimeNs, ino, dev, header?.l1Offset ?? 0].map(String);
    files[`file ${realpathSync(file.path)}`] = facts.join(' ');
  }
  return { ...files, 'size of the disk': source.sizeBytes, format, options: JSON.stringify(options), ...others };
}

export class ResumePoint {
  readonly path: string;
  readonly #target: string;
  readonly #source: Identity;
  /** All before it is in the output. */
  readonly offset: number;
  /** Of the tables at that point; null: the output is to be begun. */
  readonly state: Buffer | null;

  /** Throws BdevError when the output was begun from something else. */
  constructor(target: string, source: Identity) {
    this.path = target + SUFFIX;
    this.#target = target;
    this.#source = source;
    const found = read(this.path);
    // One that is complete, or another's, is not gone on with.
    if (found === null || isImage(target)) {
      this.offset = 0;
      this.state = null;
      return;
    }
    const other = differenceOf(found.source, source) ?? (found.output === identityOfFile(target) ? null : 'output');
    if (other !== null) {
      const message = `${target} was begun from something else: ${other} is not what it was`;
      throw new BdevError('no-resume', '--resume', message, `remove ${this.path} to begin anew`);
    }
    this.offset = found.offset;
    this.state = inflateSync(Buffer.from(found.state, 'base64'), { maxOutputLength: STATE_BYTES_MAX });
  }

  /** The output holds all before the offset, and is synced. Throws BdevError. */
  save(offset: number, state: Buffer): void {
    const text = deflateSync(state, { level: 1 }).toString('base64');
    const contents: Contents = {
      version: VERSION,
      source: this.#source,
      output: identityOfFile(this.#target)!,
      offset,
      state: text,
      digest: digestOf(offset, text),
    };
    const beside = `${this.path}.new`;
    try {
      writeDurably(beside, `${JSON.stringify(contents)}\n`);
      renameSync(beside, this.path);
      syncFolder(dirname(this.path));
    } catch (error) {
      const { code = 'failed' } = error as NodeJS.ErrnoException;
      throw new BdevError('io-error', '--resume', `Could not write ${this.path}: ${code}`, 'make room');
    }
  }

  remove(): void {
    rmSync(this.path, { force: true });
    rmSync(`${this.path}.new`, { force: true });
  }
}

/** An output is made anew: what was known of the former one is of no use. */
export function forgetResumption(target: string): void {
  rmSync(target + SUFFIX, { force: true });
}

/** Whether a file begins as a qcow2 image does, which an output is only when it is complete. */
function isImage(path: string): boolean {
  const bytes = Buffer.alloc(8);
  let fd: number;
  try {
    fd = openSync(path, 'r');
  } catch {
    return false;
  }
  readSync(fd, bytes, 0, 8, 0);
  closeSync(fd);
  return isQcow2(bytes);
}

/** Null when there is none. Throws BdevError. */
function read(path: string): Contents | null {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    const { code = 'failed' } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return null;
    throw new BdevError('open-failed', '--resume', `Could not read ${path}: ${code}`, 'check its permissions');
  }
  try {
    const contents = JSON.parse(text) as Contents;
    const { version, offset, state, digest } = contents;
    if (version === VERSION && digest === digestOf(offset, state)) return contents;
  } catch {
    // As for another version.
  }
  throw new BdevError('no-resume', '--resume', `${path} is of another version, or damaged`, 'remove it to begin anew');
}

function digestOf(offset: number, state: string): string {
  return createHash('sha256').update(`${offset} ${state}`).digest('hex');
}

function differenceOf(before: Identity, now: Identity): string | null {
  const names = new Set([...Object.keys(before), ...Object.keys(now)]);
  return [...names].find((name) => before[name] !== now[name]) ?? null;
}

function identityOfFile(path: string): string | null {
  const stat = statSync(path, { bigint: true, throwIfNoEntry: false });
  return stat === undefined ? null : `${stat.dev} ${stat.ino}`;
}

function writeDurably(path: string, text: string): void {
  const fd = openSync(path, 'w', 0o600);
  try {
    writeSync(fd, text);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function syncFolder(folder: string): void {
  const fd = openSync(folder, 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
