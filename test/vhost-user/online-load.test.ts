/**
 * Goal: what a front-end changes under load - the descriptor to call, the memory - loses no call and no byte.
 *
 * Method: a controller on a reactor that is stepped by hand, a real socket. A driver that sleeps on the descriptor it gave last, and
 * on nothing else, would sleep for ever over a lost call; data goes through each region while others come and go.
 */
import { afterEach, beforeEach, expect, it } from 'vitest';
import { check, native } from '../../native/index.js';
import type { Request } from '../frontend/driver-queue.js';
import type { Frontend } from '../frontend/frontend.js';
import { FEATURES_KNOWN, Feature, MessageId, RequestType, Status, mask, u64 } from '../frontend/protocol.js';
import { expectBytes, fresh } from '../support/bytes.js';
import { seededRandom } from '../support/seed.js';
import { ServedDisk, openDescriptors } from './served-disk.js';

const ROUNDS = 300;
const REGION_BYTES = 2 ** 20;

let disk: ServedDisk;
let frontend: Frontend;
let descriptorsBefore: number;

beforeEach(() => {
  disk = new ServedDisk();
  descriptorsBefore = openDescriptors();
});

afterEach(() => {
  frontend.close();
  disk.untilListening();
  expect(openDescriptors()).toBe(descriptorsBefore);
  disk.close();
});

it.each([
  ['with event indices', FEATURES_KNOWN],
  ['without', FEATURES_KNOWN & ~mask(Feature.eventIdx)],
])('a call descriptor that is replaced again and again loses no call, %s', async (_what, features) => {
  frontend = await disk.connect({ features });
  const { queue, waiter } = frontend;
  const random = seededRandom(7);
  let callFd = -1;
  const replace = async (): Promise<void> => {
    const before = callFd;
    callFd = check(native.eventfdCreate(), 'make an eventfd');
    await frontend.tell(MessageId.setVringCall, u64(0), [callFd]);
    if (before >= 0) native.fileClose(before);
  };
  await replace();
  for (let round = 0; round < ROUNDS; round++) {
    const requests = queue.submit(
      ...Array.from({ length: 1 + random.below(8) }, () => ({ type: RequestType.read, inBytes: 512 })),
    );
    for (let steps = random.below(3); steps > 0; steps--) disk.step();
    if (random.below(2) === 0) await replace();
    while (requests.some((request) => request.completion === undefined)) {
      await waiter.until('a call', () => (native.eventfdDrain(callFd) > 0 ? true : undefined));
      while (queue.takeUsed() !== undefined);
    }
  }
  native.fileClose(callFd);
});

it('memory that comes and goes under load takes part at once, and takes nothing along', async () => {
  frontend = await disk.connect();
  const { queue, memory } = frontend;
  const random = seededRandom(8);
  const inflight: Request[] = [];
  const keepBusy = (): void => {
    while (inflight.length < 8)
      inflight.push(...queue.submit({ type: RequestType.read, sector: random.below(64), inBytes: 512 }));
    disk.step();
  };
  for (let round = 0; round < ROUNDS / 5; round++) {
    keepBusy();
    const region = memory.addRegion({
      guestAddress: 0x10_0000_0000 + round * 4 * REGION_BYTES,
      sizeBytes: REGION_BYTES,
    });
    await frontend.shareRegion(region);
    keepBusy();
    const content = fresh(8192);
    const sector = 64 + 16 * random.below(64);
    const written = await queue.run({ type: RequestType.write, sector, out: content, region });
    expect(written.status).toBe(Status.ok);
    keepBusy();
    const found = await queue.run({ type: RequestType.read, sector, inBytes: content.length, region });
    expectBytes(found.data, content, 'through the new region');
    keepBusy();
    // Requests in other regions are in flight.
    await frontend.unshareRegion(region);
    memory.removeRegion(region);
    for (const request of inflight.splice(0)) expect((await queue.completion(request)).status).toBe(Status.ok);
  }
  expect(disk.sessionFaults).toBe(0);
});
