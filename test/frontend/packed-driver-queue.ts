/**
 * The driver's side of one packed virtqueue (VIRTIO 1.2, 2.8). Requests are those of `DriverQueue`; a head is a buffer id here. Of the
 * three parts of a split ring the first is the descriptor ring, the others hold the driver's and the device's event suppression.
 *
 * Buffer ids are spread over all 16 bits: a device may make nothing of them.
 */
import { DriverQueue } from './driver-queue.js';
import type { Descriptor, DriverQueueOptions } from './driver-queue.js';
import { DESCRIPTOR_BYTES, DescriptorFlag } from './protocol.js';

const AVAIL = 1 << 7;
const USED = 1 << 15;
const FLAGS_AT = 14;
export const PackedEvent = { enable: 0, disable: 1, descriptor: 2 } as const;
/** Both positions at the start of the first lap, whose wrap counters are 1. */
export const PACKED_BASE_AT_START = 0x8000_8000;

export interface PackedDescriptor {
  readonly address: number | bigint;
  readonly lengthBytes: number;
  readonly id: number;
  /** All of them, AVAIL and USED too. */
  readonly flags: number;
}

interface Position {
  readonly index: number;
  readonly wrap: number;
}

const START: Position = { index: 0, wrap: 1 };

export class PackedDriverQueue extends DriverQueue {
  #available = START;
  #used = START;
  #freeSlots = 0;
  #freeIds: number[] = [];
  #chains = new Map<number, readonly Descriptor[]>();
  #base = PACKED_BASE_AT_START;

  constructor(options: DriverQueueOptions) {
    super(options);
    this.startAt(START);
  }

