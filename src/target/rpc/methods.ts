/**
 * The methods of the control socket. To add one, add an object to METHODS: its name, what it does in a line, the schema of its
 * parameters, and the call. Where SPDK has the thing, name, parameters and reply are SPDK's, and more fields may stand beside.
 */
import { z } from 'zod';
import { parsed } from '../config/schema.js';
import { suggest } from '../config/suggest.js';
import { parseSize } from '../config/values.js';
import type { Daemon, RunningController } from '../daemon.js';
import type { BdevInfo } from '../reactor-calls.js';
import { RpcCode, RpcError } from './rpc-error.js';

export interface RpcMethod<P extends z.ZodObject = z.ZodObject> {
  readonly name: string;
  readonly summary: string;
  readonly params: P;
  readonly call: (daemon: Daemon, params: z.infer<P>) => unknown;
}

/** Lets `call` see the types of its own schema. */
function method<P extends z.ZodObject>(definition: RpcMethod<P>): RpcMethod {
  return definition;
}

const name = z.string();
const MIB = 2 ** 20;
const size = parsed(parseSize);

export const METHODS: readonly RpcMethod[] = [
  method({
    name: 'rpc_get_methods',
    summary: 'names of all methods',
    // SPDK's parameters, of which none makes a difference here.
    params: z.strictObject({ current: z.boolean().optional(), include_aliases: z.boolean().optional() }),
    call: () => METHODS.map((candidate) => candidate.name),
  }),
  method({
    name: 'bdev_get_bdevs',
    summary: 'all bdevs, or the one called `name`',
    params: z.strictObject({ name: name.optional(), timeout: z.int().min(0).optional() }),
    call: async (daemon, params) => {
      const bdevs = await daemon.bdevInfos();
      return pick(bdevs, params.name, 'bdev').map(toSpdkBdev);
    },
  }),
  method({
    name: 'bdev_resize',
    summary: 'makes a disk larger while it is in use: `new_size` in bytes or as 20GiB; a file grows with it',
    params: z.strictObject({ name, new_size: size }),
    call: (daemon, params) => resize(daemon, params.name, null, params.new_size),
  }),
  method({
    name: 'bdev_uring_rescan',
    summary: 'takes up the size that the file or device of a uring bdev has by now',
    params: z.strictObject({ name }),
    call: (daemon, params) => resize(daemon, params.name, 'uring', null),
  }),
  method({
    name: 'bdev_null_resize',
    summary: 'makes a null bdev larger: `new_size` in MiB',
    params: z.strictObject({ name, new_size: z.int().min(1) }),
    call: (daemon, params) => resize(daemon, params.name, 'null', params.new_size * MIB),
  }),
  ...(
    [
      ['bdev_qcow2_snapshot_create', 'createSnapshot', 'keeps what a qcow2 disk holds now, under the name `snapshot`'],
      [
        'bdev_qcow2_snapshot_delete',
        'deleteSnapshot',
        'gives up the snapshot `snapshot` (its id or name) of a qcow2 disk',
      ],
      [
        'bdev_qcow2_snapshot_apply',
        'applySnapshot',
        'puts a qcow2 disk back to `snapshot`: its guest must not be using it',
      ],
    ] as const
  ).map(([methodName, operation, summary]) =>
    method({
      name: methodName,
      summary,
      params: z.strictObject({ name, snapshot: z.string().min(1) }),
      call: (daemon, { name: bdev, snapshot }) =>
        daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, operation, { snapshot }),
    }),
  ),
  ...(
    [
      ['bdev_qcow2_bitmap_remove', 'removeBitmap', 'removes the dirty bitmap `bitmap` of a qcow2 disk'],
      ['bdev_qcow2_bitmap_clear', 'clearBitmap', 'makes all of a qcow2 disk clean in `bitmap`'],
    ] as const
  ).map(([methodName, operation, summary]) =>
    method({
      name: methodName,
      summary,
      params: z.strictObject({ name, bitmap: z.string().min(1) }),
      call: (daemon, { name: bdev, bitmap }) =>
        daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, operation, { bitmap }),
    }),
  ),
  method({
    name: 'bdev_qcow2_bitmap_add',
    summary: 'adds a dirty bitmap `bitmap` to a qcow2 disk, which records what is written from now on',
    params: z.strictObject({ name, bitmap: z.string().min(1), granularity: size.optional() }),
    call: (daemon, { name: bdev, ...params }) =>
      daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, 'addBitmap', params),
  }),
  method({
    name: 'bdev_qcow2_bitmap_list',
    summary: 'the dirty bitmaps of a qcow2 disk',
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.operate(pick(daemon.bdevs, params.name, 'bdev')[0]!, 'bitmaps', {}),
  }),
  method({
    name: 'bdev_qcow2_stream',
    summary: 'copies what lies below a qcow2 overlay into it, then lets go of it: a job, at most `bytes_per_second`',
    params: z.strictObject({ name, bytes_per_second: size.optional() }),
    call: (daemon, { name: bdev, bytes_per_second: bytesPerSecond = 0 }) =>
      daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, 'stream', { bytesPerSecond }),
  }),
  method({
    name: 'bdev_qcow2_commit',
    summary:
      'moves what a qcow2 overlay holds into the image directly below it, which nobody else may use meanwhile: a job, at most `bytes_per_second`',
    params: z.strictObject({ name, bytes_per_second: size.optional() }),
    call: (daemon, { name: bdev, bytes_per_second: bytesPerSecond = 0 }) =>
      daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, 'commit', { bytesPerSecond }),
  }),
  method({
    name: 'bdev_qcow2_backup',
    summary:
      'copies a qcow2 disk as it is now to the bdev `target`, or what was written since the last time, by `bitmap`: a job',
    params: z.strictObject({
      name,
      target: z.string(),
      bitmap: z.string().optional(),
      bytes_per_second: size.optional(),
    }),
    call: (daemon, { name: bdev, target, bitmap = '', bytes_per_second: bytesPerSecond = 0 }) =>
      daemon.operate(pick(daemon.bdevs, bdev, 'bdev')[0]!, 'backup', { target, bitmap, bytesPerSecond }),
  }),
  method({
    name: 'bdev_qcow2_job_get',
    summary: 'how far the last job of a qcow2 disk is, null when there was none',
    params: z.strictObject({ name }),
    call: async (daemon, params) =>
      (await daemon.operate(pick(daemon.bdevs, params.name, 'bdev')[0]!, 'job', {})) ??
      daemon.jobs.lost('bdev', params.name),
  }),
  method({
    name: 'bdev_qcow2_job_cancel',
    summary: 'ends the job of a qcow2 disk; started again it goes on',
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.operate(pick(daemon.bdevs, params.name, 'bdev')[0]!, 'cancelJob', {}),
  }),
  method({
    name: 'bdev_qcow2_snapshot_list',
    summary: 'the snapshots within a qcow2 disk',
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.operate(pick(daemon.bdevs, params.name, 'bdev')[0]!, 'snapshots', {}),
  }),
  method({
    name: 'controller_mirror',
    summary:
      'copies the disk of a controller to the bdev `target` while it is used, and keeps both the same: at most `bytes_per_second`',
    params: z.strictObject({ name, target: z.string(), bytes_per_second: size.optional() }),
    call: (daemon, params) =>
      daemon.mirrors.start(controllerOf(daemon, params.name), params.target, params.bytes_per_second ?? 0),
  }),
  method({
    name: 'controller_mirror_get',
    summary: "how far the last mirror of a controller's disk is, null when there was none",
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.mirrors.info(controllerOf(daemon, params.name)),
  }),
  method({
    name: 'controller_mirror_pivot',
    summary:
      'lets a controller go over to the target of its mirror, which its guest does not notice; then set it in the config',
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.mirrors.pivot(controllerOf(daemon, params.name)),
  }),
  method({
    name: 'controller_mirror_cancel',
    summary: "ends the mirror of a controller's disk, which stays where it is",
    params: z.strictObject({ name }),
    call: (daemon, params) => daemon.mirrors.cancel(controllerOf(daemon, params.name)),
  }),
  method({
    name: 'vhost_get_controllers',
    summary: 'all controllers, or the one called `name`',
    params: z.strictObject({ name: name.optional() }),
    call: async (daemon, params) => {
      const { controllers } = await daemon.live();
      return pick(
        daemon.controllers.map(({ config, reactor }) => ({ name: config.name, config, reactor })),
        params.name,
        'controller',
      ).map(({ config, reactor }) => {
        const info = controllers.get(config.name);
        return {
          ctrlr: config.name,
          socket: 'socketPath' in config.address ? config.address.socketPath : null,
          delay_base_us: 0,
          iops_threshold: 0,
          backend_specific: {
            block: { readonly: config.readOnly, bdev: config.bdev, transport: 'vhost_user_blk' },
          },
          reactor,
          state: info?.state ?? 'unknown',
          peer: info?.peer ?? null,
          queues_running: info?.queuesRunning ?? 0,
          inflight: info?.inflight ?? 0,
          features: info?.features ?? [],
          writeback: info?.writeback ?? null,
          guest_memory_bytes: info?.guestMemoryBytes ?? 0,
          faults: info?.faults ?? [],
          mirror: info?.mirror ?? null,
        };
      });
    },
  }),
];

