/**
 * One run: the real daemon side - session, virtqueues, bdev core and modules - on simulated ring, disk, clock and guest, in one
 * thread, from one plan.
 *
 * The daemon runs its own loop. Whenever it gives time to its ring, the world goes on: disks complete, the guest has its turn,
 * what the plan says happens. The death of the daemon is an exception that leaves its loop there.
 */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Arena, POLLHUP, POLLIN, check, checkObject, native } from '../../native/index.js';
import type { SeededRandom } from '../../src/poller/clock.js';
import { BdevError } from '../../src/bdev/bdev.js';
import { checkBytes } from '../harness/qcow2.js';
import { Feature, ProtocolFeature } from '../frontend/protocol.js';
import { SECTOR_BYTES, SimDisk } from './sim-disk.js';
import { Oracle, Violation } from './oracle.js';
import { randomFor } from './plan.js';
import type { Action, Control, End, Plan } from './plan.js';
import { SimDaemon } from './sim-daemon.js';
import { SimFrontend } from './sim-frontend.js';
import type { Script } from './sim-frontend.js';
import { IMAGE_DISK_BYTES, imageBytes } from './sim-image.js';
import { SimGuest } from './sim-guest.js';
import type { GuestQueue } from './sim-guest.js';
import { SimArena, SimProcess } from './sim-process.js';
import type { Wire } from './sim-process.js';
import { SimRing } from './sim-ring.js';
import type { Fault, SimRingOptions } from './sim-ring.js';
import { emptyTally } from './tally.js';
import type { Tally } from './tally.js';
import { START_US, Timeline } from './timeline.js';
import { Trace } from './trace.js';

const POLLRDHUP = 0x2000;
const ARENA_BYTES = 2 ** 34;
/** A conversation that takes longer hangs. */
const SCRIPT_MAX_US = 2_000_000;
const RESTART_US = 500;
const VERIFY_SECTORS = 32;
/** So long after a request of the disk failed a guest's request may begin and fail by it, where an image lies on the disk. */
const FAILURE_SPREADS_US = 10_000;
/** Reactor steps that the orderly end may take. */
const STOP_STEPS_MAX = 100_000;

export interface Outcome {
  readonly hash: string;
  readonly tally: Tally;
  /** What went wrong, or null. */
  readonly failure: Failure | null;
}

export interface Failure {
  readonly message: string;
  readonly step: number;
  /** The last events. */
  readonly events: readonly string[];
}

/** Leaves the daemon's loop where it dies. */
class Died extends Error {}

/** What outlives a run: made once in a process. */
interface Host {
  readonly guestArena: Arena;
  readonly daemonArena: SimArena;
  readonly listenFd: number;
  readonly socketPath: string;
  /** A folder on a tmpfs, emptied when the power goes. */
  readonly memoryDir: string;
}

let hostOfProcess: Host | null = null;

function theHost(): Host {
  if (hostOfProcess !== null) return hostOfProcess;
  const directory = mkdtempSync(join(tmpdir(), 'strata-sim-'));
  const memoryDir = mkdtempSync('/dev/shm/strata-sim-');
  process.on('exit', () => {
    for (const folder of [directory, memoryDir]) rmSync(folder, { recursive: true, force: true });
  });
  const socketPath = join(directory, 'disk.sock');
  const listenFd = check(native.socketListen(socketPath, 0o600), 'listen');
  const [guestArena, daemonArena] = [new Arena(ARENA_BYTES), new SimArena(ARENA_BYTES)];
  hostOfProcess = { guestArena, daemonArena, listenFd, socketPath, memoryDir };
  return hostOfProcess;
}

/** Runs a plan to its end or its first failure. @param sink is given every event in words */
export function simulate(plan: Plan, sink: ((line: string) => void) | null = null): Outcome {
  const simulation = new Simulation(plan, theHost());
  simulation.trace.sink = sink;
  return simulation.run();
}

