/**
 * `strata img compare`: whether two images hold the same disk. Exits with 0 when they do, 1 when they do not, 2 when that could not be
 * found out.
 */
import { BdevIo, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import type { BdevError, OpenBdev } from '../../bdev/bdev.js';
import { DiskHost, requestError } from './disk-host.js';
import { mapDisk, wholeSectors } from './disk-map.js';
import type { DiskExtent } from './disk-map.js';
import { closeChain, openChain } from './open-chain.js';
import type { OpenImage } from './open-image.js';
import { ProgressLine, print } from './words.js';

export interface CompareCommand {
  readonly format?: string;
  readonly secondFormat?: string;
  readonly strict?: boolean;
  readonly progress?: boolean;
  readonly quiet?: boolean;
  readonly forceShare?: boolean;
}

const PIECE_BYTES = 2 ** 20;
const PARALLEL = 8;

/** @returns the exit code. Throws BdevError. */
export function compareCommand(firstPath: string, secondPath: string, command: CompareCommand): number {
  const { strict = false, quiet = false, forceShare = false } = command;
  const say = (text: string): void => {
    if (!quiet) print(`${text}\n`);
  };
  const first = openChain(firstPath, command.format ?? null, forceShare);
  let second: OpenImage[] = [];
  try {
    second = openChain(secondPath, command.secondFormat ?? null, forceShare);
    const sizes = [first[0]!.sizeBytes, second[0]!.sizeBytes] as const;
    if (sizes[0] !== sizes[1]) {
      say(strict ? 'Strict mode: Image size mismatch!' : 'Warning: Image size mismatch!');
      if (strict) return 1;
    }
    const progress = new ProgressLine(command.progress === true && !quiet);
    const problem = findDifference(first, second, { strict, forceShare, onProgress: (done) => progress.update(done) });
    progress.end();
    if (problem !== null) {
      say(problem);
      return 1;
    }
    say('Images are identical.');
    return 0;
  } finally {
    closeChain(first);
    closeChain(second);
  }
}

interface DifferenceOptions {
  readonly strict: boolean;
  readonly forceShare: boolean;
  readonly onProgress: (fraction: number) => void;
}

/** What differs first, in words, or null. */
function findDifference(
  first: readonly OpenImage[],
  second: readonly OpenImage[],
  options: DifferenceOptions,
): string | null {
  const host = new DiskHost();
  try {
    const disks = [host.openChain(first, options.forceShare), host.openChain(second, options.forceShare)] as const;
    const windows: Window[] = [];
    for (let i = 0; i < PARALLEL; i++) windows.push(new Window(host, disks, [first[0]!, second[0]!]));
    try {
      return search(host, windows, first, second, options);
    } finally {
      // What is in flight writes to the windows' memory.
      for (const window of windows) host.run(() => window.isDone);
      for (const window of windows) window.release();
    }
  } finally {
    host.close();
  }
}

function search(
  host: DiskHost,
  windows: readonly Window[],
  first: readonly OpenImage[],
  second: readonly OpenImage[],
  options: DifferenceOptions,
): string | null {
  const size = Math.max(first[0]!.sizeBytes, second[0]!.sizeBytes);
  const busy: Window[] = [];
  const settle = (): string | null => {
    const window = busy.shift()!;
    host.run(() => window.isDone);
    const at = window.difference();
    options.onProgress(window.start / size);
    return at === null ? null : `Content mismatch at offset ${at}!`;
  };
  let turn = 0;
  for (const pair of pairsOf(first, second)) {
    if (options.strict && isPresent(pair.a) !== isPresent(pair.b)) {
      while (busy.length > 0) {
        const found = settle();
        if (found !== null) return found;
      }
      return `Strict mode: Offset ${pair.start} block status mismatch!`;
    }
    if (isZero(pair.a) && isZero(pair.b)) continue;
    for (let at = pair.start; at < pair.start + pair.lengthBytes; at += PIECE_BYTES) {
      const found = busy.length === windows.length ? settle() : null;
      if (found !== null) return found;
      const window = windows[turn++ % windows.length]!;
      const lengthBytes = Math.min(PIECE_BYTES, pair.start + pair.lengthBytes - at);
      window.read(at, lengthBytes, [!isZero(pair.a), !isZero(pair.b)]);
      busy.push(window);
    }
  }
  while (busy.length > 0) {
    const found = settle();
    if (found !== null) return found;
  }
  return null;
}

interface Pair {
  readonly start: number;
  readonly lengthBytes: number;
  /** What the disks have there; null beyond the end of one. */
  readonly a: DiskExtent | null;
  readonly b: DiskExtent | null;
}

function isZero(extent: DiskExtent | null): boolean {
  return extent === null || extent.kind === 'zero' || extent.kind === 'unallocated';
}

function isPresent(extent: DiskExtent | null): boolean {
  return extent !== null && extent.kind !== 'unallocated';
}

/** Both maps, cut so that each part is of one kind in both. */
function* pairsOf(first: readonly OpenImage[], second: readonly OpenImage[]): Generator<Pair> {
  const maps = [wholeSectors(mapDisk(first)), wholeSectors(mapDisk(second))] as const;
  const extents: [DiskExtent | null, DiskExtent | null] = [null, null];
  const size = Math.max(first[0]!.sizeBytes, second[0]!.sizeBytes);
  for (let at = 0; at < size;) {
    let end = size;
    for (const i of [0, 1] as const) {
      while (extents[i] === null || extents[i].start + extents[i].lengthBytes <= at) {
        const next = maps[i].next();
        extents[i] = next.done === true ? null : next.value;
        if (next.done === true) break;
      }
      if (extents[i] !== null) end = Math.min(end, extents[i].start + extents[i].lengthBytes);
    }
    yield { start: at, lengthBytes: end - at, a: extents[0], b: extents[1] };
    at = end;
  }
}

/** The same piece of both disks. */
class Window implements IoOwner {
  start = 0;
  #lengthBytes = 0;
  #waiting = 0;
  #error: BdevError | null = null;
  readonly #host: DiskHost;
  readonly #disks: readonly OpenBdev[];
  readonly #images: readonly OpenImage[];
  readonly #ios = [new BdevIo(), new BdevIo()] as const;
  readonly #addresses: number[];

  constructor(host: DiskHost, disks: readonly OpenBdev[], images: readonly OpenImage[]) {
    this.#host = host;
    this.#disks = disks;
    this.#images = images;
    const { arena } = host.reactor;
    this.#addresses = [arena.allocate(PIECE_BYTES), arena.allocate(PIECE_BYTES)];
  }

  get isDone(): boolean {
    return this.#waiting === 0;
  }

  /** @param wanted which of the disks has to be read; the other one has zeroes */
  read(start: number, lengthBytes: number, wanted: readonly boolean[]): void {
    this.start = start;
    this.#lengthBytes = lengthBytes;
    this.#waiting = wanted.filter(Boolean).length;
    for (const i of [0, 1] as const) {
      if (!wanted[i]) {
        this.#view(i).fill(0);
        continue;
      }
      const io = this.#ios[i];
      io.prepare(IoType.read, start, lengthBytes, 0);
      io.addSegment(this.#addresses[i]!, lengthBytes);
      io.push(this, i);
      this.#disks[i]!.channel.submit(io);
    }
  }

  onDone(io: BdevIo, disk: number): void {
    if (io.status !== IoStatus.success) {
      this.#error ??= requestError('read', this.#images[disk]!.file.path, io.offsetBytes, io.errno);
    }
    this.#waiting--;
  }

  /** The first sector that differs, as an offset, or null. Throws BdevError. */
  difference(): number | null {
    if (this.#error !== null) throw this.#error;
    const [a, b] = [this.#view(0), this.#view(1)];
    if (a.equals(b)) return null;
    let at = 0;
    while (a.subarray(at, at + 512).equals(b.subarray(at, at + 512))) at += 512;
    return this.start + at;
  }

  release(): void {
    for (const address of this.#addresses) this.#host.reactor.arena.release(address);
  }

  #view(disk: number): Buffer {
    const { buffer, byteOffset, length } = this.#host.reactor.arena.view8(this.#addresses[disk]!, this.#lengthBytes);
    return Buffer.from(buffer, byteOffset, length);
  }
}
