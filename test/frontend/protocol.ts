/**
 * vhost-user and virtio-blk as a front-end speaks them. Kept apart from the product's own tables on purpose: a wrong number
 * on one side must not be made right by the same wrong number on the other.
 *
 * Sources: vhost-user.rst of QEMU; VIRTIO 1.2, 2.7 (split virtqueues) and 5.2 (block device).
 */

/** Requests of a front-end, "Front-end message types". */
export const MessageId = {
  getFeatures: 1,
  setFeatures: 2,
  setOwner: 3,
  resetOwner: 4,
  setMemTable: 5,
  setLogBase: 6,
  setLogFd: 7,
  setVringNum: 8,
  setVringAddr: 9,
  setVringBase: 10,
  getVringBase: 11,
  setVringKick: 12,
  setVringCall: 13,
  setVringErr: 14,
  getProtocolFeatures: 15,
  setProtocolFeatures: 16,
  getQueueNum: 17,
  setVringEnable: 18,
  setBackendReqFd: 21,
  getConfig: 24,
  setConfig: 25,
  getInflightFd: 31,
  setInflightFd: 32,
  resetDevice: 34,
  getMaxMemSlots: 36,
  addMemReg: 37,
  remMemReg: 38,
  setStatus: 39,
  getStatus: 40,
  setDeviceStateFd: 42,
  checkDeviceState: 43,
} as const;

export const MESSAGE_HEADER_BYTES = 12;
/** Message flags: bits 0 and 1 hold the version, which is 1. */
export const FLAG_VERSION_1 = 1;
export const FLAG_REPLY = 4;
export const FLAG_NEED_REPLY = 8;

/** Feature bits of virtio-blk and of rings. */
export const Feature = {
  sizeMax: 1,
  segMax: 2,
  readOnly: 5,
  blkSize: 6,
  flush: 9,
  topology: 10,
  configWce: 11,
  multiQueue: 12,
  discard: 13,
  writeZeroes: 14,
  /** vhost's, not virtio's: the dirty log is in force. */
  logAll: 26,
  indirectDescriptors: 28,
  eventIdx: 29,
  protocolFeatures: 30,
  version1: 32,
  ringPacked: 34,
} as const;

/** Protocol feature bits. */
export const ProtocolFeature = {
  multiQueue: 0,
  logShmfd: 1,
  replyAck: 3,
  backendReq: 5,
  config: 9,
  inflightShmfd: 12,
  resetDevice: 13,
  configureMemSlots: 15,
  status: 16,
  deviceState: 19,
} as const;

/** The mask of some feature bits. */
export function mask(...bits: readonly number[]): bigint {
  return bits.reduce((sum, bit) => sum | (1n << BigInt(bit)), 0n);
}

/** All that a driver of split rings makes use of from the start; logging is switched on later. */
export const FEATURES_KNOWN = mask(...Object.values(Feature)) & ~mask(Feature.ringPacked, Feature.logAll);
export const PROTOCOL_FEATURES_KNOWN = mask(...Object.values(ProtocolFeature));

/** KICK, CALL and ERR: the ring index is in the low byte; this bit says that no descriptor comes along. */
export const VRING_NO_FD = 0x100;
/** SET_VRING_ADDR: writes to the used ring are to be logged. */
export const VRING_FLAG_LOG = 1;

export const DescriptorFlag = { next: 1, write: 2, indirect: 4 } as const;
export const AVAILABLE_NO_INTERRUPT = 1;
export const USED_NO_NOTIFY = 1;
export const DESCRIPTOR_BYTES = 16;
export const SECTOR_BYTES = 512;
export const REQUEST_HEADER_BYTES = 16;
export const RANGE_BYTES = 16;
export const ID_BYTES = 20;

export const RequestType = {
  read: 0,
  write: 1,
  flush: 4,
  getId: 8,
  discard: 11,
  writeZeroes: 13,
} as const;

export const Status = { ok: 0, ioError: 1, unsupported: 2 } as const;
/** What a status byte holds until the device writes it. */
export const STATUS_UNANSWERED = 0xff;

/** Unmap flag of a discard or write-zeroes range. */
export const RANGE_UNMAP = 1;

/** Byte offsets in the configuration space, VIRTIO 1.2, 5.2.4. */
export const ConfigAt = {
  capacity: 0,
  sizeMax: 8,
  segMax: 12,
  blkSize: 20,
  physicalBlockExp: 24,
  writeback: 32,
  numQueues: 34,
  maxDiscardSectors: 36,
  maxDiscardSeg: 40,
  discardSectorAlignment: 44,
  maxWriteZeroesSectors: 48,
  maxWriteZeroesSeg: 52,
  writeZeroesMayUnmap: 56,
} as const;

/** The whole virtio-blk configuration up to write_zeroes_may_unmap, padded to eight bytes. */
export const CONFIG_BYTES = 60;

export function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
  return bytes;
}

export function u32(...values: readonly number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => bytes.writeUInt32LE(value >>> 0, 4 * i));
  return bytes;
}

/** Payload of GET_ and SET_INFLIGHT_FD, with the padding that compilers add. */
export const INFLIGHT_BYTES = 24;

/** {u64 mmap size, u64 mmap offset, u16 queues, u16 queue size, padding} */
export function encodeInflight(area: {
  readonly mmapSize: number | bigint;
  readonly mmapOffset: number | bigint;
  readonly queues: number;
  readonly queueSize: number;
}): Buffer {
  const tail = Buffer.alloc(INFLIGHT_BYTES - 16);
  tail.writeUInt16LE(area.queues, 0);
  tail.writeUInt16LE(area.queueSize, 2);
  return Buffer.concat([u64(area.mmapSize), u64(area.mmapOffset), tail]);
}

/** A message as it goes over the socket. @param claim header fields that are to be wrong */
export function encodeMessage(
  id: number,
  payload: Uint8Array,
  claim: { readonly flags?: number; readonly payloadBytes?: number } = {},
): Buffer {
  return Buffer.concat([u32(id, claim.flags ?? FLAG_VERSION_1, claim.payloadBytes ?? payload.length), payload]);
}
