/**
 * Packed virtqueue, device side (VIRTIO 1.2, 2.8).
 *
 *     descriptor ring          {u64 address, u32 length, u16 buffer id, u16 flags} x size      written by both sides
 *     driver event suppression {u16 offset : 15, wrap : 1, u16 flags}                          written by the driver
 *     device event suppression the same                                                        written by us
 *
 * A request is one descriptor or a list in consecutive places, joined by NEXT, or one that points to an indirect table; its buffer id
 * is in the last. The answer overwrites the place where the oldest request without an answer began: {length, id, flags}.
 *
 * Invariants
 * - Every field of shared memory is read once, into a local, and the local is checked: no double fetch.
 * - A buffer id is accepted only when it is not in flight; every id accepted is pushed once. What the rest of the device calls a head
 *   is a number of our own, below the ring's size, as the driver's ids may be any.
 * - Never more descriptors are in flight than the ring has, so that the available position does not overtake the used one.
 *
 * Orderings: as in split-virtqueue.ts. Id and flags of an answer are one store, after its length.
 */
import { ChainBuilder, DESC_BYTES, DESC_WORDS } from './chain-builder.js';
import type { DescriptorChain } from './descriptor-chain.js';
import type { RingLog } from './dirty-log.js';
import type { GuestMemory } from './guest-memory.js';
import { DESC_AVAIL_USED, availableFlags } from './packed-inflight.js';
import type { PackedInflight, PackedPosition, RecoveredRequest } from './packed-inflight.js';
import type { RingPlace } from './split-virtqueue.js';
import { POP_BROKEN, POP_NONE } from './virtqueue.js';
import type { Virtqueue } from './virtqueue.js';

const DESC_NEXT = 1;
const DESC_WRITE = 2;
const DESC_INDIRECT = 4;

const EVENT_DISABLE = 1;
const EVENT_DESC = 2;
const EVENT_FLAGS_MASK = 3;

const BUFFER_IDS = 65536;
const MORE_THAN_THE_RING = 'more entries are available than the ring holds';
const STRONG_ORDER = process.arch === 'x64';

/** Sizes of the three parts in bytes. */
export function packedRingBytes(size: number): { descriptors: number; available: number; used: number } {
  return { descriptors: size * DESC_BYTES, available: 4, used: 4 };
}

/** The two positions of SET_ and GET_VRING_BASE: available in the lower half, used in the upper, each 15 bits and its wrap counter. */
export function packedBase(available: PackedPosition, used: PackedPosition): number {
  return (available.index | (available.wrap << 15) | (used.index << 16) | (used.wrap << 31)) >>> 0;
}

export function unpackBase(base: number): { available: PackedPosition; used: PackedPosition } {
  return {
    available: { index: base & 0x7fff, wrap: (base >>> 15) & 1 },
    used: { index: (base >>> 16) & 0x7fff, wrap: base >>> 31 },
  };
}

export class PackedVirtqueue implements Virtqueue {
  readonly size: number;

  readonly #builder: ChainBuilder;
  readonly #eventIdx: boolean;
  readonly #ring: Uint32Array;
  readonly #driverEvent: Uint32Array;
  readonly #deviceEvent: Uint32Array;
  readonly #tracking: PackedInflight | null;
  readonly #place: RingPlace;
  #log: RingLog | null = null;
  readonly #idInflight = new Uint8Array(BUFFER_IDS);
  /** Heads that are not in flight, a stack. */
  readonly #freeHeads: Uint16Array;
  #freeCount: number;
  // By head.
  readonly #ids: Uint16Array;
  readonly #counts: Uint16Array;
  readonly #entries: Uint16Array;
  /** Descriptors of the request being taken, as read. */
  readonly #words: Uint32Array;
  #idOfLast = 0;
  // What was pushed and not published: heads are free again, so their particulars are kept here.
  readonly #batchIds: Uint16Array;
  readonly #batchCounts: Uint16Array;
  readonly #batchEntries: Uint16Array;
  readonly #batchLengths: Float64Array;
  #batchCount = 0;
  /** Descriptors taken whose answer is not published. */
  #inflightDescriptors = 0;
  #availableIndex: number;
  #availableWrap: number;
  #usedIndex: number;
  #usedWrap: number;
  /** Requests that were in flight when the ring was started: they come before what is available, oldest first. */
  readonly #recovered: readonly RecoveredRequest[] = [];
  #recoveredTaken = 0;
  /** Set while some of them are to be taken, or the ring cannot go on. */
  #recovering = false;
  readonly #fence = new Int32Array(1);

