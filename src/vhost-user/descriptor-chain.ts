/**
 * One request's buffers as the virtqueue found them: a scratch object, one per queue, filled by `pop` and read before the next.
 * Every address in it has been translated and every length checked; nothing here is read from guest memory again.
 */

/** Segments of one chain: descriptors of the longest chain, each of which may be cut where regions meet. */
export const CHAIN_SEGMENTS_MAX = 2048;

export class DescriptorChain {
  /** Arena offsets: device-readable segments first, then device-writable ones. None is empty. */
  readonly addresses = new Float64Array(CHAIN_SEGMENTS_MAX);
  readonly lengths = new Float64Array(CHAIN_SEGMENTS_MAX);
  readableCount = 0;
  count = 0;
  readableBytes = -0.5;
  writableBytes = -0.5;

  clear(): void {
    this.readableCount = 0;
    this.count = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
  }
}
