/** Descriptor chains written by hand, for tests that are not content with the driver's own. */
import type { Descriptor, DriverQueue } from '../frontend/driver-queue.js';
import { DescriptorFlag, REQUEST_HEADER_BYTES } from '../frontend/protocol.js';

/** Links descriptors of the ring; flags and next of the last are as given. Returns the head. */
export function writeChain(queue: DriverQueue, parts: readonly Descriptor[]): number {
  const indices = queue.takeDescriptors(parts.length);
  parts.forEach((part, i) => {
    const isLast = i === parts.length - 1;
    const linked = isLast ? part : { ...part, flags: (part.flags ?? 0) | DescriptorFlag.next, next: indices[i + 1]! };
    queue.writeDescriptor(indices[i]!, linked);
  });
  return indices[0]!;
}

/** {u32 type, u32 reserved, u64 sector} */
export function blkHeader(type: number, sector: number | bigint = 0): Buffer {
  const header = Buffer.alloc(REQUEST_HEADER_BYTES);
  header.writeUInt32LE(type >>> 0, 0);
  header.writeBigUInt64LE(BigInt(sector), 8);
  return header;
}