/** The one with the name, or all when there is none. Throws RpcError when nothing is called so. */
function pick<T extends { readonly name: string }>(all: readonly T[], wanted: string | undefined, what: string): T[] {
  if (wanted === undefined) return [...all];
  const found = all.find((candidate) => candidate.name === wanted);
  if (found !== undefined) return [found];
  const names = all.map((candidate) => candidate.name);
  throw new RpcError(RpcCode.noSuchDevice, {
    field: 'name',
    message: `there is no ${what} ${wanted}`,
    remedy: suggest(wanted, names, what),
  });
}

/** Throws RpcError. */
function controllerOf(daemon: Daemon, wanted: string): RunningController {
  const named = daemon.controllers.map((controller) => ({ name: controller.config.name, controller }));
  return pick(named, wanted, 'controller')[0]!.controller;
}

/** @param module the one the bdev must be of, or null for any @param sizeBytes null: that of its storage by now */
async function resize(daemon: Daemon, name: string, module: string | null, sizeBytes: number | null): Promise<true> {
  const bdev = pick(daemon.bdevs, name, 'bdev')[0]!;
  if (module !== null && bdev.module !== module) {
    throw new RpcError(RpcCode.invalidArgument, {
      field: 'name',
      message: `bdev ${name} is of module ${bdev.module}, not ${module}`,
      remedy: 'use `bdev_resize`, which is for all modules',
    });
  }
  await daemon.resizeBdev(bdev, sizeBytes);
  return true;
}

function toSpdkBdev(bdev: BdevInfo): Record<string, unknown> {
  const can = (type: BdevInfo['supports'][number]): boolean => bdev.supports.includes(type);
  return {
    name: bdev.name,
    aliases: [],
    product_name: `${bdev.module} disk`,
    block_size: bdev.blockSizeBytes,
    num_blocks: bdev.sizeBytes / bdev.blockSizeBytes,
    uuid: bdev.uuid,
    claimed: bdev.claimedBy !== null,
    claimed_by: bdev.claimedBy,
    read_only: bdev.readOnly,
    supported_io_types: {
      read: can('read'),
      write: can('write'),
      unmap: can('discard'),
      flush: can('flush'),
      reset: can('reset'),
      write_zeroes: can('writeZeroes'),
    },
    driver_specific: { [bdev.module]: bdev.facts },
  };
}
