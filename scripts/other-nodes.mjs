/**
 * Runs the unit tests on every supported major version of Node but the one at hand. The binaries come from npm, with their
 * headers, so the addon is built for each of them too.
 */
import { delimiter, join } from 'node:path';
import { buildAddonVariant } from './addon-variant.mjs';
import { run } from './run.mjs';
import { npmEnvironment, root, setUp } from './setup.mjs';
import { Stages } from './stages.mjs';

const SUPPORTED_MAJORS = ['20', '22', '24'];
const PACKAGE = `node-linux-${process.arch}`;

await setUp({ forTests: true });
const stages = new Stages('other-nodes');

for (const major of SUPPORTED_MAJORS.filter((candidate) => candidate !== process.versions.node.split('.')[0])) {
  const prefix = join(root, '.cache', `node-${major}`);
  const home = join(prefix, 'node_modules', PACKAGE);
  const install = ['install', '--prefix', prefix, '--no-audit', '--no-fund', `${PACKAGE}@${major}`];
  if (!stages.record(`install Node ${major}`, (await run('npm', install, { cwd: root })) === 0)) continue;

  const env = {
    ...npmEnvironment(),
    PATH: [join(home, 'bin'), process.env.PATH].join(delimiter),
    npm_config_nodedir: home,
  };
  const addon = await buildAddonVariant(`node-${major}`, env);
  if (!stages.record(`addon for Node ${major}`, addon !== undefined)) continue;
  await stages.vitest(`unit tests on Node ${major}`, ['--project', 'unit'], {
    node: join(home, 'bin', 'node'),
    env: { ...env, STRATA_ADDON: addon },
  });
}
stages.finish();
