/**
 * Goal: bdevs are made after their bases, and a stack lives on one reactor: where a controller asks for, else in turn.
 *
 * Method: small configurations by hand, and random forests of stacks checked against the two rules.
 */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { AnyBdevConfig, ControllerConfig, DaemonConfig } from '../../src/target/config/config.js';
import { basesOf } from '../../src/target/config/config.js';
import { BASE_CONFIG, DEFAULT_ACCESS } from '../../src/target/config/defaults.js';
import { Problems } from '../../src/target/config/problem.js';
import { basesFirst, checkReferences, planReactors } from '../../src/target/config/stacks.js';

const leaf = (name: string): AnyBdevConfig => ({ name, module: 'malloc', sizeBytes: 4096, blockSizeBytes: 512 });
const on = (base: string, name: string): AnyBdevConfig => ({ name, module: 'passthru', base });
const qos = (base: string, name: string, group: string | null): AnyBdevConfig => ({
  name,
  module: 'qos',
  base,
  group,
  readIops: 0,
  writeIops: 0,
  totalIops: 100,
  readBytesPerSecond: 0,
  writeBytesPerSecond: 0,
  totalBytesPerSecond: 0,
  burstSeconds: 1,
});
const QCOW2_DEFAULTS = {
  module: 'qcow2',
  backing: null,
  dataFile: null,
  imageDir: null,
  keyFile: null,
  readOnly: false,
  l2CacheBytes: 2 ** 20,
  restartDir: null,
  clusterCacheBytes: 2 ** 20,
  codecThreads: 0,
} as const;
const shows = (bdev: string, reactor: string | null = null): ControllerConfig => ({
  name: `c-${bdev}`,
  bdev,
  address: { socketPath: `/s/${bdev}`, mode: 0o660 },
  serial: '',
  queues: 1,
  readOnly: false,
  writeCache: true,
  reactor,
  isolate: false,
  targets: [],
  ...DEFAULT_ACCESS,
});

function config(reactors: number, bdevs: AnyBdevConfig[], controllers: ControllerConfig[]): DaemonConfig {
  const names = Array.from({ length: reactors }, (_, i) => `r${i}`);
  return {
    ...BASE_CONFIG,
    reactors: names.map((name) => ({ name, mode: 'interrupt', pollUs: 0 })),
    bdevs,
    controllers,
    metrics: null,
  };
}

function placed(config: DaemonConfig): Record<string, { bdevs: string[]; controllers: string[] }> {
  return Object.fromEntries(
    planReactors(config).map(({ reactor, bdevs, controllers }) => [
      reactor.name,
      { bdevs: bdevs.map(({ name }) => name), controllers: controllers.map(({ name }) => name) },
    ]),
  );
}

function problemsOf(config: DaemonConfig): string {
  const problems = new Problems({ locate: (path) => ({ file: null, line: null, field: path.join('.') }) });
  checkReferences(config, problems);
  try {
    problems.throwIfAny();
    return '';
  } catch (error) {
    return (error as Error).message;
  }
}

describe('basesFirst', () => {
  it('turns a stack that was written top down', () => {
    const names = basesFirst([on('b', 'a'), on('c', 'b'), leaf('c'), leaf('d')]).map(({ name }) => name);
    expect(names).toEqual(['c', 'b', 'a', 'd']);
  });

  it('puts every bdev of any forest after its base, and loses none', () => {
    const forest = fc
      .array(fc.nat(), { minLength: 1, maxLength: 30 })
      .map((parents) => parents.map((p, i) => (p % (i + 1) === i ? leaf(`b${i}`) : on(`b${p % (i + 1)}`, `b${i}`))))
      .chain((bdevs) => fc.shuffledSubarray(bdevs, { minLength: bdevs.length }));
    fc.assert(
      fc.property(forest, (bdevs) => {
        const order = basesFirst(bdevs).map(({ name }) => name);
        expect([...order].sort()).toEqual(bdevs.map(({ name }) => name).sort());
        for (const bdev of bdevs) {
          for (const { name } of basesOf(bdev)) expect(order.indexOf(name)).toBeLessThan(order.indexOf(bdev.name));
        }
      }),
    );
  });
});

