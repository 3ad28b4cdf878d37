/** Where the code of a reactor is; for the entries of the programs, so without anything that takes long to load. */
import { ReactorThread } from '../poller/thread.js';
import { endAtOnce } from './system.js';

export const REACTOR_ENTRY = new URL('./reactor-worker.js', import.meta.url);

/**
 * Starts the thread of the daemon's first reactor. To load its code and to warm it up takes as long as all else that a start does, and
 * guests wait for it when a daemon is started again.
 */
export function prepareReactor(): void {
  ReactorThread.prepare(REACTOR_ENTRY);
  // Without waiting for the thread: one that is ended in the middle of a native call takes the process along.
  process.on('exit', (code) => endAtOnce(code));
}
