/** A session that is set up by the rules, for attacks on what comes after: on rings, or by messages to a device at work. */
import { check, native } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import {
  FLAG_NEED_REPLY,
  FLAG_VERSION_1,
  Feature,
  MESSAGE_HEADER_BYTES,
  MessageId,
  VRING_NO_FD,
} from '../frontend/protocol.js';
import type { AttackMemory, AttackRegion } from './attack-memory.js';
import { words } from './boundaries.js';
import type { Words } from './boundaries.js';
import { Finding } from './finding.js';
import type { RawConnection, Wires } from './raw-connection.js';

/** MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS. */
const PROTOCOL_FEATURES = 0x9209;
const bit = (feature: number): number => (1 << feature) >>> 0;
const PACKED_HI = 1 << (Feature.ringPacked - 32);
const FEATURES_LO = [
  Feature.flush,
  Feature.blkSize,
  Feature.segMax,
  Feature.discard,
  Feature.writeZeroes,
  Feature.multiQueue,
  Feature.configWce,
].reduce((all, feature) => all | bit(feature), 0);

export interface SessionFeatures {
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  readonly packed: boolean;
  /** Bit 30: without it rings are enabled from the start. */
  readonly protocol: boolean;
  readonly hi: number;
}

export class AttackSession {
  readonly connection: RawConnection;
  readonly memory: AttackMemory;
  /** Messages sent that keep all rules: they do not count as cases. */
  lawful = 0;
  readonly #wires: Wires;

  constructor(connection: RawConnection, wires: Wires, memory: AttackMemory) {
    this.connection = connection;
    this.#wires = wires;
    this.memory = memory;
  }

  // ---- Messages, gathered until the next flush

  u32s(id: number, ...values: readonly number[]): void {
    const { out } = this.#wires;
    let at = this.header(id, 4 * values.length);
    for (const value of values) at = out.writeUInt32LE(value >>> 0, at);
    this.connection.add(MESSAGE_HEADER_BYTES + 4 * values.length);
    this.lawful++;
  }

  /** Writes a header at the place of the next message. Returns where its payload goes. */
  header(id: number, payloadBytes: number, flags = FLAG_VERSION_1): number {
    const { out } = this.#wires;
    const at = this.connection.at;
    out.writeUInt32LE(id >>> 0, at);
    out.writeUInt32LE(flags >>> 0, at + 4);
    out.writeUInt32LE(payloadBytes >>> 0, at + 8);
    return at + MESSAGE_HEADER_BYTES;
  }

  // ---- Set-up

  /** Features, protocol features and memory. Returns false when the device has closed the connection. */
  negotiate(features: SessionFeatures, regions: readonly AttackRegion[] = this.memory.regions): boolean {
    const lo =
      FEATURES_LO |
      (features.indirect ? bit(Feature.indirectDescriptors) : 0) |
      (features.eventIdx ? bit(Feature.eventIdx) : 0) |
      (features.protocol ? bit(Feature.protocolFeatures) : 0);
    const before = this.connection.replies;
    let offered: Words = [0, 0];
    this.connection.onReply = (payload) => (offered = [payload.readUInt32LE(0), payload.readUInt32LE(4)]);
    this.u32s(MessageId.getFeatures);
    if (!this.connection.flush() || !this.connection.waitForReplies(before + 1)) return false;
    this.connection.onReply = null;
    this.u32s(MessageId.setFeatures, lo & offered[0], features.hi & offered[1]);
    this.u32s(MessageId.setProtocolFeatures, PROTOCOL_FEATURES, 0);
    this.u32s(MessageId.setOwner);
    if (!this.connection.flush()) return false;
    return this.shareMemory(regions);
  }

  shareMemory(regions: readonly AttackRegion[]): boolean {
    const fields = regions.flatMap((region) => describeRegion(region));
    this.u32s(MessageId.setMemTable, regions.length, 0, ...fields);
    return this.connection.flush(Int32Array.from(regions, (region) => region.fd));
  }

