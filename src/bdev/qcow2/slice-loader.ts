/**
 * Fills a slice cache from the image's file. Whoever needs a slice sleeps until it is there; a slice is read once however many wait.
 *
 * Invariant: what becomes valid in the cache has passed its check.
 */
import { EIO } from '../../../native/index.js';
import type { IoChannel } from '../bdev.js';
import { BdevIo, IoStatus, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import type { SliceCache } from './slice-cache.js';
import { WaitList } from './wait-list.js';
import type { Sleeper } from './wait-list.js';

/** One read under way. */
interface Load {
  readonly io: BdevIo;
  readonly waiters: WaitList;
  slot: number;
}

export interface SliceLoaderOptions {
  readonly cache: SliceCache;
  readonly channel: IoChannel;
  /** Looks at a slice that was read. Returns false when it must not be used. */
  readonly check: (slot: number) => boolean;
  /** All slots are in use: something has to be written. */
  readonly onFull: () => void;
}

export class SliceLoader implements IoOwner {
  readonly cache: SliceCache;
  readonly #channel: IoChannel;
  readonly #check: (slot: number) => boolean;
  readonly #onFull: () => void;
  readonly #loads: Load[] = [];
  readonly #freeLoads: number[] = [];
  /** Load of a slot that is loading. */
  readonly #loadOf: Int32Array;
  /** For whom there was no slot. */
  readonly #crowd = new WaitList();
  /** Loads under way. */
  active = 0;

  constructor({ cache, channel, check, onFull }: SliceLoaderOptions) {
    this.cache = cache;
    this.#channel = channel;
    this.#check = check;
    this.#onFull = onFull;
    this.#loadOf = new Int32Array(cache.slotCount);
  }

  /** Starts to load a slice that is not valid, at `home`. The sleeper is woken, perhaps before this returns, and looks again. */
  load(number: number, home: number, sleeper: Sleeper): void {
    const loading = this.cache.findLoading(number);
    if (loading >= 0) {
      this.#loads[this.#loadOf[loading]!]!.waiters.add(sleeper);
      return;
    }
    const slot = this.cache.take(number, home);
    if (slot < 0) {
      this.#crowd.add(sleeper);
      this.#onFull();
      return;
    }
    const load = this.#takeLoad();
    load.slot = slot;
    load.waiters.add(sleeper);
    this.#loadOf[slot] = load.io.tag;
    this.active++;
    load.io.prepare(IoType.read, home, this.cache.sliceBytes, 0);
    load.io.addSegment(this.cache.addressOf(slot), this.cache.sliceBytes);
    load.io.push(this, 0);
    this.#channel.submit(load.io);
  }

  onDone(io: BdevIo): void {
    const load = this.#loads[io.tag]!;
    const { slot } = load;
    let errno = io.status === IoStatus.success ? 0 : io.errno || EIO;
    if (errno === 0) {
      this.cache.loaded(slot);
      if (!this.#check(slot)) errno = EIO;
    }
    if (errno !== 0) this.cache.drop(slot);
    this.active--;
    load.waiters.wakeAll(errno);
    this.#freeLoads.push(io.tag);
    if (!this.#crowd.isEmpty) this.#crowd.wakeAll(0);
  }

  /** Slots may have come free. */
  onRoom(): void {
    if (!this.#crowd.isEmpty) this.#crowd.wakeAll(0);
  }

  #takeLoad(): Load {
    const free = this.#freeLoads.pop();
    if (free !== undefined) return this.#loads[free]!;
    const load: Load = { io: new BdevIo(1), waiters: new WaitList(), slot: -1 };
    load.io.tag = this.#loads.length;
    this.#loads.push(load);
    return load;
  }
}