  /** Where the next descriptor becomes available, and where the next answer is expected. */
  get positions(): { readonly available: Position; readonly used: Position } {
    return { available: this.#available, used: this.#used };
  }

  /** The ring does not tell where it goes on, so a front-end says what it was told last, however old that is. */
  override get base(): number {
    return this.#base;
  }

  override stoppedAt(base: number): void {
    this.#base = base;
  }

  override reset(): void {
    super.reset();
    this.startAt(START);
  }

  /** Both sides go on from here, with nothing in flight: the ring is as its laps so far have left it. */
  startAt(position: Position): void {
    for (let index = 0; index < this.size; index++) {
      const wrap = index < position.index ? position.wrap : position.wrap ^ 1;
      this.writePacked(index, { address: 0, lengthBytes: 0, id: 0, flags: wrap === 1 ? AVAIL | USED : 0 });
    }
    this.#available = position;
    this.#used = position;
    this.#freeSlots = this.size;
    this.#freeIds = Array.from({ length: this.size }, (_, i) => (i * 251 + 7) & 0xffff);
    this.#chains = new Map();
    const half = position.index | (position.wrap << 15);
    this.#base = (half | (half << 16)) >>> 0;
  }

  override resume(): void {
    throw new Error('a packed ring does not tell where it is');
  }

  /** Writes one descriptor of the ring, right or wrong. */
  writePacked(index: number, descriptor: PackedDescriptor): void {
    writePackedDescriptor(this.memory.bytes(this.descriptors + DESCRIPTOR_BYTES * index, DESCRIPTOR_BYTES), descriptor);
  }

  /** Descriptors that are free. */
  get room(): number {
    return this.#freeSlots;
  }

  /** AVAIL and USED as they are in what is made available in a lap. */
  static availableFlags(wrap: number): number {
    return wrap === 1 ? AVAIL : USED;
  }

  protected override placeChain(chain: readonly Descriptor[]): number[] {
    const id = this.#freeIds.pop();
    if (id === undefined || chain.length > this.#freeSlots) throw new Error('the queue has no room');
    this.#freeSlots -= chain.length;
    this.#chains.set(id, chain);
    return [id];
  }

  /** A list is either all in the ring or all in a table (2.8.6). */
  protected override tableFrom(wanted: number, pieces: number): number {
    return wanted < pieces ? 0 : Infinity;
  }

  protected override writeTable(address: number, chain: readonly Descriptor[]): void {
    chain.forEach(({ address: to, lengthBytes, flags = 0 }, i) => {
      const bytes = this.memory.bytes(address + DESCRIPTOR_BYTES * i, DESCRIPTOR_BYTES);
      writePackedDescriptor(bytes, { address: to, lengthBytes, id: 0, flags });
    });
  }

  /** A chain of any descriptors, for `offer`. Flags are as given, but for NEXT. */
  rawChain(chain: readonly Descriptor[]): number {
    return this.placeChain(chain)[0]!;
  }

  override offer(...heads: readonly number[]): void {
    this.checkOpen();
    const before = this.#available;
    for (const id of heads) this.#makeAvailable(id);
    this.fence();
    if (this.#wantsKick(before)) this.kick();
  }

  override suppressCalls(suppress: boolean): void {
    this.setDriverEvent(suppress ? PackedEvent.disable : this.#wantedEvent, this.#used);
    this.fence();
  }

  setDriverEvent(flags: number, { index, wrap }: Position = START): void {
    this.availableBytes.writeUInt32LE(((index | (wrap << 15)) + flags * 2 ** 16) >>> 0, 0);
  }

  override takeRawUsed(): { readonly id: number; readonly lengthBytes: number } | undefined {
    this.checkOpen();
    const { index, wrap } = this.#used;
    const bytes = this.memory.bytes(this.descriptors + DESCRIPTOR_BYTES * index, DESCRIPTOR_BYTES);
    if ((bytes.readUInt16LE(FLAGS_AT) & (AVAIL | USED)) !== (wrap === 1 ? AVAIL | USED : 0)) return undefined;
    const entry = { id: bytes.readUInt16LE(12), lengthBytes: bytes.readUInt32LE(8) };
    const chain = this.#chains.get(entry.id);
    if (chain === undefined)
      throw new Error(`queue ${this.index}: the device used ${entry.id}, which is not in flight`);
    if ((bytes.readUInt16LE(FLAGS_AT) & DescriptorFlag.write) === 0)
      throw new Error('the device claims to have written nothing');
    this.#chains.delete(entry.id);
    this.#freeIds.unshift(entry.id);
    this.#freeSlots += chain.length;
    this.#used = this.#advance(this.#used, chain.length);
    if ((this.availableBytes.readUInt16LE(2) & 3) !== PackedEvent.disable)
      this.setDriverEvent(this.#wantedEvent, this.#used);
    return entry;
  }

  get #wantedEvent(): number {
    return this.eventIdx ? PackedEvent.descriptor : PackedEvent.enable;
  }

  /** The first descriptor of the list becomes available last. */
  #makeAvailable(id: number): void {
    const chain = this.#chains.get(id)!;
    const places = chain.map((_, i) => this.#advance(this.#available, i));
    for (const [i, { address, lengthBytes, flags = 0 }] of [...chain.entries()].reverse()) {
      const { index, wrap } = places[i]!;
      const isLast = i === chain.length - 1;
      this.writePacked(index, {
        address,
        lengthBytes,
        id: isLast ? id : 0,
        flags: flags | PackedDriverQueue.availableFlags(wrap) | (isLast ? 0 : DescriptorFlag.next),
      });
    }
    this.#available = this.#advance(this.#available, chain.length);
  }

  /** By the text: an event is wanted when its descriptor is among those made available since. */
  #wantsKick(before: Position): boolean {
    const event = this.usedBytes.readUInt32LE(0);
    const flags = (event >>> 16) & 3;
    if (!this.eventIdx || flags !== PackedEvent.descriptor) return flags !== PackedEvent.disable;
    for (
      let at = before;
      at.index !== this.#available.index || at.wrap !== this.#available.wrap;
      at = this.#advance(at, 1)
    ) {
      if (at.index === (event & 0x7fff) && at.wrap === ((event >>> 15) & 1)) return true;
    }
    return false;
  }

  #advance({ index, wrap }: Position, by: number): Position {
    const next = index + by;
    return next < this.size ? { index: next, wrap } : { index: next - this.size, wrap: wrap ^ 1 };
  }
}

/** Writes one descriptor of a packed ring or of an indirect table; id and flags at once. */
export function writePackedDescriptor(bytes: Buffer, { address, lengthBytes, id, flags }: PackedDescriptor): void {
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(address)), 0);
  bytes.writeUInt32LE(lengthBytes, 8);
  bytes.writeUInt32LE((id + flags * 2 ** 16) >>> 0, 12);
}
