/**
 * Disks as stacks: which bdev stands on which, and which reactor a stack lives on.
 *
 * Invariants
 * - A stack (bdevs joined by `base`, with the controllers that show them) lives on one reactor as a whole. So does a qos
 *   group, whose members share one set of limits, and so do the bdevs that a controller may be moved to.
 * - A stack that is isolated has its reactor to itself.
 * - Within a reactor bdevs come after their bases.
 */
import type { AnyBdevConfig, ControllerConfig, DaemonConfig, ReactorConfig } from './config.js';
import { basesOf, isSnapshot } from './config.js';
import { formatPath } from './problem.js';
import type { FieldPath, Problems } from './problem.js';
import { DEFAULT_POLL_US } from './schema.js';
import { suggest } from './suggest.js';
import { socketPathProblem } from './values.js';

/** What one reactor has to set up. */
export interface ReactorPlan {
  readonly reactor: ReactorConfig;
  /** It runs in a process of its own. */
  readonly isIsolated: boolean;
  /** Bases first. */
  readonly bdevs: AnyBdevConfig[];
  readonly controllers: ControllerConfig[];
}

/** Adds a problem for every name that is used twice or leads nowhere, and for stacks that cannot be placed. */
export function checkReferences(config: DaemonConfig, problems: Problems): void {
  checkUnique(config.reactors, 'reactors', problems);
  checkUnique(config.bdevs, 'bdevs', problems);
  checkUnique(config.controllers, 'controllers', problems);
  checkSockets(config, problems);
  const bdevNames = config.bdevs.map((bdev) => bdev.name);
  const reactorNames = config.reactors.map((reactor) => reactor.name);
  config.bdevs.forEach((bdev, i) => {
    for (const { name, field } of basesOf(bdev)) checkKnown(name, bdevNames, ['bdevs', i, field], 'bdev', problems);
  });
  config.controllers.forEach((controller, i) => {
    checkKnown(controller.bdev, bdevNames, ['controllers', i, 'bdev'], 'bdev', problems);
    controller.targets.forEach((target, k) => {
      checkKnown(target, bdevNames, ['controllers', i, 'targets', k], 'bdev', problems);
    });
    checkKnown(controller.reactor ?? undefined, reactorNames, ['controllers', i, 'reactor'], 'reactor', problems);
  });
  checkCircles(config.bdevs, problems);
  checkWriters(config, problems);
  checkPlaces(config, problems);
}

/**
 * Places every stack: an isolated one by itself, others where a controller asks for, else in turn. Takes a config without problems.
 * @returns one plan for each reactor, in the order of the config, then one for each isolated stack, named for its first controller
 */
export function planReactors(config: DaemonConfig): ReactorPlan[] {
  const newPlan = (reactor: ReactorConfig, isIsolated: boolean): ReactorPlan => {
    return { reactor, isIsolated, bdevs: [], controllers: [] };
  };
  const plans = config.reactors.map((reactor) => newPlan(reactor, false));
  const isolated: ReactorPlan[] = [];
  const groups = stackGroups(config);
  const placeOf = new Map<string, ReactorPlan>();
  for (const controller of config.controllers) {
    const group = groups.get(controller.bdev)!;
    if (controller.isolate) {
      if (placeOf.has(group)) continue;
      const plan = newPlan(isolatedReactor(controller, config.reactors), true);
      isolated.push(plan);
      placeOf.set(group, plan);
    } else if (controller.reactor !== null) {
      placeOf.set(
        group,
        plans.find((plan) => plan.reactor.name === controller.reactor)!,
      );
    }
  }
  // Controllers first: what is shown is spread evenly, whatever else is defined.
  let next = 0;
  for (const name of [...config.controllers.map((c) => c.bdev), ...config.bdevs.map((b) => b.name)]) {
    const group = groups.get(name)!;
    if (!placeOf.has(group)) placeOf.set(group, plans[next++ % plans.length]!);
  }
  for (const bdev of basesFirst(config.bdevs)) placeOf.get(groups.get(bdev.name)!)!.bdevs.push(bdev);
  for (const controller of config.controllers) placeOf.get(groups.get(controller.bdev)!)!.controllers.push(controller);
  return [...plans, ...isolated];
}

