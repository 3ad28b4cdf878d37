/**
 * Long jobs that survive the daemon: each is written down when it has begun, and begun again when the daemon, or the process of an isolated
 * disk, is back. Its record goes when the job ends, is cancelled or fails; not when it is ended by the end of the daemon.
 *
 * Knows no operation: what a job is was said by whoever began it, and is said again.
 */
import { z } from 'zod';
import type { Log } from '../log.js';
import type { StateFolder } from './state-folder.js';

const KIND = 'job';

const jobSchema = z.object({
  version: z.literal(1),
  /** What it works on. */
  owner: z.enum(['bdev', 'controller']),
  name: z.string(),
  operation: z.string(),
  /** As they were given. */
  params: z.record(z.string(), z.unknown()),
});

export type JobRecord = Omit<z.infer<typeof jobSchema>, 'version'>;

/** How a job ended. */
export interface JobEnd {
  readonly owner: JobRecord['owner'];
  readonly name: string;
  /** As the job is described. */
  readonly info: Readonly<Record<string, unknown>>;
}

export class Jobs {
  readonly #log: Log;
  /** Null: nothing is kept. */
  #state: StateFolder | null = null;
  /** Jobs that could not be begun again, as they are described, by owner and name. */
  readonly #lost = new Map<string, Readonly<Record<string, unknown>>>();

  constructor(log: Log) {
    this.#log = log;
  }

  keepIn(state: StateFolder): void {
    this.#state = state;
  }

  /** A job has begun, and runs. */
  began(record: JobRecord): void {
    this.#lost.delete(keyOf(record));
    try {
      this.#state?.write(KIND, keyOf(record), { version: 1, ...record });
    } catch (error) {
      const problem = (error as Error).message;
      this.#log.warn({ ...record, error: problem }, 'a job cannot be written down: it will not go on after a restart');
    }
  }

  /** A job is over, for good. */
  ended({ owner, name, info }: JobEnd): void {
    const level = info['state'] === 'failed' ? 'warn' : 'info';
    this.#log[level]({ [owner]: name, ...info }, 'a job has ended');
    this.forget(owner, name);
  }

  forget(owner: JobRecord['owner'], name: string): void {
    try {
      this.#state?.remove(KIND, keyOf({ owner, name }));
    } catch (error) {
      this.#log.warn({ [owner]: name, error: (error as Error).message }, 'the record of a job cannot be removed');
    }
  }

  /** What became of a job that could not be begun again, or null. */
  lost(owner: JobRecord['owner'], name: string): Readonly<Record<string, unknown>> | null {
    return this.#lost.get(keyOf({ owner, name })) ?? null;
  }

  /** Begins the jobs again that `isMine` picks. @param begin rejects when it cannot be */
  async resume(isMine: (record: JobRecord) => boolean, begin: (record: JobRecord) => Promise<unknown>): Promise<void> {
    for (const record of this.#records().filter(isMine)) {
      const { owner, name, operation, params } = record;
      try {
        await begin(record);
        this.#log.info({ [owner]: name, operation, ...params }, 'a job goes on after the restart');
      } catch (error) {
        const { message } = error as Error;
        this.#log.warn({ [owner]: name, operation, error: message }, 'a job cannot go on after the restart');
        this.#lost.set(keyOf(record), { type: operation, state: 'failed', error: `after a restart: ${message}` });
        this.forget(owner, name);
      }
    }
  }

  #records(): JobRecord[] {
    try {
      return (this.#state?.read(KIND) ?? []).flatMap(({ path, value }) => {
        const parsed = jobSchema.safeParse(value);
        if (!parsed.success) this.#log.warn({ path }, 'this is no record of a job');
        return parsed.success ? [parsed.data] : [];
      });
    } catch (error) {
      this.#log.warn({ error: (error as Error).message }, 'the records of jobs cannot be read');
      return [];
    }
  }
}

function keyOf({ owner, name }: Pick<JobRecord, 'owner' | 'name'>): string {
  return `${owner}-${name}`;
}
