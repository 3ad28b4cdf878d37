/**
 * Goal: a disk that grows while it is in use is seen at its new size by requests and by the configuration space at once, and the
 * front-end is told, on the channel it gave for that; requests in flight do not notice, and a front-end that does not read, answers
 * nonsense or goes away disturbs nobody but itself.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket, a socket pair as the channel.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { check, checkObject, native } from '../../native/index.js';
import type { BdevConfig, BdevUser } from '../../src/bdev/bdev.js';
import { Mirror } from '../../src/bdev/mirror/mirror.js';
import { startTask } from '../../src/bdev/task.js';
import { Refused } from '../frontend/frontend.js';
import type { Frontend } from '../frontend/frontend.js';
import {
  MessageId,
  PROTOCOL_FEATURES_KNOWN,
  ProtocolFeature,
  RequestType,
  Status,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { DISK_BYTES, ServedDisk, heldDisk, memoryDisk, openDescriptors } from './served-disk.js';

const SECTORS = DISK_BYTES / 512;
/** CONFIG_CHANGE_MSG, "Back-end message types". */
const CONFIG_CHANGE = 2;
const NONE = Buffer.alloc(0);

let disk: ServedDisk;
let frontends: Frontend[];
let channels: Channel[];
let descriptorsBefore: number;

beforeEach(() => {
  frontends = [];
  channels = [];
});

afterEach(() => {
  for (const frontend of frontends) frontend.close();
  for (const channel of channels) channel.close();
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
  disk.close();
});

function serve(configs: readonly BdevConfig[] = memoryDisk()): void {
  disk = new ServedDisk({ configs });
  descriptorsBefore = openDescriptors();
}

/** The front-end's end of the channel. */
class Channel {
  readonly #near: number;
  readonly #arena = disk.rig.arena;
  readonly #buffer = this.#arena.allocate(65536);
  readonly #counts = new Int32Array(2);
  #far: number;