class Simulation {
  readonly trace = new Trace();
  readonly tally = emptyTally();
  /** Requests that began by then may see an error of the disk. */
  #faultyUs = -1;
  readonly #plan: Plan;
  readonly #host: Host;
  readonly #timeline = new Timeline();
  readonly #process = new SimProcess();
  readonly #disk: SimDisk;
  readonly #diskFd: number;
  readonly #diskInode: number;
  /** What the disk may be moved to, if anything. */
  readonly #other: { readonly disk: SimDisk; readonly fd: number; readonly inode: number } | null;
  /** It was moved there: durable, as the daemon's record is. */
  #isMoved = false;
  readonly #oracle: Oracle;
  readonly #guest: SimGuest;
  readonly #frontend: SimFrontend;
  readonly #random: Record<'disk' | 'latency' | 'power' | 'guest' | 'daemon', SeededRandom>;
  #daemon: SimDaemon | null = null;
  /** Of the daemon, also while it starts. */
  #ring: SimRing | null = null;
  /** Daemons so far. */
  #lives = 0;
  /** How the daemon is to end, by an exception at the next occasion. */
  #dying: End | null = null;
  /** Ends after so many events more. */
  #ends: { readonly end: End; afterEvents: number }[] = [];
  #faults: { fault: Fault; afterIos: number }[] = [];
  #script: Script | null = null;
  #scriptSinceUs = START_US;
  /** The next action, and when. */
  #next = 0;
  #nextUs = 0;
  #verified = 0;
  /** The power was cut in the end. */
  #hasCut = false;
  #hasEnded = false;
  #hasFinished = false;
  /** Kick descriptors of the guest that were ever kicked. */
  readonly #kicked = new Set<number>();
  /** The write cache as the guest wants it. */
  #writeback: boolean;
  /** The same as the daemon has it: null while it is being told. A new daemon has one, unless the in-flight region says otherwise. */
  #daemonWriteback: boolean | null = true;

  constructor(plan: Plan, host: Host) {
    const { seed, setup } = plan;
    this.#plan = plan;
    this.#writeback = setup.writeback;
    this.#host = host;
    this.#random = {
      disk: randomFor(seed, 'disk'),
      latency: randomFor(seed, 'latency'),
      power: randomFor(seed, 'power'),
      guest: randomFor(seed, 'guest'),
      daemon: randomFor(seed, 'daemon'),
    };
    this.#emptyMemory();
    const { image, sectors } = setup;
    const bytes = image === null ? undefined : imageBytes(image, sectors);
    host.daemonArena.onStore = setup.watchesStores ? () => this.#beforeEvent() : null;
    // Its size is all that is used of it.
    this.#diskFd = check(native.memfdCreate('sim-disk', bytes?.length ?? sectors * SECTOR_BYTES), 'make a file');
    this.#disk =
      bytes === undefined
        ? new SimDisk(sectors * SECTOR_BYTES)
        : new SimDisk(IMAGE_DISK_BYTES, bytes, {
            sizeBytes: () => checkObject(native.fileStat(this.#diskFd), 'stat the file').sizeBytes,
            truncate: (sizeBytes) => check(native.fileTruncate(this.#diskFd, sizeBytes), 'truncate the file'),
          });
    this.#disk.canZeroRange = setup.canZeroRange;
    this.#diskInode = checkObject(native.fileStat(this.#diskFd), 'stat the file').inode;
    this.#other = setup.mirror === null ? null : otherDisk(sectors, setup.canZeroRange);
    this.#oracle = new Oracle(setup.sectors);
    this.#guest = new SimGuest(this.#guestWorld(), setup, this.#oracle, host.guestArena);
    this.#frontend = new SimFrontend(this.#frontendWorld(), setup, this.#guest.ram, host.guestArena);
    this.#process.onClose = (fd) => this.#daemon?.ring.forget(fd);
    this.#process.onAccept = (fd, wire) => this.#daemon?.ring.raise(fd, wire.isClosed ? HANG_UP : POLLIN);
    this.#process.onSignal = () => {
      if (setup.watchesStores) this.#beforeEvent();
      this.#guest.mayBeCalled = true;
    };
    this.#process.onSend = () => {
      if (setup.watchesStores) this.#beforeEvent();
    };
    this.#process.onReceive = (fd, origin) => {
      if (this.#kicked.has(origin)) this.#daemon?.ring.raise(fd, POLLIN);
    };
  }

  run(): Outcome {
    let failure: Failure | null = null;
    try {
      this.#script = this.#connect();
      this.#timeline.after(0, () => this.#tick());
      this.#runToEnd();
    } catch (error) {
      failure = this.#failureOf(error);
    }
    this.#close();
    const { tally } = this;
    tally.requests = Object.values(this.#guest.answered).reduce((sum, count) => sum + count, 0);
    tally.sectorsChecked = this.#oracle.checked;
    tally.events = this.trace.count;
    return { hash: this.trace.hash, tally, failure };
  }

  #failureOf(error: unknown): Failure {
    // Anything else than a broken promise is one too: an assertion of the daemon's, a mistake in here.
    const message =
      error instanceof Violation
        ? error.message
        : error instanceof Error
          ? (error.stack ?? error.message)
          : String(error);
    return { message, step: this.trace.count, events: this.trace.last() };
  }

  #close(): void {
    this.#hasEnded = true;
    this.#frontend.close();
    this.#guest.close();
    this.#process.reclaim();
    try {
      this.#host.daemonArena.reclaim();
    } catch {
      // A run that failed leaves things as they are.
    }
    native.fileClose(this.#diskFd);
    if (this.#other !== null) native.fileClose(this.#other.fd);
    for (let fd = native.socketAccept(this.#host.listenFd); fd >= 0; fd = native.socketAccept(this.#host.listenFd)) {
      native.fileClose(fd);
    }
  }

  // ---- The daemon's life

  #runToEnd(): void {
    while (!this.#hasFinished) {
      const end = this.#boot() ?? this.#runDaemon();
      if (end !== null) this.#afterEnd(end);
      this.#checkImage(end === null || end === 'stop');
      if (end === null) break;
    }
  }

  /** Runs the daemon until it dies, or until the run has come to its end: null. */
  #runDaemon(): End | null {
    const daemon = this.#daemon!;
    try {
      this.#process.run(() => {
        while (!this.#hasFinished && this.#dying !== 'stop') daemon.reactor.runSlice();
      });
      const isLast = this.#hasFinished;
      this.#stop(daemon);
      return isLast ? null : 'stop';
    } catch (error) {
      if (!(error instanceof Died)) throw error;
      return this.#dying;
    }
  }

