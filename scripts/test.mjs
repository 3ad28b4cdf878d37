/**
 * `npm test`: sets up a fresh clone with everything the tests need, then checks and tests all of it.
 *
 * `--skip-guest` leaves out the real guest, for a quick look while developing; the summary says so.
 */
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { root, setUp } from './setup.mjs';
import { Stages } from './stages.mjs';

const { values: options } = parseArgs({ options: { 'skip-guest': { type: 'boolean', default: false } } });

await setUp({ forTests: true });
const stages = new Stages('test');
const tool = (name, ...args) => [process.execPath, [join(root, 'node_modules', name), ...args]];

await stages.command('lint', ...tool('eslint/bin/eslint.js', '.'));
await stages.command('format', ...tool('prettier/bin/prettier.cjs', '--check', '.'));
await stages.command('types', ...tool('typescript/bin/tsc', '-p', 'tsconfig.json'));
await stages.vitest('unit', ['--project', 'unit']);
if (options['skip-guest']) stages.leaveOut('the real guest (--skip-guest): run `npm test` for it');
else await stages.vitest('guest', ['--project', 'guest']);
stages.finish();
