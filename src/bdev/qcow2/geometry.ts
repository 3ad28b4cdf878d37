/** The numbers that follow from a header, worked out once. */
import { clusterBytesOf, hasExtendedL2, hasExternalData, l2EntryBytes, refcountsPerBlock } from './format.js';
import type { Qcow2Header } from './format.js';

const SLICE_BYTES_MIN = 4096;
/** A table is at most this many slices, so that the number of a slice fits 32 bits whatever the disk. */
const SLICES_PER_TABLE_MAX = 64;
export const SUBCLUSTERS = 32;

export class Geometry {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly clusterBytes: number;
  /** 1 / clusterBytes: a product is cheaper than a quotient, and exact for powers of two. */
  readonly perClusterByte: number;
  /** 32-bit words of an L2 entry: 2, or 4 with subclusters. */
  readonly entryWords: 2 | 4;
  readonly isExtended: boolean;
  /** Unit that is allocated or reads as zeroes by itself: a subcluster, or a cluster. */
  readonly unitBytes: number;
  readonly hasExternalData: boolean;
  /** Metadata is cached, read and written in slices of a table or refcount block. */
  readonly sliceBytes: number;
  readonly slicesPerTable: number;
  /** Clusters that an L2 slice maps, and the bytes of the disk that they are. */
  readonly clustersPerSlice: number;
  readonly sliceCoverageBytes: number;
  readonly tableCoverageBytes: number;
  readonly refcountBits: number;
  readonly refcountMax: number;
  readonly refcountsPerBlock: number;
  readonly refcountsPerSlice: number;
  /** Of a compressed cluster's descriptor: bits of its offset. */
  readonly compressedOffsetBits: number;

  constructor(header: Qcow2Header) {
    this.version = header.version;
    this.clusterBits = header.clusterBits;
    this.clusterBytes = clusterBytesOf(header);
    this.perClusterByte = 1 / this.clusterBytes;
    this.entryWords = l2EntryBytes(header) === 16 ? 4 : 2;
    this.isExtended = hasExtendedL2(header);
    this.unitBytes = this.isExtended ? this.clusterBytes / SUBCLUSTERS : this.clusterBytes;
    this.hasExternalData = hasExternalData(header);
    this.sliceBytes = Math.min(this.clusterBytes, Math.max(SLICE_BYTES_MIN, this.clusterBytes / SLICES_PER_TABLE_MAX));
    this.slicesPerTable = this.clusterBytes / this.sliceBytes;
    this.clustersPerSlice = this.sliceBytes / (this.entryWords * 4);
    this.sliceCoverageBytes = this.clustersPerSlice * this.clusterBytes;
    this.tableCoverageBytes = this.sliceCoverageBytes * this.slicesPerTable;
    this.refcountBits = 2 ** header.refcountOrder;
    this.refcountMax = Math.min(2 ** this.refcountBits - 1, Number.MAX_SAFE_INTEGER);
    this.refcountsPerBlock = refcountsPerBlock(header);
    this.refcountsPerSlice = this.refcountsPerBlock / this.slicesPerTable;
    this.compressedOffsetBits = 62 - (this.clusterBits - 8);
  }
}
