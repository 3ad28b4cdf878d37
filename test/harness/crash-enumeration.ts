/**
 * Rung 6 of docs/testing.md: every sequence of a few operations on a tiny volume, a crash at every request and completion of
 * the devices below, and every image that the devices may be left with; opened again, the volume holds what it may.
 *
 *     const coverage = crashEnumeration({ diskBytes: [4096], stack: ([path]) => [simDisk('leaf', path)], sectors: 8 });
 *
 * A module joins with its stack. Where there are more images of one crash than `imagesMax`, the two extremes and an even sample
 * of the rest are tried; the answer says how often. The same image with the same legal values is tried once.
 */
import { createHash } from 'node:crypto';
import { SeededRandom } from '../../src/poller/clock.js';
import { Oracle, Violation, valueOf } from '../sim/oracle.js';
import { SECTOR_BYTES, SimDisk } from '../sim/sim-disk.js';
import { Died, SimLife, SimMachine } from './sim-machine.js';
import type { MemoryFiles, Stack } from './sim-machine.js';
import { Volume, readAll } from './volume.js';
import type { Operation } from './volume.js';

export interface CrashOptions {
  /** Sizes of the disks below. */
  readonly diskBytes: readonly number[];
  /** What the disks hold at first; zeroes when left out. */
  readonly images?: readonly Uint8Array[];
  readonly stack: Stack;
  /** Size of the volume. */
  readonly sectors: number;
  /** Default OPERATIONS. */
  readonly operations?: readonly Operation[];
  /** Operations of a sequence at most. Default 3. */
  readonly length?: number;
  /** Operations are submitted all at once, else one after the other. */
  readonly together?: boolean;
  /** Images tried of one crash. Default 32. */
  readonly imagesMax?: number;
  /** Moments of an opening at which the process dies at most, evenly over it. Default: all. */
  readonly openingsMax?: number;
  /** Looks at the disks as a crash left them, before they are opened, and when they were opened and closed. Throws Violation. */
  readonly verify?: (disks: readonly Uint8Array[]) => void;
}

/** What was covered. */
export interface CrashCoverage {
  sequences: number;
  /** Moments at which power or process ended. */
  crashes: number;
  /** Images that were opened and read, each different in contents or in what is legal. */
  images: number;
  /** Crashes of which not every image was tried. */
  sampled: number;
  /** Crashes while a volume was being opened. */
  openings: number;
}

/** On a volume of eight sectors: two places apart, one across both, and what orders them. */
export const OPERATIONS: readonly Operation[] = [
  { name: 'write a', type: 'write', sector: 0, sectors: 3 },
  { name: 'write b', type: 'write', sector: 4, sectors: 3 },
  { name: 'overwrite', type: 'write', sector: 2, sectors: 4 },
  { name: 'write through', type: 'write', sector: 1, sectors: 3, fua: true },
  { name: 'flush', type: 'flush' },
  { name: 'discard', type: 'discard', sector: 0, sectors: 8 },
  { name: 'zero', type: 'writeZeroes', sector: 3, sectors: 2 },
];

const SEED = 1;
/** Ways in which a change that was with the kernel may have happened. */
const PARTS: readonly ((sectors: number) => number)[] = [
  () => 0,
  (sectors) => Math.ceil(sectors / 2),
  (sectors) => sectors,
];

/** Throws Violation, which names the sequence and the crash. */
export function crashEnumeration(options: CrashOptions): CrashCoverage {
  const enumeration = new Enumeration(options);
  enumeration.run();
  return enumeration.coverage;
}

class Enumeration {
  readonly coverage: CrashCoverage = { sequences: 0, crashes: 0, images: 0, sampled: 0, openings: 0 };
  readonly #options: CrashOptions;
  readonly #seen = new Set<string>();
  readonly #random = new SeededRandom(SEED);

  constructor(options: CrashOptions) {
    this.#options = options;
  }

  run(): void {
    const { operations = OPERATIONS, length = 3 } = this.#options;
    let sequences: Operation[][] = [[]];
    for (let count = 1; count <= length; count++) {
      sequences = sequences.flatMap((sequence) => operations.map((operation) => [...sequence, operation]));
      for (const sequence of sequences) this.#sequence(sequence);
    }
  }

