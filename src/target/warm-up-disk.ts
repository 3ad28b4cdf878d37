/**
 * Warms a reactor's data path up on disks of its own: one in memory through the uring module, which is what most disks end in,
 * and one that answers at once. Two of each, so that compiled code has seen more than one of everything.
 */
import { check, native } from '../../native/index.js';
import type { BdevConfig } from '../bdev/bdev.js';
import { modules } from '../bdev/modules.js';
import type { NullConfig } from '../bdev/null/null.js';
import { BdevRegistry } from '../bdev/registry.js';
import type { UringConfig } from '../bdev/uring/uring.js';
import type { Reactor } from '../poller/reactor.js';
import { warmUp } from '../vhost-user/warm-up.js';

const DISK_BYTES = 1024 * 1024;
/** Per disk. Enough for all of it to have run often, and for some to be compiled; guests wait for more when a daemon is started again. */
const REQUESTS = 1_000;

export function warmUpReactor(reactor: Reactor): void {
  const fd = check(native.memfdCreate('strata-warm-up', DISK_BYTES), 'create a disk to warm up with');
  const uring: UringConfig = {
    name: 'uring',
    module: 'uring',
    path: `/proc/self/fd/${fd}`,
    readOnly: false,
    create: null,
    blockSizeBytes: null,
    direct: false,
    iopoll: false,
    fixedBuffers: false,
    lock: false,
  };
  const none: NullConfig = {
    name: 'null',
    module: 'null',
    sizeBytes: DISK_BYTES,
    blockSizeBytes: 512,
    readZeroes: false,
  };
  const configs: readonly BdevConfig[] = [none, uring, none, uring];
  for (const config of configs) {
    const registry = new BdevRegistry(reactor, modules);
    registry.create(config);
    const open = registry.open(config.name, 'warm-up', 'bdev');
    warmUp(reactor, open, REQUESTS);
    open.close();
    registry.destroyAll();
  }
  native.fileClose(fd);
}
