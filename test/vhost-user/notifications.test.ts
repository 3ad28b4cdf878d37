/**
 * Goal: the driver is called when it wants to be and the device kicked when it has to be, by flags or by event index (VIRTIO 1.2,
 * 2.7.7 and 2.7.10), over the end of 16 bits too; and no request is left lying because both sides thought the other awake.
 *
 * Method: random sequences against a model that counts entries one by one instead of subtracting indices; and a device that
 * goes to sleep while the driver acts at every moment of it, by memory that tells of each access.
 */
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { PollPhase } from '../../src/poller/poller.js';
import { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import type { Virtqueue } from '../../src/vhost-user/virtqueue.js';
import { VringPoller } from '../../src/vhost-user/vring-poller.js';
import { Vring } from '../../src/vhost-user/vring.js';
import { check, native } from '../../native/index.js';
import { RequestType } from '../frontend/protocol.js';
import { seed } from '../support/seed.js';
import { RingDevice } from './ring-device.js';
import { watchedMemory } from './watched-memory.js';
import type { Watcher } from './watched-memory.js';

let ring: RingDevice;
afterEach(() => ring.close());

/** Fields as the driver writes them, and those of the device as it reads them. */
const setEvent = (index: number): void =>
  void ring.driver.availableBytes.writeUInt16LE(index & 0xffff, 4 + 2 * ring.driver.size);
const setFlags = (flags: number): void => void ring.driver.availableBytes.writeUInt16LE(flags, 0);
const deviceFlags = (): number => ring.driver.usedBytes.readUInt16LE(0);
const deviceEvent = (): number => ring.driver.usedBytes.readUInt16LE(4 + 8 * ring.driver.size);

/** Pushes `count` entries of any head. */
function push(virtqueue: Virtqueue, count: number): void {
  for (let i = 0; i < count; i++) virtqueue.push(i % ring.driver.size, 1);
}

describe('with the event index', () => {
  it('the driver is called exactly when the entry that it waits for is among those published', () => {
    ring = new RingDevice({ eventIdx: true, queueSize: 256 });
    const step = fc.record({ count: fc.integer({ min: 0, max: 256 }), distance: fc.integer({ min: -300, max: 300 }) });
    const property = fc.property(fc.nat(0xffff), fc.array(step, { maxLength: 20 }), (base, steps) => {
      ring.driver.usedBytes.writeUInt16LE(base, 2);
      const virtqueue = ring.makeVirtqueue(base);
      let index = base;
      for (const { count, distance } of steps) {
        const event = (index + distance) & 0xffff;
        setEvent(event);
        push(virtqueue, count);
        // One by one: does an entry land on the index that is waited for?
        let expected = false;
        for (let i = 0; i < count; i++) if (((index + i) & 0xffff) === event) expected = true;
        index = (index + count) & 0xffff;
        expect(virtqueue.publish()).toBe(expected);
        expect(ring.driver.deviceUsedIndex).toBe(index);
      }
    });
    fc.assert(property, { numRuns: 300, seed });
  });

  it('the flag that asks for no calls means nothing', () => {
    ring = new RingDevice({ eventIdx: true });
    setFlags(1);
    setEvent(0);
    push(ring.virtqueue, 1);
    expect(ring.virtqueue.publish()).toBe(true);
  });

  it('kicks are asked for at the next entry, by its index, whatever it is', () => {
    ring = new RingDevice({ eventIdx: true, queueSize: 8 });
    for (const base of [0, 5, 0xfffe, 0xffff]) {
      ring.restart(base);
      ring.virtqueue.setNotification(true);
      expect(deviceEvent()).toBe(base);
      expect(deviceFlags()).toBe(0);
      for (let i = 1; i <= 3; i++) {
        ring.run({ type: RequestType.flush });
        ring.virtqueue.setNotification(true);
        expect(deviceEvent()).toBe((base + i) & 0xffff);
      }
    }
  });
});

describe('without the event index', () => {
  it('the driver is called for everything published, unless its flag asks for no calls', () => {
    ring = new RingDevice();
    const property = fc.property(fc.array(fc.tuple(fc.nat(128), fc.nat(3)), { maxLength: 20 }), (steps) => {
      ring.restart();
      for (const [count, flags] of steps) {
        setFlags(flags);
        // Means nothing without the feature.
        setEvent(ring.driver.deviceUsedIndex);
        push(ring.virtqueue, count);
        expect(ring.virtqueue.publish()).toBe(count > 0 && (flags & 1) === 0);
      }
    });
    fc.assert(property, { numRuns: 100, seed });
  });

  it('kicks are asked for and turned off by the flag of the used ring, and the event field is left alone', () => {
    ring = new RingDevice();
    ring.driver.usedBytes.writeUInt16LE(0xabcd, 4 + 8 * ring.driver.size);
    ring.virtqueue.setNotification(false);
    expect(deviceFlags()).toBe(1);
    ring.virtqueue.setNotification(true);
    expect(deviceFlags()).toBe(0);
    expect(deviceEvent()).toBe(0xabcd);
  });
});

describe('nothing is published', () => {
  it.each([true, false])('when nothing was pushed, and nobody is called (event index: %s)', (eventIdx) => {
    ring = new RingDevice({ eventIdx, base: 7 });
    setEvent(6);
    for (let i = 0; i < 3; i++) expect(ring.virtqueue.publish()).toBe(false);
    expect(ring.driver.deviceUsedIndex).toBe(7);
  });

  it('before publish is called: entries first, then the index', () => {
    ring = new RingDevice();
    push(ring.virtqueue, 2);
    expect(ring.driver.deviceUsedIndex).toBe(0);
    ring.virtqueue.publish();
    expect(ring.driver.deviceUsedIndex).toBe(2);
    expect(ring.driver.takeRawUsed()).toEqual({ id: 0, lengthBytes: 1 });
  });
});

describe.each([true, false])('a device that goes to sleep (event index: %s)', (eventIdx) => {
  /** The driver's rule for kicks, from the text: by flag, or when the index passes the event. */
  function driverKicks(before: number, after: number): boolean {
    if (!eventIdx) return (deviceFlags() & 1) === 0;
    for (let i = before; i !== after; i = (i + 1) & 0xffff) if (i === deviceEvent()) return true;
    return false;
  }

  it('is kicked for whatever it has not seen, at whichever moment the driver comes', () => {
    ring = new RingDevice({ eventIdx, queueSize: 16 });
    for (const base of [0, 3, 0xffff]) {
      for (const count of [1, 2]) {
        // Every access of the device while it goes to sleep is a moment; then one before and one after.
        let moments = 1;
        for (let moment = 0; moment <= moments; moment++) {
          ring.restart(base);
          let seen = 0;
          let kicked = false;
          let came = false;
          const come = (): void => {
            came = true;
            const after = (base + count) & 0xffff;
            ring.driver.availableBytes.writeUInt16LE(after, 2);
            kicked = driverKicks(base, after);
          };
          const tick = (): void => {
            if (seen++ === moment) come();
          };
          const watcher: Watcher = {};
          const virtqueue = ring.makeVirtqueue(base, watchedMemory(ring.guestMemory, watcher));
          const chain = new DescriptorChain();
          virtqueue.setNotification(false);
          expect(virtqueue.pop(chain)).toBe(-1);
          watcher.beforeRead = tick;
          watcher.afterRead = tick;
          watcher.afterWrite = tick;
          const awake = virtqueue.setNotification(true);
          delete watcher.beforeRead;
          delete watcher.afterRead;
          delete watcher.afterWrite;
          moments = seen;
          if (!came) come();
          expect(awake || kicked, `index ${base}, ${count} requests, moment ${moment} of ${moments}`).toBe(true);
        }
        expect(moments).toBe(3);
      }
    }
  });

  it('is not kicked while it is awake: with a flag never, with the event index once at most', () => {
    ring = new RingDevice({ eventIdx, queueSize: 16 });
    ring.virtqueue.setNotification(true);
    ring.virtqueue.setNotification(false);
    let kicks = 0;
    for (let i = 0; i < 100; i++) {
      if (driverKicks(i, i + 1)) kicks++;
      ring.run({ type: RequestType.flush });
    }
    expect(kicks).toBe(eventIdx ? 1 : 0);
  });
});

describe('the poller of a session', () => {
  /** A ring as a session has it, of which requests are taken by hand. */
  function makeVring(kick: boolean): { vring: Vring; poller: VringPoller; kickFd: number } {
    ring = new RingDevice();
    const { memory, driver, guestMemory, device, rig } = ring;
    const vring = new Vring(0, device, guestMemory, rig.ring);
    vring.setSize(driver.size);
    const addresses = {
      descriptors: memory.userAddress(driver.descriptors),
      available: memory.userAddress(driver.available),
      used: memory.userAddress(driver.used),
    };
    vring.setAddresses(addresses, null);
    const kickFd = kick ? check(native.eventfdCreate(), 'make an eventfd') : -1;
    vring.setKick(kickFd);
    vring.enabled = true;
    expect(vring.startIfReady()).toBe(true);
    const poller = new VringPoller(rig.reactor, [vring]);
    poller.running = [vring];
    return { vring, poller, kickFd };
  }

  function end(vring: Vring): void {
    vring.stop();
    vring.close();
    ring.settle();
  }

  it('lets its reactor sleep when nothing waits, and asks for kicks meanwhile', () => {
    const { vring, poller } = makeVring(true);
    expect(poller.arm()).toBe(false);
    expect(vring.queue!.virtqueue.setNotification(true)).toBe(false);
    poller.disarm();
    end(vring);
  });

  it('calls the sleep off when a request came in', () => {
    const { vring, poller } = makeVring(true);
    ring.driver.availableBytes.writeUInt16LE(1, 2);
    expect(poller.arm()).toBe(true);
    poller.disarm();
    end(vring);
  });

  it('never lets its reactor sleep for a ring that nobody kicks', () => {
    const { vring, poller } = makeVring(false);
    for (let i = 0; i < 3; i++) expect(poller.arm()).toBe(true);
    poller.disarm();
    end(vring);
  });

  it('lets its reactor sleep on a ring that is broken, kicked or not', () => {
    for (const kick of [true, false]) {
      const { vring, poller } = makeVring(kick);
      ring.driver.publishIndex(1000);
      poller.poll();
      expect(vring.queue!.broken).toBe(true);
      expect(poller.arm()).toBe(false);
      poller.disarm();
      end(vring);
      if (kick) ring.close();
    }
  });

  it('takes at most a batch from a ring before it is the next one’s turn', () => {
    ring = new RingDevice({ queueSize: 1024 });
    const heads = Array.from({ length: 400 }, () => ring.driver.prepare({ type: RequestType.flush }).head);
    ring.driver.offer(...heads);
    const taken: number[] = [];
    const counter = {
      poll: () => {
        taken.push(ring.journal.entries.length);
        return false;
      },
    };
    ring.rig.reactor.addPoller(counter, PollPhase.publish);
    ring.settle(5);
    ring.rig.reactor.removePoller(counter);
    expect(taken).toEqual([128, 256, 384, 400, 400]);
  });
});
