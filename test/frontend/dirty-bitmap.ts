/**
 * The front-end's end of a dirty log: a bitmap in a memfd with one bit for each 4 KiB page of guest addresses. It lies at an
 * offset in its file, with guarded bytes before and behind.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { u64 } from './protocol.js';

export const LOG_PAGE_BYTES = 4096;
const GUARD = 0xa5;

export interface DirtyBitmapOptions {
  /** Length of the bitmap. */
  readonly sizeBytes: number;
  /** Where it begins in its file, of any alignment. Default 0. */
  readonly offsetBytes?: number;
  /** Bytes of the file behind it. Default 0. */
  readonly behindBytes?: number;
}

export class DirtyBitmap {
  readonly fd: number;
  readonly sizeBytes: number;
  readonly offsetBytes: number;
  readonly #arena: Arena;
  readonly #mapping: number;
  readonly #file: Uint8Array;

  constructor(arena: Arena, options: DirtyBitmapOptions) {
    this.sizeBytes = options.sizeBytes;
    this.offsetBytes = options.offsetBytes ?? 0;
    const fileBytes = this.offsetBytes + this.sizeBytes + (options.behindBytes ?? 0);
    this.fd = check(native.memfdCreate('dirty-log', fileBytes), 'make a dirty log');
    this.#arena = arena;
    this.#mapping = arena.mapFile(this.fd, 0, fileBytes);
    this.#file = arena.view8(this.#mapping, fileBytes);
    this.#file.fill(GUARD);
    this.#file.fill(0, this.offsetBytes, this.offsetBytes + this.sizeBytes);
  }

  /** {u64 size, u64 offset} as SET_LOG_BASE carries it. */
  describe(): Buffer {
    return Buffer.concat([u64(this.sizeBytes), u64(this.offsetBytes)]);
  }

  has(page: number): boolean {
    return (this.#file[this.offsetBytes + Math.floor(page / 8)]! & (1 << (page % 8))) !== 0;
  }

  /** Numbers of the pages that are marked. */
  pages(): Set<number> {
    const found = new Set<number>();
    for (let at = 0; at < this.sizeBytes; at++) {
      if (this.#file[this.offsetBytes + at] === 0) continue;
      for (let bit = 0; bit < 8; bit++) if (this.has(8 * at + bit)) found.add(8 * at + bit);
    }
    return found;
  }

  clear(): void {
    this.#file.fill(0, this.offsetBytes, this.offsetBytes + this.sizeBytes);
  }

  /** Whether nothing was written beside the bitmap. */
  get isGuarded(): boolean {
    const end = this.offsetBytes + this.sizeBytes;
    return this.#file.every((byte, i) => (i >= this.offsetBytes && i < end) || byte === GUARD);
  }

  close(): void {
    this.#arena.release(this.#mapping);
    native.fileClose(this.fd);
  }
}

/** Numbers of the pages that a range of guest addresses touches. */
export function pagesOf(guestAddress: number, lengthBytes: number): number[] {
  const first = Math.floor(guestAddress / LOG_PAGE_BYTES);
  const last = Math.floor((guestAddress + lengthBytes - 1) / LOG_PAGE_BYTES);
  return Array.from({ length: last - first + 1 }, (_, i) => first + i);
}
