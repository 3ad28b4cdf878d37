/**
 * Goal: a record of the state folder is durable when it is said to be, is whole or not there, and belongs to one daemon.
 *
 * Method: the calls to the file system in their order, and a real folder.
 */
import { mkdtempSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import type * as FileSystem from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { StateFolder } from '../../../src/target/state/state-folder.js';

const journal: string[] = vi.hoisted(() => []);

vi.mock('node:fs', async (original) => {
  const fs = await original<typeof FileSystem>();
  const names = new Map<number, string>();
  return {
    ...fs,
    openSync: (path: string, ...rest: [string]) => {
      const fd = fs.openSync(path, ...rest);
      names.set(fd, path);
      return fd;
    },
    writeSync: (fd: number, text: string) => {
      journal.push(`write ${names.get(fd)}`);
      return fs.writeSync(fd, text);
    },
    fsyncSync: (fd: number) => {
      journal.push(`sync ${names.get(fd)}`);
      fs.fsyncSync(fd);
    },
    renameSync: (from: string, to: string) => {
      journal.push(`rename ${from} ${to}`);
      fs.renameSync(from, to);
    },
    rmSync: (path: string, options: object) => {
      journal.push(`remove ${path}`);
      fs.rmSync(path, options);
    },
  };
});

let folder: string;

beforeEach(() => {
  folder = join(mkdtempSync(join(tmpdir(), 'strata-test-')), 'state');
});

afterEach(() => {
  rmSync(join(folder, '..'), { recursive: true });
  journal.length = 0;
});

const took = (): string[] => journal.splice(0).map((line) => line.replaceAll(folder, '.'));

describe('a state folder', () => {
  it('makes a record durable before its name, and the name before it says so', () => {
    const state = StateFolder.open(folder);
    state.write('pivot', 'vm', { to: 'image' });
    expect(took()).toEqual([
      'write ./pivot-vm.json.new',
      'sync ./pivot-vm.json.new',
      'rename ./pivot-vm.json.new ./pivot-vm.json',
      'sync .',
    ]);
    state.remove('pivot', 'vm');
    expect(took()).toEqual(['remove ./pivot-vm.json', 'sync .']);
    // What is not there is as good as removed.
    state.remove('pivot', 'vm');
    state.close();
  });

  it('gives back what was written, by kind, for its own user alone', () => {
    const state = StateFolder.open(folder);
    state.write('pivot', 'vm', { to: 'image' });
    state.write('pivot', 'vm', { to: 'second' });
    state.write('job', 'bdev-vm', { operation: 'stream' });
    state.close();
    const again = StateFolder.open(folder);
    expect(again.read('pivot')).toEqual([{ path: join(folder, 'pivot-vm.json'), value: { to: 'second' } }]);
    expect(again.read('job').map(({ value }) => value)).toEqual([{ operation: 'stream' }]);
    expect(statSync(folder).mode & 0o777).toBe(0o700);
    expect(readFileSync(join(folder, 'pivot-vm.json'), 'utf8')).toBe('{\n  "to": "second"\n}\n');
    again.close();
  });

  it('passes over what was being written, and refuses what is damaged or too long', () => {
    const state = StateFolder.open(folder);
    writeFileSync(join(folder, 'pivot-vm.json.new'), '{"to":');
    expect(state.read('pivot')).toEqual([]);
    writeFileSync(join(folder, 'pivot-vm.json'), '{"to":');
    expect(() => state.read('pivot')).toThrow(/pivot-vm\.json is no JSON/);
    writeFileSync(join(folder, 'pivot-vm.json'), `"${'x'.repeat(70_000)}"`);
    expect(() => state.read('pivot')).toThrow(/too long/);
    state.close();
  });

  it('is used by one at a time', () => {
    const state = StateFolder.open(folder);
    expect(() => StateFolder.open(folder)).toThrow(/in use by another daemon/);
    state.close();
    StateFolder.open(folder).close();
    expect(readdirSync(folder)).toEqual(['lock']);
  });
});
