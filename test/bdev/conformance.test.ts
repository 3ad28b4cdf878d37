/** Goal and method: see conformance.ts. Here are the modules and stacks it runs over. */
import { afterAll, describe, expect, it } from 'vitest';
import { isRoot } from '../support/loop-device.js';
import { sharedArena } from '../support/rig.js';
import { StutteringUring } from '../support/stuttering-uring.js';
import { conformance } from './conformance.js';
import * as make from './stacks.js';

const { delay, error, limited, passthru, qos, reluctant, stack } = make;

/** Pieces of 4 KiB from aligned memory, one segment each. */
const small = limited({ maxTransferBytes: 4096, maxSegments: 1, memoryAlignmentBytes: 512 });
/** Boundaries, and two segments from aligned memory. */
const bounded = limited({ maxSegments: 2, boundaryBytes: 65536, memoryAlignmentBytes: 512 });
/** Memory aligned to whole pages. */
const paged = limited({ memoryAlignmentBytes: 4096, boundaryBytes: 8192 });
/** Nothing but reads and writes. */
const poor = limited({}, ['flush', 'discard', 'writeZeroes', 'fua']);
/** Everything at once, in amounts that are no powers of two. */
const crooked = limited(
  {
    maxTransferBytes: 12288,
    maxSegments: 3,
    boundaryBytes: 16384,
    memoryAlignmentBytes: 4,
    maxDiscardBytes: 8192,
    maxWriteZeroesBytes: 4096,
  },
  ['fua'],
);
const noZeroes = limited({ maxTransferBytes: 65536 }, ['writeZeroes', 'fua']);
/** Finds out late that it cannot zero, with many pieces under way. */
const lateNoZeroes = limited({ maxWriteZeroesBytes: 8192, maxTransferBytes: 16384 }, ['triedZeroes', 'fua']);

const jitter = delay({ readUs: 40, writeUs: 100, flushUs: 300, discardUs: 10, jitterUs: 200 });
const tight = qos({ readIops: 40_000, totalIops: 50_000, writeBytesPerSecond: 4e9, totalBytesPerSecond: 6e9 });

describe('leaves', () => {
  conformance('null that reads zeroes', () => make.nulled(true), { keepsData: false });
  conformance('malloc, 512', () => make.malloc(512));
  conformance('malloc, 4096', () => make.malloc(4096));
  conformance('uring, file', () => make.uringFile());
  conformance('uring, file, 4096', () => make.uringFile({ blockSizeBytes: 4096 }));
  conformance('uring, file, direct', () => make.uringFile({ direct: true }));
  conformance('uring, file, direct, fixed buffers', () => make.uringFile({ direct: true, fixedBuffers: true }));
  conformance('uring, file in memory', () => make.uringMemory());
  conformance('uring, file, fixed buffers', () => make.uringFile({ fixedBuffers: true }));
});

describe('qcow2', () => {
  conformance('as it is created', () => make.qcow2());
  conformance('direct', () => make.qcow2('', { direct: true }));
  conformance('version 2', () => make.qcow2('compat=0.10'));
  conformance('clusters of 512', () => make.qcow2('cluster_size=512'));
  conformance('clusters of 4096, refcounts of 1 bit', () => make.qcow2('cluster_size=4096,refcount_bits=1'));
  conformance('clusters of 2 MiB, refcounts of 64 bits', () => make.qcow2('cluster_size=2M,refcount_bits=64'));
  conformance('subclusters', () => make.qcow2('extended_l2=on'));
  conformance('subclusters of 512', () => make.qcow2('extended_l2=on,cluster_size=16k'));
  conformance('preallocated', () => make.qcow2('preallocation=metadata'));
});

