/**
 * Goal: a change of the format's version, or of the width of refcounts, happens whole or not at all, and changes nothing that a disk
 * holds. Method: images that QEMU made, with zero clusters, snapshots and bitmaps; a crash after each write; qemu-img check.
 */
import { afterAll, describe, expect, it } from 'vitest';
import { changeRefcountWidth } from '../../../src/bdev/qcow2/edit/refcount-width.js';
import { downgradeImage, upgradeImage } from '../../../src/bdev/qcow2/edit/version.js';
import { seededRandom } from '../../support/seed.js';
import { judgeCrashes } from './crash-judge.js';
import { headerOf } from './plain-reader.js';
import { ImageFolder, qemuImg, qemuIo } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());
const random = seededRandom(7);
const ignore = (): void => undefined;

function imageOf(options: string, ...commands: string[]): Buffer {
  qemuImg('create', '-q', '-f', 'qcow2', '-o', options, folder.of('image'), '256k');
  qemuIo(folder.of('image'), ...commands);
  return folder.read('image');
}

const WRITES = ['write -P 1 0 64k', 'write -z 16k 16k', 'write -P 2 128k 5k', 'write -z 200k 8k'];

describe('an image', () => {
  it('becomes version 2 without zero clusters, and version 3 again', () => {
    const { after } = judgeCrashes(
      folder,
      imageOf('cluster_size=4k', ...WRITES),
      (file) => downgradeImage(file, false, ignore),
      random,
    );
    expect(headerOf(after).version).toBe(2);
    expect(headerOf(judgeCrashes(folder, after, upgradeImage, random).after).version).toBe(3);
  });

  it('writes its zeroes out where something else would show through', () => {
    qemuImg('create', '-q', '-f', 'raw', folder.of('base'), '256k');
    const image = imageOf('cluster_size=4k', ...WRITES);
    const covered = new RecordingFile(image);
    runTask(downgradeImage(covered, true, ignore));
    const bare = new RecordingFile(image);
    runTask(downgradeImage(bare, false, ignore));
    expect(covered.bytes.length).toBeGreaterThan(bare.bytes.length);
    expect(headerOf(covered.bytes).version).toBe(2);
  });

  it('keeps its snapshots in either version, but for zero clusters within them', () => {
    imageOf('cluster_size=4k,compat=0.10', 'write -P 1 0 64k');
    qemuImg('snapshot', '-c', 'one', folder.of('image'));
    qemuIo(folder.of('image'), 'write -P 2 0 8k');
    const { after } = judgeCrashes(folder, folder.read('image'), upgradeImage, random);
    const again = judgeCrashes(folder, after, (file) => downgradeImage(file, false, ignore), random).after;
    expect(headerOf(again).version).toBe(2);
    imageOf('cluster_size=4k', ...WRITES);
    qemuImg('snapshot', '-c', 'one', folder.of('image'));
    const file = new RecordingFile(folder.read('image'));
    expect(() => runTask(downgradeImage(file, false, ignore))).toThrow('zero clusters');
    expect(file.writes).toBe(0);
  });

  it.each([
    ['cluster_size=512', 6],
    ['cluster_size=512', 0],
    ['cluster_size=4k,refcount_bits=1', 3],
    ['cluster_size=4k,refcount_bits=64', 2],
    ['cluster_size=4k,extended_l2=off,refcount_bits=8', 5],
  ])('with %s has refcounts of another width: 2^%i', (options, order) => {
    const image = imageOf(options, ...WRITES);
    const { after } = judgeCrashes(folder, image, (file) => changeRefcountWidth(file, order, ignore), random);
    expect(headerOf(after).refcountOrder).toBe(order);
  });

  it('stays as it is where a refcount would not fit', () => {
    imageOf('cluster_size=4k', 'write -P 1 0 64k');
    for (const name of ['a', 'b', 'c']) qemuImg('snapshot', '-c', name, folder.of('image'));
    const file = new RecordingFile(folder.read('image'));
    expect(() => runTask(changeRefcountWidth(file, 1, ignore))).toThrow('Cannot decrease refcount entry width');
    expect(headerOf(file.bytes).refcountOrder).toBe(4);
  });
});
