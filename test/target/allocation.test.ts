/**
 * Goal: the program as it is started allocates nothing per request, also where no number on the way is small: memory beyond
 * 4 GiB, disks beyond 2 TiB. V8 keeps integers below 2^31 without allocating, and boxes others wherever a call is not inlined.
 *
 * Method: the compiled program reports its garbage collections (--trace-gc); what its reactor's heap grew by between them,
 * over many requests of the native load generator, is what it allocated. A boxed number takes 16 bytes.
 */
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Frontend } from '../frontend/frontend.js';
import { runLoad } from '../frontend/load.js';
import { ONE_DISK, Program, newFolder } from './programs.js';

const TIB = 2 ** 40;
const MB = 2 ** 20;
const BYTES_PER_REQUEST_MAX = 4;
const WARM_UP_REQUESTS = 100_000;
/** Code is compiled anew for a while: the best of some rounds counts. */
const ROUNDS_MAX = 5;
const TIMEOUT_MS = 240_000;
/** Reports of a collection that are still on their way through the pipe. */
const SETTLE_MS = 300;

/** Bytes that the threads other than the first allocated, as the collections of a log tell: by thread, heap at its latest one. */
class Allocations {
  #bytes = 0;
  #seen = 0;
  readonly #heaps = new Map<string, number>();

  /** What was allocated since the last call. */
  since(log: string): number {
    const before = this.#bytes;
    const collection = /^\[\d+:(0x[0-9a-f]+)\] .*?: [A-Z][\w-]*(?: \([^)]*\))? ([\d.]+) \([\d.]+\) -> ([\d.]+) /gm;
    const text = log.slice(this.#seen, log.lastIndexOf('\n') + 1);
    this.#seen += text.length;
    for (const [, thread, heapMb, leftMb] of text.matchAll(collection)) {
      const last = this.#heaps.get(thread!);
      if (last !== undefined) this.#bytes += (Number(heapMb) - last) * MB;
      this.#heaps.set(thread!, Number(leftMb));
    }
    return this.#bytes - before;
  }

  get threads(): number {
    return this.#heaps.size;
  }
}

describe('the program', { timeout: TIMEOUT_MS }, () => {
  it.each([
    { what: 'a null disk of 16 TiB', requests: 1_000_000, sizeBytes: 16 * TIB, readPercent: 50 },
    { what: 'a file of 1 TiB', requests: 200_000, sizeBytes: TIB, readPercent: 100 },
  ])('allocates nothing per request on $what', async ({ requests, sizeBytes, readPercent }) => {
    const folder = newFolder();
    const socket = join(folder, 'disk.sock');
    const file = join(folder, 'disk.img');
    writeFileSync(file, '');
    truncateSync(file, TIB);
    const disk = readPercent === 100 ? [`--blk-file=${file}`] : ['--bdev=null', `--size=${sizeBytes}`];
    const traced = ['sh', '-c', 'node=$1; shift; exec "$node" --trace-gc "$@"', 'sh'];
    const program = await Program.serving(ONE_DISK, [`--socket-path=${socket}`, ...disk], folder, { through: traced });
    const frontend = await Frontend.connect(socket);
    const allocations = new Allocations();
    const load = async (requestsMax: number): Promise<number> => {
      const limits = { seconds: TIMEOUT_MS / 1000, requestsMax, rangeBytes: sizeBytes };
      const result = runLoad(frontend, frontend.queue, { depth: 32, readPercent, polite: true, ...limits });
      expect([result.requests, result.errors]).toEqual([requestsMax, 0]);
      await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
      return allocations.since(program.stdout) / requestsMax;
    };
    await load(WARM_UP_REQUESTS);
    let best = Infinity;
    for (let round = 0; round < ROUNDS_MAX && best > BYTES_PER_REQUEST_MAX; round++) {
      best = Math.min(best, await load(requests));
    }
    frontend.close();
    expect(allocations.threads).toBeGreaterThan(1);
    expect(best).toBeLessThan(BYTES_PER_REQUEST_MAX);
  });
});
