/**
 * Goal: filters allocate nothing per request at steady state.
 *
 * Method: after a warm-up, 100,000 requests in a closed loop on a null disk, while garbage collections are counted and the growth
 * of the heap is measured: a single boxed number per request would show as 16 bytes. What is boxed once per step, where the engine chose not to inline,
 * is a part of that.
 */
import { GCProfiler } from 'node:v8';
import { describe, expect, it } from 'vitest';
import { IoType } from '../../src/bdev/bdev-io.js';
import { Mirror } from '../../src/bdev/mirror/mirror.js';
import { Load } from '../support/load.js';
import { Rig } from '../support/rig.js';
import * as make from './stacks.js';

const REQUESTS = 100_000;
const DEPTH = 64;
/** The engine compiles and recompiles for a while: the best of some rounds counts. */
const ROUNDS_MAX = 15;
const BYTES_PER_REQUEST_MAX = 12;
/** Simulated time per step: with the depth it makes more than a million requests a second. */
const STEP_US = 20;

/** Bytes allocated per request in one round; Infinity when garbage was collected meanwhile. */
function bytesPerRequest(rig: Rig, reads: Load, writes: Load): number {
  const goal = reads.done + writes.done + REQUESTS;
  const profiler = new GCProfiler();
  profiler.start();
  const before = process.memoryUsage().heapUsed;
  while (reads.done + writes.done < goal) {
    rig.clock.advance(STEP_US);
    rig.reactor.step();
  }
  const grownBytes = process.memoryUsage().heapUsed - before;
  return profiler.stop().statistics.length > 0 ? Infinity : grownBytes / REQUESTS;
}

function leastBytesPerRequest(stack: make.Stack): number {
  const rig = new Rig('allocation');
  const disk = rig.open(stack.configs);
  const memory = rig.arena.allocate(4096);
  const load = (type: IoType): Load =>
    new Load(rig.reactor, disk.channel, { type, lengthBytes: 4096, depth: DEPTH, memory });
  const reads = load(IoType.read);
  const writes = load(IoType.write);
  reads.start();
  writes.start();
  let least = Infinity;
  for (let round = 0; round < ROUNDS_MAX && least > BYTES_PER_REQUEST_MAX; round++) {
    least = Math.min(least, bytesPerRequest(rig, reads, writes));
  }
  reads.stop();
  writes.stop();
  rig.until(() => reads.inflight + writes.inflight === 0, 'the last requests');
  disk.close();
  rig.arena.release(memory);
  rig.close();
  return least;
}

const { delay, error, passthru, qos, stack } = make;
const disk = make.nulled(false);

describe('a request allocates nothing', () => {
  it.each([
    ['without a filter', stack(disk)],
    ['in passthru', stack(disk, passthru)],
    ['in delay, held', stack(disk, delay({ readUs: 30, writeUs: 50 }))],
    ['in delay, with jitter', stack(disk, delay({ jitterUs: 100 }))],
    [
      'in error, with rules that count it',
      stack(disk, error({ type: 'any', action: 'fail', first: 1e12, count: null })),
    ],
    ['in error, when it fails', stack(disk, error({ type: 'write', action: 'fail', first: 1, count: null }))],
    ['in qos, without limits', stack(disk, qos())],
    ['in qos, when it does not wait', stack(disk, qos({ totalIops: 1e9, totalBytesPerSecond: 1e13, burstSeconds: 1 }))],
    ['in qos, when it waits', stack(disk, qos({ totalIops: 1e6, readBytesPerSecond: 2e9, burstSeconds: 0.001 }))],
    ['in all of them', stack(disk, delay({ readUs: 20 }), error(), qos({ totalIops: 1e6 }), passthru)],
  ])('%s', (_, stack) => {
    expect(leastBytesPerRequest(stack)).toBeLessThan(BYTES_PER_REQUEST_MAX);
  });

  it('in qcow2, where the disk is mapped', () => {
    const image = make.qcow2('preallocation=metadata');
    expect(leastBytesPerRequest(image)).toBeLessThan(BYTES_PER_REQUEST_MAX);
    image.release();
  });

  it('in a mirror, on both legs', () => {
    const rig = new Rig('allocation');
    const source = rig.open([...disk.configs, { ...disk.configs[0]!, name: 'target' }].reverse());
    let way = source.channel;
    const user = {
      name: 'test',
      open: source,
      route: (channel: typeof way) => void (way = channel),
      moveTo: () => undefined,
    };
    const { registry, reactor } = rig;
    const mirror = new Mirror({ user, registry, reactor, target: 'target', bytesPerSecond: 0 });
    rig.until(() => mirror.info.state === 'ready', 'the mirror');
    const memory = rig.arena.allocate(4096);
    const load = (type: IoType, depth: number): Load =>
      new Load(reactor, way, { type, lengthBytes: 4096, depth, memory });
    // All at one place: so writes wait for each other, too.
    const [reads, writes] = [load(IoType.read, DEPTH), load(IoType.write, 4)];
    reads.start();
    writes.start();
    let least = Infinity;
    for (let round = 0; round < ROUNDS_MAX && least > BYTES_PER_REQUEST_MAX; round++) {
      least = Math.min(least, bytesPerRequest(rig, reads, writes));
    }
    expect(least).toBeLessThan(BYTES_PER_REQUEST_MAX);
    expect(writes.done).toBeGreaterThan(1000);
    reads.stop();
    writes.stop();
    rig.until(() => reads.inflight + writes.inflight === 0, 'the last requests');
    void mirror.cancel();
    rig.until(() => registry.writerOf('target') === null, 'the end of the mirror');
    source.close();
    rig.arena.release(memory);
    rig.close();
  });

  it('and one that does is noticed', () => {
    const rig = new Rig('allocation');
    const kept: object[] = [];
    const wasteful = { push: (n: number) => kept.push({ n }), pop: () => kept.pop() };
    const reads = { done: 0 } as Load;
    const writes = { done: 0 } as Load;
    const step = rig.reactor.step.bind(rig.reactor);
    rig.reactor.step = () => {
      wasteful.push(reads.done++ + 0.5);
      wasteful.pop();
      return step();
    };
    expect(bytesPerRequest(rig, reads, writes)).toBeGreaterThan(BYTES_PER_REQUEST_MAX);
    rig.close();
  });
});
