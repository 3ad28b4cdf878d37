/**
 * `npm start`: sets up a fresh clone and serves a disk on the embedded defaults. Arguments go to `strata serve`.
 */
import { join } from 'node:path';
import { run } from './run.mjs';
import { root, setUp } from './setup.mjs';

await setUp();
const program = join(root, 'dist', 'src', 'target', 'strata.js');
process.exitCode = await run(process.execPath, [program, 'serve', ...process.argv.slice(2)], { cwd: root });
