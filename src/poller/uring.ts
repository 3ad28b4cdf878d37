/**
 * The kernel's io_uring behind the Ring interface: SQEs are filled and CQEs reaped in place, in the rings as they are mapped.
 *
 * Orderings (x86-64: plain loads and stores suffice; the kernel reads the queue only inside io_uring_enter, because the
 * ring is neither SQPOLL nor shared with another thread)
 * - SQEs are complete before the tail is stored, the tail before `enter`.
 * - CQ tail is read before the CQEs, CQ head stored after them.
 *
 * user_data is {u32 slot, u32 generation | POLL_BIT}: completions for a slot that was detached meanwhile are dropped.
 */
import { EAGAIN, EBUSY, EINTR, EINVAL, ETIME, SystemError, check, checkObject, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import type { Ring, RingFile, RingOp, RingRange } from './ring.js';

// include/uapi/linux/io_uring.h
const SETUP_CLAMP = 1 << 4;
const SETUP_R_DISABLED = 1 << 6;
const SETUP_SUBMIT_ALL = 1 << 7;
const SETUP_COOP_TASKRUN = 1 << 8;
const SETUP_TASKRUN_FLAG = 1 << 9;
const SETUP_SINGLE_ISSUER = 1 << 12;
const SETUP_DEFER_TASKRUN = 1 << 13;
const SETUP_IOPOLL = 1;
const OFF_SQ_RING = 0;
const OFF_SQES = 0x10000000;
const FEAT_SINGLE_MMAP = 1;
const FEAT_NODROP = 2;
const FEAT_EXT_ARG = 1 << 8;
const ENTER_REGISTERED_RING = 1 << 4;
const SQ_CQ_OVERFLOW = 2;
const SQ_TASKRUN = 4;
const SQE_FIXED_FILE = 1;
const SQE_ASYNC = 16;
/** What is shorter is copied in less time than a thread takes to wake. */
const THREADED_BYTES_MIN = 128 * 1024;
const UNREGISTER_BUFFERS = 1;
const UNREGISTER_FILES = 3;
const REGISTER_BUFFERS2 = 15;
const REGISTER_BUFFERS_UPDATE = 16;
const REGISTER_FILES2 = 13;
const REGISTER_FILES_UPDATE = 6;
const REGISTER_RESTRICTIONS = 11;
const REGISTER_ENABLE_RINGS = 12;
const REGISTER_RING_FDS = 20;
const UNREGISTER_RING_FDS = 21;
const RSRC_REGISTER_SPARSE = 1;
const RESTRICTION_REGISTER_OP = 0;
const RESTRICTION_SQE_OP = 1;
const RESTRICTION_SQE_FLAGS_ALLOWED = 2;
const POLL_ADD_MULTI = 1;
const FSYNC_DATASYNC = 1;
/** In the upper half of user_data: a poll's completion, not counted as in flight. */
const POLL_BIT = 0x80000000;
const GENERATION_MASK = 0x7fffffff;

/** Opcodes this ring uses: it is restricted to them. */
const Op = {
  nop: 0,
  readv: 1,
  writev: 2,
  fsync: 3,
  readFixed: 4,
  writeFixed: 5,
  pollAdd: 6,
  asyncCancel: 14,
  fallocate: 17,
  read: 22,
  write: 23,
} as const;

/** What the ring may register, and give back, once it is restricted. */
const REGISTER_OPS = [
  REGISTER_FILES_UPDATE,
  UNREGISTER_FILES,
  REGISTER_BUFFERS2,
  REGISTER_BUFFERS_UPDATE,
  UNREGISTER_BUFFERS,
  REGISTER_RING_FDS,
  UNREGISTER_RING_FDS,
];

const SQE_WORDS = 16;
const CQE_WORDS = 4;
const FILES_MAX = 1024;
const BUFFERS_MAX = 1024;
/** Slot of completions that nobody waits for. */
const NOBODY = 0;

export interface UringOptions {
  /** Submission queue length, a power of two. */
  readonly entries?: number;
  /** Completion queue length, a power of two. */
  readonly cqEntries?: number;
  /** Long reads are handed to threads of the kernel at once: one thread need not copy all that the page cache has. */
  readonly threadedReads?: boolean;
  /** Completions are polled from the device: O_DIRECT reads and writes only, no polls. */
  readonly iopoll?: boolean;
}

export class Uring implements Ring {
  readonly arena: Arena;
  /** System calls made so far, a figure for statistics. */
  enters = 0;

  #inflight = 0;
  readonly #fd: number;
  readonly #enterFd: number;
  readonly #enterFlags: number;
  readonly #iopoll: boolean;
  readonly #threadedReads: boolean;
  readonly #sqes: Uint32Array;
  readonly #sqMask: number;
  readonly #sqTail: Uint32Array;
  readonly #sqHead: Uint32Array;
  readonly #sqFlags: Uint32Array;
  readonly #cqes: Uint32Array;
  readonly #cqMask: number;
  readonly #cqHead: Uint32Array;
  readonly #cqTail: Uint32Array;
  #tail = 0;

  readonly #ops: RingOp[] = [];
  readonly #generations: number[] = [];
  readonly #freeSlots: number[] = [];
  readonly #freeFiles: number[] = [];
  readonly #freeBuffers: number[] = [];
  readonly #scratch: number;
  readonly #scratch32: Uint32Array;
  #buffersRegistered = false;

  /** Throws SystemError; EPERM where the system forbids io_uring, ENOSYS where it lacks it. */
  constructor(arena: Arena, options: UringOptions = {}) {
    this.arena = arena;
    this.#iopoll = options.iopoll === true;
    this.#threadedReads = options.threadedReads === true;
    const setup = setupRing(options.entries ?? 1024, options.cqEntries ?? 8192, this.#iopoll);
    const wanted = FEAT_SINGLE_MMAP | FEAT_NODROP | FEAT_EXT_ARG;
    if ((setup.features & wanted) !== wanted) {
      native.fileClose(setup.fd);
      throw new SystemError(EINVAL, 'io_uring: this kernel is too old (5.11 or newer is needed)');
    }
    this.#fd = setup.fd;
    const ringBytes = Math.max(setup.sqArray + setup.sqEntries * 4, setup.cqCqes + setup.cqEntries * 16);
    const ring = checkObject(native.ringMap(this.#fd, OFF_SQ_RING, ringBytes), 'map the io_uring queues');
    const sqes = checkObject(native.ringMap(this.#fd, OFF_SQES, setup.sqEntries * 64), 'map the io_uring entries');
    this.#sqes = new Uint32Array(sqes);
    this.#sqMask = setup.sqEntries - 1;
    this.#sqHead = new Uint32Array(ring, setup.sqHead, 1);
    this.#sqTail = new Uint32Array(ring, setup.sqTail, 1);
    this.#sqFlags = new Uint32Array(ring, setup.sqFlags, 1);
    this.#cqes = new Uint32Array(ring, setup.cqCqes, setup.cqEntries * CQE_WORDS);
    this.#cqMask = setup.cqEntries - 1;
    this.#cqHead = new Uint32Array(ring, setup.cqHead, 1);
    this.#cqTail = new Uint32Array(ring, setup.cqTail, 1);
    // The index array stays the identity: entry i of the queue is SQE i.
    new Uint32Array(ring, setup.sqArray, setup.sqEntries).forEach((_, i, array) => (array[i] = i));

    this.#scratch = arena.allocate(4096);
    this.#scratch32 = arena.view32(this.#scratch, 1024);
    this.#registerFileTable();
    this.#restrict();
    const registered = this.#registerRing();
    this.#enterFd = registered >= 0 ? registered : this.#fd;
    this.#enterFlags = registered >= 0 ? ENTER_REGISTERED_RING : 0;
    const nobody: RingOp = { onCompletion: () => undefined };
    this.attach(nobody);
    for (let i = FILES_MAX - 1; i >= 0; i--) this.#freeFiles.push(i);
    for (let i = BUFFERS_MAX - 1; i >= 0; i--) this.#freeBuffers.push(i);
  }

  get inflight(): number {
    return this.#inflight;
  }

  attach(op: RingOp): number {
    const slot = this.#freeSlots.pop() ?? this.#ops.length;
    this.#ops[slot] = op;
    this.#generations[slot] = ((this.#generations[slot] ?? 0) + 1) & GENERATION_MASK;
    return slot;
  }

  detach(slot: number): void {
    this.#ops[slot] = this.#ops[NOBODY]!;
    this.#generations[slot] = (this.#generations[slot]! + 1) & GENERATION_MASK;
    this.#freeSlots.push(slot);
  }

  registerFile(fd: number): RingFile {
    const file = this.#freeFiles.pop();
    if (file === undefined) throw new SystemError(24, `register descriptor ${fd}: ${FILES_MAX} files are in use`);
    const outcome = this.#updateFile(file, fd);
    if (outcome < 0) this.#freeFiles.push(file);
    check(outcome, `register descriptor ${fd} with io_uring`);
    return file;
  }

  unregisterFile(file: RingFile): void {
    this.#updateFile(file, -1);
    this.#freeFiles.push(file);
  }

  read(slot: number, file: RingFile, range: RingRange, rwFlags: number): boolean {
    return this.#transfer(Op.read, slot, file, range, rwFlags, 0);
  }

  write(slot: number, file: RingFile, range: RingRange, rwFlags: number): boolean {
    return this.#transfer(Op.write, slot, file, range, rwFlags, 0);
  }

  readv(slot: number, file: RingFile, range: RingRange, count: number, rwFlags: number): boolean {
    return this.#vector(Op.readv, slot, file, range, count, rwFlags);
  }

  writev(slot: number, file: RingFile, range: RingRange, count: number, rwFlags: number): boolean {
    return this.#vector(Op.writev, slot, file, range, count, rwFlags);
  }

  readFixed(slot: number, file: RingFile, range: RingRange, bufferIndex: number): boolean {
    return this.#transfer(Op.readFixed, slot, file, range, 0, bufferIndex);
  }

  writeFixed(slot: number, file: RingFile, range: RingRange, rwFlags: number, bufferIndex: number): boolean {
    return this.#transfer(Op.writeFixed, slot, file, range, rwFlags, bufferIndex);
  }

  fdatasync(slot: number, file: RingFile): boolean {
    return this.#begin(Op.fsync, slot, file, FSYNC_DATASYNC, 0) >= 0;
  }

  fallocate(slot: number, file: RingFile, range: RingRange, mode: number): boolean {
    const at = this.#begin(Op.fallocate, slot, file, 0, 0);
    if (at < 0) return false;
    const sqes = this.#sqes;
    const { offsetBytes, lengthBytes } = range;
    sqes[at + 2] = offsetBytes;
    sqes[at + 3] = offsetBytes * 2 ** -32;
    // The length travels in the address field, the mode in the length field.
    sqes[at + 4] = lengthBytes;
    sqes[at + 5] = lengthBytes * 2 ** -32;
    sqes[at + 6] = mode;
    return true;
  }

  poll(slot: number, fd: number, events: number): boolean {
    const at = this.#nextSqe();
    if (at < 0) return false;
    const sqes = this.#sqes;
    this.#clear(at);
    sqes[at] = Op.pollAdd;
    sqes[at + 1] = fd;
    sqes[at + 6] = POLL_ADD_MULTI;
    sqes[at + 7] = events;
    sqes[at + 8] = slot;
    sqes[at + 9] = this.#generations[slot]! | POLL_BIT;
    return true;
  }

  cancelPoll(slot: number): boolean {
    const at = this.#nextSqe();
    if (at < 0) return false;
    const sqes = this.#sqes;
    this.#clear(at);
    // POLL_REMOVE gives up (EALREADY) on a poll that is just being woken, and the file would stay open for as long as the ring.
    sqes[at] = Op.asyncCancel;
    sqes[at + 1] = 0xffffffff;
    sqes[at + 4] = slot;
    sqes[at + 5] = this.#generations[slot]! | POLL_BIT;
    sqes[at + 8] = NOBODY;
    sqes[at + 9] = POLL_BIT;
    return true;
  }

  registerBuffer(address: number, lengthBytes: number): number {
    if (!this.#buffersRegistered) {
      // struct io_uring_rsrc_register {u32 nr, flags; u64 resv2, data, tags}: a sparse table
      this.#scratch32.fill(0, 0, 8);
      this.#scratch32[0] = BUFFERS_MAX;
      this.#scratch32[1] = RSRC_REGISTER_SPARSE;
      const outcome = native.ringRegister(this.#fd, REGISTER_BUFFERS2, this.arena.baseAddress + this.#scratch, 32);
      if (outcome < 0) return outcome;
      this.#buffersRegistered = true;
    }
    const index = this.#freeBuffers.pop();
    if (index === undefined) return -EBUSY;
    const outcome = this.#updateBuffer(index, this.arena.baseAddress + address, lengthBytes);
    if (outcome < 0) {
      this.#freeBuffers.push(index);
      return outcome;
    }
    return index;
  }

  unregisterBuffer(index: number): void {
    this.#updateBuffer(index, 0, 0);
    this.#freeBuffers.push(index);
  }

  enter(): void {
    const toSubmit = (this.#tail - this.#sqHead[0]!) >>> 0;
    // With DEFER_TASKRUN completions are posted only inside enter; the kernel raises a flag when some wait.
    if (toSubmit === 0 && (this.#sqFlags[0]! & (SQ_TASKRUN | SQ_CQ_OVERFLOW)) === 0 && !this.#mustPollDevice()) return;
    this.#publish();
    this.#entered(native.ringEnter(this.#enterFd, toSubmit, this.#enterFlags));
  }

  wait(timeoutUs: number): boolean {
    if (this.#cqTail[0] !== this.#cqHead[0]) {
      this.enter();
      return true;
    }
    this.#publish();
    const toSubmit = (this.#tail - this.#sqHead[0]!) >>> 0;
    this.#entered(native.ringWait(this.#enterFd, toSubmit, this.#enterFlags, timeoutUs));
    return this.#cqTail[0] !== this.#cqHead[0];
  }

  reap(): number {
    const cqes = this.#cqes;
    const mask = this.#cqMask;
    const tail = this.#cqTail[0]!;
    let head = this.#cqHead[0]!;
    if (head === tail) return 0;
    let count = 0;
    do {
      const at = (head & mask) * CQE_WORDS;
      const slot = cqes[at]!;
      const generation = cqes[at + 1]!;
      const result = cqes[at + 2]! | 0;
      const flags = cqes[at + 3]!;
      head = (head + 1) >>> 0;
      // Free the entry first: the completion may queue and enter again.
      this.#cqHead[0] = head;
      if (generation < POLL_BIT) this.#inflight--;
      if ((generation & GENERATION_MASK) === this.#generations[slot]) this.#ops[slot]!.onCompletion(result, flags);
      count++;
    } while (head !== tail);
    return count;
  }

  /** The ring itself lives on until its mappings are collected; what it held of others is let go of now. */
  close(): void {
    native.ringRegister(this.#fd, UNREGISTER_FILES, 0, 0);
    if (this.#buffersRegistered) native.ringRegister(this.#fd, UNREGISTER_BUFFERS, 0, 0);
    if (this.#enterFd !== this.#fd) {
      // struct io_uring_rsrc_update {u32 offset, resv; u64 data}
      this.#scratch32.fill(0, 0, 4);
      this.#scratch32[0] = this.#enterFd;
      native.ringRegister(this.#fd, UNREGISTER_RING_FDS, this.arena.baseAddress + this.#scratch, 1);
    }
    native.fileClose(this.#fd);
    this.arena.release(this.#scratch);
  }

  #mustPollDevice(): boolean {
    return this.#iopoll && this.#inflight > 0;
  }

  #publish(): void {
    this.#sqTail[0] = this.#tail;
  }

  /** Ordinary: timed out, interrupted, or out of memory or completion entries. What was not taken stays queued. */
  #entered(outcome: number): void {
    this.enters++;
    if (outcome >= 0) return;
    const errno = -outcome;
    if (errno !== ETIME && errno !== EINTR && errno !== EBUSY && errno !== EAGAIN) {
      throw new SystemError(errno, 'io_uring_enter');
    }
  }

  /** Index of the first word of a free SQE, or -1. */
  #nextSqe(): number {
    if ((this.#tail - this.#sqHead[0]!) >>> 0 > this.#sqMask) {
      this.enter();
      if ((this.#tail - this.#sqHead[0]!) >>> 0 > this.#sqMask) return -1;
    }
    const at = (this.#tail & this.#sqMask) * SQE_WORDS;
    this.#tail = (this.#tail + 1) >>> 0;
    return at;
  }

  #clear(at: number): void {
    const sqes = this.#sqes;
    for (let i = 0; i < SQE_WORDS; i++) sqes[at + i] = 0;
  }

  #transfer(
    opcode: number,
    slot: number,
    file: RingFile,
    range: RingRange,
    flags: number,
    bufferIndex: number,
  ): boolean {
    const at = this.#begin(opcode, slot, file, flags, bufferIndex);
    if (at < 0) return false;
    this.#place(at, range);
    this.#sqes[at + 6] = range.lengthBytes;
    if (this.#threadedReads && opcode === Op.read && range.lengthBytes >= THREADED_BYTES_MIN) {
      this.#sqes[at] = opcode | ((SQE_FIXED_FILE | SQE_ASYNC) << 8);
    }
    return true;
  }

  #vector(opcode: number, slot: number, file: RingFile, range: RingRange, count: number, flags: number): boolean {
    const at = this.#begin(opcode, slot, file, flags, 0);
    if (at < 0) return false;
    this.#place(at, range);
    this.#sqes[at + 6] = count;
    return true;
  }

  #place(at: number, range: RingRange): void {
    const sqes = this.#sqes;
    const { offsetBytes } = range;
    const address = range.address + this.arena.baseAddress;
    sqes[at + 2] = offsetBytes;
    sqes[at + 3] = offsetBytes * 2 ** -32;
    sqes[at + 4] = address;
    sqes[at + 5] = address * 2 ** -32;
  }

  /** A request of its slot and file for nothing, yet. Returns its first word's index, or -1 when the queue is full. */
  #begin(opcode: number, slot: number, file: RingFile, flags: number, bufferIndex: number): number {
    const at = this.#nextSqe();
    if (at < 0) return -1;
    const sqes = this.#sqes;
    sqes[at] = opcode | (SQE_FIXED_FILE << 8);
    sqes[at + 1] = file;
    sqes[at + 2] = 0;
    sqes[at + 3] = 0;
    sqes[at + 4] = 0;
    sqes[at + 5] = 0;
    sqes[at + 6] = 0;
    sqes[at + 7] = flags;
    sqes[at + 8] = slot;
    sqes[at + 9] = this.#generations[slot]!;
    sqes[at + 10] = bufferIndex;
    sqes[at + 11] = 0;
    sqes[at + 12] = 0;
    sqes[at + 13] = 0;
    sqes[at + 14] = 0;
    sqes[at + 15] = 0;
    this.#inflight++;
    return at;
  }

  #registerFileTable(): void {
    // struct io_uring_rsrc_register, sparse
    this.#scratch32.fill(0, 0, 8);
    this.#scratch32[0] = FILES_MAX;
    this.#scratch32[1] = RSRC_REGISTER_SPARSE;
    const address = this.arena.baseAddress + this.#scratch;
    check(native.ringRegister(this.#fd, REGISTER_FILES2, address, 32), 'register a file table with io_uring');
  }

  #updateFile(file: RingFile, fd: number): number {
    // struct io_uring_files_update {u32 offset, resv; u64 pointer to s32 fds}
    const pointer = this.arena.baseAddress + this.#scratch + 64;
    const words = this.#scratch32;
    words[0] = file;
    words[1] = 0;
    words[2] = pointer;
    words[3] = pointer * 2 ** -32;
    words[16] = fd;
    return native.ringRegister(this.#fd, REGISTER_FILES_UPDATE, this.arena.baseAddress + this.#scratch, 1);
  }

  #updateBuffer(index: number, absoluteAddress: number, lengthBytes: number): number {
    // struct io_uring_rsrc_update2 {u32 offset, resv; u64 data, tags; u32 nr, resv2}; data points to a struct iovec
    const pointer = this.arena.baseAddress + this.#scratch + 64;
    const words = this.#scratch32;
    words.fill(0, 0, 20);
    words[0] = index;
    words[2] = pointer;
    words[3] = pointer * 2 ** -32;
    words[6] = 1;
    words[16] = absoluteAddress;
    words[17] = absoluteAddress * 2 ** -32;
    words[18] = lengthBytes;
    words[19] = lengthBytes * 2 ** -32;
    return native.ringRegister(this.#fd, REGISTER_BUFFERS_UPDATE, this.arena.baseAddress + this.#scratch, 32);
  }

  /** Allows this ring its own operations only: io_uring bypasses seccomp. Then starts the ring. */
  #restrict(): void {
    // struct io_uring_restriction {u16 opcode; u8 argument; u8 resv; u32 resv2[3]}
    const bytes = this.arena.view8(this.#scratch, 4096);
    bytes.fill(0);
    let count = 0;
    const allow = (kind: number, argument: number): void => {
      bytes[count * 16] = kind;
      bytes[count * 16 + 2] = argument;
      count++;
    };
    for (const opcode of Object.values(Op)) allow(RESTRICTION_SQE_OP, opcode);
    for (const opcode of REGISTER_OPS) {
      allow(RESTRICTION_REGISTER_OP, opcode);
    }
    allow(RESTRICTION_SQE_FLAGS_ALLOWED, this.#threadedReads ? SQE_FIXED_FILE | SQE_ASYNC : SQE_FIXED_FILE);
    const address = this.arena.baseAddress + this.#scratch;
    check(native.ringRegister(this.#fd, REGISTER_RESTRICTIONS, address, count), 'restrict io_uring');
    check(native.ringRegister(this.#fd, REGISTER_ENABLE_RINGS, 0, 0), 'enable io_uring');
    bytes.fill(0);
  }

  /** Registers the ring's own descriptor, which saves a table look-up per enter. Returns -errno before Linux 5.18. */
  #registerRing(): number {
    // struct io_uring_rsrc_update {u32 offset (-1: any), resv; u64 data (the fd)}
    this.#scratch32[0] = 0xffffffff;
    this.#scratch32[1] = 0;
    this.#scratch32[2] = this.#fd;
    this.#scratch32[3] = 0;
    const outcome = native.ringRegister(this.#fd, REGISTER_RING_FDS, this.arena.baseAddress + this.#scratch, 1);
    return outcome < 0 ? outcome : this.#scratch32[0];
  }
}

/** The best set-up this kernel knows: 6.1 has all flags, older ones fewer. */
function setupRing(entries: number, cqEntries: number, iopoll: boolean): ReturnType<typeof checkSetup> {
  const common = SETUP_CLAMP | SETUP_R_DISABLED | (iopoll ? SETUP_IOPOLL : 0);
  const attempts = [
    common | SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG,
    common | SETUP_SUBMIT_ALL | SETUP_COOP_TASKRUN | SETUP_TASKRUN_FLAG,
    common,
  ];
  for (const flags of attempts) {
    const outcome = native.ringSetup(entries, cqEntries, flags);
    if (outcome !== -EINVAL) return checkSetup(outcome);
  }
  return checkSetup(-EINVAL);
}

function checkSetup(outcome: ReturnType<typeof native.ringSetup>) {
  return checkObject(outcome, 'io_uring_setup');
}
