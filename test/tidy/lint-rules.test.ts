/**
 * Goal: the linter's own rules bite. An import table that is never enforced is a wish.
 *
 * Method: small sources are linted under made-up paths with the project's configuration. Each forbidden one must
 * be refused by the rule that is meant to refuse it, each legal one must pass. Type-aware rules need a file
 * the compiler knows, so their sources borrow the path of an existing one.
 */
import { fileURLToPath } from 'node:url';
import { ESLint, type Linter } from 'eslint';
import tseslint from 'typescript-eslint';
import { describe, expect, it } from 'vitest';

const cwd = fileURLToPath(new URL('../..', import.meta.url));
const typeAware = new ESLint({ cwd });
const syntactic = new ESLint({
  cwd,
  overrideConfig: { files: ['**/*.ts'], ...tseslint.configs.disableTypeChecked } as Linter.Config,
});

/** Rules that refuse `code` when it stands in `path`. A source that cannot be parsed is a mistake of the test. */
async function refusals(eslint: ESLint, path: string, code: string): Promise<string[]> {
  const [result] = await eslint.lintText(code, { filePath: path });
  if (result === undefined) throw new Error(`${path} is ignored by the linter`);
  const rules = result.messages.map((message) => {
    if (message.ruleId === null) throw new Error(`${path}: ${message.message}`);
    return message.ruleId;
  });
  return [...new Set(rules)];
}

const sideEffect = (specifier: string): string => `import '${specifier}';\n`;

/** [file, specifier] pairs. */
const forbiddenImports: [string, string][] = [
  ['native/extra.ts', '../src/poller/clock.js'],
  ['native/extra.ts', '../test/helper.js'],
  ['src/poller/extra.ts', '../../native/arena.js'],
  ['src/poller/extra.ts', '../bdev/bdev.js'],
  ['src/poller/extra.ts', '../vhost-user/session.js'],
  ['src/poller/extra.ts', '../target/config.js'],
  ['src/poller/clock.ts', '../bdev/bdev.js'],
  ['src/bdev/extra.ts', '../vhost-user/session.js'],
  ['src/bdev/extra.ts', '../target/config.js'],
  ['src/bdev/extra.ts', '../../native/ring.js'],
  ['src/bdev/extra.ts', '../../bench/run.js'],
  ['src/bdev/extra.ts', '../../dist/src/bdev/bdev.js'],
  ['src/bdev/uring/extra.ts', '../../vhost-user/session.js'],
  ['src/bdev/uring/extra.ts', '../../target/config.js'],
  ['src/bdev/uring/extra.ts', '../qos/bucket.js'],
  ['src/bdev/uring/deep/extra.ts', '../../qos/bucket.js'],
  ['src/bdev/qcow2/extra.ts', '../uring/uring.js'],
  ['src/bdev/log/extra.ts', '../cache/cache.js'],
  ['src/bdev/cache/extra.ts', '../cdp/view.js'],
  ['src/vhost-user/extra.ts', '../bdev/registry.js'],
  ['src/vhost-user/extra.ts', '../bdev/uring/uring.js'],
  ['src/vhost-user/extra.ts', '../bdev/malloc/bdev.js'],
  ['src/vhost-user/extra.ts', '../target/config.js'],
  ['src/vhost-user/extra.ts', '../../native/socket.js'],
  ['src/vhost-user/deep/extra.ts', '../../bdev/registry.js'],
  ['src/extra.ts', './target/config.js'],
  ['src/target/extra.ts', '../../native/arena.js'],
  ['src/target/extra.ts', '../../scripts/setup.mjs'],
  ['bench/extra.ts', '../native/arena.js'],
  ['test/extra.test.ts', '../native/arena.js'],
];

const legalImports: [string, string][] = [
  ['native/index.ts', './arena.js'],
  ['native/index.ts', 'node:module'],
  ['src/poller/extra.ts', '../../native/index.js'],
  ['src/poller/extra.ts', './clock.js'],
  ['src/bdev/extra.ts', '../poller/reactor.js'],
  ['src/bdev/extra.ts', '../../native/index.js'],
  ['src/bdev/extra.ts', './uring/uring.js'],
  ['src/bdev/uring/extra.ts', '../bdev.js'],
  ['src/bdev/uring/extra.ts', './ioctl.js'],
  ['src/bdev/uring/extra.ts', '../../poller/ring.js'],
  ['src/bdev/uring/extra.ts', '../../../native/index.js'],
  ['src/bdev/uring/deep/extra.ts', '../../bdev.js'],
  ['src/bdev/uring/deep/extra.ts', '../../../poller/ring.js'],
  ['src/bdev/qcow2/extra.ts', '../log/append.js'],
  ['src/bdev/cache/extra.ts', '../log/append.js'],
  ['src/bdev/cdp/extra.ts', '../cache/index.js'],
  ['src/vhost-user/extra.ts', '../poller/reactor.js'],
  ['src/vhost-user/extra.ts', '../../native/index.js'],
  ['src/vhost-user/extra.ts', '../bdev/bdev.js'],
  ['src/vhost-user/extra.ts', '../bdev/bdev-io.js'],
  ['src/target/extra.ts', '../vhost-user/session.js'],
  ['src/target/extra.ts', '../bdev/uring/uring.js'],
  ['src/target/extra.ts', '../../native/index.js'],
  ['bench/extra.ts', '../src/target/config.js'],
  ['test/extra.test.ts', '../src/bdev/uring/uring.js'],
  ['test/extra.test.ts', '../native/index.js'],
];

