/**
 * Attacks by messages: every id, known or not, with payloads, lengths, flags and descriptors right and wrong, to a device in any state.
 * The device answers, or ends the session; what it may not do is seen by the campaign.
 */
import type { Random } from '../../src/poller/clock.js';
import {
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION_1,
  MESSAGE_HEADER_BYTES,
  MessageId,
  VRING_NO_FD,
} from '../frontend/protocol.js';
import { AttackSession, anyFeatures, describeRegion } from './attack-session.js';
import type { AttackMemory } from './attack-memory.js';
import { anyU32, anyU64, chance, pick, words } from './boundaries.js';
import type { DescriptorZoo } from './descriptor-zoo.js';
import type { RawConnection, Wires } from './raw-connection.js';
import { QUEUES } from './burst-memory.js';

/** Longest payload that anybody takes; a claim of more is all there is to it. */
const PAYLOAD_BYTES_MAX = 4108;
const SESSION_MESSAGES_MAX = 160;
const NONE: readonly number[] = [];

type Field = (attack: MessageAttack) => readonly number[];
type Fds = 'none' | 'memory' | 'event' | 'table' | 'any';

/** What a message carries when it is right, as words. */
interface Shape {
  readonly fields: Field;
  readonly fds: Fds;
}

const nothing: Field = () => NONE;
const u64: Field = (attack) => [...anyU64(attack.random)];
/** Mostly one ring that there is, and a number. */
const ringAndNumber: Field = (attack) => [attack.ring(), anyU32(attack.random)];
const ringAndSwitch: Field = (attack) => [attack.ring(), pick(attack.random, [0, 1, 1, 1, 2, anyU32(attack.random)])];
const ringOfFd: Field = (attack) => [
  attack.ring() | (chance(attack.random, 60) ? VRING_NO_FD : 0),
  chance(attack.random, 95) ? 0 : 1,
];
const slot: Field = (attack) => [0, 0, ...attack.region()];
const features: Field = (attack) =>
  pick(attack.random, [
    [0x5000_1246, 1],
    [0x7000_1246, 1],
    [0x7000_1246, 5],
    [0x7000_0000, 0],
    [...anyU64(attack.random)],
  ]);
const config: Field = (attack) => {
  const size = pick(attack.random, [1, 8, 60, 256, 4096, attack.random.below(4097)]);
  const claimed = chance(attack.random, 90) ? size : anyU32(attack.random);
  const offset = chance(attack.random, 60) ? pick(attack.random, [0, 32, 0x100]) : anyU32(attack.random);
  return [offset, claimed, pick(attack.random, [0, 0, 1, 2]), ...Array<number>(Math.ceil(size / 4)).fill(1)];
};
const table: Field = (attack) => {
  const count = attack.random.below(9);
  const regions = Array.from({ length: count }, () => attack.region()).flat();
  return [chance(attack.random, 90) ? count : anyU32(attack.random), 0, ...regions];
};
const addresses: Field = (attack) => [
  attack.ring(),
  chance(attack.random, 90) ? 0 : anyU32(attack.random),
  ...attack.ringAddresses(),
];

