/**
 * One front-end's connection: the vhost-user state machine from connect to disconnect, over one disk.
 *
 * Invariants
 * - Messages are carried out one at a time, in order. One that must wait for requests in flight (memory changes,
 *   GET_VRING_BASE) holds up the ones behind it.
 * - Memory is unmapped, and a ring let go, only when no request of theirs is in flight.
 * - Whatever the front-end does wrong ends its own session: ProtocolError, logged, counted; never an exception beyond it.
 * - Each descriptor received is owned by exactly one of: the message, a vring, nobody (closed).
 */
import { POLLHUP, POLLIN, SystemError, native } from '../../native/index.js';
import type { Reactor } from '../poller/reactor.js';
import { FdWatch } from '../poller/fd-watch.js';
import type { Timer } from '../poller/poller.js';
import { BackendChannel } from './backend-channel.js';
import type { BlkDevice } from './blk-device.js';
import { DeviceStateTransfer } from './device-state.js';
import { DirtyLog } from './dirty-log.js';
import { ControllerStat } from './controller-stats.js';
import { adoptChannel, adoptEventfd, adoptSocket } from './received-descriptor.js';
import { GuestMemory } from './guest-memory.js';
import { InflightRegion, createInflightRegion, readInflight } from './inflight-region.js';
import { MessageDeadline } from './message-deadline.js';
import { MessageStream } from './message-stream.js';
import type { IncomingMessage } from './message-stream.js';
import type { LogFunction } from './log.js';
import {
  DEVICE_STATE_LOAD,
  DEVICE_STATE_NO_FD,
  DEVICE_STATE_SAVE,
  FeatureHi,
  FeatureLo,
  INFLIGHT_BYTES,
  MEM_SLOTS_MAX,
  MEM_TABLE_REGIONS_MAX,
  Message,
  ProtocolError,
  ProtocolFeature,
  VRING_INDEX_MASK,
  VRING_NO_FD,
  readRegion,
  readU64,
} from './protocol.js';
import { CONFIG_BYTES_MAX } from './virtio-blk.js';
import { VringPoller } from './vring-poller.js';
import { Vring } from './vring.js';

const POLLRDHUP = 0x2000;
const SOCKET_EVENTS = POLLIN | POLLRDHUP;
const HANGUP = POLLHUP | POLLRDHUP;
/** Messages carried out before others get their turn. */
const MESSAGES_PER_TURN = 64;
const OFFERED_PROTOCOL_FEATURES =
  ProtocolFeature.multiQueue |
  ProtocolFeature.logShmfd |
  ProtocolFeature.replyAck |
  ProtocolFeature.backendReq |
  ProtocolFeature.config |
  ProtocolFeature.inflightShmfd |
  ProtocolFeature.resetDevice |
  ProtocolFeature.configureMemSlots |
  ProtocolFeature.status |
  ProtocolFeature.deviceState;
/** How often a disk that another holds is asked for. */
const USE_RETRY_US = 50_000;
const DISCONNECTED = 'the front-end disconnected';
const CONFIG_HEADER_BYTES = 12;
/** Some front-ends ask for the device's configuration where PCI has it. */
const CONFIG_PCI_OFFSET = 0x100;
const CONFIG_FLAG_WRITABLE = 0;
/** vring address flag: log writes to the used ring. */
const VRING_FLAG_LOG = 1;

export class Session {
  readonly memory: GuestMemory;
  readonly vrings: Vring[] = [];