describe('the import table', () => {
  it.each(forbiddenImports)('refuses that %s imports %s', async (file, specifier) => {
    expect(await refusals(syntactic, file, sideEffect(specifier))).toEqual(['no-restricted-imports']);
  });

  it.each(legalImports)('lets %s import %s', async (file, specifier) => {
    expect(await refusals(syntactic, file, sideEffect(specifier))).toEqual([]);
    expect(await refusals(syntactic, file, `export const module = await import('${specifier}');\n`)).toEqual([]);
  });

  it.each([
    ["export const module = await import('../bdev/uring/uring.js');\n", 'no-restricted-syntax'],
    ["export type Uring = import('../bdev/uring/uring.js').Uring;\n", 'no-restricted-syntax'],
    [
      "import type { Uring } from '../bdev/uring/uring.js';\nexport const uring: Uring[] = [];\n",
      'no-restricted-imports',
    ],
    ["export { Uring } from '../bdev/uring/uring.js';\n", 'no-restricted-imports'],
    ["export * from '../bdev/uring/uring.js';\n", 'no-restricted-imports'],
  ])('is not got round by another form: %s', async (code, rule) => {
    expect(await refusals(syntactic, 'src/vhost-user/extra.ts', code)).toEqual([rule]);
  });

  it.each(['native/arena.ts', 'src/poller/extra.ts', 'src/target/extra.ts', 'test/extra.test.ts', 'bench/extra.ts'])(
    'keeps the compiled addon from %s',
    async (file) => {
      for (const code of [
        "export const path = '../build/Release/strata.node';\n",
        'export const path = (folder: string): string => `${folder}/strata.node`;\n',
      ]) {
        expect(await refusals(syntactic, file, code)).toEqual(['no-restricted-syntax']);
        expect(await refusals(syntactic, 'native/index.ts', code)).toEqual([]);
      }
    },
  );
});

describe('time, chance and BigInt', () => {
  const readings: [string, string][] = [
    ['Date.now()', 'no-restricted-properties'],
    ['performance.now()', 'no-restricted-properties'],
    ['process.hrtime()', 'no-restricted-properties'],
    ['Math.random()', 'no-restricted-properties'],
    ['new Date()', 'no-restricted-syntax'],
  ];

  it.each(readings)('%s is refused everywhere in src/', async (expression, rule) => {
    const code = `export const value = ${expression};\n`;
    for (const folder of ['poller', 'bdev', 'bdev/uring', 'bdev/cdp', 'vhost-user', 'target']) {
      expect(await refusals(syntactic, `src/${folder}/extra.ts`, code), folder).toEqual([rule]);
    }
  });

  it.each(readings)('%s is the business of the real Clock and Random, and of tests', async (expression) => {
    const code = `export const value = ${expression};\n`;
    for (const file of ['src/poller/clock.ts', 'test/extra.test.ts', 'bench/extra.ts']) {
      expect(await refusals(syntactic, file, code), file).toEqual([]);
    }
  });

  it.each(['BigInt64Array', 'BigUint64Array'])('%s is refused on the data path', async (name) => {
    const code = `export const words = new ${name}(1);\n`;
    for (const file of ['src/poller/extra.ts', 'src/poller/clock.ts', 'src/bdev/extra.ts', 'src/bdev/uring/extra.ts']) {
      expect(await refusals(syntactic, file, code), file).toEqual(['no-restricted-syntax']);
    }
    expect(await refusals(syntactic, 'src/vhost-user/extra.ts', code)).toEqual(['no-restricted-syntax']);
    expect(await refusals(syntactic, 'src/target/extra.ts', code)).toEqual([]);
  });
});

describe('tests', () => {
  it.each(['it.only', 'it.skip', 'it.todo', 'describe.only', 'test.skip'])('%s is refused', async (name) => {
    expect(await refusals(syntactic, 'test/extra.test.ts', `${name}('x', () => undefined);\n`)).toEqual([
      'no-restricted-syntax',
    ]);
  });
});

describe('type-aware rules', () => {
  it.each([
    [
      'a promise nobody waits for',
      'export function start(work: () => Promise<void>): void {\n  work();\n}\n',
      '@typescript-eslint/no-floating-promises',
    ],
    [
      'a switch that forgets a case',
      "export function code(kind: 'read' | 'write'): number {\n  switch (kind) {\n    case 'read':\n      return 0;\n  }\n  return 1;\n}\n",
      '@typescript-eslint/switch-exhaustiveness-check',
    ],
    [
      'a type imported as a value',
      "import { Stats } from 'node:fs';\nexport const all: Stats[] = [];\n",
      '@typescript-eslint/consistent-type-imports',
    ],
    [
      'a value of unknown type',
      'export const value: string = JSON.parse("1");\n',
      '@typescript-eslint/no-unsafe-assignment',
    ],
  ])('refuse %s', async (_name, code, rule) => {
    expect(await refusals(typeAware, 'src/poller/clock.ts', code)).toEqual([rule]);
  });

  it('let plain code pass', async () => {
    const code = 'export async function start(work: () => Promise<void>): Promise<void> {\n  await work();\n}\n';
    expect(await refusals(typeAware, 'src/poller/clock.ts', code)).toEqual([]);
  });
});
