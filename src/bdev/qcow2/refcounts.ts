/** Refcounts of 1 to 64 bits in a refcount block: big endian from a byte on, from the low bit up below. */

/** A value beyond 2^53, which no honest image has, is not exact. */
export function refcountAt(bytes: Uint8Array, base: number, index: number, bits: number): number {
  switch (bits) {
    case 16: {
      const at = base + index * 2;
      return (bytes[at]! << 8) | bytes[at + 1]!;
    }
    case 8:
      return bytes[base + index]!;
    case 32:
      return wide(bytes, base + index * 4, 4);
    case 64:
      return wide(bytes, base + index * 8, 8);
    default: {
      const perByte = 8 / bits;
      const shift = (index % perByte) * bits;
      return (bytes[base + Math.floor(index / perByte)]! >>> shift) & ((1 << bits) - 1);
    }
  }
}

/** @param value at most 2 ** bits - 1 */
export function setRefcount(bytes: Uint8Array, base: number, index: number, bits: number, value: number): void {
  switch (bits) {
    case 16: {
      const at = base + index * 2;
      bytes[at] = value >>> 8;
      bytes[at + 1] = value;
      return;
    }
    case 8:
      bytes[base + index] = value;
      return;
    case 32:
    case 64: {
      const width = bits / 8;
      let rest = value;
      for (let i = width - 1; i >= 0; i--) {
        bytes[base + index * width + i] = rest % 256;
        rest = Math.floor(rest / 256);
      }
      return;
    }
    default: {
      const perByte = 8 / bits;
      const shift = (index % perByte) * bits;
      const at = base + Math.floor(index / perByte);
      bytes[at] = (bytes[at]! & ~(((1 << bits) - 1) << shift)) | (value << shift);
    }
  }
}

function wide(bytes: Uint8Array, at: number, width: number): number {
  let value = 0;
  for (let i = 0; i < width; i++) value = value * 256 + bytes[at + i]!;
  return value;
}
