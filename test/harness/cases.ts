/** The stacks that crash enumeration runs on. A module joins with a line here. */
import * as make from '../bdev/stacks.js';
import { OPERATIONS } from './crash-enumeration.js';
import type { CrashOptions } from './crash-enumeration.js';
import { over } from './stacks.js';

const DISK = { diskBytes: [4096], sectors: 8 };
const pieces = { maxTransferBytes: 1024, maxWriteZeroesBytes: 512 };
/** With data that no device takes as it lies. */
const misaligned = OPERATIONS.map((operation) => ({ ...operation, shiftBytes: 3 }));

export const CRASH_CASES: readonly (CrashOptions & { readonly name: string })[] = [
  { ...DISK, name: 'a file', stack: over(), length: 3 },
  { ...DISK, name: 'passthru over a file', stack: over(make.passthru), length: 2 },
  { ...DISK, name: 'requests that are split', stack: over(make.limited(pieces)), length: 2 },
  {
    ...DISK,
    name: 'requests that go through bounce buffers',
    stack: over(make.limited({ memoryAlignmentBytes: 512 })),
    length: 2,
    operations: misaligned,
  },
  { ...DISK, name: 'FUA by a flush', stack: over(make.limited(pieces, ['fua'])), length: 2 },
  { ...DISK, name: 'zeroes by writes', stack: over(make.limited(pieces, ['writeZeroes', 'discard'])), length: 2 },
];
