/**
 * What is wrong with a configuration, said so that an operator can act on it: where, what, and the remedy. Problems are
 * gathered and shown together; a ConfigError carries them.
 */

/** Way to a setting, in the words of the config file: `['bdevs', 1, 'path']`. */
export type FieldPath = readonly (string | number)[];

/** Where an operator finds a setting. */
export interface Place {
  /** Config file, or null when the setting does not come from one. */
  readonly file: string | null;
  /** Counted from 1; null when unknown. */
  readonly line: number | null;
  /** As `bdevs[1].path`, or the command-line option that sets it. */
  readonly field: string;
}

export interface Problem extends Place {
  readonly message: string;
  /** Next step for the operator. */
  readonly remedy: string;
}

/** Where a configuration came from. */
export interface ConfigSource {
  locate(path: FieldPath): Place;
}

/** The configuration cannot be used, for at least one reason. */
export class ConfigError extends Error {
  constructor(readonly problems: readonly Problem[]) {
    super(problems.map(formatProblem).join('\n'));
    this.name = 'ConfigError';
  }
}

/** Gathers problems on the way; `throwIfAny` ends it. */
export class Problems {
  readonly #source: ConfigSource;
  readonly #found: Problem[] = [];

  constructor(source: ConfigSource) {
    this.#source = source;
  }

  add(path: FieldPath, message: string, remedy: string): void {
    this.#found.push({ ...this.#source.locate(path), message, remedy });
  }

  throwIfAny(): void {
    if (this.#found.length === 0) return;
    throw new ConfigError(this.#found.toSorted((a, b) => (a.line ?? 0) - (b.line ?? 0)));
  }
}

/** `bdevs[1].path` */
export function formatPath(path: FieldPath): string {
  return path.reduce<string>((text, key) => {
    if (typeof key === 'number') return `${text}[${key}]`;
    return text === '' ? key : `${text}.${key}`;
  }, '');
}

/** Two lines: the problem with its place, and the remedy. */
export function formatProblem(problem: Problem): string {
  const { file, line, field, message, remedy } = problem;
  const place = [file === null ? '' : line === null ? file : `${file}:${line}`, field];
  return `${[...place.filter((part) => part !== ''), message].join(': ')}\n    -> ${remedy}`;
}

/** Settings that were given on the command line: the rest is where `base` finds it. @param options by path, as `metrics.listen` */
export function optionSource(options: Readonly<Record<string, string>>, base?: ConfigSource): ConfigSource {
  return {
    locate: (path) => {
      const option = options[formatPath(path)];
      if (option !== undefined) return { file: null, line: null, field: option };
      return base?.locate(path) ?? { file: null, line: null, field: formatPath(path) };
    },
  };
}
