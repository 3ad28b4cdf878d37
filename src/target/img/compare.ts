/**
 * `strata img compare`: whether two images hold the same disk. Exits with 0 when they do, 1 when they do not, 2 when that could not be
 * found out.
 */
import { BdevIo, IoStatus, IoType } from '../../bdev/bdev-io.js';
import type { IoOwner } from '../../bdev/bdev-io.js';
import type { BdevError, OpenBdev } from '../../bdev/bdev.js';
import { DiskHost, requestError } from './disk-host.js';
import { wholeSectors } from './disk-map.js';
import type { DiskExtent } from './disk-map.js';
import { openSource } from './disk-source.js';
import type { DiskSource, SourceOptions } from './disk-source.js';
import { isDirect } from './image-spec.js';
import { ProgressLine, print } from './words.js';

export interface CompareCommand extends SourceOptions {
  readonly format?: string;
  readonly secondFormat?: string;
  readonly strict?: boolean;
  readonly progress?: boolean;
  readonly quiet?: boolean;
  /** `-T`. */
  readonly sourceCache: string;
}

const PIECE_BYTES = 2 ** 20;
const PARALLEL = 8;

/** @returns the exit code. Rejects with BdevError. */
export async function compareCommand(firstName: string, secondName: string, command: CompareCommand): Promise<number> {
  const { strict = false, quiet = false } = command;
  const options = { ...command, direct: isDirect(command.sourceCache) };
  const say = (text: string): void => {
    if (!quiet) print(`${text}\n`);
  };
  const host = new DiskHost();
  const sources: DiskSource[] = [];
  try {
    const first = await openSource(host, firstName, command.format ?? null, options);
    sources.push(first);
    const second = await openSource(host, secondName, command.secondFormat ?? null, options);
    sources.push(second);
    if (first.sizeBytes !== second.sizeBytes) {
      say(strict ? 'Strict mode: Image size mismatch!' : 'Warning: Image size mismatch!');
      if (strict) return 1;
    }
    const progress = new ProgressLine(command.progress === true && !quiet);
    const problem = findDifference(host, [first, second], strict, (done) => progress.update(done));
    progress.end();
    say(problem ?? 'Images are identical.');
    return problem === null ? 0 : 1;
  } finally {
    host.close();
    for (const source of sources) source.close();
  }
}

type Sources = readonly [DiskSource, DiskSource];

/** What differs first, in words, or null. */
function findDifference(
  host: DiskHost,
  sources: Sources,
  strict: boolean,
  onProgress: (fraction: number) => void,
): string | null {
  const disks = sources.map((source) => source.open());
  const windows: Window[] = [];
  for (let i = 0; i < PARALLEL; i++) windows.push(new Window(host, disks, sources));
  try {
    return search(host, windows, sources, strict, onProgress);
  } finally {
    // What is in flight writes to the windows' memory.
    for (const window of windows) host.run(() => window.isDone);
    for (const window of windows) window.release();
  }
}

function search(
  host: DiskHost,
  windows: readonly Window[],
  sources: Sources,
  strict: boolean,
  onProgress: (fraction: number) => void,
): string | null {
  const size = Math.max(sources[0].sizeBytes, sources[1].sizeBytes);
  const busy: Window[] = [];
  const settle = (): string | null => {
    const window = busy.shift()!;
    host.run(() => window.isDone);
    const at = window.difference();
    onProgress(window.start / size);
    return at === null ? null : `Content mismatch at offset ${at}!`;
  };
  let turn = 0;
  for (const pair of pairsOf(sources)) {
    if (strict && isPresent(pair.a) !== isPresent(pair.b)) {
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
function* pairsOf([first, second]: Sources): Generator<Pair> {
  const maps = [wholeSectors(first.extents()), wholeSectors(second.extents())] as const;
  const extents: [DiskExtent | null, DiskExtent | null] = [null, null];
  const size = Math.max(first.sizeBytes, second.sizeBytes);
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
  readonly #sources: Sources;
  readonly #ios = [new BdevIo(), new BdevIo()] as const;
  readonly #addresses: number[];

  constructor(host: DiskHost, disks: readonly OpenBdev[], sources: Sources) {
    this.#host = host;
    this.#disks = disks;
    this.#sources = sources;
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
      this.#error ??= requestError('read', this.#sources[disk]!.path, io.offsetBytes, io.errno);
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
