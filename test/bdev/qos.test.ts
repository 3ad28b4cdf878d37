/**
 * Goal: the qos filter keeps disks within their limits, neither above nor below, lets bursts through, divides a group's limits
 * evenly, and never keeps a request for ever.
 *
 * Method: closed loops of requests on null disks and simulated time. Over any time T, from rest, at most depth + rate * T may
 * pass, plus one request that goes into debt; and while requests wait no less than rate * T, less what one step is late by.
 */
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { BdevError } from '../../src/bdev/bdev.js';
import { IoFlag, IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import type { QosBdev, QosConfig, QosLimits } from '../../src/bdev/qos/qos.js';
import { fresh } from '../support/bytes.js';
import { Disk, Request } from '../support/disk.js';
import { Load } from '../support/load.js';
import type { LoadOptions } from '../support/load.js';
import { Rig } from '../support/rig.js';
import type { OpenDisk } from '../support/rig.js';
import { seed } from '../support/seed.js';
import * as make from './stacks.js';

const SECOND_US = 1e6;
const MEMORY_BYTES = 2 ** 20;
const { read, write } = IoType;

/** Disks named d0, d1, ... each a qos over a null disk, with loads on them. */
class Disks {
  readonly rig = new Rig('qos');
  readonly memory = this.rig.arena.allocate(MEMORY_BYTES);
  readonly open: OpenDisk[];
  readonly #loads: Load[] = [];

  constructor(...options: Partial<QosConfig>[]) {
    this.open = options.map((option, i) => {
      const leaf = { ...make.nulled(false).configs[0]!, name: `leaf${i}` };
      return this.rig.open([leaf, this.config(i, option)]);
    });
  }

  config(i: number, options: Partial<QosConfig>): BdevConfig {
    return make.qos(options)(`d${i}`, `leaf${i}`);
  }

  bdev(i: number): QosBdev {
    return this.open[i]!.bdev as QosBdev;
  }

  load(i: number, type: IoType, lengthBytes = 4096, depth = 32): Load {
    const options: LoadOptions = { type, lengthBytes, depth, memory: this.memory };
    const load = new Load(this.rig.reactor, this.open[i]!.channel, options);
    this.#loads.push(load);
    load.start();
    return load;
  }

  /** What each load completes in `us`. */
  measure(us: number, ...loads: Load[]): number[] {
    const before = loads.map((load) => load.done);
    this.rig.pass(us);
    return loads.map((load, i) => load.done - before[i]!);
  }

  close(): void {
    for (const load of this.#loads) load.stop();
    // What waits for hours comes back by a reset.
    for (const { channel, bdev } of this.open) {
      const reset = new Request();
      reset.io.prepare(IoType.reset, 0, 0, 0);
      reset.io.push(reset, 0);
      channel.submit(reset.io);
      this.rig.until(() => reset.completions === 1, `reset of ${bdev.name}`);
    }
    for (const disk of this.open) disk.close();
    this.rig.arena.release(this.memory);
    this.rig.close();
  }
}

let disks: Disks;
let single: Disk | null = null;

function open(...options: Partial<QosConfig>[]): Disks {
  disks = new Disks(...options);
  return disks;
}

/** One disk whose requests are made one by one. */
function openDisk(options: Partial<QosConfig>, ...below: make.Filter[]): Disk {
  disks = new Disks();
  single = new Disk(new Rig('qos'), make.stack(make.malloc(), ...below, make.qos(options)).configs);
  return single;
}

afterEach(() => {
  single?.close();
  single = null;
  disks.close();
});

const noLimits: QosLimits = {
  readIops: 0,
  writeIops: 0,
  totalIops: 0,
  readBytesPerSecond: 0,
  writeBytesPerSecond: 0,
  totalBytesPerSecond: 0,
  burstSeconds: 0.001,
};

/** Within `percent` of each other. */
function expectClose(actual: number, expected: number, percent: number): void {
  expect(actual).toBeGreaterThan(expected * (1 - percent / 100));
  expect(actual).toBeLessThan(expected * (1 + percent / 100));
}

describe('a limit', () => {
  const cases = [
    { limit: { readIops: 1000 }, type: read, lengthBytes: 4096, perSecond: 1000 },
    { limit: { writeIops: 700 }, type: write, lengthBytes: 65536, perSecond: 700 },
    { limit: { totalIops: 5000 }, type: read, lengthBytes: 512, perSecond: 5000 },
    { limit: { totalIops: 5000 }, type: write, lengthBytes: 512, perSecond: 5000 },
    { limit: { readBytesPerSecond: 8e6 }, type: read, lengthBytes: 4096, perSecond: 8e6 / 4096 },
    { limit: { writeBytesPerSecond: 64e6 }, type: write, lengthBytes: 262144, perSecond: 64e6 / 262144 },
    { limit: { totalBytesPerSecond: 16e6 }, type: write, lengthBytes: 8192, perSecond: 16e6 / 8192 },
    { limit: { readIops: 4000, totalBytesPerSecond: 8e6 }, type: read, lengthBytes: 4096, perSecond: 8e6 / 4096 },
    { limit: { readIops: 500, totalBytesPerSecond: 8e6 }, type: read, lengthBytes: 4096, perSecond: 500 },
  ];
  for (const { limit, type, lengthBytes, perSecond } of cases) {
    const what = type === read ? 'reads' : 'writes';
    it(`${JSON.stringify(limit)} is what ${what} of ${lengthBytes} bytes get, no more and no less`, () => {
      open(limit);
      const load = disks.load(0, type, lengthBytes);
      disks.measure(SECOND_US / 10, load);
      const [done] = disks.measure(2 * SECOND_US, load);
      expectClose(done!, 2 * perSecond, 1);
    });
  }

  it('on reads leaves writes alone, and the other way round', () => {
    for (const [limit, type] of [
      [{ readIops: 10 }, write],
      [{ readBytesPerSecond: 1e5 }, write],
      [{ writeIops: 10 }, read],
      [{ writeBytesPerSecond: 1e5 }, read],
    ] as const) {
      open(limit);
      const slow = disks.load(0, type === read ? write : read);
      const free = disks.load(0, type);
      const [slowly, freely] = disks.measure(SECOND_US / 10, slow, free);
      expect(slowly).toBeLessThan(10);
      expect(freely).toBeGreaterThan(10_000);
      disks.close();
    }
    open();
  });

  it('on both together is shared by reads and writes by what they cost', () => {
    open({ totalBytesPerSecond: 64e6 });
    const reads = disks.load(0, read, 4096);
    const writes = disks.load(0, write, 262144, 4);
    disks.measure(SECOND_US / 10, reads, writes);
    const [small, large] = disks.measure(2 * SECOND_US, reads, writes);
    expectClose(small! * 4096, 64e6, 2);
    expectClose(large! * 262144, 64e6, 2);
  });

  it('of nothing at all lets everything pass at once', () => {
    const disk = openDisk({});
    for (let i = 0; i < 100; i++) {
      disk.forget();
      expect(disk.run(IoType.write, 0, 2 ** 20)).toBe(IoStatus.success);
    }
    expect(disk.rig.reactor.nowUs - 1e12).toBeLessThan(10_000);
  });
});

describe('a burst', () => {
  it('of the depth of the bucket passes at once after rest, and one request by debt', () => {
    open({ totalIops: 1000, burstSeconds: 2 });
    const load = disks.load(0, read, 512, 4000);
    disks.rig.step();
    expect(load.done).toBe(2001);
    const [done] = disks.measure(SECOND_US, load);
    expectClose(done!, 1000, 1);
  });

  it('is not saved up beyond the depth', () => {
    open({ totalIops: 1000, burstSeconds: 0.1 });
    disks.rig.clock.advance(3600 * SECOND_US);
    const load = disks.load(0, read, 512, 4000);
    disks.rig.step();
    expect(load.done).toBe(101);
  });

  it('may be none: requests then pass one by one', () => {
    open({ totalIops: 1000, burstSeconds: 0 });
    const load = disks.load(0, read, 512, 32);
    const [done] = disks.measure(2 * SECOND_US, load);
    // The timer fires up to one step late each time.
    expect(done).toBeGreaterThan(1800);
    expect(done).toBeLessThanOrEqual(2001);
  });
});

describe('a request larger than the bucket', () => {
  it('passes by debt, and the next one waits until it is paid', () => {
    const disk = openDisk({ totalBytesPerSecond: 65536, burstSeconds: 0.5 });
    const first = disk.startWrite(0, fresh(2 ** 20));
    disk.rig.step();
    expect(first.completions).toBe(1);
    const second = disk.start(read, 0, 512);
    // 1 MiB less the 32 KiB that were in the bucket.
    disk.rig.clock.advance(15.4 * SECOND_US);
    disk.rig.step();
    expect(second.completions).toBe(0);
    disk.rig.clock.advance(0.2 * SECOND_US);
    disk.finish(second);
    expect(second.status).toBe(IoStatus.success);
  });
});

describe('order', () => {
  it('is kept among reads and among writes', () => {
    const disk = openDisk({ readIops: 500, writeIops: 300, totalBytesPerSecond: 4e6, burstSeconds: 0.01 });
    const order = { [read]: [] as number[], [write]: [] as number[] };
    const requests = Array.from({ length: 60 }, (_, i) => {
      const type = i % 3 === 0 ? write : read;
      const request = disk.start(type, i * 65536, 512 * (1 + ((i * 37) % 60)));
      request.then = () => order[type].push(i);
      return request;
    });
    disk.finish(...requests);
    for (const numbers of Object.values(order)) expect(numbers).toEqual([...numbers].sort((a, b) => a - b));
    expect(order[read]).toHaveLength(40);
  });

  it('does not hold up reads behind writes that wait', () => {
    const disk = openDisk({ writeIops: 1, burstSeconds: 0 });
    const writes = [0, 1, 2].map((i) => disk.startWrite(i * 512, fresh(512)));
    const reads = [0, 1, 2].map((i) => disk.start(read, i * 512, 512));
    disk.finish(...reads);
    expect(writes.map((request) => request.completions)).toEqual([1, 0, 0]);
    disk.rig.clock.advance(5 * SECOND_US);
    disk.finish(...writes.slice(0, 2));
    disk.rig.clock.advance(5 * SECOND_US);
    disk.finish(...writes);
  });
});

describe('other requests', () => {
  it('a flush does not wait', () => {
    const disk = openDisk({ totalIops: 1, totalBytesPerSecond: 1000 });
    const writes = [0, 1].map((i) => disk.startWrite(i * 4096, fresh(4096)));
    disk.rig.step();
    expect(disk.run(IoType.flush)).toBe(IoStatus.success);
    expect(writes[1]!.completions).toBe(0);
    disk.finish(disk.start(IoType.reset, 0, 0), ...writes);
  });

  it('a discard and a writeZeroes count as one write, whatever their length', () => {
    const disk = openDisk({ writeIops: 10, writeBytesPerSecond: 1e5, burstSeconds: 0 });
    for (const type of [IoType.discard, IoType.writeZeroes]) {
      disk.rig.clock.advance(SECOND_US);
      disk.rig.step();
      const startUs = disk.rig.reactor.nowUs;
      const requests = Array.from({ length: 5 }, () => disk.start(type, 0, disk.sizeBytes));
      disk.finish(...requests);
      expectClose(disk.rig.reactor.nowUs - startUs, 0.4 * SECOND_US, 1);
    }
  });

  it('a writeZeroes that has to be written counts as what it writes', () => {
    const disk = openDisk({ writeBytesPerSecond: 1e6, burstSeconds: 0 }, make.limited({}, ['writeZeroes']));
    const startUs = disk.rig.reactor.nowUs;
    expect(disk.run(IoType.writeZeroes, 0, 2 ** 21, IoFlag.unmap)).toBe(IoStatus.success);
    // In pieces of 128 KiB, the last of which passes by debt.
    expectClose(disk.rig.reactor.nowUs - startUs, 2 ** 21 - 2 ** 17, 2);
  });

  it('counts what the consumer asked for, not the pieces its base needs', () => {
    const disk = openDisk({ totalIops: 10, burstSeconds: 0 }, make.limited({ maxTransferBytes: 4096 }));
    const startUs = disk.rig.reactor.nowUs;
    for (let i = 0; i < 3; i++) disk.write(0, fresh(2 ** 20));
    expectClose(disk.rig.reactor.nowUs - startUs, 0.2 * SECOND_US, 2);
  });

  it('a reset aborts what waits and lets the rest end', () => {
    const disk = openDisk({ totalIops: 1, burstSeconds: 0 });
    const requests = Array.from({ length: 10 }, (_, i) => disk.start(i % 2 === 0 ? read : write, i * 512, 512));
    const reset = disk.start(IoType.reset, 0, 0);
    disk.finish(reset, ...requests);
    expect(requests.filter((request) => request.status === IoStatus.aborted)).toHaveLength(9);
    expect(requests[0]!.status).toBe(IoStatus.success);
    // Nothing is owed for what was aborted.
    disk.rig.clock.advance(2 * SECOND_US);
    disk.finish(disk.start(read, 0, 512));
  });
});

describe('waiting', () => {
  it('costs no polling: the reactor is idle until the next request may pass', () => {
    open({ totalIops: 100, burstSeconds: 0 });
    const load = disks.load(0, read, 4096, 32);
    let busy = 0;
    for (let i = 0; i < 10_000; i++) {
      disks.rig.clock.advance(100);
      if (disks.rig.reactor.step()) busy++;
    }
    expect(load.done).toBeGreaterThan(90);
    // A request passes in one step, its successor comes in the next.
    expect(busy).toBeLessThan(2 * load.done + 5);
  });
});

describe('a group', () => {
  const group = 'gold';

  it('shares operations evenly, whatever each disk keeps in flight', () => {
    open({ group, totalIops: 3000 }, { group, totalIops: 3000 }, { group, totalIops: 3000 });
    const loads = [disks.load(0, read, 4096, 1), disks.load(1, read, 4096, 64), disks.load(2, write, 512, 8)];
    disks.measure(SECOND_US / 10, ...loads);
    for (const done of disks.measure(2 * SECOND_US, ...loads)) expectClose(done, 2000, 3);
  });

  it('shares bytes evenly, whatever the size of requests', () => {
    const limit = { group, totalBytesPerSecond: 90e6 };
    open(limit, limit, limit);
    const lengths = [4096, 65536, 2 ** 20];
    const loads = lengths.map((lengthBytes, i) => disks.load(i, read, lengthBytes, i === 0 ? 64 : 2));
    disks.measure(SECOND_US / 5, ...loads);
    const done = disks.measure(4 * SECOND_US, ...loads);
    lengths.forEach((lengthBytes, i) => expectClose(done[i]! * lengthBytes, 120e6, 4));
  });

  it('gives a disk that reads and writes no more than one that reads', () => {
    const limit = { group, totalIops: 4000 };
    open(limit, limit);
    const both = [disks.load(0, read), disks.load(0, write)];
    const one = disks.load(1, read);
    disks.measure(SECOND_US / 10, ...both, one);
    const [reads, writes, others] = disks.measure(2 * SECOND_US, ...both, one);
    expectClose(reads! + writes!, 4000, 3);
    expectClose(others!, 4000, 3);
    expectClose(reads!, writes!, 5);
  });

  it('leaves to the others what one does not use, and gives it no more than its share when it comes back', () => {
    const limit = { group, totalIops: 2000 };
    open(limit, limit);
    const busy = disks.load(0, read);
    const [alone] = disks.measure(2 * SECOND_US, busy);
    expectClose(alone!, 4000, 1);
    const late = disks.load(1, read);
    const [first, second] = disks.measure(SECOND_US / 10, busy, late);
    expectClose(second!, first!, 10);
  });

  it('has nothing to do with disks outside it', () => {
    open({ group, totalIops: 10 }, { totalIops: 2000 }, { group: 'silver', totalIops: 3000 });
    const loads = [disks.load(0, read), disks.load(1, read), disks.load(2, read)];
    const [gold, alone, silver] = disks.measure(SECOND_US, ...loads);
    expect(gold).toBeLessThan(12);
    expectClose(alone!, 2000, 1);
    expectClose(silver!, 3000, 1);
  });

  it('has one set of limits: a disk that names others is refused', () => {
    open({ group, totalIops: 1000 });
    disks.rig.registry.create({ ...make.malloc().configs[0]!, name: 'leaf1' });
    let thrown: unknown;
    try {
      disks.rig.registry.create(disks.config(1, { group, totalIops: 1001 }));
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(BdevError);
    expect((thrown as BdevError).field).toBe('totalIops');
    // The refused disk has left nothing behind: the group ends with its last member.
    expect(disks.rig.registry.names()).toEqual(['leaf0', 'd0', 'leaf1']);
  });

  it('ends with its last disk: the name is free for other limits', () => {
    open({ group, totalIops: 1000 });
    disks.open[0]!.close();
    disks.rig.registry.destroy('d0');
    disks.open.pop();
    disks.rig.registry.create(disks.config(0, { group, totalIops: 7 }));
    expect((disks.rig.registry.get('d0') as QosBdev).qosLimits.totalIops).toBe(7);
  });

  it('on another reactor is another group', () => {
    open({ group, totalIops: 1000 });
    const disk = new Disk(new Rig('other'), make.stack(make.malloc(), make.qos({ group, totalIops: 5 })).configs);
    disk.close();
  });
});

describe('changing limits', () => {
  it('takes effect at once, up, down and away', () => {
    open({ totalIops: 1000 });
    const load = disks.load(0, read);
    disks.measure(SECOND_US / 10, load);
    for (const totalIops of [5000, 100, 2000]) {
      disks.bdev(0).setLimits({ ...noLimits, totalIops });
      disks.measure(SECOND_US / 10, load);
      expectClose(disks.measure(SECOND_US, load)[0]!, totalIops, 2);
    }
    disks.bdev(0).setLimits(noLimits);
    expect(disks.measure(SECOND_US / 10, load)[0]).toBeGreaterThan(10_000);
    disks.bdev(0).setLimits({ ...noLimits, readBytesPerSecond: 4e6 });
    disks.measure(SECOND_US / 10, load);
    expectClose(disks.measure(SECOND_US, load)[0]! * 4096, 4e6, 2);
  });

  it('frees what waits behind a limit that is lifted', () => {
    const disk = openDisk({ totalBytesPerSecond: 1, burstSeconds: 0 });
    const requests = [0, 1, 2].map((i) => disk.startWrite(i * 4096, fresh(4096)));
    disk.rig.step();
    expect(requests.map((request) => request.completions)).toEqual([1, 0, 0]);
    (disk.open.bdev as QosBdev).setLimits(noLimits);
    disk.finish(...requests);
    expect(disk.open.bdev.describe()).toEqual({ base: 'leaf', group: null, ...noLimits });
  });

  it('changes those of the whole group', () => {
    const limit = { group: 'gold', totalIops: 1000 };
    open(limit, limit);
    disks.bdev(1).setLimits({ ...noLimits, totalIops: 4000 });
    expect(disks.bdev(0).qosLimits.totalIops).toBe(4000);
    const loads = [disks.load(0, read), disks.load(1, read)];
    disks.measure(SECOND_US / 10, ...loads);
    for (const done of disks.measure(SECOND_US, ...loads)) expectClose(done, 2000, 3);
  });
});

describe('whatever the limits and the requests', () => {
  const limit = fc.constantFrom(0, 0, 1, 50, 3000);
  const bytesLimit = fc.constantFrom(0, 0, 1000, 1e6, 1e9);
  const limits = fc.record({
    readIops: limit,
    writeIops: limit,
    totalIops: limit,
    readBytesPerSecond: bytesLimit,
    writeBytesPerSecond: bytesLimit,
    totalBytesPerSecond: bytesLimit,
    burstSeconds: fc.constantFrom(0, 0.001, 0.1, 5),
  });
  const request = fc.record({
    disk: fc.nat(2),
    type: fc.constantFrom(read, write),
    blocks: fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 2048 })),
    afterUs: fc.constantFrom(0, 0, 0, 100, 20_000),
  });

  it('all pass, none too early, none later than the limits make it', () => {
    fc.assert(
      fc.property(limits, fc.array(request, { minLength: 1, maxLength: 40 }), (limits, requests) => {
        const config = { ...limits, group: 'g' };
        const run = new Disks(config, config, config);
        const passed: { atUs: number; type: IoType; bytes: number }[] = [];
        const pending = requests.map(({ disk, type, blocks, afterUs }) => {
          run.rig.clock.advance(afterUs);
          run.rig.reactor.step();
          const one = new Request();
          one.io.prepare(type, 0, blocks * 512, 0);
          one.io.addSegment(run.memory, blocks * 512);
          // A null disk completes a request when it gets it.
          one.then = () => passed.push({ atUs: run.rig.reactor.nowUs, type, bytes: blocks * 512 });
          one.io.push(one, 0);
          run.open[disk]!.channel.submit(one.io);
          return one;
        });
        // Leaps as long as what is waited for: an hour of debt must not take an hour of steps.
        const startUs = run.rig.reactor.nowUs;
        let leapUs = 10;
        while (pending.some((one) => one.completions === 0)) {
          const before = passed.length;
          run.rig.clock.advance(leapUs);
          run.rig.reactor.step();
          leapUs = passed.length > before ? 10 : leapUs * 1.5;
          expect(leapUs).toBeLessThan(1e13);
        }
        const elapsedUs = run.rig.reactor.nowUs - startUs;
        run.close();
        expect(pending.every((one) => one.completions === 1)).toBe(true);

        let boundUs = 100 * requests.length;
        for (const [rate, tokens] of tokensOf(limits)) {
          if (rate === 0) continue;
          const taken = passed.map((one) => ({ atUs: one.atUs, tokens: tokens(one) }));
          expectNoneTooEarly(taken, rate, limits.burstSeconds);
          boundUs += (taken.reduce((sum, one) => sum + one.tokens, 0) / rate) * SECOND_US;
        }
        // A leap may go beyond the end of a wait by as much as the wait.
        expect(elapsedUs).toBeLessThan(2 * boundUs);
      }),
      { seed, numRuns: 60 },
    );
    open();
  });

  type Passed = { type: IoType; bytes: number };

  /** Each limit with the tokens that a request takes of it. */
  function tokensOf(limits: QosLimits): [number, (one: Passed) => number][] {
    const only =
      (type: IoType, tokens: (one: Passed) => number) =>
      (one: Passed): number =>
        one.type === type ? tokens(one) : 0;
    const ops = (): number => 1;
    const bytes = (one: Passed): number => one.bytes;
    return [
      [limits.readIops, only(read, ops)],
      [limits.writeIops, only(write, ops)],
      [limits.totalIops, ops],
      [limits.readBytesPerSecond, only(read, bytes)],
      [limits.writeBytesPerSecond, only(write, bytes)],
      [limits.totalBytesPerSecond, bytes],
    ];
  }

  /** Between any two requests that take tokens, no more than the depth and what came in meanwhile, the later one not counted. */
  function expectNoneTooEarly(taken: { atUs: number; tokens: number }[], rate: number, burstSeconds: number): void {
    const takers = taken.filter((one) => one.tokens > 0);
    for (let i = 0; i < takers.length; i++) {
      let sum = 0;
      for (let j = i + 1; j < takers.length; j++) {
        sum += takers[j - 1]!.tokens;
        const allowed = rate * (burstSeconds + (takers[j]!.atUs - takers[i]!.atUs) / SECOND_US);
        expect(sum).toBeLessThanOrEqual(allowed + sum * 1e-9 + rate * 1e-9 + 1e-6);
      }
    }
  }
});
