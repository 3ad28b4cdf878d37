/**
 * The test guest's kernel and initramfs, built from Debian packages and cached.
 *
 * `.cache/guest/<key>/` is complete or absent: it is built under another name and renamed. The key covers this recipe,
 * the versions of the packages and the identity of every file taken from the host, so a stale image is never used and
 * two builds at a time cost work, not correctness. Run by itself it builds the image and prints the two paths.
 */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync } from 'node:fs';
import { renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { compress } from 'zstd-napi';
import { buildInitramfs, hostFileIdentities, libraryPaths } from './guest/initramfs.js';
import { kernelImage, kernelModules, newestKernelPackage, unpackKernel, type KernelPackage } from './guest/kernel.js';
import { installedVersions } from './guest/packages.js';

export interface GuestImage {
  readonly kernelPath: string;
  readonly initramfsPath: string;
}

const CACHE_DIRECTORY = fileURLToPath(new URL('../.cache/guest', import.meta.url));
const RECIPE_DIRECTORY = fileURLToPath(new URL('guest', import.meta.url));

/** Unused images and leftovers of killed builds go after this time. */
const KEEP_MS = 7 * 24 * 3600 * 1000;

/**
 * The guest's image, from the cache or built now (about ten seconds, with a download of 27 MB).
 *
 * @throws GuestSetupError naming the command that provides what is missing
 */
export function guestImage(): GuestImage {
  const versions = installedVersions();
  const kernel = newestKernelPackage();
  const libraries = libraryPaths();
  const key = cacheKey([`${kernel.name}=${kernel.version}`, ...versions, ...hostFileIdentities(libraries)]);
  const directory = join(CACHE_DIRECTORY, key);
  if (!existsSync(directory)) {
    mkdirSync(CACHE_DIRECTORY, { recursive: true });
    removeOldEntries();
    build(kernel, libraries, directory);
  }
  return { kernelPath: join(directory, 'vmlinuz'), initramfsPath: join(directory, 'initramfs.zst') };
}

function build(kernel: KernelPackage, libraries: readonly string[], directory: string): void {
  const work = mkdtempSync(`${directory}.build-`);
  try {
    const unpacked = unpackKernel(kernel, work);
    const result = join(work, 'result');
    mkdirSync(result);
    writeFileSync(join(result, 'vmlinuz'), kernelImage(unpacked));
    const initramfs = buildInitramfs(kernelModules(unpacked), libraries);
    writeFileSync(join(result, 'initramfs.zst'), compress(initramfs, { compressionLevel: 6 }));
    publish(result, directory);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** Two builds may finish at a time: both made the same thing, the first one stays. */
function publish(result: string, directory: string): void {
  try {
    renameSync(result, directory);
  } catch (error) {
    if (!existsSync(directory)) throw error;
  }
}

function cacheKey(inputs: readonly string[]): string {
  const hash = createHash('sha256');
  for (const file of readdirSync(RECIPE_DIRECTORY).sort()) hash.update(readFileSync(join(RECIPE_DIRECTORY, file)));
  hash.update(inputs.join('\n'));
  return hash.digest('hex').slice(0, 16);
}

function removeOldEntries(): void {
  for (const entry of readdirSync(CACHE_DIRECTORY)) {
    const path = join(CACHE_DIRECTORY, entry);
    const modified = statSync(path, { throwIfNoEntry: false });
    if (modified !== undefined && Date.now() - modified.mtimeMs > KEEP_MS)
      rmSync(path, { recursive: true, force: true });
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { kernelPath, initramfsPath } = guestImage();
  console.log(`kernel    ${kernelPath}\ninitramfs ${initramfsPath}`);
}
