/**
 * A run as its seed lays it out: the disk and its stack, the guest, and the list of what happens. Each action stands for itself, so
 * that any may be left out: that is how a failure is made small.
 */
import { SeededRandom } from '../../src/poller/clock.js';
import type { ReactorMode } from '../../src/poller/reactor.js';
import * as stacks from '../bdev/stacks.js';
import type { Filter } from '../bdev/stacks.js';
import { Feature, ProtocolFeature } from '../frontend/protocol.js';
import type { Fault } from './sim-ring.js';
import { chooseImage } from './sim-image.js';
import type { SimImage } from './sim-image.js';

export const REQUEST_TYPES = ['read', 'write', 'flush', 'getId', 'discard', 'writeZeroes', 'wrong'] as const;
export type RequestType = (typeof REQUEST_TYPES)[number];

/** Ways of a daemon to end. */
export type End = 'kill' | 'powerCut' | 'stop';
/** What a front-end does with a session. */
export const CONTROLS = [
  'reconnect',
  'detach',
  'restartRing',
  'resetRings',
  'memory',
  'plug',
  'call',
  'writeback',
] as const;
export type Control = (typeof CONTROLS)[number];

export interface RequestAction {
  readonly kind: 'request';
  readonly type: RequestType;
  readonly queue: number;
  readonly sector: number;
  readonly sectors: number;
}

export type Action = {
  /** Time to the action before. */
  readonly pauseUs: number;
  /** Of what is random in it. */
  readonly seed: number;
} & (
  | RequestAction
  | { readonly kind: 'fault'; readonly fault: Fault; readonly afterIos: number }
  /** @property afterEvents submissions, completions and, if watched, stores, signals and messages until then; 0: at once, wherever the daemon is */
  | { readonly kind: 'end'; readonly end: End; readonly afterEvents: number }
  | { readonly kind: 'control'; readonly control: Control; readonly queue: number }
  /** An operator's, of the image: see Bdev.operate. */
  | { readonly kind: 'edit'; readonly operation: string; readonly params: Readonly<Record<string, string>> }
  /** An operator's, of the other disk there is. */
  | { readonly kind: 'mirror'; readonly step: MirrorStep }
);

export type MirrorStep = 'start' | 'pivot' | 'cancel';

/** Another disk beside the guest's, to which that may be moved, and back. */
export interface SimMirror {
  readonly filters: readonly Filter[];
  readonly mayFail: boolean;
  /** It is copied in so many pieces, or in blocks. */
  readonly chunks: number;
}

export interface Setup {
  readonly leaf: 'uring' | 'malloc';
  readonly filters: readonly Filter[];
  /** The disk holds an image of these, or is the guest's as it is. */
  readonly image: SimImage | null;
  readonly mirror: SimMirror | null;
  /** In words. */
  readonly stack: string;
  /** The stack itself fails requests. */
  readonly mayFail: boolean;
  readonly sectors: number;
  readonly blockSectors: 1 | 8;
  readonly canZeroRange: boolean;
  readonly fixedBuffers: boolean;
  readonly ringEntries: number;
  readonly latencyUs: readonly [number, number];
  readonly mode: ReactorMode;
  readonly pollUs: number;
  readonly stepUs: number;
  readonly queues: number;
  readonly queueSize: number;
  readonly depth: number;
  readonly withoutFeatures: readonly number[];
  readonly withoutProtocolFeatures: readonly number[];
  readonly packed: boolean;
  /** The daemon may die before any store to a ring or to the in-flight region, any signal and any message. */
  readonly watchesStores: boolean;
  /** The guest begins with the write cache on. */
  readonly writeback: boolean;
  /** The guest looks at the used ring when it is called, else all the time. */
  readonly isCalled: boolean;
  /** Longest time between two looks of the guest. */
  readonly tickUs: number;
  /** The guest cuts requests into pieces of any size. */
  readonly wildFraming: boolean;
}

export interface Plan {
  readonly seed: number;
  readonly setup: Setup;
  readonly actions: readonly Action[];
}

/** A source of its own for every concern, so that one draw more here changes nothing there. */
export function randomFor(seed: number, concern: string): SeededRandom {
  let state = seed;
  for (let i = 0; i < concern.length; i++) state = mixed(state ^ Math.imul(concern.charCodeAt(i), 0x01000193));
  return new SeededRandom(state);
}

function mixed(state: number): number {
  return Math.floor(new SeededRandom(state).next() * 2 ** 32);
}

