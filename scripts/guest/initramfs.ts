/**
 * What the guest runs from: busybox, the storage tools of the installed Debian packages with the shared libraries they
 * load, the kernel modules and init.sh. All of it lives in memory; the disks under test hold nothing of the guest's.
 */
import { readFileSync, statSync } from 'node:fs';
import { basename } from 'node:path';
import { CpioWriter } from './cpio.js';
import type { KernelModule } from './kernel.js';
import { GuestSetupError, run } from './packages.js';

const BUSYBOX = '/usr/bin/busybox';

/** Found before busybox's applets of the same name; dash is there because busybox's shell would prefer the applets. */
const TOOLS = [
  '/usr/bin/dash',
  '/usr/bin/fio',
  '/usr/sbin/mkfs.ext4',
  '/usr/sbin/e2fsck',
  '/usr/sbin/resize2fs',
  '/usr/sbin/mkfs.xfs',
  '/usr/sbin/xfs_repair',
  '/usr/sbin/blkdiscard',
  '/usr/sbin/fstrim',
  '/usr/bin/fallocate',
  '/usr/bin/lsblk',
];

const INIT = readFileSync(new URL('init.sh', import.meta.url));

/** The shared libraries and the loader the tools need, by the path they are looked up at. */
export function libraryPaths(): string[] {
  const paths = new Set<string>();
  for (const tool of TOOLS) {
    for (const line of run('ldd', [tool]).split('\n')) {
      if (line.includes('not found')) throw new GuestSetupError(`${tool} lacks a library: ${line.trim()}`);
      // "libaio.so.1 => /lib/... (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"; the vdso has no path.
      const [, path] = /(\/\S+) \(0x/.exec(line) ?? [];
      if (path !== undefined) paths.add(path);
    }
  }
  return [...paths].sort();
}

/** One line for each file taken from the host that changes when the file does. */
export function hostFileIdentities(libraries: readonly string[]): string[] {
  return [BUSYBOX, ...TOOLS, ...libraries].map((path) => {
    const { size, mtimeMs } = statSync(path);
    return `${path} ${size} ${mtimeMs}`;
  });
}

/** The initramfs as an uncompressed cpio archive. */
export function buildInitramfs(modules: readonly KernelModule[], libraries: readonly string[]): Buffer {
  const archive = new CpioWriter();
  for (const path of ['/bin', '/sbin', '/usr/bin', '/usr/sbin', '/proc', '/sys', '/tmp', '/mnt']) {
    archive.directory(path);
  }
  // The kernel opens the console for init before init could mount /dev.
  archive.characterDevice('/dev/console', 5, 1);
  archive.file('/init', INIT, 0o755);
  archive.file('/bin/busybox', readFileSync(BUSYBOX), 0o755);
  for (const tool of TOOLS) archive.file(`/usr/local/bin/${basename(tool)}`, readFileSync(tool), 0o755);
  for (const library of libraries) archive.file(library, readFileSync(library), 0o755);
  for (const { name, content } of modules) archive.file(`/modules/${name}.ko`, content, 0o644);
  archive.file('/modules/order', modules.map(({ name }) => `${name}\n`).join(''), 0o644);
  return archive.finish();
}
