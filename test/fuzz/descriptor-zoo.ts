/** Descriptors of every kind, right ones and wrong ones, made once and sent again and again: the receiver gets copies. */
import koffi from 'koffi';
import { constants, openSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { check, checkObject, native } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import { pick } from './boundaries.js';

const pipe = koffi.load(null).func('int pipe(_Out_ int *)');
const O_PATH = 0o10000000;
const F_SEAL_SHRINK = 2;
const F_SEAL_GROW = 4;
const F_SEAL_WRITE = 8;
const GIB = 2 ** 30;

export class DescriptorZoo {
  readonly memfd: number;
  readonly eventfd: number;
  readonly #kinds: number[];

  /** @param folder empty, kept while the zoo is in use */
  constructor(folder: string) {
    const path = join(folder, 'plain');
    writeFileSync(path, Buffer.alloc(65536));
    const memfd = (sizeBytes: number, seals = 0): number => {
      const fd = check(native.memfdCreate('fuzz-any', sizeBytes), 'make a memfd');
      if (seals !== 0) check(native.memfdAddSeals(fd, seals), 'seal a memfd');
      return fd;
    };
    const ends = [-1, -1];
    check(pipe(ends) as number, 'make a pipe');
    this.memfd = memfd(2 ** 20);
    this.eventfd = check(native.eventfdCreate(), 'make an eventfd');
    this.#kinds = [
      this.memfd,
      this.eventfd,
      memfd(0),
      memfd(1),
      // Larger than all address space there is, and free of charge.
      memfd(1024 * GIB),
      memfd(8 * 1024 * 1024 * GIB - 4096),
      memfd(65536, F_SEAL_SHRINK | F_SEAL_GROW),
      memfd(65536, F_SEAL_WRITE),
      ...checkObject(native.socketPair(), 'make a socket pair'),
      ...ends,
      openSync(path, 'r'),
      openSync(path, 'r+'),
      openSync(path, constants.O_WRONLY),
      openSync(path, O_PATH),
      openSync(folder, constants.O_RDONLY | constants.O_DIRECTORY),
      openSync('/dev/null', 'r+'),
      openSync('/dev/zero', 'r+'),
      openSync('/proc/self/maps', 'r'),
      openSync('/sys/kernel/mm/transparent_hugepage/enabled', 'r'),
    ];
  }

  any(random: Random): number {
    return pick(random, this.#kinds);
  }
}
