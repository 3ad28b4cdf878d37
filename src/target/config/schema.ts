/**
 * The config file's schema: keys, types, bounds and defaults, in the file's own snake_case. Unknown keys are errors. A rule with
 * an advice of its own carries it as `remedy`; schema-problems.ts words the others.
 */
import { availableParallelism } from 'node:os';
import { z } from 'zod';
import { LOG_FORMATS, LOG_LEVELS } from './config.js';
import { parseListen, parseMode, parseSize } from './values.js';
import type { Parsed } from './values.js';

/** Bounds of lists: far above any sane use, so that a slip of the pen is an error and not a day of work. */
const REACTORS_MAX = 64;
const BDEVS_MAX = 4096;
const CONTROLLERS_MAX = 1024;
const TARGETS_MAX = 64;
const PEERS_MAX = 256;
/** What the kernel takes for "no user" and "no group". */
const ACCOUNT_NONE = 2 ** 32 - 1;
const DAY_US = 86_400_000_000;

export const DEFAULT_POLL_US = 100;
/** Covers 256 GiB of disk in clusters of 64 KiB. */
export const DEFAULT_L2_CACHE_BYTES = 32 * 2 ** 20;
export const DEFAULT_RESTART_DIR = '/dev/shm';
export const DEFAULT_CLUSTER_CACHE_BYTES = 64 * 2 ** 20;
export const DEFAULT_CODEC_THREADS = Math.min(4, availableParallelism());
/** A guest takes one queue for each of its processors; QEMU refuses a back-end that offers fewer than it asks for. */
export const DEFAULT_QUEUES = 16;
export const QUEUES_MAX = 64;
export const SERIAL_MAX_BYTES = 20;
export const DEFAULT_SOCKET_MODE = 0o660;
/** A QEMU that has to touch all of its memory first is connected and silent meanwhile. */
export const DEFAULT_HANDSHAKE_TIMEOUT_S = 60;
export const DEFAULT_METRICS = { host: '127.0.0.1', port: 9464 };
export const DEFAULT_DRAIN_TIMEOUT_S = 10;

/** A field read by one of the parsers of values.ts. */
export function parsed<T>(parse: (input: unknown) => Parsed<T>) {
  return z.unknown().transform((input, context): T => {
    if (input === undefined) {
      context.addIssue({ code: 'custom', message: 'is missing', params: { remedy: 'add it' } });
      return z.NEVER;
    }
    const result = parse(input);
    if ('value' in result) return result.value;
    context.addIssue({ code: 'custom', message: result.message, params: { remedy: result.remedy } });
    return z.NEVER;
  });
}

/** Characters of an id or name in an image, at most: its length there has 16 bits. */
const SNAPSHOT_NAME_MAX = 65535;
const nameOf = z.string().refine((text) => /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(text), {
  message: 'is not a name',
  params: { remedy: 'use 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first' },
});
const path = z.string().refine((text) => text !== '' && !text.includes('\0'), {
  message: 'is not a path',
  params: { remedy: 'write the path of a file' },
});
const serial = z.string().refine((text) => /^[\x20-\x7e]*$/.test(text) && text.length <= SERIAL_MAX_BYTES, {
  message: 'is not a serial number',
  params: { remedy: `use at most ${SERIAL_MAX_BYTES} printable ASCII characters` },
});
const size = parsed(parseSize);
const blockSize = z.union([z.literal(512), z.literal(4096)]);
const us = z.number().min(0).max(DAY_US).default(0);
/** 0 stands for "no limit". */
const rate = parsed(parseSize).default(0);

const common = {
  name: nameOf,
  uuid: z
    .string()
    .refine((text) => /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(text), {
      message: 'is not a UUID',
      params: { remedy: 'write it as 123e4567-e89b-42d3-a456-426614174000, or leave it out' },
    })
    .optional(),
};
const filter = { ...common, base: nameOf };

const errorRule = z.strictObject({
  type: z.enum(['read', 'write', 'flush', 'discard', 'write_zeroes', 'any']),
  action: z.enum(['fail', 'no_space', 'again', 'hang', 'corrupt']),
  first: z.int().min(1).default(1),
  count: z.int().min(1).nullable().default(null),
  errno: z.int().min(1).max(4095).optional(),
  from_offset: size.optional(),
  to_offset: size.optional(),
  probability: z.number().min(0).max(1).optional(),
});

