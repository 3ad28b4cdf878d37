/**
 * Goal: refcounts of every width are read and changed right, in little memory, with tables that grow; nothing that the image uses is
 * written to before the commit.
 * Method: random edits beside a model, with next to nothing held in memory; the image is judged by qemu-img and read by a new editor.
 */
import { afterAll, describe, expect, it } from 'vitest';
import { ClusterRanges } from '../../../src/bdev/qcow2/edit/cluster-ranges.js';
import { commitHeader, loadHeader } from '../../../src/bdev/qcow2/edit/header.js';
import { RefcountEditor } from '../../../src/bdev/qcow2/edit/refcount-editor.js';
import { resizeImage } from '../../../src/bdev/qcow2/edit/resize.js';
import { seededRandom } from '../../support/seed.js';
import { headerOf } from './plain-reader.js';
import { ImageFolder, check, qemuImg } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

const CLUSTER = 512;

function newImage(refcountBits: number): RecordingFile {
  const options = `cluster_size=${CLUSTER},refcount_bits=${refcountBits},preallocation=metadata`;
  qemuImg('create', '-q', '-f', 'qcow2', '-o', options, folder.of('image'), '2M');
  return new RecordingFile(folder.read('image'));
}

function openEditor(file: RecordingFile, heldBytesMax?: number): RefcountEditor {
  const { header } = runTask(loadHeader(file));
  return runTask(RefcountEditor.open(file, header, new ClusterRanges(), heldBytesMax));
}

function commit(file: RecordingFile, editor: RefcountEditor): void {
  const loaded = runTask(loadHeader(file));
  const table = runTask(editor.finish());
  runTask(commitHeader(file, loaded, { ...loaded.header, ...table }));
}

describe.each([1, 2, 4, 8, 16, 32, 64])('refcounts of %i bits', (bits) => {
  const random = seededRandom(bits);

  it('are what a model says after random edits, with two blocks in memory', () => {
    const file = newImage(bits);
    const old = Buffer.from(file.bytes);
    const before = openEditor(file);
    const editor = openEditor(file, 0);
    const held = new Map<number, number>();
    const max = Math.min(editor.max, 300);
    for (let i = 0; i < 400; i++) {
      const kind = random.below(3);
      const clusters = [...held.keys()];
      if (kind === 0 || clusters.length === 0) {
        const count = 1 + random.below(i % 40 === 0 ? 3000 : 8);
        const first = runTask(editor.allocate(count));
        for (let n = 0; n < count; n++) {
          expect(held.get(first + n) ?? 0).toBe(0);
          held.set(first + n, 1);
        }
        continue;
      }
      const cluster = clusters[random.below(clusters.length)]!;
      const count = held.get(cluster)!;
      if (kind === 1 && count > 0 && count < max) {
        const by = 1 + random.below(max - count);
        runTask(editor.raise(cluster, 1, by));
        held.set(cluster, count + by);
      } else if (kind === 2 && count > 0) {
        runTask(editor.lower(cluster, 1, count));
        held.delete(cluster);
      }
    }
    for (const [cluster, count] of held) expect(runTask(editor.get(cluster))).toBe(count);
    commit(file, editor);
    expect(check(folder.write('edited', file.bytes))).toBe('leaks');
    // What was in use is as it was, but for the header.
    for (let cluster = 1; cluster * CLUSTER < old.length; cluster++) {
      if (runTask(before.get(cluster)) === 0) continue;
      const at = cluster * CLUSTER;
      expect(file.bytes.compare(old, at, at + CLUSTER, at, at + CLUSTER)).toBe(0);
    }
    const again = openEditor(file);
    for (const [cluster, count] of held) {
      expect(runTask(again.get(cluster))).toBe(count);
      runTask(again.lower(cluster, 1, count));
    }
    commit(file, again);
    expect(check(folder.write('edited', file.bytes))).toBe('');
  });

  it('have a table that grows with the file', () => {
    const file = newImage(bits);
    const clusters = headerOf(file.bytes).refcountTableClusters;
    runTask(resizeImage(file, 5 * 2 ** 20, { preallocation: 'metadata' }));
    runTask(resizeImage(file, 12 * 2 ** 20, { preallocation: 'metadata' }));
    expect(headerOf(file.bytes).refcountTableClusters).toBeGreaterThanOrEqual(clusters + (bits < 16 ? 0 : 1));
    expect(check(folder.write('grown', file.bytes))).toBe('');
    const { header } = runTask(loadHeader(file));
    expect(header.sizeBytes).toBe(12 * 2 ** 20);
  });

  it('have a smallest and a largest value', () => {
    const file = newImage(bits);
    const editor = openEditor(file);
    const cluster = runTask(editor.allocate(1));
    if (editor.max > 1) runTask(editor.raise(cluster, 1, editor.max - 1));
    expect(runTask(editor.get(cluster))).toBe(2 ** Math.min(bits, 32) - 1);
    expect(() => runTask(editor.raise(cluster, 1))).toThrow('cannot have');
    runTask(editor.lower(cluster, 1, editor.max));
    expect(() => runTask(editor.lower(cluster, 1))).toThrow('count fewer users');
    expect(() => runTask(editor.raise(cluster, 1))).toThrow('count fewer users');
    expect(() => runTask(editor.raise(2 ** 40, 1))).toThrow('count fewer users');
    expect(file.writes).toBe(0);
  });
});

describe('the refcount table', () => {
  it('that leads outside is refused', () => {
    const file = newImage(16);
    const { refcountTableOffset } = headerOf(file.bytes);
    for (const [entry, message] of [
      [0x1100n, 'not the start of a cluster'],
      [0x00ff000000000000n, 'beyond the end'],
    ] as const) {
      const bytes = Buffer.from(file.bytes);
      bytes.writeBigUInt64BE(entry, refcountTableOffset);
      expect(() => openEditor(new RecordingFile(bytes))).toThrow(message);
    }
  });

  it('does not grow beyond its bound', () => {
    const editor = openEditor(newImage(64));
    // 2^20 entries, each for a block of 64 counters.
    expect(() => runTask(editor.allocate(2 ** 26))).toThrow('cannot grow');
  });
});

it('ranges of clusters find what lies in them', () => {
  const random = seededRandom(1000);
  const ranges = new ClusterRanges();
  const model = new Uint8Array(2000);
  for (let i = 0; i < 200; i++) {
    const [first, count] = [random.below(1990), random.below(9)];
    ranges.add(first, count);
    model.fill(1, first, first + count);
    const [from, length] = [random.below(1990), 1 + random.below(100)];
    const found = model.subarray(from, from + length).indexOf(1);
    expect(ranges.find(from, from + length)).toBe(found < 0 ? -1 : from + found);
  }
});