export function makePlan(seed: number): Plan {
  const random = randomFor(seed, 'plan');
  const setup = makeSetup(random, seed);
  const count = 20 + random.below(random.below(4) === 0 ? 300 : 120);
  const actions: Action[] = [];
  const paceUs = [2, 20, 100][random.below(3)]!;
  // Deaths between two stores are worth having only when there are many.
  const chance = {
    end: random.below(4) + (setup.watchesStores ? 3 : 0),
    fault: random.below(4) * 2,
    control: [0, 1, 3, 10][random.below(4)]!,
  };
  const hotSectors = Math.min(setup.sectors, [32, 128, setup.sectors][random.below(3)]!);
  for (let i = 0; i < count; i++) {
    const common = { pauseUs: random.next() ** 2 * 2 * paceUs, seed: random.below(2 ** 31) };
    const roll = random.below(100);
    if (setup.leaf === 'uring' && roll < chance.end) {
      const end = choose<End>(random, ['kill', 'kill', 'powerCut', setup.watchesStores ? 'kill' : 'powerCut', 'stop']);
      const isAtOnce = !setup.watchesStores && random.below(2) === 0;
      const afterEvents = isAtOnce ? 0 : 1 + random.below(setup.watchesStores ? 100 : 20);
      actions.push({ ...common, kind: 'end', end, afterEvents });
    } else if (setup.leaf === 'uring' && roll < chance.end + chance.fault) {
      const fault = choose<Fault>(random, ['eio', 'enospc', 'short', 'short', 'again', 'interrupted']);
      actions.push({ ...common, kind: 'fault', fault, afterIos: 1 + random.below(10) });
    } else if (roll < chance.end + chance.fault + chance.control) {
      actions.push({ ...common, kind: 'control', control: chooseControl(random), queue: random.below(setup.queues) });
    } else {
      actions.push({ ...common, ...makeRequest(random, setup, hotSectors) });
    }
  }
  const isEdited = setup.image !== null && !setup.mayFail && randomFor(seed, 'edits').below(2) === 0;
  const edited = isEdited ? withEdits(actions, randomFor(seed, 'edit')) : actions;
  return { seed, setup, actions: setup.mirror === null ? edited : withMirrors(edited, randomFor(seed, 'mirrors')) };
}

/** Mirrors that are started, pivoted and cancelled at any moment: what cannot be then is refused. */
function withMirrors(planned: readonly Action[], random: SeededRandom): Action[] {
  const actions = [...planned];
  const insert = (at: number, step: MirrorStep): void => {
    const pauseUs = random.next() * (step === 'pivot' ? 1000 : 50);
    actions.splice(at, 0, { pauseUs, seed: 0, kind: 'mirror', step });
  };
  for (let at = random.below(10); at < actions.length; at += 1 + random.below(40)) {
    insert(at, 'start');
    for (let tries = 2 + random.below(4); tries > 0; tries--) {
      at = Math.min(actions.length, at + 1 + random.below(15));
      insert(at, random.below(10) === 0 ? 'cancel' : 'pivot');
    }
  }
  return actions;
}

/** Snapshots and bitmaps at any moment, on a disk without faults: an edit that fails by one would leave the image unwritable. */
function withEdits(planned: readonly Action[], random: SeededRandom): Action[] {
  const actions = planned.filter(({ kind }) => kind !== 'fault');
  const snapshots = ['before'];
  for (let count = 1 + random.below(5); count > 0; count--) {
    const bitmap = { bitmap: `bitmap ${random.below(2)}` };
    const snapshot = { snapshot: snapshots[random.below(snapshots.length)]! };
    const edit = choose(random, [
      { operation: 'createSnapshot', params: { snapshot: `snapshot ${count}` } },
      { operation: 'createSnapshot', params: { snapshot: `snapshot ${count}` } },
      { operation: 'deleteSnapshot', params: snapshot },
      { operation: random.below(2) === 0 ? 'addBitmap' : 'removeBitmap', params: bitmap },
    ]);
    snapshots.push(`snapshot ${count}`);
    const common = { pauseUs: random.next() * 100, seed: 0 };
    actions.splice(random.below(actions.length + 1), 0, { ...common, kind: 'edit', ...edit });
  }
  return actions;
}

function makeRequest(random: SeededRandom, setup: Setup, hotSectors: number): RequestAction {
  const type = choose<RequestType>(random, [
    'read', 'read', 'read', 'write', 'write', 'write', 'write', 'write', 'flush', 'flush', 'discard', 'writeZeroes',
    random.below(4) === 0 ? 'wrong' : 'read', random.below(4) === 0 ? 'getId' : 'write',
  ]); // prettier-ignore
  const unit = setup.blockSectors;
  const blocks = 1 + Math.floor(random.next() ** 2 * (32 / unit));
  const from = random.below(2) === 0 ? hotSectors : setup.sectors;
  const sector = random.below(Math.max(1, from / unit - blocks + 1)) * unit;
  const sectors = Math.min(blocks * unit, setup.sectors - sector);
  return { kind: 'request', type, queue: random.below(setup.queues), sector, sectors };
}

function chooseControl(random: SeededRandom): Control {
  return choose<Control>(random, [
    'reconnect',
    'detach',
    'restartRing',
    'restartRing',
    'resetRings',
    'memory',
    'plug',
    'plug',
    'call',
    'call',
    'writeback',
    'writeback',
  ]);
}

