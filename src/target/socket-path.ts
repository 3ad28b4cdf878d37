/**
 * The place where a socket is to be: free, left over from a daemon that is gone, or taken. Only a socket that nobody listens on is
 * ever removed.
 */
import { chownSync, existsSync, lstatSync, mkdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { dirname } from 'node:path';
import { SystemError, native } from '../../native/index.js';

/** Who may enter a folder made for sockets or disks: the daemon's user and group. */
const FOLDER_MODE = 0o750;
/** Of a folder: files in it get its group. */
const SET_GROUP_ID = 0o2000;

export interface Refusal {
  readonly message: string;
  readonly remedy: string;
}

/** Why nobody can listen at `path`, or undefined. Changes nothing. */
export function socketPathRefusal(path: string): Refusal | undefined {
  let isSocket: boolean;
  try {
    const stats = lstatSync(path, { throwIfNoEntry: false });
    if (stats === undefined) return undefined;
    isSocket = stats.isSocket();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    return { message: `${path} cannot be: ${code}`, remedy: 'choose a path in a folder that this user may use' };
  }
  if (!isSocket) {
    return { message: `${path} exists and is not a socket`, remedy: 'choose another path, or move that file away' };
  }
  const fd = native.socketConnect(path);
  if (fd >= 0) {
    const peer = native.socketPeer(fd);
    native.fileClose(fd);
    const owner = typeof peer === 'number' ? 'another process' : describeProcess(peer.pid);
    return { message: `${owner} listens on ${path}`, remedy: 'stop it, or choose another path' };
  }
  const { code } = new SystemError(-fd, 'connect');
  if (code === 'ECONNREFUSED' || code === 'ENOENT') return undefined;
  if (code === 'EAGAIN')
    return { message: `another process listens on ${path}`, remedy: 'stop it, or choose another path' };
  return { message: `${path} exists and cannot be tried: ${code}`, remedy: 'choose another path, or remove it' };
}

/**
 * Removes what a dead daemon left at `path` and makes the folder. Call it when there is no refusal. Throws errors of fs.
 * @param gid group of the folders that have to be made
 */
export function makeSocketPlace(path: string, gid?: number): void {
  makeFolder(dirname(path), gid);
  rmSync(path, { force: true });
}

/** Step by step: a recursive mkdirSync never returns from a file system that has a folder and lets nobody add to it, as /proc. */
export function makeFolder(path: string, gid?: number): void {
  if (existsSync(path)) return;
  makeFolder(dirname(path), gid);
  mkdirSync(path, FOLDER_MODE);
  if (gid !== undefined) chownSync(path, -1, gid);
}

/** Group that the kernel gives a file made in the folder of `path`. */
export function groupOfFileAt(path: string): number {
  const { mode, gid } = statSync(dirname(path));
  return (mode & SET_GROUP_ID) !== 0 ? gid : process.getegid!();
}

/** `process 4711 (qemu-storage-daemon --blockdev ...)` */
function describeProcess(pid: number): string {
  try {
    const command = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
    return `process ${pid} (${command.length <= 100 ? command : `${command.slice(0, 97)}...`})`;
  } catch {
    return `process ${pid}`;
  }
}
