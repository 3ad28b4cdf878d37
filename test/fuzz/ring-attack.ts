/**
 * Attacks on virtqueues: chains that keep all rules, ones that are odd, and ones that break them, offered side by side on several
 * queues. What the device makes of them is checked against what each chain allows.
 *
 * A burst: fill rings, start them, let the device have at them, perhaps change memory under it, stop them, look.
 */
import { check, native } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import { MessageId } from '../frontend/protocol.js';
import type { AttackMemory } from './attack-memory.js';
import type { AttackSession, SessionFeatures } from './attack-session.js';
import { chance, pick, words } from './boundaries.js';
import { BurstMemory, QUEUES } from './burst-memory.js';
import type { BurstMode } from './burst-memory.js';
import { Finding } from './finding.js';
import type { HostileRegion } from './hostile-region.js';
import { PackedRing } from './packed-ring.js';
import { Requests } from './requests.js';
import type { RingCounters } from './attacked-ring.js';
import { SplitRing } from './split-ring.js';

const MODES: readonly BurstMode[] = ['race', 'wild', ...Array<'known'>(8).fill('known')];
/** With an in-flight region; in `known` it is a new one, as front-ends give it. */
const TRACKED_MODES: readonly BurstMode[] = ['race', 'wild', 'tracked', 'tracked', 'tracked', 'tracked', 'known'];
/** How often memory is changed after the device has been told of the rings. */
const MEDDLES = 200;

export class RingAttack {
  readonly #memory: AttackMemory;
  readonly #burst: BurstMemory;
  readonly #random: Random;
  readonly #session: AttackSession;
  readonly #counters: RingCounters;
  readonly #requests: Requests;
  readonly #rings: readonly (SplitRing | PackedRing)[];
  /** Raised when the device breaks a ring, by ring. */
  readonly #errors = Array.from({ length: QUEUES }, () => check(native.eventfdCreate(), 'make an error descriptor'));
  /** Where the device finds what is in flight, or null. */
  readonly #region: HostileRegion | null;

  constructor(
    session: AttackSession,
    features: SessionFeatures,
    target: { readonly serial: string; readonly isReadOnly: boolean },
    random: Random,
    counters: RingCounters,
    region: HostileRegion | null = null,
  ) {
    this.#region = region;
    this.#session = session;
    this.#memory = session.memory;
    this.#random = random;
    this.#counters = counters;
    this.#burst = new BurstMemory(session.memory, random);
    this.#requests = new Requests(this.#burst, random, target);
    const context = { memory: this.#burst, requests: this.#requests, random, counters, features };
    const Ring = features.packed ? PackedRing : SplitRing;
    this.#rings = Array.from({ length: QUEUES }, (_, index) => new Ring(context, index));
    if (chance(random, 10)) this.#describeMisaligned();
    const { guestAddress } = session.memory.control;
    for (const { index, size, told } of this.#rings) {
      session.describeRing(index, size, {
        descriptors: guestAddress + told.descriptors,
        available: guestAddress + told.available,
        used: guestAddress + told.used,
      });
      session.signalErrors(index, this.#errors[index]!);
      if (features.protocol) session.enable(index);
    }
  }

  close(): void {
    for (const fd of this.#errors) native.fileClose(fd);
  }

  /** One burst on all queues. */
  burst(): void {
    const isTracked = this.#region !== null;
    const mode = pick(this.#random, isTracked ? TRACKED_MODES : MODES);
    if (isTracked) this.#offerRegion();
    this.#fill(mode);
    for (const { index, base } of this.#rings) this.#session.start(index, base);
    const isRace = mode === 'race';
    if (!this.#session.barrier(isRace ? () => this.#meddle() : undefined)) this.#endedEarly();
    if (isRace) for (let i = 0; i < MEDDLES; i++) this.#meddle();
    const bases = this.#session.stop(this.#rings.map(({ index }) => index));
    if (bases === undefined) this.#endedEarly();
    this.#rings.forEach((ring, i) => {
      const isBroken = native.eventfdDrain(this.#errors[ring.index]!) > 0;
      if (isTracked && mode !== 'known') ring.lookTracked(bases[i]!);
      else ring.look(bases[i]!, isBroken);
    });
    this.#memory.verify(!this.#burst.isCareful);
    this.#region?.verify();
    this.#counters.lawful += this.#requests.checked;
    this.#requests.checked = 0;
    this.#counters.bursts++;
  }

  /** A burst during which the in-flight region is cut short: the session may end. */
  cutBurst(region: HostileRegion): void {
    this.#fill('race');
    const isBefore = chance(this.#random, 30);
    if (isBefore) region.cut();
    for (const { index, base } of this.#rings) this.#session.start(index, base);
    if (!isBefore) {
      if (chance(this.#random, 50)) this.#session.barrier();
      region.cut();
    }
    this.#session.stop(this.#rings.map(({ index }) => index));
    this.#counters.cases += QUEUES;
  }

  #fill(mode: BurstMode): void {
    const burst = this.#burst;
    burst.begin(mode);
    for (const ring of this.#rings) ring.fill();
    if (mode === 'known') this.#region?.clear();
    else this.#region?.fill(this.#rings, burst);
    burst.snapshot();
    for (const ring of this.#rings) ring.allow();
  }

  /** Offers the region, whose headers are right or wrong; a wrong one is refused, and the one before stays in force. */
  #offerRegion(): void {
    const region = this.#region!;
    const isWrong = region.makeHeaders();
    const isRefused = this.#session.isRefused(MessageId.setInflightFd, region.description, Int32Array.of(region.fd));
    if (isRefused !== isWrong) {
      throw new Finding(
        'answer',
        `an in-flight region with ${isWrong ? 'wrong' : 'right'} headers was ${isRefused ? 'refused' : 'taken'}`,
      );
    }
    if (!isRefused) for (const ring of this.#rings) ring.trackedMax = region.queueSize;
  }

  /** A session whose memory is whole ends only when the front-end says so. */
  #endedEarly(): never {
    throw new Finding('answer', 'the device ended a session for what its guest did');
  }

  #meddle(): void {
    const random = this.#random;
    if (chance(random, 30)) this.#burst.meddle();
    else if (this.#region !== null && chance(random, 50)) this.#region.meddle();
    else pick(random, this.#rings).meddle();
  }

  /** Addresses that are no multiple of what they have to be are refused; what else packed rings ask for is looked at at their start. */
  #describeMisaligned(): void {
    const random = this.#random;
    const at = this.#memory.control.userAddress;
    // Descriptors, used, available.
    const shifts = pick(random, [
      [1 + random.below(15), 0, 0],
      [0, 1 + random.below(3), 0],
      [0, 0, 1],
    ]);
    const addresses = shifts.flatMap((shift) => [...words(at + shift)]);
    if (!this.#session.isRefused(MessageId.setVringAddr, [random.below(QUEUES), 0, ...addresses, 0, 0])) {
      throw new Finding('answer', `a ring at misaligned addresses (${shifts.join(', ')}) was accepted`);
    }
  }
}
