/**
 * Another build of the addon beside the ordinary one: with sanitizers, or for another Node. It is made in a folder of its
 * own under .cache/addon/, which sees the same sources through links.
 */
import { mkdirSync, rmSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { run } from './run.mjs';
import { root } from './setup.mjs';

/**
 * @param {string} name of the variant
 * @param {Record<string, string | undefined>} env in which node-gyp runs
 * @returns {Promise<string | undefined>} path of the compiled addon, undefined when it does not build
 */
export async function buildAddonVariant(name, env) {
  const folder = join(root, '.cache', 'addon', name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  for (const entry of ['package.json', 'binding.gyp', 'native']) symlinkSync(join(root, entry), join(folder, entry));
  const exitCode = await run('npm', ['run', 'install'], { cwd: folder, env });
  return exitCode === 0 ? join(folder, 'build', 'Release', 'strata.node') : undefined;
}