const SHAPES: ReadonlyMap<number, Shape> = new Map<number, Shape>([
  [MessageId.getFeatures, { fields: nothing, fds: 'none' }],
  [MessageId.setFeatures, { fields: features, fds: 'none' }],
  [MessageId.setOwner, { fields: nothing, fds: 'none' }],
  [MessageId.resetOwner, { fields: nothing, fds: 'none' }],
  [MessageId.setMemTable, { fields: table, fds: 'table' }],
  [
    MessageId.setLogBase,
    { fields: (a) => [...anyU64(a.random, [4096, 65536, 2 ** 20]), ...anyU64(a.random, [0, 4096])], fds: 'memory' },
  ],
  [MessageId.setLogFd, { fields: nothing, fds: 'event' }],
  [
    MessageId.setVringNum,
    { fields: (a) => [a.ring(), pick(a.random, [1, 2, 128, 256, 1024, anyU32(a.random)])], fds: 'none' },
  ],
  [MessageId.setVringAddr, { fields: addresses, fds: 'none' }],
  [MessageId.setVringBase, { fields: ringAndNumber, fds: 'none' }],
  [MessageId.getVringBase, { fields: (a) => [a.ring(), 0], fds: 'none' }],
  [MessageId.setVringKick, { fields: ringOfFd, fds: 'event' }],
  [MessageId.setVringCall, { fields: ringOfFd, fds: 'event' }],
  [MessageId.setVringErr, { fields: ringOfFd, fds: 'event' }],
  [MessageId.getProtocolFeatures, { fields: nothing, fds: 'none' }],
  [
    MessageId.setProtocolFeatures,
    { fields: (a) => pick(a.random, [[0x8209, 0], [0x8209, 0], [0x8208, 0], [...anyU64(a.random)]]), fds: 'none' },
  ],
  [MessageId.getQueueNum, { fields: nothing, fds: 'none' }],
  [MessageId.setVringEnable, { fields: ringAndSwitch, fds: 'none' }],
  [MessageId.setBackendReqFd, { fields: nothing, fds: 'any' }],
  [MessageId.getConfig, { fields: config, fds: 'none' }],
  [
    MessageId.setConfig,
    { fields: (a) => (chance(a.random, 50) ? [32, 1, 0, a.random.below(3)] : config(a)), fds: 'none' },
  ],
  [MessageId.getInflightFd, { fields: (a) => a.inflight(), fds: 'none' }],
  [MessageId.setInflightFd, { fields: (a) => a.inflight(), fds: 'memory' }],
  [MessageId.resetDevice, { fields: nothing, fds: 'none' }],
  [MessageId.getMaxMemSlots, { fields: nothing, fds: 'none' }],
  [MessageId.addMemReg, { fields: slot, fds: 'memory' }],
  [MessageId.remMemReg, { fields: slot, fds: 'none' }],
  [MessageId.setStatus, { fields: u64, fds: 'none' }],
  [MessageId.getStatus, { fields: nothing, fds: 'none' }],
  // SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE, and what no disk has any use for: IOTLB, postcopy, VRING_KICK.
  [42, { fields: (a) => [a.random.below(3), a.random.below(2)], fds: 'any' }],
  [43, { fields: nothing, fds: 'none' }],
  [22, { fields: (a) => [...anyU64(a.random), ...anyU64(a.random), ...anyU64(a.random), 1, 0], fds: 'none' }],
  [28, { fields: nothing, fds: 'none' }],
  [35, { fields: (a) => [a.ring(), 0], fds: 'none' }],
]);
const KNOWN = [...SHAPES.keys()];

/** Messages that are there only with a protocol feature, by its bit. */
const FEATURE_OF: ReadonlyMap<number, number> = new Map([
  [MessageId.setLogBase, 1],
  [MessageId.setLogFd, 1],
  [MessageId.setBackendReqFd, 5],
  [MessageId.getInflightFd, 12],
  [MessageId.setInflightFd, 12],
  [MessageId.resetDevice, 13],
  [MessageId.setStatus, 16],
  [MessageId.getStatus, 16],
  [42, 19],
  [43, 19],
]);
/** Messages that end any session. */
const FOREIGN = [22, 28, 35];

/** Ids that do not end a session by themselves, with a device that offers these protocol features. */
export function idsCarriedOut(offered: bigint): number[] {
  return KNOWN.filter((id) => {
    const feature = FEATURE_OF.get(id);
    return !FOREIGN.includes(id) && (feature === undefined || ((offered >> BigInt(feature)) & 1n) === 1n);
  });
}

export interface MessageCounters {
  sessions: number;
  sent: number;
  /** Sessions that the device ended. */
  ended: number;
}

export class MessageAttack {
  readonly random: Random;
  readonly #session: AttackSession;
  readonly #connection: RawConnection;
  readonly #wires: Wires;
  readonly #memory: AttackMemory;
  readonly #zoo: DescriptorZoo;
  readonly #ids: readonly number[];
  readonly #counters: MessageCounters;
  /** Files of the regions that the message at hand describes. */
  #described: number[] = [];

  constructor(
    connection: RawConnection,
    wires: Wires,
    memory: AttackMemory,
    zoo: DescriptorZoo,
    ids: readonly number[],
    random: Random,
    counters: MessageCounters,
  ) {
    this.random = random;
    this.#ids = ids;
    this.#connection = connection;
    this.#wires = wires;
    this.#memory = memory;
    this.#zoo = zoo;
    this.#counters = counters;
    this.#session = new AttackSession(connection, wires, memory);
  }

