/**
 * Facts that have to outlive the daemon: one small JSON file each in a folder of its own (`state_dir`).
 *
 * Invariants
 * - A file is whole, or not there: it is written beside its place, synced, moved there, and the folder is synced.
 * - What is written, or removed, when a call returns is so after a loss of power.
 * - One daemon uses the folder at a time.
 */
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { native } from '../../../native/index.js';

/** Longer than any record there is. */
const RECORD_BYTES_MAX = 64 * 1024;
const SUFFIX = '.json';

export interface StateFile {
  readonly path: string;
  readonly value: unknown;
}

export class StateFolder {
  readonly path: string;
  readonly #lockFd: number;

  private constructor(path: string, lockFd: number) {
    this.path = path;
    this.#lockFd = lockFd;
  }

  /** Makes the folder if need be. Throws errors of fs, and Error when another daemon uses it. */
  static open(path: string): StateFolder {
    mkdirSync(path, { recursive: true, mode: 0o700 });
    const lockFd = openSync(join(path, 'lock'), 'a', 0o600);
    if (native.fileLock(lockFd, 1, 0, 0) < 0) {
      closeSync(lockFd);
      throw new Error(`${path} is in use by another daemon`);
    }
    return new StateFolder(path, lockFd);
  }

  close(): void {
    closeSync(this.#lockFd);
  }

  /** Where the record lies. @param name of the disk: letters, digits, dots, dashes and underscores */
  pathOf(kind: string, name: string): string {
    return join(this.path, `${kind}-${name}${SUFFIX}`);
  }

  /** Throws errors of fs; then the record is as it was before, as far as can be told. */
  write(kind: string, name: string, value: unknown): void {
    const path = this.pathOf(kind, name);
    const draft = `${path}.new`;
    const fd = openSync(draft, 'w', 0o600);
    try {
      writeSync(fd, `${JSON.stringify(value, null, 2)}\n`);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(draft, path);
    this.#sync();
  }

  /** Throws errors of fs. */
  remove(kind: string, name: string): void {
    rmSync(this.pathOf(kind, name), { force: true });
    this.#sync();
  }

  /** All records of a kind. Throws errors of fs, and Error for what is no JSON. */
  read(kind: string): StateFile[] {
    const files = readdirSync(this.path).filter((file) => file.startsWith(`${kind}-`) && file.endsWith(SUFFIX));
    return files.toSorted().map((file) => {
      const path = join(this.path, file);
      const bytes = readFileSync(path);
      if (bytes.length > RECORD_BYTES_MAX) throw new Error(`${path} is too long for a record`);
      try {
        return { path, value: JSON.parse(bytes.toString()) as unknown };
      } catch {
        throw new Error(`${path} is no JSON`);
      }
    });
  }

  /** Makes names durable. */
  #sync(): void {
    const fd = openSync(this.path, 'r');
    try {
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
  }
}
