/**
 * What is slow about keys, on purpose: PBKDF2, which makes a key of a passphrase, and the anti-forensic splitter, which spreads a key
 * over 4000 stripes so that it is gone when any of them is.
 */
import { createHash, pbkdf2, pbkdf2Sync, randomBytes, randomFillSync } from 'node:crypto';
import type { Clock } from '../../../poller/clock.js';
import type { Task, Waiter } from '../../task.js';
import { LUKS_ITERATIONS_MAX, LUKS_STRIPES } from './luks-format.js';

/** QEMU's least. */
export const ITERATIONS_MIN = 1000;
/** Long enough to be measured. */
const MEASURE_US = 50_000;
const ITERATIONS_MEASURED_FIRST = 16_384;
/** After that many stripes others get their turn: about a quarter of a millisecond. */
const STRIPES_AT_ONCE = 50;

/** Who does it. */
export interface KeyWork {
  /** Caller wipes what it gets. */
  pbkdf2(secret: Buffer, salt: Buffer, iterations: number, keyBytes: number, hash: string): Task<Buffer>;
  /** Lets others go on. */
  pause(): Task<void>;
}

/**
 * On Node's own threads, and with turns of the event loop between: nobody is kept waiting. A turn goes by way of those threads, too: a
 * reactor that sleeps is woken by them, and not by what waits for the next turn.
 */
export const threadedKeyWork: KeyWork = {
  *pbkdf2(secret, salt, iterations, keyBytes, hash) {
    const outcome: { key?: Buffer; error?: Error } = {};
    yield {
      begin: (waiter) =>
        pbkdf2(secret, salt, iterations, keyBytes, hash, (error, key) => {
          if (error === null) outcome.key = key;
          else outcome.error = error;
          waiter.wake();
        }),
    };
    if (outcome.key === undefined) throw outcome.error!;
    return outcome.key;
  },
  *pause() {
    yield { begin: (waiter: Waiter) => randomBytes(1, () => waiter.wake()) };
  },
};

/** At once: for programs that do nothing else meanwhile. */
export const inlineKeyWork: KeyWork = {
  *pbkdf2(secret, salt, iterations, keyBytes, hash) {
    return pbkdf2Sync(secret, salt, iterations, keyBytes, hash);
  },
  *pause() {},
};

/** How many iterations take that long here and now. */
export function* iterationsIn(ms: number, hash: string, keyBytes: number, work: KeyWork, clock: Clock): Task<number> {
  for (let iterations = ITERATIONS_MEASURED_FIRST; ; iterations *= 2) {
    const startUs = clock.nowUs();
    yield* work.pbkdf2(Buffer.from('a passphrase'), Buffer.alloc(32), iterations, keyBytes, hash);
    const tookUs = clock.nowUs() - startUs;
    if (tookUs < MEASURE_US && iterations < LUKS_ITERATIONS_MAX) continue;
    const wanted = Math.floor((iterations * ms * 1000) / tookUs);
    return Math.min(Math.max(wanted, ITERATIONS_MIN), LUKS_ITERATIONS_MAX);
  }
}

/** Spreads a key: random stripes, and one that makes the key of all. Throws nothing. */
export function* splitKey(key: Buffer, hash: string, work: KeyWork): Task<Buffer> {
  const material = randomFillSync(Buffer.alloc(key.length * LUKS_STRIPES));
  const last = material.subarray(key.length * (LUKS_STRIPES - 1));
  const sum = yield* foldStripes(material, key.length, hash, work);
  for (let i = 0; i < key.length; i++) last[i] = sum[i]! ^ key[i]!;
  sum.fill(0);
  return material;
}

/** The key of its stripes. */
export function* mergeKey(material: Buffer, keyBytes: number, hash: string, work: KeyWork): Task<Buffer> {
  const key = yield* foldStripes(material, keyBytes, hash, work);
  const last = material.subarray(keyBytes * (LUKS_STRIPES - 1));
  for (let i = 0; i < keyBytes; i++) key[i]! ^= last[i]!;
  return key;
}

/** All stripes but the last one. */
function* foldStripes(material: Buffer, keyBytes: number, hash: string, work: KeyWork): Task<Buffer> {
  const hashBytes = createHash(hash).digest().length;
  const sum = Buffer.alloc(keyBytes);
  for (let stripe = 0; stripe < LUKS_STRIPES - 1; stripe++) {
    const at = stripe * keyBytes;
    for (let i = 0; i < keyBytes; i++) sum[i]! ^= material[at + i]!;
    diffuse(sum, hash, hashBytes);
    if (stripe % STRIPES_AT_ONCE === STRIPES_AT_ONCE - 1) yield* work.pause();
  }
  return sum;
}

/** Each piece as long as the hash becomes the hash of its number and itself; the last one is cut short. */
function diffuse(bytes: Buffer, hash: string, hashBytes: number): void {
  const number = Buffer.alloc(4);
  for (let at = 0; at < bytes.length; at += hashBytes) {
    number.writeUInt32BE(at / hashBytes);
    const piece = bytes.subarray(at, at + hashBytes);
    createHash(hash).update(number).update(piece).digest().copy(piece);
  }
}