describe('uring on a ring whose transfers stop halfway', () => {
  const rings: StutteringUring[] = [];
  const makeRing = (): StutteringUring => {
    const ring = new StutteringUring(sharedArena());
    rings.push(ring);
    return ring;
  };

  afterAll(() => {
    for (const ring of rings) {
      expect(ring.cuts).toBeGreaterThan(100);
      expect(ring.hiccups).toBeGreaterThan(100);
      ring.close();
    }
  });

  conformance('file', () => make.uringFile(), { makeRing });
  conformance('file, direct', () => make.uringFile({ direct: true }), { makeRing });
  conformance('crooked, file, direct', () => stack(make.uringFile({ direct: true }), crooked), { makeRing });
});

describe('uring, loop device', () => {
  if (!isRoot) {
    it('is the same disk', (context) => context.skip('only root may make loop devices: run the tests as root'));
    return;
  }
  conformance('512', () => make.uringLoop(512));
  conformance('512, direct', () => make.uringLoop(512, { direct: true }));
  conformance('4096', () => make.uringLoop(4096));
  conformance('4096, direct', () => make.uringLoop(4096, { direct: true }));
  conformance('qos over delay', () => stack(make.uringLoop(4096, { direct: true }), jitter, tight));
  conformance('bounded', () => stack(make.uringLoop(512, { direct: true }), bounded));
});

describe('filters', () => {
  conformance('passthru', () => stack(make.malloc(), passthru));
  conformance('delay', () => stack(make.malloc(), delay({ readUs: 50, writeUs: 50, flushUs: 50, discardUs: 50 })));
  conformance('delay with jitter', () => stack(make.malloc(), jitter));
  conformance('error without rules', () => stack(make.malloc(), error()));
  conformance('qos without limits', () => stack(make.malloc(), qos()));
  conformance('qos with limits', () => stack(make.malloc(), tight));
  conformance('qos with limits and no burst', () => stack(make.malloc(), qos({ totalIops: 50_000, burstSeconds: 0 })));
  conformance('small', () => stack(make.malloc(), small));
  conformance('bounded', () => stack(make.malloc(), bounded));
  conformance('paged', () => stack(make.malloc(4096), paged));
  conformance('poor', () => stack(make.malloc(), poor));
  conformance('crooked', () => stack(make.malloc(4096), crooked));
  conformance('no zeroes', () => stack(make.malloc(), noZeroes));
  conformance('no zeroes when tried', () => stack(make.malloc(), lateNoZeroes));
  conformance('reluctant at once', () => stack(make.malloc(), reluctant('now')));
  conformance('reluctant later', () => stack(make.malloc(), reluctant('later')));
  conformance('reluctant beyond its capacity', () => stack(make.malloc(), reluctant('beyondCapacity', 3)));
});

describe('stacks', () => {
  const direct = { direct: true };
  conformance('qos, delay, malloc', () => stack(make.malloc(), jitter, tight));
  conformance('passthru, error, uring', () => stack(make.uringFile(direct), error(), passthru));
  conformance('delay, qos, uring', () => stack(make.uringFile(), tight, jitter));
  conformance('qos, bounded, uring', () => stack(make.uringFile(direct), bounded, tight));
  conformance('small, delay, crooked, malloc', () => stack(make.malloc(), crooked, jitter, small));
  conformance('twelve passthru, malloc', () => stack(make.malloc(), ...Array.from({ length: 12 }, () => passthru)));
  conformance('poor, uring', () => stack(make.uringFile(direct), poor));
  conformance('no zeroes, delay, uring in memory', () => stack(make.uringMemory(), jitter, noZeroes));
  conformance('delay, small, uring', () => stack(make.uringFile(direct), small, jitter));
  conformance('error, delay, qos, passthru, malloc', () => stack(make.malloc(4096), passthru, tight, jitter, error()));
  conformance('reluctant, small, malloc', () => stack(make.malloc(), small, reluctant('later')));
  conformance('small, reluctant, uring', () => stack(make.uringFile(), reluctant('now'), small));
  conformance('crooked, reluctant, delay, reluctant, malloc', () =>
    stack(make.malloc(4096), reluctant('later'), jitter, reluctant('beyondCapacity', 5), crooked),
  );
  conformance('passthru, null that reads zeroes', () => stack(make.nulled(true), passthru), { keepsData: false });
});
