/** Judges what crashes during an edit leave behind: the old image or the new one, and nothing for `qemu-img check` to say. */
import assert from 'node:assert/strict';
import type { Random } from '../../../src/poller/clock.js';
import { checkImage } from '../../../src/bdev/qcow2/check.js';
import { check } from './qemu-images.js';
import type { ImageFolder } from './qemu-images.js';
import { plainState } from './plain-reader.js';
import { RecordingFile, runTask } from './recording-file.js';
import type { Task } from '../../../src/bdev/task.js';

export interface Judged {
  readonly before: Buffer;
  readonly after: Buffer;
  /** How many files the crashes left. */
  readonly crashes: number;
}

/**
 * Runs an edit, and looks at what a crash at each of its operations may leave.
 * @param randomPerMoment files that keep a part of what is not synced, chosen by chance, beside all of it and none
 */
export function judgeCrashes(
  folder: ImageFolder,
  image: Buffer,
  task: (file: RecordingFile) => Task<unknown>,
  random: Random,
  { backing, randomPerMoment = 1 }: { backing?: Buffer; randomPerMoment?: number } = {},
): Judged {
  const file = new RecordingFile(image);
  runTask(task(file));
  const before = plainState(image, backing);
  const after = plainState(file.bytes, backing);
  assert.notEqual(before, after, 'the edit changes nothing');
  const crashes = file.crashes(random, randomPerMoment);
  for (const { when, bytes } of crashes) {
    const found = plainState(bytes, backing);
    assert.ok(found === before || found === after, `${when}: neither the old image nor the new one: ${found}`);
    const { corruptions, leaks, checkErrors } = runTask(checkImage(new RecordingFile(bytes), { repair: 'none' }));
    assert.deepEqual({ corruptions, leaks, checkErrors }, { corruptions: 0, leaks: 0, checkErrors: 0 }, when);
    assert.equal(check(folder.write('crashed', bytes)), '', when);
  }
  // The last ones: what was synced is there.
  assert.equal(plainState(crashes.at(-1)!.bytes, backing), after);
  return { before: image, after: file.bytes, crashes: crashes.length };
}
