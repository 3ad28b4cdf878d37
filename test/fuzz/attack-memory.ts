/**
 * The guest memory of attacks, with a record of what the device may write in it: everything else is compared after each burst.
 *
 *     control  rings, indirect tables, request headers, data for the device to read
 *     left     \ meet in guest addresses, and lie apart in the front-end's
 *     right    /
 *     short    ends in the middle of a page and of a file, and begins in the middle of the file
 *
 * What lies in the files beside the regions is guarded as well.
 */
import { check, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import { Finding } from './finding.js';

const PAGE_BYTES = 4096;
const KIB = 1024;
const USER_BASE = 0x7a00_0000_0000;
const GUARD = 0xc5;

export interface AttackRegion {
  readonly name: string;
  readonly fd: number;
  readonly guestAddress: number;
  readonly userAddress: number;
  readonly sizeBytes: number;
  readonly mmapOffset: number;
  /** Offset of its first byte in the arena of the attacker. */
  readonly at: number;
  /** The whole file, live, and as it has to be. */
  readonly live: Buffer;
  readonly expected: Buffer;
}

export const CONTROL_BYTES = 256 * KIB;

export class AttackMemory {
  readonly control: AttackRegion;
  readonly left: AttackRegion;
  readonly right: AttackRegion;
  readonly short: AttackRegion;
  readonly regions: readonly AttackRegion[];
  /** Guest addresses at which something begins or ends, but for the start of `left`: results lie there that are checked. */
  readonly edges: readonly number[];
  /** The control region. */
  readonly u8: Uint8Array;
  readonly u16: Uint16Array;
  readonly u32: Uint32Array;
  readonly #arena: Arena;
  /** Guest ranges the device may write, as start, length. */
  #writable: number[] = [];

  constructor(arena: Arena) {
    this.#arena = arena;
    const GIB = 2 ** 30;
    this.control = this.#region('control', 2 ** 20, CONTROL_BYTES, 0, 0);
    this.left = this.#region('left', GIB, 64 * KIB, 0, 0);
    this.right = this.#region('right', GIB + 64 * KIB, 64 * KIB, PAGE_BYTES, 0x5000_0000);
    this.short = this.#region('short', 2 ** 34 + 512, 16 * KIB - 256, PAGE_BYTES + 512, 0);
    this.regions = [this.control, this.left, this.right, this.short];
    this.edges = this.regions.flatMap((region) => {
      const end = region.guestAddress + region.sizeBytes;
      return region === this.left ? [end] : [region.guestAddress, end];
    });
    this.u8 = arena.view8(this.control.at, CONTROL_BYTES);
    this.u16 = arena.view16(this.control.at, CONTROL_BYTES / 2);
    this.u32 = arena.view32(this.control.at, CONTROL_BYTES / 4);
  }

  /** Fills everything, guards included. */
  fill(random: Random): void {
    for (const { live, mmapOffset, sizeBytes } of this.regions) {
      live.fill(GUARD);
      for (let at = mmapOffset; at < mmapOffset + sizeBytes; at += 4) live.writeUInt32LE(random.below(2 ** 31) | 1, at);
    }
  }

  /** What is there now is what has to be there; nothing may be written. */
  snapshot(): void {
    for (const { live, expected } of this.regions) expected.set(live);
    this.#writable = [];
  }

  /** The device may write this guest range, if all of it is memory: to any other it has no right whatever the descriptor says. */
  allow(guestAddress: number, lengthBytes: number): void {
    this.#writable.push(guestAddress, lengthBytes);
  }

  /** Writes a word of the control region while the device runs. */
  poke16(index: number, value: number): void {
    this.u16[index] = value;
    this.control.expected.writeUInt16LE(value, index * 2);
  }

  poke32(index: number, value: number): void {
    this.u32[index] = value;
    this.control.expected.writeUInt32LE(value, index * 4);
  }

  /** Throws a Finding when anything was written that the device had no right to write. @param guardsOnly regions may hold anything */
  verify(guardsOnly: boolean): void {
    if (guardsOnly) {
      for (const region of this.regions) this.#forgive(region, region.guestAddress, region.sizeBytes);
    }
    for (let i = 0; i < this.#writable.length; i += 2) this.#forgiveRange(this.#writable[i]!, this.#writable[i + 1]!);
    for (const { name, live, expected, mmapOffset, guestAddress } of this.regions) {
      if (live.compare(expected) === 0) continue;
      const at = live.findIndex((byte, i) => byte !== expected[i]);
      const found = live.subarray(at, at + 16).toString('hex');
      const was = expected.subarray(at, at + 16).toString('hex');
      const address = (guestAddress + at - mmapOffset).toString(16);
      throw new Finding('memory', `${name}, byte ${at} of its file, guest address 0x${address}: ${found}, was ${was}`);
    }
  }

  #forgiveRange(start: number, length: number): void {
    // All of it has to be memory, across regions that meet.
    let at = start;
    const end = start + length;
    const parts: [AttackRegion, number, number][] = [];
    while (at < end) {
      const region = this.regions.find((r) => at >= r.guestAddress && at < r.guestAddress + r.sizeBytes);
      if (region === undefined) return;
      const stop = Math.min(end, region.guestAddress + region.sizeBytes);
      parts.push([region, at, stop - at]);
      at = stop;
    }
    for (const part of parts) this.#forgive(...part);
  }

  #forgive({ live, expected, guestAddress, mmapOffset }: AttackRegion, start: number, length: number): void {
    const from = start - guestAddress + mmapOffset;
    live.copy(expected, from, from, from + length);
  }

  #region(name: string, guestAddress: number, sizeBytes: number, mmapOffset: number, shift: number): AttackRegion {
    const fileBytes = Math.ceil((mmapOffset + sizeBytes) / PAGE_BYTES) * PAGE_BYTES;
    const fd = check(native.memfdCreate('fuzz-guest', fileBytes), 'make guest memory');
    const at = this.#arena.mapFile(fd, 0, fileBytes);
    return {
      name,
      fd,
      guestAddress,
      userAddress: USER_BASE + guestAddress + shift,
      sizeBytes,
      mmapOffset,
      at: at + mmapOffset,
      live: Buffer.from(this.#arena.buffer, at, fileBytes),
      expected: Buffer.alloc(fileBytes),
    };
  }
}
