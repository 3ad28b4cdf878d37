/**
 * The arena: one reserved address range per reactor, seen as ONE ArrayBuffer. Guest memory regions and buffers
 * are mapped into it, so an address is a plain number: the offset from its start.
 *
 * The data path reads and writes through windows of 2 GiB, so that an index is always a small integer:
 *
 *     arena.u32[(offset * WINDOW_SCALE) | 0]![(offset & WINDOW_MASK) >>> 2]
 *
 * Invariants
 * - Offset 0 is never handed out: the first page holds the count of caught SIGBUS faults.
 * - A range handed out is mapped until it is released; what is not handed out is not accessible at all: a stray access
 *   ends the process rather than reading another tenant's bytes.
 */
import { native, check, checkObject } from './index.js';

export const ARENA_WINDOW_BYTES = 2 ** 31;
export const WINDOW_SCALE = 2 ** -31;
export const WINDOW_MASK = 0x7fffffff;

const PAGE_BYTES = 4096;
/** Of x86-64, and of AArch64 with small pages of 4 KiB: memory that begins at a multiple is made of such pages where the kernel has them. */
export const HUGE_PAGE_BYTES = 2 ** 21;
const ARENA_BYTES_DEFAULT = 2 ** 40;

/** A free or used range [offset, offset + length). */
interface Range {
  offset: number;
  length: number;
}

export class Arena {
  readonly buffer: ArrayBuffer;
  readonly sizeBytes: number;
  /** Absolute address of offset 0. */
  readonly baseAddress: number;
  /** Window w covers bytes [w * 2 GiB, (w + 1) * 2 GiB). Empty windows are empty views. */
  readonly u8: Uint8Array[] = [];
  readonly u16: Uint16Array[] = [];
  readonly u32: Uint32Array[] = [];

  readonly #header: Uint32Array;
  readonly #faultOffset: Float64Array;
  /** Sorted by offset, never adjacent. */
  readonly #free: Range[];
  readonly #used = new Map<number, number>();

  /** @param sizeBytes address space to reserve; costs no memory. Multiple of 2 GiB. */
  constructor(sizeBytes = ARENA_BYTES_DEFAULT) {
    this.buffer = checkObject(native.arenaReserve(sizeBytes), `reserve ${sizeBytes} bytes of address space`);
    this.sizeBytes = sizeBytes;
    this.baseAddress = native.arenaBase(this.buffer);
    this.#header = new Uint32Array(this.buffer, 0, 2);
    this.#faultOffset = new Float64Array(this.buffer, 8, 1);
    this.#free = [{ offset: PAGE_BYTES, length: sizeBytes - PAGE_BYTES }];
    const empty8 = new Uint8Array(this.buffer, 0, 0);
    const empty16 = new Uint16Array(this.buffer, 0, 0);
    const empty32 = new Uint32Array(this.buffer, 0, 0);
    for (let w = 0; w * ARENA_WINDOW_BYTES < sizeBytes; w++) {
      this.u8.push(empty8);
      this.u16.push(empty16);
      this.u32.push(empty32);
    }
    this.#openWindows(0, PAGE_BYTES);
  }

  /** Accesses beyond the end of a mapped file that were caught so far. Cheap: polled by sessions. */
  get faults(): number {
    return this.#header[0]!;
  }

  /** Where the latest caught fault was. */
  get lastFaultOffset(): number {
    return this.#faultOffset[0]!;
  }

