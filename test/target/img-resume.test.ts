/**
 * Goal: a convert that was cut off anywhere goes on with --resume, and makes the image that one which was left alone makes; it goes on
 * only with what was begun from the same source. Method: processes killed after each of their notes, and between; the writer of images
 * taken apart and put together again at each step; qemu-img.
 */
import { existsSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { spawnSync } from 'node:child_process';
import { randomFillSync } from 'node:crypto';
import { afterAll, describe, expect, it } from 'vitest';
import { CREATE_DEFAULTS } from '../../src/bdev/qcow2/create.js';
import { ImageWriter } from '../../src/bdev/qcow2/image-writer.js';
import { NodeFile, runTask } from '../../src/target/img/node-file.js';
import { QemuImg } from '../support/qemu-img.js';
import { Program, STRATA, until } from './programs.js';

const qemu = new QemuImg();
afterAll(() => qemu.remove());

const MIB = 2 ** 20;
const NOTE = 'out.strata-resume';

function img(...args: readonly string[]) {
  return spawnSync(process.execPath, [STRATA, 'img', ...args], { cwd: qemu.folder, encoding: 'utf8' });
}

const disk = Buffer.alloc(12 * MIB + 512);
for (let at = 0; at < 4 * MIB; at += 16) disk.write(`line ${String(at).padStart(10)}\n`, at);
randomFillSync(disk, 5 * MIB, 4 * MIB);
disk.fill(7, disk.length - 5000);
writeFileSync(qemu.path('disk.raw'), disk);

/** What is in the note, or undefined. */
function noted(): number | undefined {
  if (!existsSync(qemu.path(NOTE))) return undefined;
  return (JSON.parse(readFileSync(qemu.path(NOTE), 'utf8')) as { offset: number }).offset;
}

describe('strata img convert --resume', () => {
  it.each([
    ['raw', []],
    ['qcow2', []],
    ['qcow2', ['-c', '-o', 'cluster_size=16k,compression_type=zstd']],
  ])('goes on after each kill: %s %s', async (format, options) => {
    const args = [
      'img',
      'convert',
      '--resume',
      '-m',
      '2',
      '-r',
      '3M',
      '-f',
      'raw',
      '-O',
      format,
      ...options,
      'disk.raw',
      'out',
    ];
    let before = -1;
    let kills = 0;
    for (;;) {
      const program = new Program(STRATA, args, qemu.folder);
      const more = await until('a note, or the end', () => {
        if (program.child.exitCode !== null) return 'end';
        const offset = noted();
        return offset !== undefined && offset > before ? offset : undefined;
      });
      if (more === 'end') break;
      before = more;
      kills++;
      await program.stop('SIGKILL');
    }
    expect(kills).toBeGreaterThan(0);
    expect(existsSync(qemu.path(NOTE))).toBe(false);
    expect(qemu.run('compare', '-f', 'raw', '-F', format, 'disk.raw', 'out')).toContain('identical');
    if (format === 'qcow2') expect(qemu.check('out')).toMatchObject({ status: 0, words: '' });
    expect(img('convert', '-f', 'raw', '-O', format, ...options, 'disk.raw', 'whole').status).toBe(0);
    expect(readFileSync(qemu.path('out')).equals(readFileSync(qemu.path('whole')))).toBe(true);
  });

  it('keeps what it has at Ctrl-C, and does not go on with another source, other options or another output', async () => {
    const args = ['convert', '--resume', '-m', '2', '-r', '3M', '-f', 'raw', '-O', 'qcow2'] as const;
    const program = new Program(STRATA, ['img', ...args, 'disk.raw', 'out'], qemu.folder);
    await until('a note', noted);
    expect(await program.stop('SIGINT')).toMatchObject({ signal: 'SIGINT' });
    expect(noted()).toBeGreaterThan(0);
    const refused = (...more: readonly string[]): string => {
      const { status, stderr } = img(...more);
      expect(status).toBe(1);
      return stderr;
    };
    expect(refused(...args, '-S', '64k', 'disk.raw', 'out')).toContain('-S is not what it was');
    expect(refused(...args, '-o', 'cluster_size=4k', 'disk.raw', 'out')).toContain('options is not what it was');
    writeFileSync(qemu.path('other.raw'), disk);
    expect(refused(...args, 'other.raw', 'out')).toContain('is not what it was');
    const { mtime } = statSync(qemu.path('disk.raw'));
    utimesSync(qemu.path('disk.raw'), mtime, new Date(mtime.getTime() + 1000));
    expect(refused(...args, 'disk.raw', 'out')).toContain('disk.raw is not what it was');
    const note = readFileSync(qemu.path(NOTE), 'utf8');
    for (const damaged of [note.slice(0, 100), '{}', note.replace(/"offset":\d+/, '"offset":0')]) {
      writeFileSync(qemu.path(NOTE), damaged);
      expect(refused(...args, 'disk.raw', 'out')).toContain('damaged');
    }
    for (const more of [['-W'], ['--bitmaps'], ['-o', 'preallocation=full']]) {
      expect(refused(...args, ...more, 'disk.raw', 'new')).toContain('--resume');
    }
    // Without --resume it is made anew, and the note is gone.
    expect(img('convert', '-f', 'raw', '-O', 'qcow2', 'disk.raw', 'out').status).toBe(0);
    expect(existsSync(qemu.path(NOTE))).toBe(false);
  });
});

describe('a writer of images', () => {
  it.each([false, true])('is put together again at each step, compressed: %s', (isCompressed) => {
    const options = { ...CREATE_DEFAULTS, sizeBytes: 4 * MIB, clusterBits: 9 };
    const path = qemu.path('steps');
    const write = (restartAt: number): Buffer => {
      rmSync(path, { force: true });
      let file = new NodeFile(path, { mode: 'create' });
      let writer = new ImageWriter(file, options);
      for (let i = 0; i < 200; i++) {
        // L2 tables that are settled, and some that are not.
        const offset = i * 40 * 512;
        if (i === restartAt) {
          const saved = writer.save();
          // What comes later is lost, or is there in part.
          runTask(writer.writePlain(offset, Buffer.alloc(512, 0xee)));
          runTask(writer.settle(offset + 64 * 1024));
          file.close();
          file = new NodeFile(path, { mode: 'write' });
          writer = new ImageWriter(file, options);
          file.truncate(writer.restore(saved));
        }
        if (isCompressed) runTask(writer.writeCompressed(offset, Buffer.alloc(1 + (i % 300), i)));
        else runTask(writer.writePlain(offset, Buffer.alloc(1024, i)));
        runTask(writer.settle(offset));
      }
      runTask(writer.finish(true));
      file.close();
      return readFileSync(path);
    };
    const whole = write(-1);
    for (let step = 0; step < 200; step += 7) expect(write(step).equals(whole)).toBe(true);
  });
});
