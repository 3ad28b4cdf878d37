/**
 * An in-flight region as a hostile front-end makes it: of the right size, and told of as it is, with anything in it. Each queue's part
 * is as a device would have left it, but for a few fields, or for all of them. The layouts are those of vhost-user.rst, "Inflight I/O
 * tracking".
 *
 * What lies in its file beside the region is guarded.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import { anyU32, chance, pick, words } from './boundaries.js';
import { QUEUES } from './burst-memory.js';
import type { BurstMemory } from './burst-memory.js';
import { INDIRECT, NEXT, WRITE } from './chain.js';
import { Finding } from './finding.js';

const PAGE_BYTES = 4096;
const ALIGNMENT = 64;
const ENTRY_BYTES = { split: 16, packed: 32 } as const;
const HEADER_BYTES = { split: 16, packed: 32 } as const;
const GUARD = 0xc5;
const VERSION_AT = 8;
const ENTRIES_AT = 10;
/** Behind the parts a device of ours keeps the cache mode, in 64 bytes that begin with this: see src/vhost-user/inflight-region.ts. */
const TAIL_MAGIC = 0x4d435453;
/** In a split ring's header: last_batch_head, used_idx. In an entry: next, counter. */
const SPLIT = { lastBatchHead: 12, usedIdx: 14, next: 6, counter: 8 } as const;
/** In a packed ring's header, and in an entry. */
const PACKED = {
  freeHead: 12,
  oldFreeHead: 14,
  usedIdx: 16,
  oldUsedIdx: 18,
  usedWrap: 20,
  oldUsedWrap: 21,
  next: 2,
  last: 4,
  num: 6,
  counter: 8,
  id: 16,
  flags: 18,
  length: 20,
  address: 24,
} as const;

export type RingKind = keyof typeof ENTRY_BYTES;

/** What a part has to know of its ring. */
export interface TrackedRing {
  readonly index: number;
  readonly size: number;
  /** Where its used ring is: an index, that of a packed ring with its wrap counter in bit 15. */
  readonly usedPlace: number;
}

export class HostileRegion {
  readonly fd: number;
  /** Entries of each queue: a ring that has more does not start with it. */
  readonly queueSize: number;
  readonly offset: number;
  readonly sizeBytes: number;
  readonly #kind: RingKind;
  readonly #arena: Arena;
  readonly #random: Random;
  readonly #mapping: number;
  readonly #file: Buffer;
  /** As much as there can be beside the region, as it has to be. */
  readonly #guards = Buffer.alloc(3 * PAGE_BYTES, GUARD);
  /** The region alone. */
  readonly #bytes: Buffer;
  readonly #partBytes: number;
  #isCut = false;

  constructor(arena: Arena, kind: RingKind, random: Random) {
    this.#arena = arena;
    this.#kind = kind;
    this.#random = random;
    this.queueSize = pick(random, [256, 256, 256, 257, 128, 100, 1024]);
    this.offset = pick(random, [0, 0, 64, PAGE_BYTES, PAGE_BYTES + 64]);
    const partBytes = HEADER_BYTES[kind] + ENTRY_BYTES[kind] * this.queueSize;
    this.#partBytes = Math.ceil(partBytes / ALIGNMENT) * ALIGNMENT;
    this.sizeBytes = QUEUES * this.#partBytes + pick(random, [0, 0, 63, 64, 64, 64, 128]);
    const fileBytes = Math.ceil((this.offset + this.sizeBytes) / PAGE_BYTES + 1) * PAGE_BYTES;
    this.fd = check(native.memfdCreate('fuzz-inflight', fileBytes), 'make an in-flight region');
    this.#mapping = arena.mapFile(this.fd, 0, fileBytes);
    this.#file = Buffer.from(arena.buffer, this.#mapping, fileBytes).fill(GUARD);
    this.#bytes = this.#file.subarray(this.offset, this.offset + this.sizeBytes).fill(0);
  }

  /** The payload of SET_INFLIGHT_FD. */
  get description(): readonly number[] {
    return [this.sizeBytes, 0, this.offset, 0, QUEUES | (this.queueSize << 16), 0];
  }

