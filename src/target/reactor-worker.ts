/** The code of a reactor, on its thread or in its process: its bdevs and controllers, driven by calls of the control plane. */
import { BdevError } from '../bdev/bdev.js';
import type { Bdev } from '../bdev/bdev.js';
import { IO_TYPE_NAMES, IoType } from '../bdev/bdev-io.js';
import { modules } from '../bdev/modules.js';
import { BdevRegistry } from '../bdev/registry.js';
import type { ReactorHandlers, ReactorHost } from '../poller/remote-reactor.js';
import { serveReactor } from '../poller/serve-reactor.js';
import { BlkController } from '../vhost-user/blk-controller.js';
import type { LogFunction } from '../vhost-user/log.js';
import { LOG_LEVELS } from './config/config.js';
import type { LogLevel } from './config/config.js';
import { limitRate } from './rate-limit.js';
import { ReactorMirrors } from './reactor-mirrors.js';
import { forbidOpeningFiles } from './system.js';
import { warmUpReactor } from './warm-up-disk.js';
import type { BdevInfo, Notices, ReactorCallHandlers } from './reactor-calls.js';

serveReactor(warmUpReactor, (host) => makeHandlers(host) as unknown as ReactorHandlers);

function makeHandlers(host: ReactorHost): ReactorCallHandlers {
  const registry = new BdevRegistry(host.reactor, modules, (name, info) =>
    notify(host, 'jobEnded', { owner: 'bdev', name, info }),
  );
  const controllers = new Map<string, BlkController>();
  const mirrors = new ReactorMirrors(host.reactor, registry, (name, info) =>
    notify(host, 'jobEnded', { owner: 'controller', name, info: { type: 'mirror', ...info } }),
  );
  const controllerOf = (name: string): BlkController => {
    const controller = controllers.get(name);
    if (controller !== undefined) return controller;
    throw new BdevError('no-such-controller', 'name', `there is no ${name}`, 'create it');
  };
  return {
    createBdev: async (config) => {
      const bdev = registry.create(await registry.prepare(config));
      return { ...infoOf(registry, bdev), stats: host.share(registry.stats(bdev.name)!.values) };
    },
    createController: ({ bdev, options, logLevel }) => {
      const writes = !options.readOnly && registry.get(bdev)?.readOnly !== true;
      const open = registry.open(bdev, writes ? options.name : null, 'bdev');
      const controller = new BlkController(host.reactor, open, options, logFor(host, options.name, logLevel));
      controller.onClosedByPeer = () => notify(host, 'closedByPeer', { controller: options.name });
      controllers.set(options.name, controller);
      return { stats: host.share(controller.stats) };
    },
    listen: ({ name, address, peers }) => {
      controllerOf(name).listen(address, peers);
    },
    controllers: () =>
      [...controllers.values()].map((controller) => ({ ...controller.info(), mirror: mirrors.info(controller.name) })),
    bdevs: () => infosOf(registry),
    resizeBdev: ({ name, sizeBytes }) => {
      const bdev = registry.get(name);
      if (bdev === undefined) throw new BdevError('no-such-bdev', 'name', `there is no bdev ${name}`, 'create it');
      if (sizeBytes === null) bdev.size.rescan();
      else bdev.size.resize(sizeBytes);
      return infosOf(registry);
    },
    operate: ({ name, operation, params }) => {
      const bdev = registry.get(name);
      if (bdev?.operate !== undefined) {
        mirrors.checkOperation(bdev, operation);
        return bdev.operate(operation, params);
      }
      throw new BdevError(
        'no-such-operation',
        'name',
        `bdev ${name} knows no ${operation}`,
        'name a bdev of another module',
      );
    },
    mirror: (params) => mirrors.start(controllerOf(params.controller), params),
    cancelMirror: async ({ controller }) => {
      const mirror = mirrors.get(controller);
      await mirror.cancel();
      return mirror.info;
    },
    preparePivot: async ({ controller }) => {
      const mirror = mirrors.get(controller);
      await mirror.preparePivot();
      return mirror.info;
    },
    commitPivot: ({ controller }) => {
      const mirror = mirrors.get(controller);
      mirror.commitPivot();
      return mirror.info;
    },
    abortPivot: ({ controller }) => {
      const mirror = mirrors.get(controller);
      mirror.abortPivot();
      return mirror.info;
    },
    counters: () => ({
      reactor: host.reactor.stats,
      bdevs: new Map(registry.names().map((name) => [name, host.share(registry.stats(name)!.values)])),
      controllers: new Map([...controllers].map(([name, { stats }]) => [name, host.share(stats)])),
    }),
    seal: () => {
      if (host.isIsolated) forbidOpeningFiles();
    },
    close: async () => {
      await mirrors.stop();
      await Promise.all([...controllers.values()].map((controller) => controller.close()));
      registry.destroyAll();
    },
  };
}

function infosOf(registry: BdevRegistry): BdevInfo[] {
  return registry.names().map((name) => infoOf(registry, registry.get(name)!));
}

function infoOf(registry: BdevRegistry, bdev: Bdev): BdevInfo {
  return {
    name: bdev.name,
    module: bdev.moduleName,
    uuid: bdev.uuid,
    sizeBytes: bdev.blockCount * bdev.blockSizeBytes,
    blockSizeBytes: bdev.blockSizeBytes,
    readOnly: bdev.readOnly,
    claimedBy: registry.writerOf(bdev.name),
    supports: IO_TYPE_NAMES.filter((name) => bdev.supports(IoType[name])),
    facts: bdev.describe(),
  };
}

/** What a guest or front-end can cause is limited on this side already: it costs the control plane nothing. */
function logFor(host: ReactorHost, controller: string, threshold: LogLevel): LogFunction {
  const limited = limitRate((level, message, fields = {}) => {
    notify(host, 'log', { controller, level, message, fields });
  }, host.reactor.clock);
  return (level, message, fields) => {
    if (LOG_LEVELS.indexOf(level) >= LOG_LEVELS.indexOf(threshold)) limited(level, message, fields);
  };
}

function notify<E extends keyof Notices>(host: ReactorHost, event: E, data: Notices[E]): void {
  host.notify(event, data);
}
