/**
 * Writer of the "newc" cpio archive that Linux unpacks as its initramfs (kernel documentation, "initramfs buffer
 * format"). Entries are owned by root and dated 1970, so equal content gives an equal archive, and device nodes need no
 * privilege. A directory must be added before what it holds: `file` does so by itself.
 */
import { posix } from 'node:path';

const MODE_DIRECTORY = 0o040755;
const MODE_FILE = 0o100000;
const MODE_CHARACTER_DEVICE = 0o020600;

export class CpioWriter {
  readonly #parts: Buffer[] = [];
  readonly #directories = new Set<string>(['/']);
  #nextInode = 1;

  /** Adds a directory and its parents; one that exists already is left alone. */
  directory(path: string): void {
    if (this.#directories.has(path)) return;
    this.directory(posix.dirname(path));
    this.#directories.add(path);
    this.#entry(path, MODE_DIRECTORY, Buffer.alloc(0));
  }

  /** Adds a file with its parent directories; `permissions` are the lower nine mode bits. */
  file(path: string, content: Buffer | string, permissions: number): void {
    this.directory(posix.dirname(path));
    this.#entry(path, MODE_FILE | permissions, Buffer.from(content));
  }

  characterDevice(path: string, major: number, minor: number): void {
    this.directory(posix.dirname(path));
    this.#entry(path, MODE_CHARACTER_DEVICE, Buffer.alloc(0), major, minor);
  }

  /** The whole archive with its trailer. */
  finish(): Buffer {
    this.#entry('/TRAILER!!!', 0, Buffer.alloc(0));
    return Buffer.concat(this.#parts);
  }

  #entry(path: string, mode: number, content: Buffer, major = 0, minor = 0): void {
    const name = Buffer.from(`${path.slice(1)}\0`);
    const inode = this.#nextInode++;
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, major, minor, name.length, 0];
    const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`);
    this.#push(header, name);
    this.#push(content);
  }

  /** Name and content each end on a multiple of four bytes. */
  #push(...parts: Buffer[]): void {
    const length = parts.reduce((sum, part) => sum + part.length, 0);
    this.#parts.push(...parts, Buffer.alloc((4 - (length % 4)) % 4));
  }
}