  /** Bytes handed out. */
  get usedBytes(): number {
    let sum = 0;
    for (const length of this.#used.values()) sum += length;
    return sum;
  }

  /**
   * Zeroed private memory. Pages are taken when first touched.
   * @param alignment power of two, at least the page size
   * @returns its offset. Throws SystemError when there is no room.
   */
  allocate(lengthBytes: number, alignment = PAGE_BYTES): number {
    const length = pageCeil(lengthBytes);
    const offset = this.#take(length, alignment);
    const outcome = native.arenaMapAnonymous(this.baseAddress + offset, length);
    if (outcome < 0) this.release(offset);
    check(outcome, `map ${length} bytes of memory`);
    return offset;
  }

  /**
   * Maps a file range, shared. `fileOffset` is page-aligned (of the file's own page size, for hugetlbfs).
   * @param alignment at least the file's page size
   * @returns its offset. Throws SystemError.
   */
  mapFile(fd: number, fileOffset: number, lengthBytes: number, alignment = PAGE_BYTES): number {
    // A length that is not a multiple of the page is rounded up by the kernel; huge pages need the rounding here.
    const length = Math.ceil(lengthBytes / alignment) * alignment;
    const offset = this.#take(length, alignment);
    const outcome = native.arenaMapFile(this.baseAddress + offset, length, fd, fileOffset);
    if (outcome < 0) this.release(offset);
    check(outcome, `map ${length} bytes of descriptor ${fd}`);
    return offset;
  }

  /** Gives a range back. @param offset as returned by allocate or mapFile */
  release(offset: number): void {
    const length = this.#used.get(offset);
    if (length === undefined) throw new Error(`arena: release of ${offset}, which is not in use`);
    this.#used.delete(offset);
    check(native.arenaUnmap(this.baseAddress + offset, length), 'unmap memory');
    this.#give({ offset, length });
  }

  /** Typed view of a range in use, for set-up and for rings with a fixed place. Offsets are aligned to the element. */
  view8(offset: number, count: number): Uint8Array {
    return new Uint8Array(this.buffer, offset, count);
  }
  view16(offset: number, count: number): Uint16Array {
    return new Uint16Array(this.buffer, offset, count);
  }
  view32(offset: number, count: number): Uint32Array {
    return new Uint32Array(this.buffer, offset, count);
  }
  viewF64(offset: number, count: number): Float64Array {
    return new Float64Array(this.buffer, offset, count);
  }

  #take(length: number, alignment: number): number {
    for (let i = 0; i < this.#free.length; i++) {
      const range = this.#free[i]!;
      const offset = Math.ceil(range.offset / alignment) * alignment;
      const end = offset + length;
      if (end > range.offset + range.length) continue;
      const rest = { offset: end, length: range.offset + range.length - end };
      range.length = offset - range.offset;
      this.#free.splice(i, 1, ...[range, rest].filter((r) => r.length > 0));
      this.#used.set(offset, length);
      this.#openWindows(offset, end);
      return offset;
    }
    const ENOMEM = 12;
    check(-ENOMEM, `find ${length} bytes of address space`);
    return 0;
  }

  #give(range: Range): void {
    let at = this.#free.findIndex((r) => r.offset > range.offset);
    if (at < 0) at = this.#free.length;
    this.#free.splice(at, 0, range);
    const next = this.#free[at + 1];
    if (next !== undefined && range.offset + range.length === next.offset) {
      range.length += next.length;
      this.#free.splice(at + 1, 1);
    }
    const previous = this.#free[at - 1];
    if (previous !== undefined && previous.offset + previous.length === range.offset) {
      previous.length += range.length;
      this.#free.splice(at, 1);
    }
  }

  /** Makes the windows that touch [from, to) usable. They are made once and stay: a view costs nothing by itself. */
  #openWindows(from: number, to: number): void {
    for (let w = Math.floor(from * WINDOW_SCALE); w * ARENA_WINDOW_BYTES < to; w++) {
      if (this.u8[w]!.length > 0) continue;
      const start = w * ARENA_WINDOW_BYTES;
      const length = Math.min(ARENA_WINDOW_BYTES, this.sizeBytes - start);
      this.u8[w] = new Uint8Array(this.buffer, start, length);
      this.u16[w] = new Uint16Array(this.buffer, start, length / 2);
      this.u32[w] = new Uint32Array(this.buffer, start, length / 4);
    }
  }
}

function pageCeil(bytes: number): number {
  return Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
}