  /** Size and addresses of a ring that is not started. Addresses are guest addresses in the control region. */
  describeRing(index: number, size: number, place: { descriptors: number; available: number; used: number }): void {
    const user = (guest: number): Words =>
      words(guest - this.memory.control.guestAddress + this.memory.control.userAddress);
    this.u32s(MessageId.setVringNum, index, size);
    const { descriptors, available, used } = place;
    this.u32s(MessageId.setVringAddr, index, 0, ...user(descriptors), ...user(used), ...user(available), 0, 0);
  }

  enable(index: number): void {
    this.u32s(MessageId.setVringEnable, index, 1);
  }

  /** Has a descriptor raised when the device breaks the ring. */
  signalErrors(index: number, fd: number): void {
    this.connection.flush();
    this.u32s(MessageId.setVringErr, index, 0);
    this.connection.flush(Int32Array.of(fd));
  }

  /** @param kickFd -1: the ring is polled */
  start(index: number, base: number, kickFd = -1): void {
    this.u32s(MessageId.setVringBase, index, base);
    if (kickFd < 0) {
      this.u32s(MessageId.setVringKick, index | VRING_NO_FD, 0);
    } else {
      this.connection.flush();
      this.u32s(MessageId.setVringKick, index, 0);
      this.connection.flush(Int32Array.of(kickFd));
    }
  }

  /** Waits until the device has carried out everything sent so far. @param meanwhile called while it is waited for */
  barrier(meanwhile?: () => void): boolean {
    const before = this.connection.replies;
    this.u32s(MessageId.getFeatures);
    return this.connection.flush() && this.connection.waitForReplies(before + 1, meanwhile);
  }

  /** Sends a message that is to be answered. Returns whether the device says that it does not carry it out. */
  isRefused(id: number, values: readonly number[], fds?: Int32Array): boolean {
    const { out } = this.#wires;
    this.connection.flush();
    const before = this.connection.replies;
    let answer = 0;
    this.connection.onReply = (payload) => (answer = payload.readUInt32LE(0));
    let at = this.header(id, 4 * values.length, FLAG_VERSION_1 | FLAG_NEED_REPLY);
    for (const value of values) at = out.writeUInt32LE(value >>> 0, at);
    this.connection.add(MESSAGE_HEADER_BYTES + 4 * values.length);
    const isAnswered = this.connection.flush(fds) && this.connection.waitForReplies(before + 1);
    this.connection.onReply = null;
    if (isAnswered && answer === 0) this.lawful++;
    return isAnswered && answer !== 0;
  }

  /** Stops rings. Returns where each is to go on, undefined when the device has closed the connection. */
  stop(indices: readonly number[]): number[] | undefined {
    const before = this.connection.replies;
    const bases: number[] = [];
    this.connection.onReply = (payload) => {
      if (payload.length !== 8 || payload.readUInt32LE(0) !== indices[bases.length]) {
        throw new Finding('reply', `to GET_VRING_BASE of ring ${indices[bases.length]}: ${payload.toString('hex')}`);
      }
      bases.push(payload.readUInt32LE(4));
    };
    for (const index of indices) this.u32s(MessageId.getVringBase, index, 0);
    const isAnswered = this.connection.flush() && this.connection.waitForReplies(before + indices.length);
    this.connection.onReply = null;
    return isAnswered ? bases : undefined;
  }
}

export function describeRegion(region: AttackRegion): number[] {
  const { guestAddress, sizeBytes, userAddress, mmapOffset } = region;
  return [guestAddress, sizeBytes, userAddress, mmapOffset].flatMap((value) => [...words(value)]);
}

export function anyFeatures(random: Random, packed = random.below(3) === 0): SessionFeatures {
  return {
    eventIdx: random.below(2) === 0,
    indirect: random.below(4) > 0,
    packed,
    protocol: random.below(4) > 0,
    // VERSION_1, which legacy drivers do not know.
    hi: packed ? PACKED_HI | 1 : Number(random.below(4) > 0),
  };
}

/** A kick descriptor that has been kicked. */
export function kicked(): number {
  const fd = check(native.eventfdCreate(), 'make a kick descriptor');
  native.eventfdSignal(fd);
  return fd;
}

export { FLAG_NEED_REPLY };
