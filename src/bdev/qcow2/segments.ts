/** Handing out the segments of a request piece by piece, in order. */
import type { Arena } from '../../../native/index.js';
import { native } from '../../../native/index.js';
import type { BdevIo } from '../bdev-io.js';

const COPY_ENTRIES = 64;
const ENTRY_DOUBLES = 3;
const DOUBLE = 0.5;

/** A place in the segments of a request. */
export class SegmentCursor {
  #io: BdevIo | null = null;
  #segment = 0;
  #skip = DOUBLE;

  begin(io: BdevIo): void {
    this.#io = io;
    this.#segment = 0;
    this.#skip = 0;
  }

  /** Moves on by what `to.lengthBytes` is short of, adding those bytes as segments of `to`. */
  take(to: BdevIo, lengthBytes: number): void {
    const from = this.#io!;
    let left = lengthBytes;
    while (left > 0) {
      const rest = from.segmentLengths[this.#segment]! - this.#skip;
      const part = rest < left ? rest : left;
      to.addSegment(from.segmentAddresses[this.#segment]! + this.#skip, part);
      left -= part;
      this.#advance(part, rest);
    }
  }

  /** Fills the next bytes with zeroes. */
  fillZeroes(arena: Arena, lengthBytes: number, entries: Float64Array): void {
    this.#copy(arena, 0, lengthBytes, entries, false);
  }

  /** Copies the next bytes from memory. @param source arena offset */
  copyFrom(arena: Arena, source: number, lengthBytes: number, entries: Float64Array): void {
    this.#copy(arena, arena.baseAddress + source, lengthBytes, entries, false);
  }

  /** Copies the next bytes to memory. @param destination arena offset */
  copyTo(arena: Arena, destination: number, lengthBytes: number, entries: Float64Array): void {
    this.#copy(arena, arena.baseAddress + destination, lengthBytes, entries, true);
  }

  /** @param memory absolute address, 0: zeroes @param isSource the segments are, and memory is written to */
  #copy(arena: Arena, memory: number, lengthBytes: number, entries: Float64Array, isSource: boolean): void {
    const io = this.#io!;
    let left = lengthBytes;
    let at = memory;
    let count = 0;
    while (left > 0) {
      const rest = io.segmentLengths[this.#segment]! - this.#skip;
      const part = rest < left ? rest : left;
      const entry = count * ENTRY_DOUBLES;
      entries[entry + (isSource ? 1 : 0)] = arena.baseAddress + io.segmentAddresses[this.#segment]! + this.#skip;
      entries[entry + (isSource ? 0 : 1)] = at;
      entries[entry + 2] = part;
      if (at !== 0) at += part;
      left -= part;
      this.#advance(part, rest);
      if (++count === COPY_ENTRIES || left === 0) {
        native.copyList(entries, count);
        count = 0;
      }
    }
  }

  #advance(part: number, rest: number): void {
    if (part === rest) {
      this.#segment++;
      this.#skip = 0;
    } else {
      this.#skip += part;
    }
  }
}

/** What the copying methods of a cursor work in. */
export function newCopyEntries(): Float64Array {
  return new Float64Array(COPY_ENTRIES * ENTRY_DOUBLES);
}