  /**
   * @param base where to go on, from SET_VRING_BASE; its indices are below the ring's size
   * @param tracking writes down what is in flight; where to go on is taken from it unless it is new
   */
  constructor(
    memory: GuestMemory,
    place: RingPlace,
    base: number,
    eventIdx: boolean,
    indirect: boolean,
    tracking: PackedInflight | null = null,
  ) {
    const { size } = place;
    const arena = memory.arena;
    this.size = size;
    this.#place = place;
    this.#builder = new ChainBuilder(memory, indirect);
    this.#eventIdx = eventIdx;
    this.#ring = arena.view32(place.descriptors, size * DESC_WORDS);
    this.#driverEvent = arena.view32(place.available, 1);
    this.#deviceEvent = arena.view32(place.used, 1);
    this.#freeHeads = new Uint16Array(size).map((_, i) => size - 1 - i);
    this.#freeCount = size;
    this.#ids = new Uint16Array(size);
    this.#counts = new Uint16Array(size);
    this.#entries = new Uint16Array(size);
    this.#words = new Uint32Array(size * DESC_WORDS);
    this.#batchIds = new Uint16Array(size);
    this.#batchCounts = new Uint16Array(size);
    this.#batchEntries = new Uint16Array(size);
    this.#batchLengths = new Float64Array(size);
    let { available, used } = unpackBase(base);
    const flagsAt = (index: number): number => (this.#ring[index * DESC_WORDS + 3]! >>> 16) & DESC_AVAIL_USED;
    const recovery = tracking === null ? null : tracking.recover(size, flagsAt, available, used);
    this.#tracking = recovery === null ? null : tracking;
    if (recovery !== null) {
      ({ available, used } = recovery);
      this.#builder.fault = recovery.fault;
      this.#recovered = recovery.requests;
      this.#recovering = recovery.fault !== null || recovery.requests.length > 0;
      for (const { count } of recovery.requests) this.#inflightDescriptors += count;
    } else {
      // What is between the two is in flight, and nobody knows it any more.
      const inflight = available.index - used.index + (available.wrap === used.wrap ? 0 : size);
      this.#inflightDescriptors = inflight;
      if (inflight < 0 || inflight > size) {
        this.#builder.fail('its positions are further apart than it is long');
        this.#recovering = true;
      }
    }
    this.#availableIndex = available.index;
    this.#availableWrap = available.wrap;
    this.#usedIndex = used.index;
    this.#usedWrap = used.wrap;
  }

  get fault(): string | null {
    return this.#builder.fault;
  }

  get nextAvailable(): number {
    return packedBase(
      { index: this.#availableIndex, wrap: this.#availableWrap },
      { index: this.#usedIndex, wrap: this.#usedWrap },
    );
  }

  get recovering(): boolean {
    return this.#recovering;
  }

  get recoveredCount(): number {
    return this.#recovered.length;
  }

  pop(chain: DescriptorChain): number {
    if (this.#recovering) return this.#popRecovered(chain);
    const at = this.#availableIndex * DESC_WORDS + 3;
    const idAndFlags = STRONG_ORDER ? this.#ring[at]! : Atomics.load(this.#ring, at);
    if (((idAndFlags >>> 16) & DESC_AVAIL_USED) !== availableFlags(this.#availableWrap)) return POP_NONE;
    const count = this.#take(idAndFlags, chain);
    if (count === 0) return POP_BROKEN;
    const head = this.#accept(this.#idOfLast, count);
    if (head < 0) return POP_BROKEN;
    if (this.#tracking !== null) this.#entries[head] = this.#tracking.take(this.#words, count);
    this.#inflightDescriptors += count;
    const next = this.#availableIndex + count;
    if (next < this.size) {
      this.#availableIndex = next;
    } else {
      this.#availableIndex = next - this.size;
      this.#availableWrap ^= 1;
    }
    return head;
  }

  push(head: number, writtenBytes: number): void {
    const at = this.#batchCount++;
    const id = this.#ids[head]!;
    this.#batchIds[at] = id;
    this.#batchCounts[at] = this.#counts[head]!;
    this.#batchEntries[at] = this.#entries[head]!;
    this.#batchLengths[at] = writtenBytes;
    this.#idInflight[id] = 0;
    this.#freeHeads[this.#freeCount++] = head;
  }

  publish(): boolean {
    const batch = this.#batchCount;
    if (batch === 0) return false;
    this.#batchCount = 0;
    let moved = 0;
    for (let i = 0; i < batch; i++) moved += this.#publishOne(i);
    this.#inflightDescriptors -= moved;
    Atomics.exchange(this.#fence, 0, 0);
    const event = this.#driverEvent[0]!;
    const flags = (event >>> 16) & EVENT_FLAGS_MASK;
    if (!this.#eventIdx || flags !== EVENT_DESC) return flags !== EVENT_DISABLE;
    // The event is a place in this lap of the ring, or in the one before: was it passed by the last `moved` descriptors?
    const lap = ((event >>> 15) & 1) === this.#usedWrap ? 0 : this.size;
    const since = this.#usedIndex - (event & 0x7fff) + lap;
    return since > 0 && since <= moved;
  }

  setNotification(on: boolean): boolean {
    if (!on) {
      this.#deviceEvent[0] = EVENT_DISABLE << 16;
      this.#log?.markPlace(this.#place.used, 4);
      return false;
    }
    const position = this.#availableIndex | (this.#availableWrap << 15);
    this.#deviceEvent[0] = this.#eventIdx ? position | (EVENT_DESC << 16) : 0;
    this.#log?.markPlace(this.#place.used, 4);
    Atomics.exchange(this.#fence, 0, 0);
    const flags = (this.#ring[this.#availableIndex * DESC_WORDS + 3]! >>> 16) & DESC_AVAIL_USED;
    return flags === availableFlags(this.#availableWrap) || this.#recovering;
  }

  setLog(log: RingLog | null): void {
    this.#log = log;
    const { descriptors, used } = packedRingBytes(this.size);
    log?.markPlace(this.#place.descriptors, descriptors);
    log?.markPlace(this.#place.used, used);
  }

  /** Writes the answer of one request, and moves on behind its descriptors. Returns how many those are. */
  #publishOne(i: number): number {
    const count = this.#batchCounts[i]!;
    const length = this.#batchLengths[i]!;
    const at = this.#usedIndex * DESC_WORDS;
    const wrap = this.#usedWrap;
    const next = this.#usedIndex + count;
    if (next < this.size) {
      this.#usedIndex = next;
    } else {
      this.#usedIndex = next - this.size;
      this.#usedWrap = wrap ^ 1;
    }
    if (this.#tracking !== null) this.#tracking.answer(this.#batchEntries[i]!, count, this.#usedIndex, this.#usedWrap);
    // 2.8.5: the length means something only with WRITE, which says that anything was written.
    const flags = (wrap === 1 ? DESC_AVAIL_USED : 0) | (length > 0 ? DESC_WRITE : 0);
    const idAndFlags = this.#batchIds[i]! | (flags << 16);
    this.#ring[at + 2] = length;
    if (STRONG_ORDER) this.#ring[at + 3] = idAndFlags;
    else Atomics.store(this.#ring, at + 3, idAndFlags);
    if (this.#log !== null) this.#log.markPlace(this.#place.descriptors + at * 4, DESC_BYTES);
    if (this.#tracking !== null) this.#tracking.answered(this.#batchEntries[i]!);
    return count;
  }

  /** Reads the list that begins at the available position. Returns its number of descriptors, 0 when it breaks a rule. */
  #take(idAndFlags: number, chain: DescriptorChain): number {
    const builder = this.#builder;
    const ring = this.#ring;
    const words = this.#words;
    const room = this.size - this.#inflightDescriptors;
    let index = this.#availableIndex;
    chain.clear();
    for (let count = 0; ;) {
      if (count === room) {
        builder.fail(room === this.size ? 'a chain is longer than the ring, or loops' : MORE_THAN_THE_RING);
        return 0;
      }
      const at = index * DESC_WORDS;
      const to = count * DESC_WORDS;
      if (count > 0) idAndFlags = ring[at + 3]!;
      words[to] = ring[at]!;
      words[to + 1] = ring[at + 1]!;
      words[to + 2] = ring[at + 2]!;
      words[to + 3] = idAndFlags;
      if (!this.#addDescriptor(chain, to, count > 0)) return 0;
      count++;
      if ((idAndFlags & (DESC_NEXT << 16)) === 0) {
        this.#idOfLast = idAndFlags & 0xffff;
        return builder.finish(chain) ? count : 0;
      }
      if (++index === this.size) index = 0;
    }
  }

  /** Gives a request its head; POP_BROKEN when its buffer id is in flight already. */
  #accept(id: number, count: number): number {
    if (this.#idInflight[id] !== 0) {
      this.#builder.fail('a buffer id was made available while it was in flight');
      return POP_BROKEN;
    }
    const head = this.#freeHeads[--this.#freeCount]!;
    this.#idInflight[id] = 1;
    this.#ids[head] = id;
    this.#counts[head] = count;
    return head;
  }

  /** Adds what one descriptor of the ring, as read, stands for. False when it breaks a rule. @param at where it is in `#words` */
  #addDescriptor(chain: DescriptorChain, at: number, isContinued: boolean): boolean {
    const builder = this.#builder;
    const words = this.#words;
    const flags = words[at + 3]! >>> 16;
    if ((flags & DESC_INDIRECT) === 0) return builder.add(chain, words, at, (flags & DESC_WRITE) !== 0);
    if (isContinued || (flags & DESC_NEXT) !== 0) return builder.fail('an indirect descriptor in a list');
    if (!builder.openTable(chain, words, at)) return false;
    // Descriptors of a table follow each other; of their flags only WRITE means something (2.8.8).
    const { table, tableBase, tableSize } = builder;
    for (let i = 0; i < tableSize; i++) {
      const entry = tableBase + i * DESC_WORDS;
      const isWritable = (table[entry + 3]! & (DESC_WRITE << 16)) !== 0;
      if (!builder.add(chain, table, entry, isWritable)) return false;
    }
    return true;
  }

  /** Takes the oldest request that was in flight when the ring was started, from the copies of its descriptors. */
  #popRecovered(chain: DescriptorChain): number {
    if (this.fault !== null) return POP_BROKEN;
    const { entry, count, words } = this.#recovered[this.#recoveredTaken++]!;
    if (this.#recoveredTaken === this.#recovered.length) this.#recovering = false;
    this.#words.set(words);
    chain.clear();
    for (let i = 0; i < count; i++) {
      if (!this.#addDescriptor(chain, i * DESC_WORDS, i > 0)) return POP_BROKEN;
    }
    if (!this.#builder.finish(chain)) return POP_BROKEN;
    const head = this.#accept(words[(count - 1) * DESC_WORDS + 3]! & 0xffff, count);
    if (head >= 0) this.#entries[head] = entry;
    return head;
  }
}
