/**
 * Goal: the delay filter holds each completion for as long as its type says and no longer, out of order when there is jitter, and
 * gives everything back at a reset.
 *
 * Method: simulated time, so that it is exact.
 */
import { afterEach, describe, expect, it } from 'vitest';
import type { DelayConfig } from '../../src/bdev/delay/delay.js';
import { IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { Disk } from '../support/disk.js';
import type { Request } from '../support/disk.js';
import { Rig } from '../support/rig.js';
import * as make from './stacks.js';

/** Simulated time passes in steps of at most this, see Rig. */
const STEP_US = 25;

let disk: Disk;

function open(options: Partial<DelayConfig>, ...above: make.Filter[]): void {
  disk = new Disk(new Rig('delay'), make.stack(make.malloc(), make.delay(options), ...above).configs);
}

afterEach(() => {
  disk.close();
});

/** How long each request takes, in the order given, all started at once. */
function durationsUs(...requests: (() => Request)[]): number[] {
  const { clock } = disk.rig;
  const durations: number[] = [];
  disk.rig.step();
  const startUs = disk.rig.reactor.nowUs;
  const started = requests.map((start, i) => {
    const request = start();
    request.then = () => (durations[i] = clock.nowUs() - startUs);
    return request;
  });
  disk.finish(...started);
  return durations;
}

describe('each type', () => {
  it('takes its own time', () => {
    const times = { readUs: 500, writeUs: 1000, flushUs: 3000, discardUs: 200 };
    open(times);
    const durations = durationsUs(
      () => disk.start(IoType.read, 0, 4096),
      () => disk.startWrite(8192, fresh(4096)),
      () => disk.start(IoType.flush, 0, 0),
      () => disk.start(IoType.discard, 16384, 4096),
      () => disk.start(IoType.writeZeroes, 32768, 4096),
    );
    [500, 1000, 3000, 200, 1000].forEach((expectedUs, i) => {
      expect(durations[i]).toBeGreaterThanOrEqual(expectedUs);
      expect(durations[i]).toBeLessThan(expectedUs + 3 * STEP_US);
    });
  });

  it('is not held at all with a delay of 0', () => {
    open({ writeUs: 100 });
    const [durationUs] = durationsUs(() => disk.start(IoType.read, 0, 4096));
    expect(durationUs).toBeLessThanOrEqual(STEP_US);
  });

  it('delays a large request once, not piece by piece', () => {
    disk = new Disk(
      new Rig('delay'),
      make.stack(make.malloc(), make.limited({ maxTransferBytes: 4096 }), make.delay({ writeUs: 1000 })).configs,
    );
    const [durationUs] = durationsUs(() => disk.startWrite(0, fresh(2 ** 20)));
    expect(durationUs).toBeLessThan(1000 + 20 * STEP_US);
  });
});

describe('jitter', () => {
  it('lets requests complete out of order, each within its bounds', () => {
    open({ readUs: 100, jitterUs: 1000 });
    const order: number[] = [];
    const { reactor } = disk.rig;
    disk.rig.step();
    const startUs = reactor.nowUs;
    const durations: number[] = [];
    const reads = Array.from({ length: 100 }, (_, i) => {
      const read = disk.start(IoType.read, i * 512, 512);
      read.then = () => {
        order.push(i);
        durations.push(reactor.nowUs - startUs);
      };
      return read;
    });
    disk.finish(...reads);
    expect(order).not.toEqual([...order].sort((a, b) => a - b));
    expect(Math.min(...durations)).toBeGreaterThanOrEqual(100);
    expect(Math.max(...durations)).toBeLessThan(1100 + 3 * STEP_US);
    expect(Math.max(...durations) - Math.min(...durations)).toBeGreaterThan(500);
  });
});

describe('what is held', () => {
  it('is done already: a read sees a write that is not acknowledged', () => {
    open({ writeUs: 10_000 });
    const data = fresh(4096);
    const write = disk.startWrite(0, data);
    disk.rig.step();
    expectBytes(disk.read(0, 4096), data, 'read');
    expect(write.completions).toBe(0);
    disk.finish(write);
  });

  it('keeps its failure', () => {
    const rule = { type: 'read', action: 'fail', errno: 30, first: 1, count: 1 } as const;
    disk = new Disk(new Rig('delay'), make.stack(make.malloc(), make.error(rule), make.delay({ readUs: 200 })).configs);
    const read = disk.start(IoType.read, 0, 4096);
    disk.rig.pass(100);
    expect(read.completions).toBe(0);
    disk.finish(read);
    expect([read.status, read.errno]).toEqual([IoStatus.ioError, 30]);
  });

  it('is aborted by a reset, long before its time', () => {
    open({ readUs: 1e9, writeUs: 1e9, flushUs: 1e9 });
    const requests = [
      disk.start(IoType.read, 0, 4096),
      disk.startWrite(8192, fresh(4096)),
      disk.start(IoType.flush, 0, 0),
    ];
    disk.rig.pass(1000);
    const reset = disk.start(IoType.reset, 0, 0);
    const before = disk.rig.steps;
    disk.finish(reset, ...requests);
    expect(disk.rig.steps - before).toBeLessThan(10);
    expect(reset.status).toBe(IoStatus.success);
    for (const request of requests) expect(request.status).toBe(IoStatus.aborted);
    // Nothing is left to fire.
    disk.rig.clock.advance(2e9);
    disk.rig.step();
    for (const request of requests) expect(request.completions).toBe(1);
  });
});
