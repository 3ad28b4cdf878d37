/**
 * Shared memory in which the requests in flight of a disk's rings are written down (vhost-user.rst, "Inflight I/O tracking"). The
 * front-end keeps it while this process is gone, and hands it to the next one, which goes on from there.
 *
 *     queue 0 | queue 1 | ... | tail        each queue {header, one entry per descriptor}, aligned to 64 bytes
 *     header: u64 features, u16 version, u16 desc_num, then by kind of ring: see split-inflight.ts and packed-inflight.ts
 *     tail, 64 bytes: u32 magic "STCM", u32 cache mode: 0 not known, 1 write-through, 2 write-back; zeroes
 *
 * The layout outlives the process, so it is a format: other back-ends have the same one, and it does not change. A queue's version is
 * 0 while nothing of it is worth keeping, 1 when it holds what is described here. Other versions, and features, are refused.
 * The tail is Strata's own: a guest relies on the cache mode that it chose, and no front-end says it to the next process. A region
 * without the tail, as others make it, is as good but for that.
 */
import { writeSync } from 'node:fs';
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { ProtocolError, QUEUE_SIZE_MAX, readU64 } from './protocol.js';
import { mapSharedFile } from './shared-mapping.js';
import type { SharedMapping } from './shared-mapping.js';

export type RingKind = 'split' | 'packed';

export const INFLIGHT_VERSION = 1;
/** Why a ring is broken whose region contradicts it. */
export const INFLIGHT_MISFIT = 'the in-flight region does not fit the ring';
/** Offsets in a queue's header that both kinds have. */
export const InflightAt = { features: 0, version: 8, descNum: 10 } as const;

const QUEUE_ALIGNMENT = 64;
const TAIL_BYTES = 64;
const TAIL_MAGIC = 0x4d435453;
const CacheMode = { unknown: 0, writeThrough: 1, writeBack: 2 } as const;
const HEADER_BYTES: Readonly<Record<RingKind, number>> = { split: 16, packed: 32 };
const ENTRY_BYTES: Readonly<Record<RingKind, number>> = { split: 16, packed: 32 };
/** More than all queues of a disk can need. */
const REGION_BYTES_MAX = 2 ** 26;
/** F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW. */
const SEALS = 1 | 2 | 4;

/** The payload of GET_ and SET_INFLIGHT_FD. */
export interface InflightDescription {
  readonly mmapSize: number;
  readonly mmapOffset: number;
  readonly queues: number;
  readonly queueSize: number;
}

/** Reads {u64 mmap size, u64 mmap offset, u16 queues, u16 queue size} and padding. Throws ProtocolError. */
export function readInflight(words: Uint32Array): InflightDescription {
  return {
    mmapSize: readU64(words, 0, 'size of the in-flight region'),
    mmapOffset: readU64(words, 2, 'offset of the in-flight region'),
    queues: words[4]! & 0xffff,
    queueSize: words[4]! >>> 16,
  };
}

/** Bytes from one queue to the next. */
function queueBytes(kind: RingKind, queueSize: number): number {
  return Math.ceil((HEADER_BYTES[kind] + ENTRY_BYTES[kind] * queueSize) / QUEUE_ALIGNMENT) * QUEUE_ALIGNMENT;
}

/** CVE-2021-3839: both are bounded before anything is computed of them. */
function checkCounts({ queues, queueSize }: InflightDescription, queuesMax: number): void {
  if (queues === 0 || queues > queuesMax) {
    throw new ProtocolError(`an in-flight region for ${queues} queues: there are ${queuesMax}`);
  }
  if (queueSize === 0 || queueSize > QUEUE_SIZE_MAX) {
    throw new ProtocolError(`an in-flight region for rings of ${queueSize}: they have 1 to ${QUEUE_SIZE_MAX} entries`);
  }
}

/**
 * Makes an empty region, sealed in its size. Throws ProtocolError, SystemError.
 * @returns its descriptor, the caller's, and its size
 */
