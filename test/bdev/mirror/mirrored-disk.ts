/** A disk of a test with another bdev beside it, to which it is mirrored; the test is the consumer that is moved over. */
import assert from 'node:assert/strict';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { BdevConfig, BdevUser, IoChannel, OpenBdev } from '../../../src/bdev/bdev.js';
import { Mirror } from '../../../src/bdev/mirror/mirror.js';
import { Disk, Request } from '../../support/disk.js';
import type { OpenDisk } from '../../support/rig.js';
import { Rig } from '../../support/rig.js';
import type { Stack } from '../stacks.js';

const KERNEL_WAIT_US = 20_000;

/** The bdevs of a stack under names of its own; the last is called `name`. */
export function named(name: string, { configs }: Stack): BdevConfig[] {
  const other = (old: string): string => (old === configs.at(-1)!.name ? name : `${name}-${old}`);
  return configs.map((config) => {
    const base = 'base' in config ? { base: other(config.base as string) } : {};
    return { ...config, ...base, name: other(config.name) };
  });
}

export class MirroredDisk extends Disk implements BdevUser {
  /** As the rig claims it. */
  readonly name = 'test';
  #way: IoChannel;
  #mirror: Mirror | null = null;

  constructor(source: Stack, target: Stack) {
    super(new Rig('mirror'), [...named('target', target), ...named('source', source)]);
    this.#way = this.open.channel;
  }

  mirror(bytesPerSecond = 0, target = 'target'): Mirror {
    const { registry, reactor } = this.rig;
    this.#mirror = new Mirror({ user: this, registry, reactor, target, bytesPerSecond });
    return this.#mirror;
  }

  /** Ends a mirror that is still there, too. */
  override close(): void {
    const mirror = this.#mirror;
    this.#mirror = null;
    if (mirror?.isActive === true) void mirror.cancel();
    const isLeft = (): boolean => mirror?.info.state !== 'pivoted' && this.rig.registry.writerOf('target') !== null;
    this.rig.until(() => !isLeft(), 'the end of the mirror');
    super.close();
  }

  route(channel: IoChannel): void {
    this.#way = channel;
  }

  moveTo(open: OpenBdev): void {
    this.open = open as OpenDisk;
    this.#way = open.channel;
  }

  override submit(request: Request): Request {
    request.io.push(request, 0);
    this.#way.submit(request.io);
    return request;
  }

  /** Drives the reactor until the promise has settled. */
  async settled<T>(promise: Promise<T>): Promise<T> {
    let isDone = false;
    const end = (): void => void (isDone = true);
    promise.then(end, end);
    while (!isDone) {
      // As long as the kernel has something to do no time passes.
      if (!this.rig.step() && this.rig.ring.inflight > 0) this.rig.ring.wait(KERNEL_WAIT_US);
      await Promise.resolve();
    }
    return promise;
  }

  untilReady(mirror: Mirror): void {
    this.rig.until(() => mirror.info.state === 'ready', 'the mirror to be in step');
  }

  /** What a bdev holds, read beside its consumer. */
  contents(name: string): Buffer {
    const reader = this.rig.registry.open(name, null, 'name');
    const request = new Request();
    const memory = this.rig.arena.allocate(this.sizeBytes);
    request.io.prepare(IoType.read, 0, this.sizeBytes, 0);
    request.io.addSegment(memory, this.sizeBytes);
    request.io.push(request, 0);
    reader.channel.submit(request.io);
    this.finish(request);
    assert.equal(request.status, IoStatus.success);
    const bytes = Buffer.from(Buffer.from(this.rig.arena.buffer, memory, this.sizeBytes));
    this.rig.arena.release(memory);
    reader.close();
    return bytes;
  }
}
