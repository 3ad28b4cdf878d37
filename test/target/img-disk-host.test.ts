/**
 * Goal: a command that waits for a disk sleeps, whatever it waits for. Method: a disk that answers late, by a timer and not by the ring; the
 * steps that the reactor takes meanwhile are counted.
 */
import { describe, expect, it } from 'vitest';
import { IoType } from '../../src/bdev/bdev-io.js';
import { ReactorStat } from '../../src/poller/reactor.js';
import { DiskHost, DiskRequest } from '../../src/target/img/disk-host.js';
import type { AnyBdevConfig } from '../../src/target/config/config.js';

const LATE_US = 100_000;
const BDEVS: readonly AnyBdevConfig[] = [
  { name: 'memory', module: 'malloc', sizeBytes: 2 ** 20, blockSizeBytes: 512 },
  { name: 'late', module: 'delay', base: 'memory', readUs: LATE_US, writeUs: 0, flushUs: 0, discardUs: 0, jitterUs: 0 },
];

describe('a disk of a command', () => {
  it('is waited for asleep', () => {
    const host = new DiskHost();
    const disk = host.openConfigured(BDEVS, 'late', false);
    const request = new DiskRequest(host, 'late');
    const before = host.reactor.stats[ReactorStat.steps]!;
    for (let i = 0; i < 3; i++) request.run(disk, IoType.read, i * 512, 512);
    expect(host.reactor.stats[ReactorStat.steps]! - before).toBeLessThan(100);
    expect(host.reactor.stats[ReactorStat.sleepUs]).toBeGreaterThan(LATE_US);
    request.release();
    host.close();
  });
});
