/**
 * The bdevs of one reactor: creation by module, look-up by name, claims, and channels with statistics.
 *
 * Invariants
 * - A name is used once. A bdev is created after its bases and destroyed before them.
 * - A bdev that is claimed for writing has exactly one consumer that writes; readers need no claim, unless they rely on what they
 *   read (`readBases`): then nobody writes.
 * - A stack is at most STACK_DEPTH_MAX bdevs deep, so a request's completion stack cannot overflow.
 */
import { randomUUID } from 'node:crypto';
import type { Reactor } from '../poller/reactor.js';
import { BdevChannel } from './bdev-channel.js';
import type { Bdev, BdevConfig, BdevContext, BdevModule, OpenBdev } from './bdev.js';
import { BdevError } from './bdev.js';
import { MAX_STACK_FRAMES } from './bdev-io.js';
import { IoStats } from './io-stats.js';

/** Each bdev takes two frames (the core's and the module's), and a consumer needs a few of its own. */
export const STACK_DEPTH_MAX = MAX_STACK_FRAMES / 2 - 2;

interface Entry {
  readonly bdev: Bdev;
  readonly stats: IoStats;
  /** Who writes to it: a bdev's or a controller's name. */
  writer: string | null;
  /** Who relies on nobody writing to it. */
  readonly readers: string[];
  users: number;
}

export class BdevRegistry {
  readonly #reactor: Reactor;
  readonly #modules = new Map<string, BdevModule>();
  readonly #entries = new Map<string, Entry>();
  readonly #onJobEnd: (bdev: string, info: Readonly<Record<string, unknown>>) => void;

  /** @param onJobEnd told of each long job that is over */
  constructor(
    reactor: Reactor,
    modules: readonly BdevModule[],
    onJobEnd: (bdev: string, info: Readonly<Record<string, unknown>>) => void = () => undefined,
  ) {
    this.#onJobEnd = onJobEnd;
    this.#reactor = reactor;
    for (const module of modules) this.#modules.set(module.name, module);
  }

