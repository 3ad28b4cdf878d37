/**
 * A request that is more than one transfer: taken apart along the mapping, piece by piece, in order. It sleeps while metadata is
 * loaded, clusters are looked for, or somebody else changes what it wants to change.
 *
 * Invariants
 * - The request completes once, when all its pieces have; nothing new is started after a failure.
 * - What a step found in the mapping is used before anything else can run: look-ups are never kept over a wait.
 */
import { EIO, EROFS } from '../../../native/index.js';
import { BdevIo, IoFlag, IoStatus, IoType } from '../bdev-io.js';
import type { IoOwner } from '../bdev-io.js';
import type { Engine } from './engine.js';
import {
  ENTRY_COMPRESSED,
  ENTRY_COPIED,
  Mapped,
  hostOf,
  readHosts,
  swap32,
  unitBits,
  writeEntry,
  writeUnits,
} from './l2.js';
import { RecordKind } from './restart-log.js';
import { SegmentCursor } from './segments.js';
import { Sleeper } from './wait-list.js';

/** Pieces of one request under way at most. */
const PIECES_MAX = 64;
/** Zeroes up to this length are written out. */
const ZEROES_WRITTEN_MAX = 64 * 1024;
/** Entries that are cleared at once at most. */
const CLEARED_MAX = 1024;
const DOUBLE = 0.5;

/** What is done with the range of a request. */
export const JobKind = {
  /** What its type says. */
  request: 0,
  /** What lies below is copied up into the image, where it holds nothing. The range begins at a cluster. */
  populate: 1,
  /** Its clusters are given up, as if the image had never held them. */
  letGo: 2,
} as const;
export type JobKind = (typeof JobKind)[keyof typeof JobKind];

/** One transfer of a job. */
export class Piece implements IoOwner {
  readonly io = new BdevIo(16);
  readonly #engine: Engine;
  #job: RequestJob | null = null;

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  begin(job: RequestJob): void {
    this.#job = job;
    this.io.push(this, 0);
  }

  onDone(io: BdevIo): void {
    const job = this.#job!;
    this.#job = null;
    const errno = io.status === IoStatus.success ? 0 : io.errno || EIO;
    this.#engine.recyclePiece(this);
    job.pieceDone(errno);
  }
}

export class RequestJob extends Sleeper {
  /** Of the engine's count of what is under way. */
  epoch = 0;
  /** It changed the mapping. */
  hasChanged = false;
  readonly #engine: Engine;
  readonly #cursor = new SegmentCursor();
  #io: BdevIo | null = null;
  #position = DOUBLE;
  #end = DOUBLE;
  #outstanding = 0;
  #errno = 0;
  #isSleeping = false;
  #isAdvancing = false;
  #kind: JobKind = JobKind.request;

  constructor(engine: Engine) {
    super();
    this.#engine = engine;
  }

  start(io: BdevIo, kind: JobKind): void {
    this.#kind = kind;
    this.#io = io;
    this.#position = io.offsetBytes;
    this.#end = io.offsetBytes + io.lengthBytes;
    this.#outstanding = 0;
    this.#errno = 0;
    this.hasChanged = false;
    if (io.type <= IoType.write) this.#cursor.begin(io);
    this.#advance();
  }

