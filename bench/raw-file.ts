/** The file that raw disks are made of: all of it allocated and full of data, so that no request meets a hole. */
import { randomFillSync } from 'node:crypto';
import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, renameSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';

const CHUNK_BYTES = 2 ** 20;

/** Makes the file unless it is there already, at its full size. Returns its path. */
export function rawFile(directory: string, sizeBytes: number): string {
  const path = join(directory, `raw-${sizeBytes}.img`);
  if (existsSync(path) && statSync(path).size === sizeBytes) return path;
  mkdirSync(directory, { recursive: true });
  const unfinished = `${path}.part`;
  const fd = openSync(unfinished, 'w');
  try {
    const chunk = randomFillSync(Buffer.alloc(CHUNK_BYTES));
    for (let at = 0; at < sizeBytes; at += CHUNK_BYTES) {
      // Storage that compresses or merges equal blocks would be measured instead of the target.
      chunk.writeDoubleLE(at, 0);
      writeSync(fd, chunk, 0, Math.min(CHUNK_BYTES, sizeBytes - at));
    }
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
  renameSync(unfinished, path);
  return path;
}