  /** Makes new headers, perhaps such as no device left. Returns whether there is one among them that is not to be taken. */
  makeHeaders(): boolean {
    const random = this.#random;
    const rightPercent = pick(random, [100, 100, 97]);
    let isWrong = false;
    for (let queue = 0; queue < QUEUES; queue++) {
      const part = this.#part(queue).fill(0, 0, HEADER_BYTES[this.#kind]);
      const version = chance(random, rightPercent) ? random.below(2) : anyU32(random) & 0xffff;
      const entries = chance(random, rightPercent) ? this.queueSize : anyU32(random) & 0xffff;
      const features = chance(random, rightPercent) ? [0, 0] : [anyU32(random), anyU32(random)];
      part.writeUInt32LE(features[0]!, 0);
      part.writeUInt32LE(features[1]!, 4);
      part.writeUInt16LE(version, VERSION_AT);
      part.writeUInt16LE(entries, ENTRIES_AT);
      const isKnown = version === 1 && entries === this.queueSize && features[0] === 0 && features[1] === 0;
      if (version !== 0 && !isKnown) isWrong = true;
    }
    const tail = this.#bytes.subarray(QUEUES * this.#partBytes).fill(0);
    if (tail.length >= 8) {
      tail.writeUInt32LE(chance(random, 90) ? TAIL_MAGIC : anyU32(random), 0);
      tail.writeUInt32LE(chance(random, 70) ? random.below(3) : anyU32(random), 4);
    }
    return isWrong;
  }

  /** Makes all parts new: where rings go on is said elsewhere. */
  clear(): void {
    this.#bytes.fill(0, 0, QUEUES * this.#partBytes);
  }

