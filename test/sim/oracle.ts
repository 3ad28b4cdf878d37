/**
 * What each sector may hold, exactly, at every moment: of every write the time it was under way, the time something newer took its
 * place, and whether that is durable.
 *
 *     a read                sees a value whose write began before the read ended, and that nothing had replaced when it began
 *     daemon killed         a write under way may have happened or not, whole or by sectors; everything else stands
 *     power cut             what a value replaced may come back, unless that was durable: covered by a flush that was answered,
 *                           or itself written through
 *
 * A value replaces those whose writes had ended when its own began; and a read while nothing is under way tells which of several
 * it is for good. A write that failed may have happened or not. A discarded sector holds what it held, or zeroes.
 */
import { SECTOR_BYTES } from './sim-disk.js';

/** Thrown when a promise was broken. */
export class Violation extends Error {}

const MAGIC = 0x57ab1e00;
/** The value of a sector that holds zeroes; others are the sequence numbers of writes. */
const ZEROES = 0;
const WORDS = SECTOR_BYTES / 4;

/** One write, as one sector sees it. Times are numbers of events, Infinity: not yet. */
interface Version {
  readonly value: number;
  readonly began: number;
  ended: number;
  /** When a later value had taken its place: no read that begins afterwards may see it. */
  replaced: number;
  /** It may come back after a power cut. */
  mayReturn: boolean;
}

/** A change of some sectors, while it is under way. */
export interface Change {
  readonly sector: number;
  readonly sectors: number;
  readonly value: number;
  /** A discard: the sectors may keep what they hold. */
  readonly isWeak: boolean;
  readonly versions: readonly Version[];
}

export class Oracle {
  /** Sectors compared with what they may hold. */
  checked = 0;
  readonly #history: Version[][];
  readonly #underWay = new Set<Change>();
  #now = 1;
  #sequence = 0;

  constructor(sectors: number) {
    this.#history = Array.from({ length: sectors }, () => [
      { value: ZEROES, began: 0, ended: 0, replaced: Infinity, mayReturn: true },
    ]);
  }

  get sectors(): number {
    return this.#history.length;
  }

  /** A moment to compare others with. */
  now(): number {
    return this.#now++;
  }

  /** A write of stamped data begins. Fill its memory with `stamp`. */
  beginWrite(sector: number, sectors: number): Change {
    return this.#begin(sector, sectors, ++this.#sequence, false);
  }

  beginZeroes(sector: number, sectors: number): Change {
    return this.#begin(sector, sectors, ZEROES, false);
  }

  beginDiscard(sector: number, sectors: number): Change {
    return this.#begin(sector, sectors, ZEROES, true);
  }

  /** The change that began last does not take place. */
  withdraw(change: Change): void {
    this.#underWay.delete(change);
    for (let i = 0; i < change.sectors; i++) this.#history[change.sector + i]!.pop();
  }

  /** The change was answered. @param isDurable the answer promised that it is: written through */
  end(change: Change, succeeded: boolean, isDurable: boolean): void {
    this.#underWay.delete(change);
    const now = this.now();
    change.versions.forEach((version, i) => {
      version.ended = now;
      if (!succeeded || change.isWeak) return;
      const versions = this.#history[change.sector + i]!;
      for (const other of versions) {
        if (other.ended >= version.began) continue;
        other.replaced = Math.min(other.replaced, now);
        if (isDurable) other.mayReturn = false;
      }
    });
  }

  /** A flush that began at a moment was answered: what had been replaced by then cannot come back. */
  flushed(began: number): void {
    for (let sector = 0; sector < this.#history.length; sector++) {
      const versions = this.#history[sector]!;
      if (versions.length === 1) continue;
      for (const version of versions) if (version.replaced < began) version.mayReturn = false;
    }
  }

  /** Checks what a read found that began at a moment and ends now. Throws Violation. */
  verify(began: number, sector: number, words: Uint32Array): void {
    for (let i = 0; i < words.length / WORDS; i++) this.#verifySector(began, sector + i, words, i * WORDS);
  }

  /** The daemon was killed: what was under way has happened or not, and no more is to come of it. */
  killed(): void {
    const now = this.now();
    for (const change of this.#underWay) for (const version of change.versions) version.ended = now;
    this.#underWay.clear();
  }

  /** The power was cut: what may return is all there is. */
  powerCut(): void {
    this.killed();
    const now = this.now();
    for (let sector = 0; sector < this.#history.length; sector++) {
      const left = this.#history[sector]!.filter((version) => version.mayReturn);
      for (const version of left) version.replaced = Infinity;
      for (const version of left) version.ended = Math.min(version.ended, now);
      this.#history[sector] = left;
    }
  }

  /** What each sector may hold if the daemon, or the power, ended now. */
  legalAfter(end: 'kill' | 'powerCut'): number[][] {
    const isLegal = (version: Version): boolean =>
      end === 'powerCut' ? version.mayReturn : version.replaced === Infinity;
    return this.#history.map((versions) => [...new Set(versions.filter(isLegal).map(({ value }) => value))]);
  }

  /** Fills memory with the stamps of a change: every word of a sector tells which sector of which write it is. */
  stamp(change: Change, words: Uint32Array): void {
    for (let i = 0; i < change.sectors; i++) {
      const sector = change.sector + i;
      for (let at = i * WORDS; at < (i + 1) * WORDS; at += 4) {
        words[at] = MAGIC;
        words[at + 1] = sector;
        words[at + 2] = change.value;
        words[at + 3] = at;
      }
    }
  }

  #begin(sector: number, sectors: number, value: number, isWeak: boolean): Change {
    const began = this.now();
    const versions: Version[] = [];
    for (let i = 0; i < sectors; i++) {
      const version = { value, began, ended: Infinity, replaced: Infinity, mayReturn: true };
      versions.push(version);
      this.#history[sector + i]!.push(version);
    }
    const change = { sector, sectors, value, isWeak, versions };
    this.#underWay.add(change);
    return change;
  }

  #verifySector(began: number, sector: number, words: Uint32Array, from: number): void {
    this.checked++;
    const value = valueOf(sector, words, from);
    const versions = this.#history[sector]!;
    const now = this.now();
    const isLegal = versions.some((version) => version.value === value && version.replaced > began);
    if (!isLegal) {
      const legal = versions.filter((version) => version.replaced > began).map((version) => version.value);
      throw new Violation(`sector ${sector} holds ${value}, it may hold ${[...new Set(legal)].join(', ')}`);
    }
    // Something was under way during the read: it may have been seen or not, and another read may see something else.
    if (versions.some((version) => version.ended > began)) return;
    for (const version of versions) if (version.value !== value) version.replaced = Math.min(version.replaced, now);
  }
}

/** The value of a sector by its bytes. Throws Violation when they are no whole stamp of that sector. */
export function valueOf(sector: number, words: Uint32Array, from: number): number {
  const value = words[from] === MAGIC ? words[from + 2]! : ZEROES;
  const place = value === ZEROES ? 0 : words[from + 3]!;
  for (let at = 0; at < WORDS; at += 4) {
    const isWhole =
      value === ZEROES
        ? (words[from + at]! | words[from + at + 1]! | words[from + at + 2]! | words[from + at + 3]!) === 0
        : words[from + at] === MAGIC &&
          words[from + at + 1] === sector &&
          words[from + at + 2] === value &&
          words[from + at + 3] === place + at;
    if (isWhole) continue;
    const found = [...words.subarray(from + at, from + at + 4)].map((word) => word.toString(16)).join(' ');
    throw new Violation(`sector ${sector} holds foreign bytes at ${4 * at}: ${found}`);
  }
  return value;
}
