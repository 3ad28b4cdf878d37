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
/** One after whose new beginning the daemon has ended so often is not begun once more: it may be what ends it. */
const RESUMES_MAX = 3;
/** A job that has run so long is not what ends the daemon. */
const SETTLED_MS = 30_000;

const jobSchema = z.object({
  version: z.literal(1),
  /** What it works on. */
  owner: z.enum(['bdev', 'controller']),
  name: z.string(),
  operation: z.string(),
  /** As they were given. */
  params: z.record(z.string(), z.unknown()),
  /** Times it was begun again of late. */
  resumes: z.int().min(0),
});

export type JobRecord = Omit<z.infer<typeof jobSchema>, 'version' | 'resumes'>;
type StoredJob = z.infer<typeof jobSchema>;

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
  /** How often those were begun again that are just being so. */
  readonly #resumes = new Map<string, number>();
  #isEnding = false;
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
    this.#write({ ...record, version: 1, resumes: this.#resumes.get(keyOf(record)) ?? 0 });
  }

  /** A job is over. */
  ended({ owner, name, info }: JobEnd): void {
    if (this.#isEnding && info['state'] !== 'done') return;
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
      const resumes = record.resumes + 1;
      try {
        if (resumes > RESUMES_MAX) throw new Error(`${RESUMES_MAX} times all ended soon after it had gone on`);
        this.#resumes.set(keyOf(record), resumes);
        this.#write({ ...record, resumes });
        await begin(record);
        setTimeout(() => this.#settle(record), SETTLED_MS).unref();
        this.#log.info({ [owner]: name, operation, ...params }, 'a job goes on after the restart');
      } catch (error) {
        if (this.#isEnding) return;
        const { message } = error as Error;
        this.#log.warn({ [owner]: name, operation, error: message }, 'a job cannot go on after the restart');
        this.#lost.set(keyOf(record), { type: operation, state: 'failed', error: `after a restart: ${message}` });
        this.forget(owner, name);
      } finally {
        this.#resumes.delete(keyOf(record));
      }
    }
  }

  /** The daemon ends in an orderly way: what ends with it is no end of a job. */
  end(): void {
    this.#isEnding = true;
    for (const record of this.#records()) this.#settle(record);
  }

  /** It is not the job that ends the daemon. */
  #settle(record: JobRecord): void {
    const stored = this.#records().find((other) => keyOf(other) === keyOf(record));
    if (stored !== undefined && stored.resumes > 0) this.#write({ ...stored, resumes: 0 });
  }

  #write(record: StoredJob): void {
    try {
      this.#state?.write(KIND, keyOf(record), record);
    } catch (error) {
      const { owner, name, operation } = record;
      const problem = (error as Error).message;
      this.#log.warn(
        { [owner]: name, operation, error: problem },
        'a job cannot be written down: it ends with the daemon',
      );
    }
  }

  #records(): StoredJob[] {
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
