/**
 * Goal: a front-end's bytes are taken apart exactly as the protocol says, whatever their number, order and pieces; a message
 * of any other shape ends its sender's session and nothing else, and leaves no descriptor behind.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket, and for each message the right shape and every
 * neighbour of it. The shapes are written down here once more, from the protocol's text.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { check, checkObject, native } from '../../native/index.js';
import { Disconnected } from '../frontend/frontend.js';
import type { Frontend, InflightArea } from '../frontend/frontend.js';
import {
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION_1,
  Feature,
  INFLIGHT_BYTES,
  MessageId,
  ProtocolFeature,
  VRING_NO_FD,
  encodeInflight,
  encodeMessage,
  mask,
  u32,
  u64,
} from '../frontend/protocol.js';
import { ControllerStat } from '../../src/vhost-user/controller-stats.js';
import { ServedDisk, openDescriptors } from './served-disk.js';

let disk: ServedDisk;
let descriptorsBefore: number;
/** Faults when the latest front-end connected. */
let faultsBefore: number;

beforeEach(() => {
  disk = new ServedDisk();
  descriptorsBefore = openDescriptors();
});

afterEach(() => {
  expect(openDescriptors()).toBe(descriptorsBefore);
  disk.close();
});

/** A message that is right in every way, on a session that has been negotiated and knows the memory. */
interface Sample {
  readonly name: keyof typeof MessageId;
  readonly payload: (frontend: Frontend) => Buffer;
  readonly fds?: (frontend: Frontend) => number[];
  /** Length of the payload of its own reply; none for messages that have no reply. */
  readonly replyBytes?: number;
  /** Descriptors that come with the reply. */
  readonly replyFds?: number;
  /** More or fewer descriptors that are just as right. */
  readonly fdsAlso?: number;
}

/** One end of a socket pair, for messages that bring a channel: both stay open. */
const [channel] = checkObject(native.socketPair(), 'make a channel');
const EXTRA_REGION = { guestAddress: 0x10_0000_0000, sizeBytes: 65536 };

const NEW_INFLIGHT = { mmapSize: 0, mmapOffset: 0, queues: 1, queueSize: 128 };

/** An in-flight region as the front-end may have kept it, empty. */
function inflightArea(): InflightArea {
  const mmapSize = 16 + 16 * NEW_INFLIGHT.queueSize + 48;
  const fd = check(native.memfdCreate('inflight', mmapSize), 'make an in-flight region');
  return { ...NEW_INFLIGHT, fd, mmapSize };
}

const table = (frontend: Frontend, count = frontend.memory.regions.length): Buffer =>
  Buffer.concat([u32(count, 0), ...frontend.memory.regions.slice(0, count).map((region) => region.describe())]);
const ringAddresses = ({ memory, queue }: Frontend): Buffer =>
  Buffer.concat([
    u32(0, 0),
    ...[queue.descriptors, queue.used, queue.available].map((address) => u64(memory.userAddress(address))),
    u64(0),
  ]);

