/** Writing where the file of an image may end. */
import type { ImageFile } from '../image-file.js';
import type { Task } from '../../task.js';

/** Writes, and makes the file longer first if it ends before. Throws BdevError. */
export function* writeAt(file: ImageFile, offset: number, bytes: Uint8Array): Task<void> {
  const end = offset + bytes.length;
  if (end > file.sizeBytes) yield* file.grow(end);
  yield* file.write(offset, bytes);
}
