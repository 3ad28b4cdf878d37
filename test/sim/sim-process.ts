/**
 * The daemon's process as the kernel sees it: the descriptors and the memory that it holds, and what `kill -9` does to both. The
 * daemon runs in this very process, so its calls are told from those of the simulated world by who is running.
 *
 * Invariants
 * - While `run` runs, what is opened belongs to the daemon; within `outside` it does not.
 * - Memory that the daemon has released stays mapped, empty, until `reclaim`: what touches it is found instead of ending the run.
 */
import { Arena, native } from '../../native/index.js';

const PAGE_BYTES = 4096;

/** A socket between front-end and daemon: descriptors on their way, in order. */
export interface Wire {
  readonly passing: number[];
  /** The front-end has closed its end. */
  isClosed: boolean;
}

/** A use of memory that was given back. */
export class StrayAccess extends Error {}

export class SimArena extends Arena {
  /** Length by offset, of what the daemon holds. */
  readonly #held = new Map<number, number>();
  readonly #released = new Map<number, number>();
  /** Where files are mapped: memory that others see. */
  readonly #shared = new Set<number>();
  /** Called before each store to shared memory by a view that was made since it was set. May throw to end the daemon. */
  onStore: (() => void) | null = null;

  override allocate(lengthBytes: number, alignment?: number): number {
    return this.#hold(super.allocate(lengthBytes, alignment), lengthBytes);
  }

  /** What is mapped never touches what is mapped next, so that an access across its end is seen. */
  override mapFile(fd: number, fileOffset: number, lengthBytes: number, alignment?: number): number {
    const offset = this.#hold(super.mapFile(fd, fileOffset, lengthBytes, alignment), lengthBytes);
    this.#released.set(super.allocate(PAGE_BYTES), PAGE_BYTES);
    this.#shared.add(offset);
    return offset;
  }

  override view8(offset: number, count: number): Uint8Array {
    return this.#watched(super.view8(offset, count));
  }

  override view16(offset: number, count: number): Uint16Array {
    return this.#watched(super.view16(offset, count));
  }

  override view32(offset: number, count: number): Uint32Array {
    return this.#watched(super.view32(offset, count));
  }

  override viewF64(offset: number, count: number): Float64Array {
    return this.#watched(super.viewF64(offset, count));
  }

  override release(offset: number): void {
    const length = this.#held.get(offset);
    if (length === undefined) throw new Error(`arena: release of ${offset}, which is not in use`);
    this.#held.delete(offset);
    this.#shared.delete(offset);
    this.#released.set(offset, length);
    native.arenaMapAnonymous(this.baseAddress + offset, wholePages(length));
  }