const samples: readonly Sample[] = [
  { name: 'getFeatures', payload: () => Buffer.alloc(0), replyBytes: 8 },
  { name: 'setFeatures', payload: (frontend) => u64(frontend.features) },
  { name: 'setOwner', payload: () => Buffer.alloc(0) },
  { name: 'resetOwner', payload: () => Buffer.alloc(0) },
  {
    name: 'setMemTable',
    payload: (frontend) => table(frontend),
    fds: (frontend) => frontend.memory.regions.map((region) => region.fd),
  },
  {
    name: 'setLogBase',
    payload: () => Buffer.concat([u64(4096), u64(0)]),
    fds: (frontend) => [frontend.memory.ringRegion.fd],
    replyBytes: 16,
  },
  { name: 'setLogFd', payload: () => Buffer.alloc(0), fds: (frontend) => [frontend.queue.callFd] },
  { name: 'setVringNum', payload: () => u32(0, 128) },
  { name: 'setVringAddr', payload: ringAddresses },
  { name: 'setVringBase', payload: () => u32(0, 0) },
  { name: 'getVringBase', payload: () => u32(0, 0), replyBytes: 8 },
  { name: 'setVringKick', payload: () => u64(0), fds: (frontend) => [frontend.queue.kickFd] },
  { name: 'setVringCall', payload: () => u64(0), fds: (frontend) => [frontend.queue.callFd] },
  { name: 'setVringErr', payload: () => u64(0), fds: (frontend) => [frontend.queue.errFd] },
  { name: 'getProtocolFeatures', payload: () => Buffer.alloc(0), replyBytes: 8 },
  { name: 'setProtocolFeatures', payload: (frontend) => u64(frontend.protocolFeatures) },
  { name: 'getQueueNum', payload: () => Buffer.alloc(0), replyBytes: 8 },
  { name: 'setVringEnable', payload: () => u32(0, 1) },
  { name: 'setBackendReqFd', payload: () => Buffer.alloc(0), fds: () => [channel] },
  { name: 'resetDevice', payload: () => Buffer.alloc(0) },
  { name: 'setStatus', payload: () => u64(1) },
  { name: 'getStatus', payload: () => Buffer.alloc(0), replyBytes: 8 },
  {
    name: 'setDeviceStateFd',
    payload: () => u32(0, 0),
    fds: () => [channel],
    replyBytes: 8,
  },
  { name: 'checkDeviceState', payload: () => Buffer.alloc(0), replyBytes: 8 },
  { name: 'getConfig', payload: () => Buffer.concat([u32(0, 60, 0), Buffer.alloc(60)]), replyBytes: 72 },
  { name: 'setConfig', payload: () => Buffer.concat([u32(32, 1, 0), Buffer.from([1])]) },
  { name: 'getInflightFd', payload: () => encodeInflight(NEW_INFLIGHT), replyBytes: INFLIGHT_BYTES, replyFds: 1 },
  {
    name: 'setInflightFd',
    payload: (frontend) => encodeInflight((frontend.inflightArea ??= inflightArea())),
    fds: (frontend) => [frontend.inflightArea!.fd],
  },
  { name: 'getMaxMemSlots', payload: () => Buffer.alloc(0), replyBytes: 8 },
  {
    name: 'addMemReg',
    payload: (frontend) => Buffer.concat([u64(0), frontend.memory.addRegion(EXTRA_REGION).describe()]),
    fds: (frontend) => [frontend.memory.regions.at(-1)!.fd],
  },
  {
    name: 'remMemReg',
    payload: (frontend) => Buffer.concat([u64(0), frontend.memory.dataRegion.describe()]),
    fdsAlso: 1,
  },
];

/** Connects, negotiates and shares memory: every sample is in order then. */
async function ready(): Promise<Frontend> {
  const frontend = disk.open();
  faultsBefore = disk.sessionFaults;
  await frontend.negotiate();
  await frontend.shareMemory();
  return frontend;
}

/** Runs `body` with a front-end that is ready, and lets go of it. */
async function withFrontend(body: (frontend: Frontend) => Promise<void>): Promise<void> {
  const frontend = await ready();
  try {
    await body(frontend);
  } finally {
    frontend.close();
  }
  disk.untilListening();
}

/** The session must end by the back-end's hand, for one fault of the front-end's. */
async function expectEnded(frontend: Frontend): Promise<void> {
  await frontend.connection.disconnected();
  disk.untilListening();
  expect(disk.sessionFaults).toBe(faultsBefore + 1);
}

