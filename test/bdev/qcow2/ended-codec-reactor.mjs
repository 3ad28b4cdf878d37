/** Ends threads of Node that have jobs with the compression threads, again and again, and says whether it lives. */
import { Worker, isMainThread, parentPort } from 'node:worker_threads';

const ROUNDS = 12;

if (isMainThread) {
  for (let round = 0; round < ROUNDS; round++) {
    const worker = new Worker(new URL(import.meta.url));
    await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
    await worker.terminate();
  }
  console.log('alive');
} else {
  // A thread does not take over what compiles TypeScript in the main one.
  (await import('tsx/esm/api')).register();
  const { Arena } = await import('../../../native/index.ts');
  const { SeededRandom, SystemClock } = await import('../../../src/poller/clock.ts');
  const { Reactor } = await import('../../../src/poller/reactor.ts');
  const { Uring } = await import('../../../src/poller/uring.ts');
  const { CodecJob, CodecOperation } = await import('../../../src/bdev/qcow2/codec/codec-job.ts');
  const { ThreadCodecPool } = await import('../../../src/bdev/qcow2/codec/thread-codec-pool.ts');
  const arena = new Arena(2 ** 32);
  const clock = new SystemClock();
  const parts = { arena, ring: new Uring(arena), clock, random: new SeededRandom(1) };
  const reactor = new Reactor({ ...parts, name: 'ended', mode: 'busy', pollUs: 0 });
  const pool = new ThreadCodecPool(reactor, 2);
  const BYTES = 2 ** 20;
  const owner = { onCodecDone: (job) => pool.submit(job) };
  for (let i = 0; i < 16; i++) {
    const job = new CodecJob(owner);
    job.operation = CodecOperation.deflate;
    job.source = arena.allocate(BYTES);
    job.sourceBytes = BYTES;
    job.destination = arena.allocate(BYTES);
    job.capacityBytes = BYTES;
    pool.submit(job);
  }
  parentPort.postMessage('busy');
  for (;;) reactor.step();
}
