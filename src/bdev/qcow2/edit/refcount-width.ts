/**
 * Giving the refcounts of an image another width: all of them are written anew behind the end of the file, and are in force with the write
 * of the header. The former ones are free then.
 */
import { BdevError } from '../../bdev.js';
import { counterMax, readCounter, writeCounter } from '../counter-bits.js';
import { refcountClusters } from '../create.js';
import { REFCOUNT_TABLE_BYTES_MAX, clusterBytesOf, refcountsPerBlock, writeUInt64 } from '../format.js';
import type { Qcow2Header } from '../format.js';
import { badImage } from '../image-error.js';
import type { ImageFile } from '../image-file.js';
import type { Task } from '../../task.js';
import { entryOffset } from './entries.js';
import { assertEditable, commitHeader, loadHeader } from './header.js';

/**
 * @param order the width as a power of two
 * @param onProgress is called with 0 to 1. Throws BdevError, and then nothing has changed
 */
export function* changeRefcountWidth(
  file: ImageFile,
  order: number,
  onProgress: (fraction: number) => void,
): Task<void> {
  const loaded = yield* loadHeader(file);
  const { header } = loaded;
  if (header.refcountOrder === order) return;
  assertEditable(header);
  if (header.version < 3) {
    const message = 'Refcount widths other than 16 bits require compatibility level 1.1 or above';
    throw new BdevError('bad-option', 'refcount_bits', message, 'add compat=1.1');
  }
  const clusterBytes = clusterBytesOf(header);
  const before = yield* OldCounters.load(file, header);
  const start = Math.ceil(file.sizeBytes / clusterBytes);
  const { blocks, tableClusters } = refcountClusters(start, { clusterBits: header.clusterBits, refcountOrder: order });
  if (tableClusters * clusterBytes > REFCOUNT_TABLE_BYTES_MAX) {
    throw new BdevError('too-large', 'refcount_bits', 'the refcount table would be too large', 'choose fewer bits');
  }
  const end = start + tableClusters + blocks;
  const table = Buffer.alloc(tableClusters * clusterBytes);
  const perBlock = refcountsPerBlock({ clusterBits: header.clusterBits, refcountOrder: order });
  const bytes = Buffer.alloc(clusterBytes);
  yield* file.grow(end * clusterBytes);
  for (let block = 0; block < blocks; block++) {
    bytes.fill(0);
    for (let i = 0; i < perBlock; i++) {
      const cluster = block * perBlock + i;
      if (cluster >= end) break;
      const count = cluster >= start ? 1 : yield* before.at(cluster);
      if (count > counterMax(order)) throw tooNarrow(cluster * clusterBytes, count);
      if (count > 0) writeCounter(bytes, i, order, count);
    }
    const offset = (start + tableClusters + block) * clusterBytes;
    writeUInt64(table, offset, block * 8);
    yield* file.write(offset, bytes);
    onProgress((block + 1) / blocks);
  }
  yield* file.write(start * clusterBytes, table);
  yield* file.sync();
  const change = {
    refcountOrder: order,
    refcountTableOffset: start * clusterBytes,
    refcountTableClusters: tableClusters,
  };
  yield* commitHeader(file, loaded, { ...header, ...change });
}

function tooNarrow(offset: number, count: number): BdevError {
  const message = 'Cannot decrease refcount entry width to this value';
  const hint = `the cluster at ${offset} has a refcount of ${count}: delete snapshots, or choose more bits`;
  return new BdevError('bad-option', 'refcount_bits', message, hint);
}

/** The refcounts as they are, but for those of the table and the blocks themselves, which will be free. */
class OldCounters {
  readonly #file: ImageFile;
  readonly #order: number;
  readonly #perBlock: number;
  readonly #table: Buffer;
  readonly #block: Buffer;
  readonly #own = new Set<number>();
  #loaded = -1;

  private constructor(file: ImageFile, header: Qcow2Header, table: Buffer) {
    const clusterBytes = clusterBytesOf(header);
    this.#file = file;
    this.#order = header.refcountOrder;
    this.#perBlock = refcountsPerBlock(header);
    this.#table = table;
    this.#block = Buffer.alloc(clusterBytes);
    const first = header.refcountTableOffset / clusterBytes;
    for (let i = 0; i < header.refcountTableClusters; i++) this.#own.add(first + i);
    for (let at = 0; at < table.length; at += 8) {
      const offset = entryOffset(table, at);
      if (offset % clusterBytes !== 0 || offset >= file.sizeBytes) {
        throw badImage(`refcount_table[${at / 8}]`, `is ${offset}, which is no cluster of the file`);
      }
      if (offset > 0) this.#own.add(offset / clusterBytes);
    }
  }

  static *load(file: ImageFile, header: Qcow2Header): Task<OldCounters> {
    const table = Buffer.alloc(header.refcountTableClusters * clusterBytesOf(header));
    yield* file.read(header.refcountTableOffset, table);
    return new OldCounters(file, header, table);
  }

  *at(cluster: number): Task<number> {
    const index = Math.floor(cluster / this.#perBlock);
    if (index !== this.#loaded) {
      const offset = index * 8 < this.#table.length ? entryOffset(this.#table, index * 8) : 0;
      if (offset > 0) yield* this.#file.read(offset, this.#block);
      else this.#block.fill(0);
      this.#loaded = index;
    }
    const count = readCounter(this.#block, cluster % this.#perBlock, this.#order);
    return this.#own.has(cluster) ? Math.max(0, count - 1) : count;
  }
}