  wakeUp(errno: number): void {
    this.#isSleeping = false;
    if (errno !== 0) this.#errno ||= errno;
    if (!this.#isAdvancing) this.#advance();
  }

  pieceDone(errno: number): void {
    this.#outstanding--;
    if (errno !== 0) this.#errno ||= errno;
    if (!this.#isAdvancing && !this.#isSleeping) this.#advance();
  }

  #advance(): void {
    this.#isAdvancing = true;
    const type = this.#io!.type;
    while (!this.#isSleeping && this.#errno === 0 && this.#position < this.#end && this.#outstanding < PIECES_MAX) {
      if (type === IoType.read) this.#read();
      else if (this.#engine.isReadOnly) this.#errno = EROFS;
      else if (this.#kind === JobKind.populate) this.#populate();
      else if (this.#kind === JobKind.letGo) this.#letGo();
      else if (type === IoType.write) this.#write(this.#end);
      else this.#clear();
    }
    this.#isAdvancing = false;
    if (this.#isSleeping || this.#outstanding > 0) return;
    if (this.#errno === 0 && this.#position < this.#end) return;
    const io = this.#io!;
    this.#io = null;
    this.#engine.endJob(this, io, this.#errno);
  }

  /** Finds what the next bytes are, down the chain of images, and starts to fetch them. */
  #read(): void {
    const engine = this.#engine;
    const { layers, extent } = engine;
    extent.offsetBytes = this.#position;
    extent.wantedBytes = this.#end - this.#position;
    for (let i = 0; i < layers.length; i++) {
      const layer = layers[i]!;
      const left = layer.sizeBytes - this.#position;
      // A backing image that is shorter than the disk reads as zeroes behind its end.
      if (left <= 0) break;
      if (left < extent.wantedBytes) extent.wantedBytes = left;
      const { image } = layer;
      if (image === null) {
        this.#transfer(IoType.read, layer.channel, this.#position, extent.wantedBytes);
        return;
      }
      if (!image.find(extent)) {
        this.#isSleeping = true;
        image.loadSlice(this.#position, this);
        return;
      }
      const { kind, lengthBytes } = extent;
      if (kind === Mapped.data) {
        this.#transfer(IoType.read, layer.channel, extent.hostOffset, lengthBytes);
        return;
      }
      if (kind === Mapped.compressed) {
        if (i === 0 && engine.isEncrypted) {
          // Not encrypted, then: whoever has the file could have put it there without the key.
          this.#errno = EIO;
          return;
        }
        // Woken perhaps before this returns.
        this.#isSleeping = true;
        if (engine.compressed.read(i, extent, this)) this.#isSleeping = false;
        return;
      }
      extent.wantedBytes = lengthBytes;
      if (kind === Mapped.zero) break;
      if (i === 0 && engine.chain !== null) i = engine.skipLayers(this.#position) - 1;
    }
    this.#cursor.fillZeroes(engine.reactor.arena, extent.wantedBytes, engine.copyEntries);
    this.#position += extent.wantedBytes;
  }

  /** The next bytes are in memory. @param address arena offset */
  deliver(address: number, lengthBytes: number): void {
    this.#cursor.copyFrom(this.#engine.reactor.arena, address, lengthBytes, this.#engine.copyEntries);
    this.#position += lengthBytes;
  }

  #transfer(type: IoType, channel: Engine['dataChannel'], offset: number, lengthBytes: number): void {
    const piece = this.#engine.takePiece();
    const isCleared = type === IoType.write && this.#io!.type > IoType.write && lengthBytes > ZEROES_WRITTEN_MAX;
    if (isCleared) {
      const isUnmap = this.#io!.type === IoType.discard || (this.#io!.flags & IoFlag.unmap) !== 0;
      piece.io.prepare(IoType.writeZeroes, offset, lengthBytes, isUnmap ? IoFlag.unmap : 0);
    } else {
      piece.io.prepare(type, offset, lengthBytes, 0);
      this.#takeData(piece.io, lengthBytes);
    }
    this.#position += lengthBytes;
    this.#outstanding++;
    piece.begin(this);
    channel.submit(piece.io);
  }

  /** The data of the next bytes as segments: the guest's, or zeroes. */
  #takeData(to: BdevIo, lengthBytes: number): void {
    if (this.#io!.type <= IoType.write) this.#cursor.take(to, lengthBytes);
    else this.#engine.addZeroes(to, lengthBytes);
  }

  /** Writes the next bytes, up to `end` at most. */
  #write(end: number): void {
    const engine = this.#engine;
    const { top, extent } = engine;
    extent.offsetBytes = this.#position;
    extent.wantedBytes = end - this.#position;
    if (!top.find(extent)) {
      this.#isSleeping = true;
      top.loadSlice(this.#position, this);
      return;
    }
    if (extent.kind === Mapped.data && extent.isCopied) {
      if (engine.isUnsettled(extent)) this.hasChanged = true;
      this.#transfer(IoType.write, engine.dataChannel, extent.hostOffset, extent.lengthBytes);
      return;
    }
    if (this.#isTableMissing()) return;
    this.#change(end);
  }

  /** Sleeps until the L2 table of the next bytes is one that may be changed, and its slice is there. */
  #isTableMissing(): boolean {
    const { top } = this.#engine;
    const table = top.tableOf(this.#position);
    if (top.l1Copied[table] === 0) {
      this.#isSleeping = true;
      this.#engine.prepareTable(table, this);
      return true;
    }
    if (top.l2.find(top.sliceOf(this.#position)) >= 0) return false;
    this.#isSleeping = true;
    top.loadSlice(this.#position, this);
    return true;
  }

  /** Clusters from `first` on, `count` at most, that nobody changes; 0: sleeps until the first is free. */
  #unclaimed(first: number, count: number): number {
    const conflict = this.#engine.conflictWith(first, count);
    if (conflict === null) return count;
    if (conflict.firstCluster > first) return conflict.firstCluster - first;
    this.#isSleeping = true;
    conflict.waiters.add(this);
    return 0;
  }

  /** Copies the next unit up when the image holds nothing there. */
  #populate(): void {
    const { top, extent } = this.#engine;
    extent.offsetBytes = this.#position;
    extent.wantedBytes = this.#end - this.#position;
    if (!top.find(extent)) {
      this.#isSleeping = true;
      top.loadSlice(this.#position, this);
    } else if (extent.kind !== Mapped.unallocated || !this.#engine.isBacked(this.#position)) {
      this.#position += extent.lengthBytes;
    } else if (!this.#isTableMissing()) {
      this.#change(Math.min(this.#end, this.#position + top.geometry.unitBytes));
    }
  }

  /** Drops what the image holds of the next clusters. */
  #letGo(): void {
    const engine = this.#engine;
    const { top, extent } = engine;
    const { geometry } = top;
    const { clusterBytes, clustersPerSlice, entryWords } = geometry;
    extent.offsetBytes = this.#position;
    extent.wantedBytes = this.#end - this.#position;
    if (!top.find(extent)) {
      this.#isSleeping = true;
      top.loadSlice(this.#position, this);
      return;
    }
    if (extent.kind === Mapped.unallocated && extent.hostCluster < 0) {
      this.#position += extent.lengthBytes;
      return;
    }
    if (this.#isTableMissing()) return;
    const first = Math.floor(this.#position / clusterBytes);
    const index = first % clustersPerSlice;
    const wanted = Math.min(Math.ceil(this.#end / clusterBytes) - first, clustersPerSlice - index, CLEARED_MAX);
    const count = this.#unclaimed(first, wanted);
    if (count === 0) return;
    if (engine.isLogFull(count, this)) {
      this.#isSleeping = true;
      return;
    }
    const slot = top.l2.find(top.sliceOf(this.#position));
    const { words } = top.l2;
    this.hasChanged = true;
    for (let i = 0; i < count; i++) {
      const at = top.l2.wordsOf(slot) + (index + i) * entryWords;
      readHosts(geometry, words, at, engine.dropped);
      for (let word = 0; word < entryWords; word++) words[at + word] = 0;
      this.#log(first + i, at);
    }
    top.l2.markDirty(slot);
    this.#position = Math.min(this.#end, (first + count) * clusterBytes);
    engine.noteChange();
  }

  #change(end: number): void {
    const engine = this.#engine;
    const { top, extent } = engine;
    const { clusterBytes, clustersPerSlice, entryWords, hasExternalData } = top.geometry;
    const first = Math.floor(this.#position / clusterBytes);
    const index = first % clustersPerSlice;
    const wanted = Math.min(Math.ceil(end / clusterBytes) - first, clustersPerSlice - index);
    const free = this.#unclaimed(first, wanted);
    if (free === 0) return;
    const { words } = top.l2;
    const at = top.l2.wordsOf(top.l2.find(top.sliceOf(this.#position))) + index * entryWords;
    let needy = 0;
    while (needy < free && needsHost(words, at + needy * entryWords, hasExternalData)) needy++;
    if (needy === 0) {
      const inCluster = this.#position - first * clusterBytes;
      this.#startChange(
        Math.min(extent.lengthBytes, clusterBytes - inCluster, end - this.#position),
        first,
        1,
        extent.hostCluster,
        false,
        false,
      );
    } else if (hasExternalData) {
      const length = Math.min(end, (first + needy) * clusterBytes) - this.#position;
      this.#startChange(length, first, needy, first * clusterBytes, true, false);
    } else {
      const allocator = engine.allocator!;
      const count = allocator.take(needy);
      if (count === 0) {
        this.#isSleeping = true;
        allocator.refill(this);
        return;
      }
      const length = Math.min(end, (first + count) * clusterBytes) - this.#position;
      // Zeroes in the file are not zeroes on an encrypted disk.
      const isZeroed = allocator.isZeroed && !engine.isEncrypted;
      this.#startChange(length, first, count, allocator.cluster * clusterBytes, true, isZeroed);
    }
  }

  #startChange(length: number, first: number, count: number, host: number, isNew: boolean, isZeroed: boolean): void {
    this.hasChanged = true;
    const change = this.#engine.takeChange();
    const isPopulating = this.#kind === JobKind.populate;
    change.prepare(this, this.#position, isPopulating ? 0 : length);
    if (!isPopulating) this.#takeData(change.source, length);
    this.#position += length;
    this.#outstanding++;
    change.begin(first, count, host, isNew, isZeroed);
  }

  /** Discards or zeroes the next bytes. */
  #clear(): void {
    const engine = this.#engine;
    const { top } = engine;
    const { geometry } = top;
    const { unitBytes } = geometry;
    const isDiscard = this.#io!.type === IoType.discard;
    const skip = this.#position % unitBytes;
    const unitEnd = this.#position - skip + unitBytes;
    const reachesEnd = this.#end === top.sizeBytes;
    if (skip > 0 || (this.#end < unitEnd && !reachesEnd)) {
      // Part of a unit: it is written, unless it may stay as it is.
      const end = Math.min(this.#end, unitEnd);
      if (isDiscard) this.#position = end;
      else this.#writeZeroes(end);
      return;
    }
    if (geometry.hasExternalData) {
      // Its data file may be read by others without the image: what is zeroes here has to be zeroes there.
      this.#writeZeroes(reachesEnd ? this.#end : this.#end - (this.#end % unitBytes));
      return;
    }
    if (isDiscard && geometry.version < 3 && engine.layers.length > 1) {
      // No entry would hide what lies below: data would come back that was overwritten long ago.
      this.#position = this.#end;
      return;
    }
    const table = top.tableOf(this.#position);
    if (top.l1[table] === 0 && !engine.isBacked(this.#position)) {
      // Nothing there, and nothing below: zeroes.
      this.#position = Math.min(this.#end, (table + 1) * geometry.tableCoverageBytes);
      return;
    }
    if (geometry.version < 3 && engine.isBacked(this.#position)) {
      this.#writeZeroes(Math.min(this.#end, unitEnd));
      return;
    }
    if (this.#isTableMissing()) return;
    this.#clearUnits();
  }

  #writeZeroes(end: number): void {
    const engine = this.#engine;
    const { top, extent } = engine;
    // The slice has to be there to be asked.
    if (top.l1[top.tableOf(this.#position)] !== 0 && top.l2.find(top.sliceOf(this.#position)) < 0) {
      this.#isSleeping = true;
      top.loadSlice(this.#position, this);
      return;
    }
    const length = Math.min(end, (top.sliceOf(this.#position) + 1) * top.geometry.sliceCoverageBytes) - this.#position;
    extent.offsetBytes = this.#position;
    if (engine.readsAsZeroes(this.#position, length)) {
      if (engine.isUnsettled(extent)) this.hasChanged = true;
      const { clusterBytes } = top.geometry;
      const first = Math.floor(this.#position / clusterBytes);
      // Somebody who writes there right now decides what it is.
      const count = Math.ceil((this.#position + length) / clusterBytes) - first;
      const free = this.#unclaimed(first, count);
      if (free > 0) this.#position = Math.min(this.#position + length, (first + free) * clusterBytes);
      return;
    }
    this.#write(Math.min(end, this.#position + length));
  }

  /** Whole clusters or subclusters of one slice that lose their contents: a matter of their entries alone. */
  #clearUnits(): void {
    const engine = this.#engine;
    const { top } = engine;
    const { geometry } = top;
    const { clusterBytes, clustersPerSlice, entryWords, unitBytes } = geometry;
    const first = Math.floor(this.#position / clusterBytes);
    const index = first % clustersPerSlice;
    // The rest of the last cluster is nobody's.
    const end = this.#end === top.sizeBytes ? Math.ceil(this.#end / clusterBytes) * clusterBytes : this.#end;
    const wanted = Math.min(Math.ceil(end / clusterBytes) - first, clustersPerSlice - index);
    const free = this.#unclaimed(first, wanted);
    if (free === 0) return;
    // As many as there may be at once: what waits is done again from its start.
    if (engine.isLogFull(Math.min(free, CLEARED_MAX), this)) {
      this.#isSleeping = true;
      return;
    }
    const slot = top.l2.find(top.sliceOf(this.#position));
    const base = top.l2.wordsOf(slot) + index * entryWords;
    this.hasChanged = true;
    const isUnmap = this.#io!.type === IoType.discard || (this.#io!.flags & IoFlag.unmap) !== 0;
    for (let i = 0; i < Math.min(free, CLEARED_MAX); i++) {
      const at = base + i * entryWords;
      const start = (first + i) * clusterBytes;
      const from = Math.max(start, this.#position);
      const to = Math.min(start + clusterBytes, Math.floor(end / unitBytes) * unitBytes);
      if (to <= from) break;
      if (to - from === clusterBytes) {
        this.#clearCluster(at, isUnmap, engine.isBacked(start));
      } else {
        if ((swap32(top.l2.words[at]!) & ENTRY_COMPRESSED) !== 0) {
          // A compressed cluster has no subclusters.
          if (this.#position < from) break;
          if (this.#io!.type === IoType.discard) this.#position = to;
          else this.#write(to);
          return;
        }
        writeUnits(top.l2.words, at, unitBits(geometry, from - start, to - from), Mapped.zero);
      }
      this.#log(first + i, at);
      top.l2.markDirty(slot);
      this.#position = Math.min(to, this.#end);
    }
    engine.noteChange();
  }

  #log(cluster: number, at: number): void {
    const { log, top } = this.#engine;
    if (log === null) return;
    log.first = cluster;
    for (let i = 0; i < 4; i++) log.value[i] = i < top.geometry.entryWords ? top.l2.words[at + i]! : 0;
    log.append(RecordKind.set, 1);
  }

  #clearCluster(at: number, isUnmap: boolean, isBacked: boolean): void {
    const { top, dropped } = this.#engine;
    const { geometry } = top;
    const { words } = top.l2;
    const high = swap32(words[at]!);
    const host = (high & ENTRY_COMPRESSED) === 0 ? hostOf(words, at) : 0;
    const keeps = !isUnmap && host !== 0 && (high & ENTRY_COPIED) !== 0 && geometry.version >= 3;
    if (!keeps) readHosts(geometry, words, at, dropped);
    const needsFlag = geometry.version >= 3 && (keeps || isBacked);
    writeEntry(words, at, keeps ? host : 0, keeps, needsFlag && !geometry.isExtended);
    if (!geometry.isExtended) return;
    words[at + 2] = needsFlag ? 0xffffffff : 0;
    words[at + 3] = 0;
  }
}

/** Whether a cluster cannot be written where it is. */
function needsHost(words: Uint32Array, at: number, hasExternalData: boolean): boolean {
  const high = swap32(words[at]!);
  if ((high & ENTRY_COMPRESSED) !== 0 || (high & ENTRY_COPIED) === 0) return true;
  return hostOf(words, at) === 0 && !hasExternalData;
}
