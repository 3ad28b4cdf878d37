/**
 * What the front-end has said of one ring, and the queue that runs once enough was said.
 *
 * Ring states (vhost-user.rst, "Ring states"): a ring is started when it has a kick descriptor, size, addresses and memory; it is
 * stopped by GET_VRING_BASE. Requests are taken only while it is started and enabled. Messages come in any order: a ring waits
 * for what it lacks, also for the memory that it lies in.
 */
import { POLLIN, native } from '../../native/index.js';
import { FdWatch } from '../poller/fd-watch.js';
import type { Ring } from '../poller/ring.js';
import { BlkQueue, BlkQueueMemory } from './blk-queue.js';
import type { BlkDevice } from './blk-device.js';
import { RingLog } from './dirty-log.js';
import type { DirtyLog } from './dirty-log.js';
import { ControllerStat } from './controller-stats.js';
import { ADDRESS_MAX } from './guest-memory.js';
import type { GuestMemory } from './guest-memory.js';
import type { InflightRegion, RingKind } from './inflight-region.js';
import { PackedInflight } from './packed-inflight.js';
import { PackedVirtqueue, packedRingBytes, unpackBase } from './packed-virtqueue.js';
import { FeatureLo, ProtocolError, QUEUE_SIZE_MAX } from './protocol.js';
import { SplitInflight } from './split-inflight.js';
import { SplitVirtqueue, splitRingBytes } from './split-virtqueue.js';
import type { RingPlace } from './split-virtqueue.js';
import type { Virtqueue } from './virtqueue.js';

/** Ring addresses in the front-end's own address space. */
export interface VringAddresses {
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

const NO_FD = -1;

export class Vring {
  readonly index: number;
  readonly #device: BlkDevice;
  readonly #memory: GuestMemory;
  readonly #ring: Ring;
  /** The queue while the ring is started, else null. */
  queue: BlkQueue | null = null;
  /** As SET_VRING_ENABLE said. */
  enabled = false;
  /** Where the next start writes down what is in flight; the session's. Not changed while the ring is started. */
  inflightRegion: InflightRegion | null = null;

  /** Made when it starts for the first time. */
  #queueMemory: BlkQueueMemory | null = null;
  #size = 0;
  #base = 0;
  #addresses: VringAddresses | null = null;
  /** Where the front-end wants writes to the used ring logged; null: nowhere. */
  #usedLogAddress: number | null = null;
  /** The dirty log while it is in force. */
  #dirtyLog: DirtyLog | null = null;
  /** Set when the ring was kicked off, with or without a descriptor. */
  #kickGiven = false;
  #kickFd = NO_FD;
  #callFd = NO_FD;
  #errFd = NO_FD;
  #kickWatch: FdWatch | null = null;
  /** The latest `stop` left nothing that only the in-flight region knows. */
  #isRetirable = false;
  /** What the latest attempt to start it was in want of. */
  #lacks: string | null = null;

  constructor(index: number, device: BlkDevice, memory: GuestMemory, ring: Ring) {
    this.index = index;
    this.#device = device;
    this.#memory = memory;
    this.#ring = ring;
  }

