/**
 * Goal: a dirty bitmap outlives the kill of its process, wherever that meets it, with all that was written; after a loss of power, or
 * when another program has written to the image, it is inconsistent; and so it is when a backup was taking its contents.
 *
 * Method: a process on simulated disks is killed before each of its requests and completions, and the next one says what the bitmap has.
 */
import { describe, expect, it } from 'vitest';
import { qcow2On } from '../bdev/stacks.js';
import { Oracle } from '../sim/oracle.js';
import { SimDisk } from '../sim/sim-disk.js';
import { newImage, qcow2Stack, qcow2WithoutLog } from './qcow2.js';
import { Died, SimLife, SimMachine, simDisk } from './sim-machine.js';
import type { Stack } from './sim-machine.js';
import { Volume } from './volume.js';
import type { Operation } from './volume.js';

const TIMEOUT_MS = 120_000;
const SECTORS = 128;
const FILE_BYTES = 262144;
const GRANULARITY = 4096;
const WRITES: readonly Operation[] = [1, 40, 90].map((sector) => {
  return { name: `write at ${sector}`, type: 'write', sector, sectors: 9 };
});

/** Bytes that some writes make dirty. */
function dirtyBytesOf(writes: readonly Operation[]): number {
  const units = new Set<number>();
  for (const write of writes) {
    if (write.type !== 'write') continue;
    for (let i = 0; i < write.sectors; i++) units.add(Math.floor(((write.sector + i) * 512) / GRANULARITY));
  }
  return units.size * GRANULARITY;
}

const image = newImage('cluster_size=512', SECTORS, FILE_BYTES);

interface BitmapFacts {
  readonly isRecording: boolean;
  readonly isInconsistent: boolean;
  readonly dirtyBytes: number | null;
}

/** An operation of an operator. @param isOver looked at until it is */
function call(operation: string, params: Record<string, unknown>, isOver: (life: SimLife) => boolean): Operation {
  return {
    name: operation,
    type: 'call',
    start: (life) => {
      life.perform(() => {
        // Death is told by the life itself.
        life.open.bdev.operate!(operation, params).catch(() => undefined);
      });
      return () => isOver(life);
    },
  };
}

const namesIn = (life: SimLife, what: 'bitmaps' | 'snapshots'): readonly string[] =>
  life.open.bdev.describe()[what] as string[];
const add = call('addBitmap', { bitmap: 'b', granularity: GRANULARITY }, (life) => namesIn(life, 'bitmaps').length > 0);
const snapshot = call('createSnapshot', { snapshot: 's' }, (life) => namesIn(life, 'snapshots').length > 0);

/** A machine whose image has the bitmap, clean. */
function machineWithBitmap(diskBytes: readonly number[] = []): SimMachine {
  const machine = new SimMachine([new SimDisk(FILE_BYTES, image), ...diskBytes.map((bytes) => new SimDisk(bytes))]);
  const life = new SimLife(machine, qcow2Stack, { seed: 1 });
  new Volume(life, new Oracle(SECTORS)).run(add);
  life.close();
  return machine;
}

/** Opens the disk and looks. */
async function bitmapOf(machine: SimMachine, stack: Stack = qcow2Stack): Promise<BitmapFacts> {
  const life = new SimLife(machine, stack, { seed: 1 });
  const [facts] = (await life.open.bdev.operate!('bitmaps', {})) as BitmapFacts[];
  life.close();
  return facts!;
}

describe('A dirty bitmap', () => {
  it('has what was written when its process is killed, at any moment', { timeout: TIMEOUT_MS }, async () => {
    const scenario = [WRITES[0]!, snapshot, WRITES[1]!, { name: 'flush', type: 'flush' }, WRITES[2]!] as const;
    let kept = 0;
    for (let diesAt = 1, hasEnded = false; !hasEnded; diesAt++) {
      const machine = machineWithBitmap();
      const begun: Operation[] = [];
      let life: SimLife | null = null;
      try {
        life = new SimLife(machine, qcow2Stack, { seed: 1, diesAt });
        const volume = new Volume(life, new Oracle(SECTORS));
        for (const operation of scenario) {
          volume.run(operation);
          // What was answered is in it, at least.
          begun.push(operation);
        }
        life.perform(() => undefined);
        hasEnded = true;
      } catch (error) {
        if (!(error instanceof Died)) throw error;
      }
      life?.kill();
      const { isInconsistent, isRecording, dirtyBytes } = await bitmapOf(machine);
      if (isInconsistent) throw new Error(`the bitmap is inconsistent after a kill before event ${diesAt}`);
      expect(isRecording).toBe(true);
      expect(dirtyBytes, `killed before event ${diesAt}`).toBeGreaterThanOrEqual(dirtyBytesOf(begun));
      // Not more than was written, either.
      expect(dirtyBytes).toBeLessThanOrEqual(dirtyBytesOf(WRITES));
      // It goes on from there, also when it is stored in the image in between.
      expect(await bitmapOf(machine)).toMatchObject({ isInconsistent: false, dirtyBytes });
      kept++;
      machine.close();
    }
    expect(kept).toBeGreaterThan(50);
  });

  it('is inconsistent after a loss of power, a foreign writer, and without a log', async () => {
    for (const end of ['power', 'foreigner', 'no log'] as const) {
      const machine = machineWithBitmap();
      const life = new SimLife(machine, qcow2Stack, { seed: 1 });
      new Volume(life, new Oracle(SECTORS)).run(WRITES[0]!);
      life.kill();
      const [disk] = machine.disks as readonly [SimDisk];
      const left = disk.view.slice();
      // What others clear that do not know it: the upper half of the autoclear bits.
      if (end === 'foreigner') left.fill(0, 88, 92);
      const memory = end === 'power' ? new Map<string, Buffer>() : machine.memory();
      machine.close();
      const next = new SimMachine([new SimDisk(FILE_BYTES, left)], memory);
      const facts = await bitmapOf(next, end === 'no log' ? qcow2WithoutLog : qcow2Stack);
      expect(facts, end).toMatchObject({ isInconsistent: true, isRecording: false });
      next.close();
    }
  });

  it('is inconsistent when a backup was taking what it has, and whole when that was over', async () => {
    const stack: Stack = ([path, target], memoryDir) => [
      simDisk('target', target!),
      simDisk('file', path!),
      qcow2On({ restartDir: memoryDir, codecThreads: 0 })('volume', 'file'),
    ];
    for (const isOver of [false, true]) {
      const machine = machineWithBitmap([SECTORS * 512]);
      const life = new SimLife(machine, stack, { seed: 1 });
      const volume = new Volume(life, new Oracle(SECTORS));
      const job = (): unknown => (life.open.bdev.describe()['job'] as { state: string } | null)?.state;
      const isTaken = (): boolean => namesIn(life, 'snapshots').length > 0;
      const backUp = call('backup', { target: 'target', bitmap: 'b' }, () =>
        isOver ? job() !== 'running' : isTaken(),
      );
      volume.run(WRITES[0]!, backUp);
      life.until(() => isOver || life.open.stats.inflight === 0, 'the edit');
      volume.run(WRITES[1]!);
      expect(job()).toBe(isOver ? 'done' : 'running');
      life.kill();
      const facts = await bitmapOf(machine, stack);
      if (isOver) expect(facts).toMatchObject({ isInconsistent: false, dirtyBytes: dirtyBytesOf([WRITES[1]!]) });
      else expect(facts).toMatchObject({ isInconsistent: true });
      machine.close();
    }
  });
});
