/**
 * header-view: the file of an image, to be read as if its header said where the mapping of a snapshot is and how large the disk was
 * then. The file stays as it is.
 */
import type { Reactor } from '../../poller/reactor.js';
import type { BdevModule, IoChannel } from '../../bdev/bdev.js';
import { IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { BdevIo, IoOwner } from '../../bdev/bdev-io.js';
import { FilterBdev } from '../../bdev/filter-bdev.js';
import type { FilterConfig } from '../../bdev/filter-bdev.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';

export interface HeaderViewConfig extends FilterConfig {
  readonly module: 'header-view';
  readonly header: Pick<Qcow2Header, 'sizeBytes' | 'l1Offset' | 'l1Entries'>;
}

const SIZE_AT = 24;
const L1_ENTRIES_AT = 36;
const L1_OFFSET_AT = 40;
const SNAPSHOTS_AT = 60;

class HeaderView extends FilterBdev {
  readonly #fields: readonly (readonly [number, Buffer])[];

  constructor(config: HeaderViewConfig, context: ConstructorParameters<typeof FilterBdev>[1]) {
    super(config, context, () => ({ readOnly: true }));
    const { sizeBytes, l1Offset, l1Entries } = config.header;
    const size = Buffer.alloc(8);
    size.writeBigUInt64BE(BigInt(sizeBytes));
    const l1 = Buffer.alloc(12);
    l1.writeUInt32BE(l1Entries);
    l1.writeBigUInt64BE(BigInt(l1Offset), L1_OFFSET_AT - L1_ENTRIES_AT);
    this.#fields = [
      [SIZE_AT, size],
      [L1_ENTRIES_AT, l1],
      // The snapshots, whose tables may not be those of the disk.
      [SNAPSHOTS_AT, Buffer.alloc(12)],
    ];
  }

  openChannel(_reactor: Reactor): IoChannel {
    const { arena } = this.context.reactor;
    return new HeaderViewChannel(this.context.open(this.base), (io) => {
      for (const [at, bytes] of this.#fields) {
        bytes.forEach((byte, i) => {
          const address = addressOf(io, at + i);
          if (address >= 0) arena.view8(address, 1)[0] = byte;
        });
      }
    });
  }
}

/** Where a byte of the disk is in the memory of a request; -1 when it is not in it. */
function addressOf(io: BdevIo, offset: number): number {
  let skip = offset - io.offsetBytes;
  if (skip < 0) return -1;
  for (let i = 0; i < io.segmentCount; i++) {
    if (skip < io.segmentLengths[i]!) return io.segmentAddresses[i]! + skip;
    skip -= io.segmentLengths[i]!;
  }
  return -1;
}

class HeaderViewChannel implements IoChannel, IoOwner {
  readonly #base: IoChannel;
  readonly #change: (io: BdevIo) => void;

  constructor(base: IoChannel, change: (io: BdevIo) => void) {
    this.#base = base;
    this.#change = change;
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.read && io.offsetBytes <= SNAPSHOTS_AT) io.push(this, 0);
    this.#base.submit(io);
  }

  onDone(io: BdevIo): void {
    if (io.status === IoStatus.success) this.#change(io);
    io.complete(io.status, io.errno);
  }

  close(): void {
    this.#base.close();
  }
}

export const headerViewModule: BdevModule<HeaderViewConfig> = {
  name: 'header-view',
  create: (config, context) => new HeaderView(config, context),
};
