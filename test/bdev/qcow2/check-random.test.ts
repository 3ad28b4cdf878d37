/**
 * Goal: no bytes in an image make the check end otherwise than with a report or an error that names a field, and what it says of them is
 * what qemu-img says; a repair that is cut off anywhere does no harm. Method: images with metadata that is changed at random places, by
 * a seed; repairs whose file fails at each write in turn, and that are begun again.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BdevError } from '../../../src/bdev/bdev.js';
import { checkImage } from '../../../src/bdev/qcow2/check.js';
import type { CheckReport, Repair } from '../../../src/bdev/qcow2/check.js';
import type { ImageFile } from '../../../src/bdev/qcow2/image-file.js';
import type { Task } from '../../../src/bdev/task.js';
import { NodeFile, runTask } from '../../../src/target/img/node-file.js';
import { QemuImg } from '../../support/qemu-img.js';
import { seed, seededRandom } from '../../support/seed.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

const CASES = 60;
const TIMEOUT_MS = 120_000;

beforeAll(() => {
  for (const [name, options] of [
    ['plain', 'lazy_refcounts=off'],
    ['extended', 'extended_l2=on,cluster_size=16k'],
  ] as const) {
    qemu.run('create', '-q', '-f', 'qcow2', '-o', options, name, '64M');
    qemu.io(name, 'write -P 1 0 700k', 'write -c -P 2 8M 128k', 'write -z 20M 1M');
    qemu.run('bitmap', '--add', '--enable', '-g', '64k', name, 'bitmap0');
    qemu.run('snapshot', '-c', 'one', name);
    qemu.io(name, 'write -P 3 30M 3k', 'discard 0 128k');
  }
});

function check(name: string, repair: Repair): CheckReport | BdevError {
  const file = new NodeFile(qemu.path(name), { mode: 'write' });
  try {
    return runTask(checkImage(file, { repair }));
  } catch (error) {
    if (error instanceof BdevError) return error;
    throw error;
  } finally {
    file.close();
  }
}

function exitCode(outcome: CheckReport | BdevError): number {
  if (outcome instanceof BdevError || outcome.checkErrors > 0) return 1;
  return outcome.corruptions > 0 ? 2 : outcome.leaks > 0 ? 3 : 0;
}

function words(outcome: CheckReport | BdevError): string {
  if (outcome instanceof BdevError) return outcome.message;
  return outcome.findings
    .slice(0, 4)
    .map(({ field, message }) => `${field} ${message}`)
    .join('; ');
}

/** Bytes of metadata: those of the header, and what is not zero at the start of clusters. */
function metadataPlaces(image: Buffer): number[] {
  const places = Array.from({ length: 120 }, (_, at) => at);
  for (let cluster = 16384; cluster < image.length; cluster += 16384) {
    for (let at = cluster; at + 8 <= Math.min(cluster + 512, image.length); at += 8) {
      if (image.readBigUInt64BE(at) !== 0n) places.push(at);
    }
  }
  return places;
}

describe.each(['plain', 'extended'])('checkImage on random damage: %s', (base) => {
  it(
    'says what qemu-img says, and repairs nothing that is unsound to it',
    () => {
      const random = seededRandom(1);
      const whole = readFileSync(qemu.path(base));
      const places = metadataPlaces(whole);
      for (let i = 0; i < CASES; i++) {
        const bytes = Buffer.from(whole);
        for (let count = 1 + random.below(3); count > 0; count--) {
          const at = places[random.below(places.length)]!;
          const how = random.below(3);
          if (how === 0) bytes[at] = random.below(256);
          else if (how === 1) bytes[at]! ^= 1 << random.below(8);
          else bytes.fill(0xff, at, at + 8);
        }
        writeFileSync(qemu.path('case'), bytes);
        const what = `seed ${seed}, case ${i}`;
        const theirs = qemu.check('case').status;
        const outcome = check('case', 'none');
        const ours = exitCode(outcome);
        // What cannot be looked at to its end is an error to the one and a corruption to the other: sound it is to neither.
        if (ours === 1 || theirs === 1 || theirs === null) expect([ours, theirs], what).not.toContain(0);
        else expect(ours, `${what}: ${words(outcome)}`).toBe(theirs);
        check('case', 'all');
        const after = check('case', 'none');
        // What is repaired is sound to QEMU, too.
        if (exitCode(after) === 0) expect(qemu.check('case').status, what).toBe(0);
      }
    },
    TIMEOUT_MS,
  );
});

/** A file that is gone at its nth write. */
class MortalFile implements ImageFile {
  writes = 0;
  readonly #file: NodeFile;
  readonly #last: number;

  constructor(file: NodeFile, last: number) {
    this.#file = file;
    this.#last = last;
  }

  get sizeBytes(): number {
    return this.#file.sizeBytes;
  }

  read(offset: number, bytes: Uint8Array): Task<void> {
    return this.#file.read(offset, bytes);
  }

  write(offset: number, bytes: Uint8Array): Task<void> {
    if (++this.writes > this.#last) throw new BdevError('io-error', 'base', 'the file is gone', '');
    return this.#file.write(offset, bytes);
  }

  sync(): Task<void> {
    return this.#file.sync();
  }

  grow(sizeBytes: number): Task<void> {
    return this.#file.grow(sizeBytes);
  }
}

describe('a repair that is cut off', () => {
  it.each([
    ['refcounts made anew', (image: Buffer) => image.fill(0, 65536, 65536 + 8)],
    ['refcounts put right where they are', (image: Buffer) => image.fill(1, 131072 + 8, 131072 + 24)],
    ['copied bits', (image: Buffer) => image.fill(0, 196608, 196609)],
  ])('does no harm at any write: %s', (_, damage) => {
    const image = readFileSync(qemu.path('plain'));
    damage(image);
    for (let last = 0; ; last++) {
      writeFileSync(qemu.path('cut'), image);
      const file = new NodeFile(qemu.path('cut'), { mode: 'write' });
      const mortal = new MortalFile(file, last);
      let isCut = false;
      try {
        runTask(checkImage(mortal, { repair: 'all' }));
      } catch (error) {
        expect(error).toMatchObject({ code: 'io-error' });
        isCut = true;
      } finally {
        file.close();
      }
      if (isCut) check('cut', 'all');
      expect(qemu.check('cut'), `cut off at write ${last}`).toMatchObject({ status: 0 });
      qemu.run('compare', 'cut', 'plain');
      if (!isCut) {
        expect(last).toBeGreaterThan(0);
        return;
      }
    }
  });
});
