/**
 * Counters of 2 ** order bits as refcount blocks hold them: big endian from 16 bits up, from the low bit up below 8.
 *
 * Invariant: a value is exact up to 2^53; a wider one is only larger than any count there can be.
 */

/** Largest value of a counter of 2 ** order bits, as far as references are counted here. */
export function counterMax(order: number): number {
  return order >= 5 ? 2 ** 32 - 1 : 2 ** (2 ** order) - 1;
}

export function readCounter(bytes: Uint8Array, index: number, order: number): number {
  switch (order) {
    case 4:
      return (bytes[index * 2]! << 8) | bytes[index * 2 + 1]!;
    case 3:
      return bytes[index]!;
    case 5:
      return readUInt32(bytes, index * 4);
    case 6:
      return readUInt32(bytes, index * 8) * 2 ** 32 + readUInt32(bytes, index * 8 + 4);
    default: {
      const shift = (index << order) & 7;
      return (bytes[(index << order) >> 3]! >> shift) & ((1 << (1 << order)) - 1);
    }
  }
}

/** @param value at most `counterMax(order)` */
export function writeCounter(bytes: Uint8Array, index: number, order: number, value: number): void {
  switch (order) {
    case 4:
      bytes[index * 2] = value >>> 8;
      bytes[index * 2 + 1] = value;
      return;
    case 3:
      bytes[index] = value;
      return;
    case 5:
      writeUInt32(bytes, index * 4, value);
      return;
    case 6:
      writeUInt32(bytes, index * 8, 0);
      writeUInt32(bytes, index * 8 + 4, value);
      return;
    default: {
      const shift = (index << order) & 7;
      const mask = ((1 << (1 << order)) - 1) << shift;
      const at = (index << order) >> 3;
      bytes[at] = (bytes[at]! & ~mask) | (value << shift);
    }
  }
}

function readUInt32(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}

function writeUInt32(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 24;
  bytes[at + 1] = value >>> 16;
  bytes[at + 2] = value >>> 8;
  bytes[at + 3] = value;
}
