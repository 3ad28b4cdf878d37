/**
 * Rung 5 of docs/testing.md: a scenario is rerun with its Nth device request failing, N = 1, 2, ... until it passes untouched; by
 * EIO, ENOSPC and short transfers, once and for good. Nothing is lost that was answered, nothing hangs, nothing leaks; and when
 * the device is well again the volume works.
 *
 *     failNth({ diskBytes: [4096], stack: ([path]) => [simDisk('leaf', path)], sectors: 8, scenario: OPERATIONS });
 */
import { BdevError } from '../../src/bdev/bdev.js';
import { SimDisk } from '../sim/sim-disk.js';
import { Oracle, Violation } from '../sim/oracle.js';
import { SeededRandom } from '../../src/poller/clock.js';
import { IoStatus } from '../../src/bdev/bdev-io.js';
import type { Fault, SimRequest } from '../sim/sim-ring.js';
import { SimLife, SimMachine } from './sim-machine.js';
import type { Stack } from './sim-machine.js';
import { Volume } from './volume.js';
import type { Operation } from './volume.js';

export interface FailNthOptions {
  readonly diskBytes: readonly number[];
  readonly images?: readonly Uint8Array[];
  readonly stack: Stack;
  readonly sectors: number;
  readonly scenario: readonly Operation[];
  /** Operations are submitted all at once, else one after the other. */
  readonly together?: boolean;
  /** Default: all that a device may do to a module that promises nothing about it. */
  readonly faults?: readonly Fault[];
}

/** How much was tried, and what came of it. */
export interface FailNthCoverage {
  runs: number;
  /** Operations that failed. */
  failures: number;
}

const FAULTS: readonly Fault[] = ['eio', 'enospc', 'short', 'again'];
/** A scenario has fewer requests. */
const RUNS_MAX = 10_000;
const SEED = 1;

/** Throws Violation, which names the failing request. */
export function failNth(options: FailNthOptions): FailNthCoverage {
  const coverage: FailNthCoverage = { runs: 0, failures: 0 };
  for (const fault of options.faults ?? FAULTS) {
    // A request that is refused for ever is retried for ever.
    for (const forGood of fault === 'again' ? [false] : [false, true]) {
      let wasHit = true;
      for (let nth = 1; wasHit; nth++) {
        if (nth === RUNS_MAX) throw new Violation('the scenario has no end');
        coverage.runs++;
        try {
          wasHit = runOnce(options, fault, nth, forGood, coverage);
        } catch (error) {
          if (error instanceof Error)
            error.message = `${fault} at request ${nth}${forGood ? ' and later' : ''}: ${error.message}`;
          throw error;
        }
      }
    }
  }
  return coverage;
}

/** Returns whether the fault was met. */
function runOnce(
  options: FailNthOptions,
  fault: Fault,
  nth: number,
  forGood: boolean,
  coverage: FailNthCoverage,
): boolean {
  const { diskBytes, images, stack, sectors, scenario } = options;
  const machine = new SimMachine(diskBytes.map((bytes, i) => new SimDisk(bytes, images?.[i])));
  const oracle = new Oracle(sectors);
  let isWell = false;
  let hits = 0;
  const faultOf = ({ number }: { number: number }): Fault | null => {
    if (isWell || (forGood ? number < nth : number !== nth)) return null;
    hits++;
    return fault;
  };
  const all = { type: 'read', sector: 0, sectors } as const;
  const after: readonly Operation[] = [
    { ...all, name: 'read after the failure' },
    { ...all, name: 'write after the failure', type: 'write' },
    { name: 'flush after the failure', type: 'flush' },
    { ...all, name: 'read in the end' },
  ];
  const life = open(machine, stack, faultOf);
  if (life === null) {
    if (hits === 0) throw new Violation('the volume cannot be opened');
    coverage.failures++;
  } else {
    const volume = new Volume(life, oracle);
    const tickets = options.together === true ? volume.runTogether(...scenario) : volume.run(...scenario);
    const failed = tickets.filter(({ status }) => status !== IoStatus.success);
    coverage.failures += failed.length;
    if (failed.length > 0 && hits === 0) throw new Violation(`${failed[0]!.operation.name} failed without a reason`);
    isWell = true;
    for (const { status, operation } of volume.run(after[0]!))
      if (status !== IoStatus.success) throw new Violation(operation.name);
    life.close();
  }
  isWell = true;
  // What was promised before the failure holds over a power cut, and the volume can be used.
  for (const disk of machine.disks) disk.powerCut(new SeededRandom(nth));
  oracle.powerCut();
  const next = new SimLife(machine, stack, { seed: SEED });
  for (const { status, operation } of new Volume(next, oracle).run(...after)) {
    if (status !== IoStatus.success) throw new Violation(operation.name);
  }
  next.close();
  machine.close();
  return hits > 0;
}

/** Null: it says why it cannot. */
function open(machine: SimMachine, stack: Stack, fault: (request: SimRequest) => Fault | null): SimLife | null {
  try {
    return new SimLife(machine, stack, { seed: SEED, fault });
  } catch (error) {
    if (error instanceof BdevError) return null;
    throw error;
  }
}
