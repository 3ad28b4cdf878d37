/**
 * The disks that share one set of limits, and which of their waiting requests passes next: deficit round robin over disks.
 *
 *     request --> passes at once, when nothing waits and no bucket is in debt
 *             \-> its disk's queue --> passes when the buckets allow and it is the disk's turn
 *
 * A request costs the time that the tightest limit takes to make its tokens, so that disks share operations evenly where
 * operations are short, and bytes where bytes are. A disk is served while it has credit and may go into debt by one request;
 * when no disk that could be served has credit, every disk gets a quantum. Within a disk, reads and writes that both may pass
 * share by the same measure.
 *
 * Invariants
 * - Requests of one disk and direction pass in order. Nothing passes at once while anything waits that could.
 * - While requests wait the timer is set for the moment the first of them may pass: nothing polls.
 * - Only joining and leaving allocate.
 */
import type { Timer } from '../../poller/poller.js';
import type { Reactor } from '../../poller/reactor.js';
import type { IoChannel } from '../bdev.js';
import { IoQueue } from '../bdev-io.js';
import type { BdevIo } from '../bdev-io.js';
import { Direction, TokenBuckets } from './token-buckets.js';
import type { QosLimits } from './token-buckets.js';

/** Credit handed out per round: how long one disk is served before the next has its turn, at the limit. */
const QUANTUM_US = 100;
const DIRECTIONS = [Direction.read, Direction.write] as const;
/** Shortest sleep: longer than what is lost in rounding, so that a debt is paid off when the timer fires. */
const SLEEP_MIN_US = 1;

/** One disk of a group, with what waits of it. */
export class QosMember {
  /** Where requests go. */
  readonly base: IoChannel;
  /** By direction. */
  readonly queues: readonly [IoQueue, IoQueue] = [new IoQueue(), new IoQueue()];
  /** What the disk may still use of the limits in this round; negative is debt. */
  creditUs = QUANTUM_US + 0.5;
  /** How much more its reads have had than its writes. */
  readLeadUs = 0.5;

  constructor(base: IoChannel) {
    this.base = base;
  }
}

export class FairGroup implements Timer {
  heapIndex = -1;
  dueUs = -0.5;
  /** How many bdevs name the group. */
  users = 0;
  limits: QosLimits;

  readonly #reactor: Reactor;
  readonly #buckets: TokenBuckets;
  readonly #members: QosMember[] = [];
  /** The member whose turn it is. */
  #turn = 0;
  #waiting = 0;
  #serving = false;

  constructor(limits: QosLimits, reactor: Reactor) {
    this.limits = limits;
    this.#reactor = reactor;
    this.#buckets = new TokenBuckets(limits, reactor);
  }

  join(member: QosMember): void {
    this.#members.push(member);
  }

  /** @param member nothing of it waits */
  leave(member: QosMember): void {
    this.#members.splice(this.#members.indexOf(member), 1);
    this.#turn = 0;
  }

  setLimits(limits: QosLimits): void {
    this.limits = limits;
    this.#buckets.setLimits(limits);
    this.#serve();
  }

  /** Sends a request to the member's base, now or in its turn. */
  submit(member: QosMember, direction: Direction, io: BdevIo): void {
    if (this.#waiting === 0) {
      this.#buckets.fill();
      if (this.#buckets.mayPass(direction)) {
        this.#buckets.charge(direction, io);
        member.base.submit(io);
        return;
      }
    }
    const queue = member.queues[direction];
    queue.append(io);
    this.#waiting++;
    // Behind another request of its queue it changes nothing: the timer is set for that one.
    if (queue.length === 1) this.#serve();
  }

  /** Takes the oldest request that waits in a queue of a member. */
  takeBack(member: QosMember, direction: Direction): BdevIo {
    this.#waiting--;
    return member.queues[direction].shift()!;
  }

  onTimer(): void {
    this.#serve();
  }

  #serve(): void {
    // A request that completes at once may bring its successor: it is served by the loop that is running.
    if (this.#serving) return;
    this.#serving = true;
    this.#buckets.fill();
    for (let member = this.#next(); member !== null; member = this.#next()) this.#serveOne(member);
    this.#serving = false;
    this.#sleep();
  }

  #serveOne(member: QosMember): void {
    const reads = this.#couldPass(member, Direction.read);
    const writes = this.#couldPass(member, Direction.write);
    const direction = reads && (!writes || member.readLeadUs <= 0) ? Direction.read : Direction.write;
    const io = this.takeBack(member, direction);
    this.#buckets.weigh(direction, io);
    const { costUs } = this.#buckets;
    member.creditUs -= costUs;
    member.readLeadUs += direction === Direction.read ? costUs : -costUs;
    // What a direction had while the other did not want it is not held against it.
    if (!writes) member.readLeadUs = Math.min(member.readLeadUs, QUANTUM_US);
    if (!reads) member.readLeadUs = Math.max(member.readLeadUs, -QUANTUM_US);
    this.#buckets.charge(direction, io);
    member.base.submit(io);
  }

  /** The member to serve now, or null when nothing may pass. */
  #next(): QosMember | null {
    const members = this.#members;
    let mostCreditUs = -Infinity;
    for (let i = 0; i < members.length; i++) {
      const member = members[this.#turn]!;
      if (this.#couldPass(member, Direction.read) || this.#couldPass(member, Direction.write)) {
        if (member.creditUs > 0) return member;
        mostCreditUs = Math.max(mostCreditUs, member.creditUs);
      }
      this.#turn = this.#turn + 1 === members.length ? 0 : this.#turn + 1;
    }
    if (mostCreditUs === -Infinity) return null;
    // As many rounds at once as it takes until a member that can be served has credit. Credit is not saved up.
    const givenUs = (Math.floor(-mostCreditUs / QUANTUM_US) + 1) * QUANTUM_US;
    for (let i = 0; i < members.length; i++) {
      members[i]!.creditUs = Math.min(QUANTUM_US, members[i]!.creditUs + givenUs);
    }
    return this.#next();
  }

  #couldPass(member: QosMember, direction: Direction): boolean {
    return member.queues[direction].length > 0 && this.#buckets.mayPass(direction);
  }

  #sleep(): void {
    if (this.#waiting === 0) {
      this.#reactor.cancel(this);
      return;
    }
    let waitUs = Infinity;
    for (let i = 0; i < DIRECTIONS.length; i++) {
      const direction = DIRECTIONS[i]!;
      if (!this.#isAwaited(direction)) continue;
      this.#buckets.lookAhead(direction);
      waitUs = Math.min(waitUs, this.#buckets.waitUs);
    }
    this.#reactor.schedule(this, Math.max(waitUs, SLEEP_MIN_US));
  }

  /** Whether a request waits in this direction. */
  #isAwaited(direction: Direction): boolean {
    for (let i = 0; i < this.#members.length; i++) {
      if (this.#members[i]!.queues[direction].length > 0) return true;
    }
    return false;
  }
}
