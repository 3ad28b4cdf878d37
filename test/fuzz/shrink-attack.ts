/**
 * Attacks by a front-end that cuts its memory file short while the device works in it: below data, headers and status, below an indirect
 * table, below a ring itself. The session may end; the device goes on.
 */
import { check, native } from '../../native/index.js';
import type { Random } from '../../src/poller/clock.js';
import { RequestType } from '../frontend/protocol.js';
import { AttackSession } from './attack-session.js';
import type { AttackMemory, AttackRegion } from './attack-memory.js';
import { pick } from './boundaries.js';
import type { RawConnection, Wires } from './raw-connection.js';

const KIB = 1024;
const SHRUNK_BYTES = 128 * KIB;
const GUEST_ADDRESS = 2 ** 35;
const SIZE = 64;
const REQUESTS = 16;
const NEXT = 1;
const WRITE = 2;
const INDIRECT = 4;
/** In the file: a ring, then headers, tables, data. */
const RING_AT = 0;
const HEADERS_AT = 16 * KIB;
const TABLES_AT = 32 * KIB;
const DATA_AT = 64 * KIB;

export class ShrinkAttack {
  readonly #connection: RawConnection;
  readonly #memory: AttackMemory;
  readonly #random: Random;
  readonly #session: AttackSession;
  readonly #image = Buffer.alloc(SHRUNK_BYTES);
  readonly #wires: Wires;

  constructor(connection: RawConnection, wires: Wires, memory: AttackMemory, random: Random) {
    this.#connection = connection;
    this.#memory = memory;
    this.#random = random;
    this.#wires = wires;
    this.#session = new AttackSession(connection, wires, memory);
  }

  get lawful(): number {
    return this.#session.lawful;
  }

  /** One session. Returns the number of requests offered in memory that goes away. */
  run(): number {
    const random = this.#random;
    const fd = check(native.memfdCreate('fuzz-shrink', SHRUNK_BYTES), 'make memory to cut short');
    const region = {
      ...this.#memory.control,
      name: 'shrunk',
      fd,
      guestAddress: GUEST_ADDRESS,
      userAddress: 0x6000_0000_0000,
      sizeBytes: SHRUNK_BYTES,
      mmapOffset: 0,
    } satisfies AttackRegion;
    try {
      const features = { eventIdx: random.below(2) === 0, indirect: true, packed: false, protocol: true, hi: 1 };
      const session = this.#session;
      if (!session.negotiate(features, [this.#memory.control, region])) return 0;
      // Ring 0 lies in memory that stays, ring 1 in what goes.
      const kept = this.#memory.control.guestAddress;
      session.describeRing(0, SIZE, { descriptors: kept, available: kept + 4 * KIB, used: kept + 6 * KIB });
      session.describeRing(1, SIZE, {
        descriptors: GUEST_ADDRESS,
        available: GUEST_ADDRESS + 4 * KIB,
        used: GUEST_ADDRESS + 6 * KIB,
      });
      this.#layOut(this.#memory.control.live, false);
      this.#layOut(this.#image, random.below(2) === 0);
      this.#store(fd);
      const isBefore = random.below(3) === 0;
      if (isBefore) this.#cut(fd);
      for (const index of [0, 1]) {
        session.enable(index);
        session.start(index, 0);
      }
      this.#connection.flush();
      if (!isBefore) {
        if (random.below(2) === 0) session.barrier();
        this.#cut(fd);
      }
      session.barrier();
      return 2 * REQUESTS;
    } finally {
      native.fileClose(fd);
      this.#connection.finish();
    }
  }

  #cut(fd: number): void {
    const sizes = [0, 1, 4096, HEADERS_AT, TABLES_AT, DATA_AT, DATA_AT + 4096, SHRUNK_BYTES - 4096];
    check(native.fileTruncate(fd, pick(this.#random, sizes)), 'cut memory short');
  }

  /** A ring at the start of `bytes` whose requests have everything in the file that is cut. */
  #layOut(bytes: Buffer, isIndirect: boolean): void {
    const random = this.#random;
    bytes.fill(0, RING_AT, RING_AT + 8 * KIB);
    for (let i = 0; i < REQUESTS; i++) {
      const header = HEADERS_AT + 64 * i;
      this.#image.writeUInt32LE(
        pick(random, [RequestType.read, RequestType.write, RequestType.getId, RequestType.discard]),
        header,
      );
      this.#image.writeUInt32LE(random.below(1024), header + 8);
      const isRead = this.#image.readUInt32LE(header) !== RequestType.write;
      const descriptors: [number, number, number][] = [
        [header, 16, 0],
        [DATA_AT + 2048 * random.below(24), 2048, isRead ? WRITE : 0],
        [SHRUNK_BYTES - 1 - i, 1, WRITE],
      ];
      const table = isIndirect ? TABLES_AT + 64 * i : 48 * i;
      const into = isIndirect ? this.#image : bytes;
      descriptors.forEach(([at, length, flags], k) => {
        const next = isIndirect ? k + 1 : 3 * i + k + 1;
        writeDescriptor(into, table + 16 * k, GUEST_ADDRESS + at, length, k < 2 ? flags | NEXT : flags, next);
      });
      if (isIndirect) writeDescriptor(bytes, 16 * 3 * i, GUEST_ADDRESS + table, 48, INDIRECT, 0);
      bytes.writeUInt16LE(3 * i, 4 * KIB + 4 + 2 * i);
    }
    bytes.writeUInt16LE(REQUESTS, 4 * KIB + 2);
  }

  #store(fd: number): void {
    const { out, arena, outOffset } = this.#wires;
    this.#image.copy(out);
    check(native.fileWrite(fd, arena.baseAddress + outOffset, SHRUNK_BYTES, 0), 'fill memory');
  }
}

function writeDescriptor(
  bytes: Buffer,
  at: number,
  address: number,
  length: number,
  flags: number,
  next: number,
): void {
  bytes.writeUInt32LE(address % 2 ** 32, at);
  bytes.writeUInt32LE(Math.floor(address / 2 ** 32), at + 4);
  bytes.writeUInt32LE(length, at + 8);
  bytes.writeUInt16LE(flags, at + 12);
  bytes.writeUInt16LE(next, at + 14);
}
