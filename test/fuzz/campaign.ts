/**
 * A campaign against a live daemon: attacks by one hostile front-end after the other on some disks, while others are watched, and an
 * audit now and then. It ends at the first thing the daemon must not do (Finding), or when there were enough cases.
 *
 * A case is one hostile message that the device carried out or refused, or one hostile chain that it took from a ring or broke the ring at.
 * Messages and chains that keep all rules do not count, nor does what comes after the device has ended the session or broken the
 * ring: it was never looked at. A message that is malformed is not counted by the device, and so not here.
 *
 * Each attack has a random source of its own, from the seed and its number: the same attack can be made again by itself.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { Arena } from '../../native/index.js';
import { SeededRandom } from '../../src/poller/clock.js';
import type { Random } from '../../src/poller/clock.js';
import { Frontend } from '../frontend/frontend.js';
import { Status } from '../frontend/protocol.js';
import { newRingCounters } from './attacked-ring.js';
import type { RingCounters } from './attacked-ring.js';
import { AttackMemory } from './attack-memory.js';
import { AttackSession, anyFeatures } from './attack-session.js';
import type { SessionFeatures } from './attack-session.js';
import { chance, pick } from './boundaries.js';
import { DISK_BYTES, Daemon } from './daemon.js';
import type { Footprint, Target } from './daemon.js';
import { DescriptorZoo } from './descriptor-zoo.js';
import { Finding } from './finding.js';
import { HostileRegion } from './hostile-region.js';
import { MessageAttack, idsCarriedOut } from './message-attack.js';
import type { MessageCounters } from './message-attack.js';
import { RawConnection, Wires } from './raw-connection.js';
import { RingAttack } from './ring-attack.js';
import { ShrinkAttack } from './shrink-attack.js';
import { Witness } from './witness.js';

type Attack = 'messages' | 'shrink' | 'split' | 'packed' | 'inflight';
/** How often each attack is made, in percent, by what the campaign is about. */
const SHARES = {
  all: { messages: 76, shrink: 2, split: 9, packed: 9, inflight: 4 },
  messages: { messages: 100 },
  rings: { shrink: 2, split: 40, packed: 40, inflight: 18 },
  split: { split: 100 },
  packed: { packed: 100 },
  inflight: { inflight: 100 },
} as const satisfies Record<string, Partial<Record<Attack, number>>>;

export type AttackKind = keyof typeof SHARES;
export const ATTACK_KINDS = Object.keys(SHARES) as readonly AttackKind[];

export interface CampaignOptions {
  readonly seed: number;
  readonly kind: AttackKind;
  /** Where disks and sockets are made. */
  readonly dir: string;
  /** First attack to make. */
  readonly first: number;
}

export interface CampaignReport {
  readonly cases: number;
  readonly ringCases: number;
  readonly messageCases: number;
  readonly attacks: number;
  readonly seconds: number;
  readonly audits: number;
  readonly rings: RingCounters;
  readonly messages: MessageCounters;
  readonly shrunk: number;
  readonly witnessRequests: number;
  readonly witnessBlocksVerified: number;
  readonly goodSessions: number;
  readonly queueFaults: number;
  readonly sessionFaults: number;
  readonly started: Footprint;
  readonly ended: Footprint;
}

const TURN_MS = 10;
const AUDIT_MS = 4_000;
const SETTLE_MS = 20_000;
const GOOD_ANSWER_MS = 20_000;
const BURSTS_MAX = 60;
/** By which memory may grow that the garbage collector sees no reason to give back. */
const RSS_GROWTH_MAX_BYTES = 96 * 2 ** 20;
/** Caches that grow with the first attacks: after so many audits they are warm. */
const WARM_AUDITS = 5;