  readonly #device: BlkDevice;
  readonly #reactor: Reactor;
  readonly #stream: MessageStream;
  readonly #log: LogFunction;
  readonly #onEnd: () => void;
  readonly #socketWatch: FdWatch;
  #protocolFeatures = 0;
  /** As SET_INFLIGHT_FD brought it. */
  #inflightRegion: InflightRegion | null = null;
  /** As SET_LOG_BASE gave it; in force while LOG_ALL is acknowledged. */
  #dirtyLog: DirtyLog | null = null;
  /** Descriptor to signal with when the log was written to. */
  #logFd = -1;
  /** Virtio's device status, as the driver wrote it. */
  #status = 0;
  readonly #stateTransfer: DeviceStateTransfer;
  /** Holds the bdev's guard. */
  #isInUse = false;
  #waitsForDisk = false;
  readonly #retryTimer: Timer = { heapIndex: -1, dueUs: 0.5, onTimer: () => this.#startReady() };
  #backendChannel: BackendChannel | null = null;
  /** The configuration changed while the device was suspended, when nothing is to be said. */
  #configChanged = false;
  readonly #poller: VringPoller;
  /** What to do when the rings being drained have nothing in flight; null when nobody waits. */
  #whenDrained: (() => void) | null = null;
  #draining: readonly Vring[] = [];
  #ending = false;
  /** The front-end is gone; what it sent last may still be unread. */
  #hungUp = false;
  #turnDeferred = false;
  readonly #deadline: MessageDeadline;

  /**
   * @param fd connected socket, taken over
   * @param messageTimeoutUs see MessageDeadline
   * @param onEnd called once, when everything of the session is released
   */
  constructor(
    device: BlkDevice,
    reactor: Reactor,
    fd: number,
    messageTimeoutUs: number,
    log: LogFunction,
    onEnd: () => void,
  ) {
    this.#device = device;
    this.#reactor = reactor;
    this.#log = log;
    this.#onEnd = onEnd;
    // Nothing is negotiated yet, and until it is every write is made durable.
    device.acknowledge(0, 0);
    this.#stateTransfer = new DeviceStateTransfer(device);
    device.onConfigChange = () => this.#tellConfigChange();
    this.memory = new GuestMemory(reactor.arena, reactor.memory);
    this.#stream = new MessageStream(reactor.arena, fd);
    for (let i = 0; i < device.queues; i++) this.vrings.push(new Vring(i, device, this.memory, reactor.ring));
    this.#poller = new VringPoller(reactor, this.vrings);
    this.#poller.onMemoryFault = () => this.#checkMemory();
    this.#poller.start();
    this.#deadline = new MessageDeadline(reactor, messageTimeoutUs, () => this.#onMessageMissed());
    this.#socketWatch = new FdWatch(reactor.ring, fd, SOCKET_EVENTS, (events) => this.#onSocket(events));
  }

  /** Rings that requests are taken from. */
  get queuesRunning(): number {
    return this.#poller.running.length;
  }

  /** Requests in flight over all rings. */
  get inflight(): number {
    return this.vrings.reduce((sum, vring) => sum + (vring.queue?.inflight ?? 0), 0);
  }

  get ending(): boolean {
    return this.#ending;
  }

  #onSocket(events: number): void {
    if (this.#ending) return;
    if ((events & HANGUP) !== 0) this.#hungUp = true;
    this.serve();
  }