/** The settings of the reactor that the controller names, else of one that is left to itself. */
function isolatedReactor({ name, reactor }: ControllerConfig, reactors: readonly ReactorConfig[]): ReactorConfig {
  const settings = reactors.find((candidate) => candidate.name === reactor);
  return { mode: 'adaptive', pollUs: DEFAULT_POLL_US, ...settings, name };
}

function checkUnique(items: readonly { readonly name: string }[], list: string, problems: Problems): void {
  items.forEach(({ name }, i) => {
    const first = items.findIndex((item) => item.name === name);
    if (first < i)
      problems.add([list, i, 'name'], `${name} is the name of ${list}[${first}] too`, 'choose another name');
  });
}

function checkSockets({ controllers, rpc }: DaemonConfig, problems: Problems): void {
  const seen = new Map<string, string>();
  const check = (path: string, owner: FieldPath): void => {
    const field = [...owner, 'socket'];
    const tooLong = socketPathProblem(path);
    if (tooLong !== undefined) problems.add(field, tooLong.message, tooLong.remedy);
    const first = seen.get(path);
    if (first === undefined) seen.set(path, formatPath(owner));
    else problems.add(field, `${path} is the socket of ${first} too`, 'choose another path');
  };
  controllers.forEach(({ address }, i) => {
    if ('socketPath' in address) check(address.socketPath, ['controllers', i]);
  });
  if (rpc !== null) check(rpc.socketPath, ['rpc']);
}

function checkKnown(
  name: string | undefined,
  known: readonly string[],
  field: FieldPath,
  what: string,
  problems: Problems,
): void {
  if (name === undefined || known.includes(name)) return;
  problems.add(field, `there is no ${what} ${name}`, suggest(name, known, what));
}

function checkCircles(bdevs: readonly AnyBdevConfig[], problems: Problems): void {
  const byName = new Map(bdevs.map((bdev) => [bdev.name, bdev]));
  const settled = new Set<string>();
  /** Goes down from a bdev; returns the circle it came into, if any. */
  const follow = (bdev: AnyBdevConfig, way: readonly string[]): readonly string[] | null => {
    if (settled.has(bdev.name)) return null;
    if (way.includes(bdev.name)) return way.slice(way.indexOf(bdev.name));
    for (const { name } of basesOf(bdev)) {
      const below = byName.get(name);
      const circle = below === undefined ? null : follow(below, [...way, bdev.name]);
      if (circle !== null) return circle;
    }
    settled.add(bdev.name);
    return null;
  };
  for (const bdev of bdevs) {
    const circle = follow(bdev, []);
    if (circle === null) continue;
    for (const member of circle) settled.add(member);
    // Named at the first of its members, whoever led into it.
    const first = bdevs.findIndex(({ name }) => circle.includes(name));
    const way = [
      ...circle.slice(circle.indexOf(bdevs[first]!.name)),
      ...circle.slice(0, circle.indexOf(bdevs[first]!.name)),
    ];
    problems.add(
      ['bdevs', first, basesOf(bdevs[first]!)[0]!.field],
      `the bdevs ${[...way, way[0]!].join(' -> ')} stand on each other in a circle`,
      'let one of them stand on another bdev',
    );
  }
}

/**
 * Two writers of one bdev would each overwrite what the other holds to be on the disk; who reads one relies on what it holds.
 */
function checkWriters(config: DaemonConfig, problems: Problems): void {
  const users = new Map<string, { readonly user: string; readonly isRead: boolean }>();
  const claim = (bdev: string, user: string, isRead: boolean, field: FieldPath): void => {
    if (isReadOnly(bdev, config.bdevs)) return;
    const first = users.get(bdev);
    if (first === undefined) users.set(bdev, { user, isRead });
    else if (!first.isRead || !isRead) {
      const uses = first.isRead ? 'read, as something that does not change,' : 'written';
      problems.add(
        field,
        `bdev ${bdev} is ${uses} by ${first.user} already`,
        'give each bdev one user, or set `read_only: true`',
      );
    }
  };
  config.bdevs.forEach((bdev, i) => {
    for (const { name, field, isRead } of basesOf(bdev)) {
      // The snapshot of an image that is served does not change, whoever writes to the disk.
      const base = config.bdevs.find((candidate) => candidate.name === name);
      if (isSnapshot(bdev) && field === 'base' && base?.module === 'qcow2') continue;
      claim(name, `bdev ${bdev.name}`, isRead, ['bdevs', i, field]);
    }
  });
  config.controllers.forEach((controller, i) => {
    if (!controller.readOnly)
      claim(controller.bdev, `controller ${controller.name}`, false, ['controllers', i, 'bdev']);
  });
}

