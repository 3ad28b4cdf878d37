/** virtio-blk as VIRTIO 1.2 (5.2) defines it: request header, types, status bytes, and the configuration space. */
import type { Bdev } from '../bdev/bdev.js';
import { IoType } from '../bdev/bdev-io.js';
import { FeatureHi, FeatureLo } from './protocol.js';

/** Request header: u32 type, u32 reserved, u64 sector. */
export const BLK_HEADER_BYTES = 16;
export const SECTOR_BYTES = 512;

export const BlkType = {
  in: 0,
  out: 1,
  flush: 4,
  getId: 8,
  discard: 11,
  writeZeroes: 13,
} as const;
/** Legacy drivers set it on any type; it asks for nothing a modern device does not do. */
export const BLK_TYPE_BARRIER = 0x80000000;

export const BlkStatus = { ok: 0, ioError: 1, unsupported: 2 } as const;

/** Length of a serial, NUL padded. */
export const BLK_ID_BYTES = 20;

/** A discard or writeZeroes range: u64 sector, u32 sectors, u32 flags. */
export const BLK_RANGE_BYTES = 16;
export const BLK_RANGE_UNMAP = 1;
/** Ranges of one request. */
export const BLK_RANGES_MAX = 16;

/** Longest configuration space served: the struct has 96 bytes, front-ends ask for up to 256. */
export const CONFIG_BYTES_MAX = 256;
export const CONFIG_WRITEBACK_AT = 32;

/** Data segments of one request, as a ring of 128 allows beside header and status. */
const SEG_MAX = 126;
/** Longest segment. Never 0, which Linux takes as one page. */
const SIZE_MAX = 4 * 1024 * 1024;
const RANGE_SECTORS_MAX = (2 * 1024 ** 3) / SECTOR_BYTES;
/** Where zeroes have to be written out, a request should not take too long. */
const EMULATED_ZEROES_SECTORS_MAX = (4 * 1024 ** 2) / SECTOR_BYTES;

/** Feature words a disk offers. */
export function offeredFeatures(bdev: Bdev, readOnly: boolean, migratable: boolean): { lo: number; hi: number } {
  let lo =
    FeatureLo.sizeMax |
    FeatureLo.segMax |
    FeatureLo.blkSize |
    FeatureLo.flush |
    FeatureLo.topology |
    FeatureLo.configWce |
    FeatureLo.multiQueue |
    FeatureLo.indirectDesc |
    FeatureLo.eventIdx |
    FeatureLo.protocolFeatures;
  if (migratable) lo |= FeatureLo.logAll;
  if (readOnly) lo |= FeatureLo.readOnly;
  else {
    lo |= FeatureLo.writeZeroes;
    if (bdev.supports(IoType.discard)) lo |= FeatureLo.discard;
  }
  return { lo, hi: FeatureHi.version1 | FeatureHi.ringPacked };
}

/** Most sectors of one writeZeroes range. */
export function writeZeroesSectorsMax(bdev: Bdev): number {
  return bdev.supports(IoType.writeZeroes) ? RANGE_SECTORS_MAX : EMULATED_ZEROES_SECTORS_MAX;
}

export function discardSectorsMax(): number {
  return RANGE_SECTORS_MAX;
}

/**
 * The configuration space, zero-filled to CONFIG_BYTES_MAX:
 *
 *      0 u64 capacity        20 u32 blk_size             32 u8  writeback            44 u32 discard_sector_alignment
 *      8 u32 size_max        24 u8  physical_block_exp   34 u16 num_queues           48 u32 max_write_zeroes_sectors
 *     12 u32 seg_max         25 u8  alignment_offset     36 u32 max_discard_sectors  52 u32 max_write_zeroes_seg
 *     16 geometry (absent)   26 u16 min_io, 28 u32 opt_io  40 u32 max_discard_seg    56 u8  write_zeroes_may_unmap
 */
export function configSpace(bdev: Bdev, queues: number, writeback: boolean): Uint8Array {
  const bytes = new Uint8Array(CONFIG_BYTES_MAX);
  const view = new DataView(bytes.buffer);
  const u32 = (at: number, value: number): void => view.setUint32(at, value, true);
  const { blockSizeBytes, limits } = bdev;
  const sectors = (bdev.blockCount * blockSizeBytes) / SECTOR_BYTES;
  u32(0, sectors % 2 ** 32);
  u32(4, Math.floor(sectors / 2 ** 32));
  u32(8, SIZE_MAX);
  u32(12, SEG_MAX);
  u32(20, blockSizeBytes);
  bytes[24] = Math.log2(limits.physicalBlockBytes / blockSizeBytes);
  view.setUint16(26, limits.physicalBlockBytes / blockSizeBytes, true);
  u32(28, limits.optimalIoBytes / blockSizeBytes);
  bytes[CONFIG_WRITEBACK_AT] = writeback ? 1 : 0;
  view.setUint16(34, queues, true);
  if (bdev.supports(IoType.discard)) {
    u32(36, discardSectorsMax());
    u32(40, BLK_RANGES_MAX);
    u32(44, limits.discardGranularityBytes / SECTOR_BYTES);
  }
  u32(48, writeZeroesSectorsMax(bdev));
  u32(52, BLK_RANGES_MAX);
  bytes[56] = bdev.supports(IoType.writeZeroes) ? 1 : 0;
  return bytes;
}
