/**
 * qos: keeps a disk, or a group of disks, within limits on operations and bytes per second. Requests over the limit wait their
 * turn here; the rules of the turn are in fair-group.ts, those of the limits in token-buckets.ts.
 *
 * Invariants
 * - Reads pass in order, and so do writes, discards and writeZeroes; a flush, which covers completed writes only, does not wait.
 * - A reset gives back what waits as aborted.
 */
import type { Reactor } from '../../poller/reactor.js';
import type { BdevContext, BdevModule, IoChannel } from '../bdev.js';
import { BdevError } from '../bdev.js';
import { IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { FilterBdev, wholeRequests } from '../filter-bdev.js';
import type { FilterConfig } from '../filter-bdev.js';
import { FairGroup, QosMember } from './fair-group.js';
import { Direction } from './token-buckets.js';
import type { QosLimits } from './token-buckets.js';

export type { QosLimits } from './token-buckets.js';

export interface QosConfig extends FilterConfig, QosLimits {
  readonly module: 'qos';
  /** Disks of the same group on the same reactor share its limits evenly; they must name the same ones. null: this disk alone. */
  readonly group: string | null;
}

const ECANCELED = 125;

/** Groups by name, of each reactor. */
const groupsOf = new WeakMap<Reactor, Map<string, FairGroup>>();

class QosChannel implements IoChannel {
  readonly #base: IoChannel;
  readonly #group: FairGroup;
  readonly #member: QosMember;

  constructor(base: IoChannel, group: FairGroup) {
    this.#base = base;
    this.#group = group;
    this.#member = new QosMember(base);
    group.join(this.#member);
  }

  /** Nothing is to be done when a request completes, so the channel does not ask to see it. */
  submit(io: BdevIo): void {
    switch (io.type) {
      case IoType.read:
        this.#group.submit(this.#member, Direction.read, io);
        return;
      case IoType.write:
      case IoType.discard:
      case IoType.writeZeroes:
        this.#group.submit(this.#member, Direction.write, io);
        return;
      case IoType.flush:
        this.#base.submit(io);
        return;
      case IoType.reset:
        this.#abort(Direction.read);
        this.#abort(Direction.write);
        this.#base.submit(io);
        return;
    }
  }

  close(): void {
    this.#group.leave(this.#member);
    this.#base.close();
  }

  #abort(direction: Direction): void {
    for (let left = this.#member.queues[direction].length; left > 0; left--) {
      this.#group.takeBack(this.#member, direction).complete(IoStatus.aborted, ECANCELED);
    }
  }
}

export class QosBdev extends FilterBdev {
  readonly #groupName: string | null;
  readonly #group: FairGroup;

  constructor(config: QosConfig, context: BdevContext) {
    // Requests are split below, so that what counts is what the consumer asked for.
    super(config, context, (base) => ({ limits: wholeRequests(base) }));
    this.#groupName = config.group;
    this.#group = joinGroup(config, context.reactor);
  }

  /** The limits in force: the whole group's. */
  get qosLimits(): QosLimits {
    return this.#group.limits;
  }

  /** Changes the limits of the disk, or of its whole group, at once. What is over them has still to be paid for. */
  setLimits(limits: QosLimits): void {
    this.#group.setLimits(onlyLimits(limits));
  }

  openChannel(_reactor: Reactor): IoChannel {
    return new QosChannel(this.context.open(this.base), this.#group);
  }

  override describe(): Record<string, unknown> {
    return { base: this.base.name, group: this.#groupName, ...this.#group.limits };
  }

  override destroy(): void {
    if (--this.#group.users > 0 || this.#groupName === null) return;
    groupsOf.get(this.context.reactor)!.delete(this.#groupName);
  }
}

/** The group a disk belongs to; made when it is the first. Throws BdevError when it names other limits than the group has. */
function joinGroup(config: QosConfig, reactor: Reactor): FairGroup {
  const limits = onlyLimits(config);
  let groups = groupsOf.get(reactor);
  if (groups === undefined) {
    groups = new Map();
    groupsOf.set(reactor, groups);
  }
  let group = config.group === null ? undefined : groups.get(config.group);
  if (group === undefined) {
    group = new FairGroup(limits, reactor);
    if (config.group !== null) groups.set(config.group, group);
  }
  for (const field of LIMIT_FIELDS) {
    if (limits[field] === group.limits[field]) continue;
    throw new BdevError(
      'group-limits-differ',
      field,
      `bdev ${config.name} has ${field} ${limits[field]}, its group ${config.group} has ${group.limits[field]}`,
      `give all disks of group ${config.group} the same limits`,
    );
  }
  group.users++;
  return group;
}

const LIMIT_FIELDS = [
  'readIops',
  'writeIops',
  'totalIops',
  'readBytesPerSecond',
  'writeBytesPerSecond',
  'totalBytesPerSecond',
  'burstSeconds',
] as const satisfies (keyof QosLimits)[];

function onlyLimits(source: QosLimits): QosLimits {
  const { readIops, writeIops, totalIops, readBytesPerSecond, writeBytesPerSecond, totalBytesPerSecond, burstSeconds } =
    source;
  return { readIops, writeIops, totalIops, readBytesPerSecond, writeBytesPerSecond, totalBytesPerSecond, burstSeconds };
}

export const qosModule: BdevModule<QosConfig> = {
  name: 'qos',
  create: (config, context) => new QosBdev(config, context),
};
