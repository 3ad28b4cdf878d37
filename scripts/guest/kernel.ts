/**
 * The guest's kernel: Debian's newest cloud kernel, downloaded as a package and unpacked, never installed.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { GuestSetupError, run } from './packages.js';

const META_PACKAGE = 'linux-image-cloud-amd64';

/** What the guest must be able to do; their dependencies are found in the modules themselves. */
const WANTED_MODULES = ['virtio_pci', 'virtio_console', 'virtio_blk', 'crc32c_intel', 'ext4', 'xfs'];

export interface KernelPackage {
  readonly name: string;
  readonly version: string;
}

export interface KernelModule {
  readonly name: string;
  readonly content: Buffer;
}

/**
 * The package of the newest cloud kernel that apt knows.
 *
 * @throws GuestSetupError when apt has no package lists
 */
export function newestKernelPackage(): KernelPackage {
  const record = run('apt-cache', ['show', '--no-all-versions', META_PACKAGE], [0, 100]);
  const [, name, version] = /^Depends: (linux-image-\S+-cloud-amd64) \(= ([^)]+)\)/m.exec(record) ?? [];
  if (name === undefined || version === undefined) {
    throw new GuestSetupError(`apt knows no ${META_PACKAGE}: its lists are empty or stale. Run:\n  apt-get update`);
  }
  return { name, version };
}

/**
 * Downloads and unpacks the kernel in `directory`; needs no privilege.
 *
 * @returns the folder the package was unpacked to
 * @throws GuestSetupError when the download fails
 */
export function unpackKernel(kernel: KernelPackage, directory: string): string {
  const asRoot = process.getuid?.() === 0 ? ['-o', 'APT::Sandbox::User=root'] : [];
  run('apt-get', [...asRoot, 'download', `${kernel.name}=${kernel.version}`], [0], directory);
  const archive = readdirSync(directory).find((file) => file.endsWith('.deb'));
  if (archive === undefined) throw new GuestSetupError(`apt-get download left no package of ${kernel.name}`);
  const unpacked = join(directory, 'kernel');
  run('dpkg-deb', ['-x', join(directory, archive), unpacked]);
  return unpacked;
}

/** The bootable image of an unpacked kernel package. */
export function kernelImage(unpacked: string): Buffer {
  const image = readdirSync(join(unpacked, 'boot')).find((file) => file.startsWith('vmlinuz-'));
  if (image === undefined) throw new GuestSetupError('The kernel package holds no boot/vmlinuz-*');
  return readFileSync(join(unpacked, 'boot', image));
}

/**
 * The modules the guest needs, each after those it depends on. What is built into the kernel is left out.
 *
 * @throws GuestSetupError when a module is neither in the package nor built in
 */
export function kernelModules(unpacked: string): KernelModule[] {
  const release = readdirSync(join(unpacked, 'lib/modules'))[0];
  if (release === undefined) throw new GuestSetupError('The kernel package holds no modules');
  const root = join(unpacked, 'lib/modules', release);
  const builtIn = new Set(readFileSync(join(root, 'modules.builtin'), 'utf8').split('\n').map(moduleName));
  const paths = new Map<string, string>();
  for (const entry of readdirSync(root, { recursive: true, encoding: 'utf8' })) {
    if (entry.endsWith('.ko')) paths.set(moduleName(entry), join(root, entry));
  }

  const ordered = new Map<string, KernelModule>();
  const visit = (name: string): void => {
    if (ordered.has(name) || builtIn.has(name)) return;
    const path = paths.get(name);
    if (path === undefined) throw new GuestSetupError(`The kernel package holds no module ${name}`);
    const content = readFileSync(path);
    for (const dependency of moduleDependencies(content)) visit(dependency);
    ordered.set(name, { name, content });
  };
  for (const name of WANTED_MODULES) visit(name);
  return [...ordered.values()];
}

/** Module names are the same with `-` and `_`. */
function moduleName(path: string): string {
  return basename(path, '.ko').replaceAll('-', '_');
}

/** A module's `.modinfo` section is a run of `key=value\0` strings, one of them `depends=a,b`. */
function moduleDependencies(content: Buffer): string[] {
  const key = '\0depends=';
  const start = content.indexOf(key, 0, 'latin1');
  if (start < 0) return [];
  const from = start + key.length;
  const value = content.toString('latin1', from, content.indexOf(0, from));
  return value === '' ? [] : value.split(',').map(moduleName);
}
