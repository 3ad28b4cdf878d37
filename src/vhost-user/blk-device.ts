/**
 * One virtual disk as guests see it: a bdev behind virtio-blk's features and configuration, and the durability that was
 * negotiated. Shared by the queues of the disk; lives as long as the controller, across sessions.
 */
import { IoType } from '../bdev/bdev-io.js';
import type { Bdev, IoChannel, OpenBdev } from '../bdev/bdev.js';
import type { RingKind } from './inflight-region.js';
import { FeatureHi, FeatureLo } from './protocol.js';
import {
  BLK_ID_BYTES,
  CONFIG_WRITEBACK_AT,
  configSpace,
  discardSectorsMax,
  offeredFeatures,
  writeZeroesSectorsMax,
} from './virtio-blk.js';

export interface BlkDeviceOptions {
  /** At most 20 bytes. */
  readonly serial: string;
  readonly queues: number;
  readonly readOnly: boolean;
  /** Write-back caching until the guest says otherwise; false: every write is durable when it completes. */
  readonly writeCache: boolean;
  /** Whether the guest may be migrated while it runs. Default true. */
  readonly migratable?: boolean;
}

export class BlkDevice {
  /** Both change when the disk is moved. */
  bdev: Bdev;
  channel: IoChannel;
  readonly queues: number;
  readonly readOnly: boolean;
  /** Sectors a discard or writeZeroes range may have. */
  readonly discardSectorsMax: number;
  readonly writeZeroesSectorsMax: number;
  readonly offeredLo: number;
  readonly offeredHi: number;
  /** NUL padded to BLK_ID_BYTES. */
  readonly serial = new Uint8Array(BLK_ID_BYTES);
  readonly stats: Float64Array;

  /** Features acknowledged by the front-end. */
  featuresLo = 0;
  featuresHi = 0;
  /** Every write has to be durable before it completes: read for each write. */
  writeThrough = true;

  /** Called when the configuration space is to be read again; the session sets it. */
  onConfigChange: (() => void) | null = null;

  #writeback: boolean;
  #endWatch: () => void;

  constructor(open: OpenBdev, options: BlkDeviceOptions, stats: Float64Array) {
    this.bdev = open.bdev;
    this.channel = open.channel;
    this.queues = options.queues;
    this.readOnly = options.readOnly || open.bdev.readOnly;
    this.discardSectorsMax = this.bdev.supports(IoType.discard) ? discardSectorsMax() : 0;
    this.writeZeroesSectorsMax = writeZeroesSectorsMax(this.bdev);
    const offered = offeredFeatures(this.bdev, this.readOnly, options.migratable ?? true);
    this.offeredLo = offered.lo;
    this.offeredHi = offered.hi;
    new TextEncoder().encodeInto(options.serial, this.serial);
    this.stats = stats;
    this.#writeback = options.writeCache;
    this.#endWatch = this.#watchSize();
  }

  /** Stored across sessions: a front-end that reconnects does not send the guest's choice again. */
  get writeback(): boolean {
    return this.#writeback;
  }

  set writeback(on: boolean) {
    this.#writeback = on;
    this.#settleDurability();
  }

  /** Shows another bdev from now on, under what was promised of the one before. No request is in flight. */
  moveTo({ bdev, channel }: OpenBdev): void {
    this.#endWatch();
    this.bdev = bdev;
    this.channel = channel;
    this.#endWatch = this.#watchSize();
    this.onConfigChange?.();
  }

  /** Lets go of the bdev, which stays open. */
  close(): void {
    this.#endWatch();
  }

  acknowledge(lo: number, hi: number): void {
    this.featuresLo = lo;
    this.featuresHi = hi;
    this.#settleDurability();
  }

  has(feature: number): boolean {
    return (this.featuresLo & feature) !== 0;
  }

  /** As negotiated so far. */
  get ringKind(): RingKind {
    return (this.featuresHi & FeatureHi.ringPacked) !== 0 ? 'packed' : 'split';
  }

  config(): Uint8Array {
    return configSpace(this.bdev, this.queues, this.#writeback);
  }

  /** A write to the configuration space. Returns whether the field may be written. */
  writeConfig(offset: number, bytes: Uint8Array): boolean {
    if (offset !== CONFIG_WRITEBACK_AT || bytes.length !== 1 || bytes[0]! > 1) return false;
    this.writeback = bytes[0] === 1;
    return true;
  }

  #watchSize(): () => void {
    return this.bdev.size.watch(() => this.onConfigChange?.());
  }

  /**
   * VIRTIO 1.2, 5.2.5.2 and 5.2.6.2: a driver that negotiated neither FLUSH nor CONFIG_WCE cannot flush, and one that
   * chose write-through will not.
   */
  #settleDurability(): void {
    this.writeThrough = !this.#writeback || !this.has(FeatureLo.flush | FeatureLo.configWce);
  }
}
