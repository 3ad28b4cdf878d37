/**
 * The block device interface: the page to read first.
 *
 * A bdev is a disk: a leaf (a file, memory) or a filter over other bdevs. It is opened once per reactor; the
 * channel it hands out takes requests (`submit`) and completes each exactly once (`io.complete`), now or later,
 * always on the reactor's thread. A module writes only the plain case of each request type; splitting, bouncing,
 * emulation, retries and statistics are done once for all modules in bdev-channel.ts, which every consumer
 * goes through (`openBdev` of registry.ts).
 *
 * Copy null/ to write a leaf, passthru/ to write a filter.
 */
import type { Reactor } from '../poller/reactor.js';
import type { BdevIo, IoType } from './bdev-io.js';
import type { BdevSize } from './bdev-size.js';

/** What a bdev asks of the requests it is given; the core makes every request fit. 0 stands for "no limit". */
export interface BdevLimits {
  /** Longest read or write. */
  readonly maxTransferBytes: number;
  /** Most segments of a read or write. */
  readonly maxSegments: number;
  /** Address and length of each segment must be multiples of this power of two. At least 1. */
  readonly memoryAlignmentBytes: number;
  /** A read or write may not cross a multiple of this. */
  readonly boundaryBytes: number;
  /** Longest discard. */
  readonly maxDiscardBytes: number;
  /** Longest writeZeroes. */
  readonly maxWriteZeroesBytes: number;
  /** Size the device likes best: a hint to guests. */
  readonly optimalIoBytes: number;
  /** Unit the device writes without read-modify-write: a hint to guests. At least the block size. */
  readonly physicalBlockBytes: number;
  /** Granularity of discard: a hint to guests. At least the block size. */
  readonly discardGranularityBytes: number;
}

/** Limits of a bdev that takes anything. */
export function unlimited(blockSizeBytes: number): BdevLimits {
  return {
    maxTransferBytes: 0,
    maxSegments: 0,
    memoryAlignmentBytes: 1,
    boundaryBytes: 0,
    maxDiscardBytes: 0,
    maxWriteZeroesBytes: 0,
    optimalIoBytes: 0,
    physicalBlockBytes: blockSizeBytes,
    discardGranularityBytes: blockSizeBytes,
  };
}

/** Keeps others from a disk while it is in use; between uses they may have it. */
export interface UseGuard {
  /** Called before the first request, and after `release` before the next. @returns why the disk may not be used now, or null */
  acquire(): string | null;
  /** No request is in flight, and none comes before the next `acquire`. */
  release(): void;
}

export interface Bdev {
  /** Unique in its registry. */
  readonly name: string;
  /** RFC 4122 text form; stable across restarts when the config names it. */
  readonly uuid: string;
  /** Name of the module that made it. */
  readonly moduleName: string;
  /** 512 or 4096. Offsets and lengths of all requests are multiples of it. */
  readonly blockSizeBytes: number;
  /** As `size` has it: may grow while the bdev is open. */
  readonly blockCount: number;
  /** A leaf's own, a filter's base's. */
  readonly size: BdevSize;
  /** Writes, discards and writeZeroes are refused by the core. */
  readonly readOnly: boolean;
  /** Writes take `IoFlag.fua` natively; without it the core follows such a write by a flush. */
  readonly supportsFua: boolean;
  readonly limits: BdevLimits;
  /** What the consumer of the stack has to hold while it uses it; a filter hands on its base's. None for most. */
  readonly guard?: UseGuard | undefined;
  /** Bdevs directly below, outermost first; empty for a leaf. */
  readonly bases: readonly Bdev[];
  /** Those of the bases that are only read, and rely on nobody writing to them. None for most. */
  readonly readBases?: readonly Bdev[] | undefined;
  /** Whether the module does this type itself. */
  supports(type: IoType): boolean;
  /** Opens a channel on `reactor`; it is used on that reactor's thread only. */
  openChannel(reactor: Reactor): IoChannel;
  /**
   * Carries out what an operator asks of this module beside serving requests, as taking a snapshot; requests go on or wait.
   * @param params plain JSON, which the module checks. Rejects with BdevError
   */
  operate?(operation: string, params: Readonly<Record<string, unknown>>): Promise<unknown>;
  /** Module-specific facts, plain JSON, for operators. */
  describe(): Record<string, unknown>;
  /** Releases files and memory. Called when no channel is open and no other bdev uses it. */
  destroy(): void;
}

