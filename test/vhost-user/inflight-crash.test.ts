/**
 * Goal: the process may die between any two stores to a ring and its in-flight region, also while it recovers from the death before,
 * and the next one takes exactly the requests that the driver still waits for, each once, in the order in which they were offered.
 *
 * Method: a driver and a device go on at random, answers far out of order, answers of one step published together. At every store of
 * the device the world is copied; from each copy a new device is started, and has to bring all that is outstanding to its end.
 */
import { afterEach, describe, expect, it } from 'vitest';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import { POP_NONE } from '../../src/vhost-user/virtqueue.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import { seededRandom } from '../support/seed.js';
import { CrashRing, PackedCrashRing, SplitCrashRing } from './crash-rings.js';

type Copy = ReturnType<CrashRing['copy']>;
type Random = ReturnType<typeof seededRandom>;

const ROUNDS = 10;
const STEPS = 40;
/** Of the deaths in a start, those that are tried. */
const START_DEATHS = 3;

const kinds = [
  { kind: 'split', make: () => new SplitCrashRing() },
  { kind: 'packed', make: () => new PackedCrashRing() },
];

let ring: CrashRing;
afterEach(() => ring.close());

const chain = new DescriptorChain();

/** Pops all there is. Returns head and name of each. */
function popAll(virtqueue: Virtqueue, most = Infinity): { head: number; name: number }[] {
  const popped: { head: number; name: number }[] = [];
  while (popped.length < most) {
    const head = virtqueue.pop(chain);
    if (head === POP_NONE) break;
    if (virtqueue.fault !== null) throw new Error(virtqueue.fault);
    popped.push({ head, name: CrashRing.nameOf(chain.addresses[0]!) });
  }
  return popped;
}

/** A random run; returns the world at each store of the device. */
function run(random: Random): Copy[] {
  const copies: Copy[] = [];
  const inDevice: number[] = [];
  const virtqueue = ring.start({ afterWrite: () => copies.push(ring.copy()) });
  for (let step = 0; step < STEPS; step++) {
    for (let i = random.below(5); i > 0; i--) ring.offer(1 + random.below(3));
    // As in a reactor: some answers come before requests are taken, some after, and all are published together.
    const answerSome = (): void => {
      for (let i = random.below(4); i > 0 && inDevice.length > 0; i--) {
        virtqueue.push(inDevice.splice(random.below(inDevice.length), 1)[0]!, 1);
      }
    };
    answerSome();
    inDevice.push(...popAll(virtqueue, random.below(5)).map(({ head }) => head));
    answerSome();
    virtqueue.publish();
    if (random.below(3) > 0) ring.takeUsed();
  }
  for (const head of inDevice.splice(0)) virtqueue.push(head, 1);
  virtqueue.publish();
  ring.takeUsed();
  return copies;
}

/** Starts a device on a world whose device died, and has everything answered. Returns the world at each store of the start. */
function recover(copy: Copy, random: Random): Copy[] {
  const copies: Copy[] = [];
  ring.restore(copy);
  // The driver goes on meanwhile: it sees what was published, and offers more.
  if (random.below(2) === 0) {
    ring.takeUsed();
    for (let i = random.below(3); i > 0; i--) ring.offer(1);
  }
  const watcher: { afterWrite?: () => void } = { afterWrite: () => copies.push(ring.copy()) };
  const virtqueue = ring.start(watcher);
  delete watcher.afterWrite;
  ring.takeUsed();
  const expected = names([...ring.state.outstanding.values()]);
  const popped = popAll(virtqueue);
  expectSame(names(popped), expected);
  ring.state.answered = [];
  const heads = popped.map(({ head }) => head);
  while (heads.length > 0) virtqueue.push(heads.splice(random.below(heads.length), 1)[0]!, 1);
  virtqueue.publish();
  ring.takeUsed();
  expectSame([...ring.state.answered].sort(ascending), [...expected].sort(ascending));
  expectSame([ring.state.outstanding.size], [0]);

  // And it goes on as if nothing had been.
  while (ring.offer(1 + random.below(2)));
  const offered = names([...ring.state.outstanding.values()]);
  const more = popAll(virtqueue);
  expectSame(names(more), offered);
  for (const { head } of more.reverse()) virtqueue.push(head, 1);
  virtqueue.publish();
  ring.takeUsed();
  expectSame([ring.state.outstanding.size], [0]);
  return copies;
}

function names(requests: readonly { readonly name: number }[]): number[] {
  return requests.map(({ name }) => name);
}

/** As toEqual, which is too slow for so many. */
function expectSame(actual: readonly number[], expected: readonly number[]): void {
  if (actual.join() !== expected.join()) expect(actual).toEqual(expected);
}

function ascending(a: number, b: number): number {
  return a - b;
}

describe.each(kinds)('a $kind ring whose device dies', ({ make }) => {
  it(
    'between any two of its stores, or of its next start, loses nothing and does nothing twice',
    { timeout: 300_000 },
    () => {
      let deaths = 0;
      let deathsOfStarts = 0;
      let outstanding = 0;
      ring = make();
      const unused = ring.copy();
      for (let round = 0; round < ROUNDS; round++) {
        const random = seededRandom(round);
        ring.restore(unused);
        for (const copy of run(random)) {
          deaths++;
          outstanding += copy.state.outstanding.size;
          const again = recover(copy, random);
          for (let i = 0; i < START_DEATHS && again.length > 0; i++) {
            deathsOfStarts++;
            recover(again.splice(random.below(again.length), 1)[0]!, random);
          }
        }
      }
      expect(deaths).toBeGreaterThan(ROUNDS * STEPS);
      expect(deathsOfStarts).toBeGreaterThan(deaths / 10);
      expect(outstanding).toBeGreaterThan(deaths);
    },
  );
});
