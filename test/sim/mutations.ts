/**
 * Known bugs of this field, each as a change of our source that puts it in: what the simulator must find. The source itself knows
 * nothing of them; see mutate.mjs.
 */
export interface Mutation {
  /** The bug, in words. */
  readonly name: string;
  readonly file: string;
  /** Also in the short form: one of each kind, soon found. */
  readonly short?: boolean;
  /** Texts that occur once in the file, and what stands there instead. */
  readonly edits: readonly (readonly [find: string, replace: string])[];
}

const QUEUE = 'src/vhost-user/blk-queue.ts';
const VIRTQUEUE = 'src/vhost-user/split-virtqueue.ts';
const VRING = 'src/vhost-user/vring.ts';
const SESSION = 'src/vhost-user/session.ts';
const DEVICE = 'src/vhost-user/blk-device.ts';
const MEMORY = 'src/vhost-user/guest-memory.ts';
const INFLIGHT = 'src/vhost-user/split-inflight.ts';
const PACKED = 'src/vhost-user/packed-virtqueue.ts';
const CHANNEL = 'src/bdev/bdev-channel.ts';
const SPLIT = 'src/bdev/split-job.ts';
const URING = 'src/bdev/uring/uring.ts';
const QCOW2 = 'src/bdev/qcow2';
const MIRROR = 'src/bdev/mirror';
const COMMIT = `${QCOW2}/commit.ts`;
const CHANGE = `${QCOW2}/change.ts`;

/** The request is answered when it is handed to the kernel, and the kernel's completion is ignored. */
function answerAtSubmission(type: 'read' | 'write'): Mutation['edits'] {
  return [
    [
      'if (!this.#queue(request, io)) this.#finish(request, io, IoStatus.again, 0);\n  }\n\n  onCompletion',
      `if (!this.#queue(request, io)) this.#finish(request, io, IoStatus.again, 0);
       else if (io.type === IoType.${type}) {
         request.io = null;
         io.complete(IoStatus.success, 0);
       }\n  }\n\n  onCompletion`,
    ],
    [
      'const io = request.io!;',
      'const io = request.io!;\n    if (io === null) {\n      this.#dataFree.push(request);\n      return;\n    }',
    ],
  ];
}

const withoutDrain = '((then) => { then(); this.#updateRunning(); this.#acknowledge(message); })(() => {';

