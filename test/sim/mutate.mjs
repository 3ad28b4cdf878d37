/**
 * Puts a bug into one source file as it is loaded: `node --import tsx --import ./test/sim/mutate.mjs`, with the bug as JSON in
 * STRATA_SIM_MUTATION: { file, edits: [[find, replace]] }. A text that does not occur exactly once ends the process.
 */
import { readFileSync } from 'node:fs';
import * as module from 'node:module';
import { fileURLToPath } from 'node:url';
import { isMainThread } from 'node:worker_threads';

const mutation = JSON.parse(process.env.STRATA_SIM_MUTATION);

/** Runs before that of tsx, which was registered earlier. */
export function load(url, context, nextLoad) {
  const [file] = url.split('?');
  if (!file.endsWith(`/${mutation.file}`)) return nextLoad(url, context);
  let source = readFileSync(fileURLToPath(file), 'utf8');
  for (const [find, replace] of mutation.edits) {
    if (source.split(find).length !== 2) throw new Error(`mutation: ${find} does not occur once in ${mutation.file}`);
    source = source.replace(find, () => replace);
  }
  const typescript = module.createRequire(import.meta.url)('typescript');
  const { outputText } = typescript.transpileModule(source, {
    compilerOptions: { target: 'ES2022', module: 'ESNext', verbatimModuleSyntax: true },
  });
  return { format: 'module', source: outputText, shortCircuit: true };
}

// Newer versions of Node run hooks in the thread itself; in older ones this file is loaded once more, in a thread of its own.
if (module.registerHooks !== undefined) module.registerHooks({ load });
else if (isMainThread) module.register(import.meta.url);
