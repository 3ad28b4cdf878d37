/**
 * Disks that were moved to another bdev while the config still names the one before: a record of each, which is durable before the
 * first write goes to the new bdev alone. A daemon that starts serves the new one, or does not start: never the old data.
 */
import { z } from 'zod';
import type { AnyBdevConfig, ControllerConfig, DaemonConfig } from '../config/config.js';
import { basesOf } from '../config/config.js';
import type { FieldPath, Problems } from '../config/problem.js';
import type { StateFolder } from './state-folder.js';

const KIND = 'pivot';

const pivotSchema = z.object({
  version: z.literal(1),
  controller: z.string(),
  /** What the config named. */
  from: z.string(),
  /** What the disk is since. */
  to: z.string(),
  /** The file or device below `to`. */
  file: z.string(),
  /** ISO 8601, for people. */
  switchedAt: z.string(),
});

export type Pivot = Omit<z.infer<typeof pivotSchema>, 'version'>;

export interface AppliedPivots {
  /** With the bdevs that the disks are by now. */
  readonly config: DaemonConfig;
  /** Those that the config does not know of yet. */
  readonly applied: readonly Pivot[];
  /** Those that it names itself. */
  readonly obsolete: readonly Pivot[];
}

/** Throws errors of fs; see StateFolder. */
export function writePivot(state: StateFolder, pivot: Pivot): void {
  state.write(KIND, pivot.controller, { version: 1, ...pivot });
}

/** Throws errors of fs. */
export function forgetPivot(state: StateFolder, controller: string): void {
  state.remove(KIND, controller);
}

/** What the config makes of the records; adds a problem for each that does not fit. Throws errors of fs, and Error for a damaged record. */
export function applyPivots(config: DaemonConfig, state: StateFolder, problems: Problems): AppliedPivots {
  const controllers = [...config.controllers];
  const applied: Pivot[] = [];
  const obsolete: Pivot[] = [];
  for (const { path, value } of state.read(KIND)) {
    const parsed = pivotSchema.safeParse(value);
    if (!parsed.success) throw new Error(`${path} is no record of this version`);
    const pivot = parsed.data;
    const at = config.controllers.findIndex(({ name }) => name === pivot.controller);
    if (config.controllers[at]?.bdev === pivot.to) {
      obsolete.push(pivot);
      continue;
    }
    const misfit = findMisfit(config, at, pivot, path);
    if (misfit !== null) {
      problems.add(misfit.field, misfit.message, misfit.remedy);
      continue;
    }
    applied.push(pivot);
    controllers[at] = moved(config.controllers[at]!, pivot.to);
  }
  return { config: { ...config, controllers }, applied, obsolete };
}

/** The controller on another bdev. What it was on stays within reach, so that it can be moved back. */
export function moved(controller: ControllerConfig, to: string): ControllerConfig {
  const targets = [...controller.targets.filter((name) => name !== to), controller.bdev];
  return { ...controller, bdev: to, targets };
}

/** The file or device that a bdev has its data in; null when that is not storage that outlives the daemon. */
export function storageOf(bdevs: readonly AnyBdevConfig[], name: string): string | null {
  const bdev = bdevs.find((candidate) => candidate.name === name);
  if (bdev === undefined) return null;
  if (bdev.module === 'uring') return bdev.path;
  const base = basesOf(bdev).find(({ field }) => field === 'base');
  return base === undefined ? null : storageOf(bdevs, base.name);
}

interface Misfit {
  readonly field: FieldPath;
  readonly message: string;
  readonly remedy: string;
}

function findMisfit(config: DaemonConfig, at: number, pivot: Pivot, path: string): Misfit | null {
  const { controller, from, to, file } = pivot;
  const field = at < 0 ? ['controllers'] : ['controllers', at, 'bdev'];
  const done = `the disk of controller ${controller} was moved from bdev ${from} to ${to}`;
  const misfit = (problem: string, remedy: string): Misfit => {
    return {
      field,
      message: `${done}, ${problem}`,
      remedy: `${remedy}, or delete ${path} if that is not to hold any more`,
    };
  };
  if (at < 0) return misfit('and there is no such controller', `bring it back with \`bdev: ${to}\``);
  const named = config.controllers[at]!.bdev;
  if (named !== from) return misfit(`and the config names ${named}`, `write \`bdev: ${to}\``);
  const storage = storageOf(config.bdevs, to);
  if (storage === null) return misfit('which is not there', `bring back bdev ${to}, which lay on ${file}`);
  if (storage !== file) return misfit(`which lay on ${file} then and lies on ${storage} now`, `let it lie on ${file}`);
  const user = userOf(config, to);
  if (user !== null)
    return misfit(`which ${user} uses now`, `write \`bdev: ${to}\` here, and give ${user} another one`);
  return null;
}

/** Who uses a bdev. */
function userOf({ bdevs, controllers }: DaemonConfig, name: string): string | null {
  const bdev = bdevs.find((candidate) => basesOf(candidate).some((base) => base.name === name));
  if (bdev !== undefined) return `bdev ${bdev.name}`;
  const controller = controllers.find((candidate) => candidate.bdev === name);
  return controller === undefined ? null : `controller ${controller.name}`;
}
