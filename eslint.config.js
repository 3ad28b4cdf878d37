/**
 * The one linter. Beside the type-aware rules it enforces the import table of docs/architecture.md: who may import
 * whom, that native/ is entered through native/index.ts, and that only that file touches the compiled addon.
 * test/tidy/lint-rules.test.ts proves that the rules bite.
 *
 * Invariant: flat config replaces a rule's options, it does not merge them. So every row of the table is made by `area`,
 * which writes the complete list of restrictions, and a later, narrower row overrides a wider one as a whole.
 */
import { defineConfig, globalIgnores } from 'eslint/config';
import tseslint from 'typescript-eslint';

// ---- What an import may not name: a pattern on the module specifier, and what to do instead. ----

const folders = (names, message) => ({ regex: `(^|/)(${names})/`, message });
const insideNative = {
  regex: '(^|/)native/(?!index\\.js$)',
  message: 'native/ has one typed face: import native/index.js.',
};
const product = folders('src', 'native/ is the bottom: it imports nothing of the product.');
const tooling = folders('bench|test|scripts|dist|build', 'The product imports neither its tools nor its output.');
const storage = folders('bdev', 'poller/ knows nothing of storage.');
const protocol = folders('vhost-user', 'Only src/target/ joins the protocol to what lies below.');
const target = folders('target', 'Only src/target/ imports src/target/.');
const concreteBdev = {
  regex: '(^|/)bdev/(?!bdev(-io)?\\.js$)',
  message: 'vhost-user/ knows a bdev by its interfaces only: bdev/bdev.js and bdev/bdev-io.js.',
};
/** A module's folder is closed to its siblings but for the libraries it is built on, also one folder further down. */
const siblingsExcept = (...libraries) =>
  ['^\\.\\./', '^\\.\\./\\.\\./'].map((up) => ({
    regex: `${up}(?!(${['\\.\\.', 'poller', ...libraries].join('|')})/)[^/]+/`,
    message: 'A bdev module imports no other one; what they share lives in src/bdev/ itself.',
  }));

// ---- What code may not say. ----

/** The benchmark's load generator is an addon of its own, so the name matters. */
const compiledAddon = ['Literal[value', 'TemplateElement[value.raw'].map((node) => ({
  selector: `${node}=/\\bstrata\\.node$/]`,
  message: 'Only native/index.ts touches the compiled addon.',
}));
const wallClock = { selector: "NewExpression[callee.name='Date'][arguments.length=0]", message: 'Take a Clock.' };
const bigIntArrays = {
  selector: 'Identifier[name=/^Big(Int|Uint)64Array$/]',
  message: 'No BigInt on the data path: two 32-bit halves, joined as lo + hi * 2 ** 32.',
};
/** A test that is switched off or runs alone says nothing; `context.skip(reason)` leaves one out at run time. */
const idleTests = {
  selector: 'MemberExpression[object.name=/^(describe|it|test)$/][property.name=/^(only|skip|todo)$/]',
  message: 'No test is left out or run alone in the repository.',
};
/** Reading time or chance behind the back of the injected Clock and Random. */
const ambient = [
  { object: 'Date', property: 'now', message: 'Take a Clock.' },
  { object: 'performance', property: 'now', message: 'Take a Clock.' },
  { object: 'process', property: 'hrtime', message: 'Take a Clock.' },
  { object: 'Math', property: 'random', message: 'Take a Random.' },
];

// ---- The table. ----

/** no-restricted-imports sees static imports only: the same ban for `import()` and for `import('...')` types. */
const dynamicForms = ({ regex, message }) =>
  ['ImportExpression', 'TSImportType'].map((node) => ({
    selector: `${node} Literal[value=/${regex.replaceAll('/', '\\x2F')}/]`,
    message,
  }));