/** One per (bdev, reactor), never shared. A filter's channel holds its bases' channels. */
export interface IoChannel {
  /** Takes the io; completes it exactly once, possibly before returning. */
  submit(io: BdevIo): void;
  /** Releases the channel. No I/O is in flight. */
  close(): void;
}

/** A bdev opened by a consumer: submit requests to `channel`, `close` when none is in flight. */
export interface OpenBdev {
  readonly bdev: Bdev;
  readonly channel: IoChannel;
  /** Whether no request of its channel is in flight. */
  isIdle(): boolean;
  close(): void;
}

/** A consumer that can be moved to another bdev while it goes on. */
export interface BdevUser {
  /** What it claims its bdev under. */
  readonly name: string;
  readonly open: OpenBdev;
  /** Sends requests another way from now on, in the end to the bdev it has open. */
  route(channel: IoChannel): void;
  /** Uses another bdev from now on, of the same block size, at least as large, and able to do all that the one before was. None of its requests is in flight. */
  moveTo(open: OpenBdev): void;
}

/** What a module's `create` may use: the way to its bases and to its reactor. */
export interface BdevContext {
  readonly reactor: Reactor;
  /** Finds a bdev that was created before. Throws a BdevError naming `field` when there is none. */
  base(name: string, field: string): Bdev;
  /** Finds a bdev, whoever writes to it: for what that one knows beside its data. Throws a BdevError naming `field` when there is none. */
  find(name: string, field: string): Bdev;
  /** Opens the core's channel over a base on the reactor: what a filter's `openChannel` calls. */
  open(base: Bdev): IoChannel;
  /** Makes a bdev that nobody else knows, as for a file that is found out only by opening another; its owner destroys it. Throws BdevError. */
  create(config: BdevConfig): Bdev;
  /** Opens a bdev for writing, as a consumer does. Throws BdevError. */
  openTarget(name: string, writer: string): OpenBdev;
  /** A long job that `operate` began is over. @param info what is said of it, plain JSON, with its `state` */
  jobEnded(info: Readonly<Record<string, unknown>>): void;
  /** Opens one of `owner`'s own `readBases` for writing: until it is closed nobody else may rely on it. Throws BdevError. */
  openBase(name: string, owner: string): OpenBdev;
}

/** Config of any bdev: what all modules share. The module's own keys lie beside these. */
export interface BdevConfig {
  readonly name: string;
  readonly module: string;
  readonly uuid?: string | undefined;
}

export interface BdevModule<C extends BdevConfig = BdevConfig> {
  readonly name: C['module'];
  /**
   * Does what takes long before `create`, while the reactor serves its other bdevs.
   * @returns the config for `create`, perhaps with what was found out. Rejects with BdevError
   */
  prepare?(config: C, context: BdevContext): Promise<C>;
  /** Creates a bdev from a config already checked by the schema. Throws BdevError. */
  create(config: C, context: BdevContext): Bdev;
}

/** An operator's mistake or a resource that cannot be had: says which field and what to do. */
export class BdevError extends Error {
  constructor(
    /** Stable machine-readable code, as `no-such-bdev`. */
    readonly code: string,
    /** Config field at fault, as `bdevs[1].path`, or ''. */
    readonly field: string,
    message: string,
    /** Next step for the operator. */
    readonly hint: string,
  ) {
    super(message);
    this.name = 'BdevError';
  }
}
