/**
 * Split virtqueue, device side (VIRTIO 1.2, 2.7).
 *
 *     descriptor table  {u64 address, u32 length, u16 flags, u16 next} x size
 *     available ring    {u16 flags, u16 idx, u16 ring[size], u16 used_event}       written by the driver
 *     used ring         {u16 flags, u16 idx, {u32 id, u32 len}[size], u16 avail_event}   written by us
 *
 * Invariants
 * - Every field of shared memory is read once, into a local, and the local is checked: no double fetch.
 * - A head is accepted only when it is not in flight; every head accepted is pushed once.
 * - Chains are bounded (loops end), never nest, and hold readable buffers before writable ones.
 *
 * Orderings: a store-to-load fence stands between publishing used->idx and reading what the driver wants to be told, and
 * between asking for kicks and looking at avail->idx again. Everything else is a plain load or store, which x86-64 and V8 keep in
 * order; other processors take the `Atomics` branch.
 */
import { ChainBuilder, DESC_BYTES, DESC_WORDS } from './chain-builder.js';
import type { DescriptorChain } from './descriptor-chain.js';
import type { RingLog } from './dirty-log.js';
import type { GuestMemory } from './guest-memory.js';
import type { SplitInflight } from './split-inflight.js';
import { POP_BROKEN, POP_NONE } from './virtqueue.js';
import type { Virtqueue } from './virtqueue.js';

const DESC_NEXT = 1;
const DESC_WRITE = 2;
const DESC_INDIRECT = 4;
const AVAIL_NO_INTERRUPT = 1;
const USED_NO_NOTIFY = 1;

const STRONG_ORDER = process.arch === 'x64';

/** Where a ring lies; in a packed one the last two are the driver's and the device's event suppression. */
export interface RingPlace {
  readonly size: number;
  /** Arena offsets, aligned to 16, 2 and 4; in a packed ring to 16, 4 and 4. */
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

/** Sizes of the three parts in bytes, event fields included. */
export function splitRingBytes(size: number): { descriptors: number; available: number; used: number } {
  return { descriptors: size * DESC_BYTES, available: 6 + 2 * size, used: 6 + 8 * size };
}

export class SplitVirtqueue implements Virtqueue {
  readonly size: number;
  readonly #builder: ChainBuilder;
  readonly #eventIdx: boolean;
  readonly #mask: number;
  readonly #table: Uint32Array;
  readonly #available: Uint16Array;
  readonly #used: Uint16Array;
  readonly #usedEntries: Uint32Array;
  /** By head. With tracking a head counts as in flight until its used entry is published. */
  readonly #inflight: Uint8Array;
  readonly #tracking: SplitInflight | null;
  /** Heads that were in flight when the ring was started: they come before what is available, oldest first. */
  #recovered: readonly number[] = [];
  #recoveredTaken = 0;
  /** Set while some of them are to be taken, or recovery failed. */
  #recovering = false;
  readonly #fence = new Int32Array(1);
  #lastAvailable: number;
  /** avail->idx as last read: below it, entries are known to be there. */
  #availableSeen: number;
  #usedIndex: number;
  #publishedIndex: number;
  #log: RingLog | null = null;

