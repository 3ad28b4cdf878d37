/**
 * limited: a filter for tests that can do less than its base, as configured, and fails the test when it is given a request that
 * it said it cannot take. It drives the core's splitting, bouncing and emulation.
 */
import assert from 'node:assert/strict';
import type { Reactor } from '../../src/poller/reactor.js';
import type { Bdev, BdevContext, BdevLimits, BdevModule, IoChannel } from '../../src/bdev/bdev.js';
import { IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { BdevIo } from '../../src/bdev/bdev-io.js';
import { FilterBdev } from '../../src/bdev/filter-bdev.js';
import type { FilterConfig } from '../../src/bdev/filter-bdev.js';

export interface LimitedConfig extends FilterConfig {
  readonly module: 'limited';
  readonly base: string;
  readonly limits: Partial<BdevLimits>;
  /** What it cannot do; `triedZeroes` is a writeZeroes of which it finds that out only when it is asked, a step later. */
  readonly without: readonly ('flush' | 'discard' | 'writeZeroes' | 'triedZeroes' | 'fua')[];
  readonly readOnly: boolean;
}

class LimitedChannel implements IoChannel {
  readonly #bdev: LimitedBdev;
  readonly #base: IoChannel;
  readonly #reactor: Reactor;

  constructor(bdev: LimitedBdev, base: IoChannel, reactor: Reactor) {
    this.#bdev = bdev;
    this.#base = base;
    this.#reactor = reactor;
  }

  submit(io: BdevIo): void {
    checkRequest(io, this.#bdev);
    this.#bdev.taken[io.type]!++;
    if (io.type === IoType.writeZeroes && this.#bdev.without.has('triedZeroes')) {
      this.#reactor.defer(() => io.complete(IoStatus.notSupported, 0));
    } else {
      this.#base.submit(io);
    }
  }

  close(): void {
    this.#base.close();
  }
}

/** What the core promises a module. */
function checkRequest(io: BdevIo, bdev: Bdev): void {
  assert.ok(bdev.supports(io.type), `type ${io.type} is not supported`);
  if (io.type === IoType.flush || io.type === IoType.reset) return;
  assert.ok(io.lengthBytes > 0, 'a request of no length');
  assert.equal(io.offsetBytes % bdev.blockSizeBytes, 0, 'offset in blocks');
  assert.equal(io.lengthBytes % bdev.blockSizeBytes, 0, 'length in blocks');
  assert.ok(io.offsetBytes >= 0 && io.offsetBytes + io.lengthBytes <= bdev.blockCount * bdev.blockSizeBytes, 'bounds');
  assert.ok(io.type === IoType.read || !bdev.readOnly, 'a write to a read-only bdev');
  assert.ok((io.flags & IoFlag.fua) === 0 || bdev.supportsFua, 'FUA without support');
  if (io.type === IoType.read || io.type === IoType.write) checkTransfer(io, bdev.limits);
  const { maxDiscardBytes, maxWriteZeroesBytes } = bdev.limits;
  if (io.type === IoType.discard) assert.ok(io.lengthBytes <= (maxDiscardBytes || Infinity), 'length of a discard');
  if (io.type === IoType.writeZeroes) {
    assert.ok(io.lengthBytes <= (maxWriteZeroesBytes || Infinity), 'length of a writeZeroes');
  }
}

function checkTransfer(io: BdevIo, limits: BdevLimits): void {
  assert.ok(io.lengthBytes <= (limits.maxTransferBytes || Infinity), 'length of a transfer');
  assert.ok(io.segmentCount >= 1 && io.segmentCount <= (limits.maxSegments || Infinity), 'number of segments');
  let sum = 0;
  for (let i = 0; i < io.segmentCount; i++) {
    assert.ok(io.segmentLengths[i]! > 0, 'a segment of no length');
    assert.equal(io.segmentAddresses[i]! % limits.memoryAlignmentBytes, 0, 'address of a segment');
    assert.equal(io.segmentLengths[i]! % limits.memoryAlignmentBytes, 0, 'length of a segment');
    sum += io.segmentLengths[i]!;
  }
  assert.equal(sum, io.lengthBytes, 'sum of the segments');
  if (limits.boundaryBytes === 0) return;
  const firstPart = Math.floor(io.offsetBytes / limits.boundaryBytes);
  const lastPart = Math.floor((io.offsetBytes + io.lengthBytes - 1) / limits.boundaryBytes);
  assert.equal(firstPart, lastPart, 'a transfer across a boundary');
}

export class LimitedBdev extends FilterBdev {
  /** Requests taken, by IoType. */
  readonly taken = [0, 0, 0, 0, 0, 0];
  readonly without: ReadonlySet<string>;

  constructor(config: LimitedConfig, context: BdevContext) {
    super(config, context, (base) => ({
      readOnly: config.readOnly || base.readOnly,
      supportsFua: base.supportsFua && !config.without.includes('fua'),
      limits: { ...base.limits, ...config.limits },
    }));
    this.without = new Set(config.without);
  }

  override supports(type: IoType): boolean {
    switch (type) {
      case IoType.reset:
        return true;
      case IoType.flush:
        return !this.without.has('flush') && this.base.supports(type);
      case IoType.discard:
        return !this.without.has('discard') && this.base.supports(type);
      case IoType.writeZeroes:
        return !this.without.has('writeZeroes') && this.base.supports(type);
      default:
        return this.base.supports(type);
    }
  }

  openChannel(reactor: Reactor): IoChannel {
    return new LimitedChannel(this, this.context.open(this.base), reactor);
  }
}

export const limitedModule: BdevModule<LimitedConfig> = {
  name: 'limited',
  create: (config, context) => new LimitedBdev(config, context),
};
