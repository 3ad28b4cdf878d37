/**
 * Everything a test file started, ended in reverse order whether the tests passed or not:
 *
 *     const scope = new Scope();
 *     afterAll(() => scope.close());
 *     const guest = scope.add(await bootGuest({ disks }));
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

export class Scope {
  readonly #resources: AsyncDisposable[] = [];

  add<T extends AsyncDisposable>(resource: T): T {
    this.#resources.push(resource);
    return resource;
  }

  /** A new directory, removed with what it holds. Short, because a unix socket's path is at most 107 bytes. */
  directory(): string {
    const path = mkdtempSync(join(tmpdir(), 'strata-'));
    this.#resources.push({
      [Symbol.asyncDispose]: () => Promise.resolve(rmSync(path, { recursive: true, force: true })),
    });
    return path;
  }

  /** @throws AggregateError after everything was tried, when something would not end */
  async close(): Promise<void> {
    const errors: unknown[] = [];
    for (let resource = this.#resources.pop(); resource !== undefined; resource = this.#resources.pop()) {
      try {
        await resource[Symbol.asyncDispose]();
      } catch (error) {
        errors.push(error);
      }
    }
    if (errors.length > 0) throw new AggregateError(errors, 'Could not end everything the tests started');
  }
}
