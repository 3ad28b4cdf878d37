/** Stacks over a simulated disk. */
import type { BdevConfig } from '../../src/bdev/bdev.js';
import type { Filter } from '../bdev/stacks.js';
import { simDisk } from './sim-machine.js';
import type { Stack } from './sim-machine.js';

/** Filters on one disk; the first is the lowest. */
export function over(...filters: readonly Filter[]): Stack {
  return ([path]) => {
    const configs: BdevConfig[] = [simDisk('leaf', path!)];
    filters.forEach((filter, i) => configs.push(filter(`filter${i}`, configs.at(-1)!.name)));
    return configs;
  };
}
