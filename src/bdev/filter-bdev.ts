/** What filters have in common: a bdev that stands before another, and is what that one is but for what it changes. */
import type { Reactor } from '../poller/reactor.js';
import { unlimited } from './bdev.js';
import type { Bdev, BdevConfig, BdevContext, BdevLimits, IoChannel, UseGuard } from './bdev.js';
import { IoType } from './bdev-io.js';
import type { BdevSize } from './bdev-size.js';

export interface FilterConfig extends BdevConfig {
  /** Name of the bdev below. */
  readonly base: string;
}

/** Limits of a filter that sees whole requests: they are split below it, to what the base takes. */
export function wholeRequests(base: Bdev): BdevLimits {
  const { optimalIoBytes, physicalBlockBytes, discardGranularityBytes } = base.limits;
  return { ...unlimited(base.blockSizeBytes), optimalIoBytes, physicalBlockBytes, discardGranularityBytes };
}

export abstract class FilterBdev implements Bdev {
  readonly name: string;
  readonly uuid: string;
  readonly moduleName: string;
  readonly blockSizeBytes: number;
  readonly size: BdevSize;
  readonly guard: UseGuard | undefined;
  readonly readOnly: boolean;
  readonly supportsFua: boolean;
  readonly limits: BdevLimits;
  readonly bases: readonly Bdev[];
  protected readonly base: Bdev;
  protected readonly context: BdevContext;

  /** @param changes what is not as the base has it */
  constructor(
    config: FilterConfig,
    context: BdevContext,
    changes: (base: Bdev) => Partial<Pick<Bdev, 'limits' | 'readOnly' | 'supportsFua'>> = () => ({}),
  ) {
    const base = context.base(config.base, 'base');
    const changed = changes(base);
    this.name = config.name;
    this.uuid = config.uuid ?? '';
    this.moduleName = config.module;
    this.blockSizeBytes = base.blockSizeBytes;
    this.size = base.size;
    this.guard = base.guard;
    this.readOnly = changed.readOnly ?? base.readOnly;
    this.supportsFua = changed.supportsFua ?? base.supportsFua;
    this.limits = changed.limits ?? base.limits;
    this.bases = [base];
    this.base = base;
    this.context = context;
  }

  get blockCount(): number {
    return this.size.blockCount;
  }

  supports(type: IoType): boolean {
    return type === IoType.reset || this.base.supports(type);
  }

  abstract openChannel(reactor: Reactor): IoChannel;

  describe(): Record<string, unknown> {
    return { base: this.base.name };
  }

  /** The base has an owner of its own. */
  destroy(): void {}
}
