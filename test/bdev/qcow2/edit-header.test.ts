/**
 * Goal: a header changes whole or not at all, wherever its extensions and names lie, and QEMU reads it.
 * Method: headers that QEMU made, with names of all lengths; changes with crashes at each write and torn at 512 bytes; qemu-img.
 */
import { afterAll, describe, expect, it } from 'vitest';
import {
  changeBackingFile,
  loadHeader,
  markImage,
  setLazyRefcounts,
  updateHeader,
} from '../../../src/bdev/qcow2/edit/header.js';
import { createSnapshot } from '../../../src/bdev/qcow2/edit/snapshots.js';
import type { Task } from '../../../src/bdev/task.js';
import { seededRandom } from '../../support/seed.js';
import { judgeCrashes } from './crash-judge.js';
import { headerOf } from './plain-reader.js';
import { ImageFolder, check, info, qemuImg } from './qemu-images.js';
import { RecordingFile, runTask } from './recording-file.js';

const folder = new ImageFolder();
afterAll(() => folder.remove());

function newImage(options: string, ...more: string[]): Buffer {
  qemuImg('create', '-q', '-u', '-f', 'qcow2', '-o', options, ...more, folder.of('image'), '1M');
  return folder.read('image');
}

const long = (length: number, letter: string): string => `/${letter.repeat(length - 1)}`;

describe.each(['compat=0.10', 'cluster_size=2048', 'cluster_size=65536', 'cluster_size=512,compat=0.10'])(
  'an image with %s',
  (options) => {
    it('gets another backing file, and a crash leaves the old name or the new one', () => {
      const random = seededRandom(options.length);
      // A cluster of 512 bytes has no room for long names.
      const small = options.includes('=512') ? [9, 200, 60, 300] : [20, 300, 9, 450, 380, 1];
      const lengths = /=(512|2048)/.test(options) ? small : [20, 300, 9, 900, 450, 380, 1023, 1];
      let image = newImage(options, '-b', '/first', '-F', 'raw');
      lengths.forEach((length, i) => {
        const name = long(length, 'abcdefgh'[i]!);
        const judged = judgeCrashes(folder, image, (file) => changeBackingFile(file, name, 'qcow2'), random);
        image = judged.after;
        expect(info(folder.write('named', image))['backing-filename']).toBe(name);
      });
      image = judgeCrashes(folder, image, (file) => changeBackingFile(file, null, null), random).after;
      expect(info(folder.write('named', image))['backing-filename']).toBeUndefined();
    });
  },
);

describe('a header', () => {
  const random = seededRandom(3);

  it('says that refcounts are lazy, that it is dirty, or corrupt, and not any more', () => {
    let image = newImage('cluster_size=4096');
    const judge = (task: (file: RecordingFile) => Task<unknown>): void => {
      image = judgeCrashes(folder, image, task, random).after;
    };
    judge((file) => setLazyRefcounts(file, true));
    expect(headerOf(image).compatible).toBe(1n);
    judge((file) => markImage(file, 'dirty', true));
    expect(headerOf(image).incompatible).toBe(1n);
    judge((file) => markImage(file, 'dirty', false));
    judge((file) => setLazyRefcounts(file, false));
    const file = new RecordingFile(image);
    runTask(markImage(file, 'corrupt', true));
    expect(check(folder.write('corrupt', file.bytes))).toBe('');
    expect(() => runTask(setLazyRefcounts(file, true))).toThrow('corrupt');
    expect([headerOf(image).incompatible, headerOf(image).compatible]).toEqual([0n, 0n]);
    const old = new RecordingFile(newImage('compat=0.10'));
    runTask(markImage(old, 'dirty', true));
    expect(() => runTask(setLazyRefcounts(old, true))).toThrow('version is 2');
    expect(old.writes).toBe(0);
  });

  it('loses autoclear bits that are not known here, with the first change', () => {
    const image = newImage('cluster_size=4096');
    image.writeBigUInt64BE(1n << 40n, 88);
    const file = new RecordingFile(image);
    runTask(createSnapshot(file, { name: 's', seconds: 1, nanoseconds: 1 }));
    expect(headerOf(file.bytes).autoclear).toBe(0n);
    const lazy = new RecordingFile(image);
    runTask(setLazyRefcounts(lazy, true));
    expect(headerOf(lazy.bytes).autoclear).toBe(0n);
  });

  it('keeps extensions and fields that are not known here', () => {
    const image = newImage('cluster_size=4096', '-b', '/base', '-F', 'raw');
    const file = new RecordingFile(image);
    const unknown = { type: 0x12345678, data: Buffer.from('something of somebody') };
    runTask(updateHeader(file, () => ({ unknownExtensions: [unknown], unknownFields: Buffer.alloc(16, 7) })));
    runTask(createSnapshot(file, { name: 's', seconds: 1, nanoseconds: 1 }));
    const { header } = runTask(loadHeader(file));
    expect(header.unknownExtensions.map(({ type, data }) => [type, data.toString()])).toEqual([
      [unknown.type, 'something of somebody'],
    ]);
    expect(header.unknownFields.equals(Buffer.alloc(16, 7))).toBe(true);
    expect([check(folder.write('kept', file.bytes)), info(folder.of('kept'))['backing-filename']]).toEqual([
      '',
      '/base',
    ]);
  });

  it('of an older QEMU, which is shorter, is changed as well', () => {
    const newer = newImage('cluster_size=4096', '-b', '/base', '-F', 'raw');
    const older = Buffer.from(newer);
    newer.copy(older, 104, 112, 4096);
    older.writeUInt32BE(104, 100);
    older.writeBigUInt64BE(newer.readBigUInt64BE(8) - 8n, 8);
    const { after } = judgeCrashes(folder, older, (file) => setLazyRefcounts(file, true), random);
    expect([after.readUInt32BE(100), info(folder.write('older', after))['backing-filename']]).toEqual([112, '/base']);
  });

  it('is written as one sector when nothing but its fields change', () => {
    const file = new RecordingFile(newImage('cluster_size=4096', '-b', '/base', '-F', 'raw'));
    runTask(setLazyRefcounts(file, true));
    const { writes } = file;
    runTask(setLazyRefcounts(file, false));
    const last = file.operations.findLast(({ type }) => type === 'write');
    expect([file.writes - writes, last?.type === 'write' && [last.offset, last.bytes.length]]).toEqual([1, [0, 512]]);
  });

  it('is not written when a name does not fit', () => {
    const file = new RecordingFile(newImage('cluster_size=512'));
    expect(() => runTask(changeBackingFile(file, long(500, 'a'), 'raw'))).toThrow('a cluster has 512');
    expect(() => runTask(changeBackingFile(file, long(1024, 'a'), 'raw'))).toThrow('it may have 1 to 1023');
    expect(file.operations).toEqual([]);
  });
});
