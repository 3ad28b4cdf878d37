/**
 * Goal: a thread runs where it is told, under its name, and its clocks run forwards.
 *
 * Method: what /proc says of this thread. It stays pinned afterwards, in the process of this file alone.
 */
import { readFileSync, readlinkSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { check, native } from '../../native/index.js';

const status = (field: string): string =>
  new RegExp(`^${field}:\\s*(.*)$`, 'm').exec(readFileSync('/proc/thread-self/status', 'utf8'))![1]!;

describe('a thread', () => {
  it('runs on the core it is pinned to', () => {
    const core = Number(/\d+/.exec(status('Cpus_allowed_list'))![0]);
    expect(native.threadSetAffinity(core)).toBe(0);
    expect(status('Cpus_allowed_list')).toBe(String(core));
  });

  it('cannot be pinned to a core that does not exist', () => {
    const before = status('Cpus_allowed_list');
    expect(native.threadSetAffinity(1000)).toBe(-22);
    expect(native.threadSetAffinity(100_000)).toBe(-22);
    expect(native.threadSetAffinity(-1)).toBe(-22);
    expect(status('Cpus_allowed_list')).toBe(before);
  });

  it('has its name, cut at 15 bytes', () => {
    expect(native.threadSetName('reactor0')).toBe(0);
    expect(status('Name')).toBe('reactor0');
    expect(native.threadSetName('a name that is too long')).toBe(0);
    expect(status('Name')).toBe('a name that is ');
  });

  it('has an event loop that can be waited for', () => {
    expect(readlinkSync(`/proc/self/fd/${check(native.eventLoopFd(), 'find')}`)).toContain('eventpoll');
  });
});

describe('clocks', () => {
  it('run forwards', () => {
    const cell = new Float64Array(512);
    native.clockRead(cell);
    const start = cell[0]!;
    const cpuStart = native.threadCpuUs();
    let last = start;
    for (let i = 0; i < 100_000; i++) {
      native.clockRead(cell);
      if (cell[0]! < last) expect.fail('time went back');
      last = cell[0]!;
    }
    expect(last).toBeGreaterThan(start);
    const cpuUs = native.threadCpuUs() - cpuStart;
    native.clockRead(cell);
    expect(cpuUs).toBeGreaterThan(0);
    expect(cpuUs).toBeLessThanOrEqual(cell[0]! - start);
    expect(cell[1]).toBe(0);
  });

  it('agree with the one of the system', () => {
    const cell = new Float64Array(512);
    const before = Number(process.hrtime.bigint()) / 1000;
    native.clockRead(cell);
    const after = Number(process.hrtime.bigint()) / 1000;
    expect(cell[0]).toBeGreaterThanOrEqual(before - 1);
    expect(cell[0]).toBeLessThanOrEqual(after + 1);
  });
});
