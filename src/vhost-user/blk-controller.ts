/** One virtual disk exported on one socket: listens, and lets in one front-end at a time. */
import { rmSync } from 'node:fs';
import { EAGAIN, EINVAL, POLLIN, check, checkObject, native } from '../../native/index.js';
import type { PeerCredentials } from '../../native/index.js';
import type { BdevUser, IoChannel, OpenBdev } from '../bdev/bdev.js';
import type { Reactor } from '../poller/reactor.js';
import { FdWatch } from '../poller/fd-watch.js';
import { BlkDevice } from './blk-device.js';
import type { BlkDeviceOptions } from './blk-device.js';
import { ControllerStat, newControllerStats } from './controller-stats.js';
import type { LogFunction } from './log.js';
import { mayConnect } from './peer-rules.js';
import type { PeerRules } from './peer-rules.js';
import { FeatureHi, FeatureLo } from './protocol.js';
import { Session } from './session.js';

export type { LogFunction } from './log.js';

export interface BlkControllerOptions extends BlkDeviceOptions {
  readonly name: string;
  /** How long a message may take to come: see MessageDeadline. For ever when left out. */
  readonly messageTimeoutUs?: number;
}

/** A socket to make, or a descriptor of one: listening or connected. */
export type ListenAddress =
  /** @param gid group of the file; the kernel's choice when left out */
  { readonly socketPath: string; readonly mode: number; readonly gid?: number } | { readonly fd: number };

export interface BlkControllerInfo {
  readonly name: string;
  readonly bdev: string;
  readonly state: 'idle' | 'listening' | 'connected' | 'closing' | 'closed';
  readonly socketPath: string | null;
  readonly peer: PeerCredentials | null;
  readonly queuesRunning: number;
  readonly inflight: number;
  /** Features of the front-end now connected. */
  readonly features: readonly string[];
  readonly writeback: boolean;
  readonly guestMemoryBytes: number;
  readonly faults: readonly string[];
}

export class BlkController implements BdevUser {
  readonly name: string;
  /** Counters in shared memory: see controller-stats.ts. */
  readonly stats = newControllerStats();
  /** For a connected socket that was handed in: the front-end left, nobody else can come. */
  onClosedByPeer: (() => void) | null = null;

  readonly #reactor: Reactor;
  #open: OpenBdev;
  readonly #device: BlkDevice;
  readonly #log: LogFunction;
  readonly #messageTimeoutUs: number;
  #peers: PeerRules | null = null;
  #state: BlkControllerInfo['state'] = 'idle';
  #socketPath: string | null = null;
  #listenFd = -1;
  #listenWatch: FdWatch | null = null;
  #session: Session | null = null;
  /** Accepted while the session before it was there. */
  #waitingFd = -1;
  #peer: PeerCredentials | null = null;
  #whenClosed: (() => void)[] = [];

  constructor(reactor: Reactor, open: OpenBdev, options: BlkControllerOptions, log: LogFunction) {
    this.name = options.name;
    this.#reactor = reactor;
    this.#open = open;
    this.#device = new BlkDevice(open, options, this.stats);
    this.#log = log;
    this.#messageTimeoutUs = options.messageTimeoutUs ?? Infinity;
  }

