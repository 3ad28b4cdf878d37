/**
 * Everything a fresh clone needs before a program of it can run: system packages, modules, the compiled addon, dist/.
 *
 * Runs before any dependency is installed, so it uses nothing but Node. Each step looks first and acts only when something
 * is missing or stale; a second run does nothing and says nothing. What only the administrator can do is named
 * with the line that does it, and ends the run.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, realpathSync, rmSync, statSync, utimesSync } from 'node:fs';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { run } from './run.mjs';

export const root = fileURLToPath(new URL('..', import.meta.url));
const at = (...path) => join(root, ...path);
const readJson = (path) => JSON.parse(readFileSync(path, 'utf8'));

/** The program each Debian package of the tool chain is needed for. */
const BUILD_PACKAGES = { python3: 'python3', make: 'make', 'g++': 'g++' };
/** Packages the tests need: the same list the guest image is made from. */
const GUEST_PACKAGES_FILE = at('scripts', 'guest', 'packages.json');

const ADDON = at('build', 'Release', 'strata.node');
const PROGRAM = at('dist', 'src', 'target', 'strata.js');

/** Set-up cannot go on; the message is for the person who started it. */
class SetupError extends Error {}

/**
 * Makes the clone ready to run; ends the process with a message and code 1 when it cannot.
 * @param {{ forTests?: boolean }} [options] whether the tests' system packages are needed too
 */
export async function setUp({ forTests = false } = {}) {
  try {
    checkNode();
    await ensurePackages(forTests);
    await ensureModules();
    await ensureAddon();
    await ensurePrograms();
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    console.error(`set-up: ${error.message}`);
    process.exit(1);
  }
}

/**
 * The environment to run npm in: node-gyp reports warnings only, and takes this Node's headers from beside it, where they
 * are installed, instead of downloading them.
 */
export function npmEnvironment() {
  const env = { npm_config_loglevel: 'warn', ...process.env };
  const prefix = dirname(dirname(realpathSync(process.execPath)));
  if (headersVersion(prefix) === process.versions.node) env.npm_config_nodedir ??= prefix;
  return env;
}

/** Version of the Node whose headers lie below `prefix`; undefined when there are none. */
function headersVersion(prefix) {
  const text = readIfThere(join(prefix, 'include', 'node', 'node_version.h'));
  const part = (name) => new RegExp(`^#define NODE_${name}_VERSION (\\d+)$`, 'm').exec(text)?.[1];
  return part('MAJOR') && `${part('MAJOR')}.${part('MINOR')}.${part('PATCH')}`;
}

function checkNode() {
  const wanted = readJson(at('package.json')).engines.node;
  const [major, minor] = wanted.replace('>=', '').split('.').map(Number);
  const [ourMajor, ourMinor] = process.versions.node.split('.').map(Number);
  if (ourMajor < major || (ourMajor === major && ourMinor < minor)) {
    throw new SetupError(`Node ${wanted} is needed, this is ${process.versions.node}.`);
  }
}

async function ensurePackages(forTests) {
  const missing = Object.keys(BUILD_PACKAGES).filter((name) => !isOnPath(BUILD_PACKAGES[name]));
  if (forTests) missing.push(...[...readJson(GUEST_PACKAGES_FILE), 'prometheus'].filter((name) => !isInstalled(name)));
  // The tests download the guest's kernel by apt, which needs its lists even when every package is there.
  const needsLists = missing.length > 0 || (forTests && !hasPackageLists());
  if (!needsLists) return;

  const commands = ['apt-get update'];
  if (missing.length > 0) commands.push(`apt-get install -y --no-install-recommends ${missing.join(' ')}`);
  const isRoot = process.getuid() === 0;
  const what = missing.length > 0 ? `system packages are missing: ${missing.join(', ')}` : 'apt has no package lists';
  if (!isRoot || !isOnPath('apt-get')) {
    const line = commands.map((command) => `sudo ${command}`).join(' && ');
    throw new SetupError(`${what}. This line provides what is needed:\n\n  ${line}\n`);
  }
  for (const command of commands) {
    const [program, ...args] = command.split(' ');
    await step(command, program, args, { ...process.env, DEBIAN_FRONTEND: 'noninteractive' });
  }
}

/** Modules are fresh when npm's own record of them is younger than the lock file. */
async function ensureModules() {
  const record = at('node_modules', '.package-lock.json');
  if (existsSync(record) && changedMs(record) >= changedMs(at('package-lock.json'))) return;
  await step('npm ci', 'npm', ['ci', '--include=dev', '--no-audit', '--no-fund'], npmEnvironment());
}

/** The addon uses V8 itself, so it belongs to one ABI version of Node, beside its sources. */
async function ensureAddon() {
  const abi = /"node_module_version": "?(\d+)/.exec(readIfThere(at('build', 'config.gypi')))?.[1];
  const isConfigured =
    abi === process.versions.modules && changedMs(at('build', 'Makefile')) >= changedMs(at('binding.gyp'));
  const sourcesMs = newestMs(at('native'), /\.(cc|h)$/);
  if (isConfigured && existsSync(ADDON) && changedMs(ADDON) >= Math.max(sourcesMs, changedMs(at('binding.gyp'))))
    return;
  const script = isConfigured ? 'build:native' : 'install';
  await step(`compiling the addon for Node ${process.versions.node}`, 'npm', ['run', script], npmEnvironment());
  // make leaves alone what the change did not touch; the time says that it looked.
  const now = new Date();
  utimesSync(ADDON, now, now);
}

async function ensurePrograms() {
  const sourcesMs = Math.max(
    newestMs(at('src'), /\.ts$/),
    newestMs(at('native'), /\.ts$/),
    changedMs(at('tsconfig.json')),
    changedMs(at('tsconfig.build.json')),
  );
  if (existsSync(PROGRAM) && changedMs(PROGRAM) >= sourcesMs) return;
  try {
    await step('compiling the programs', 'npm', ['run', 'build'], process.env);
  } catch (error) {
    // The compiler writes its output in spite of errors; left there, it would pass for fresh.
    rmSync(at('dist'), { recursive: true, force: true });
    throw error;
  }
}

async function step(title, command, args, env) {
  console.error(`set-up: ${title}`);
  const exitCode = await run(command, args, { cwd: root, env });
  if (exitCode !== 0) throw new SetupError(`"${[command, ...args].join(' ')}" failed with code ${exitCode}.`);
}

function isOnPath(program) {
  return (process.env.PATH ?? '').split(delimiter).some((folder) => existsSync(join(folder, program)));
}

function isInstalled(name) {
  const query = spawnSync('dpkg-query', ['-W', '-f=${db:Status-Abbrev}', name], { encoding: 'utf8' });
  return query.status === 0 && query.stdout.startsWith('ii');
}

function hasPackageLists() {
  const lists = '/var/lib/apt/lists';
  return existsSync(lists) && readdirSync(lists).some((file) => file.includes('_Packages'));
}

/** Time of last change; 0 when there is no such file. */
function changedMs(path) {
  return statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

function newestMs(folder, pattern) {
  const files = readdirSync(folder, { recursive: true }).filter((file) => pattern.test(file));
  return Math.max(0, ...files.map((file) => changedMs(join(folder, file))));
}

function readIfThere(path) {
  return existsSync(path) ? readFileSync(path, 'utf8') : '';
}