export function createInflightRegion(
  description: InflightDescription,
  kind: RingKind,
  queuesMax: number,
): { readonly fd: number; readonly sizeBytes: number } {
  checkCounts(description, queuesMax);
  const tailAt = description.queues * queueBytes(kind, description.queueSize);
  const sizeBytes = tailAt + TAIL_BYTES;
  const fd = check(native.memfdCreate('strata-inflight', sizeBytes), 'make an in-flight region');
  check(native.memfdAddSeals(fd, SEALS), 'seal the in-flight region');
  writeSync(fd, Uint32Array.of(TAIL_MAGIC), 0, 4, tailAt);
  return { fd, sizeBytes };
}

export class InflightRegion {
  readonly kind: RingKind;
  readonly queues: number;
  /** Entries per queue: its rings have as many descriptors at most. */
  readonly queueSize: number;

  readonly #arena: Arena;
  readonly #mapping: SharedMapping;
  readonly #sizeBytes: number;
  /** The cache mode; null where there is no tail. */
  readonly #cacheMode: Uint32Array | null;

  /** Maps what SET_INFLIGHT_FD brought; the descriptor stays the caller's. Throws ProtocolError, SystemError. */
  constructor(arena: Arena, fd: number, description: InflightDescription, kind: RingKind, queuesMax: number) {
    checkCounts(description, queuesMax);
    const { mmapSize, mmapOffset, queues, queueSize } = description;
    const neededBytes = queues * queueBytes(kind, queueSize);
    if (mmapSize < neededBytes || mmapSize > REGION_BYTES_MAX) {
      throw new ProtocolError(
        `an in-flight region of ${mmapSize} bytes: ${queues} x ${queueSize} takes ${neededBytes}`,
      );
    }
    if (mmapOffset % QUEUE_ALIGNMENT !== 0) throw new ProtocolError('an in-flight region at a misaligned offset');
    this.kind = kind;
    this.queues = queues;
    this.queueSize = queueSize;
    this.#arena = arena;
    this.#sizeBytes = mmapSize;
    this.#mapping = mapSharedFile(arena, fd, mmapOffset, mmapSize, 'an in-flight region');
    const tailAt = this.#mapping.arenaOffset + neededBytes;
    const hasTail = mmapSize >= neededBytes + TAIL_BYTES && arena.view32(tailAt, 1)[0] === TAIL_MAGIC;
    this.#cacheMode = hasTail ? arena.view32(tailAt + 4, 1) : null;
    try {
      for (let queue = 0; queue < queues; queue++) this.#checkHeader(queue);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** Arena offset of a queue's part, aligned to 64. */
  place(queue: number): number {
    return this.#mapping.arenaOffset + queue * queueBytes(this.kind, this.queueSize);
  }

  /** Whether an arena offset lies in it. */
  holds(arenaOffset: number): boolean {
    const start = this.#mapping.arenaOffset;
    return arenaOffset >= start && arenaOffset < start + this.#sizeBytes;
  }

  /** Whether the guest relies on a write-back cache; null when that is not written down. */
  get writeback(): boolean | null {
    const mode = this.#cacheMode?.[0] ?? CacheMode.unknown;
    return mode === CacheMode.unknown ? null : mode === CacheMode.writeBack;
  }

  keepWriteback(on: boolean): void {
    if (this.#cacheMode !== null) this.#cacheMode[0] = on ? CacheMode.writeBack : CacheMode.writeThrough;
  }

  /** The queue has nothing in flight, and where its ring goes on is known elsewhere: its next start is a first one. */
  retire(queue: number): void {
    this.#arena.view16(this.place(queue) + InflightAt.version, 1)[0] = 0;
  }

  /** No ring uses it any more. */
  close(): void {
    this.#arena.release(this.#mapping.mappingOffset);
  }

  #checkHeader(queue: number): void {
    const place = this.place(queue);
    const [version, entries] = this.#arena.view16(place + InflightAt.version, 2);
    const [featuresLo, featuresHi] = this.#arena.view32(place + InflightAt.features, 2);
    if (version === 0) return;
    if (version !== INFLIGHT_VERSION || featuresLo !== 0 || featuresHi !== 0) {
      throw new ProtocolError(
        `the in-flight region of ring ${queue} has version ${version} and features ${featuresHi}:${featuresLo}; ` +
          `only version ${INFLIGHT_VERSION} without features is known here`,
      );
    }
    if (entries !== this.queueSize) {
      throw new ProtocolError(`the in-flight region of ring ${queue} has ${entries} entries, not ${this.queueSize}`);
    }
  }
}