  get heldBytes(): number {
    let sum = 0;
    for (const length of this.#held.values()) sum += length;
    return sum;
  }

  /** Whether the daemon holds the whole range, which may be several that lie side by side. */
  holds(offset: number, lengthBytes: number): boolean {
    for (const [start, length] of this.#held) {
      if (offset < start || offset >= start + length) continue;
      const left = offset + lengthBytes - (start + length);
      return left <= 0 || this.holds(start + length, left);
    }
    return false;
  }

  /** Gives everything back. Throws StrayAccess when something was written to what had been released. */
  reclaim(): void {
    const isClean = [...this.#released].every(([offset, length]) => native.isZero(this.baseAddress + offset, length));
    for (const offset of [...this.#released.keys(), ...this.#held.keys()]) super.release(offset);
    this.#released.clear();
    this.#held.clear();
    this.#shared.clear();
    if (!isClean) throw new StrayAccess('memory was written after it had been released');
  }

  #watched<T extends Uint8Array | Uint16Array | Uint32Array | Float64Array>(view: T): T {
    if (this.onStore === null || !this.#isShared(view.byteOffset)) return view;
    return new Proxy(view, {
      get(target, property) {
        const value = Reflect.get(target, property, target) as unknown;
        return typeof value === 'function' ? (value.bind(target) as unknown) : value;
      },
      set: (target, property, value) => {
        this.onStore?.();
        return Reflect.set(target, property, value, target);
      },
    });
  }

  #isShared(offset: number): boolean {
    for (const start of this.#shared) if (offset >= start && offset < start + this.#held.get(start)!) return true;
    return false;
  }

  #hold(offset: number, lengthBytes: number): number {
    this.#held.set(offset, lengthBytes);
    return offset;
  }
}

function wholePages(bytes: number): number {
  return Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;
}

export class SimProcess {
  /** Open descriptors; those that came over a socket with the descriptor that the front-end sent. */
  readonly #open = new Map<number, number>();
  /** By the daemon's descriptor of the socket. */
  readonly #wires = new Map<number, Wire>();
  /** Connected and not accepted yet, in order. */
  readonly #backlog: Wire[] = [];
  #running = false;
  /** Called as the daemon closes a descriptor, accepts a connection, receives a descriptor of the front-end's. */
  onClose: (fd: number) => void = () => undefined;
  onAccept: (fd: number, wire: Wire) => void = () => undefined;
  onReceive: (fd: number, origin: number) => void = () => undefined;
  /** Called before the daemon signals an eventfd, and before it sends a message. May throw to end the daemon. */
  onSignal: () => void = () => undefined;
  onSend: () => void = () => undefined;

  get openDescriptors(): number {
    return this.#open.size;
  }

  /** Runs a piece of the daemon. */
  run<T>(task: () => T): T {
    const before = this.#switch(true);
    try {
      return task();
    } finally {
      this.#switch(before);
    }
  }

  /** Runs what is not the daemon, in the middle of it. */
  outside<T>(task: () => T): T {
    const before = this.#switch(false);
    try {
      return task();
    } finally {
      this.#switch(before);
    }
  }

  /** Hands a descriptor over at the start. */
  inherit(fd: number): void {
    this.#open.set(fd, fd);
  }

  /** A front-end has connected. */
  connected(wire: Wire): void {
    this.#backlog.push(wire);
  }

  /** The daemon's descriptors of something the front-end knows by its own. */
  descriptorsOf(origin: number): number[] {
    return [...this.#open].filter(([, from]) => from === origin).map(([fd]) => fd);
  }

  /** The daemon's descriptor of a socket, undefined before it was accepted or when it is closed. */
  socketOf(wire: Wire): number | undefined {
    for (const [fd, other] of this.#wires) if (other === wire) return fd;
    return undefined;
  }

  /** Closes everything, as the end of a process does. */
  reclaim(): void {
    for (const fd of this.#open.keys()) native.fileClose(fd);
    this.#open.clear();
    this.#wires.clear();
  }

  opened(fd: number): void {
    if (fd >= 0) this.#open.set(fd, -1);
  }

  closed(fd: number): void {
    this.#open.delete(fd);
    this.#wires.delete(fd);
    this.onClose(fd);
  }

  accepted(fd: number): void {
    if (fd < 0) return;
    const wire = this.#backlog.shift()!;
    this.opened(fd);
    this.#wires.set(fd, wire);
    this.onAccept(fd, wire);
  }

  received(socket: number, fds: Int32Array, count: number): void {
    for (let i = 0; i < count; i++) {
      const origin = this.#wires.get(socket)!.passing.shift()!;
      this.#open.set(fds[i]!, origin);
      this.onReceive(fds[i]!, origin);
    }
  }

  #switch(running: boolean): boolean {
    const before = this.#running;
    this.#running = running;
    current = running ? this : null;
    return before;
  }
}

/** Whose calls these are; null: nobody's who is watched. */
let current: SimProcess | null = null;

const real = { ...native };

function watched(fd: number): number {
  current?.opened(fd);
  return fd;
}

native.fileOpen = (path, flags, mode) => watched(real.fileOpen(path, flags, mode));
native.fileOpenBeneath = (folder, path, flags) => watched(real.fileOpenBeneath(folder, path, flags));
native.fileDuplicate = (fd) => watched(real.fileDuplicate(fd));
native.eventfdCreate = () => watched(real.eventfdCreate());
native.memfdCreate = (name, sizeBytes) => watched(real.memfdCreate(name, sizeBytes));
native.eventfdSignal = (fd) => {
  current?.onSignal();
  return real.eventfdSignal(fd);
};
native.socketSend = (socket, address, length, fds) => {
  current?.onSend();
  return real.socketSend(socket, address, length, fds);
};
native.fileClose = (fd) => {
  current?.closed(fd);
  return real.fileClose(fd);
};
native.socketAccept = (listener) => {
  const fd = real.socketAccept(listener);
  current?.accepted(fd);
  return fd;
};
native.socketReceive = (socket, address, length, fds, counts) => {
  const outcome = real.socketReceive(socket, address, length, fds, counts);
  if (outcome > 0 && counts[0]! > 0) current?.received(socket, fds, counts[0]!);
  return outcome;
};
