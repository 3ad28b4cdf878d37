/**
 * The bits of the dirty bitmaps of an image in use, in a file in memory beside the restart log: it outlives the process and not the host, so
 * that a kill costs no bitmap. What is recorded is stored there in the first place; nothing is copied while the disk is used.
 *
 *     header, 64 bytes                                     then
 *      0  8  magic "STRBITS1"                              the table: JSON, what lies where
 *      8  8  number of the session, double                 for each bitmap, at a multiple of 64:
 *     16  8  bytes of the table, double                     0  4  1: nothing is missing in it
 *     24  4  1: the file is whole; written last            64  n  its bits, as in the image
 *
 * Invariants
 * - A bitmap that the image marks as in use, in the session that the image names, has its bits here, or they are lost.
 * - While the file is rewritten it is not whole, and the image marks none as in use.
 */
import { readFileSync, unlinkSync } from 'node:fs';
import { join } from 'node:path';
import { O_CREAT, O_EXCL, O_RDWR, native } from '../../../native/index.js';
import type { Arena } from '../../../native/index.js';
import { BitmapBits } from './edit/bitmap-bits.js';

const MAGIC = Buffer.from('STRBITS1', 'latin1');
const HEADER_BYTES = 64;
const SESSION_AT = 8;
const TABLE_BYTES_AT = 16;
const WHOLE_AT = 24;
const SLOT_BYTES = 64;
/** What one image may take of the memory of the host. */
const FILE_BYTES_MAX = 64 * 2 ** 20;

/** Where a bitmap is. */
interface Place {
  readonly name: string;
  readonly sizeBytes: number;
  readonly granularityBits: number;
  /** Of its slot, from the end of the table on; its size says how many bits there are. */
  readonly offset: number;
}

export class BitmapFile {
  readonly #path: string;
  readonly #session: number;
  readonly #arena: Arena;
  readonly #fd: number;
  #address = 0;
  #bytes = Buffer.alloc(0);
  /** Offsets of slots, by name. */
  readonly #slots = new Map<string, number>();

  private constructor(path: string, session: number, arena: Arena, fd: number) {
    this.#path = path;
    this.#session = session;
    this.#arena = arena;
    this.#fd = fd;
  }

  /** Null: it cannot be had, and bitmaps do not outlive a kill. */
  static create(folder: string, session: number, arena: Arena): BitmapFile | null {
    const path = pathOf(folder, session);
    const fd = native.fileOpen(path, O_RDWR | O_CREAT | O_EXCL, 0o600);
    return fd < 0 ? null : new BitmapFile(path, session, arena, fd);
  }

  /** What a session left, by name: bitmaps in which nothing is missing. */
  static read(folder: string, session: number): ReadonlyMap<string, BitmapBits> {
    const found = new Map<string, BitmapBits>();
    try {
      const bytes = readFileSync(pathOf(folder, session));
      const isWhole =
        bytes.length >= HEADER_BYTES &&
        bytes.subarray(0, MAGIC.length).equals(MAGIC) &&
        bytes.readDoubleLE(SESSION_AT) === session &&
        bytes.readUInt32LE(WHOLE_AT) === 1;
      if (!isWhole) return found;
      const tableBytes = bytes.readDoubleLE(TABLE_BYTES_AT);
      const table = bytes.subarray(HEADER_BYTES, HEADER_BYTES + tableBytes).toString();
      const start = alignUp(HEADER_BYTES + tableBytes);
      for (const { name, sizeBytes, granularityBits, offset } of JSON.parse(table) as readonly Place[]) {
        if (bytes.readUInt32LE(start + offset) !== 1) continue;
        const bits = new BitmapBits(sizeBytes, granularityBits);
        bytes.copy(bits.bytes, 0, start + offset + SLOT_BYTES);
        found.set(name, bits);
      }
    } catch {
      // There is none, or it is of no use: then bitmaps are as after a loss of power.
      found.clear();
    }
    return found;
  }

  /** Removes what a session left, which belongs to nothing any more. */
  static discard(folder: string, session: number): void {
    remove(pathOf(folder, session));
  }

  /**
   * Has these bitmaps keep their bits here from now on, and no others; they stay where they are when there is no room.
   * @param incomplete names of those in which something is missing
   */
  keep(all: ReadonlyMap<string, BitmapBits>, incomplete: ReadonlySet<string>): void {
    const places: Place[] = [];
    let dataBytes = 0;
    for (const [name, { sizeBytes, granularityBits, bytes }] of all) {
      places.push({ name, sizeBytes, granularityBits, offset: dataBytes });
      dataBytes = alignUp(dataBytes + SLOT_BYTES + bytes.length);
    }
    const table = Buffer.from(JSON.stringify(places));
    const start = alignUp(HEADER_BYTES + table.length);
    this.#slots.clear();
    if (!this.#map(start + dataBytes)) return;
    const file = this.#bytes;
    file.set(MAGIC);
    file.writeDoubleLE(this.#session, SESSION_AT);
    file.writeDoubleLE(table.length, TABLE_BYTES_AT);
    file.set(table, HEADER_BYTES);
    for (const { name, offset } of places) {
      const bits = all.get(name)!;
      const slot = start + offset;
      this.#slots.set(name, slot);
      this.setComplete(name, !incomplete.has(name));
      bits.moveTo(file.subarray(slot + SLOT_BYTES, slot + SLOT_BYTES + bits.bytes.length));
    }
    file.writeUInt32LE(1, WHOLE_AT);
  }

  /** Says whether something is missing in a bitmap that is kept here. */
  setComplete(name: string, isComplete: boolean): void {
    const slot = this.#slots.get(name);
    if (slot !== undefined) this.#bytes.writeUInt32LE(isComplete ? 1 : 0, slot);
  }

  /** The image has all bits: the file ends. */
  close(): void {
    // An isolated reactor may not remove files: an empty one is left, which the sweep of the logs finds.
    native.fileTruncate(this.#fd, 0);
    this.abandon();
    remove(this.#path);
  }

  /** Leaves the file where it is, for whoever opens the image next. */
  abandon(): void {
    if (this.#address !== 0) this.#arena.release(this.#address);
    this.#address = 0;
    native.fileClose(this.#fd);
  }

  /** Makes the file anew, of zeroes. Returns false when it cannot be so large: then it is empty. */
  #map(lengthBytes: number): boolean {
    if (this.#address !== 0) this.#arena.release(this.#address);
    this.#address = 0;
    native.fileTruncate(this.#fd, 0);
    if (lengthBytes > FILE_BYTES_MAX) return false;
    // A file system that is full is noticed here, not in the middle of a store.
    const hasRoom =
      native.fileTruncate(this.#fd, lengthBytes) === 0 && native.fileAllocate(this.#fd, 0, 0, lengthBytes) === 0;
    if (!hasRoom) {
      native.fileTruncate(this.#fd, 0);
      return false;
    }
    this.#address = this.#arena.mapFile(this.#fd, 0, lengthBytes);
    this.#bytes = Buffer.from(this.#arena.buffer, this.#address, lengthBytes);
    return true;
  }
}

function pathOf(folder: string, session: number): string {
  return join(folder, `strata-${session.toString(16).padStart(8, '0')}-bits`);
}

function alignUp(bytes: number): number {
  return Math.ceil(bytes / SLOT_BYTES) * SLOT_BYTES;
}

function remove(path: string): void {
  try {
    unlinkSync(path);
  } catch (error) {
    if (!['ENOENT', 'EACCES', 'EPERM'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
  }
}
