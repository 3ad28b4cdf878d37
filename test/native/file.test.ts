/**
 * Goal: descriptors of files, eventfds and memfds do what the face of the addon says, and answer -errno otherwise.
 *
 * Method: the real system calls on temporary files; a loop device for what only a block device has.
 */
import { mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { FileFacts } from '../../native/index.js';
import {
  Arena,
  EAGAIN,
  EBUSY,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  SEEK_DATA,
  SEEK_HOLE,
  ENXIO,
  F_SEAL_SHRINK,
  O_CREAT,
  O_EXCL,
  O_RDONLY,
  O_RDWR,
  SystemError,
  check,
  checkObject,
  native,
} from '../../native/index.js';
import { closesOnExec, openDescriptors } from '../support/descriptors.js';
import { attachLoop, isRoot } from '../support/loop-device.js';

const ENOENT = 2;
const EBADF = 9;
const EEXIST = 17;
const EINVAL = 22;
const EPERM = 1;
const F_SEAL_SEAL = 1;
const F_SEAL_GROW = 4;

const arena = new Arena(2 ** 31);
const memory = arena.allocate(65536);
const address = arena.baseAddress + memory;
const bytes = arena.view8(memory, 65536);

let folder: string;
let before: string[];

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'strata-test-'));
  before = openDescriptors();
});

afterAll(() => {
  // What one test opens, it closes.
  expect(openDescriptors()).toEqual(before);
  rmSync(folder, { recursive: true });
});

/** Opens a file of the test folder for its action. */
function withFile<T>(name: string, action: (fd: number, path: string) => T, flags = O_RDWR | O_CREAT): T {
  const path = join(folder, name);
  const fd = check(native.fileOpen(path, flags, 0o640), `open ${path}`);
  try {
    return action(fd, path);
  } finally {
    native.fileClose(fd);
  }
}

const facts = (fd: number): FileFacts => checkObject(native.fileStat(fd), 'stat');

describe('files', () => {
  it('are opened with their mode and closed on exec', () => {
    withFile('opened', (fd, path) => {
      expect(closesOnExec(fd)).toBe(true);
      expect(statSync(path).mode & 0o777 & ~0o640).toBe(0);
      expect(native.fileFlags(fd) & 3).toBe(O_RDWR);
      const copy = check(native.fileDuplicate(fd), 'duplicate');
      expect(copy).not.toBe(fd);
      expect(closesOnExec(copy)).toBe(true);
      native.fileClose(copy);
    });
    withFile('opened', (fd) => expect(native.fileFlags(fd) & 3).toBe(O_RDONLY), O_RDONLY);
  });

  it('answer -errno', () => {
    expect(native.fileOpen(join(folder, 'nothing'), O_RDONLY, 0)).toBe(-ENOENT);
    expect(native.fileOpen(folder, O_RDWR | O_CREAT | O_EXCL, 0o600)).toBe(-EEXIST);
    expect(native.fileClose(99999)).toBe(-EBADF);
    expect(native.fileStat(99999)).toBe(-EBADF);
    expect(native.fileRead(99999, address, 1, 0)).toBe(-EBADF);
    expect(native.fileDuplicate(99999)).toBe(-EBADF);
  });

  it('are written, read, synced and cut at any place, also beyond 4 GiB', () => {
    withFile('large', (fd) => {
      const place = 5 * 2 ** 30 + 123;
      bytes.set([1, 2, 3, 4]);
      expect(native.fileWrite(fd, address, 4, place)).toBe(4);
      expect(native.fileSync(fd)).toBe(0);
      expect(facts(fd).sizeBytes).toBe(place + 4);
      expect(native.fileRead(fd, address + 100, 10, place)).toBe(4);
      expect([...bytes.subarray(100, 104)]).toEqual([1, 2, 3, 4]);
      expect(native.fileRead(fd, address, 10, place + 4)).toBe(0);
      expect(native.fileTruncate(fd, 100)).toBe(0);
      expect(facts(fd).sizeBytes).toBe(100);
    });
  });

  it('lose their space where a hole is punched, and not their size', () => {
    withFile('holes', (fd) => {
      bytes.fill(1);
      for (let i = 0; i < 16; i++) native.fileWrite(fd, address, 65536, i * 65536);
      native.fileSync(fd);
      const full = facts(fd);
      expect(full.allocatedBytes).toBeGreaterThanOrEqual(2 ** 20);
      expect(native.fileAllocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 ** 19)).toBe(0);
      expect(facts(fd).sizeBytes).toBe(full.sizeBytes);
      expect(facts(fd).allocatedBytes).toBeLessThanOrEqual(full.allocatedBytes - 2 ** 19);
      expect(native.fileSeek(fd, 0, SEEK_DATA)).toBe(2 ** 19);
      expect(native.fileSeek(fd, 0, SEEK_HOLE)).toBe(0);
      expect(native.fileSeek(fd, 2 ** 19, SEEK_HOLE)).toBe(2 ** 20);
      expect(native.fileSeek(fd, 2 ** 20, SEEK_DATA)).toBe(-ENXIO);
      expect(native.fileAllocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 4096)).toBe(-95);
    });
  });

  it('are described', () => {
    withFile('described', (fd, path) => {
      native.fileTruncate(fd, 1_000_001);
      const { ino, blksize } = statSync(path);
      expect(facts(fd)).toMatchObject({ kind: 'file', sizeBytes: 1_000_001, inode: ino, preferredIoBytes: blksize });
      expect(facts(fd).allocatedBytes).toBeLessThan(65536);
      for (const alignment of [facts(fd).directMemoryAlignmentBytes, facts(fd).directOffsetAlignmentBytes]) {
        // 0 where the kernel does not say; a power of two elsewhere.
        expect(alignment & (alignment - 1)).toBe(0);
      }
    });
    const directory = check(native.fileOpen(folder, O_RDONLY, 0), 'open the folder');
    expect(facts(directory).kind).toBe('other');
    native.fileClose(directory);
  });
});

