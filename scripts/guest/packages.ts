/**
 * The Debian packages the test guest is made of, and the check that they are installed.
 *
 * The list itself is packages.json, so that a plain script can read it before any tool is installed.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';

/** Packages that must be installed on the host: QEMU, and the tools that are copied into the guest. */
export const guestPackages = JSON.parse(
  readFileSync(new URL('packages.json', import.meta.url), 'utf8'),
) as readonly string[];

/** The guest cannot be built or started here; the message says what to do about it. */
export class GuestSetupError extends Error {
  override name = 'GuestSetupError';
}

/** The one line that installs everything the guest needs. */
export const installLine = `apt-get update && apt-get install -y --no-install-recommends ${guestPackages.join(' ')}`;

/**
 * Versions of the installed guest packages, as `name=version`, sorted.
 *
 * @throws GuestSetupError when this is no Debian on x86-64, or a package is missing
 */
export function installedVersions(): string[] {
  if (process.arch !== 'x64') throw new GuestSetupError(`The test guest needs an x86-64 host, this is ${process.arch}`);
  // dpkg-query exits with 1 when it does not know a package, and still prints those it knows.
  const listing = run('dpkg-query', ['-W', '-f=${db:Status-Abbrev} ${Package} ${Version}\n', ...guestPackages], [0, 1]);
  const versions = new Map<string, string>();
  for (const line of listing.split('\n')) {
    const [status, name, version] = line.trim().split(/\s+/);
    if (status === 'ii' && name !== undefined && version !== undefined) versions.set(name, version);
  }
  const missing = guestPackages.filter((name) => !versions.has(name));
  if (missing.length > 0) {
    throw new GuestSetupError(`The test guest needs ${missing.join(', ')}. Install with:\n  ${installLine}`);
  }
  return [...versions].map(([name, version]) => `${name}=${version}`).sort();
}

/**
 * Output of a host command.
 *
 * @throws GuestSetupError with the command and its stderr when it is missing or exits with another code
 */
export function run(command: string, args: readonly string[], okCodes: readonly number[] = [0], cwd?: string): string {
  try {
    return execFileSync(command, args, {
      encoding: 'utf8',
      maxBuffer: 64 << 20,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, LC_ALL: 'C' },
      ...(cwd === undefined ? {} : { cwd }),
    });
  } catch (error) {
    const failure = error as { status?: number | null; stdout?: string; stderr?: string; message: string };
    if (typeof failure.status === 'number' && okCodes.includes(failure.status)) return failure.stdout ?? '';
    throw new GuestSetupError(`${command} ${args.join(' ')} failed: ${failure.stderr?.trim() || failure.message}`);
  }
}
