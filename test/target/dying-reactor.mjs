/** The code of a reactor thread that dies when it is asked for the state of its controllers. */
import { parentPort } from 'node:worker_threads';

await import(new URL('../../dist/src/target/reactor-worker.js', import.meta.url));
parentPort.on('message', ({ method }) => {
  if (method === 'controllers') throw new Error('an assertion of ours failed');
});
