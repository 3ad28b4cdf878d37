/**
 * The data of an encrypted image as plain text: a channel over the one that holds it. Sectors are numbered by their place in the
 * file, so who reads and writes here need not know that they are encrypted.
 *
 *     read           file ── the caller's memory ── decrypted there
 *     write          the caller's memory ── a copy, encrypted ── file
 *     write zeroes   zeroes, encrypted ── file: zeroes in the file would read as noise
 *
 * Invariants
 * - What is written to the file is encrypted in memory of our own: a guest sees its own memory, and changes it, at any time.
 * - Segments are whole sectors (`memoryAlignmentBytes` of the bdev).
 * - Nothing here allocates at a steady load.
 */
import { EIO, EOPNOTSUPP } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import type { IoChannel } from '../bdev.js';
import { BdevIo, IoFlag, IoStatus, IoType, statusOfErrno } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import { BufferPool } from './buffer-pool.js';
import { CodecJob, CodecOperation, CodecStatus, InlineCodec } from './codec/codec-job.js';
import type { CodecOwner, CodecPool } from './codec/codec-job.js';
import { SegmentCursor, newCopyEntries } from './segments.js';
import { Sleeper } from './wait-list.js';
import { LUKS_SECTOR_BYTES } from './luks/luks-format.js';
import type { SectorCipher } from './luks/sector-cipher.js';

/** From here on a piece of memory is worth handing to the pool, in parts that keep several threads busy. */
const POOLED_BYTES_MIN = 64 * 1024;
const PART_BYTES_MAX = 128 * 1024;
/** Copies that are written from: small ones for deep queues, large ones for large writes. 12 MiB in all, at most. */
const SMALL_BYTES = 16 * 1024;
const SMALL_COUNT = 256;
const LARGE_BYTES = 256 * 1024;
const LARGE_COUNT = 32;
const DOUBLE = 0.5;

export interface CryptOptions {
  readonly reactor: Reactor;
  /** Where the encrypted data lies; it stays its owner's. */
  readonly channel: IoChannel;
  /** Closed with this channel. */
  readonly cipher: SectorCipher;
  /** Null: all is done on the reactor. Closed with this channel. */
  readonly pool: CodecPool | null;
}

export class CryptChannel implements IoChannel, IoOwner, CodecOwner {
  readonly reactor: Reactor;
  readonly channel: IoChannel;
  readonly cipher: SectorCipher;
  readonly small: BufferPool;
  readonly large: BufferPool;
  readonly copyEntries = newCopyEntries();
  readonly #pool: CodecPool | null;
  readonly #codec: InlineCodec;
  /** What is decrypted at once. */
  readonly #job = new CodecJob(this);
  readonly #freeReads: PooledRead[] = [];
  readonly #freeParts: Part[] = [];
  readonly #freeWrites: CryptWrite[] = [];
  readonly #freeCopies: Copy[] = [];

  constructor({ reactor, channel, cipher, pool }: CryptOptions) {
    this.reactor = reactor;
    this.channel = channel;
    this.cipher = cipher;
    this.#pool = pool;
    this.#codec = new InlineCodec(reactor.arena);
    this.small = new BufferPool(reactor.arena, SMALL_BYTES, SMALL_COUNT);
    this.large = new BufferPool(reactor.arena, LARGE_BYTES, LARGE_COUNT);
    this.#job.cipher = cipher.handle;
    this.#job.operation = CodecOperation.decrypt;
  }