describe('a block device', () => {
  it.for([512, 4096] as const)('of %i-byte sectors is described', (sectorBytes, context) => {
    if (!isRoot) context.skip('only root may make loop devices: run the tests as root');
    const path = join(folder, `device-${sectorBytes}`);
    writeFileSync(path, '');
    truncateSync(path, 2 ** 20);
    const device = attachLoop(path, sectorBytes);
    const fd = check(native.fileOpen(device.path, O_RDONLY, 0), `open ${device.path}`);
    const { rdev } = statSync(device.path);
    expect(facts(fd)).toMatchObject({
      kind: 'block',
      sizeBytes: 2 ** 20,
      logicalBlockBytes: sectorBytes,
      deviceMajor: (rdev >> 8) & 0xfff,
      deviceMinor: rdev & 0xff,
    });
    expect(facts(fd).physicalBlockBytes).toBeGreaterThanOrEqual(sectorBytes);
    native.fileClose(fd);
    device.detach();
  });
});

describe('a lock', () => {
  const lockedTwice = (first: 0 | 1, second: 0 | 1): number =>
    withFile('locked', (one) =>
      withFile('locked', (two) => {
        expect(native.fileLock(one, first, 0, 0)).toBe(0);
        return native.fileLock(two, second, 0, 0);
      }),
    );

  it('that is exclusive keeps all others out', () => {
    expect([-EAGAIN, -EBUSY]).toContain(lockedTwice(1, 1));
    expect([-EAGAIN, -EBUSY]).toContain(lockedTwice(1, 0));
    expect([-EAGAIN, -EBUSY]).toContain(lockedTwice(0, 1));
  });

  it('that is shared lets readers in', () => {
    expect(lockedTwice(0, 0)).toBe(0);
  });

  it('is about some bytes only, and can be looked for', () => {
    withFile('locked', (one) =>
      withFile('locked', (two) => {
        expect(native.fileLock(one, 0, 100, 2)).toBe(0);
        expect(native.fileLock(two, 1, 0, 100)).toBe(0);
        expect(native.fileLock(two, 0, 101, 1)).toBe(0);
        expect(native.fileLock(two, 1, 101, 0)).toBeLessThan(0);
        expect([99, 100, 101, 102].map((at) => native.fileLockTest(two, at, 1))).toEqual([0, 1, 1, 0]);
        expect(native.fileLock(one, 2, 0, 0)).toBe(0);
        expect(native.fileLockTest(two, 0, 0)).toBe(0);
        expect(native.fileLockTest(one, 0, 0)).toBe(1);
      }),
    );
  });

  it('ends with the last descriptor of the one who opened the file, not with any other', () => {
    withFile('locked', (other) => {
      withFile('locked', (owner) => {
        expect(native.fileLock(owner, 1, 0, 0)).toBe(0);
        const copy = check(native.fileDuplicate(owner), 'duplicate');
        // Classic POSIX locks would be lost here.
        withFile('locked', () => undefined);
        native.fileClose(copy);
        expect(native.fileLock(other, 1, 0, 0)).toBeLessThan(0);
      });
      expect(native.fileLock(other, 1, 0, 0)).toBe(0);
    });
  });
});

