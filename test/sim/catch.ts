/** Whether the simulator finds the bugs of the list, and after how many seeds. */
import type { Mutation } from './mutations.js';
import { runSeeds } from './pool.js';

export interface Catch {
  readonly mutation: Mutation;
  /** Seeds it took, or null: not found. */
  readonly seeds: number | null;
  /** What was noticed. */
  readonly message: string;
}

/** @param onCatch is told of each as it is decided */
export async function catchAll(
  mutations: readonly Mutation[],
  options: { readonly jobs: number; readonly seedsMax: number },
  onCatch: (caught: Catch) => void,
): Promise<void> {
  const left = [...mutations];
  const work = async (): Promise<void> => {
    for (let mutation = left.shift(); mutation !== undefined; mutation = left.shift()) {
      onCatch(await catchOne(mutation, options.seedsMax));
    }
  };
  await Promise.all(Array.from({ length: options.jobs }, work));
}

async function catchOne(mutation: Mutation, seedsMax: number): Promise<Catch> {
  let seeds = 0;
  let message = '';
  let isCaught = false;
  await runSeeds({
    jobs: 1,
    batch: 1,
    mutation,
    next: () => (message !== '' || seeds === seedsMax ? undefined : ++seeds),
    onResult: ({ failure }) => {
      if (failure === null) return;
      message = failure.message.split('\n')[0]!;
      // A process that ends has not been caught at anything: most likely the bug does not even load.
      isCaught = failure.events.length > 0;
    },
  });
  return { mutation, seeds: isCaught ? seeds : null, message };
}