const area = (files, { imports, syntax = [], properties = [] }) => ({
  files,
  rules: {
    'no-restricted-imports': ['error', { patterns: imports }],
    // A bare severity would inherit the options of a wider row.
    'no-restricted-properties': properties.length > 0 ? ['error', ...properties] : 'off',
    'no-restricted-syntax': ['error', ...syntax, ...imports.flatMap(dynamicForms)],
  },
});

const control = { properties: ambient, syntax: [...compiledAddon, wallClock] };
const dataPath = { properties: ambient, syntax: [...compiledAddon, wallClock, bigIntArrays] };
const bdev = [insideNative, tooling, protocol, target];

const importTable = [
  area(['{bench,scripts,test}/**/*.ts', '*.ts'], { imports: [insideNative], syntax: [...compiledAddon, idleTests] }),
  area(['native/**/*.ts'], { imports: [product, tooling], syntax: compiledAddon }),
  area(['native/index.ts'], { imports: [product, tooling] }),
  area(['src/**/*.ts'], { ...control, imports: [insideNative, tooling, target] }),
  area(['src/target/**/*.ts'], { ...control, imports: [insideNative, tooling] }),
  area(['src/poller/**/*.ts'], { ...dataPath, imports: [insideNative, tooling, storage, protocol, target] }),
  // The real Clock and Random: the one place that reads the world outside.
  area(['src/poller/clock.ts'], {
    imports: [insideNative, tooling, storage, protocol, target],
    syntax: [...compiledAddon, bigIntArrays],
  }),
  area(['src/bdev/**/*.ts'], { ...dataPath, imports: bdev }),
  area(['src/bdev/*/**/*.ts'], { ...dataPath, imports: [...bdev, ...siblingsExcept()] }),
  area(['src/bdev/{qcow2,cache}/**/*.ts'], { ...dataPath, imports: [...bdev, ...siblingsExcept('log')] }),
  area(['src/bdev/cdp/**/*.ts'], { ...dataPath, imports: [...bdev, ...siblingsExcept('log', 'cache')] }),
  area(['src/vhost-user/**/*.ts'], { ...dataPath, imports: [insideNative, tooling, concreteBdev, target] }),
];

export default defineConfig(
  globalIgnores(['dist/', 'build/', '.cache/', 'data/', 'run/', 'coverage/', 'bench/results/']),
  { linterOptions: { reportUnusedDisableDirectives: 'error' } },
  {
    files: ['**/*.ts'],
    extends: [tseslint.configs.recommendedTypeChecked],
    languageOptions: { parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname } },
    rules: {
      eqeqeq: 'error',
      'no-console': 'error',
      '@typescript-eslint/consistent-type-exports': 'error',
      '@typescript-eslint/consistent-type-imports': ['error', { disallowTypeAnnotations: false }],
      '@typescript-eslint/no-import-type-side-effects': 'error',
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_' }],
      // An interface may promise what one implementation has at once.
      '@typescript-eslint/require-await': 'off',
      '@typescript-eslint/switch-exhaustiveness-check': [
        'error',
        { considerDefaultExhaustiveForUnions: true, requireDefaultForNonUnion: true },
      ],
    },
  },
  {
    // Programs that talk to people, and tests that take replies of unknown shape apart.
    files: ['{bench,scripts,test}/**/*.ts'],
    rules: {
      'no-console': 'off',
      '@typescript-eslint/no-unsafe-argument': 'off',
      '@typescript-eslint/no-unsafe-assignment': 'off',
      '@typescript-eslint/no-unsafe-call': 'off',
      '@typescript-eslint/no-unsafe-member-access': 'off',
      '@typescript-eslint/no-unsafe-return': 'off',
    },
  },
  ...importTable,
  {
    // What runs before any dependency is installed is plain JavaScript, checked without types.
    files: ['**/*.{js,mjs}'],
    languageOptions: { globals: { console: 'readonly', process: 'readonly', URL: 'readonly' } },
    rules: {
      eqeqeq: 'error',
      'no-undef': 'error',
      'no-unused-vars': 'error',
      'no-var': 'error',
      'prefer-const': 'error',
    },
  },
);
