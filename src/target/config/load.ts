/** From a config file to a DaemonConfig: schema, names and references, all problems shown at once. */
import { dirname, resolve } from 'node:path';
import type { AnyBdevConfig, ControllerConfig, DaemonConfig } from './config.js';
import { readConfigFile } from './config-file.js';
import { Problems } from './problem.js';
import type { ConfigSource } from './problem.js';
import { SERIAL_MAX_BYTES, configSchema } from './schema.js';
import type { FileBdev, FileConfig } from './schema.js';
import { addSchemaProblems } from './schema-problems.js';
import { checkReferences } from './stacks.js';

export interface LoadedConfig {
  readonly config: DaemonConfig;
  readonly source: ConfigSource;
}

/** Throws ConfigError with everything that is wrong with the file. */
export function loadConfig(file: string): LoadedConfig {
  const { value, source } = readConfigFile(file);
  nameTheNullModule(value);
  const problems = new Problems(source);
  const result = configSchema.safeParse(value, { reportInput: true });
  if (!result.success) addSchemaProblems(problems, result.error.issues, value);
  problems.throwIfAny();
  const config = toDaemonConfig(result.data!, dirname(resolve(file)));
  checkReferences(config, problems);
  problems.throwIfAny();
  return { config, source };
}

/** `module: null` without quotes is nothing at all to YAML. */
function nameTheNullModule(value: unknown): void {
  const bdevs = (value as { bdevs?: unknown } | null)?.bdevs;
  if (!Array.isArray(bdevs)) return;
  for (const bdev of bdevs as ({ module?: unknown } | null)[]) {
    if (bdev !== null && typeof bdev === 'object' && bdev.module === null) bdev.module = 'null';
  }
}

/** @param folder what relative paths start from: the config file's own folder */
function toDaemonConfig(file: FileConfig, folder: string): DaemonConfig {
  return {
    reactors: file.reactors.map((reactor) => ({
      name: reactor.name,
      mode: reactor.mode,
      pollUs: reactor.poll_us,
      core: reactor.core,
    })),
    bdevs: file.bdevs.map((bdev) => toBdevConfig(bdev, folder)),
    controllers: file.controllers.map((controller) => toControllerConfig(controller, folder)),
    metrics: file.metrics.listen,
    rpc:
      file.rpc.socket === undefined
        ? null
        : { socketPath: resolve(folder, file.rpc.socket), mode: file.rpc.socket_mode },
    log: file.log,
    drainTimeoutS: file.drain_timeout_s,
    coreDumps: file.core_dumps,
    stateDir: file.state_dir === null ? null : resolve(folder, file.state_dir),
  };
}

function toControllerConfig(controller: FileConfig['controllers'][number], folder: string): ControllerConfig {
  return {
    name: controller.name,
    bdev: controller.bdev,
    address: { socketPath: resolve(folder, controller.socket), mode: controller.socket_mode },
    serial: controller.serial ?? controller.name.slice(0, SERIAL_MAX_BYTES),
    queues: controller.queues,
    readOnly: controller.read_only,
    writeCache: controller.write_cache,
    reactor: controller.reactor ?? null,
    isolate: controller.isolate,
    targets: controller.targets,
    allow: controller.allow,
    socketGroup: controller.socket_group,
    handshakeTimeoutS: controller.handshake_timeout_s,
  };
}

function toBdevConfig(bdev: FileBdev, folder: string): AnyBdevConfig {
  const common = { name: bdev.name, uuid: bdev.uuid };
  switch (bdev.module) {
    case 'null':
      return {
        ...common,
        module: 'null',
        sizeBytes: bdev.size,
        blockSizeBytes: bdev.block_size,
        readZeroes: bdev.read_zeroes,
      };
    case 'malloc':
      return { ...common, module: 'malloc', sizeBytes: bdev.size, blockSizeBytes: bdev.block_size };
    case 'uring':
      return {
        ...common,
        module: 'uring',
        path: resolve(folder, bdev.path),
        readOnly: bdev.read_only,
        create: bdev.create === null ? null : { sizeBytes: bdev.create },
        blockSizeBytes: bdev.block_size,
        direct: bdev.direct,
        iopoll: bdev.iopoll,
        fixedBuffers: bdev.fixed_buffers,
        lock: bdev.lock,
      };
    case 'passthru':
      return { ...common, module: 'passthru', base: bdev.base };
    case 'delay':
      return {
        ...common,
        module: 'delay',
        base: bdev.base,
        readUs: bdev.read_us,
        writeUs: bdev.write_us,
        flushUs: bdev.flush_us,
        discardUs: bdev.discard_us,
        jitterUs: bdev.jitter_us,
      };
    case 'error':
      return { ...common, module: 'error', base: bdev.base, rules: bdev.rules.map(toErrorRule) };
    case 'qos':
      return {
        ...common,
        module: 'qos',
        base: bdev.base,
        group: bdev.group,
        readIops: bdev.read_iops,
        writeIops: bdev.write_iops,
        totalIops: bdev.total_iops,
        readBytesPerSecond: bdev.read_bytes_per_second,
        writeBytesPerSecond: bdev.write_bytes_per_second,
        totalBytesPerSecond: bdev.total_bytes_per_second,
        burstSeconds: bdev.burst_seconds,
      };
    case 'qcow2':
      return {
        ...common,
        module: 'qcow2',
        base: bdev.base,
        backing: bdev.backing,
        dataFile: bdev.data_file,
        imageDir: bdev.image_dir === null ? null : resolve(folder, bdev.image_dir),
        keyFile: bdev.key_file === null ? null : resolve(folder, bdev.key_file),
        snapshot: bdev.snapshot,
        readOnly: bdev.read_only,
        l2CacheBytes: bdev.l2_cache,
        clusterCacheBytes: bdev.cluster_cache,
        codecThreads: bdev.codec_threads,
        restartDir: bdev.restart_dir === null ? null : resolve(folder, bdev.restart_dir),
      };
  }
}

type FileRule = Extract<FileBdev, { module: 'error' }>['rules'][number];
type ErrorRule = Extract<AnyBdevConfig, { module: 'error' }>['rules'][number];

function toErrorRule(rule: FileRule): ErrorRule {
  return {
    type: rule.type === 'write_zeroes' ? 'writeZeroes' : rule.type,
    action: rule.action === 'no_space' ? 'noSpace' : rule.action,
    first: rule.first,
    count: rule.count,
    errno: rule.errno,
    fromOffsetBytes: rule.from_offset,
    toOffsetBytes: rule.to_offset,
    probability: rule.probability,
  };
}
