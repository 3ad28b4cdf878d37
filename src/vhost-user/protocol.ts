/**
 * The vhost-user wire format: message ids, feature bits, sizes, and what each message must look like. Facts of
 * QEMU's docs/interop/vhost-user.rst and the VIRTIO 1.2 specification; numbers are native-endian (little) u32 words.
 */

/** Requests of the front-end. */
export const Message = {
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

/** Requests of the back-end, on a channel of their own. */
export const BackendMessage = {
  configChange: 2,
} as const;

export const HEADER_BYTES = 12;
/** Longest payload accepted: a config message of a whole page is the longest anybody sends. */
export const PAYLOAD_BYTES_MAX = 4096 + 12;
export const INFLIGHT_BYTES = 24;
/** Most descriptors one message may carry: a full memory table. */
export const MESSAGE_FDS_MAX = 8;

export const HEADER_VERSION = 1;
export const HEADER_VERSION_MASK = 3;
export const HEADER_REPLY = 4;
export const HEADER_NEED_REPLY = 8;

/** Bits of the device's features, in two words: virtio-blk and ring features. */
export const FeatureLo = {
  sizeMax: 1 << 1,
  segMax: 1 << 2,
  readOnly: 1 << 5,
  blkSize: 1 << 6,
  flush: 1 << 9,
  topology: 1 << 10,
  configWce: 1 << 11,
  multiQueue: 1 << 12,
  discard: 1 << 13,
  writeZeroes: 1 << 14,
  /** VHOST_F_LOG_ALL: not virtio's but vhost's, it switches the dirty log on and off. */
  logAll: 1 << 26,
  indirectDesc: 1 << 28,
  eventIdx: 1 << 29,
  protocolFeatures: 1 << 30,
} as const;
export const FeatureHi = {
  /** Bit 32. */
  version1: 1 << 0,
  /** Bit 34. */
  ringPacked: 1 << 2,
} as const;

export const ProtocolFeature = {
  multiQueue: 1 << 0,
  logShmfd: 1 << 1,
  replyAck: 1 << 3,
  backendReq: 1 << 5,
  config: 1 << 9,
  inflightShmfd: 1 << 12,
  resetDevice: 1 << 13,
  configureMemSlots: 1 << 15,
  status: 1 << 16,
  deviceState: 1 << 19,
} as const;

/** Memory regions of SET_MEM_TABLE, and of ADD_MEM_REG. The first is the protocol's bound, the second what others offer. */
export const MEM_TABLE_REGIONS_MAX = 8;
export const MEM_SLOTS_MAX = 509;

/** Longest ring: what virtio allows is 32768, what front-ends make is 1024. Bounds memory per queue. */
export const QUEUE_SIZE_MAX = 1024;
/** Longest dirty log: covers 64 TiB of guest-physical addresses. */
export const LOG_BYTES_MAX = 2 ** 31;

/** A KICK, CALL or ERR message's u64: ring index, and whether a descriptor comes along. */
export const VRING_INDEX_MASK = 0xff;
export const VRING_NO_FD = 0x100;

/** SET_DEVICE_STATE_FD: direction, and the bit of its reply that says that no descriptor comes along. */
export const DEVICE_STATE_SAVE = 0;
export const DEVICE_STATE_LOAD = 1;
export const DEVICE_STATE_NO_FD = 0x100;

/** What a message must look like. Checked before anything else looks at it. */
export interface MessageShape {
  readonly name: string;
  readonly payloadBytesMin: number;
  readonly payloadBytesMax: number;
  readonly fdsMin: number;
  readonly fdsMax: number;
  /** Has a reply of its own, so that need_reply adds none. */
  readonly replies: boolean;
}

function shape(
  name: string,
  payload: number | readonly [number, number],
  fds: number | readonly [number, number] = 0,
  replies = false,
): MessageShape {
  const [payloadBytesMin, payloadBytesMax] = typeof payload === 'number' ? [payload, payload] : payload;
  const [fdsMin, fdsMax] = typeof fds === 'number' ? [fds, fds] : fds;
  return { name, payloadBytesMin, payloadBytesMax, fdsMin, fdsMax, replies };
}

/** Messages understood, by id. What is not here is answered by ending the session. */
export const MESSAGE_SHAPES: readonly (MessageShape | undefined)[] = (() => {
  const table: (MessageShape | undefined)[] = [];
  table[Message.getFeatures] = shape('GET_FEATURES', 0, 0, true);
  table[Message.setFeatures] = shape('SET_FEATURES', 8);
  table[Message.setOwner] = shape('SET_OWNER', 0);
  table[Message.resetOwner] = shape('RESET_OWNER', 0);
  table[Message.setMemTable] = shape('SET_MEM_TABLE', [8, 8 + 32 * MEM_TABLE_REGIONS_MAX], [0, MEM_TABLE_REGIONS_MAX]);
  table[Message.setLogBase] = shape('SET_LOG_BASE', 16, 1, true);
  table[Message.setLogFd] = shape('SET_LOG_FD', 0, 1);
  table[Message.setVringNum] = shape('SET_VRING_NUM', 8);
  table[Message.setVringAddr] = shape('SET_VRING_ADDR', 40);
  table[Message.setVringBase] = shape('SET_VRING_BASE', 8);
  table[Message.getVringBase] = shape('GET_VRING_BASE', 8, 0, true);
  table[Message.setVringKick] = shape('SET_VRING_KICK', 8, [0, 1]);
  table[Message.setVringCall] = shape('SET_VRING_CALL', 8, [0, 1]);
  table[Message.setVringErr] = shape('SET_VRING_ERR', 8, [0, 1]);
  table[Message.getProtocolFeatures] = shape('GET_PROTOCOL_FEATURES', 0, 0, true);
  table[Message.setProtocolFeatures] = shape('SET_PROTOCOL_FEATURES', 8);
  table[Message.getQueueNum] = shape('GET_QUEUE_NUM', 0, 0, true);
  table[Message.setVringEnable] = shape('SET_VRING_ENABLE', 8);
  table[Message.setBackendReqFd] = shape('SET_BACKEND_REQ_FD', 0, 1);
  table[Message.getConfig] = shape('GET_CONFIG', [13, PAYLOAD_BYTES_MAX], 0, true);
  table[Message.setConfig] = shape('SET_CONFIG', [13, PAYLOAD_BYTES_MAX]);
  // {u64 mmap size, u64 mmap offset, u16 queues, u16 queue size}, padded to eight bytes as compilers do.
  table[Message.getInflightFd] = shape('GET_INFLIGHT_FD', INFLIGHT_BYTES, 0, true);
  table[Message.setInflightFd] = shape('SET_INFLIGHT_FD', INFLIGHT_BYTES, 1);
  table[Message.resetDevice] = shape('RESET_DEVICE', 0);
  table[Message.getMaxMemSlots] = shape('GET_MAX_MEM_SLOTS', 0, 0, true);
  table[Message.addMemReg] = shape('ADD_MEM_REG', 40, 1);
  // libblkio sends the region's descriptor along: it is accepted and closed.
  table[Message.remMemReg] = shape('REM_MEM_REG', 40, [0, 1]);
  table[Message.setStatus] = shape('SET_STATUS', 8);
  table[Message.getStatus] = shape('GET_STATUS', 0, 0, true);
  table[Message.setDeviceStateFd] = shape('SET_DEVICE_STATE_FD', 8, 1, true);
  table[Message.checkDeviceState] = shape('CHECK_DEVICE_STATE', 0, 0, true);
  return table;
})();

/** A memory region as the front-end describes it, all in bytes. */
export interface RegionDescription {
  readonly guestAddress: number;
  readonly sizeBytes: number;
  readonly userAddress: number;
  readonly mmapOffset: number;
}

/** A front-end broke the protocol, or asked for what cannot be: its session ends, nothing else. */
export class ProtocolError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'ProtocolError';
  }
}

/** Reads a u64 that must be an exact number (below 2^53): addresses and sizes. */
export function readU64(words: Uint32Array, at: number, what: string): number {
  const hi = words[at + 1]!;
  if (hi > 0x1fffff) throw new ProtocolError(`${what} is beyond 2^53`);
  return words[at]! + hi * 2 ** 32;
}

/** Reads {u64 guest address, size, user address, mmap offset} from word `at`. */
export function readRegion(words: Uint32Array, at: number): RegionDescription {
  return {
    guestAddress: readU64(words, at, 'guest address'),
    sizeBytes: readU64(words, at + 2, 'region size'),
    userAddress: readU64(words, at + 4, 'user address'),
    mmapOffset: readU64(words, at + 6, 'mmap offset'),
  };
}