describe.each(samples)('$name', ({ name, payload, fds, replyBytes, replyFds, fdsAlso }) => {
  const id = MessageId[name];

  it('is carried out in its exact shape and answered as it should be', async () => {
    await withFrontend(async (frontend) => {
      const bytes = encodeMessage(id, payload(frontend), { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY });
      await frontend.connection.send(bytes, fds?.(frontend) ?? []);
      const reply = await frontend.connection.receive();
      expect(reply).toMatchObject({ id, flags: FLAG_VERSION_1 | FLAG_REPLY });
      expect(reply.payload).toHaveLength(replyBytes ?? 8);
      expect(reply.fds).toHaveLength(replyFds ?? 0);
      if (replyBytes === undefined) expect(reply.payload).toEqual(u64(0));
      // Nothing follows the one reply.
      await frontend.barrier();
    });
    expect(disk.sessionFaults).toBe(0);
  });

  it('ends the session when its payload is a byte too short, a byte too long, or endless', async () => {
    for (const change of [-1, 1, 0x7fffffff]) {
      await withFrontend(async (frontend) => {
        const right = payload(frontend);
        if (right.length + change < 0) return;
        // What makes a memory table's length right is the number of its regions.
        const changed = Buffer.concat([right, Buffer.alloc(8)]).subarray(0, right.length + Math.min(change, 8));
        const claim = { payloadBytes: right.length + change };
        await frontend.connection.send(encodeMessage(id, changed, claim), fds?.(frontend) ?? []);
        if (name === 'getConfig' && change !== 0x7fffffff) {
          // Here the length is the front-end's choice, and must only agree with what the payload says.
          expect((await frontend.connection.receive()).payload).toHaveLength(0);
          return;
        }
        await expectEnded(frontend);
      });
    }
  });

  it('ends the session when it brings one descriptor too many, or one too few, and closes all of them', async () => {
    for (const change of [-1, 1, 2]) {
      await withFrontend(async (frontend) => {
        const bytes = encodeMessage(id, payload(frontend));
        const right = fds?.(frontend) ?? [];
        if (right.length + change < 0 || change === fdsAlso) return;
        const extra = Array.from({ length: Math.max(0, change) }, () => frontend.memory.ringRegion.fd);
        await frontend.connection.send(bytes, [...right, ...extra].slice(0, right.length + change));
        await expectEnded(frontend);
      });
    }
  });

  it('ends the session when it claims another version or to be a reply', async () => {
    for (const flags of [0, 2, 3, FLAG_VERSION_1 | FLAG_REPLY]) {
      await withFrontend(async (frontend) => {
        await frontend.connection.send(encodeMessage(id, payload(frontend), { flags }), fds?.(frontend) ?? []);
        await expectEnded(frontend);
      });
    }
  });

  it('is the same message when it comes byte by byte', async () => {
    await withFrontend(async (frontend) => {
      const bytes = encodeMessage(id, payload(frontend), { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY });
      await frontend.connection.send(bytes.subarray(0, 1), fds?.(frontend) ?? []);
      for (let at = 1; at < bytes.length; at++) {
        disk.settle(2);
        await frontend.connection.send(bytes.subarray(at, at + 1));
      }
      expect((await frontend.connection.receive()).payload).toHaveLength(replyBytes ?? 8);
    });
    expect(disk.sessionFaults).toBe(0);
  });
});