  constructor() {
    [this.#near, this.#far] = checkObject(native.socketPair(), 'make a channel');
    channels.push(this);
  }

  async giveTo(frontend: Frontend): Promise<void> {
    await frontend.tell(MessageId.setBackendReqFd, NONE, [this.#far]);
    this.closeFar();
  }

  closeFar(): void {
    if (this.#far >= 0) native.fileClose(this.#far);
    this.#far = -1;
  }

  /** What has arrived, as words. */
  received(): number[] {
    disk.settle();
    const count = native.socketReceive(
      this.#near,
      this.#arena.baseAddress + this.#buffer,
      65536,
      new Int32Array(0),
      this.#counts,
    );
    return count <= 0 ? [] : [...new Uint32Array(this.#arena.view8(this.#buffer, count).slice().buffer)];
  }

  send(bytes: Buffer, fds: readonly number[] = []): void {
    this.#arena.view8(this.#buffer, bytes.length).set(bytes);
    check(
      native.socketSend(this.#near, this.#arena.baseAddress + this.#buffer, bytes.length, Int32Array.from(fds)),
      'send',
    );
    disk.settle();
  }

  answer(value = 0n): void {
    this.send(Buffer.concat([u32(CONFIG_CHANGE, 5, 8), u64(value)]));
  }

  close(): void {
    this.closeFar();
    native.fileClose(this.#near);
    this.#arena.release(this.#buffer);
  }
}

/** A set-up front-end with a channel. */
async function connect(options: Parameters<ServedDisk['connect']>[0] = {}): Promise<[Frontend, Channel]> {
  const frontend = await disk.connect(options);
  frontends.push(frontend);
  const channel = new Channel();
  await channel.giveTo(frontend);
  return [frontend, channel];
}

function resize(sectors: number, name = 'disk'): void {
  disk.rig.registry.get(name)!.size.resize(sectors * 512);
}

const WITHOUT_ACK = PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.replyAck);
const ASKING = [CONFIG_CHANGE, 1 | 8, 0];
const TELLING = [CONFIG_CHANGE, 1, 0];

describe('a disk that grows', () => {
  it('has the new capacity at once, in requests and in its configuration, and its front-end is told', async () => {
    serve();
    const [frontend, channel] = await connect();
    const { queue } = frontend;
    expect((await queue.write(SECTORS, Buffer.alloc(512, 7))).status).toBe(Status.ioError);
    expect(channel.received()).toEqual([]);
    resize(SECTORS + 16);
    expect(channel.received()).toEqual(ASKING);
    channel.answer();
    expect((await frontend.blkConfig()).capacitySectors).toBe(SECTORS + 16);
    expect((await queue.read(SECTORS, 512)).data).toEqual(Buffer.alloc(512));
    expect((await queue.write(SECTORS + 15, Buffer.alloc(512, 7))).status).toBe(Status.ok);
    expect((await queue.read(SECTORS + 15, 512)).data).toEqual(Buffer.alloc(512, 7));
    expect((await queue.write(SECTORS + 16, Buffer.alloc(512, 7))).status).toBe(Status.ioError);
  });

  it('does so below any stack of filters', async () => {
    serve([...heldDisk('held'), { name: 'pass', module: 'passthru', base: 'held' } as BdevConfig]);
    const [frontend, channel] = await connect();
    resize(SECTORS * 2, 'held-base');
    expect(channel.received()).toEqual(ASKING);
    expect((await frontend.blkConfig()).capacitySectors).toBe(SECTORS * 2);
    const [request] = frontend.queue.submit({ type: RequestType.write, sector: SECTORS, out: Buffer.alloc(512, 9) });
    disk.settle();
    disk.release();
    expect((await frontend.queue.completion(request!)).status).toBe(Status.ok);
  });

  it('leaves what is in flight alone', async () => {
    serve(heldDisk());
    const [{ queue }] = await connect();
    const data = Buffer.alloc(8192, 5);
    const [write] = queue.submit({ type: RequestType.write, sector: 8, out: data });
    disk.settle();
    const [read] = queue.submit({ type: RequestType.read, sector: 8, inBytes: 8192 });
    disk.rig.step();
    resize(SECTORS * 2, 'disk-base');
    disk.settle();
    disk.release();
    expect((await queue.completion(write!)).status).toBe(Status.ok);
    expect(await queue.completion(read!)).toMatchObject({ status: Status.ok, data });
  });

  it('cannot shrink while it is in use, and says so', async () => {
    serve();
    const [frontend, channel] = await connect();
    expect(() => resize(SECTORS - 1)).toThrow(/in use with 8388608 bytes and cannot shrink to 8388096/);
    expect(() => resize(SECTORS + 0.5)).toThrow(/no whole number of blocks/);
    expect(() => resize(0)).toThrow(/no whole number of blocks/);
    resize(SECTORS);
    expect(channel.received()).toEqual([]);
    expect((await frontend.blkConfig()).capacitySectors).toBe(SECTORS);
  });
});

describe('the channel', () => {
  it('carries one message at a time, and one more for all that changed while it was unanswered', async () => {
    serve();
    const [, channel] = await connect();
    for (let i = 1; i <= 5; i++) resize(SECTORS + i);
    expect(channel.received()).toEqual(ASKING);
    expect(channel.received()).toEqual([]);
    channel.answer();
    expect(channel.received()).toEqual(ASKING);
    channel.answer();
    expect(channel.received()).toEqual([]);
  });

  it('takes a refusal for what it is: noted, and no more', async () => {
    serve();
    const [frontend, channel] = await connect();
    resize(SECTORS + 1);
    channel.answer(1n);
    expect(disk.log.map(({ message }) => message)).toContain('the front-end could not use the changed configuration');
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
  });

  it('without REPLY_ACK asks for no answers, and is not held up by a front-end that does not read', async () => {
    // Nothing behind it that would have to grow.
    serve([
      { name: 'disk', module: 'null', sizeBytes: DISK_BYTES, blockSizeBytes: 512, readZeroes: false } as BdevConfig,
    ]);
    const [frontend, channel] = await connect({ protocolFeatures: WITHOUT_ACK });
    const changes = 3000;
    for (let i = 1; i <= changes; i++) resize(SECTORS + i);
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    const heard: number[] = [];
    for (let words = channel.received(); words.length > 0; words = channel.received()) heard.push(...words);
    expect(heard.length).toBeLessThan(changes * 3);
    expect(heard.length % 3).toBe(0);
    for (let at = 0; at < heard.length; at += 3) expect(heard.slice(at, at + 3)).toEqual(TELLING);
    // What was dropped said the same as what is there.
    resize(SECTORS + changes + 1);
    expect(channel.received()).toEqual(TELLING);
    expect(disk.sessionFaults).toBe(0);
  });

  it('is silent while all rings are stopped, and speaks when one is started', async () => {
    serve();
    const [frontend, channel] = await connect();
    await frontend.stopQueue(frontend.queue);
    resize(SECTORS + 1);
    resize(SECTORS + 2);
    expect(channel.received()).toEqual([]);
    expect((await frontend.blkConfig()).capacitySectors).toBe(SECTORS + 2);
    await frontend.startQueue(frontend.queue);
    expect(channel.received()).toEqual(ASKING);
  });

  it('is not used without the CONFIG feature, nor before it is there', async () => {
    serve();
    const [, channel] = await connect({ protocolFeatures: PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.config) });
    resize(SECTORS + 1);
    expect(channel.received()).toEqual([]);
  });

  it('may be replaced: the new one is used, the old one closed', async () => {
    serve();
    const [frontend, first] = await connect();
    resize(SECTORS + 1);
    expect(first.received()).toEqual(ASKING);
    const second = new Channel();
    await second.giveTo(frontend);
    resize(SECTORS + 2);
    expect(second.received()).toEqual(ASKING);
    expect(first.received()).toEqual([]);
  });

  it('may be closed by the front-end at any time', async () => {
    serve();
    const [frontend, channel] = await connect();
    channel.close();
    channels = [];
    for (let i = 1; i <= 3; i++) resize(SECTORS + i);
    disk.settle();
    expect((await frontend.queue.flush()).status).toBe(Status.ok);
    expect(disk.sessionFaults).toBe(0);
  });

  it('must be a socket', async () => {
    serve();
    const [frontend] = await connect();
    for (const fd of [frontend.queue.callFd, frontend.memory.ringRegion.fd]) {
      await expect(frontend.tell(MessageId.setBackendReqFd, NONE, [fd])).rejects.toThrow(Refused);
    }
    expect(disk.complaints[0]).toContain('not a socket');
  });

  it('that was not negotiated is refused', async () => {
    serve();
    const features = PROTOCOL_FEATURES_KNOWN & ~mask(ProtocolFeature.backendReq);
    await expect(connect({ protocolFeatures: features })).rejects.toThrow(Refused);
  });

  const reply = Buffer.concat([u32(CONFIG_CHANGE, 5, 8), u64(0)]);
  it.each<[string, boolean, Buffer]>([
    ['anything unasked', false, reply],
    ['a request', true, Buffer.concat([u32(CONFIG_CHANGE, 1, 8), u64(0)])],
    ['an answer of another version', true, Buffer.concat([u32(CONFIG_CHANGE, 6, 8), u64(0)])],
    ['an answer to something else', true, Buffer.concat([u32(1, 5, 8), u64(0)])],
    ['an answer of another length', true, Buffer.concat([u32(CONFIG_CHANGE, 5, 16), u64(0), u64(0)])],
    ['an endless answer', true, Buffer.concat([u32(CONFIG_CHANGE, 5, 0xffffffff), u64(0)])],
    ['two answers', true, Buffer.concat([reply, reply])],
  ])('on which the front-end sends %s ends its session', async (_what, isAsked, bytes) => {
    serve();
    const [frontend, channel] = await connect();
    if (isAsked) resize(SECTORS + 1);
    disk.settle();
    channel.send(bytes);
    await frontend.connection.disconnected();
    disk.untilListening();
    expect(disk.sessionFaults).toBe(1);
  });

  it('takes an answer in pieces, and no descriptors', async () => {
    serve();
    const [frontend, channel] = await connect();
    resize(SECTORS + 1);
    expect(channel.received()).toEqual(ASKING);
    for (const byte of reply) channel.send(Buffer.from([byte]));
    resize(SECTORS + 2);
    expect(channel.received()).toEqual(ASKING);
    channel.send(reply, [frontend.queue.callFd]);
    await frontend.connection.disconnected();
  });
});

describe('a disk that is moved to another bdev', () => {
  it('is that one for its front-end, which hears of a new size, with what was promised of the one before', async () => {
    serve();
    const { registry, reactor } = disk.rig;
    registry.create({ ...memoryDisk()[0]!, name: 'larger', sizeBytes: 2 * DISK_BYTES } as BdevConfig);
    const [frontend, channel] = await connect();
    const { queue } = frontend;
    const features = frontend.offeredFeatures;
    expect((await queue.write(8, Buffer.alloc(512, 7))).status).toBe(Status.ok);
    const { controller } = disk;
    const user: BdevUser = {
      // As the rig claims it.
      name: 'test',
      get open() {
        return controller.open;
      },
      route: (way) => controller.route(way),
      moveTo: (open) => controller.moveTo(open),
    };
    const mirror = new Mirror({ user, registry, reactor, target: 'larger', bytesPerSecond: 0 });
    disk.until(() => mirror.info.state === 'ready', 'the mirror');
    expect((await queue.write(16, Buffer.alloc(512, 8))).status).toBe(Status.ok);
    startTask(
      mirror.prepare(),
      () => mirror.commitPivot(),
      (error) => expect.unreachable(String(error)),
    );
    disk.until(() => mirror.info.state === 'pivoted', 'the pivot');
    expect(channel.received()).toEqual(ASKING);
    channel.answer();
    expect((await frontend.blkConfig()).capacitySectors).toBe(2 * SECTORS);
    expect(controller.info().bdev).toBe('larger');
    const journaled = disk.journal.entries.length;
    expect((await queue.read(8, 512)).data).toEqual(Buffer.alloc(512, 7));
    expect((await queue.read(16, 512)).data).toEqual(Buffer.alloc(512, 8));
    expect((await queue.write(2 * SECTORS - 1, Buffer.alloc(512, 9))).status).toBe(Status.ok);
    // The disk before is asked for nothing any more.
    expect(disk.journal.entries.length).toBe(journaled);
    registry.get('larger')!.size.resize(3 * DISK_BYTES);
    expect(channel.received()).toEqual(ASKING);
    expect(await frontend.askU64(MessageId.getFeatures)).toBe(features);
  });
});