  #sequence(sequence: readonly Operation[]): void {
    this.coverage.sequences++;
    // Crashes before the last operation are those of the shorter sequence.
    const from = this.#options.together === true ? 1 : this.#eventsOf(sequence.slice(0, -1)) + 1;
    const to = this.#eventsOf(sequence) + 1;
    for (let diesAt = from; diesAt <= to; diesAt++) {
      this.#crash(sequence, diesAt, 'powerCut', PARTS[2]!);
      for (const part of PARTS) this.#crash(sequence, diesAt, 'kill', part);
    }
  }

  /** Submissions and completions of a sequence that nothing disturbs. */
  #eventsOf(sequence: readonly Operation[]): number {
    const machine = this.#machine();
    const life = new SimLife(machine, this.#options.stack, { seed: SEED });
    this.#perform(new Volume(life, new Oracle(this.#options.sectors)), sequence);
    const { events } = life;
    life.close();
    machine.close();
    return events;
  }

  #crash(
    sequence: readonly Operation[],
    diesAt: number,
    end: 'kill' | 'powerCut',
    part: (sectors: number) => number,
  ): void {
    this.coverage.crashes++;
    const machine = this.#machine();
    const oracle = new Oracle(this.#options.sectors);
    let life: SimLife | null = null;
    try {
      life = new SimLife(machine, this.#options.stack, { seed: SEED, diesAt });
      this.#perform(new Volume(life, oracle), sequence);
    } catch (error) {
      if (!(error instanceof Died)) throw named(error, sequence, `at ${diesAt}`);
    }
    life?.kill(part);
    const legal = oracle.legalAfter(end);
    try {
      if (end === 'kill') this.#check(machine.disks, legal, machine.memory());
      else this.#checkImages(machine.disks, legal);
    } catch (error) {
      throw named(error, sequence, `${end} before event ${diesAt}`);
    }
    machine.close();
  }

  #perform(volume: Volume, sequence: readonly Operation[]): void {
    if (this.#options.together === true) volume.runTogether(...sequence);
    else volume.run(...sequence);
  }

  #machine(): SimMachine {
    const { diskBytes, images } = this.#options;
    return new SimMachine(diskBytes.map((bytes, i) => new SimDisk(bytes, images?.[i])));
  }

  /** Checks what the disks may be left with after a power cut: every choice for every sector that is not settled, or a sample. */
  #checkImages(disks: readonly SimDisk[], legal: readonly (readonly number[])[]): void {
    const { imagesMax = 32 } = this.#options;
    const open = disks.flatMap((disk, i) =>
      [...disk.unsettled()].map(([sector, candidates]) => ({ disk: i, sector, candidates })),
    );
    const total = open.reduce((product, { candidates }) => product * candidates.length, 1);
    const tried = Math.min(total, imagesMax);
    if (tried < total) this.coverage.sampled++;
    for (let n = 0; n < tried; n++) {
      const images = disks.map((disk) => disk.durableImage());
      let rest = n;
      for (const { disk, sector, candidates } of open) {
        // All of them in turn; or the oldest, the newest, and any.
        const choice =
          tried === total
            ? rest % candidates.length
            : n < 2
              ? n * (candidates.length - 1)
              : this.#random.below(candidates.length);
        rest = Math.floor(rest / candidates.length);
        images[disk]!.set(candidates[choice]!, sector * SECTOR_BYTES);
      }
      this.#check(
        images.map((image, i) => new SimDisk(disks[i]!.sizeBytes, image)),
        legal,
      );
    }
  }

  /** Opens the volume on the disks as they are, and compares; also when the process dies while it opens it. */
  #check(disks: readonly SimDisk[], legal: readonly (readonly number[])[], memory: MemoryFiles = new Map()): void {
    const hash = createHash('sha1').update(JSON.stringify(legal));
    for (const { view } of disks) hash.update(view);
    for (const bytes of memory.values()) hash.update(bytes);
    const key = hash.digest('base64');
    if (this.#seen.has(key)) return;
    this.#seen.add(key);
    this.coverage.images++;
    this.#options.verify?.(disks.map(({ view }) => view));
    const found = this.#readBack(disks.map(copyOf), legal, memory);
    const { openingsMax = Infinity } = this.#options;
    const step = Math.max(1, found.openingEvents / openingsMax);
    // Another moment first each time, so that all have their turn.
    const first = 1 + (this.coverage.images % Math.ceil(step));
    for (let moment = first; moment <= found.openingEvents; moment += step) {
      const diesAt = Math.floor(moment);
      this.coverage.openings++;
      const again = disks.map(copyOf);
      const machine = new SimMachine(again, memory);
      try {
        new SimLife(machine, this.#options.stack, { seed: SEED, diesAt }).kill();
      } catch (error) {
        if (!(error instanceof Died)) throw error;
      }
      // What outlives a kill is taken along into the next life, or lost with the power where it was not needed any more.
      const left = machine.memory();
      machine.close();
      if (memory.size > 0) {
        this.#readBack(again, legal, left);
        continue;
      }
      for (const disk of again) disk.powerCut(this.#random);
      this.#readBack(again, legal);
    }
  }

  /** Opens, reads and closes, twice: both must find the same. Returns what opening took. */
  #readBack(
    disks: readonly SimDisk[],
    legal: readonly (readonly number[])[],
    memory: MemoryFiles = new Map(),
  ): { openingEvents: number } {
    const machine = new SimMachine(disks, memory);
    const contents: Uint32Array[] = [];
    let openingEvents = 0;
    for (let i = 0; i < 2; i++) {
      const life = new SimLife(machine, this.#options.stack, { seed: SEED });
      if (i === 0) openingEvents = life.events;
      contents.push(readAll(life, this.#options.sectors));
      life.close();
    }
    this.#options.verify?.(disks.map(({ view }) => view));
    machine.close();
    const [words, wordsAgain] = contents as [Uint32Array, Uint32Array];
    if (Buffer.compare(Buffer.from(words.buffer), Buffer.from(wordsAgain.buffer)) !== 0) {
      throw new Violation('the volume holds something else when it is opened once more');
    }
    legal.forEach((values, sector) => {
      const value = valueOf(sector, words, (sector * SECTOR_BYTES) / 4);
      if (!values.includes(value)) {
        throw new Violation(`sector ${sector} holds ${value}, it may hold ${values.join(', ')}`);
      }
    });
    return { openingEvents };
  }
}

/** A disk with the same contents, all of them durable. */
function copyOf(disk: SimDisk): SimDisk {
  return new SimDisk(disk.sizeBytes, disk.view);
}

function named(error: unknown, sequence: readonly Operation[], where: string): Error {
  if (!(error instanceof Error)) return new Error(String(error));
  error.message = `[${sequence.map(({ name }) => name).join(', ')}] ${where}: ${error.message}`;
  return error;
}