  /** Carries out the messages that are there. */
  serve(): void {
    try {
      for (let i = 0; i < MESSAGES_PER_TURN; i++) {
        if (this.#ending) return;
        if (this.#whenDrained !== null) {
          // No message is read while one waits, so the end of the stream is not seen. Nobody waits for the answer any more.
          if (this.#hungUp) this.end(DISCONNECTED);
          return;
        }
        const message = this.#stream.receive();
        if (message === null) {
          if (this.#stream.isMidMessage) this.#deadline.begin();
          return;
        }
        if (message === 'end') {
          this.end(DISCONNECTED);
          return;
        }
        this.#deadline.met();
        this.#device.stats[ControllerStat.messages]!++;
        try {
          this.#carryOut(message);
        } catch (error) {
          this.#refuse(message, error);
        }
      }
      this.#deferTurn();
    } catch (error) {
      this.#fail(error);
    }
  }

  #onMessageMissed(): void {
    this.#device.stats[ControllerStat.messageTimeouts]!++;
    this.#fail(new ProtocolError(`no whole message came within ${this.#deadline.limitUs / 1e6} s`));
  }

  /** A front-end that cut its memory file short made us touch what is not there: was it this one? */
  #checkMemory(): void {
    if (this.#ending) return;
    const at = this.#reactor.arena.lastFaultOffset;
    if (this.memory.holds(at)) {
      this.#fail(new ProtocolError('guest memory ends before its region does: its file was truncated'));
    } else if (this.#inflightRegion?.holds(at) === true) {
      this.#fail(new ProtocolError('the in-flight region ends before its size says: its file was truncated'));
    } else if (this.#dirtyLog?.holds(at) === true) {
      this.#fail(new ProtocolError('the dirty log is longer than its file, which was truncated'));
    }
  }

  /** Ends the session: takes no more requests, waits for those in flight, lets everything go. */
  end(reason: string): void {
    if (this.#ending) return;
    this.#ending = true;
    this.#log('info', 'session ended', { reason });
    this.#socketWatch.close();
    this.#deadline.met();
    this.#device.onConfigChange = null;
    this.#backendChannel?.close();
    this.#backendChannel = null;
    this.#poller.running = [];
    // A message that waits for the drain is dropped: its sender is gone.
    this.#drain(this.vrings, () => {
      this.#poller.stop();
      for (const vring of this.vrings) {
        vring.stop();
        vring.close();
      }
      this.#releaseDisk();
      this.#stateTransfer.close();
      this.#dirtyLog?.close();
      if (this.#logFd >= 0) native.fileClose(this.#logFd);
      this.memory.clear();
      this.#inflightRegion?.close();
      this.#stream.close();
      this.#onEnd();
    });
  }

  #fail(error: unknown): void {
    if (!(error instanceof ProtocolError || error instanceof SystemError)) throw error;
    this.#device.stats[ControllerStat.sessionFaults]!++;
    this.#log('warn', 'session failed', { error: error.message });
    this.end(error.message);
  }

  #deferTurn(): void {
    if (this.#turnDeferred) return;
    this.#turnDeferred = true;
    this.#reactor.defer(() => {
      this.#turnDeferred = false;
      this.serve();
    });
  }

  /** Runs `then` as soon as none of the rings has a request in flight; no requests are taken from them meanwhile. */
  #drain(vrings: readonly Vring[], then: () => void): void {
    this.#draining = vrings;
    for (const vring of vrings) if (vring.running) vring.queue!.takeRecovered();
    this.#poller.running = this.#poller.running.filter((vring) => !vrings.includes(vring));
    for (const vring of vrings) if (vring.queue !== null) vring.queue.onIdle = () => this.#drained();
    this.#whenDrained = then;
    this.#drained();
  }

  #drained(): void {
    const then = this.#whenDrained;
    if (then === null || this.#draining.some((vring) => (vring.queue?.inflight ?? 0) > 0)) return;
    for (const vring of this.#draining) if (vring.queue !== null) vring.queue.onIdle = null;
    this.#draining = [];
    this.#whenDrained = null;
    then();
  }

  /** Drains, does what the message asks, answers it, and goes on with the messages behind it. */
  #drainFor(message: IncomingMessage, vrings: readonly Vring[], then: () => void): void {
    let synchronous = true;
    this.#drain(vrings, () => {
      try {
        then();
        this.#updateRunning();
        this.#acknowledge(message);
      } catch (error) {
        this.#updateRunning();
        this.#refuse(message, error);
      }
      if (!synchronous && !this.#ending) this.#deferTurn();
    });
    synchronous = false;
  }

  #carryOut(message: IncomingMessage): void {
    const words = this.#stream.words;
    switch (message.id) {
      case Message.getFeatures:
        this.#stream.replyU64(message.id, this.#device.offeredLo, this.#device.offeredHi);
        break;
      case Message.setFeatures:
        this.#setFeatures(words[0]!, words[1]!);
        break;
      case Message.getProtocolFeatures:
        this.#stream.replyU64(message.id, OFFERED_PROTOCOL_FEATURES, 0);
        break;
      case Message.setProtocolFeatures:
        if ((words[0]! & ~OFFERED_PROTOCOL_FEATURES) !== 0 || words[1] !== 0) {
          throw new ProtocolError('SET_PROTOCOL_FEATURES: features that were not offered');
        }
        this.#protocolFeatures = words[0]!;
        break;
      case Message.setOwner:
      case Message.resetOwner:
        // One front-end owns the session anyway; RESET_OWNER is deprecated and to be ignored.
        break;
      case Message.getQueueNum:
        this.#stream.replyU64(message.id, this.#device.queues, 0);
        break;
      case Message.getInflightFd:
        this.#getInflightFd();
        break;
      case Message.setInflightFd:
        this.#setInflightFd();
        break;
      case Message.getMaxMemSlots:
        this.#stream.replyU64(message.id, MEM_SLOTS_MAX, 0);
        break;
      case Message.setBackendReqFd:
        this.#setBackendReqFd(message);
        break;
      case Message.getConfig:
        this.#getConfig(message);
        break;
      case Message.setConfig:
        this.#setConfig(message);
        break;
      case Message.setMemTable:
        this.#setMemTable(message);
        return;
      case Message.setLogBase:
        this.#setLogBase(message);
        break;
      case Message.resetDevice:
        this.#require(ProtocolFeature.resetDevice, message);
        this.#reset(message);
        return;
      case Message.setStatus:
        this.#require(ProtocolFeature.status, message);
        this.#setStatus(words[0]!, words[1]!);
        break;
      case Message.getStatus:
        this.#require(ProtocolFeature.status, message);
        this.#stream.replyU64(message.id, this.#status, 0);
        break;
      case Message.setDeviceStateFd:
        this.#require(ProtocolFeature.deviceState, message);
        this.#stream.replyU64(message.id, DEVICE_STATE_NO_FD | (this.#transferState() ? 0 : 1), 0);
        break;
      case Message.checkDeviceState:
        this.#require(ProtocolFeature.deviceState, message);
        this.#stream.replyU64(message.id, this.#stateTransfer.check() ? 0 : 1, 0);
        this.#inflightRegion?.keepWriteback(this.#device.writeback);
        break;
      case Message.setLogFd:
        this.#setLogFd();
        break;
      case Message.addMemReg:
        this.memory.add(readRegion(words, 2), this.#stream.fd(0));
        this.#startReady();
        break;
      case Message.remMemReg:
        this.#removeRegion(message);
        return;
      case Message.getVringBase:
        this.#getVringBase(message);
        return;
      case Message.setVringNum:
        this.#vring(words[0]!).setSize(words[1]!);
        this.#startReady();
        break;
      case Message.setVringBase:
        this.#vring(words[0]!).setBase(words[1]!);
        break;
      case Message.setVringAddr:
        this.#setVringAddr();
        break;
      case Message.setVringEnable:
        this.#setVringEnable(words[0]!, words[1]!);
        break;
      case Message.setVringKick:
        this.#setKick();
        break;
      case Message.setVringCall: {
        const vring = this.#vringOfFdMessage();
        vring.setCall(this.#takeVringFd());
        break;
      }
      case Message.setVringErr: {
        const vring = this.#vringOfFdMessage();
        vring.setErr(this.#takeVringFd());
        break;
      }
      default:
        throw new ProtocolError(`${message.shape.name} is not supported`);
    }
    this.#acknowledge(message);
  }

  /** The message was carried out: says so if asked to, and lets go of it. */
  #acknowledge(message: IncomingMessage): void {
    if (this.#wantsAck(message)) this.#stream.replyU64(message.id, 0, 0);
    this.#stream.finish();
  }

  #wantsAck(message: IncomingMessage): boolean {
    return message.needReply && !message.shape.replies && (this.#protocolFeatures & ProtocolFeature.replyAck) !== 0;
  }

  /** The message was well-formed but cannot be carried out: the front-end hears of it if it asked to, else the session ends. */
  #refuse(message: IncomingMessage, error: unknown): void {
    if (!this.#wantsAck(message) || !(error instanceof ProtocolError || error instanceof SystemError)) {
      this.#fail(error);
      return;
    }
    this.#log('warn', 'message refused', { message: message.shape.name, error: error.message });
    try {
      this.#stream.replyU64(message.id, 1, 0);
      this.#stream.finish();
    } catch (sendError) {
      this.#fail(sendError);
    }
  }

  #setFeatures(lo: number, hi: number): void {
    const device = this.#device;
    if ((lo & ~device.offeredLo) !== 0 || (hi & ~device.offeredHi) !== 0) {
      throw new ProtocolError('SET_FEATURES: features that were not offered');
    }
    const isRunning = this.vrings.some((vring) => vring.queue !== null);
    const changed = (lo ^ device.featuresLo) & ~FeatureLo.logAll;
    if (isRunning && (changed !== 0 || hi !== device.featuresHi)) {
      throw new ProtocolError('SET_FEATURES: other features while rings are started');
    }
    device.acknowledge(lo, hi);
    this.#applyDirtyLog();
    this.#startReady();
  }

  #setLogBase(message: IncomingMessage): void {
    this.#require(ProtocolFeature.logShmfd, message);
    const words = this.#stream.words;
    const sizeBytes = readU64(words, 0, 'log size');
    const log = new DirtyLog(this.memory, this.#stream.fd(0), sizeBytes, readU64(words, 2, 'log offset'));
    log.onOverrun = (address) => this.#overrun(address);
    log.signalFd = this.#logFd;
    this.#dirtyLog?.close();
    this.#dirtyLog = log;
    this.#applyDirtyLog();
    this.#updateRunning();
    this.#stream.replyPayload(message.id, 16);
  }

  #setLogFd(): void {
    adoptEventfd(this.#stream.fd(0));
    if (this.#logFd >= 0) native.fileClose(this.#logFd);
    this.#logFd = this.#stream.takeFd(0);
    if (this.#dirtyLog !== null) this.#dirtyLog.signalFd = this.#logFd;
  }

  /** All rings are stopped: nothing is written to the guest, and nothing said unasked. */
  get #isSuspended(): boolean {
    return this.vrings.every((vring) => vring.queue === null);
  }

  /**
   * The last ring was stopped. Nobody reads the dirty log any more: when rings start again with logging on, a new one has to come
   * first. And another may have the disk.
   */
  #suspended(): void {
    this.#dirtyLog?.close();
    this.#dirtyLog = null;
    this.#applyDirtyLog();
    this.#releaseDisk();
  }

  /**
   * Keeps the status, which says nothing to this device that other messages do not. A status of 0 takes back the others and no more:
   * QEMU 7.2 sends it before it asks running rings for their positions, which have to be the right ones.
   */
  #setStatus(lo: number, hi: number): void {
    if (lo > 0xff || hi !== 0) throw new ProtocolError('SET_STATUS: more than a byte');
    // VIRTIO 1.2, 2.1.1: bits are taken back by a reset only.
    if (lo !== 0 && (this.#status & ~lo) !== 0) throw new ProtocolError('SET_STATUS: takes bits back without a reset');
    this.#status = lo;
  }

  /**
   * Stops all rings once their requests are answered, and forgets what the driver negotiated. Memory, descriptors to signal with
   * and the cache mode stay: they are the front-end's, which does not say them again.
   */
  #reset(message: IncomingMessage): void {
    this.#drainFor(message, this.vrings, () => {
      for (const vring of this.vrings) vring.reset();
      this.#suspended();
      this.#device.acknowledge(0, 0);
      this.#status = 0;
    });
  }

  /** Saves the state to the channel of the message, or remembers to load it from there. @returns whether that was possible */
  #transferState(): boolean {
    const [direction, phase] = this.#stream.words;
    const isKnown = (direction === DEVICE_STATE_SAVE || direction === DEVICE_STATE_LOAD) && phase === 0;
    if (!isKnown || !this.#isSuspended) return false;
    adoptChannel(this.#stream.fd(0));
    const fd = this.#stream.takeFd(0);
    if (direction === DEVICE_STATE_SAVE) return this.#stateTransfer.save(fd);
    this.#stateTransfer.load(fd);
    return true;
  }

  #applyDirtyLog(): void {
    const log = this.#device.has(FeatureLo.logAll) ? this.#dirtyLog : null;
    for (const vring of this.vrings) vring.setDirtyLog(log);
  }

  /** A write to guest memory could not be logged: a migration would lose it. */
  #overrun(guestAddress: number): void {
    this.#reactor.defer(() => {
      if (!this.#ending) this.#fail(new ProtocolError(`the dirty log does not cover guest address ${guestAddress}`));
    });
  }

  /** Writes to guest memory are to be logged and there is no log yet: nothing may be written until it comes. */
  get #lacksLog(): boolean {
    const canHaveLog = (this.#protocolFeatures & ProtocolFeature.logShmfd) !== 0;
    return canHaveLog && this.#dirtyLog === null && this.#device.has(FeatureLo.logAll);
  }

  /** Throws when a message was sent for which a protocol feature lacks. */
  #require(feature: number, message: IncomingMessage): void {
    if ((this.#protocolFeatures & feature) !== 0) return;
    throw new ProtocolError(`${message.shape.name}: its protocol feature was not negotiated`);
  }

  #getConfig(message: IncomingMessage): void {
    const words = this.#stream.words;
    const size = words[1]!;
    let offset = words[0]!;
    if (offset === CONFIG_PCI_OFFSET) offset = 0;
    if (size !== message.payloadBytes - CONFIG_HEADER_BYTES) {
      // An empty payload is how this message says no.
      this.#stream.replyPayload(message.id, 0);
      return;
    }
    const config = this.#device.config();
    for (let i = 0; i < size; i++) {
      const at = offset + i;
      this.#stream.bytes[CONFIG_HEADER_BYTES + i] = at < CONFIG_BYTES_MAX ? config[at]! : 0;
    }
    this.#stream.replyPayload(message.id, message.payloadBytes);
  }

  #setConfig(message: IncomingMessage): void {
    const words = this.#stream.words;
    const size = words[1]!;
    if (size !== message.payloadBytes - CONFIG_HEADER_BYTES)
      throw new ProtocolError('SET_CONFIG: size and payload differ');
    const bytes = this.#stream.bytes.slice(CONFIG_HEADER_BYTES, CONFIG_HEADER_BYTES + size);
    if (words[2] !== CONFIG_FLAG_WRITABLE || !this.#device.writeConfig(words[0]!, bytes)) {
      throw new ProtocolError(`SET_CONFIG: ${size} bytes at ${words[0]} may not be written`);
    }
    this.#inflightRegion?.keepWriteback(this.#device.writeback);
  }

  #setBackendReqFd(message: IncomingMessage): void {
    this.#require(ProtocolFeature.backendReq, message);
    adoptSocket(this.#stream.fd(0));
    this.#backendChannel?.close();
    const needsReply = (this.#protocolFeatures & ProtocolFeature.replyAck) !== 0;
    const channel = new BackendChannel(this.#reactor, this.#stream.takeFd(0), needsReply);
    channel.onFault = (error) => this.#fail(error);
    channel.onRefusal = () => this.#log('warn', 'the front-end could not use the changed configuration');
    this.#backendChannel = channel;
  }

  /** A suspended device, all rings of which are stopped, sends no messages: it is told at the next start. */
  #tellConfigChange(): void {
    if ((this.#protocolFeatures & ProtocolFeature.config) === 0) return;
    this.#configChanged = this.#isSuspended;
    if (!this.#configChanged) this.#backendChannel?.configChanged();
  }

  #setMemTable(message: IncomingMessage): void {
    const words = this.#stream.words;
    const count = words[0]!;
    if (count > MEM_TABLE_REGIONS_MAX || message.payloadBytes !== 8 + 32 * count || this.#stream.fdCount !== count) {
      throw new ProtocolError(`SET_MEM_TABLE: ${count} regions, ${this.#stream.fdCount} descriptors`);
    }
    this.#drainFor(message, this.vrings, () => {
      for (const vring of this.vrings) vring.suspend();
      this.memory.clear();
      try {
        for (let i = 0; i < count; i++) this.memory.add(readRegion(words, 2 + 8 * i), this.#stream.fd(i));
      } catch (error) {
        // Half a table is none.
        this.memory.clear();
        throw error;
      }
      this.#startReady();
    });
  }

  #removeRegion(message: IncomingMessage): void {
    const description = readRegion(this.#stream.words, 2);
    if (!this.memory.has(description)) throw new ProtocolError('REM_MEM_REG: there is no such region');
    this.#drainFor(message, this.vrings, () => {
      for (const vring of this.vrings) vring.suspend();
      this.memory.remove(description);
      this.#startReady();
    });
  }

  #getVringBase(message: IncomingMessage): void {
    const vring = this.#vring(this.#stream.words[0]!);
    this.#drainFor(message, [vring], () => {
      this.#stream.words[1] = vring.stop();
      if (this.#isSuspended) this.#suspended();
      this.#stream.replyPayload(message.id, 8);
      // Not before the front-end has the answer, wherever this process ends.
      vring.retireInflight();
    });
  }

  #getInflightFd(): void {
    const { words } = this.#stream;
    const { fd, sizeBytes } = createInflightRegion(readInflight(words), this.#device.ringKind, this.#device.queues);
    words[0] = sizeBytes;
    words.fill(0, 1, 4);
    try {
      this.#stream.replyPayload(Message.getInflightFd, INFLIGHT_BYTES, Int32Array.of(fd));
    } finally {
      native.fileClose(fd);
    }
  }

  #setInflightFd(): void {
    if (this.vrings.some((vring) => vring.queue !== null)) {
      throw new ProtocolError('SET_INFLIGHT_FD while rings are started');
    }
    const { arena } = this.#reactor;
    const description = readInflight(this.#stream.words);
    const region = new InflightRegion(
      arena,
      this.#stream.fd(0),
      description,
      this.#device.ringKind,
      this.#device.queues,
    );
    this.#inflightRegion?.close();
    this.#inflightRegion = region;
    // What the guest relies on counts, not how this process was configured.
    const { writeback } = region;
    if (writeback !== null) this.#device.writeback = writeback;
    else region.keepWriteback(this.#device.writeback);
    for (const vring of this.vrings) vring.inflightRegion = region;
  }

  #setVringAddr(): void {
    const words = this.#stream.words;
    const flags = words[1]!;
    if (flags > VRING_FLAG_LOG) throw new ProtocolError(`SET_VRING_ADDR: flags ${flags}`);
    if (flags !== 0 && (this.#protocolFeatures & ProtocolFeature.logShmfd) === 0) {
      throw new ProtocolError('SET_VRING_ADDR: logging was not negotiated');
    }
    const addresses = {
      descriptors: readU64(words, 2, 'descriptor table address'),
      used: readU64(words, 4, 'used ring address'),
      available: readU64(words, 6, 'available ring address'),
    };
    this.#vring(words[0]!).setAddresses(addresses, flags === 0 ? null : readU64(words, 8, 'log address'));
    this.#startReady();
  }

  #setVringEnable(index: number, value: number): void {
    if (!this.#device.has(FeatureLo.protocolFeatures)) {
      throw new ProtocolError('SET_VRING_ENABLE without protocol features');
    }
    if (value > 1) throw new ProtocolError(`SET_VRING_ENABLE: value ${value}`);
    this.#vring(index).enabled = value === 1;
    this.#startReady();
  }

  #setKick(): void {
    const vring = this.#vringOfFdMessage();
    vring.setKick(this.#takeVringFd());
    this.#startReady();
  }

  #vring(index: number): Vring {
    const vring = this.vrings[index];
    if (vring === undefined) throw new ProtocolError(`ring ${index} does not exist: there are ${this.#device.queues}`);
    return vring;
  }

  #vringOfFdMessage(): Vring {
    const lo = this.#stream.words[0]!;
    if (this.#stream.words[1] !== 0 || (lo & ~(VRING_INDEX_MASK | VRING_NO_FD)) !== 0) {
      throw new ProtocolError('a ring index with bits that mean nothing');
    }
    const hasFd = (lo & VRING_NO_FD) === 0;
    if (hasFd !== (this.#stream.fdCount === 1)) throw new ProtocolError('a descriptor is missing, or one too many');
    return this.#vring(lo & VRING_INDEX_MASK);
  }

  #takeVringFd(): number {
    if (this.#stream.fdCount === 0) return -1;
    adoptEventfd(this.#stream.fd(0));
    return this.#stream.takeFd(0);
  }

  /**
   * Takes the disk into use, which another may still hold: the source of a migration until its rings are stopped. Then the rings
   * wait, and it is tried again.
   */
  #useDisk(): boolean {
    const { guard } = this.#device.bdev;
    if (this.#isInUse || guard === undefined) return true;
    const reason = guard.acquire();
    this.#isInUse = reason === null;
    if (reason !== null) {
      if (!this.#waitsForDisk) this.#log('warn', 'rings wait for the disk', { reason });
      for (const vring of this.vrings) vring.hold(reason);
      this.#reactor.schedule(this.#retryTimer, USE_RETRY_US);
    }
    this.#waitsForDisk = reason !== null;
    return this.#isInUse;
  }

  /** All rings are stopped: nobody is to be kept from the disk. */
  #releaseDisk(): void {
    this.#reactor.cancel(this.#retryTimer);
    if (this.#isInUse) this.#device.bdev.guard!.release();
    this.#isInUse = false;
  }

  /** Starts the rings that have all they need. */
  #startReady(): void {
    if (this.vrings.some((vring) => vring.isReady) && !this.#useDisk()) return;
    const hasVersion1 = (this.#device.featuresHi & FeatureHi.version1) !== 0;
    for (const vring of this.vrings) {
      if (!vring.startIfReady()) continue;
      this.#log('debug', 'ring started', {
        ring: vring.index,
        size: vring.queue!.virtqueue.size,
        legacy: !hasVersion1,
      });
      const resubmitted = vring.queue!.virtqueue.recoveredCount;
      this.#device.stats[ControllerStat.resubmitted]! += resubmitted;
      if (resubmitted > 0) {
        this.#log('info', 'requests in flight before the restart are done again', { ring: vring.index, resubmitted });
      }
      vring.queue!.onFault = (fault) => {
        this.#log('warn', 'the guest broke a ring', { ring: vring.index, fault });
        vring.signalErr();
      };
    }
    this.#updateRunning();
  }

  #updateRunning(): void {
    if (this.#configChanged) this.#tellConfigChange();
    const mayRun = !this.#ending && !this.#lacksLog;
    this.#poller.running = mayRun ? this.vrings.filter((vring) => vring.running) : [];
  }
}