export const MUTATIONS: readonly Mutation[] = [
  {
    name: 'a flush is answered without a sync',
    short: true,
    file: CHANNEL,
    edits: [['if (this.bdev.supports(IoType.flush)) this.#toModule(io);', 'if (false) this.#toModule(io);']],
  },
  {
    name: 'an emulated FUA flushes before its data is written',
    file: SPLIT,
    edits: [
      [
        'if (parent === null || this.#outstanding > 0) return;',
        'if (parent === null || (this.#outstanding > 0 && !(this.#flushDue && this.#started >= parent.lengthBytes))) return;',
      ],
    ],
  },
  {
    name: 'FUA is dropped where the guest wants writes durable',
    short: true,
    file: QUEUE,
    edits: [
      [
        'this.#transfer(request, IoType.write, device.writeThrough ? IoFlag.fua : 0);',
        'this.#transfer(request, IoType.write, 0);',
      ],
    ],
  },
  {
    name: 'FUA is dropped on the way to the kernel',
    file: URING,
    edits: [['const rwFlags = (io.flags & IoFlag.fua) !== 0 ? RWF_DSYNC : 0;', 'const rwFlags = 0;']],
  },
  {
    name: 'FUA is dropped where a write is split',
    short: true,
    file: SPLIT,
    edits: [['supportsFua ? 0 : parent.flags & IoFlag.fua;', 'supportsFua ? 0 : 0;']],
  },
  {
    name: 'FUA is dropped from write-zeroes',
    file: SPLIT,
    edits: [['this.#flushDue = fua && ', 'this.#flushDue = false && ']],
  },
  {
    name: 'the write-through mode is ignored',
    short: true,
    file: DEVICE,
    edits: [['this.writeThrough = !this.#writeback || ', 'this.writeThrough = ']],
  },
  {
    name: 'the write-through mode ends with the process',
    short: true,
    file: SESSION,
    edits: [['if (writeback !== null) this.#device.writeback = writeback;\n    else ', '']],
  },
  {
    name: 'the cache mode is written down when the region comes, and not when it changes',
    file: SESSION,
    edits: [
      [
        'may not be written`);\n    }\n    this.#inflightRegion?.keepWriteback(this.#device.writeback);',
        'may not be written`);\n    }',
      ],
    ],
  },
  { name: 'a write is answered at submission', short: true, file: URING, edits: answerAtSubmission('write') },
  { name: 'a read is answered before its data is there', file: URING, edits: answerAtSubmission('read') },
  {
    name: 'the used index starts at 0',
    short: true,
    file: VIRTQUEUE,
    edits: [['this.#usedIndex = this.#used[1]!;', 'this.#usedIndex = 0;']],
  },
  {
    name: 'a head is given back twice',
    short: true,
    file: QUEUE,
    edits: [
      [
        'this.#virtqueue.push(request.head, writtenBytes);',
        'this.#virtqueue.push(request.head, writtenBytes);\n    if (request.head === 5) this.#virtqueue.push(request.head, writtenBytes);',
      ],
    ],
  },
  {
    name: 'a head is lost when its request fails',
    file: QUEUE,
    edits: [
      [
        'this.#virtqueue.push(request.head, writtenBytes);',
        'if (status === BlkStatus.ok) this.#virtqueue.push(request.head, writtenBytes);',
      ],
    ],
  },
  {
    name: 'a completion is given to another head',
    short: true,
    file: VIRTQUEUE,
    edits: [
      ['this.#usedEntries[at] = head;', 'this.#usedEntries[at] = this.#inflight[head ^ 1] !== 0 ? head ^ 1 : head;'],
    ],
  },
  {
    name: 'the used length lacks the status byte',
    short: true,
    file: QUEUE,
    edits: [['io.type === IoType.read ? io.lengthBytes + 1 : 1', 'io.type === IoType.read ? io.lengthBytes : 1']],
  },
  {
    name: 'the status is not written',
    file: QUEUE,
    edits: [
      [
        '[place & WINDOW_MASK] = status;',
        '[place & WINDOW_MASK] = status && status;\n    if (request.head === 3) this.#arena.u8[(place * WINDOW_SCALE) | 0]![place & WINDOW_MASK] = 0xff;',
      ],
    ],
  },
  {
    name: 'an error is answered as success',
    file: QUEUE,
    edits: [
      [
        'default:\n        this.#answer(request, BlkStatus.ioError, 1);\n    }\n  }',
        'default:\n        this.#answer(request, BlkStatus.ok, 1);\n    }\n  }',
      ],
    ],
  },
  {
    name: 'a short transfer counts as done',
    short: true,
    file: URING,
    edits: [['if (doneBytes === io.lengthBytes) {', 'if (doneBytes > 0) {']],
  },
  {
    name: 'the rest of a short transfer goes where it began',
    file: URING,
    edits: [['request.offsetBytes = io.offsetBytes + request.doneBytes;', 'request.offsetBytes = io.offsetBytes;']],
  },
  {
    name: 'the error of a part of a split request is swallowed',
    short: true,
    file: SPLIT,
    edits: [['this.fail(io.status, io.errno);\n    } else if (child.bounced', '} else if (child.bounced']],
  },
  {
    name: 'two parts of a request share a bounce buffer',
    file: SPLIT,
    edits: [
      [
        'if (child.bounceAddress === 0) child.bounceAddress = this.channel.reactor.arena.allocate(BOUNCE_BYTES);',
        'const first = this.#children[0]!;\n    if (first.bounceAddress === 0) first.bounceAddress = this.channel.reactor.arena.allocate(BOUNCE_BYTES);\n    return first.bounceAddress;',
      ],
    ],
  },
  {
    name: 'a request is answered by its first part, and overtaken',
    file: SPLIT,
    edits: [
      ['if (parent === null || this.#outstanding > 0) return;', 'if (parent === null) return;'],
      ['this.#pool.copy(this.#parent!', 'if (this.#parent !== null) this.#pool.copy(this.#parent'],
    ],
  },
  {
    name: 'a flush is carried out as a discard',
    file: URING,
    edits: [
      [
        'return this.#ring.fdatasync(request.slot, this.#file);',
        'return this.#ring.fallocate(request.slot, this.#file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096);',
      ],
    ],
  },
  {
    name: 'a range of write-zeroes is a sector too short',
    short: true,
    file: QUEUE,
    edits: [
      [
        'ranges[i * RANGE_DOUBLES + 1] = sectors * SECTOR_BYTES;',
        'ranges[i * RANGE_DOUBLES + 1] = (sectors - 1) * SECTOR_BYTES;',
      ],
    ],
  },
  {
    name: 'a range of write-zeroes or discard is a sector too far',
    file: QUEUE,
    edits: [
      [
        '(this.#header[0]! + sectorHi * 2 ** 32) * SECTOR_BYTES;',
        '(this.#header[0]! + 1 + sectorHi * 2 ** 32) * SECTOR_BYTES;',
      ],
    ],
  },
  {
    name: 'of several ranges only the first is carried out',
    file: QUEUE,
    edits: [['if (request.rangesDone < request.rangeCount) {', 'if (false) {']],
  },
  {
    name: 'the event index that asks for a kick is off by one',
    short: true,
    file: VIRTQUEUE,
    edits: [
      [
        'this.#used[2 + 4 * this.size] = this.#lastAvailable;',
        'this.#used[2 + 4 * this.size] = this.#lastAvailable + 1;',
      ],
    ],
  },
  {
    name: 'the event index that asks for a call is off by one',
    file: VIRTQUEUE,
    edits: [['((now - event - 1) & 0xffff)', '((now - event) & 0xffff)']],
  },
  {
    name: 'the ring is not looked at again after asking for kicks',
    file: VIRTQUEUE,
    edits: [['return this.#available[1]! !== this.#lastAvailable || ', 'return ']],
  },
  {
    name: 'a new call descriptor is not raised',
    file: VRING,
    edits: [['if (this.queue !== null) this.signalCall();', '']],
  },
  {
    name: 'the memory table is changed without a drain',
    short: true,
    file: SESSION,
    edits: [
      [
        'this.#drainFor(message, this.vrings, () => {\n      for (const vring of this.vrings) vring.suspend();\n      this.memory.clear();',
        `${withoutDrain}\n      for (const vring of this.vrings) vring.suspend();\n      this.memory.clear();`,
      ],
    ],
  },
  {
    name: 'GET_VRING_BASE does not wait for what is in flight',
    short: true,
    file: SESSION,
    edits: [['this.#drainFor(message, [vring], () => {', withoutDrain]],
  },
  {
    name: 'a session that ends does not wait for what is in flight',
    file: SESSION,
    edits: [
      [
        'this.#drain(this.vrings, () => {\n      this.#poller.stop();',
        '((then) => then())(() => {\n      this.#poller.stop();',
      ],
    ],
  },
  {
    name: 'a ring is stopped without publishing its answers',
    file: VRING,
    edits: [['this.publish();\n      // Whoever serves the ring next', '// Whoever serves the ring next']],
  },
  {
    name: 'a buffer is taken for one where regions meet',
    short: true,
    file: MEMORY,
    edits: [
      [
        'if (address >= this.#starts[last]! && end <= this.#ends[last]!) return last;',
        'if (address >= this.#starts[last]!) return last;',
      ],
    ],
  },
  {
    name: 'the latest region translates whatever is below its end',
    file: MEMORY,
    edits: [
      [
        'if (address >= this.#starts[last]! && end <= this.#ends[last]!) return last;',
        'if (end <= this.#ends[last]!) return last;',
      ],
    ],
  },
  {
    name: 'a request is not written down as in flight',
    file: INFLIGHT,
    edits: [['this.#u8[at] = 1;', '']],
  },
  {
    name: 'a request stays in flight after its answer',
    short: true,
    file: INFLIGHT,
    edits: [['this.#u8[HEADER_BYTES + head * ENTRY_BYTES] = 0;\n      inflight[head] = 0;', 'inflight[head] = 0;']],
  },
  {
    name: 'after a crash the available ring goes on at the used index',
    file: INFLIGHT,
    edits: [['nextAvailable: (usedIdx + heads.length) & 0xffff', 'nextAvailable: usedIdx']],
  },
  {
    name: 'a request is no more in flight before its answer is visible',
    file: VIRTQUEUE,
    edits: [
      [
        'if (STRONG_ORDER) this.#used[1] = now;',
        'if (this.#tracking !== null) this.#tracking.published(now, this.#inflight);\n    if (STRONG_ORDER) this.#used[1] = now;',
      ],
    ],
  },
  {
    name: 'a packed ring forgets that it began another lap',
    short: true,
    file: PACKED,
    edits: [['this.#usedWrap = wrap ^ 1;', '']],
  },
  {
    name: 'a packed ring calls a descriptor too late',
    file: PACKED,
    edits: [['return since > 0 && since <= moved;', 'return since > 1 && since <= moved;']],
  },
  {
    name: 'a packed request stays in flight after its answer',
    file: 'src/vhost-user/packed-inflight.ts',
    edits: [['this.#u8[HEADER_BYTES + entry * ENTRY_BYTES] = 0;\n    this.#u16[OLD_FREE_HEAD_AT >> 1] = entry;', '']],
  },
  {
    name: 'a request that was refused for want of a resource is lost',
    short: true,
    file: CHANNEL,
    edits: [['else this.#refused.append(io);', '']],
  },
  {
    name: 'qcow2: mappings are written before refcounts and data are durable',
    short: true,
    file: COMMIT,
    edits: [['case Phase.firstSync:\n        this.#sync();', 'case Phase.firstSync:']],
  },
  {
    name: 'qcow2: refcounts are written after mappings',
    file: COMMIT,
    edits: [
      ['this.#write(0, this.#stagedRefcounts);', 'this.#write(this.#stagedRefcounts, this.#staged );'],
      ['this.#write(this.#stagedRefcounts, this.#staged);', 'this.#write(0, this.#stagedRefcounts );'],
    ],
  },
  {
    name: 'qcow2: the log is cut off at what came while a round was under way',
    file: COMMIT,
    edits: [
      ['if (isOk && this.#takesAll) log?.commit();', 'if (isOk) {\n      log?.stage();\n      log?.commit();\n    }'],
    ],
  },
  {
    name: 'qcow2: a new mapping is not written down in the log',
    short: true,
    file: CHANGE,
    edits: [['log.append(kind, isExtended ? 1 : this.count);', '']],
  },
  {
    name: 'qcow2: a cleared cluster is not written down in the log',
    file: `${QCOW2}/request-job.ts`,
    edits: [['log.append(RecordKind.set, 1);', '']],
  },
  {
    name: 'qcow2: a cluster that was used before is taken for zeroes',
    file: `${QCOW2}/allocator.ts`,
    edits: [['this.isZeroed = this.#runStart >= this.#zeroFrom;', 'this.isZeroed = true;']],
  },
  {
    name: 'qcow2: the log that a session left is not carried out',
    file: `${QCOW2}/served-image.ts`,
    edits: [['this.replayed = yield* replay(this.engine, left);', 'this.replayed = 0;']],
  },
  {
    name: 'qcow2: what is around the data in a cluster is not copied',
    short: true,
    file: CHANGE,
    edits: [['this.#copiesHead = this.#head > 0 && ', 'this.#copiesHead = false && ']],
  },
  {
    name: 'qcow2: references are given up before the mapping that dropped them is durable',
    file: `${QCOW2}/engine.ts`,
    edits: [
      [
        'this.#droppedAtBegin = this.dropped.close();',
        'this.#droppedAtBegin = this.dropped.close();\n    this.onRound(true);',
      ],
    ],
  },
  {
    name: 'qcow2: requests go on while metadata is edited',
    file: `${QCOW2}/engine.ts`,
    edits: [['this.#isFrozen = true;', 'this.#isFrozen = false;']],
  },
  {
    name: 'qcow2: what changed is not written before metadata is edited',
    file: `${QCOW2}/served-image.ts`,
    edits: [['      yield* engine.settleAll(() => this.flush());\n      let result: T;', '      let result: T;']],
  },
  {
    name: 'qcow2: counters are used as they were before an edit',
    file: `${QCOW2}/served-image.ts`,
    edits: [['engine.allocator!.reset(yield* loadRefcountTable(image));', 'yield* loadRefcountTable(image);']],
  },
  {
    name: 'qcow2: mappings are used as they were before an edit',
    short: true,
    file: `${QCOW2}/served-image.ts`,
    edits: [['image.l2.clear();\n', '']],
  },
  {
    name: 'mirror: a write does not wait while its chunk is copied',
    file: `${MIRROR}/mirror-channel.ts`,
    edits: [
      ['if (this.#lockedSlot >= 0 && (this.#lockedSlot -', 'if (this.#lockedSlot >= SLOTS && (this.#lockedSlot -'],
    ],
  },
  {
    name: 'mirror: a chunk is copied while it is written to',
    file: `${MIRROR}/mirror-channel.ts`,
    edits: [['(this.#lockedSlot >= 0 && this.#changes[this.#lockedSlot]! > 0)', 'false']],
  },
  {
    name: 'mirror: a write goes to the source alone',
    file: `${MIRROR}/both-legs.ts`,
    edits: [['const toTarget = this.#channel.usesTarget && !isLingering;', 'const toTarget = false;']],
  },
  {
    name: 'mirror: the disk is moved while requests are under way',
    file: `${MIRROR}/mirror.ts`,
    edits: [
      [
        '    return this.isActive && isCopied && this.#channel.isQuiet &&',
        '    if (isCopied) return true;\n    return this.isActive && isCopied && this.#channel.isQuiet &&',
      ],
    ],
  },
  {
    name: 'mirror: the target is not flushed before the disk is moved',
    file: `${MIRROR}/mirror.ts`,
    edits: [['if (this.#isStill()) yield* this.#flushTarget(isTooLong);', '']],
  },
];
