/**
 * error: a disk that misbehaves as told. Rules pick requests by type, place and count and let them fail, hang, be refused or
 * return wrong data. For tests of everything above.
 *
 * Invariants
 * - Each request counts for every rule it matches, also when another rule acts on it; the first rule that is due acts.
 * - A request that fails, is refused or hangs has not reached the base.
 * - A request that hangs waits here until `release`, which sends it on, or until a reset, which aborts it.
 */
import { WINDOW_MASK, WINDOW_SCALE } from '../../../native/index.js';
import type { Reactor } from '../../poller/reactor.js';
import type { BdevContext, BdevModule, IoChannel } from '../bdev.js';
import { BdevError } from '../bdev.js';
import { IoQueue, IoStatus, IoType } from '../bdev-io.js';
import type { BdevIo, IoOwner } from '../bdev-io.js';
import { FilterBdev, wholeRequests } from '../filter-bdev.js';
import type { FilterConfig } from '../filter-bdev.js';

/** What happens to a request that a rule picks. */
export type ErrorAction =
  /** It fails with the rule's errno. */
  | 'fail'
  /** It fails for want of space. */
  | 'noSpace'
  /** It is refused for want of a resource: it will be tried again, which counts as one more request. */
  | 'again'
  /** It does not complete until `release` or a reset. */
  | 'hang'
  /** It succeeds, with one bit of the data wrong. Reads only. */
  | 'corrupt';

export interface ErrorRule {
  readonly type: 'read' | 'write' | 'flush' | 'discard' | 'writeZeroes' | 'any';
  readonly action: ErrorAction;
  /** First request to act on: 1 is the next one that matches. */
  readonly first: number;
  /** How many requests to act on; null for all from then on. */
  readonly count: number | null;
  /** For `fail`; EIO when left out. */
  readonly errno?: number | undefined;
  /** Requests that touch no byte of [from, to) do not match; a flush has no place and always matches. */
  readonly fromOffsetBytes?: number | undefined;
  readonly toOffsetBytes?: number | undefined;
  /** Chance that a request is acted on when it is due; 1 when left out. */
  readonly probability?: number | undefined;
}

export interface ErrorConfig extends FilterConfig {
  readonly module: 'error';
  readonly rules: readonly ErrorRule[];
}

const EIO = 5;
const EAGAIN = 11;
const ENOSPC = 28;
const ECANCELED = 125;

/** A rule with the number of requests it has seen. */
class RuleState {
  readonly action: ErrorAction;
  readonly errno: number;
  readonly #type: IoType | -1;
  readonly #from: number;
  readonly #to: number;
  readonly #first: number;
  /** First request that is past the rule. */
  readonly #end: number;
  readonly #probability: number;
  #seen = 0;

  constructor(rule: ErrorRule) {
    this.action = rule.action;
    this.errno = rule.errno ?? EIO;
    this.#type = rule.type === 'any' ? -1 : IoType[rule.type];
    this.#from = rule.fromOffsetBytes ?? 0;
    this.#to = rule.toOffsetBytes ?? Infinity;
    this.#first = rule.first;
    this.#end = rule.first + (rule.count ?? Infinity);
    this.#probability = rule.probability ?? 1;
  }