  /** Fills all parts, for rings that are about to start. */
  fill(rings: readonly TrackedRing[], memory: BurstMemory): void {
    const random = this.#random;
    this.clear();
    for (const ring of rings) {
      const part = this.#part(ring.index);
      if (chance(random, 5)) continue;
      // What is read as addresses has to be told to the memory, which is nobody's to know of bytes that mean nothing.
      if (!memory.isCareful && chance(random, 20)) fillWithAnything(part, random);
      else if (this.#kind === 'split') fillSplit(part, this.queueSize, ring, random);
      else fillPacked(part, this.queueSize, ring, memory, random);
      part.writeUInt16LE(chance(random, 97) ? 1 : anyU32(random) & 0xffff, VERSION_AT);
      part.writeUInt16LE(chance(random, 90) ? this.queueSize : anyU32(random) & 0xffff, ENTRIES_AT);
    }
  }

  /** Changes something while the device runs. */
  meddle(): void {
    const random = this.#random;
    if (!this.#isCut) this.#bytes[random.below(this.sizeBytes)] = random.below(256);
  }

  /** Cuts its file short; the region is not to be looked at any more. */
  cut(): void {
    this.#isCut = true;
    const { offset, sizeBytes } = this;
    const sizes = [0, 1, offset, offset + 1, PAGE_BYTES, 2 * PAGE_BYTES, offset + sizeBytes - PAGE_BYTES];
    check(native.fileTruncate(this.fd, Math.max(0, pick(this.#random, sizes))), 'cut an in-flight region short');
  }

  /** Throws a Finding when something was written beside it. */
  verify(): void {
    if (this.#isCut) return;
    const end = this.offset + this.sizeBytes;
    for (const beside of [this.#file.subarray(0, this.offset), this.#file.subarray(end)]) {
      if (beside.compare(this.#guards, 0, beside.length) === 0) continue;
      const at = beside.byteOffset - this.#file.byteOffset + beside.findIndex((byte) => byte !== GUARD);
      throw new Finding('memory', `byte ${at} of the file of an in-flight region from ${this.offset} to ${end}`);
    }
  }

  close(): void {
    this.#arena.release(this.#mapping);
    native.fileClose(this.fd);
  }

  #part(queue: number): Buffer {
    return this.#bytes.subarray(queue * this.#partBytes, (queue + 1) * this.#partBytes);
  }
}

function fillWithAnything(part: Buffer, random: Random): void {
  for (let at = 0; at < part.length; at += 4) {
    part.writeUInt32LE(chance(random, 50) ? random.below(4) * 0x0001_0001 : anyU32(random), at);
  }
  part.fill(0, 0, VERSION_AT);
}

/** As a device left it that had some heads in flight and answered others. */
function fillSplit(part: Buffer, entries: number, { size, usedPlace }: TrackedRing, random: Random): void {
  const anyHead = (): number =>
    chance(random, 95) ? random.below(size) : pick(random, [size, entries, anyU32(random) & 0xffff]);
  part.writeUInt16LE(anyHead(), SPLIT.lastBatchHead);
  // As many were answered and not crossed out yet.
  const batch = pick(random, [0, 0, 1, 2, size, size + 1, 0xffff, random.below(65536)]);
  part.writeUInt16LE((usedPlace - batch) & 0xffff, SPLIT.usedIdx);
  const likely = pick(random, [0, 3, 30, 100]);
  for (let head = 0; head < entries; head++) {
    const at = HEADER_BYTES.split + ENTRY_BYTES.split * head;
    part.writeUInt16LE(anyHead(), at + SPLIT.next);
    // Beyond the ring nothing is in flight, mostly: one such head breaks it.
    const percent = head < size ? likely : chance(random, 1) && chance(random, 10) ? likely : 0;
    part[at] = chance(random, percent) ? pick(random, [1, 1, 1, 2, 255]) : 0;
    writeCounter(part, at + SPLIT.counter, head, random);
  }
}

/** As a device left it that had some requests in flight, then a few fields made wrong. */
function fillPacked(part: Buffer, entries: number, ring: TrackedRing, memory: BurstMemory, random: Random): void {
  const { size } = ring;
  const at = (entry: number): number => HEADER_BYTES.packed + ENTRY_BYTES.packed * entry;
  // Every entry leads to the next; requests are the first ones, the free list begins behind them.
  for (let entry = 0; entry < entries; entry++) part.writeUInt16LE(entry + 1, at(entry) + PACKED.next);
  let free = 0;
  for (let more = random.below(20); more > 0; more--) {
    const count = 1 + random.below(4);
    if (free + count > Math.min(entries, size)) break;
    writePackedRequest(part, at, free, count, memory, random);
    free += count;
  }
  part.writeUInt16LE(free, PACKED.freeHead);
  part.writeUInt16LE(free, PACKED.oldFreeHead);
  const index = ring.usedPlace & 0x7fff;
  const wrap = ring.usedPlace >>> 15;
  part.writeUInt16LE(index, PACKED.usedIdx);
  part.writeUInt16LE(index, PACKED.oldUsedIdx);
  part[PACKED.usedWrap] = part[PACKED.oldUsedWrap] = wrap;
  const anyEntry = (): number =>
    chance(random, 80) ? random.below(size) : pick(random, [entries - 1, entries, 0x7fff, 0xffff]);
  for (let wrong = pick(random, [0, 0, 1, 1, 2, 5, 40]); wrong > 0; wrong--) {
    const entry = at(random.below(chance(random, 70) ? Math.min(entries, free + 2) : entries));
    switch (random.below(9)) {
      case 0:
        part.writeUInt16LE(anyEntry(), pick(random, [PACKED.freeHead, PACKED.oldFreeHead]));
        break;
      case 1:
        part.writeUInt16LE(
          pick(random, [random.below(size), size, 0xffff]),
          pick(random, [PACKED.usedIdx, PACKED.oldUsedIdx]),
        );
        break;
      case 2:
        part[pick(random, [PACKED.usedWrap, PACKED.oldUsedWrap])] = pick(random, [0, 1, 2, 255]);
        break;
      case 3:
        part[entry] = pick(random, [0, 1, 1, 255]);
        break;
      case 4:
        part.writeUInt16LE(pick(random, [0, 1, 2, size, size + 1, 0xffff]), entry + PACKED.num);
        break;
      case 5:
        part.writeUInt16LE(anyEntry(), entry + PACKED.last);
        break;
      case 6:
        part.writeUInt16LE(random.below(65536), entry + PACKED.id);
        break;
      case 7:
        // An indirect table among others, or one that nobody wrote.
        part.writeUInt16LE(
          part.readUInt16LE(entry + PACKED.flags) ^ pick(random, [NEXT, INDIRECT]),
          entry + PACKED.flags,
        );
        break;
      default:
        part.writeUInt16LE(anyEntry(), entry + PACKED.next);
    }
  }
}

/** A header that is any memory, data, a status. */
function writePackedRequest(
  part: Buffer,
  at: (entry: number) => number,
  first: number,
  count: number,
  memory: BurstMemory,
  random: Random,
): void {
  for (let i = 0; i < count; i++) {
    const entry = at(first + i);
    const { address, length } = chance(random, 90)
      ? { address: words(memory.hostilePlace(512)), length: pick(random, [1, 16, 512]) }
      : memory.anyBuffer();
    const flags = (i > 0 || count === 1 ? WRITE : 0) | (i < count - 1 ? NEXT : 0);
    if ((flags & WRITE) !== 0) memory.makeWritable(address, length);
    part.writeUInt32LE(address[0], entry + PACKED.address);
    part.writeUInt32LE(address[1], entry + PACKED.address + 4);
    part.writeUInt32LE(length, entry + PACKED.length);
    part.writeUInt16LE(flags, entry + PACKED.flags);
    part.writeUInt16LE(chance(random, 95) ? first : random.below(65536), entry + PACKED.id);
  }
  const entry = at(first);
  part[entry] = 1;
  part.writeUInt16LE(first + count - 1, entry + PACKED.last);
  part.writeUInt16LE(count, entry + PACKED.num);
  writeCounter(part, entry + PACKED.counter, first, random);
}

function writeCounter(part: Buffer, at: number, order: number, random: Random): void {
  const isSensible = chance(random, 80);
  part.writeUInt32LE(isSensible ? order : anyU32(random), at);
  part.writeUInt32LE(isSensible ? 0 : anyU32(random), at + 4);
}
