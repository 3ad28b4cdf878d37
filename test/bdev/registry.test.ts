/**
 * Goal: bdevs are found by name, written by one user each, stacked no deeper than requests can travel, and refused with an error
 * that names field and remedy; what is refused leaves nothing behind.
 *
 * Method: a registry on a real reactor, over malloc disks.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { BdevConfig } from '../../src/bdev/bdev.js';
import { BdevError } from '../../src/bdev/bdev.js';
import type { BdevRegistry } from '../../src/bdev/registry.js';
import { STACK_DEPTH_MAX, stackDepth } from '../../src/bdev/registry.js';
import { IoStatus, IoType } from '../../src/bdev/bdev-io.js';
import { Disk } from '../support/disk.js';
import { Rig } from '../support/rig.js';
import { limited, malloc, passthru, stack } from './stacks.js';

let rig: Rig;
let registry: BdevRegistry;

beforeEach(() => {
  rig = new Rig('registry');
  registry = rig.registry;
});

afterEach(() => {
  rig.close();
});

const leaf = (name: string): BdevConfig => ({ ...malloc(512, 2 ** 20).configs[0]!, name });

const deepest = stack(malloc(), ...Array.from({ length: STACK_DEPTH_MAX - 1 }, () => passthru)).configs;

function refusal(action: () => unknown): BdevError {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(BdevError);
    expect((error as BdevError).hint).not.toBe('');
    return error as BdevError;
  }
  throw new Error('was not refused');
}

describe('creating', () => {
  it('gives each bdev its name, its own uuid and its place', () => {
    const a = registry.create(leaf('a'));
    const b = registry.create({ ...leaf('b'), uuid: '6ba7b810-9dad-11d1-80b4-00c04fd430c8' });
    expect(registry.names()).toEqual(['a', 'b']);
    expect(registry.get('a')).toBe(a);
    expect(a.uuid).toMatch(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
    expect(b.uuid).toBe('6ba7b810-9dad-11d1-80b4-00c04fd430c8');
    expect(registry.get('c')).toBeUndefined();
    expect(registry.stats('c')).toBeUndefined();
  });

  it('refuses a name in use, a module and a base that do not exist', () => {
    registry.create(leaf('a'));
    expect(refusal(() => registry.create(leaf('a')))).toMatchObject({ code: 'name-in-use', field: 'name' });
    const noModule = { name: 'b', module: 'floppy' };
    expect(refusal(() => registry.create(noModule))).toMatchObject({ code: 'no-such-module', field: 'module' });
    expect(refusal(() => registry.create(passthru('b', 'x')))).toMatchObject({ code: 'no-such-bdev', field: 'base' });
    expect(registry.names()).toEqual(['a']);
  });

  it('takes the deepest stack it allows, and requests travel it', () => {
    const disk = new Disk(rig, deepest);
    expect(stackDepth(disk.open.bdev)).toBe(STACK_DEPTH_MAX);
    for (const type of [IoType.write, IoType.flush, IoType.reset]) expect(disk.run(type)).toBe(IoStatus.success);
    expect(disk.run(IoType.write, 0, 4096)).toBe(IoStatus.success);
    disk.close();
  });

  it('refuses a stack that is deeper', () => {
    for (const config of deepest) registry.create(config);
    const more = passthru('more', deepest.at(-1)!.name);
    expect(refusal(() => registry.create(more))).toMatchObject({ code: 'too-deep', field: 'base' });
    // The refused bdev holds no claim.
    registry.open(deepest.at(-1)!.name, 'test', 'bdev').close();
  });
});

describe('writers', () => {
  it('are one per bdev: a second one is refused, whatever it is called', () => {
    registry.create(leaf('a'));
    const first = registry.open('a', 'vm1', 'bdev');
    expect(refusal(() => registry.open('a', 'vm2', 'disks[1].bdev'))).toMatchObject({
      code: 'claimed',
      field: 'disks[1].bdev',
    });
    expect(refusal(() => registry.open('a', 'vm1', 'bdev')).code).toBe('claimed');
    expect(refusal(() => registry.create(passthru('p', 'a')))).toMatchObject({ code: 'claimed', field: 'base' });
    first.close();
    registry.open('a', 'vm2', 'bdev').close();
  });

  it('may be a filter: then nobody else writes to its base, not even under its name', () => {
    registry.create(leaf('a'));
    registry.create(passthru('p', 'a'));
    expect(refusal(() => registry.open('a', 'p', 'bdev')).code).toBe('claimed');
    expect(refusal(() => registry.create(passthru('q', 'a'))).code).toBe('claimed');
    registry.destroy('p');
    registry.create(passthru('q', 'a'));
  });

  it('leave room for readers', () => {
    registry.create(leaf('a'));
    const writer = registry.open('a', 'vm1', 'bdev');
    const reader = registry.open('a', null, 'bdev');
    reader.close();
    writer.close();
  });

  it('are not made by read-only filters', () => {
    registry.create(leaf('a'));
    registry.create(limited({}, [], true)('ro', 'a'));
    const writer = registry.open('a', 'vm1', 'bdev');
    registry.destroy('ro');
    expect(refusal(() => registry.open('a', 'vm2', 'bdev')).code).toBe('claimed');
    writer.close();
  });
});

describe('destroying', () => {
  it('is refused while somebody uses the bdev', () => {
    registry.create(leaf('a'));
    registry.create(passthru('p', 'a'));
    const open = registry.open('p', null, 'bdev');
    expect(refusal(() => registry.destroy('p'))).toMatchObject({ code: 'in-use' });
    expect(refusal(() => registry.destroy('a'))).toMatchObject({ code: 'in-use' });
    open.close();
    registry.destroy('p');
    registry.destroy('a');
    expect(registry.names()).toEqual([]);
    expect(refusal(() => registry.destroy('a')).code).toBe('no-such-bdev');
  });
});

describe('limits that cannot be kept', () => {
  it('are noticed when the bdev is opened', () => {
    const wrong = [
      { maxTransferBytes: 1000 },
      { boundaryBytes: 700 },
      { maxDiscardBytes: 1 },
      { maxWriteZeroesBytes: 513 },
      { memoryAlignmentBytes: 4096 },
    ];
    registry.create(leaf('a'));
    for (const limits of wrong) {
      registry.create(limited(limits)('l', 'a'));
      expect(() => registry.open('l', 'test', 'bdev')).toThrow('bdev l: its');
      // Nothing is left open or claimed.
      registry.destroy('l');
    }
  });
});