describe('an eventfd', () => {
  it('counts signals until it is drained', () => {
    const fd = check(native.eventfdCreate(), 'create');
    expect(native.eventfdDrain(fd)).toBe(0);
    for (let i = 0; i < 3; i++) expect(native.eventfdSignal(fd)).toBe(0);
    expect(native.eventfdDrain(fd)).toBe(3);
    expect(native.eventfdDrain(fd)).toBe(0);
    expect(closesOnExec(fd)).toBe(true);
    native.fileClose(fd);
  });

  it('answers -errno when it is none', () => {
    expect(native.eventfdSignal(99999)).toBe(-EBADF);
    expect(native.eventfdDrain(99999)).toBe(-EBADF);
  });
});

describe('a memfd', () => {
  it('has its size and is full of zeroes', () => {
    const fd = check(native.memfdCreate('test', 3 * 2 ** 32), 'create');
    expect(facts(fd)).toMatchObject({ kind: 'file', sizeBytes: 3 * 2 ** 32, allocatedBytes: 0 });
    expect(native.fileRead(fd, address, 10, 2 ** 33)).toBe(10);
    expect(bytes.subarray(0, 10).every((byte) => byte === 0)).toBe(true);
    expect(closesOnExec(fd)).toBe(true);
    native.fileClose(fd);
  });

  it('keeps its seals', () => {
    const fd = check(native.memfdCreate('test', 8192), 'create');
    expect(native.memfdGetSeals(fd)).toBe(0);
    expect(native.memfdAddSeals(fd, F_SEAL_SHRINK)).toBe(0);
    expect(native.memfdGetSeals(fd)).toBe(F_SEAL_SHRINK);
    expect(native.fileTruncate(fd, 4096)).toBe(-EPERM);
    expect(native.fileTruncate(fd, 16384)).toBe(0);
    expect(native.memfdAddSeals(fd, F_SEAL_GROW | F_SEAL_SEAL)).toBe(0);
    expect(native.fileTruncate(fd, 32768)).toBe(-EPERM);
    expect(native.memfdAddSeals(fd, F_SEAL_SHRINK)).toBe(-EPERM);
    native.fileClose(fd);
  });

  it('is told from files that have no seals', () => {
    withFile('unsealed', (fd) => expect(native.memfdGetSeals(fd)).toBe(-EINVAL));
  });
});

describe('check', () => {
  it('passes results on and throws errors that name the action', () => {
    expect(check(5, 'do')).toBe(5);
    const failure = (action: () => unknown): unknown => {
      try {
        return action();
      } catch (error) {
        return error;
      }
    };
    const error = failure(() => check(-ENOENT, 'open x')) as SystemError;
    expect(error).toBeInstanceOf(SystemError);
    expect([error.code, error.errno, error.action, error.message]).toEqual([
      'ENOENT',
      ENOENT,
      'open x',
      'open x: ENOENT',
    ]);
    expect(failure(() => checkObject(-EBADF, 'stat'))).toBeInstanceOf(SystemError);
    const object = {};
    expect(checkObject(object, 'stat')).toBe(object);
  });
});
