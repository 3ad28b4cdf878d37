/**
 * Goal: a flush is answered only when a sync of the file has ended that began after the flush came, however rounds, waiting writes
 * and flushes meet.
 *
 * Method: random writes and flushes, some of them submitted from within completions, on images whose caches are too small, so that
 * writes wait for rounds; a watch between image and file counts its syncs.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { IoChannel } from '../../../src/bdev/bdev.js';
import { IoStatus, IoType } from '../../../src/bdev/bdev-io.js';
import type { BdevIo, IoOwner } from '../../../src/bdev/bdev-io.js';
import type { UringConfig } from '../../../src/bdev/uring/uring.js';
import { Disk } from '../../support/disk.js';
import type { Request } from '../../support/disk.js';
import { QemuImg } from '../../support/qemu-img.js';
import { Rig } from '../../support/rig.js';
import { seededRandom } from '../../support/seed.js';
import { qcow2On, uringDefaults } from '../stacks.js';

const BLOCK = 4096;
const DISK_BYTES = 256 * 2 ** 20;
const STEPS = 400;

let qemu: QemuImg;

beforeEach(() => {
  qemu = new QemuImg();
});

afterEach(() => {
  qemu.remove();
});

/** Numbers the syncs that pass. */
class SyncWatch implements IoChannel, IoOwner {
  begun = 0;
  /** The latest begun of those that have ended. */
  ended = 0;
  readonly #below: IoChannel;

  constructor(below: IoChannel) {
    this.#below = below;
  }

  submit(io: BdevIo): void {
    if (io.type === IoType.flush) io.push(this, ++this.begun);
    this.#below.submit(io);
  }

  onDone(io: BdevIo, number: number): void {
    if (io.status === IoStatus.success) this.ended = Math.max(this.ended, number);
    io.complete(io.status, io.errno);
  }

  close(): void {
    this.#below.close();
  }
}

function open(options: string, l2CacheBytes: number, restartDir: string | null): { disk: Disk; watch: SyncWatch } {
  qemu.run('create', '-q', '-f', 'qcow2', '-o', options, 'image', String(DISK_BYTES));
  const rig = new Rig('commit');
  const config: UringConfig = { ...uringDefaults, name: 'file', path: qemu.path('image') };
  const file = rig.registry.create(config);
  const openChannel = file.openChannel.bind(file);
  let watch: SyncWatch | null = null;
  file.openChannel = (reactor) => (watch = new SyncWatch(openChannel(reactor)));
  const disk = new Disk(rig, [qcow2On({ l2CacheBytes, restartDir })('disk', 'file')]);
  return { disk, watch: watch! };
}

describe('A flush of a qcow2 disk', () => {
  it.each([
    ['with caches too small', 'cluster_size=4k', 2 ** 14, '/dev/shm'],
    ['with caches too small and no log', 'cluster_size=4k', 2 ** 14, null],
    ['with caches that are large enough', 'cluster_size=64k', 2 ** 20, '/dev/shm'],
    ['with no log', 'cluster_size=64k', 2 ** 20, null],
  ])('is answered by a sync that began after it came: %s', (_, options, l2CacheBytes, restartDir) => {
    const random = seededRandom(73);
    const { disk, watch } = open(options, l2CacheBytes, restartDir);
    const requests: Request[] = [];
    let early = 0;
    const flush = (): void => {
      const before = watch.begun;
      const request = disk.prepare(IoType.flush, 0, 0);
      request.then = () => {
        if (watch.ended <= before) early++;
      };
      requests.push(disk.submit(request));
    };
    for (let step = 0; step < STEPS; step++) {
      for (let writes = random.below(8); writes > 0; writes--) {
        const request = disk.startWrite(random.below(DISK_BYTES / BLOCK) * BLOCK, Buffer.alloc(BLOCK, 1 + step));
        if (random.below(4) === 0) request.then = flush;
        requests.push(request);
      }
      if (random.below(4) === 0) flush();
      for (let steps = random.below(6); steps > 0; steps--) disk.rig.step();
      if (step % 50 === 49) {
        disk.finish(...requests.splice(0));
        disk.forget();
      }
    }
    // What a completion submits comes after what was waited for.
    while (requests.length > 0) disk.finish(...requests.splice(0));
    disk.close();
    expect(early).toBe(0);
    expect(watch.ended).toBeGreaterThan(10);
    expect(qemu.check('image').status).toBe(0);
  });
});