function makeSetup(random: SeededRandom, seed: number): Setup {
  const leaf = random.below(12) === 0 ? 'malloc' : 'uring';
  const blockSectors = random.below(6) === 0 ? 8 : 1;
  const chosen = chooseFilters(random, blockSectors);
  // Of its own source: other runs are as they were without it.
  const names = chosen.map(({ name }) => name);
  const image = leaf === 'uring' ? chooseImage(randomFor(seed, 'image'), blockSectors, names) : null;
  if (image !== null) names.splice(image.at, 0, image.name);
  const mirror = leaf === 'uring' ? chooseMirror(randomFor(seed, 'mirror'), blockSectors) : null;
  const some = (features: readonly number[]): number[] => features.filter(() => random.below(3) === 0);
  const queues = 1 + random.below(3);
  return {
    leaf,
    filters: chosen.map(({ filter }) => filter),
    image,
    mirror,
    stack: [...names.reverse(), leaf].join(' over ') + (mirror === null ? '' : ', with another to be moved to'),
    mayFail: hasErrors(chosen) || mirror?.mayFail === true,
    sectors: [64, 256, 1024][random.below(3)]!,
    blockSectors,
    canZeroRange: random.below(3) > 0,
    fixedBuffers: random.below(4) === 0,
    ringEntries: [2, 8, 64][random.below(3)]!,
    latencyUs: choose(random, [[1, 10], [5, 100], [50, 2000], [1, 500]] as const), // prettier-ignore
    mode: choose<ReactorMode>(random, ['adaptive', 'adaptive', 'interrupt', 'interrupt', 'busy']),
    pollUs: random.below(50),
    stepUs: 1 + random.below(5),
    queues,
    queueSize: 8 << random.below(4),
    depth: 1 + random.below(16),
    withoutFeatures: some([Feature.indirectDescriptors, Feature.eventIdx, Feature.flush, Feature.configWce]),
    withoutProtocolFeatures: some([
      ProtocolFeature.replyAck,
      ProtocolFeature.configureMemSlots,
      ProtocolFeature.inflightShmfd,
    ]),
    packed: random.below(3) === 0,
    watchesStores: random.below(3) === 0,
    writeback: random.below(2) === 0,
    isCalled: random.below(3) > 0,
    tickUs: 2 + random.below(40),
    wildFraming: random.below(2) === 0,
  };
}

/** Of the seeds with a disk one in so many has another one. */
const MIRRORED_ONE_IN = 5;

function chooseMirror(random: SeededRandom, blockSectors: number): SimMirror | null {
  if (random.below(MIRRORED_ONE_IN) > 0) return null;
  const chosen = random.below(2) === 0 ? [] : chooseFilters(random, blockSectors);
  return {
    filters: chosen.map(({ filter }) => filter),
    mayFail: hasErrors(chosen),
    chunks: 2 << random.below(5),
  };
}

function hasErrors(filters: readonly { readonly name: string }[]): boolean {
  return filters.some(({ name }) => name === 'error');
}

function chooseFilters(
  random: SeededRandom,
  blockSectors: number,
): { readonly name: string; readonly filter: Filter }[] {
  const block = blockSectors * 512;
  const small = block * (1 + random.below(4));
  const kinds: Record<string, () => Filter> = {
    passthru: () => stacks.passthru,
    delay: () =>
      stacks.delay({ readUs: random.below(50), writeUs: random.below(200), jitterUs: 1 + random.below(200) }),
    qos: () => stacks.qos({ totalIops: 20_000 + random.below(50_000), burstSeconds: 0.001 }),
    error: () => stacks.error({ type: 'any', action: 'fail', first: 1 + random.below(20), count: 1 + random.below(3) }),
    again: () =>
      stacks.error({ type: 'any', action: 'again', first: 1, count: null, probability: random.next() * 0.8 }),
    split: () => stacks.limited({ maxTransferBytes: small, maxDiscardBytes: block, maxWriteZeroesBytes: 2 * block }),
    bounce: () => stacks.limited({ memoryAlignmentBytes: 512, maxSegments: 1 + random.below(4) }),
    boundary: () => stacks.limited({ boundaryBytes: small }),
    noFua: () => stacks.limited(random.below(2) === 0 ? { maxTransferBytes: small } : {}, ['fua']),
    noZeroes: () =>
      stacks.limited({ maxTransferBytes: small }, [random.below(2) === 0 ? 'writeZeroes' : 'triedZeroes']),
  };
  const count = [0, 1, 1, 2, 2, 3][random.below(6)]!;
  return Array.from({ length: count }, () => {
    const name = choose(random, Object.keys(kinds));
    return { name, filter: kinds[name]!() };
  });
}

function choose<T>(random: SeededRandom, from: readonly T[]): T {
  return from[random.below(from.length)]!;
}
