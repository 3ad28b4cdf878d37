/**
 * Work on the bytes of a cluster that costs more than copying them - decompressing, compressing, encrypting - and who does it.
 *
 * A job is kept by its owner, filled in, submitted, and comes back to the owner once, never before `submit` returns. Nothing here
 * allocates per job.
 *
 *     offset  bytes  of a job in memory, see native/codec.h
 *          0      8  absolute address of the source, a double
 *          8      8  absolute address of the destination, a double
 *         16      4  length of the source
 *         20      4  capacity of the destination
 *         24      4  operation
 *         28      4  level
 *         32      4  status, answered
 *         36      4  bytes produced, answered
 *         40      8  number of the first sector, a double
 *         48      4  cipher
 */
import { native } from '../../../../native/index.js';
import type { Arena } from '../../../../native/index.js';
import { CompressionType } from '../format.js';

/** native/codec.h has the same numbers. Inflating and deflating are raw: without the header and the checksum of zlib. */
export const CodecOperation = {
  inflate: 0,
  zstdDecompress: 1,
  deflate: 2,
  zstdCompress: 3,
  encrypt: 4,
  decrypt: 5,
} as const;
export type CodecOperation = (typeof CodecOperation)[keyof typeof CodecOperation];

/**
 * How a job went; native/codec.h has the same numbers.
 * - short: the stream ended before the destination was full
 * - tooLong: what is produced does not fit; a cluster that is compressed is then stored as it is
 * - failed: no memory, or no reason that a job can give
 */
export const CodecStatus = { ok: 0, damaged: 1, short: 2, tooLong: 3, failed: 4 } as const;
export type CodecStatus = (typeof CodecStatus)[keyof typeof CodecStatus];

/** What QEMU compresses with. */
export const DEFLATE_LEVEL = -1;
export const ZSTD_LEVEL = 3;

export interface CodecOwner {
  /** The job has `status` and `producedBytes` and may be submitted again. */
  onCodecDone(job: CodecJob): void;
}

/** First value of a field that holds large numbers: one that held a small integer would box every number stored to it. */
const DOUBLE = 0.5;

export class CodecJob {
  readonly owner: CodecOwner;
  operation: CodecOperation = CodecOperation.inflate;
  /**
   * Arena offsets. They do not overlap, but may be the same for a cipher, and are the job's until it is done. What is compressed is a
   * copy: what a guest changes meanwhile may lead the compressor astray.
   */
  source = DOUBLE;
  destination = DOUBLE;
  /** May go beyond the end of a compressed cluster, whose length is known in sectors only. Whole sectors for a cipher. */
  sourceBytes = 0;
  /**
   * Bytes wanted of a compressed cluster: all of them, or, of one that is deflated, as many from its start as are needed, which costs
   * that part only. Room for what is compressed otherwise.
   */
  capacityBytes = 0;
  /** Of compression. */
  level = 0;
  /** Of a cipher: its handle, and the number of the first sector, of 512 bytes. */
  cipher = 0;
  sector = DOUBLE;
  status: CodecStatus = CodecStatus.ok;
  producedBytes = 0;

  constructor(owner: CodecOwner) {
    this.owner = owner;
  }
}

export interface CodecPool {
  /** Jobs that have not come back. */
  readonly inflight: number;
  /** Returns false when there is no room: to be tried again when something came back. */
  submit(job: CodecJob): boolean;
  /** No job may be in flight. Control path. */
  close(): void;
}

export function decompressionOf(type: CompressionType): CodecOperation {
  return type === CompressionType.zstd ? CodecOperation.zstdDecompress : CodecOperation.inflate;
}

export function compressionOf(type: CompressionType): CodecOperation {
  return type === CompressionType.zstd ? CodecOperation.zstdCompress : CodecOperation.deflate;
}

/** Jobs as they lie in memory. */
export class JobTable {
  static readonly JOB_BYTES = 64;
  readonly #baseAddress: number;
  readonly #doubles: Float64Array;
  readonly #words: Int32Array;

  /** @param offset of `count` jobs in the arena */
  constructor(arena: Arena, offset: number, count: number) {
    this.#baseAddress = arena.baseAddress;
    this.#doubles = arena.viewF64(offset, count * 8);
    this.#words = new Int32Array(arena.buffer, offset, count * 16);
  }

  write(index: number, job: CodecJob): void {
    const doubles = this.#doubles;
    doubles[index * 8] = this.#baseAddress + job.source;
    doubles[index * 8 + 1] = this.#baseAddress + job.destination;
    const words = this.#words;
    const at = index * 16;
    words[at + 4] = job.sourceBytes;
    words[at + 5] = job.capacityBytes;
    words[at + 6] = job.operation;
    words[at + 7] = job.level;
    doubles[index * 8 + 5] = job.sector;
    words[at + 12] = job.cipher;
  }

  readAnswer(index: number, job: CodecJob): void {
    const words = this.#words;
    job.status = words[index * 16 + 8] as CodecStatus;
    job.producedBytes = words[index * 16 + 9]!;
  }
}

/** Carries out jobs at once, on the calling thread: what costs less than handing it over. */
export class InlineCodec {
  readonly #arena: Arena;
  readonly #memory: number;
  readonly #table: JobTable;
  readonly #words: Int32Array;

  constructor(arena: Arena) {
    this.#arena = arena;
    this.#memory = arena.allocate(JobTable.JOB_BYTES);
    this.#table = new JobTable(arena, this.#memory, 1);
    this.#words = new Int32Array(arena.buffer, this.#memory, JobTable.JOB_BYTES / 4);
  }

  /** The job has its answer afterwards; its owner is not called. */
  run(job: CodecJob): void {
    this.#table.write(0, job);
    native.codecRun(this.#words);
    this.#table.readAnswer(0, job);
  }

  close(): void {
    this.#arena.release(this.#memory);
  }
}