  /**
   * Starts to listen, or to serve. Throws SystemError. Called once.
   * @param peers who may connect, null for whoever gets at the socket; a connected socket that is handed in is not asked
   */
  listen(address: ListenAddress, peers: PeerRules | null = null): void {
    if (this.#state !== 'idle') throw new Error(`controller ${this.name} listens already`);
    this.#peers = peers;
    let connected = false;
    if ('fd' in address) {
      check(native.socketSetNonblocking(address.fd), `use descriptor ${address.fd}`);
      const first = native.socketAccept(address.fd);
      if (first === -EINVAL) connected = true;
      else if (first >= 0) this.#startUnlessDenied(first);
      else if (first !== -EAGAIN) check(first, `accept on descriptor ${address.fd}`);
      if (!connected) this.#listenFd = address.fd;
    } else {
      const { socketPath, mode, gid } = address;
      const fd = gid === undefined ? native.socketListen(socketPath, mode) : native.socketListen(socketPath, mode, gid);
      this.#listenFd = check(fd, `listen on ${socketPath}`);
      this.#socketPath = socketPath;
    }
    if (connected) {
      const { fd } = address as { fd: number };
      this.#startSession(fd, peerOf(fd));
      return;
    }
    if (this.#session === null) this.#state = 'listening';
    this.#listenWatch = new FdWatch(this.#reactor.ring, this.#listenFd, POLLIN, () => this.#acceptAll());
  }

  /** What it serves. */
  get open(): OpenBdev {
    return this.#open;
  }

  /** See BdevUser. */
  route(channel: IoChannel): void {
    this.#device.channel = channel;
  }

  /** See BdevUser. */
  moveTo(open: OpenBdev): void {
    this.#log('info', 'the disk is another bdev now', { from: this.#open.bdev.name, to: open.bdev.name });
    this.#open = open;
    this.#device.moveTo(open);
  }

  info(): BlkControllerInfo {
    const session = this.#session;
    const faults = (session?.vrings ?? [])
      .filter((vring) => vring.fault !== null)
      .map((vring) => `ring ${vring.index}: ${vring.fault}`);
    return {
      name: this.name,
      bdev: this.#device.bdev.name,
      state: this.#state,
      socketPath: this.#socketPath,
      peer: this.#peer,
      queuesRunning: session?.queuesRunning ?? 0,
      inflight: session?.inflight ?? 0,
      features: session === null ? [] : featureNames(this.#device.featuresLo, this.#device.featuresHi),
      writeback: this.#device.writeback,
      guestMemoryBytes: session?.memory.sizeBytes ?? 0,
      faults,
    };
  }

  /** Takes no more requests, lets those in flight finish, closes session, socket and bdev. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#state === 'closed') {
        resolve();
        return;
      }
      this.#whenClosed.push(resolve);
      this.#state = 'closing';
      this.#stopListening();
      if (this.#session === null) this.#closed();
      else this.#session.end('the daemon is stopping');
    });
  }

  #acceptAll(): void {
    // One at a time: whoever comes while another is undecided waits in the backlog.
    while (this.#listenFd >= 0 && this.#waitingFd < 0) {
      const fd = native.socketAccept(this.#listenFd);
      if (fd < 0) {
        if (fd !== -EAGAIN) this.#log('error', 'accept failed', { errno: -fd });
        return;
      }
      if (this.#session === null) {
        this.#startUnlessDenied(fd);
        continue;
      }
      if (this.#isDenied(fd, peerOf(fd))) continue;
      this.#waitingFd = fd;
      // The front-end before may have left, which is seen in this step at the latest.
      this.#reactor.defer(() => this.#decideWaiting());
    }
  }

  /**
   * Somebody connected while a session was there. While that session drains the newcomer waits: to be turned away would
   * stop a QEMU that reconnects from ever trying again.
   */
  #decideWaiting(): void {
    if (this.#waitingFd < 0) return;
    this.#session?.serve();
    // Served already, or about to be.
    if (this.#waitingFd < 0 || this.#session === null || this.#session.ending) return;
    const turnedAway = peerOf(this.#waitingFd);
    this.stats[ControllerStat.frontEndsTurnedAway]!++;
    this.#log('warn', 'a second front-end was turned away', { connected: this.#peer, turnedAway });
    native.fileClose(this.#waitingFd);
    this.#waitingFd = -1;
    this.#acceptAll();
  }

  #startUnlessDenied(fd: number): void {
    const peer = peerOf(fd);
    if (!this.#isDenied(fd, peer)) this.#startSession(fd, peer);
  }

  /** Whether this process may not connect: then its socket is closed. */
  #isDenied(fd: number, peer: PeerCredentials): boolean {
    if (this.#peers === null || mayConnect(this.#peers, fd, peer)) return false;
    this.stats[ControllerStat.peersDenied]!++;
    this.#log('warn', 'a front-end was denied: neither its user nor a group of its is allowed', { ...peer });
    native.fileClose(fd);
    return true;
  }

  #startSession(fd: number, peer: PeerCredentials): void {
    this.#peer = peer;
    this.#state = 'connected';
    this.stats[ControllerStat.sessions]!++;
    this.#log('info', 'front-end connected', { ...peer });
    this.#session = new Session(this.#device, this.#reactor, fd, this.#messageTimeoutUs, this.#log, () =>
      this.#sessionEnded(),
    );
  }

  #sessionEnded(): void {
    this.#session = null;
    this.#peer = null;
    if (this.#state === 'closing') {
      this.#closed();
      return;
    }
    if (this.#listenFd < 0) {
      this.onClosedByPeer?.();
      return;
    }
    this.#state = 'listening';
    const waiting = this.#waitingFd;
    this.#waitingFd = -1;
    if (waiting >= 0) this.#startSession(waiting, peerOf(waiting));
    this.#reactor.defer(() => this.#acceptAll());
  }

  #stopListening(): void {
    if (this.#listenFd < 0) return;
    this.#listenWatch?.close();
    native.fileClose(this.#listenFd);
    this.#listenFd = -1;
    if (this.#waitingFd >= 0) native.fileClose(this.#waitingFd);
    this.#waitingFd = -1;
    // Somebody may have removed it before.
    if (this.#socketPath !== null) rmSync(this.#socketPath, { force: true });
  }

  #closed(): void {
    this.#device.close();
    this.#open.close();
    this.#state = 'closed';
    for (const resolve of this.#whenClosed) resolve();
    this.#whenClosed = [];
    this.#reactor.endSlice();
  }
}

function peerOf(fd: number): PeerCredentials {
  return checkObject(native.socketPeer(fd), 'read the credentials of the front-end');
}

function featureNames(lo: number, hi: number): string[] {
  const names: string[] = [];
  for (const [name, bit] of Object.entries(FeatureLo)) if ((lo & bit) !== 0) names.push(name);
  for (const [name, bit] of Object.entries(FeatureHi)) if ((hi & bit) !== 0) names.push(name);
  return names;
}