  submit(io: BdevIo): void {
    switch (io.type) {
      case IoType.read:
        io.push(this, 0);
        this.channel.submit(io);
        return;
      case IoType.writeZeroes:
        if ((io.flags & IoFlag.noFallback) !== 0) {
          io.complete(IoStatus.notSupported, EOPNOTSUPP);
          return;
        }
        (this.#freeWrites.pop() ?? new CryptWrite(this)).start(io);
        return;
      case IoType.write:
        (this.#freeWrites.pop() ?? new CryptWrite(this)).start(io);
        return;
      default:
        this.channel.submit(io);
    }
  }

  /** Encrypted data has been read. */
  onDone(io: BdevIo): void {
    if (io.status !== IoStatus.success) {
      io.complete(io.status, io.errno);
      return;
    }
    const { segmentAddresses, segmentLengths, segmentCount } = io;
    const job = this.#job;
    let read: PooledRead | null = null;
    let errno = 0;
    let offset = io.offsetBytes;
    for (let i = 0; i < segmentCount; i++) {
      const lengthBytes = segmentLengths[i]!;
      if (lengthBytes < POOLED_BYTES_MIN || this.#pool === null) {
        job.source = segmentAddresses[i]!;
        job.destination = job.source;
        job.sourceBytes = lengthBytes;
        job.capacityBytes = lengthBytes;
        job.sector = offset / LUKS_SECTOR_BYTES;
        this.#codec.run(job);
        if (job.status !== CodecStatus.ok) errno = EIO;
      } else {
        read ??= this.#takeRead(io);
        read.decrypt(segmentAddresses[i]!, lengthBytes, offset);
      }
      offset += lengthBytes;
    }
    if (read === null) io.complete(statusOfErrno(errno), errno);
    else read.end(errno);
  }

  /** Of what was done at once: who ran it looks at it. */
  onCodecDone(): void {}

  close(): void {
    this.#pool?.close();
    this.#codec.close();
    this.small.release();
    this.large.release();
    this.cipher.close();
  }

  // ---- for reads and writes ----

  /** Does a job, later or at once; its owner is told in either case. */
  carryOut(job: CodecJob): void {
    const isPooled = job.sourceBytes >= POOLED_BYTES_MIN && this.#pool !== null;
    // Without room in the pool the reactor helps, which also keeps it from taking on more.
    if (isPooled && this.#pool.submit(job)) return;
    this.#codec.run(job);
    job.owner.onCodecDone(job);
  }

  #takeRead(io: BdevIo): PooledRead {
    const read = this.#freeReads.pop() ?? new PooledRead(this);
    read.begin(io);
    return read;
  }

  recycleRead(read: PooledRead): void {
    this.#freeReads.push(read);
  }

  takePart(): Part {
    return this.#freeParts.pop() ?? new Part(this);
  }

  recyclePart(part: Part): void {
    this.#freeParts.push(part);
  }

  recycleWrite(write: CryptWrite): void {
    this.#freeWrites.push(write);
  }

  takeCopy(): Copy {
    return this.#freeCopies.pop() ?? new Copy(this);
  }

  recycleCopy(copy: Copy): void {
    this.#freeCopies.push(copy);
  }
}

/** A read whose data the pool decrypts, or some of it. */
class PooledRead {
  readonly #channel: CryptChannel;
  #io: BdevIo | null = null;
  #outstanding = 0;
  #errno = 0;

  constructor(channel: CryptChannel) {
    this.#channel = channel;
  }

  begin(io: BdevIo): void {
    this.#io = io;
    this.#outstanding = 1;
    this.#errno = 0;
  }

  decrypt(address: number, lengthBytes: number, offset: number): void {
    for (let done = 0; done < lengthBytes; done += PART_BYTES_MAX) {
      this.#outstanding++;
      const bytes = lengthBytes - done < PART_BYTES_MAX ? lengthBytes - done : PART_BYTES_MAX;
      this.#channel.takePart().begin(this, address + done, bytes, offset + done);
    }
  }

  /** A part is done, or all are handed out. */
  end(errno: number): void {
    if (errno !== 0) this.#errno = errno;
    if (--this.#outstanding > 0) return;
    const io = this.#io!;
    this.#io = null;
    this.#channel.recycleRead(this);
    io.complete(statusOfErrno(this.#errno), this.#errno);
  }
}

class Part implements CodecOwner {
  readonly #channel: CryptChannel;
  readonly #job: CodecJob;
  #read: PooledRead | null = null;

  constructor(channel: CryptChannel) {
    this.#channel = channel;
    this.#job = new CodecJob(this);
    this.#job.operation = CodecOperation.decrypt;
    this.#job.cipher = channel.cipher.handle;
  }

  begin(read: PooledRead, address: number, lengthBytes: number, offset: number): void {
    this.#read = read;
    const job = this.#job;
    job.source = address;
    job.destination = address;
    job.sourceBytes = lengthBytes;
    job.capacityBytes = lengthBytes;
    job.sector = offset / LUKS_SECTOR_BYTES;
    this.#channel.carryOut(job);
  }

  onCodecDone(job: CodecJob): void {
    const read = this.#read!;
    this.#read = null;
    this.#channel.recyclePart(this);
    read.end(job.status === CodecStatus.ok ? 0 : EIO);
  }
}

/** A write, or zeroes: copy after copy, as there are buffers. */
class CryptWrite extends Sleeper {
  readonly #channel: CryptChannel;
  readonly #cursor = new SegmentCursor();
  #io: BdevIo | null = null;
  #position = DOUBLE;
  #end = DOUBLE;
  #outstanding = 0;
  #errno = 0;
  #isSleeping = false;
  #isAdvancing = false;

  constructor(channel: CryptChannel) {
    super();
    this.#channel = channel;
  }

  start(io: BdevIo): void {
    this.#io = io;
    this.#position = io.offsetBytes;
    this.#end = io.offsetBytes + io.lengthBytes;
    this.#outstanding = 0;
    this.#errno = 0;
    this.#isSleeping = false;
    if (io.type === IoType.write) this.#cursor.begin(io);
    this.#advance();
  }

  /** A buffer has come free. */
  wakeUp(): void {
    this.#isSleeping = false;
    this.#advance();
  }

  copyDone(errno: number): void {
    this.#outstanding--;
    if (errno !== 0) this.#errno ||= errno;
    if (!this.#isAdvancing && !this.#isSleeping) this.#advance();
  }

  #advance(): void {
    this.#isAdvancing = true;
    while (!this.#isSleeping && this.#errno === 0 && this.#position < this.#end) this.#copy();
    this.#isAdvancing = false;
    if (this.#isSleeping || this.#outstanding > 0) return;
    const io = this.#io!;
    this.#io = null;
    this.#channel.recycleWrite(this);
    io.complete(statusOfErrno(this.#errno), this.#errno);
  }

  #copy(): void {
    const { small, large, copyEntries, reactor } = this.#channel;
    const left = this.#end - this.#position;
    const buffers = left <= SMALL_BYTES ? small : large;
    const lengthBytes = left < LARGE_BYTES ? left : LARGE_BYTES;
    const address = buffers.take();
    if (address === 0) {
      this.#isSleeping = true;
      buffers.waiters.add(this);
      return;
    }
    const copy = this.#channel.takeCopy();
    const io = this.#io!;
    copy.io.prepare(IoType.write, this.#position, lengthBytes, io.flags & IoFlag.fua);
    copy.io.addSegment(address, lengthBytes);
    if (io.type === IoType.write) this.#cursor.copyTo(reactor.arena, address, lengthBytes, copyEntries);
    else reactor.arena.view8(address, lengthBytes).fill(0);
    this.#position += lengthBytes;
    this.#outstanding++;
    copy.begin(this, buffers);
  }
}

/** One transfer of a write. */
class Copy implements IoOwner, CodecOwner {
  readonly io = new BdevIo(1);
  readonly #channel: CryptChannel;
  readonly #job: CodecJob;
  #write: CryptWrite | null = null;
  #buffers: BufferPool | null = null;

  constructor(channel: CryptChannel) {
    this.#channel = channel;
    this.#job = new CodecJob(this);
    this.#job.operation = CodecOperation.encrypt;
    this.#job.cipher = channel.cipher.handle;
  }

  /** `io` is prepared, and its data is in its one segment. */
  begin(write: CryptWrite, buffers: BufferPool): void {
    this.#write = write;
    this.#buffers = buffers;
    const { io } = this;
    const job = this.#job;
    job.source = io.segmentAddresses[0]!;
    job.destination = job.source;
    job.sourceBytes = io.lengthBytes;
    job.capacityBytes = io.lengthBytes;
    job.sector = io.offsetBytes / LUKS_SECTOR_BYTES;
    this.#channel.carryOut(job);
  }

  onCodecDone(job: CodecJob): void {
    if (job.status !== CodecStatus.ok) {
      this.#end(EIO);
      return;
    }
    this.io.push(this, 0);
    this.#channel.channel.submit(this.io);
  }

  onDone(io: BdevIo): void {
    this.#end(io.status === IoStatus.success ? 0 : io.errno || EIO);
  }

  #end(errno: number): void {
    const write = this.#write!;
    const buffers = this.#buffers!;
    this.#write = null;
    this.#buffers = null;
    const address = this.io.segmentAddresses[0]!;
    this.#channel.recycleCopy(this);
    buffers.give(address);
    write.copyDone(errno);
  }
}