  /** Counts the request; returns whether to act on it. */
  picks(io: BdevIo, reactor: Reactor): boolean {
    if (this.#type >= 0 && io.type !== this.#type) return false;
    if (io.type !== IoType.flush) {
      if (io.offsetBytes >= this.#to || io.offsetBytes + io.lengthBytes <= this.#from) return false;
    }
    const number = ++this.#seen;
    if (number < this.#first || number >= this.#end) return false;
    return this.#probability >= 1 || reactor.random.next() < this.#probability;
  }
}

class ErrorChannel implements IoChannel, IoOwner {
  readonly #bdev: ErrorBdev;
  readonly #base: IoChannel;
  readonly #reactor: Reactor;
  readonly #hanging = new IoQueue();

  constructor(bdev: ErrorBdev, base: IoChannel, reactor: Reactor) {
    this.#bdev = bdev;
    this.#base = base;
    this.#reactor = reactor;
  }

  get hanging(): number {
    return this.#hanging.length;
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.reset) {
      for (let left = this.#hanging.length; left > 0; left--) {
        this.#hanging.shift()!.complete(IoStatus.aborted, ECANCELED);
      }
      this.#base.submit(io);
      return;
    }
    const rule = this.#bdev.ruleFor(io, this.#reactor);
    if (rule === null) {
      this.#base.submit(io);
      return;
    }
    switch (rule.action) {
      case 'fail':
        io.complete(IoStatus.ioError, rule.errno);
        return;
      case 'noSpace':
        io.complete(IoStatus.noSpace, ENOSPC);
        return;
      case 'again':
        io.complete(IoStatus.again, EAGAIN);
        return;
      case 'hang':
        this.#hanging.append(io);
        return;
      case 'corrupt':
        io.push(this, 0);
        this.#base.submit(io);
        return;
    }
  }

  /** A read to corrupt has its data: only those pass here. */
  onDone(io: BdevIo): void {
    if (io.status === IoStatus.success) this.#flipBit(io);
    io.complete(io.status, io.errno);
  }

  /** Sends everything that hangs on to the base. */
  release(): void {
    for (let left = this.#hanging.length; left > 0; left--) this.#base.submit(this.#hanging.shift()!);
  }

  close(): void {
    if (this.#hanging.length > 0) throw new Error(`bdev ${this.#bdev.name}: closed while requests hang`);
    this.#bdev.closed(this);
    this.#base.close();
  }

  #flipBit(io: BdevIo): void {
    const { arena, random } = this.#reactor;
    let skip = random.below(io.lengthBytes);
    let segment = 0;
    while (skip >= io.segmentLengths[segment]!) skip -= io.segmentLengths[segment++]!;
    const address = io.segmentAddresses[segment]! + skip;
    arena.u8[(address * WINDOW_SCALE) | 0]![address & WINDOW_MASK]! ^= 1 << random.below(8);
  }
}

export class ErrorBdev extends FilterBdev {
  readonly #channels: ErrorChannel[] = [];
  #rules: readonly ErrorRule[] = [];
  #states: RuleState[] = [];

  constructor(config: ErrorConfig, context: BdevContext) {
    // Requests are split below, so that the rules count what the consumer asked for.
    super(config, context, (base) => ({ limits: wholeRequests(base) }));
    this.setRules(config.rules);
  }

  /** Requests that hang at the moment. */
  get hanging(): number {
    return this.#channels.reduce((sum, channel) => sum + channel.hanging, 0);
  }

  /** Puts other rules in place; their counting starts afresh. What hangs goes on hanging. Throws BdevError. */
  setRules(rules: readonly ErrorRule[]): void {
    rules.forEach((rule, i) => {
      if (rule.action !== 'corrupt' || rule.type === 'read') return;
      throw new BdevError(
        'not-a-read',
        `rules[${i}].type`,
        `rule ${i} of bdev ${this.name} would corrupt requests of type ${rule.type}`,
        'only data read can be corrupted: use type read',
      );
    });
    this.#rules = rules;
    this.#states = rules.map((rule) => new RuleState(rule));
  }

  /** Sends every request that hangs on to the base, in order. */
  release(): void {
    for (const channel of this.#channels) channel.release();
  }

  /** The first rule that is due for the request, after all have counted it. */
  ruleFor(io: BdevIo, reactor: Reactor): RuleState | null {
    let due: RuleState | null = null;
    for (let i = 0; i < this.#states.length; i++) {
      const state = this.#states[i]!;
      if (state.picks(io, reactor) && due === null) due = state;
    }
    return due;
  }

  closed(channel: ErrorChannel): void {
    this.#channels.splice(this.#channels.indexOf(channel), 1);
  }

  openChannel(reactor: Reactor): IoChannel {
    const channel = new ErrorChannel(this, this.context.open(this.base), reactor);
    this.#channels.push(channel);
    return channel;
  }

  override describe(): Record<string, unknown> {
    return { base: this.base.name, rules: this.#rules, hanging: this.hanging };
  }
}

export const errorModule: BdevModule<ErrorConfig> = {
  name: 'error',
  create: (config, context) => new ErrorBdev(config, context),
};
