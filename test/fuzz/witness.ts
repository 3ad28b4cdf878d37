/**
 * A disk that nobody attacks: its front-end keeps requests in flight all the time and knows what every block must hold. Memory of its
 * guest that is in no request is filled with a pattern, and looked at.
 */
import type { Random } from '../../src/poller/clock.js';
import { Frontend } from '../frontend/frontend.js';
import type { Request } from '../frontend/driver-queue.js';
import { RequestType, Status } from '../frontend/protocol.js';
import { BLOCK_BYTES, Corruption, StampedDisk } from '../soak/stamped-disk.js';
import { Finding } from './finding.js';

const SECTORS_PER_BLOCK = BLOCK_BYTES / 512;
const DEPTH = 4;
/** A request that takes longer was forgotten, or somebody holds up the reactor. */
const ANSWER_MS = 20_000;
const LOOK_MS = 2;
const PATTERN_BYTES = 2 ** 20;
const PATTERN = 0x5c;

interface Operation {
  readonly request: Request;
  readonly sinceMs: number;
  readonly finish: (data: Buffer) => void;
}

export class Witness {
  readonly name: string;
  requests = 0;
  readonly #stamped: StampedDisk;
  readonly #random: Random;
  readonly #frontend: Frontend;
  readonly #pattern: Buffer;
  readonly #expected = Buffer.alloc(PATTERN_BYTES, PATTERN);
  readonly #blocks: number;
  #inflight: Operation[] = [];
  #lookedMs = 0;

  private constructor(name: string, frontend: Frontend, blocks: number, random: Random) {
    this.name = name;
    this.#frontend = frontend;
    this.#blocks = blocks;
    this.#random = random;
    this.#stamped = new StampedDisk(blocks, random);
    this.#pattern = frontend.memory.bytes(frontend.memory.allocate(PATTERN_BYTES), PATTERN_BYTES);
    this.#pattern.fill(PATTERN);
  }

  static async start(name: string, socketPath: string, sizeBytes: number, random: Random): Promise<Witness> {
    const frontend = await Frontend.connect(socketPath, { timeoutMs: ANSWER_MS });
    return new Witness(name, frontend, sizeBytes / BLOCK_BYTES, random);
  }

  /** Blocks whose content was checked. */
  get verified(): number {
    return this.#stamped.verified;
  }

  /** Now and then: takes answers, checks them, and puts new requests in their place. Does not wait. */
  look(): void {
    const nowMs = performance.now();
    if (nowMs - this.#lookedMs < LOOK_MS) return;
    this.#lookedMs = nowMs;
    try {
      while (this.#frontend.queue.takeUsed() !== undefined);
      this.#inflight = this.#inflight.filter((operation) => !this.#isDone(operation));
      while (this.#inflight.length < DEPTH) this.#start();
    } catch (error) {
      throw error instanceof Corruption ? new Finding('witness', `${this.name}: ${error.message}`) : error;
    }
    const oldest = this.#inflight[0]!;
    if (nowMs - oldest.sinceMs > ANSWER_MS) throw new Finding('witness', `${this.name} is not answered any more`);
  }

  /** Reads the whole disk, and looks at the guest's memory. */
  async verify(): Promise<void> {
    while (this.#inflight.some((operation) => operation.request.completion === undefined)) {
      await this.#frontend.queue.completion(
        this.#inflight.find(({ request }) => request.completion === undefined)!.request,
      );
    }
    try {
      for (const operation of this.#inflight) this.#isDone(operation);
      this.#inflight = [];
      const CHUNK = 16;
      for (let first = 0; first < this.#blocks; first += CHUNK) {
        const { status, data } = await this.#frontend.queue.read(first * SECTORS_PER_BLOCK, CHUNK * BLOCK_BYTES);
        if (status !== Status.ok) throw new Finding('witness', `${this.name}: a read failed with status ${status}`);
        this.#stamped.read(first, data);
      }
    } catch (error) {
      throw error instanceof Corruption ? new Finding('witness', `${this.name}: ${error.message}`) : error;
    }
    if (this.#pattern.compare(this.#expected) !== 0)
      throw new Finding('witness', `${this.name}: its guest's memory was written`);
    if (!this.#frontend.connection.isOpen) throw new Finding('witness', `${this.name}: its session was ended`);
  }

  close(): void {
    this.#frontend.close();
  }

  #isDone({ request, finish }: Operation): boolean {
    const { completion } = request;
    if (completion === undefined) return false;
    if (completion.status !== Status.ok) throw new Finding('witness', `${this.name}: status ${completion.status}`);
    finish(completion.data);
    this.requests++;
    return true;
  }

  #start(): void {
    const count = 1 + this.#random.below(4);
    const first = this.#stamped.take(count);
    const sector = first * SECTORS_PER_BLOCK;
    const { queue } = this.#frontend;
    const sinceMs = performance.now();
    if (this.#random.below(2) === 0) {
      const [request] = queue.submit({ type: RequestType.read, sector, inBytes: count * BLOCK_BYTES });
      this.#inflight.push({ request: request!, sinceMs, finish: (data) => this.#stamped.read(first, data) });
    } else {
      const { sequence, data } = this.#stamped.stamp(first, count);
      const [request] = queue.submit({ type: RequestType.write, sector, out: data });
      this.#inflight.push({ request: request!, sinceMs, finish: () => this.#stamped.wrote(first, count, sequence) });
    }
  }
}
