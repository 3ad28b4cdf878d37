/** Where a reactor runs: builds it, serves calls of the control plane, runs until the thread or the process is ended. */
import { setFlagsFromString } from 'node:v8';
import { parentPort } from 'node:worker_threads';
import type { MessagePort } from 'node:worker_threads';
import { Arena, check, native } from '../../native/index.js';
import { SeededRandom, SystemClock } from './clock.js';
import { FAILURE } from './process.js';
import type { ProcessData } from './process.js';
import { REACTOR_STAT_COUNT, Reactor } from './reactor.js';
import type { ReactorOptions } from './reactor.js';
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

/** A request passes a long chain of small functions: with V8's own limit, 920, calls are left in it. Up to 15 % faster. */
const INLINED_BYTECODE_BYTES = 4000;

/** What a reactor has before it is known what it is to be. */
type Parts = Pick<ReactorOptions, 'arena' | 'ring' | 'clock' | 'random'>;

/** @param warmUp is given a reactor of its own, before anything is known of the one that is served */
export function serveReactor(
  warmUp: (reactor: Reactor) => void,
  makeHandlers: (host: ReactorHost) => ReactorHandlers,
): void {
  setFlagsFromString(`--max-inlined-bytecode-size-cumulative=${INLINED_BYTECODE_BYTES}`);
  const arena = new Arena();
  const clock = new SystemClock();
  const random = new SeededRandom(clock.wallMs() ^ process.pid);
  const parts: Parts = { arena, ring: new Uring(arena), clock, random };
  warmUp(new Reactor({ ...parts, name: 'warm-up', mode: 'adaptive', pollUs: 0 }));
  if (parentPort === null) serve(parts, processLine(), makeHandlers);
  else threadLine(parentPort, (line) => serve(parts, line, makeHandlers));
}

function serve(parts: Parts, line: Line, makeHandlers: (host: ReactorHost) => ReactorHandlers): void {
  const { options, stats, isIsolated } = line;
  const { name, mode, pollUs, core } = options;
  if (core !== undefined) check(native.threadSetAffinity(core), `run on core ${core}`);
  native.threadSetName(name);
  const reactor = new Reactor({ ...parts, name, mode, pollUs, stats });
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

/** @param then is given the line as soon as it is known what the thread is for */
function threadLine(port: MessagePort, then: (line: Line) => void): void {
  const post = (message: Reply | Notice): void => port.postMessage(message);
  const listen = (onRequest: (request: Request) => void): void => void port.on('message', onRequest);
  port.once('message', (data: ThreadData) => then({ ...data, isIsolated: false, post, listen }));
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