const bdev = z.discriminatedUnion('module', [
  z.strictObject({
    ...common,
    module: z.literal('null'),
    size,
    block_size: blockSize.default(512),
    read_zeroes: z.boolean().default(false),
  }),
  z.strictObject({ ...common, module: z.literal('malloc'), size, block_size: blockSize.default(512) }),
  z.strictObject({
    ...common,
    module: z.literal('uring'),
    path,
    read_only: z.boolean().default(false),
    create: size.nullable().default(null),
    block_size: blockSize.nullable().default(null),
    direct: z.boolean().default(true),
    iopoll: z.boolean().default(false),
    fixed_buffers: z.boolean().default(false),
    lock: z.union([z.boolean(), z.literal('running')]).default(true),
  }),
  z.strictObject({ ...filter, module: z.literal('passthru') }),
  z.strictObject({
    ...filter,
    module: z.literal('delay'),
    read_us: us,
    write_us: us,
    flush_us: us,
    discard_us: us,
    jitter_us: us,
  }),
  z.strictObject({ ...filter, module: z.literal('error'), rules: z.array(errorRule).max(1000) }),
  z.strictObject({
    ...filter,
    module: z.literal('qos'),
    group: nameOf.nullable().default(null),
    read_iops: z.number().min(0).default(0),
    write_iops: z.number().min(0).default(0),
    total_iops: z.number().min(0).default(0),
    read_bytes_per_second: rate,
    write_bytes_per_second: rate,
    total_bytes_per_second: rate,
    burst_seconds: z.number().positive().max(3600).default(1),
  }),
  z.strictObject({
    ...filter,
    module: z.literal('qcow2'),
    backing: nameOf.nullable().default(null),
    data_file: nameOf.nullable().default(null),
    image_dir: path.nullable().default(null),
    key_file: path.nullable().default(null),
    snapshot: z.string().min(1).max(SNAPSHOT_NAME_MAX).nullable().default(null),
    read_only: z.boolean().default(false),
    l2_cache: size.default(DEFAULT_L2_CACHE_BYTES),
    restart_dir: path.nullable().default(DEFAULT_RESTART_DIR),
    cluster_cache: size.default(DEFAULT_CLUSTER_CACHE_BYTES),
    codec_threads: z.int().min(0).max(64).default(DEFAULT_CODEC_THREADS),
  }),
]);

const reactor = z.strictObject({
  name: nameOf,
  mode: z.enum(['adaptive', 'busy', 'interrupt']).default('adaptive'),
  poll_us: z.number().min(0).max(DAY_US).default(DEFAULT_POLL_US),
  core: z.int().min(0).max(4095).optional(),
});

/** A user or a group: names are looked up when the daemon starts. */
const account = z.unknown().transform((input, context): string | number => {
  if (typeof input === 'string' && /^[^\s:,0-9][^\s:,]{0,255}$/.test(input)) return input;
  if (typeof input === 'number' && Number.isInteger(input) && input >= 0 && input < ACCOUNT_NONE) return input;
  const remedy = 'write a name as libvirt-qemu, or a number as 64055';
  context.addIssue({ code: 'custom', message: 'is not a user or group', input, params: { remedy } });
  return z.NEVER;
});
const accounts = z.array(account).max(PEERS_MAX).default([]);

const controller = z.strictObject({
  name: nameOf,
  bdev: nameOf,
  socket: path,
  socket_mode: parsed(parseMode).default(DEFAULT_SOCKET_MODE),
  socket_group: account.nullable().default(null),
  allow: z.strictObject({ users: accounts, groups: accounts }).nullable().default(null),
  handshake_timeout_s: z.number().positive().max(3600).default(DEFAULT_HANDSHAKE_TIMEOUT_S),
  serial: serial.optional(),
  queues: z.int().min(1).max(QUEUES_MAX).default(DEFAULT_QUEUES),
  read_only: z.boolean().default(false),
  write_cache: z.boolean().default(true),
  reactor: nameOf.optional(),
  isolate: z.boolean().default(false),
  targets: z.array(nameOf).max(TARGETS_MAX).default([]),
});

export const configSchema = z.strictObject({
  reactors: z
    .array(reactor)
    .min(1)
    .max(REACTORS_MAX)
    .prefault([{ name: 'reactor0' }]),
  bdevs: z.array(bdev).min(1).max(BDEVS_MAX),
  controllers: z.array(controller).min(1).max(CONTROLLERS_MAX),
  metrics: z.strictObject({ listen: parsed(parseListen).default(DEFAULT_METRICS) }).prefault({}),
  rpc: z
    .strictObject({ socket: path.optional(), socket_mode: parsed(parseMode).default(DEFAULT_SOCKET_MODE) })
    .prefault({}),
  log: z
    .strictObject({ level: z.enum(LOG_LEVELS).default('info'), format: z.enum(LOG_FORMATS).default('auto') })
    .prefault({}),
  drain_timeout_s: z.number().positive().max(3600).default(DEFAULT_DRAIN_TIMEOUT_S),
  core_dumps: z.boolean().default(false),
  state_dir: path.nullable().default(null),
});

export type FileConfig = z.infer<typeof configSchema>;
export type FileBdev = FileConfig['bdevs'][number];