describe('planReactors', () => {
  it('spreads stacks in turn', () => {
    const bdevs = ['a', 'b', 'c'].map(leaf);
    expect(placed(config(2, bdevs, [shows('a'), shows('b'), shows('c')]))).toEqual({
      r0: { bdevs: ['a', 'c'], controllers: ['c-a', 'c-c'] },
      r1: { bdevs: ['b'], controllers: ['c-b'] },
    });
  });

  it('puts a whole stack where one of its controllers asks for', () => {
    const bdevs = [on('a', 'top'), leaf('a'), leaf('b')];
    expect(placed(config(2, bdevs, [shows('top', 'r1'), shows('b')]))).toEqual({
      r0: { bdevs: ['b'], controllers: ['c-b'] },
      r1: { bdevs: ['a', 'top'], controllers: ['c-top'] },
    });
  });

  it('keeps a qos group together, since its members share one set of limits', () => {
    const bdevs = [leaf('a'), leaf('b'), leaf('c'), qos('a', 'qa', 'g'), qos('b', 'qb', 'g'), qos('c', 'qc', null)];
    const plans = placed(config(2, bdevs, [shows('qa'), shows('qb'), shows('qc')]));
    expect(plans['r0']!.controllers).toEqual(['c-qa', 'c-qb']);
    expect(plans['r1']!.controllers).toEqual(['c-qc']);
    expect(problemsOf(config(2, bdevs, [shows('qa', 'r0'), shows('qb', 'r1')]))).toMatch(
      /shares a bdev or a qos group/,
    );
  });

  it('places bdevs that nobody shows, too', () => {
    expect(placed(config(1, [leaf('a'), leaf('spare')], [shows('a')]))['r0']!.bdevs).toEqual(['a', 'spare']);
  });
});

describe('checkReferences', () => {
  it('has nothing against a sound configuration', () => {
    expect(problemsOf(config(2, [leaf('a'), on('a', 'b')], [shows('b', 'r1')]))).toBe('');
  });

  it('lets many read what nobody writes', () => {
    const file: AnyBdevConfig = {
      name: 'golden',
      module: 'uring',
      path: '/golden',
      readOnly: true,
      create: null,
      blockSizeBytes: null,
      direct: true,
      iopoll: false,
      fixedBuffers: false,
      lock: true,
    };
    const two = [shows('golden'), { ...shows('golden'), name: 'other', address: { socketPath: '/o', mode: 0o660 } }];
    expect(problemsOf(config(1, [file], two))).toBe('');
    expect(problemsOf(config(1, [{ ...file, readOnly: false }], two))).toMatch(
      /written by controller c-golden already/,
    );
  });

  it('lets the snapshot of a disk be read beside it, and not that of a file that is written', () => {
    const image = (name: string, base: string, snapshot: string | null): AnyBdevConfig => ({
      ...QCOW2_DEFAULTS,
      name,
      base,
      snapshot,
    });
    const bdevs = [leaf('file'), image('vm1', 'file', null), image('then', 'vm1', 'monday')];
    const both = [shows('vm1'), shows('then')];
    expect(problemsOf(config(1, bdevs, both))).toBe('');
    expect(placed(config(2, bdevs, both))['r0']!.bdevs).toEqual(['file', 'vm1', 'then']);
    const beside = [...bdevs.slice(0, 2), image('then', 'file', 'monday')];
    expect(problemsOf(config(1, beside, both))).toMatch(/file is written by bdev vm1 already/);
    expect(problemsOf(config(1, [leaf('file'), image('a', 'file', '1'), image('b', 'file', '2')], []))).toBe('');
  });

  it('names each circle once, and what leads into it not at all', () => {
    const bdevs = [on('b', 'into'), on('c', 'b'), on('b', 'c'), on('self', 'self')];
    const text = problemsOf(config(1, bdevs, []));
    expect(text.match(/in a circle/g)).toHaveLength(2);
    expect(text).toMatch(/b -> c -> b/);
    expect(text).toMatch(/self -> self/);
  });
});