describe('a message', () => {
  it.each([0, 19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 41, 44, 45, 46])(
    'with the id %i ends the session, as nothing here asks for it',
    async (id) => {
      await withFrontend(async (frontend) => {
        await frontend.connection.send(encodeMessage(id, u64(0), { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY }));
        await expectEnded(frontend);
        expect(disk.complaints[0]).toContain(`message ${id} is not supported`);
      });
    },
  );

  it('with an id far beyond the table ends the session', async () => {
    for (const id of [47, 255, 0x80000001, 0xffffffff]) {
      await withFrontend(async (frontend) => {
        await frontend.connection.send(encodeMessage(id, Buffer.alloc(0)));
        await expectEnded(frontend);
      });
    }
  });

  it('takes its descriptors with its first byte only: later ones end the session and are closed', async () => {
    for (const cut of [1, 8, 12, 15]) {
      await withFrontend(async (frontend) => {
        const bytes = encodeMessage(MessageId.setVringCall, u64(0));
        await frontend.connection.send(bytes.subarray(0, cut), [frontend.queue.callFd]);
        disk.settle(4);
        await frontend.connection.send(bytes.subarray(cut), [frontend.queue.errFd]);
        await expectEnded(frontend);
        expect(disk.complaints[0]).toContain('in the middle of a message');
      });
    }
  });

  it('with more descriptors than any message has ends the session, and none of them stays open', async () => {
    for (const count of [9, 64, 253]) {
      await withFrontend(async (frontend) => {
        const many = Array.from({ length: count }, () => frontend.queue.callFd);
        await frontend.connection.send(encodeMessage(MessageId.setVringCall, u64(0)), many);
        await expectEnded(frontend);
      });
      expect(openDescriptors()).toBe(descriptorsBefore);
    }
  });

  it('that says it brings a descriptor has to, and one that says it does not may not', async () => {
    for (const id of [MessageId.setVringKick, MessageId.setVringCall, MessageId.setVringErr]) {
      for (const [value, count] of [
        [0, 0],
        [VRING_NO_FD, 1],
      ] as const) {
        await withFrontend(async (frontend) => {
          const fds = Array.from({ length: count }, () => frontend.queue.kickFd);
          await frontend.connection.send(encodeMessage(id, u64(value)), fds);
          await expectEnded(frontend);
        });
      }
    }
  });

  it('that gives anything but an eventfd to signal with ends the session', async () => {
    for (const id of [MessageId.setVringKick, MessageId.setVringCall, MessageId.setVringErr]) {
      await withFrontend(async (frontend) => {
        await frontend.connection.send(encodeMessage(id, u64(0)), [frontend.memory.ringRegion.fd]);
        await expectEnded(frontend);
        expect(disk.complaints[0]).toContain('not an eventfd');
      });
    }
  });

  it('that is cut off by the end of the connection is forgotten, with its descriptors', async () => {
    const bytes = encodeMessage(MessageId.setVringCall, u64(0));
    for (let length = 1; length < bytes.length; length++) {
      const frontend = await ready();
      await frontend.connection.send(bytes.subarray(0, length), [frontend.queue.callFd]);
      disk.settle(2);
      frontend.close();
      disk.untilListening();
    }
    expect(disk.sessionFaults).toBe(0);
  });
});

describe('messages', () => {
  it('that come together are carried out in order, however many', async () => {
    await withFrontend(async (frontend) => {
      const count = 300;
      const batch = Array.from({ length: count }, (_, i) =>
        i % 3 === 0
          ? encodeMessage(MessageId.getQueueNum, Buffer.alloc(0))
          : encodeMessage(MessageId.setVringBase, u32(0, i), { flags: FLAG_VERSION_1 | FLAG_NEED_REPLY }),
      );
      await frontend.connection.send(Buffer.concat(batch));
      for (let i = 0; i < count; i++) {
        const reply = await frontend.connection.receive();
        expect(reply.id).toBe(i % 3 === 0 ? MessageId.getQueueNum : MessageId.setVringBase);
      }
      expect((await frontend.ask(MessageId.getVringBase, u32(0, 0))).readUInt32LE(4)).toBe(count - 1);
    });
  });

  it('of a front-end that never reads its replies end its session before they fill the memory', async () => {
    await withFrontend(async (frontend) => {
      const ask = encodeMessage(MessageId.getConfig, Buffer.concat([u32(0, 4096, 0), Buffer.alloc(4096)]));
      const flood = async (): Promise<void> => {
        for (let i = 0; i < 10_000; i++) await frontend.connection.send(ask);
      };
      await expect(flood()).rejects.toThrow(Disconnected);
      expect(disk.complaints[0]).toContain('does not read its replies');
    });
  });

  it('of a front-end that leaves without reading its replies are no fault', async () => {
    const frontend = await ready();
    for (let i = 0; i < 5; i++) {
      await frontend.connection.send(encodeMessage(MessageId.getFeatures, Buffer.alloc(0)));
    }
    frontend.close();
    disk.untilListening();
    expect(disk.sessionFaults).toBe(0);
  });

  it('are counted', async () => {
    const before = disk.stat(ControllerStat.messages);
    await withFrontend(async (frontend) => {
      const told = disk.stat(ControllerStat.messages);
      await frontend.barrier();
      expect(disk.stat(ControllerStat.messages)).toBe(told + 1);
      expect(told).toBeGreaterThan(before);
    });
  });
});

