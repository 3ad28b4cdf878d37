/**
 * A disk served on a real socket by a controller whose reactor is stepped by hand, with a journal of what reached the disk:
 * what session tests run on. Time is simulated, so that a request held by the delay filter stays held until the test says so.
 */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BdevIo, IoStatus } from '../../src/bdev/bdev-io.js';
import type { IoOwner, IoType } from '../../src/bdev/bdev-io.js';
import type { BdevConfig, IoChannel } from '../../src/bdev/bdev.js';
import type { DelayConfig } from '../../src/bdev/delay/delay.js';
import type { MallocConfig } from '../../src/bdev/malloc/malloc.js';
import { BlkController } from '../../src/vhost-user/blk-controller.js';
import type { ListenAddress } from '../../src/vhost-user/blk-controller.js';
import type { PeerRules } from '../../src/vhost-user/peer-rules.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { Frontend } from '../frontend/frontend.js';
import type { FrontendOptions } from '../frontend/frontend.js';
import { Rig } from '../support/rig.js';

export const DISK_BYTES = 8 * 2 ** 20;
/** Longer than any test steps through. */
export const HELD_US = 1e9;

/** A disk in memory. */
export function memoryDisk(blockSizeBytes: 512 | 4096 = 512, name = 'disk'): MallocConfig[] {
  return [{ name, module: 'malloc', sizeBytes: DISK_BYTES, blockSizeBytes }];
}

/** A disk in memory that holds back the completion of reads and writes until `ServedDisk.release`. */
export function heldDisk(name = 'disk'): BdevConfig[] {
  const delay: DelayConfig = {
    name,
    module: 'delay',
    base: `${name}-base`,
    readUs: HELD_US,
    writeUs: HELD_US,
    flushUs: 0,
    discardUs: 0,
    jitterUs: 0,
  };
  return [...memoryDisk(512, `${name}-base`), delay];
}

/** One request as it reached the disk. */
export interface JournalEntry {
  readonly type: IoType;
  readonly flags: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** Undefined until it completes. */
  status: IoStatus | undefined;
}

/** Stands between the controller and the disk and writes down what passes. */
export class JournalChannel implements IoChannel, IoOwner {
  readonly entries: JournalEntry[] = [];
  readonly #base: IoChannel;

  constructor(base: IoChannel) {
    this.#base = base;
  }

  submit(io: BdevIo): void {
    const { type, flags, offsetBytes, lengthBytes } = io;
    this.entries.push({ type, flags, offsetBytes, lengthBytes, status: undefined });
    io.push(this, this.entries.length - 1);
    this.#base.submit(io);
  }

  onDone(io: BdevIo, frame: number): void {
    this.entries[frame]!.status = io.status;
    io.complete(io.status, io.errno);
  }

  close(): void {
    this.#base.close();
  }
}

export interface LogEntry {
  readonly level: string;
  readonly message: string;
  readonly fields: Record<string, unknown>;
}

export interface ServedDiskOptions {
  readonly configs?: readonly BdevConfig[];
  readonly serial?: string;
  readonly queues?: number;
  readonly readOnly?: boolean;
  readonly writeCache?: boolean;
  /** Shares the reactor of another disk, which is to be closed later. */
  readonly beside?: ServedDisk;
  /** Default: a socket in a folder of its own. */
  readonly listen?: ListenAddress;
  /** Default: whoever connects. */
  readonly peers?: PeerRules;
  /** Default: for ever. */
  readonly messageTimeoutUs?: number;
}

export class ServedDisk {
  readonly rig: Rig;
  readonly controller: BlkController;
  readonly socketPath: string;
  readonly log: LogEntry[] = [];
  readonly journal: JournalChannel;
  readonly #folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  readonly #isGuest: boolean;
  #closed = false;

  constructor(options: ServedDiskOptions = {}) {
    this.rig = options.beside?.rig ?? new Rig('vhost-user');
    this.#isGuest = options.beside !== undefined;
    const open = this.rig.open(options.configs ?? memoryDisk());
    this.journal = new JournalChannel(open.channel);
    this.controller = new BlkController(
      this.rig.reactor,
      { bdev: open.bdev, channel: this.journal, isIdle: () => open.isIdle(), close: () => open.close() },
      {
        name: open.bdev.name,
        serial: options.serial ?? 'serial',
        queues: options.queues ?? 2,
        readOnly: options.readOnly ?? false,
        writeCache: options.writeCache ?? true,
        messageTimeoutUs: options.messageTimeoutUs ?? Infinity,
      },
      (level, message, fields) => this.log.push({ level, message, fields: fields ?? {} }),
    );
    this.socketPath = join(this.#folder, 'socket');
    this.controller.listen(options.listen ?? { socketPath: this.socketPath, mode: 0o600 }, options.peers ?? null);
  }

  /** A front-end that is connected and has said nothing. */
  open(options: FrontendOptions = {}): Frontend {
    return Frontend.open(this.socketPath, { step: this.step, ...options });
  }

  /** A front-end that is set up. */
  connect(options: FrontendOptions = {}): Promise<Frontend> {
    return Frontend.connect(this.socketPath, { step: this.step, ...options });
  }

  readonly step = (): void => {
    this.rig.step();
  };

  /** Steps a few times: enough for whatever was sent to be carried out. */
  settle(steps = 20): void {
    for (let i = 0; i < steps; i++) this.rig.step();
  }

  until(reached: () => boolean, what: string): void {
    this.rig.until(reached, what);
  }

  /** Lets the completions go that the disk holds back. */
  release(): void {
    this.rig.clock.advance(HELD_US);
    this.settle();
  }

  /** Number of sessions that were ended because the front-end broke the protocol. */
  get sessionFaults(): number {
    return this.stat(ControllerStat.sessionFaults);
  }

  stat(stat: (typeof ControllerStat)[keyof typeof ControllerStat]): number {
    return this.controller.stats[stat]!;
  }

  /** What the log says of messages refused and sessions failed, latest first. */
  get complaints(): string[] {
    return this.log
      .filter((entry) => entry.message === 'session failed' || entry.message === 'message refused')
      .map((entry) => String(entry.fields['error']))
      .reverse();
  }

  get state(): string {
    return this.controller.info().state;
  }

  untilListening(): void {
    this.until(() => this.state === 'listening', 'the session to be gone');
  }

  /** Ends the controller and the disk; throws when anything is left of them. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    void this.controller.close();
    this.rig.clock.advance(HELD_US);
    this.until(() => this.state === 'closed', 'the controller to be closed');
    // Cancelled polls are to be gone before the next disk takes their place.
    this.settle(2);
    rmSync(this.#folder, { recursive: true });
    if (!this.#isGuest) this.rig.close();
  }
}

/** Number of descriptors this process has open. */
export function openDescriptors(): number {
  return readdirSync('/proc/self/fd').length;
}
