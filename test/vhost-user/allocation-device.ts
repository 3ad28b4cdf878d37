/**
 * The device of allocation.test.ts, a process of its own: serves one disk, and on demand counts what its heap went through
 * meanwhile. Run by node with --expose-gc; speaks by process messages.
 */
import { GCProfiler } from 'node:v8';
import { check, native } from '../../native/index.js';
import { PollPhase } from '../../src/poller/poller.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { LocalDevice } from '../frontend/local-device.js';

/** What the test may ask for: to be told of the next so many requests. */
export interface Order {
  readonly requests: number;
}

/** What it hears: that it may go ahead, and what came of it. */
export type Report =
  | { readonly socketPath: string }
  | { readonly began: true }
  | { readonly collections: number; readonly grownBytes: number };

const [module = 'null', waste = 'no'] = process.argv.slice(2);
const DISK_BYTES = 2 ** 24;

const disk = { name: 'disk', module, sizeBytes: DISK_BYTES, blockSizeBytes: 512, readZeroes: false };
const device = new LocalDevice([disk], {}, 'adaptive');
device.reactor.watchEventLoop(check(native.eventLoopFd(), 'find the event loop'));
const collectGarbage = globalThis.gc!;
const { stats } = device.controller;

const report = (message: Report, sent?: () => void): void => void process.send!(message, undefined, undefined, sent);

/** Serves so many requests without a look at the event loop, whose turns allocate, and counts what they cost. */
function measure(requests: number): Report {
  const goal = stats[ControllerStat.requests]! + requests;
  collectGarbage();
  const profiler = new GCProfiler();
  profiler.start();
  const heapBytes = process.memoryUsage().heapUsed;
  while (stats[ControllerStat.requests]! < goal) device.reactor.runSlice();
  const grownBytes = process.memoryUsage().heapUsed - heapBytes;
  return { collections: profiler.stop().statistics.length, grownBytes };
}

if (waste === 'waste') {
  let seen = 0;
  const kept: object[] = [];
  // One small object per request: the least that a slip on the data path would cost.
  const poll = (): boolean => {
    for (; seen < stats[ControllerStat.requests]!; seen++) kept[seen & 7] = { seen };
    return false;
  };
  device.reactor.addPoller({ poll }, PollPhase.publish);
}

process.on('message', ({ requests }: Order) => {
  report({ began: true }, () => report(measure(requests)));
});
process.on('disconnect', () => void device[Symbol.asyncDispose]().then(() => process.exit()));

function loop(): void {
  device.reactor.runSlice();
  setImmediate(loop);
}
report({ socketPath: device.socketPath });
setImmediate(loop);