  /** Whether requests are to be taken from it. */
  get running(): boolean {
    // Without protocol features there is no SET_VRING_ENABLE: a ring is enabled from the start.
    return this.queue !== null && (this.enabled || !this.#device.has(FeatureLo.protocolFeatures));
  }

  /** What keeps a ring from running that has been kicked off, or null. */
  get fault(): string | null {
    if (this.queue !== null) return this.queue.fault;
    return this.#kickGiven ? this.#lacks : null;
  }

  /** Nobody kicks this ring: it has to be polled. */
  get pollOnly(): boolean {
    return this.#kickFd === NO_FD;
  }

  setSize(size: number): void {
    this.#refuseWhileStarted('SET_VRING_NUM');
    // 2.8.10.1: a packed ring may have any size.
    const isAny = this.#device.ringKind === 'packed' || (size & (size - 1)) === 0;
    if (size === 0 || size > QUEUE_SIZE_MAX || !isAny) {
      throw new ProtocolError(`ring ${this.index}: size ${size} is not a power of two up to ${QUEUE_SIZE_MAX}`);
    }
    this.#size = size;
  }

  setBase(base: number): void {
    this.#refuseWhileStarted('SET_VRING_BASE');
    if (base > 0xffff && this.#device.ringKind === 'split')
      throw new ProtocolError(`ring ${this.index}: base ${base} is beyond 16 bits`);
    this.#base = base;
  }

  /**
   * @param usedLogAddress guest address at which writes to the used ring are logged, null for none: may change while the ring is
   * started, the others not
   */
  setAddresses(addresses: VringAddresses, usedLogAddress: number | null): void {
    if (!sameAddresses(addresses, this.#addresses)) this.#refuseWhileStarted('SET_VRING_ADDR');
    if (usedLogAddress !== null && usedLogAddress + splitRingBytes(QUEUE_SIZE_MAX).used > ADDRESS_MAX) {
      throw new ProtocolError(`ring ${this.index}: the address to log at is beyond 2^52`);
    }
    const { descriptors, available, used } = addresses;
    if (descriptors % 16 !== 0 || available % 2 !== 0 || used % 4 !== 0) {
      throw new ProtocolError(`ring ${this.index}: misaligned addresses`);
    }
    this.#addresses = addresses;
    this.#usedLogAddress = usedLogAddress;
    this.#logRing();
  }

  /** The dirty log comes into force, is replaced, or is no longer in force. */
  setDirtyLog(log: DirtyLog | null): void {
    this.#dirtyLog = log;
    if (this.queue !== null) this.queue.dirtyLog = log;
    this.#logRing();
  }

  /** @param fd taken over; NO_FD when the front-end will not kick */
  setKick(fd: number): void {
    this.#stopPolling();
    this.#kickFd = fd;
    this.#kickGiven = true;
    if (fd !== NO_FD) {
      // Looking at the ring is the poller's business: waking up is the point.
      this.#kickWatch = new FdWatch(this.#ring, fd, POLLIN, () => {
        this.#device.stats[ControllerStat.kicks]!++;
      });
    }
  }

  /** May change at any time; the new descriptor is raised once, as what was due may have gone to the old one. */
  setCall(fd: number): void {
    closeFd(this.#callFd);
    this.#callFd = fd;
    if (this.queue !== null) this.signalCall();
  }

  setErr(fd: number): void {
    closeFd(this.#errFd);
    this.#errFd = fd;
  }

  /** Has all it takes to be started. */
  get isReady(): boolean {
    return this.queue === null && this.#kickGiven && this.#place() !== null;
  }

  /** It may not start now: the reason is its fault until it is started. */
  hold(reason: string): void {
    this.#lacks = reason;
  }

  /** Starts the ring if everything is there. */
  startIfReady(): boolean {
    if (this.queue !== null || !this.#kickGiven) return false;
    const place = this.#place();
    if (place === null) return false;
    const virtqueue = this.#openVirtqueue(place);
    this.#queueMemory ??= new BlkQueueMemory();
    this.queue = new BlkQueue(this.#device, this.index, this.#memory.arena, virtqueue, this.#queueMemory);
    this.queue.dirtyLog = this.#dirtyLog;
    this.#logRing();
    virtqueue.setNotification(false);
    // Whoever served the ring before may have died between answering a request and saying so.
    this.signalCall();
    return true;
  }

  /** After `stop`: what is in the in-flight region is of no use any more, as the front-end knows where the ring goes on. */
  retireInflight(): void {
    if (this.#isRetirable) this.#inflightRegion?.retire(this.index);
  }

  /** The ring is no more: its requests have been answered. Returns the index where it is to go on. */
  stop(): number {
    this.#isRetirable = this.queue?.virtqueue.recovering === false;
    if (this.queue !== null) {
      this.publish();
      // Whoever serves the ring next may take it for granted that drivers kick.
      this.queue.virtqueue.setNotification(true);
      this.#base = this.queue.virtqueue.nextAvailable;
      this.queue = null;
    }
    this.#stopPolling();
    this.#kickGiven = false;
    return this.#base;
  }

  /** Forgets what was said of the ring, which stops; whom to call stays. Its requests have been answered. */
  reset(): void {
    this.stop();
    // The driver starts anew: what it has not been answered, it never asked.
    this.#inflightRegion?.retire(this.index);
    this.enabled = false;
    this.#size = 0;
    this.#base = 0;
    this.#addresses = null;
    this.#usedLogAddress = null;
  }

  /**
   * The memory below the ring is about to change; its requests have been answered. Afterwards `startIfReady` lets it go on where
   * it was, unless it is broken: that takes a new start.
   */
  suspend(): void {
    if (this.queue === null) return;
    if (this.queue.broken) {
      this.stop();
      return;
    }
    this.publish();
    this.#base = this.queue.virtqueue.nextAvailable;
    this.queue = null;
  }

  /** Makes answers visible and notifies the guest if it wants that. */
  publish(): void {
    if (this.queue === null) return;
    if (this.queue.virtqueue.publish()) this.signalCall();
    if (this.#dirtyLog !== null) this.#dirtyLog.signal();
  }

  signalCall(): void {
    if (this.#callFd === NO_FD) return;
    this.#device.stats[ControllerStat.notifications]!++;
    native.eventfdSignal(this.#callFd);
  }

  signalErr(): void {
    if (this.#errFd !== NO_FD) native.eventfdSignal(this.#errFd);
  }

  /** Closes all descriptors. */
  close(): void {
    this.#stopPolling();
    closeFd(this.#callFd);
    closeFd(this.#errFd);
    this.#callFd = NO_FD;
    this.#errFd = NO_FD;
  }

  /** The region if it has a part for this ring. */
  get #inflightRegion(): InflightRegion | null {
    const region = this.inflightRegion;
    return region !== null && this.index < region.queues ? region : null;
  }

  #openVirtqueue(place: RingPlace): Virtqueue {
    const memory = this.#memory;
    const eventIdx = this.#device.has(FeatureLo.eventIdx);
    const indirect = this.#device.has(FeatureLo.indirectDesc);
    const region = this.#inflightRegion;
    if (this.#device.ringKind === 'packed') {
      const tracking =
        region === null ? null : new PackedInflight(memory.arena, region.place(this.index), region.queueSize);
      return new PackedVirtqueue(memory, place, this.#base, eventIdx, indirect, tracking);
    }
    const tracking =
      region === null ? null : new SplitInflight(memory.arena, region.place(this.index), region.queueSize);
    return new SplitVirtqueue(memory, place, this.#base, eventIdx, indirect, tracking);
  }

  /** Where the ring lies, or null when it lacks something. A translation keeps an address's alignment: see GuestMemory. */
  #place(): RingPlace | null {
    const addresses = this.#addresses;
    const kind = this.#device.ringKind;
    this.#lacks = this.#wrong(kind);
    if (this.#lacks !== null || addresses === null) return null;
    const size = this.#size;
    const bytes = kind === 'packed' ? packedRingBytes(size) : splitRingBytes(size);
    const descriptors = this.#memory.translateUser(addresses.descriptors, bytes.descriptors);
    const available = this.#memory.translateUser(addresses.available, bytes.available);
    const used = this.#memory.translateUser(addresses.used, bytes.used);
    if (descriptors < 0 || available < 0 || used < 0) {
      const what = descriptors < 0 ? 'descriptor table' : available < 0 ? 'available ring' : 'used ring';
      this.#lacks = `its ${what} is outside guest memory`;
      return null;
    }
    return { size, descriptors, available, used };
  }

  /** What has not been said, or does not go with the kind of ring that was negotiated in the end. */
  #wrong(kind: RingKind): string | null {
    if (this.#size === 0) return 'it has no size';
    if (this.#addresses === null) return 'it has no addresses';
    if (kind === 'packed') {
      const { available, used } = unpackBase(this.#base);
      if (available.index >= this.#size || used.index >= this.#size) return 'its base is beyond its size';
      if (this.#addresses.available % 4 !== 0) return 'its addresses are misaligned';
    } else {
      if ((this.#size & (this.#size - 1)) !== 0) return 'its size is not a power of two';
      if (this.#base > 0xffff) return 'its base is beyond 16 bits';
    }
    const region = this.#inflightRegion;
    if (region !== null && (region.kind !== kind || region.queueSize < this.#size)) {
      return 'its in-flight region was made for another kind of ring, or for shorter ones';
    }
    return null;
  }

  /** Has what is written to the ring logged as it is to be now. */
  #logRing(): void {
    const log = this.#dirtyLog;
    const address = this.#usedLogAddress;
    this.queue?.virtqueue.setLog(log === null || address === null ? null : new RingLog(log, address));
  }

  #refuseWhileStarted(message: string): void {
    if (this.queue !== null) throw new ProtocolError(`ring ${this.index}: ${message} while the ring is started`);
  }

  #stopPolling(): void {
    this.#kickWatch?.close();
    this.#kickWatch = null;
    closeFd(this.#kickFd);
    this.#kickFd = NO_FD;
  }
}

function sameAddresses(a: VringAddresses, b: VringAddresses | null): boolean {
  return a.descriptors === b?.descriptors && a.available === b.available && a.used === b.used;
}

function closeFd(fd: number): void {
  if (fd !== NO_FD) native.fileClose(fd);
}