  /** Names in order of creation. */
  names(): string[] {
    return [...this.#entries.keys()];
  }

  get(name: string): Bdev | undefined {
    return this.#entries.get(name)?.bdev;
  }

  stats(name: string): IoStats | undefined {
    return this.#entries.get(name)?.stats;
  }

  /** Who writes to it: a bdev's or a controller's name, or null. */
  writerOf(name: string): string | null {
    return this.#entries.get(name)?.writer ?? null;
  }

  /** Does what takes long of a creation, while the other bdevs are served. @returns the config for `create`. Rejects with BdevError */
  async prepare(config: BdevConfig): Promise<BdevConfig> {
    this.#checkName(config);
    const module = this.#moduleOf(config);
    return module.prepare === undefined ? config : await module.prepare(config, this.#context(config.name));
  }

  /** Creates a bdev. Its config has passed the schema. Throws BdevError. */
  create(config: BdevConfig): Bdev {
    this.#checkName(config);
    const module = this.#moduleOf(config);
    const bdev = module.create({ ...config, uuid: config.uuid ?? randomUUID() }, this.#context(config.name));
    try {
      this.#adopt(bdev);
    } catch (error) {
      bdev.destroy();
      throw error;
    }
    return bdev;
  }

  #checkName({ name }: BdevConfig): void {
    if (!this.#entries.has(name)) return;
    throw new BdevError('name-in-use', 'name', `bdev ${name} exists already`, 'choose another name');
  }

  #moduleOf(config: BdevConfig): BdevModule {
    const module = this.#modules.get(config.module);
    if (module !== undefined) return module;
    const known = [...this.#modules.keys()].join(', ');
    throw new BdevError(
      'no-such-module',
      'module',
      `no bdev module is called ${config.module}`,
      `use one of: ${known}`,
    );
  }

  /** Enters a new bdev, or throws and leaves everything as it was. */
  #adopt(bdev: Bdev): void {
    const depth = stackDepth(bdev);
    if (depth > STACK_DEPTH_MAX) {
      throw new BdevError(
        'too-deep',
        'base',
        `bdev ${bdev.name} would be ${depth} bdevs deep`,
        `a stack may be ${STACK_DEPTH_MAX} deep`,
      );
    }
    const bases = bdev.bases.map((base) => this.#entry(base.name, 'base'));
    bases.forEach((entry, i) => {
      if (bases.indexOf(entry) !== i) {
        throw new BdevError(
          'base-twice',
          'base',
          `bdev ${bdev.name} names ${entry.bdev.name} twice`,
          'give each bdev one user',
        );
      }
      if (writes(bdev, entry.bdev)) this.#checkUnread(entry, bdev.name, 'base');
      if (writes(bdev, entry.bdev) || reliesOn(bdev, entry.bdev)) this.#checkUnclaimed(entry, bdev.name, 'base');
    });
    for (const entry of bases) {
      if (writes(bdev, entry.bdev)) entry.writer = bdev.name;
      if (reliesOn(bdev, entry.bdev)) entry.readers.push(bdev.name);
      entry.users++;
    }
    this.#entries.set(bdev.name, { bdev, stats: new IoStats(), writer: null, readers: [], users: 0 });
  }

  /**
   * Opens a bdev for a consumer.
   * @param writer name to claim it under, or null to read only
   */
  open(name: string, writer: string | null, field: string): OpenBdev & { readonly stats: IoStats } {
    return this.#open(name, writer, field, null);
  }

  /** @param reader one that relies on the bdev and may do so while this consumer writes to it, or null */
  #open(
    name: string,
    writer: string | null,
    field: string,
    reader: string | null,
  ): OpenBdev & { readonly stats: IoStats } {
    const entry = this.#entry(name, field);
    if (writer !== null) {
      this.#checkUnclaimed(entry, writer, field);
      if (!entry.bdev.readOnly) this.#checkUnread(entry, writer, field, reader);
    }
    const channel = new BdevChannel(entry.bdev, this.#reactor, entry.stats, writer === null || entry.bdev.readOnly);
    if (writer !== null) entry.writer = writer;
    entry.users++;
    return {
      bdev: entry.bdev,
      channel,
      stats: entry.stats,
      isIdle: () => channel.isIdle(),
      close: () => {
        channel.close();
        entry.users--;
        if (writer !== null) entry.writer = null;
      },
    };
  }

  /** Destroys a bdev that nobody uses. Throws BdevError when somebody does. */
  destroy(name: string): void {
    const entry = this.#entry(name, 'name');
    if (entry.users > 0) {
      throw new BdevError(
        'in-use',
        'name',
        `bdev ${name} is in use by ${entry.writer ?? 'a reader'}`,
        'remove its user first',
      );
    }
    this.#entries.delete(name);
    entry.bdev.destroy();
    for (const base of entry.bdev.bases) {
      const below = this.#entry(base.name, 'base');
      below.users--;
      if (writes(entry.bdev, base)) below.writer = null;
      if (reliesOn(entry.bdev, base)) below.readers.splice(below.readers.indexOf(entry.bdev.name), 1);
    }
  }

  /** Destroys everything, newest first. */
  destroyAll(): void {
    for (const name of this.names().reverse()) this.destroy(name);
  }

  #context(owner: string): BdevContext {
    return {
      reactor: this.#reactor,
      base: (name, field) => {
        const entry = this.#entry(name, field);
        this.#checkUnclaimed(entry, owner, field);
        return entry.bdev;
      },
      find: (name, field) => this.#entry(name, field).bdev,
      open: (base) => new BdevChannel(base, this.#reactor, this.#entries.get(base.name)?.stats ?? new IoStats()),
      openTarget: (name, writer) => this.open(name, writer, 'target'),
      jobEnded: (info) => this.#onJobEnd(owner, info),
      openBase: (name, writer) => this.#open(name, writer, 'backing', writer),
      create: (config) => this.#moduleOf(config).create(config, this.#context(owner)),
    };
  }

  #entry(name: string, field: string): Entry {
    const entry = this.#entries.get(name);
    if (entry !== undefined) return entry;
    const known = this.names().join(', ') || 'none yet';
    throw new BdevError(
      'no-such-bdev',
      field,
      `there is no bdev ${name}`,
      `define it before it is used; known: ${known}`,
    );
  }

  #checkUnread(entry: Entry, writer: string, field: string, allowed: string | null = null): void {
    const readers = entry.readers.filter((reader) => reader !== allowed);
    if (readers.length === 0) return;
    throw new BdevError(
      'claimed',
      field,
      `bdev ${entry.bdev.name} is what ${readers.join(', ')} stands on, ${writer} cannot write to it`,
      'write to an image on top of it, or set `read_only: true`',
    );
  }

  #checkUnclaimed(entry: Entry, writer: string, field: string): void {
    if (entry.writer === null) return;
    throw new BdevError(
      'claimed',
      field,
      `bdev ${entry.bdev.name} is written by ${entry.writer}, ${writer} cannot write to it too`,
      'give each bdev one user',
    );
  }
}

function reliesOn(bdev: Bdev, base: Bdev): boolean {
  return bdev.readBases?.includes(base) === true;
}

function writes(bdev: Bdev, base: Bdev): boolean {
  return !bdev.readOnly && !reliesOn(bdev, base);
}

/** Longest way down, in bdevs. */
export function stackDepth(bdev: Bdev): number {
  return 1 + Math.max(0, ...bdev.bases.map(stackDepth));
}