/** Whether nobody can write to the bdev: it says so, or its leaf does. */
function isReadOnly(name: string, bdevs: readonly AnyBdevConfig[]): boolean {
  let bdev = bdevs.find((candidate) => candidate.name === name);
  // A circle is longer than its bdevs.
  for (let depth = 0; depth < bdevs.length && bdev !== undefined; depth++) {
    if ((bdev.module === 'uring' || bdev.module === 'qcow2') && bdev.readOnly) return true;
    if (isSnapshot(bdev)) return true;
    const below = basesOf(bdev).find(({ field }) => field === 'base')?.name;
    bdev = bdevs.find((candidate) => candidate.name === below);
  }
  return false;
}

/** Controllers of one stack that ask for different reactors, or do not agree on isolation. */
function checkPlaces(config: DaemonConfig, problems: Problems): void {
  const groups = stackGroups(config);
  const first = new Map<string, ControllerConfig>();
  const firstIn = new Map<string, ControllerConfig>();
  config.controllers.forEach((controller, i) => {
    if (controller.isolate && config.reactors.some(({ name }) => name === controller.name)) {
      const message = `${controller.name} is the name of a reactor, and an isolated controller's reactor has its name`;
      problems.add(['controllers', i, 'name'], message, 'choose another name');
    }
    const group = groups.get(controller.bdev);
    if (group === undefined) return;
    const neighbour = firstIn.get(group);
    if (neighbour === undefined) firstIn.set(group, controller);
    else if (neighbour.isolate !== controller.isolate) {
      const message = `controller ${controller.name} shares a bdev or a qos group with ${neighbour.name}`;
      problems.add(
        ['controllers', i, 'isolate'],
        message,
        'set `isolate` for both or for none: a stack lives in one process',
      );
    }
    if (controller.reactor === null) return;
    const other = first.get(group);
    if (other === undefined) first.set(group, controller);
    else if (other.reactor !== controller.reactor) {
      problems.add(
        ['controllers', i, 'reactor'],
        `controller ${controller.name} shares a bdev or a qos group with ${other.name}, which runs on ${other.reactor}`,
        `set both to the same reactor: a stack lives on one`,
      );
    }
  });
}

/** Names one representative for each set of bdevs that have to live together. */
function stackGroups(config: DaemonConfig): Map<string, string> {
  const parent = new Map(config.bdevs.map((bdev) => [bdev.name, bdev.name]));
  const root = (name: string): string => {
    let top = name;
    while (parent.get(top) !== top) top = parent.get(top)!;
    return top;
  };
  const join = (a: string, b: string): void => {
    if (parent.has(a) && parent.has(b)) parent.set(root(a), root(b));
  };
  for (const { bdev, targets } of config.controllers) for (const target of targets) join(bdev, target);
  const qosGroups = new Map<string, string>();
  for (const bdev of config.bdevs) {
    for (const { name } of basesOf(bdev)) join(bdev.name, name);
    if (bdev.module === 'qos' && bdev.group !== null) {
      const member = qosGroups.get(bdev.group);
      if (member === undefined) qosGroups.set(bdev.group, bdev.name);
      else join(bdev.name, member);
    }
  }
  return new Map(config.bdevs.map((bdev) => [bdev.name, root(bdev.name)]));
}

/** The bdevs, each after those it stands on; otherwise in the order of the config. */
export function basesFirst(bdevs: readonly AnyBdevConfig[]): AnyBdevConfig[] {
  const byName = new Map(bdevs.map((bdev) => [bdev.name, bdev]));
  const sorted = new Set<AnyBdevConfig>();
  const visited = new Set<AnyBdevConfig>();
  const visit = (bdev: AnyBdevConfig): void => {
    if (visited.has(bdev)) return;
    visited.add(bdev);
    for (const { name } of basesOf(bdev)) {
      const below = byName.get(name);
      if (below !== undefined) visit(below);
    }
    sorted.add(bdev);
  };
  for (const bdev of bdevs) visit(bdev);
  return [...sorted];
}
