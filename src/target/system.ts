/** System calls of the control plane that Node does not offer. Linux only; nothing here is on the data path. */
import koffi from 'koffi';

const libc = koffi.load(null);

const Rlimit = koffi.struct('rlimit', { rlim_cur: 'uint64', rlim_max: 'uint64' });
const prctl = libc.func('int prctl(int, ulong, ulong, ulong, ulong)');
const getrlimit = libc.func('getrlimit', 'int', ['int', koffi.out(koffi.pointer(Rlimit))]);
const exitAtOnce = libc.func('void _exit(int)');
const socket = libc.func('int socket(int, int, int)');
const close = libc.func('int close(int)');
const sendto = libc.func('long sendto(int, const char *, size_t, int, const uint8_t *, uint32_t)');

// The first four and three fields of the C library's structs; the rest is not read.
const Passwd = koffi.struct('passwd', { name: 'char *', password: 'char *', uid: 'uint32', gid: 'uint32' });
const Group = koffi.struct('group', { name: 'char *', password: 'char *', gid: 'uint32' });
const getpwnam = libc.func('getpwnam', koffi.pointer(Passwd), ['str']);
const getgrnam = libc.func('getgrnam', koffi.pointer(Group), ['str']);

const syscall = libc.func('long syscall(long, void *, size_t, uint32_t)');
const syscallOnFd = libc.func('syscall', 'long', ['long', 'int', 'uint32_t']);

const PR_SET_PDEATHSIG = 1;
const PR_SET_DUMPABLE = 4;
const PR_SET_NO_NEW_PRIVS = 38;
const SIGKILL = 9;
/** System call numbers, the same on all processors. */
const SYS_LANDLOCK_CREATE_RULESET = 444;
const SYS_LANDLOCK_RESTRICT_SELF = 446;
/** All that the first version of Landlock knows: executing, opening, making, removing. */
const LANDLOCK_ALL = 0x1fff;
const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_NOSIGNAL = 0x4000;

/** Limits of setrlimit(2) that concern the daemon, by number. */
export const Resource = { openFiles: 7, lockedBytes: 8, addressSpaceBytes: 9 } as const;

export interface Limit {
  /** Infinity for no limit. */
  readonly soft: number;
  readonly hard: number;
}

export function limitOf(resource: (typeof Resource)[keyof typeof Resource]): Limit {
  const limit: { rlim_cur?: number | bigint; rlim_max?: number | bigint } = {};
  if (getrlimit(resource, limit) !== 0) throw new Error(`getrlimit(${resource}) failed: errno ${koffi.errno()}`);
  const plain = (value: number | bigint | undefined): number => {
    const bytes = Number(value);
    return bytes > Number.MAX_SAFE_INTEGER ? Infinity : bytes;
  };
  return { soft: plain(limit.rlim_cur), hard: plain(limit.rlim_max) };
}

/** Keeps the process out of core dumps and other users' debuggers: its memory holds guests' data. */
export function forbidCoreDumps(): void {
  set(PR_SET_DUMPABLE, 0, 'PR_SET_DUMPABLE');
}

/** Ends this process as soon as its parent has. @returns false when the parent is gone already */
export function dieWithParent(parentPid: number): boolean {
  set(PR_SET_PDEATHSIG, SIGKILL, 'PR_SET_PDEATHSIG');
  return process.ppid === parentPid;
}

/** Nothing that this process executes gains privileges by it. */
export function forbidNewPrivileges(): void {
  set(PR_SET_NO_NEW_PRIVS, 1, 'PR_SET_NO_NEW_PRIVS');
}

/**
 * From here on this thread can open, make, remove and execute no file (Landlock); what is open stays so. Takes `forbidNewPrivileges`.
 * @returns false where the kernel does not have it
 */
export function forbidOpeningFiles(): boolean {
  const attributes = Buffer.alloc(8);
  attributes.writeBigUInt64LE(BigInt(LANDLOCK_ALL));
  const rules = syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, attributes.length, 0) as number;
  if (rules < 0) return false;
  const outcome = syscallOnFd(SYS_LANDLOCK_RESTRICT_SELF, rules, 0) as number;
  close(rules);
  return outcome === 0;
}

function set(option: number, value: number, name: string): void {
  if (prctl(option, value, 0, 0, 0) !== 0) throw new Error(`prctl(${name}) failed: errno ${koffi.errno()}`);
}

/** Number of the user with that name, from wherever this host keeps its users; undefined when there is none. */
export function userId(name: string): number | undefined {
  const entry: unknown = getpwnam(name);
  return entry === null ? undefined : (koffi.decode(entry, Passwd) as { uid: number }).uid;
}

/** As `userId`, for groups. */
export function groupId(name: string): number | undefined {
  const entry: unknown = getgrnam(name);
  return entry === null ? undefined : (koffi.decode(entry, Group) as { gid: number }).gid;
}

/** Ends the process without waiting for any of its threads. */
export function endAtOnce(exitCode: number): never {
  exitAtOnce(exitCode);
  throw new Error('unreachable');
}

/**
 * Sends one datagram to a unix socket.
 * @param path of a file, or an abstract name with a leading `@`
 * @returns 0, or the errno
 */
export function sendDatagram(path: string, text: string): number {
  const name = Buffer.from(path);
  const address = Buffer.concat([Buffer.from(new Uint16Array([AF_UNIX]).buffer), name, Buffer.alloc(1)]);
  const isAbstract = path.startsWith('@');
  if (isAbstract) address[2] = 0;
  const fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0) as number;
  if (fd < 0) return koffi.errno();
  const length = Buffer.byteLength(text);
  const sent = sendto(fd, text, length, MSG_NOSIGNAL, address, address.length - (isAbstract ? 1 : 0)) as number;
  const errno = sent < 0 ? koffi.errno() : 0;
  close(fd);
  return errno;
}