export class Campaign {
  /** Attacks made, and the number of the next one. */
  attacks = 0;
  audits = 0;
  readonly #options: CampaignOptions;
  readonly #daemon: Daemon;
  readonly #folder: string;
  readonly #witnesses: Witness[] = [];
  readonly #arena: Arena;
  readonly #wires: Wires;
  readonly #memory: AttackMemory;
  readonly #zoo: DescriptorZoo;
  readonly #rings = newRingCounters();
  readonly #messages: MessageCounters = { sessions: 0, sent: 0, ended: 0 };
  readonly #startMs = performance.now();
  #started: Footprint | undefined;
  #warm: Footprint | undefined;
  /** Protocol features that the device offers, and the messages it knows with them. */
  #offered = 0n;
  #ids: readonly number[] = [];
  #goodSessions = 0;
  #connections = 0;
  #lawful = 0;
  #shrunk = 0;
  #messageCases = 0;
  /** Of the attacked disks, when the last audit ended. */
  #before = { messages: 0, sessions: 0, queueFaults: 0, sessionFaults: 0 };
  #faults = { queues: 0, sessions: 0 };
  #auditedMs = performance.now();
  #sentAtAudit = 0;

  private constructor(options: CampaignOptions, daemon: Daemon, folder: string) {
    this.#options = options;
    this.#daemon = daemon;
    this.#folder = folder;
    const arena = new Arena(2 ** 31);
    this.#arena = arena;
    this.#wires = new Wires(arena);
    this.#memory = new AttackMemory(arena);
    this.#memory.fill(new SeededRandom(options.seed));
    this.#zoo = new DescriptorZoo(folder);
    this.attacks = options.first;
  }