  /**
   * @param nextAvailable where to go on, from SET_VRING_BASE; where the used ring goes on is read from it
   * @param tracking writes down what is in flight; where to go on is derived from it unless it is new
   */
  constructor(
    memory: GuestMemory,
    place: RingPlace,
    nextAvailable: number,
    eventIdx: boolean,
    indirect: boolean,
    tracking: SplitInflight | null = null,
  ) {
    const { size } = place;
    const arena = memory.arena;
    this.size = size;
    this.#builder = new ChainBuilder(memory, indirect);
    this.#eventIdx = eventIdx;
    this.#mask = size - 1;
    this.#table = arena.view32(place.descriptors, size * DESC_WORDS);
    this.#available = arena.view16(place.available, 3 + size);
    this.#used = arena.view16(place.used, 3 + 4 * size);
    this.#usedEntries = arena.view32(place.used + 4, 2 * size);
    this.#inflight = new Uint8Array(size);
    this.#lastAvailable = nextAvailable & 0xffff;
    this.#usedIndex = this.#used[1]!;
    this.#publishedIndex = this.#usedIndex;
    const recovery = tracking === null ? null : tracking.recover(size, this.#usedIndex, this.#lastAvailable);
    this.#tracking = recovery === null ? null : tracking;
    if (recovery !== null) {
      this.#builder.fault = recovery.fault;
      this.#recovered = recovery.heads;
      this.#recovering = recovery.fault !== null || recovery.heads.length > 0;
      this.#lastAvailable = recovery.nextAvailable;
    }
    this.#availableSeen = this.#lastAvailable;
  }

  get fault(): string | null {
    return this.#builder.fault;
  }

  get recovering(): boolean {
    return this.#recovering;
  }

  get recoveredCount(): number {
    return this.#recovered.length;
  }

  get nextAvailable(): number {
    return this.#lastAvailable;
  }

  pop(chain: DescriptorChain): number {
    if (this.#recovering) return this.#popRecovered(chain);
    const last = this.#lastAvailable;
    if (this.#availableSeen === last) {
      const seen = STRONG_ORDER ? this.#available[1]! : Atomics.load(this.#available, 1);
      if (seen === last) return POP_NONE;
      if (((seen - last) & 0xffff) > this.size) return this.#break('more entries are available than the ring holds');
      this.#availableSeen = seen;
    }
    const head = this.#available[2 + (last & this.#mask)]!;
    if (head >= this.size) return this.#break('a head is beyond the ring');
    if (this.#inflight[head] !== 0) return this.#break('a head was made available while it was in flight');
    if (!this.#walk(head, chain)) return POP_BROKEN;
    this.#inflight[head] = 1;
    if (this.#tracking !== null) this.#tracking.take(head);
    this.#lastAvailable = (last + 1) & 0xffff;
    return head;
  }

  push(head: number, writtenBytes: number): void {
    const at = (this.#usedIndex & this.#mask) * 2;
    this.#usedEntries[at] = head;
    this.#usedEntries[at + 1] = writtenBytes;
    this.#usedIndex = (this.#usedIndex + 1) & 0xffff;
    if (this.#tracking !== null) this.#tracking.push(head);
    else this.#inflight[head] = 0;
  }

  publish(): boolean {
    const before = this.#publishedIndex;
    const now = this.#usedIndex;
    if (now === before) return false;
    this.#publishedIndex = now;
    if (STRONG_ORDER) this.#used[1] = now;
    else Atomics.store(this.#used, 1, now);
    if (this.#log !== null) this.#logPublished(this.#log, before, now);
    if (this.#tracking !== null) this.#tracking.published(now, this.#inflight);
    Atomics.exchange(this.#fence, 0, 0);
    if (!this.#eventIdx) return (this.#available[0]! & AVAIL_NO_INTERRUPT) === 0;
    const event = this.#available[2 + this.size]!;
    return ((now - event - 1) & 0xffff) < ((now - before) & 0xffff);
  }

  setNotification(on: boolean): boolean {
    if (this.#eventIdx) {
      // Asking for no kick needs no store: the event index stays where it was passed already.
      if (on) {
        this.#used[2 + 4 * this.size] = this.#lastAvailable;
        this.#log?.markUsed(4 + 8 * this.size, 2);
      }
    } else {
      this.#used[0] = on ? 0 : USED_NO_NOTIFY;
      this.#log?.markUsed(0, 2);
    }
    if (!on) return false;
    Atomics.exchange(this.#fence, 0, 0);
    return this.#available[1]! !== this.#lastAvailable || this.#recovering;
  }

  setLog(log: RingLog | null): void {
    this.#log = log;
    log?.markUsed(0, splitRingBytes(this.size).used);
  }

  /** Logs the index, and the entries from `before` to `now`, which may go round. */
  #logPublished(log: RingLog, before: number, now: number): void {
    log.markUsed(2, 2);
    const first = before & this.#mask;
    const count = (now - before) & 0xffff;
    const untilEnd = Math.min(count, this.size - first);
    log.markUsed(4 + 8 * first, 8 * untilEnd);
    if (count > untilEnd) log.markUsed(4, 8 * (count - untilEnd));
  }

  #break(fault: string): number {
    this.#builder.fail(fault);
    return POP_BROKEN;
  }

  /** Takes the oldest request that was in flight when the ring was started. Its place in the available ring is counted already. */
  #popRecovered(chain: DescriptorChain): number {
    if (this.fault !== null) return POP_BROKEN;
    const head = this.#recovered[this.#recoveredTaken++]!;
    if (this.#recoveredTaken === this.#recovered.length) this.#recovering = false;
    if (!this.#walk(head, chain)) return POP_BROKEN;
    this.#inflight[head] = 1;
    return head;
  }

  /** Follows a chain from its head, then finds where its buffers lie. False when the chain breaks a rule. */
  #walk(head: number, chain: DescriptorChain): boolean {
    const builder = this.#builder;
    chain.clear();
    let table = this.#table;
    let base = 0;
    let tableSize = this.size;
    let index = head;
    let budget = this.size;
    let inIndirect = false;
    for (;;) {
      if (budget-- === 0) return builder.fail('a chain is longer than the ring, or loops');
      const at = base + index * DESC_WORDS;
      const flagsAndNext = table[at + 3]!;
      if ((flagsAndNext & DESC_INDIRECT) !== 0) {
        if (inIndirect) return builder.fail('nested indirect descriptors');
        if ((flagsAndNext & DESC_NEXT) !== 0) return builder.fail('an indirect descriptor with a next one');
        if (!builder.openTable(chain, table, at)) return false;
        table = builder.table;
        base = builder.tableBase;
        tableSize = builder.tableSize;
        inIndirect = true;
        index = 0;
        budget = tableSize;
        continue;
      }
      if (!builder.add(chain, table, at, (flagsAndNext & DESC_WRITE) !== 0)) return false;
      if ((flagsAndNext & DESC_NEXT) === 0) return builder.finish(chain);
      index = flagsAndNext >>> 16;
      if (index >= tableSize) return builder.fail('a next index is beyond the table');
    }
  }
}