  /** Messages that keep all rules, sent to bring the device into a state. */
  get lawful(): number {
    return this.#session.lawful;
  }

  /** One session, from wherever it starts to whatever its end is. */
  run(): void {
    const { random } = this;
    const counters = this.#counters;
    counters.sessions++;
    const isRunning = this.#prepare();
    if (isRunning) this.#memory.snapshot();
    const count = 1 + random.below(chance(random, 30) ? 8 : SESSION_MESSAGES_MAX);
    // Some sessions go on for long, as nothing in them is malformed.
    const malformed = pick(random, [0, 0, 0, 1, 5]);
    for (let i = 0; i < count && !this.#connection.isEnded; i++) {
      this.#send(malformed);
      counters.sent++;
    }
    if (chance(random, 5)) this.#cutShort();
    this.#connection.flush();
    this.#connection.pull();
    if (this.#connection.isEnded) counters.ended++;
    this.#connection.finish();
    // Its rings held whatever lay there.
    if (isRunning) this.#memory.verify(true);
  }

  // ---- Parts of messages

  ring(): number {
    return chance(this.random, 95)
      ? this.random.below(QUEUES)
      : pick(this.random, [QUEUES, 64, 255, 0xffff, anyU32(this.random)]);
  }

  /** {guest address, size, user address, offset}: one there is, or one that is wrong somewhere. */
  region(): number[] {
    const { random } = this;
    const region = pick(random, this.#memory.regions);
    this.#described.push(region.fd);
    const fields = describeRegion(region);
    if (chance(random, 40)) {
      const which = random.below(4);
      const near = [...this.#memory.edges, 2 ** 40, 2 ** 42, 2 ** 43];
      [fields[2 * which], fields[2 * which + 1]] = anyU64(random, near);
    }
    return fields;
  }

  /** {descriptors, used, available, log}, mostly where there is memory. */
  ringAddresses(): number[] {
    const { random } = this;
    return [0, 1, 2, 3].flatMap((i) => {
      if (chance(random, 10)) return [...anyU64(random, this.#memory.edges)];
      const { userAddress, sizeBytes } = pick(random, this.#memory.regions);
      const into = chance(random, 20) ? sizeBytes - random.below(64) : 4096 * random.below(sizeBytes / 4096);
      return i === 3 ? [0, 0] : [...words(userAddress + into)];
    });
  }

  /** {u64 size, u64 offset, u16 queues, u16 queue size, padding} */
  inflight(): number[] {
    const { random } = this;
    const size = anyU64(random, [4096, 65536, 2 ** 20]);
    const offset = chance(random, 60) ? [0, 0] : anyU64(random, [4096]);
    const queues = pick(random, [0, 1, QUEUES, QUEUES + 1, 0xffff]);
    const entries = pick(random, [0, 1, 128, 1024, 1025, 0xffff]);
    return [...size, ...offset, queues | (entries << 16), 0];
  }

  // ---- Sending

  /** Brings the session into some state. Returns whether rings run. */
  #prepare(): boolean {
    const { random } = this;
    const kind = random.below(6);
    if (kind === 0) return false;
    const features = { ...anyFeatures(random), protocol: true };
    if (!this.#session.negotiate(features, kind === 1 ? [] : this.#memory.regions)) return false;
    if (kind < 4) return false;
    const { guestAddress } = this.#memory.control;
    for (let index = 0; index < QUEUES; index++) {
      const at = guestAddress + 8192 * index;
      this.#session.describeRing(index, 64, { descriptors: at, available: at + 4096, used: at + 6144 });
      this.#session.enable(index);
      this.#session.start(index, random.below(65536));
    }
    return this.#session.barrier();
  }

  #send(malformedPercent: number): void {
    const { random } = this;
    const isKnown = chance(random, 100 - malformedPercent);
    const id = isKnown
      ? pick(random, malformedPercent === 0 ? this.#ids : KNOWN)
      : pick(random, [0, random.below(80), anyU32(random)]);
    const shape = SHAPES.get(id) ?? { fields: nothing, fds: 'none' as const };
    this.#described = [];
    const fields = shape.fields(this);
    const isMalformed = chance(random, malformedPercent);
    let payloadBytes = 4 * fields.length;
    if (id === MessageId.getConfig || id === MessageId.setConfig)
      payloadBytes = Math.min(12 + Math.max(1, fields[1]!), payloadBytes);
    if (isMalformed && chance(random, 50)) {
      payloadBytes = Math.max(0, payloadBytes + pick(random, [-8, -4, -1, 1, 4, 8]));
    }
    let claimed = payloadBytes;
    let flags = FLAG_VERSION_1 | (malformedPercent === 0 || chance(random, 95) ? FLAG_NEED_REPLY : 0);
    if (isMalformed && chance(random, 30)) {
      claimed = pick(random, [PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1, 0x7fffffff, 0xfffffff4, 0xffffffff]);
    }
    if (isMalformed && chance(random, 30)) flags = pick(random, [0, 2, 3, FLAG_VERSION_1 | FLAG_REPLY, anyU32(random)]);
    const fds = this.#fds(shape.fds, fields, isMalformed);
    // Descriptors go with the first byte of what is sent.
    if (fds.length > 0) this.#connection.flush();
    const { out } = this.#wires;
    let at = this.#session.header(id, claimed, flags);
    const end = at + payloadBytes;
    for (const field of fields) {
      if (at + 4 > end) break;
      at = out.writeUInt32LE(field >>> 0, at);
    }
    out.fill(0xa5, at, end);
    const length = MESSAGE_HEADER_BYTES + payloadBytes;
    if (isMalformed && chance(random, 20)) {
      this.#sendInPieces(length, fds);
      return;
    }
    this.#connection.add(length);
    if (fds.length > 0) this.#connection.flush(Int32Array.from(fds));
  }

  /** A message in pieces, with descriptors at any of them. */
  #sendInPieces(length: number, fds: readonly number[]): void {
    const { random } = this;
    this.#connection.flush();
    const bytes = Buffer.from(this.#wires.out.subarray(0, length));
    for (let done = 0; done < length && !this.#connection.isEnded;) {
      const part = Math.min(length - done, 1 + random.below(16));
      bytes.copy(this.#wires.out, 0, done, done + part);
      this.#connection.add(part);
      const isTheirs = done === 0 ? chance(random, 70) : chance(random, 10);
      this.#connection.flush(isTheirs ? Int32Array.from(fds.length > 0 ? fds : [this.#zoo.any(random)]) : undefined);
      done += part;
    }
  }

  /** A message that stops anywhere. */
  #cutShort(): void {
    const { random } = this;
    const id = pick(random, KNOWN);
    const fields = SHAPES.get(id)!.fields(this);
    const { out } = this.#wires;
    this.#connection.flush();
    let at = this.#session.header(id, 4 * fields.length, FLAG_VERSION_1);
    for (const field of fields) at = out.writeUInt32LE(field >>> 0, at);
    const fds = chance(random, 50) ? Int32Array.of(this.#zoo.any(random), this.#zoo.memfd) : undefined;
    this.#connection.add(1 + random.below(MESSAGE_HEADER_BYTES + 4 * fields.length));
    this.#connection.flush(fds);
  }

  #fds(wanted: Fds, fields: readonly number[], isMalformed: boolean): number[] {
    const { random } = this;
    const zoo = this.#zoo;
    let count = 0;
    let right = zoo.eventfd;
    switch (wanted) {
      case 'none':
        break;
      case 'any':
        count = 1;
        right = zoo.any(random);
        break;
      case 'memory':
        count = 1;
        right = pick(random, this.#memory.regions).fd;
        break;
      case 'event':
        count = fields.length > 0 && (fields[0]! & VRING_NO_FD) !== 0 ? 0 : 1;
        break;
      case 'table':
        count = Math.min(8, (fields.length - 2) / 8);
        break;
    }
    if (isMalformed && chance(random, 40)) count = pick(random, [0, 1, 2, 7, 8, 9, 50, 253]);
    const isHonest = chance(random, 70);
    return Array.from({ length: count }, (_, i) => {
      if (!isHonest && chance(random, 50)) return zoo.any(random);
      return this.#described[i] ?? right;
    });
  }
}
