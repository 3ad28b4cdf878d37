/**
 * A write that changes the mapping: its clusters get host clusters of their own, or subclusters of one come into being.
 *
 *     buffer? ── read what is around the data ── zero the cluster? ── write ── enter it into the L2 slice ── done
 *
 * What is around the data within its clusters (or subclusters) is copied: one read for head and tail, one write for head, data and
 * tail; nothing is read where it is zeroes, and nothing written where the host cluster is zeroes already.
 *
 * Invariants
 * - The mapping is changed when all data is written: until then reads see what was there before.
 * - While a change is active no other one touches its clusters: they wait for it.
 * - A change that fails leaves the mapping as it was, and its clusters go back.
 */
import { EIO, native } from '../../../native/index.js';
import { BdevIo, IoStatus, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import type { Engine } from './engine.js';
import { Mapped, hostOf, readHosts, unitBits, writeEntry, writeUnits } from './l2.js';
import type { RequestJob } from './request-job.js';
import { RecordKind } from './restart-log.js';
import { Sleeper, WaitList } from './wait-list.js';

/** Above this a cluster is zeroed by a request of its own instead of being written out. */
const ZERO_SEGMENTS_BYTES_MAX = 256 * 1024;
const DOUBLE = 0.5;

const Step = { copy: 0, zero: 1, write: 2 } as const;

export class Change extends Sleeper implements IoOwner {
  /** Whoever wants these clusters. */
  readonly waiters = new WaitList();
  firstCluster = DOUBLE;
  count = 0;
  /** The request's data, filled by the job. */
  readonly source = new BdevIo(16);
  readonly #engine: Engine;
  readonly #io = new BdevIo(20);
  readonly #reads = [new BdevIo(1), new BdevIo(1)];
  #job: RequestJob | null = null;
  #offset = DOUBLE;
  #length = DOUBLE;
  #host = DOUBLE;
  #isNew = false;
  #isZeroed = false;
  #wholeClusters = false;
  #slot = -1;
  #buffer = DOUBLE;
  #head = DOUBLE;
  #tail = DOUBLE;
  #copiesHead = false;
  #copiesTail = false;
  #outstanding = 0;
  #errno = 0;
  /** What was to be copied is zeroes: nothing is written. */
  #isVoid = false;
  /** The data is in the file. */
  #isWritten = false;

  constructor(engine: Engine) {
    super();
    this.#engine = engine;
    this.#buffer = 0;
  }

  /** Where and how much, before `source` is filled. No length: the unit there is copied from below, and nothing else is written. */
  prepare(job: RequestJob, offset: number, length: number): void {
    this.#job = job;
    this.#offset = offset;
    this.#length = length;
    this.source.prepare(IoType.write, 0, 0, 0);
  }

  /**
   * @param host first byte of the host clusters
   * @param isNew they are not in the mapping yet
   * @param isZeroed they hold zeroes
   */
  begin(firstCluster: number, count: number, host: number, isNew: boolean, isZeroed: boolean): void {
    const engine = this.#engine;
    const { geometry, l2 } = engine.top;
    this.firstCluster = firstCluster;
    this.count = count;
    this.#host = host;
    this.#isNew = isNew;
    this.#isZeroed = isZeroed;
    this.#errno = 0;
    this.#isWritten = false;
    this.#isVoid = false;
    this.#slot = l2.find(engine.top.sliceOf(this.#offset));
    l2.pin(this.#slot);
    engine.activate(this);
    this.#wholeClusters = isNew && this.#replacesAny();
    const unit = this.#wholeClusters ? geometry.clusterBytes : geometry.unitBytes;
    const start = Math.floor(this.#offset / unit) * unit;
    const dataEnd = this.#offset + this.#length;
    const whole = Math.max(start + unit, Math.ceil(dataEnd / unit) * unit);
    // A data file is as long as the disk.
    const end = geometry.hasExternalData ? Math.min(whole, engine.top.sizeBytes) : whole;
    this.#head = this.#offset - start;
    this.#tail = end - dataEnd;
    this.#copiesHead = this.#head > 0 && !engine.readsAsZeroes(start, this.#head);
    this.#copiesTail = this.#tail > 0 && !engine.readsAsZeroes(dataEnd, this.#tail);
    if (this.#copiesHead || this.#copiesTail) this.#takeBuffer();
    else this.#fill();
  }

  /** A buffer has come free, or the log has room. */
  wakeUp(errno: number): void {
    if (errno !== 0) this.#end(errno);
    else if (this.#isWritten) this.#enter();
    else this.#takeBuffer();
  }

  onDone(io: BdevIo, step: number): void {
    if (io.status !== IoStatus.success) this.#errno ||= io.errno || EIO;
    if (--this.#outstanding > 0) return;
    if (this.#errno !== 0) this.#end(this.#errno);
    else if (step === Step.copy) this.#fill();
    else if (step === Step.zero) this.#write();
    else this.#enter();
  }

  /** Whether a cluster has data that goes elsewhere now: then all of it has to go. */
  #replacesAny(): boolean {
    const { geometry, l2 } = this.#engine.top;
    const base = l2.wordsOf(this.#slot);
    for (let i = 0; i < this.count; i++) {
      const at = base + ((this.firstCluster + i) % geometry.clustersPerSlice) * geometry.entryWords;
      if (l2.words[at] !== 0 || (l2.words[at + 1]! & ~0x01000000) !== 0) return true;
    }
    return false;
  }

  #takeBuffer(): void {
    const address = this.#engine.buffers.take();
    if (address === 0) {
      this.#engine.buffers.waiters.add(this);
      return;
    }
    this.#buffer = address;
    this.#copy();
  }

  /** Where the tail is in the buffer: head and tail of one cluster lie in it as they do in the cluster. */
  #tailAt(): number {
    const unit = this.#head + this.#length + this.#tail;
    const { clusterBytes } = this.#engine.top.geometry;
    return unit <= clusterBytes ? this.#head + this.#length : clusterBytes;
  }

  #copy(): void {
    const { top } = this.#engine;
    const { clusterBytes } = top.geometry;
    const start = this.#offset - this.#head;
    const dataEnd = this.#offset + this.#length;
    const isMerged = this.#copiesHead && this.#copiesTail && dataEnd + this.#tail - start <= clusterBytes;
    const { arena } = this.#engine.reactor;
    // What lies beyond the end of the disk is zeroes.
    if (this.#tail > 0) arena.view8(this.#buffer + this.#tailAt(), this.#tail).fill(0);
    if (this.#head > 0 && !this.#copiesHead) arena.view8(this.#buffer, this.#head).fill(0);
    this.#outstanding = 1;
    if (isMerged) {
      this.#read(0, start, Math.min(dataEnd + this.#tail, top.sizeBytes) - start, this.#buffer);
    } else {
      if (this.#copiesHead) this.#read(0, start, this.#head, this.#buffer);
      if (this.#copiesTail) {
        this.#read(1, dataEnd, Math.min(this.#tail, top.sizeBytes - dataEnd), this.#buffer + this.#tailAt());
      }
    }
    if (--this.#outstanding > 0) return;
    if (this.#errno !== 0) this.#end(this.#errno);
    else this.#fill();
  }

  #read(index: number, offset: number, lengthBytes: number, address: number): void {
    const io = this.#reads[index]!;
    io.prepare(IoType.read, offset, lengthBytes, 0);
    io.addSegment(address, lengthBytes);
    io.push(this, Step.copy);
    this.#outstanding++;
    this.#engine.startJob(io);
  }

  /** Everything is there that is to be written around the data. */
  #fill(): void {
    const { reactor } = this.#engine;
    const base = reactor.arena.baseAddress + this.#buffer;
    // What was copied may be zeroes all the same.
    if (this.#copiesHead && native.isZero(base, this.#head)) this.#copiesHead = false;
    if (this.#copiesTail && native.isZero(base + this.#tailAt(), this.#tail)) this.#copiesTail = false;
    const isNothing = this.#length === 0 && !this.#copiesHead && !this.#copiesTail && !this.#wholeClusters;
    this.#isVoid = isNothing && this.#engine.top.geometry.version >= 3;
    if (this.#isVoid) {
      this.#enter();
      return;
    }
    const zeroes = (this.#copiesHead ? 0 : this.#head) + (this.#copiesTail ? 0 : this.#tail);
    if (this.#isZeroed || zeroes <= ZERO_SEGMENTS_BYTES_MAX) {
      this.#write();
      return;
    }
    const io = this.#io;
    const inCluster = this.#offset - this.#head - this.firstCluster * this.#engine.top.geometry.clusterBytes;
    io.prepare(IoType.writeZeroes, this.#host + inCluster, this.#head + this.#length + this.#tail, 0);
    this.#isZeroed = true;
    this.#submit(Step.zero);
  }

  #write(): void {
    const io = this.#io;
    const { source } = this;
    const inCluster = this.#offset - this.firstCluster * this.#engine.top.geometry.clusterBytes;
    const writesHead = this.#copiesHead || (this.#head > 0 && !this.#isZeroed);
    const writesTail = this.#copiesTail || (this.#tail > 0 && !this.#isZeroed);
    const start = this.#host + inCluster - (writesHead ? this.#head : 0);
    const length = this.#length + (writesHead ? this.#head : 0) + (writesTail ? this.#tail : 0);
    io.prepare(IoType.write, start, length, 0);
    if (writesHead) {
      if (this.#copiesHead) io.addSegment(this.#buffer, this.#head);
      else this.#engine.addZeroes(io, this.#head);
    }
    for (let i = 0; i < source.segmentCount; i++) io.addSegment(source.segmentAddresses[i]!, source.segmentLengths[i]!);
    if (writesTail) {
      if (this.#copiesTail) io.addSegment(this.#buffer + this.#tailAt(), this.#tail);
      else this.#engine.addZeroes(io, this.#tail);
    }
    this.#submit(Step.write);
  }

  #submit(step: number): void {
    this.#outstanding = 1;
    this.#io.push(this, step);
    this.#engine.dataChannel.submit(this.#io);
  }

  /** The data is written: the mapping may say so. */
  #enter(): void {
    this.#isWritten = true;
    const engine = this.#engine;
    const { geometry, l2 } = engine.top;
    const { clusterBytes, entryWords, clustersPerSlice } = geometry;
    if (engine.isLogFull(geometry.isExtended ? this.count : 1, this)) return;
    const { words } = l2;
    const base = l2.wordsOf(this.#slot);
    const end = this.#offset + this.#length + this.#tail;
    const start = this.#offset - this.#head;
    const isZero = this.#isVoid;
    if (isZero && this.#isNew && !geometry.hasExternalData) engine.dropped.add(this.#host / clusterBytes, this.count);
    for (let i = 0; i < this.count; i++) {
      const cluster = this.firstCluster + i;
      const at = base + (cluster % clustersPerSlice) * entryWords;
      if (isZero) {
        // The copy came to zeroes, for which no cluster is needed.
        if (geometry.isExtended)
          writeUnits(words, at, unitBits(geometry, start - cluster * clusterBytes, end - start), Mapped.zero);
        else writeEntry(words, at, hostOf(words, at), !this.#isNew, true);
        this.#log(cluster, at, RecordKind.set);
        continue;
      }
      if (this.#isNew) {
        readHosts(geometry, words, at, engine.dropped);
        writeEntry(words, at, this.#host + i * clusterBytes, true, false);
      }
      if (geometry.isExtended) {
        const from = Math.max(start, cluster * clusterBytes);
        const bits = unitBits(
          geometry,
          from - cluster * clusterBytes,
          Math.min(end, (cluster + 1) * clusterBytes) - from,
        );
        // Subclusters that were there before went along, or are in the same place.
        if (this.#wholeClusters) words[at + 2] = 0;
        writeUnits(words, at, bits, Mapped.data);
      } else if (!this.#isNew) {
        writeEntry(words, at, hostOf(words, at), true, false);
      }
      if (geometry.isExtended || i === 0) this.#log(cluster, at, this.#isNew ? RecordKind.map : RecordKind.set);
    }
    l2.markDirty(this.#slot);
    engine.noteChange();
    this.#end(0);
  }

  /** Writes down what entries say from here on: of subclusters one by one, otherwise of all clusters. */
  #log(cluster: number, at: number, kind: RecordKind): void {
    const { log, top } = this.#engine;
    if (log === null) return;
    const { entryWords, isExtended } = top.geometry;
    log.first = cluster;
    for (let i = 0; i < 4; i++) log.value[i] = i < entryWords ? top.l2.words[at + i]! : 0;
    log.append(kind, isExtended ? 1 : this.count);
  }

  #end(errno: number): void {
    const engine = this.#engine;
    if (errno !== 0 && this.#isNew && !engine.top.geometry.hasExternalData) {
      engine.dropped.add(this.#host / engine.top.geometry.clusterBytes, this.count);
    }
    engine.top.l2.unpin(this.#slot);
    if (this.#buffer !== 0) {
      const address = this.#buffer;
      this.#buffer = 0;
      engine.buffers.give(address);
    }
    const job = this.#job!;
    this.#job = null;
    engine.deactivate(this);
    this.waiters.wakeAll(0);
    engine.recycle(this);
    job.pieceDone(errno);
  }
}
