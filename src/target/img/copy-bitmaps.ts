/** `convert --bitmaps`: the persistent bitmaps of the source in the output. */
import { addBitmap, loadBitmap, storeBitmaps } from '../../bdev/qcow2/edit/bitmaps.js';
import { BitmapFlag } from '../../bdev/qcow2/tables.js';
import type { DiskSource } from './disk-source.js';
import type { ImageSpec } from './image-spec.js';
import { runTask } from './node-file.js';
import { closeImage, openImage, readBitmaps } from './open-image.js';
import { usage } from './words.js';

/** @param skipBroken whether those that a program left in use are left out. Throws BdevError. */
export function copyBitmaps({ chain }: DiskSource, target: ImageSpec, skipBroken: boolean): void {
  const [image] = chain;
  if (image === undefined || image.header === null) return;
  const output = openImage(target, { mode: 'write' });
  try {
    for (const { name, granularityBits, flags } of runTask(readBitmaps(image.file, image.header))) {
      if ((flags & BitmapFlag.inUse) !== 0) {
        if (!skipBroken) throw brokenBitmap(name);
        process.stderr.write(`strata img: warning: Skipping inconsistent bitmap '${name}'\n`);
        continue;
      }
      runTask(addBitmap(output.file, { name, granularityBits, isDisabled: (flags & BitmapFlag.auto) === 0 }));
      runTask(storeBitmaps(output.file, new Map([[name, runTask(loadBitmap(image.file, name))]])));
    }
  } finally {
    closeImage(output);
  }
}

/** Throws BdevError before anything is made, when bitmaps cannot be copied. */
export function refuseBitmaps({ path, chain }: DiskSource, skipBroken: boolean): void {
  const [image] = chain;
  if (image === undefined || image.header === null)
    throw usage('--bitmaps', `${path} is no image with bitmaps`, 'leave --bitmaps out');
  if (skipBroken) return;
  const broken = runTask(readBitmaps(image.file, image.header)).find(({ flags }) => (flags & BitmapFlag.inUse) !== 0);
  if (broken !== undefined) throw brokenBitmap(broken.name);
}

function brokenBitmap(name: string): Error {
  const hint = 'use --skip-broken-bitmaps, or remove it with `bitmap --remove`';
  return usage('--bitmaps', `Cannot copy inconsistent bitmap '${name}'`, hint);
}
