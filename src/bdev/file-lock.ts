/**
 * The lock on a file that holds a disk: QEMU, other daemons and other programs keep out, and are kept out.
 *
 *     bytes       0..99  all of it, exclusive for a writer, shared for a reader: for programs that lock whole files
 *           100 + what   QEMU's: somebody does this to the disk     (shared locks, so that many may say so)
 *           200 + what   QEMU's: somebody relies on nobody doing it
 *         300..          as 0..99
 *
 * QEMU never locks a byte exclusively: it takes its own and looks whether anybody else holds the opposite ones. So do we, and a
 * `qemu-img -U`, which relies on nothing, may look at a disk in use. These are locks of the open file description (fcntl(2)): they end
 * with it.
 */
import { EACCES, EAGAIN, EBUSY, check, native } from '../../native/index.js';

const DOES = 100;
const RELIES = 200;
const REST = 300;
/** What may be done to a disk, as QEMU counts it (BLK_PERM_*). */
const READ = 0;
const WRITE = 1;
const RESIZE = 3;

const SHARED = 0;
const EXCLUSIVE = 1;
const FREE = 2;

/**
 * Takes the lock without waiting.
 * @returns false when somebody else has the file. Throws SystemError
 */
export function lockFile(fd: number, path: string, isWriter: boolean): boolean {
  const isOurs = changeLock(fd, path, isWriter);
  // What was taken before somebody was found would keep others out.
  if (!isOurs) take(fd, path, FREE, 0, 0);
  return isOurs;
}

/**
 * The same for a file that is locked already: a reader's lock becomes a writer's, or the other way round, and is never let go of on
 * the way. When it returns false the lock may be anything between the two: a reader's can always be had again.
 */
export function changeLock(fd: number, path: string, isWriter: boolean): boolean {
  const does = isWriter ? [READ, WRITE, RESIZE] : [READ];
  const relies = [WRITE, RESIZE];
  const kind = isWriter ? EXCLUSIVE : SHARED;
  return (
    take(fd, path, kind, 0, DOES) &&
    take(fd, path, kind, REST, 0) &&
    [READ, WRITE, RESIZE].every((what) => take(fd, path, does.includes(what) ? SHARED : FREE, DOES + what, 1)) &&
    relies.every((what) => take(fd, path, SHARED, RELIES + what, 1)) &&
    does.every((what) => isFree(fd, path, RELIES + what)) &&
    relies.every((what) => isFree(fd, path, DOES + what))
  );
}

/** @param length 0: to the end, wherever that is */
function take(fd: number, path: string, kind: number, start: number, length: number): boolean {
  const outcome = native.fileLock(fd, kind, start, length);
  if (outcome === -EAGAIN || outcome === -EBUSY || outcome === -EACCES) return false;
  check(outcome, `lock ${path}`);
  return true;
}

/** Whether nobody else holds this byte. */
function isFree(fd: number, path: string, start: number): boolean {
  return check(native.fileLockTest(fd, start, 1), `look at the lock of ${path}`) === 0;
}