  /** Returns how the daemon ended before it was there: null when it is. */
  #boot(): End | null {
    this.trace.add(this.#timeline.nowUs(), 'boot');
    const { setup, seed } = this.#plan;
    const { faults } = this.tally;
    try {
      this.#process.run(() => {
        const listenFd = native.fileDuplicate(this.#host.listenFd);
        this.#ring = new SimRing(this.#ringOptions());
        this.#daemon = new SimDaemon(setup, this.#ring, {
          seed,
          lives: this.#lives++,
          timeline: this.#timeline,
          diskPath: `/proc/self/fd/${this.#diskFd}`,
          otherPath: `/proc/self/fd/${this.#other?.fd ?? -1}`,
          isMoved: this.#isMoved,
          memoryDir: this.#host.memoryDir,
          listenFd,
          log: (text) => this.trace.say(this.#timeline.nowUs(), 'log', text),
        });
        this.#daemon.ring.raise(listenFd, POLLIN);
        this.#daemon.listen();
      });
      return null;
    } catch (error) {
      if (error instanceof Died) return this.#dying;
      // It says why it cannot open its disk, and is started again.
      if (error instanceof BdevError && this.tally.faults > faults) return 'kill';
      throw error;
    }
  }

  /** The orderly end: everything that was taken is answered, and nothing is left. */
  #stop(daemon: SimDaemon): void {
    this.trace.add(this.#timeline.nowUs(), 'stop');
    this.#process.run(() => {
      daemon.controller.onClosedByPeer = null;
      let steps = 0;
      const step = (): void => {
        if (++steps === STOP_STEPS_MAX) throw new Violation('the daemon does not stop');
        daemon.reactor.step();
      };
      daemon.endMirror(step);
      // It closes in the steps below, and fails to when there is anything wrong.
      daemon.controller.close().catch(() => undefined);
      while (daemon.controller.info().state !== 'closed') step();
      daemon.registry.destroyAll();
    });
    this.#daemon = null;
    this.#ring = null;
    daemon.checkNothingLeft();
    if (this.#process.openDescriptors > 0) {
      throw new Violation(`${this.#process.openDescriptors} descriptors are open after the end`);
    }
    this.tally.ios += daemon.ring.ios;
    if (this.#host.daemonArena.heldBytes > 0) throw new Violation('memory is held after the end');
    this.#host.daemonArena.reclaim();
  }

  /** The daemon has ended: what that means for the disk and the guest, and how long nothing is there. */
  #afterEnd(end: End): void {
    const ring = this.#ring;
    this.#dying = null;
    this.#ends = [];
    if (ring !== null) {
      this.trace.add(this.#timeline.nowUs(), 'kill', ring.ios);
      this.tally.ios += ring.ios;
      ring.abandon();
      this.#ring = null;
      this.#daemon = null;
      this.#process.reclaim();
      this.#host.daemonArena.reclaim();
    }
    this.#script = null;
    if (end !== 'powerCut') this.#hearLastBase();
    this.#frontend.hangUp();
    for (const queue of this.#guest.queues) this.#guest.started(queue, false);
    switch (end) {
      case 'stop':
        this.tally.stops++;
        for (const queue of this.#guest.queues) this.#guest.take(queue);
        if (!this.#canGoOn) this.#resetRings();
        break;
      case 'kill':
        this.tally.kills++;
        // What was published before is answered.
        for (const queue of this.#guest.queues) this.#guest.take(queue);
        // Else the next daemon carries out what was in flight.
        if (!this.#frontend.keepsInflight) this.#resetRings();
        break;
      case 'powerCut':
        this.tally.powerCuts++;
        this.trace.add(this.#timeline.nowUs(), 'powerCut', this.#disk.dirtyWrites.length);
        this.#disk.powerCut(this.#random.power);
        this.#other?.disk.powerCut(this.#random.power);
        this.#emptyMemory();
        this.#oracle.powerCut();
        this.#frontend.dropInflight();
        this.#resetRings();
        break;
    }
    if (!this.#frontend.keepsInflight) {
      this.#guest.endWriteThrough();
      this.#daemonWriteback = true;
    }
    this.#script = this.#connect();
    this.#scriptSinceUs = this.#timeline.nowUs();
    this.#timeline.passUntil(this.#timeline.nowUs() + this.#random.guest.next() * RESTART_US);
  }

  /** Whatever has happened, an image has clusters that nobody uses at most. Throws Violation. */
  #checkImage(isOrderly: boolean): void {
    if (this.#plan.setup.image === null) return;
    const { corruptions, checkErrors, leaks, findings } = checkBytes(this.#disk.view.subarray(0, this.#disk.fileBytes));
    const { kills, powerCuts, faults } = this.tally;
    const isUndisturbed = kills + powerCuts + faults === 0;
    if (corruptions + checkErrors > 0 || (isUndisturbed && leaks > 0)) {
      throw new Violation(`the image is damaged: ${JSON.stringify(findings.slice(0, 3))}`);
    }
    // One that was killed as it made its log leaves that, too.
    if (isOrderly && kills + faults === 0 && readdirSync(this.#host.memoryDir).length > 0) {
      throw new Violation('a log was left behind');
    }
  }

  #emptyMemory(): void {
    const { memoryDir } = this.#host;
    for (const name of readdirSync(memoryDir)) rmSync(join(memoryDir, name));
  }

  /** Rings go on after a session that ended without a word, when what it took was answered. */
  get #canGoOn(): boolean {
    return this.#frontend.keepsInflight || !this.#plan.setup.packed;
  }

  /** A socket keeps what was said into it: the answer to GET_VRING_BASE, which alone may tell where a packed ring goes on. */
  #hearLastBase(): void {
    const queue = this.#guest.queues.find(({ isBeingStopped }) => isBeingStopped);
    if (queue === undefined) return;
    queue.isBeingStopped = false;
    const base = this.#frontend.lastBase();
    if (base !== null) this.#checkDrained(queue, base);
  }

  /** What is on the rings is forgotten. */
  #resetRings(): void {
    this.#oracle.killed();
    for (const queue of this.#guest.queues) this.#guest.reset(queue);
  }

  #ringOptions(): SimRingOptions {
    const { setup } = this.#plan;
    const [least, most] = setup.latencyUs;
    return {
      arena: this.#host.daemonArena,
      timeline: this.#timeline,
      trace: this.trace,
      random: this.#random.disk,
      diskOf: (inode) => {
        if (inode === this.#diskInode) return this.#disk;
        if (inode === this.#other?.inode) return this.#other.disk;
        throw new Error(`a file that is no disk: inode ${inode}`);
      },
      latencyUs: () => least + this.#random.latency.next() ** 3 * (most - least),
      fault: () => this.#nextFault(),
      // Others come to depend on it meanwhile: on a piece of an image's metadata, on a round that fails when its last request ends.
      failed: () => {
        if (setup.image !== null) this.#faultyUs = this.#timeline.nowUs() + FAILURE_SPREADS_US;
      },
      pass: (untilUs, enough) => this.#pass(untilUs, enough),
      stepUs: () => this.#random.daemon.next() * setup.stepUs,
      beforeIo: () => this.#beforeEvent(),
      entries: setup.ringEntries,
    };
  }

  #pass(untilUs: number, enough: () => boolean = () => false): void {
    this.#process.outside(() => this.#timeline.passUntil(untilUs, () => this.#dying !== null || enough()));
    if (this.#dying === 'kill' || this.#dying === 'powerCut') throw new Died();
  }

  #beforeEvent(): void {
    for (const end of this.#ends) {
      // In the midst of an orderly end, too.
      if (--end.afterEvents <= 0 && (this.#dying === null || this.#dying === 'stop')) this.#dying = end.end;
    }
    if (this.#dying === 'kill' || this.#dying === 'powerCut') throw new Died();
  }

  #nextFault(): Fault | null {
    const due = this.#faults.filter((one) => --one.afterIos === 0);
    if (due.length === 0) return null;
    this.#faults = this.#faults.filter((one) => one.afterIos > 0);
    const { fault } = due[0]!;
    this.tally.faults++;
    if (fault === 'eio' || fault === 'enospc') this.#faultyUs = Math.max(this.#faultyUs, this.#timeline.nowUs());
    return fault;
  }

  // ---- The guest's turn

  #tick(): void {
    if (this.#hasEnded) return;
    this.#guest.harvest();
    this.#goOn();
    this.#act();
    this.#guest.checkProgress();
    this.#timeline.after(this.#random.guest.next() * this.#plan.setup.tickUs, () => this.#tick());
  }

  #goOn(): void {
    // Without a daemon the front-end waits in the backlog.
    if (this.#script === null || this.#daemon === null || this.#dying !== null) return;
    if (this.#script.next().done === true) this.#script = null;
    else if (this.#timeline.nowUs() - this.#scriptSinceUs > SCRIPT_MAX_US) {
      throw new Violation('the daemon does not answer a message');
    }
  }

  #act(): void {
    const { actions } = this.#plan;
    while (this.#next < actions.length && this.#timeline.nowUs() >= this.#nextUs) {
      const action = actions[this.#next]!;
      if (!this.#perform(action)) return;
      this.trace.add(this.#timeline.nowUs(), 'action', this.#next);
      this.#next++;
      this.#nextUs = this.#timeline.nowUs() + (actions[this.#next]?.pauseUs ?? 0);
    }
    if (this.#next === actions.length) this.#wrapUp();
  }

  /** False: not now. */
  #perform(action: Action): boolean {
    switch (action.kind) {
      case 'request':
        return this.#guest.submit(this.#offered(action), action.seed);
      case 'fault':
        this.#faults.push({ fault: action.fault, afterIos: action.afterIos });
        return true;
      case 'end':
        if (this.#ring === null) return true;
        if (action.afterEvents > 0 && action.end !== 'stop') this.#ends.push({ ...action });
        else this.#dying ??= action.end;
        if (this.#dying === 'stop') this.#daemon?.reactor.endSlice();
        return true;
      case 'edit':
        this.#daemon?.edit(action.operation, action.params, () => this.tally.edits++);
        return true;
      case 'mirror':
        this.#daemon?.mirror(action.step, () => this.#move());
        return true;
      case 'control':
        if (this.#script !== null) return false;
        this.tally.controls++;
        this.#script = this.#control(action.control, this.#guest.queues[action.queue]!);
        this.#scriptSinceUs = this.#timeline.nowUs();
        return true;
    }
  }

  /** The daemon writes down that the disk is another one from now on, and may die before it is. */
  #move(): void {
    this.tally.pivots++;
    this.#isMoved = !this.#isMoved;
    this.trace.say(this.#timeline.nowUs(), 'log', this.#isMoved ? 'moved' : 'moved back');
    this.#beforeEvent();
  }

  /** A request of a type that was not negotiated becomes a read. */
  #offered(action: Action & { kind: 'request' }): Action & { kind: 'request' } {
    const { type } = action;
    const isMissing =
      (type === 'flush' && !this.#frontend.has(Feature.flush)) ||
      (type === 'discard' && !this.#frontend.has(Feature.discard)) ||
      (type === 'writeZeroes' && !this.#frontend.has(Feature.writeZeroes));
    return isMissing ? { ...action, type: 'read' } : action;
  }

  /** All is done but to wait, to read the whole disk, to cut the power and to read it again. */
  #wrapUp(): void {
    this.#faults = [];
    this.#ends = [];
    if (this.#script !== null || this.#dying !== null || this.#daemon === null) return;
    const { sectors } = this.#plan.setup;
    while (this.#verified < sectors) {
      // When nothing else is under way a read tells exactly.
      if (this.#verified === 0 && this.#guest.inflight > 0) return;
      const action = {
        kind: 'request',
        type: 'read',
        queue: 0,
        sector: this.#verified,
        sectors: VERIFY_SECTORS,
      } as const;
      if (!this.#guest.submit(action, this.#verified)) return;
      this.#verified += VERIFY_SECTORS;
    }
    if (this.#guest.inflight > 0) return;
    // Once more after a power cut, where contents outlive one.
    if (this.#plan.setup.leaf === 'uring' && !this.#hasCut) {
      this.#hasCut = true;
      this.#verified = 0;
      this.#dying = 'powerCut';
      return;
    }
    this.#hasFinished = true;
    this.#daemon.reactor.endSlice();
  }

  // ---- Conversations

  *#connect(): Script {
    const frontend = this.#frontend;
    yield* frontend.connect();
    yield* frontend.shareMemory();
    this.#guest.usesExtra = this.#guest.ram.isPlugged;
    yield* frontend.shareInflight(this.#plan.setup.queues, this.#plan.setup.queueSize);
    yield* this.#settleWriteback();
    for (const queue of this.#guest.queues) yield* this.#startRing(queue);
    yield* frontend.barrier();
  }

  *#settleWriteback(): Script {
    const frontend = this.#frontend;
    const canChoose = frontend.has(Feature.configWce) && frontend.hasProtocol(ProtocolFeature.config);
    if (canChoose && this.#daemonWriteback !== this.#writeback) {
      this.#daemonWriteback = null;
      yield* frontend.setWriteback(this.#writeback);
      this.#daemonWriteback = this.#writeback;
    }
    this.#guest.writesThrough =
      (!this.#writeback && canChoose) || (!frontend.has(Feature.flush) && !frontend.has(Feature.configWce));
  }

  *#startRing(queue: GuestQueue): Script {
    yield* this.#frontend.startRing(queue);
    this.#guest.started(queue, true);
  }

  *#stopRing(queue: GuestQueue): Script {
    queue.isBeingStopped = true;
    const base = yield* this.#frontend.stopRing(queue);
    queue.isBeingStopped = false;
    this.#guest.started(queue, false);
    this.#checkDrained(queue, base);
  }

  /** What a stopped ring took is answered, visibly. */
  #checkDrained(queue: GuestQueue, base: number): void {
    if (!queue.ring.stoppedAt(base)) {
      throw new Violation(`queue ${queue.index} stopped at ${base}, with answers up to ${queue.ring.base}`);
    }
    this.#guest.take(queue);
  }

  *#control(control: Control, queue: GuestQueue): Script {
    const frontend = this.#frontend;
    const { queues } = this.#guest;
    switch (control) {
      case 'reconnect':
      case 'detach':
        // A ring that does not tell where it is, is asked first.
        if (control === 'reconnect' && this.#canGoOn) for (const one of queues) this.#guest.started(one, false);
        else for (const one of queues) yield* this.#stopRing(one);
        frontend.hangUp();
        yield* this.#connect();
        break;
      case 'restartRing':
        yield* this.#stopRing(queue);
        yield* this.#startRing(queue);
        break;
      case 'resetRings':
        for (const one of queues) yield* this.#stopRing(one);
        this.#resetRings();
        for (const one of queues) yield* this.#startRing(one);
        break;
      case 'memory':
        yield* frontend.shareMemoryTable();
        yield* frontend.barrier();
        break;
      case 'plug':
        yield* this.#plug();
        break;
      case 'call':
        // As a monitor does that masks an interrupt: what is due meanwhile goes to a descriptor that nobody looks at.
        queue.isMasked = true;
        for (let turns = this.#random.guest.below(20); turns > 0; turns--) yield;
        native.fileClose(queue.callFd);
        queue.callFd = check(native.eventfdCreate(), 'make a call descriptor');
        yield* frontend.setCall(queue);
        queue.isMasked = false;
        this.#guest.mayBeCalled = true;
        break;
      case 'writeback':
        this.#writeback = !this.#writeback;
        if (this.#writeback) this.#guest.endWriteThrough();
        yield* this.#settleWriteback();
        break;
    }
  }

  /** The extra memory comes or goes: the guest uses it while it is there, which it is before and after the guest does. */
  *#plug(): Script {
    const { ram } = this.#guest;
    if (!ram.isPlugged) {
      ram.isPlugged = true;
      yield* this.#frontend.changeMemory(ram.extra, true);
      this.#guest.usesExtra = true;
      return;
    }
    this.#guest.usesExtra = false;
    while (!this.#guest.isExtraFree) yield;
    ram.isPlugged = false;
    yield* this.#frontend.changeMemory(ram.extra, false);
  }

  // ---- What the parts see of each other

  #guestWorld() {
    return {
      nowUs: () => this.#timeline.nowUs(),
      faultyUs: () => this.#faultyUs,
      kicked: (kickFd: number) => {
        this.#kicked.add(kickFd);
        for (const fd of this.#process.descriptorsOf(kickFd)) this.#daemon?.ring.raise(fd, POLLIN);
      },
      trace: (kind: 'request' | 'answer' | 'kick' | 'call', ...numbers: readonly number[]) =>
        this.trace.add(this.#timeline.nowUs(), kind, ...(numbers as [number])),
    };
  }

  #frontendWorld() {
    const raise = (wire: Wire, events: number): void => {
      const fd = this.#process.socketOf(wire);
      if (fd !== undefined) this.#daemon?.ring.raise(fd, events);
    };
    return {
      socketPath: this.#host.socketPath,
      connected: (wire: Wire) => {
        this.#process.connected(wire);
        if (this.#daemon !== null) this.#daemon.ring.raise(this.#daemon.listenFd, POLLIN);
      },
      sent: (wire: Wire) => raise(wire, POLLIN),
      hungUp: (wire: Wire) => raise(wire, HANG_UP),
      trace: (kind: 'message' | 'reply' | 'connect' | 'hangUp', a = 0, b = 0, c = 0) =>
        this.trace.add(this.#timeline.nowUs(), kind, a, b, c),
    };
  }
}

/** It holds anything at first. */
function otherDisk(sectors: number, canZeroRange: boolean) {
  const sizeBytes = sectors * SECTOR_BYTES;
  const fd = check(native.memfdCreate('sim-other', sizeBytes), 'make a file');
  const disk = new SimDisk(sizeBytes, new Uint8Array(sizeBytes).fill(0xee));
  disk.canZeroRange = canZeroRange;
  return { disk, fd, inode: checkObject(native.fileStat(fd), 'stat the file').inode };
}

const HANG_UP = POLLIN | POLLHUP | POLLRDHUP;