describe('REPLY_ACK', () => {
  /** What comes back for one message that is right and one that cannot be carried out, then for a question. */
  async function answers(protocolFeatures: bigint, flags: number): Promise<string[]> {
    const frontend = disk.open({ protocolFeatures });
    await frontend.negotiate();
    const heard: string[] = [];
    for (const size of [128, 127]) {
      try {
        await frontend.connection.send(encodeMessage(MessageId.setVringNum, u32(0, size), { flags }));
        await frontend.connection.send(encodeMessage(MessageId.getQueueNum, Buffer.alloc(0)));
        for (;;) {
          const { id, payload } = await frontend.connection.receive();
          if (id === MessageId.getQueueNum) break;
          heard.push(`ack ${payload.readBigUInt64LE()}`);
        }
        heard.push('goes on');
      } catch (error) {
        expect(error).toBeInstanceOf(Disconnected);
        heard.push('ended');
      }
    }
    frontend.close();
    disk.untilListening();
    return heard;
  }

  const known = mask(ProtocolFeature.replyAck, ProtocolFeature.config);
  const needReply = FLAG_VERSION_1 | FLAG_NEED_REPLY;

  it('says 0 for what was done and non-zero for what was refused, and the session goes on', async () => {
    expect(await answers(known, needReply)).toEqual(['ack 0', 'goes on', 'ack 1', 'goes on']);
  });

  it('is silent when the message does not ask; what cannot be carried out ends the session then', async () => {
    expect(await answers(known, FLAG_VERSION_1)).toEqual(['goes on', 'ended']);
  });

  it('is silent when it was not negotiated, whatever the message asks', async () => {
    expect(await answers(mask(ProtocolFeature.config), needReply)).toEqual(['goes on', 'ended']);
  });

  it('holds for the message that negotiates it', async () => {
    const frontend = disk.open();
    const features = u64(mask(ProtocolFeature.replyAck));
    await frontend.connection.send(encodeMessage(MessageId.setProtocolFeatures, features, { flags: needReply }));
    expect(await frontend.connection.receive()).toMatchObject({ id: MessageId.setProtocolFeatures, payload: u64(0) });
    frontend.close();
    disk.untilListening();
  });
});

describe('features', () => {
  it('that were not offered are refused, one by one', async () => {
    await withFrontend(async (frontend) => {
      for (let bit = 0; bit < 64; bit++) {
        const wanted = mask(bit);
        const setting = frontend.tell(MessageId.setFeatures, u64(wanted));
        if ((frontend.offeredFeatures & wanted) !== 0n) await setting;
        else await expect(setting, `bit ${bit}`).rejects.toThrow('refused');
        // REPLY_ACK stays negotiated meanwhile.
        const protocolSetting = frontend.tell(
          MessageId.setProtocolFeatures,
          u64(wanted | mask(ProtocolFeature.replyAck)),
        );
        if ((frontend.offeredProtocolFeatures & wanted) !== 0n) await protocolSetting;
        else await expect(protocolSetting, `protocol bit ${bit}`).rejects.toThrow('refused');
      }
    });
  });

  it('are offered as far as they are done: no in-order use', async () => {
    await withFrontend(async (frontend) => {
      const { sizeMax, segMax, blkSize, flush, topology, configWce, multiQueue, discard, writeZeroes } = Feature;
      const { indirectDescriptors, eventIdx, protocolFeatures, version1, ringPacked, logAll } = Feature;
      expect(frontend.offeredFeatures).toBe(
        mask(sizeMax, segMax, blkSize, flush, topology, configWce, multiQueue, discard, writeZeroes) |
          mask(indirectDescriptors, eventIdx, protocolFeatures, version1, ringPacked, logAll),
      );
      expect(frontend.offeredProtocolFeatures).toBe(mask(...Object.values(ProtocolFeature)));
    });
  });

  it('may not change under a started ring, but may be said again', async () => {
    const frontend = await disk.connect();
    await frontend.tell(MessageId.setFeatures, u64(frontend.features));
    const fewer = frontend.features & ~mask(Feature.eventIdx);
    await expect(frontend.tell(MessageId.setFeatures, u64(fewer))).rejects.toThrow('refused');
    await frontend.stopQueue(frontend.queue);
    await frontend.tell(MessageId.setFeatures, u64(fewer));
    frontend.close();
    disk.untilListening();
  });
});
