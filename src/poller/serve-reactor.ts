/** Where a reactor runs: builds it, serves calls of the control plane, runs until the thread or the process is ended. */
import { parentPort, workerData } from 'node:worker_threads';
import { Arena, check, native } from '../../native/index.js';
import { SeededRandom, SystemClock } from './clock.js';
import { FAILURE } from './process.js';
import type { ProcessData } from './process.js';
import { REACTOR_STAT_COUNT, Reactor } from './reactor.js';
import { answer, serializeError } from './remote-reactor.js';
import type { Notice, ReactorHandlers, ReactorHost, RemoteReactorOptions, Reply, Request } from './remote-reactor.js';
import type { ThreadData } from './thread.js';
import { Uring } from './uring.js';

/** The way to the control plane. */
interface Line {
  readonly options: RemoteReactorOptions;
  readonly stats: Float64Array;
  readonly isIsolated: boolean;
  post(message: Reply | Notice): void;
  listen(onRequest: (request: Request) => void): void;
}

export function serveReactor(makeHandlers: (host: ReactorHost) => ReactorHandlers): void {
  const line = parentPort === null ? processLine() : threadLine();
  const { options, stats, isIsolated } = line;
  if (options.core !== undefined) check(native.threadSetAffinity(options.core), `run on core ${options.core}`);
  native.threadSetName(options.name);
  const arena = new Arena();
  const clock = new SystemClock();
  const reactor = new Reactor({
    name: options.name,
    arena,
    ring: new Uring(arena),
    clock,
    random: new SeededRandom(clock.wallMs() ^ process.pid),
    mode: options.mode,
    pollUs: options.pollUs,
    stats,
  });
  reactor.watchEventLoop(check(native.eventLoopFd(), 'find the event loop'));
  const handlers = makeHandlers({
    reactor,
    isIsolated,
    notify: (event, data) => line.post({ event, data }),
    share: (counters) => (isIsolated ? Float64Array.from(counters) : counters),
  });
  line.listen((request) => void answer(handlers, request).then((reply) => line.post(reply)));
  const loop = (): void => {
    reactor.runSlice();
    setImmediate(loop);
  };
  setImmediate(loop);
}

function threadLine(): Line {
  const port = parentPort!;
  const { options, stats } = workerData as ThreadData;
  return {
    options,
    stats,
    isIsolated: false,
    post: (message) => port.postMessage(message),
    listen: (onRequest) => port.on('message', onRequest),
  };
}

function processLine(): Line {
  const { options } = JSON.parse(process.argv[2]!) as ProcessData;
  const post = (message: Reply | Notice, then?: () => void): void => {
    process.send!(message, () => then?.());
  };
  process.on('uncaughtException', (error) => {
    // The message has to be gone before the process is.
    post({ event: FAILURE, data: serializeError(error) }, () => process.abort());
  });
  return {
    options,
    stats: new Float64Array(REACTOR_STAT_COUNT),
    isIsolated: true,
    post,
    listen: (onRequest) => {
      process.on('message', onRequest);
      // Nobody controls it any more.
      process.on('disconnect', () => process.exit(1));
    },
  };
}
