/**
 * malloc: a disk in memory. Contents live as long as the bdev. The copies of one reactor step are gathered into one list and
 * carried out by one native call in the batch phase; requests complete there, in order of submission.
 *
 * Invariant: the list speaks of the storage as it is. Before the storage moves, as it does when the disk grows, the list is run.
 */
import { HUGE_PAGE_BYTES, native } from '../../../native/index.js';
import { PollPhase } from '../../poller/poller.js';
import type { Poller } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { Bdev, BdevConfig, BdevContext, BdevLimits, BdevModule, IoChannel } from '../bdev.js';
import { BdevError, unlimited } from '../bdev.js';
import { IoQueue, IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { BdevSize } from '../bdev-size.js';

export interface MallocConfig extends BdevConfig {
  readonly module: 'malloc';
  readonly sizeBytes: number;
  readonly blockSizeBytes: 512 | 4096;
}

const LIST_ENTRIES = 1024;
const ENTRY_DOUBLES = 3;

class MallocChannel implements IoChannel, Poller {
  readonly #reactor: Reactor;
  readonly #onClose: () => void;
  /** Absolute address of the disk's first byte. */
  readonly #storage = new Float64Array(1);
  readonly #entries = new Float64Array(LIST_ENTRIES * ENTRY_DOUBLES);
  #count = 0;
  readonly #pending = new IoQueue();

  constructor(reactor: Reactor, storageOffset: number, onClose: () => void) {
    this.#reactor = reactor;
    this.#onClose = onClose;
    this.move(storageOffset);
    reactor.addPoller(this, PollPhase.batch);
  }

  submit(io: BdevIo): void {
    switch (io.type) {
      case IoType.read:
      case IoType.write:
        this.#listTransfer(io);
        break;
      case IoType.discard:
      case IoType.writeZeroes:
        this.#listZeroes(io);
        break;
      case IoType.flush:
      case IoType.reset:
        break;
    }
    this.#pending.append(io);
  }

  poll(): boolean {
    if (this.#pending.length === 0) return false;
    this.#runList();
    // Only what is here now: a completion may submit more, which belongs to the next step.
    for (let left = this.#pending.length; left > 0; left--) this.#pending.shift()!.complete(IoStatus.success, 0);
    return true;
  }

  close(): void {
    this.#reactor.removePoller(this);
    this.#onClose();
  }

  /** Carries out what was asked of the storage so far. */
  settle(): void {
    this.#runList();
  }

  /** The disk lies elsewhere from now on; its contents have been moved. */
  move(storageOffset: number): void {
    this.#storage[0] = this.#reactor.arena.baseAddress + storageOffset;
  }

  /** Addresses stay out of call arguments, where they would be boxed. */
  #listTransfer(io: BdevIo): void {
    const base = this.#reactor.arena.baseAddress;
    const toDisk = io.type === IoType.write;
    const entries = this.#entries;
    let disk = this.#storage[0]! + io.offsetBytes;
    for (let i = 0; i < io.segmentCount; i++) {
      const memory = base + io.segmentAddresses[i]!;
      const length = io.segmentLengths[i]!;
      const at = this.#nextEntry();
      entries[at] = toDisk ? disk : memory;
      entries[at + 1] = toDisk ? memory : disk;
      entries[at + 2] = length;
      disk += length;
    }
  }

  #listZeroes(io: BdevIo): void {
    const at = this.#nextEntry();
    this.#entries[at] = this.#storage[0]! + io.offsetBytes;
    this.#entries[at + 1] = 0;
    this.#entries[at + 2] = io.lengthBytes;
  }

  /** Index of a free entry of the list. */
  #nextEntry(): number {
    if (this.#count === LIST_ENTRIES) this.#runList();
    return this.#count++ * ENTRY_DOUBLES;
  }

  #runList(): void {
    if (this.#count > 0) native.copyList(this.#entries, this.#count);
    this.#count = 0;
  }
}

class MallocBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName = 'malloc';
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly readOnly = false;
  readonly supportsFua = true;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[] = [];
  readonly #reactor: Reactor;
  #storageOffset: number;
  #sizeBytes: number;
  readonly #channels = new Set<MallocChannel>();

  constructor(config: MallocConfig, context: BdevContext) {
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.blockSizeBytes = config.blockSizeBytes;
    this.limits = unlimited(config.blockSizeBytes);
    this.#reactor = context.reactor;
    this.#sizeBytes = config.sizeBytes;
    this.#storageOffset = allocateStorage(context.reactor, config.sizeBytes);
    this.size = new BdevSize(config.blockSizeBytes, {
      sizeBytes: () => this.#sizeBytes,
      resize: (sizeBytes) => this.#resize(sizeBytes),
    });
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type !== IoType.reset;
  }

  openChannel(reactor: Reactor): IoChannel {
    const channel = new MallocChannel(reactor, this.#storageOffset, () => this.#channels.delete(channel));
    this.#channels.add(channel);
    return channel;
  }

  describe(): Record<string, unknown> {
    return {};
  }

  destroy(): void {
    this.#reactor.arena.release(this.#storageOffset);
  }

  #resize(sizeBytes: number): void {
    const { arena } = this.#reactor;
    let moved: number;
    try {
      moved = allocateStorage(this.#reactor, sizeBytes);
    } catch (error) {
      throw new BdevError('no-memory', 'newSize', (error as Error).message, 'choose a smaller size');
    }
    for (const channel of this.#channels) channel.settle();
    const base = arena.baseAddress;
    const kept = Math.min(sizeBytes, this.#sizeBytes);
    native.copyList(Float64Array.of(base + moved, base + this.#storageOffset, kept), 1);
    arena.release(this.#storageOffset);
    this.#storageOffset = moved;
    this.#sizeBytes = sizeBytes;
    for (const channel of this.#channels) channel.move(moved);
  }
}

/** Memory in huge pages, which costs less to find one's way in. */
function allocateStorage(reactor: Reactor, sizeBytes: number): number {
  return reactor.arena.allocate(Math.max(sizeBytes, 1), HUGE_PAGE_BYTES);
}

export const mallocModule: BdevModule<MallocConfig> = {
  name: 'malloc',
  create: (config, context) => new MallocBdev(config, context),
};
