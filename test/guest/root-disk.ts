/** A disk that a guest runs from: the contents of its initramfs as an ext4 file system. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { decompress } from 'zstd-napi';
import { guestImage } from '../../scripts/guest-image.js';

const ROOT_BYTES = 512 * 2 ** 20;

/** Makes the file system as a raw image at `path`. */
export function makeRootDisk(path: string): void {
  const folder = `${path}.tree`;
  mkdirSync(folder);
  const archive = decompress(readFileSync(guestImage().initramfsPath));
  execFileSync('busybox', ['cpio', '-idm'], { cwd: folder, input: archive, stdio: ['pipe', 'ignore', 'ignore'] });
  writeFileSync(`${folder}/.root-disk`, '');
  execFileSync('mkfs.ext4', ['-q', '-d', folder, path, String(ROOT_BYTES / 1024)]);
  rmSync(folder, { recursive: true });
}