  static async start(options: CampaignOptions): Promise<Campaign> {
    const folder = mkdtempSync(join(options.dir, 'strata-fuzz-'));
    try {
      const daemon = await Daemon.start(folder);
      const campaign = new Campaign(options, daemon, folder);
      await campaign.#begin();
      return campaign;
    } catch (error) {
      rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  }

  /** Of the daemon, and of the isolated disk. */
  get pids(): readonly [daemon: number, isolated: number] {
    return [this.#daemon.pid, this.#daemon.isolatedPid];
  }

  /** Cases so far; those by messages since the last audit are an estimate. */
  get cases(): number {
    return this.#rings.cases + this.#shrunk + this.#messageCases + (this.#messages.sent - this.#sentAtAudit) * 0.8;
  }

  /** Attacks until there are so many cases, it is told to stop, or the time is over. Throws Finding. */
  async run(cases: number, isOver: () => boolean): Promise<void> {
    while (!isOver() && this.cases < cases) {
      await this.#explained(async () => {
        const turnMs = performance.now();
        while (performance.now() - turnMs < TURN_MS) this.#attack();
        for (const witness of this.#witnesses) witness.look();
        if (performance.now() - this.#auditedMs > AUDIT_MS) await this.#audit();
      });
      await new Promise((resolve) => setImmediate(resolve));
    }
    await this.#explained(() => this.#audit());
  }

  report(): CampaignReport {
    const sum = (of: (witness: Witness) => number): number =>
      this.#witnesses.reduce((n, witness) => n + of(witness), 0);
    return {
      cases: this.#rings.cases + this.#shrunk + this.#messageCases,
      ringCases: this.#rings.cases + this.#shrunk,
      messageCases: this.#messageCases,
      attacks: this.attacks - this.#options.first,
      seconds: Math.round((performance.now() - this.#startMs) / 100) / 10,
      audits: this.audits,
      rings: this.#rings,
      messages: this.#messages,
      shrunk: this.#shrunk,
      witnessRequests: sum((witness) => witness.requests),
      witnessBlocksVerified: sum((witness) => witness.verified),
      goodSessions: this.#goodSessions,
      queueFaults: this.#faults.queues,
      sessionFaults: this.#faults.sessions,
      started: this.#started!,
      ended: this.#daemon.isWhole ? this.#daemon.footprint() : this.#started!,
    };
  }

  /** Ends the daemon. Throws Finding when it does not end well. */
  async close(): Promise<void> {
    for (const witness of this.#witnesses) witness.close();
    try {
      if (this.#daemon.isRunning) await this.#daemon.stop();
    } finally {
      await this.#daemon.kill();
      rmSync(this.#folder, { recursive: true, force: true });
    }
  }

  async #begin(): Promise<void> {
    for (const [i, { name, socketPath }] of this.#daemon.witnesses.entries()) {
      this.#witnesses.push(await Witness.start(name, socketPath, DISK_BYTES, new SeededRandom(this.#options.seed + i)));
    }
    // What the first sessions leave for good, as compiled code, is none of the attacks'.
    for (const target of this.#daemon.attacked) await this.#goodSession(target);
    await this.#daemon.metrics();
    this.#ids = idsCarriedOut(this.#offered);
    this.#before = await this.#counts();
    this.#started = await this.#atRest();
  }

  /** What the daemon holds when nobody asks it for anything: the connections of the last questions close by and by. */
  async #atRest(): Promise<Footprint> {
    for (;;) {
      const before = this.#daemon.footprint();
      await new Promise((resolve) => setTimeout(resolve, 200));
      const after = this.#daemon.footprint();
      if (before.fds === after.fds && before.threads === after.threads) return after;
    }
  }

  // ---- Attacks

  #attack(): void {
    const number = this.attacks++;
    const random = new SeededRandom(Math.imul(this.#options.seed + 1, 0x9e3779b1) + number);
    const target = pick(random, this.#daemon.attacked);
    const attack = this.#choose(random);
    const connection = new RawConnection(this.#wires, target.socketPath);
    this.#connections++;
    try {
      this.#attackBy(attack, connection, target, random);
    } catch (error) {
      const where = `in attack ${number} on ${target.name}`;
      if (error instanceof Finding) throw new Finding(error.kind, `${error.detail}, ${where}`);
      throw new Error(where, { cause: error });
    } finally {
      connection.close();
    }
  }

  #choose(random: Random): Attack {
    let die = random.below(100);
    const shares = Object.entries(SHARES[this.#options.kind]) as [Attack, number][];
    return shares.find(([, share]) => (die -= share) < 0)![0];
  }

  #attackBy(kind: Attack, connection: RawConnection, target: Target, random: Random): void {
    switch (kind) {
      case 'messages': {
        const attack = new MessageAttack(
          connection,
          this.#wires,
          this.#memory,
          this.#zoo,
          this.#ids,
          random,
          this.#messages,
        );
        attack.run();
        this.#lawful += attack.lawful;
        return;
      }
      case 'shrink': {
        const attack = new ShrinkAttack(connection, this.#wires, this.#memory, random);
        this.#shrunk += attack.run();
        this.#lawful += attack.lawful;
        return;
      }
      case 'inflight':
        this.#attackInflight(connection, target, random);
        return;
      default:
        this.#attackRings(connection, target, anyFeatures(random, kind === 'packed'), random);
    }
  }

  #attackInflight(connection: RawConnection, target: Target, random: Random): void {
    const features = anyFeatures(random, chance(random, 50));
    const region = new HostileRegion(this.#arena, features.packed ? 'packed' : 'split', random);
    try {
      this.#attackRings(connection, target, features, random, region);
    } finally {
      region.close();
    }
  }

  /** @param region where the device finds what is in flight, or null */
  #attackRings(
    connection: RawConnection,
    target: Target,
    features: SessionFeatures,
    random: Random,
    region: HostileRegion | null = null,
  ): void {
    const session = new AttackSession(connection, this.#wires, this.#memory);
    if (!session.negotiate(features)) throw new Finding('answer', 'a lawful set-up was refused');
    const facts = { serial: target.name, isReadOnly: target.isReadOnly };
    const attack = new RingAttack(session, features, facts, random, this.#rings, region);
    try {
      for (let bursts = 1 + random.below(BURSTS_MAX); bursts > 0; bursts--) {
        attack.burst();
        for (const witness of this.#witnesses) witness.look();
      }
      if (region !== null && chance(random, 20)) attack.cutBurst(region);
    } finally {
      attack.close();
    }
    connection.finish();
    this.#memory.verify(true);
    this.#lawful += session.lawful;
  }

  // ---- Audits

  async #audit(): Promise<void> {
    if (!this.#daemon.isWhole) throw new Finding('crash', 'the process of the isolated disk has ended');
    await this.#settled();
    const now = await this.#counts();
    const before = this.#before;
    this.#messageCases += Math.max(0, now.messages - before.messages - this.#lawful);
    this.#lawful = 0;
    this.#sentAtAudit = this.#messages.sent;
    if (now.sessions - before.sessions !== this.#connections) {
      throw new Finding('metrics', `${now.sessions - before.sessions} sessions counted of ${this.#connections}`);
    }
    this.#connections = 0;
    this.#faults.queues += now.queueFaults - before.queueFaults;
    this.#faults.sessions += now.sessionFaults - before.sessionFaults;
    for (const witness of this.#witnesses) await witness.verify();
    for (const target of this.#daemon.attacked) await this.#goodSession(target);
    await this.#settled();
    this.#before = await this.#counts();
    this.audits++;
    const footprint = this.#daemon.footprint();
    if (this.audits <= WARM_AUDITS) this.#warm = footprint;
    const grownBytes = footprint.rssBytes - this.#warm!.rssBytes;
    if (grownBytes > RSS_GROWTH_MAX_BYTES)
      throw new Finding('leak', `memory has grown by ${Math.round(grownBytes / 2 ** 20)} MiB`);
    this.#auditedMs = performance.now();
  }

  /** Waits until the daemon holds what it held before. */
  async #settled(): Promise<void> {
    const started = this.#started!;
    const deadline = performance.now() + SETTLE_MS;
    for (;;) {
      const { fds, threads, sharedMappings } = this.#daemon.footprint();
      if (fds === started.fds && threads === started.threads && sharedMappings === started.sharedMappings) return;
      if (performance.now() > deadline) {
        const then = `${started.fds} descriptors, ${started.threads} threads, ${started.sharedMappings} mappings`;
        throw new Finding(
          'leak',
          `${fds} descriptors, ${threads} threads, ${sharedMappings} mappings; before: ${then}`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  /** A front-end that keeps the rules is served on a disk that was attacked. */
  async #goodSession({ name, socketPath, isReadOnly }: Target): Promise<void> {
    const frontend = await Frontend.connect(socketPath, { queues: 2, timeoutMs: GOOD_ANSWER_MS });
    try {
      for (const [i, queue] of frontend.queues.entries()) {
        const data = Buffer.alloc(8192, `${name} ${this.audits} ${i} `);
        const written = await queue.write(100 * i, data);
        const read = await queue.read(100 * i, data.length);
        const isWhole = isReadOnly
          ? written.status === Status.ioError
          : written.status === Status.ok && read.data.equals(data);
        if (!isWhole || read.status !== Status.ok) throw new Finding('answer', `${name} does not keep what is written`);
        const { data: id } = await queue.getId();
        if (id.toString().replace(/\0+$/, '') !== name)
          throw new Finding('answer', `${name} calls itself ${id.toString()}`);
        if ((await queue.flush()).status !== Status.ok) throw new Finding('answer', `${name} cannot be flushed`);
      }
    } finally {
      frontend.close();
    }
    this.#offered = frontend.offeredProtocolFeatures;
    this.#goodSessions++;
  }

  async #counts(): Promise<{ messages: number; sessions: number; queueFaults: number; sessionFaults: number }> {
    const samples = await this.#daemon.metrics();
    const sum = (name: string): number =>
      this.#daemon.attacked.reduce((n, target) => {
        const value = samples.get(`strata_controller_${name}_total{controller="${target.name}"}`);
        if (value === undefined) throw new Finding('metrics', `no ${name} of ${target.name}`);
        return n + value;
      }, 0);
    return {
      messages: sum('messages'),
      sessions: sum('sessions'),
      queueFaults: sum('queue_faults'),
      sessionFaults: sum('session_faults'),
    };
  }

  /** Whatever goes wrong while the daemon is gone is the daemon's end. */
  async #explained(step: () => Promise<void>): Promise<void> {
    try {
      await step();
    } catch (error) {
      // The end of a process is noticed by the event loop.
      await new Promise((resolve) => setTimeout(resolve, 500));
      const cause = error instanceof Error ? (error.stack ?? error.message) : String(error);
      if (!this.#daemon.isWhole) throw new Finding('crash', `${cause}\n${this.#daemon.log}`);
      const state = await this.#daemon.state();
      if (error instanceof Finding) throw new Finding(error.kind, `${error.detail}\n${state}\n${this.#daemon.log}`);
      throw new Finding('hang', `${cause}\n${state}\n${this.#daemon.log}`);
    }
  }
}
