/** The small languages of qemu-img's command line: sizes, `-o name=value,...`, and how results are printed. */
import { BdevError } from '../../bdev/bdev.js';

const UNITS = 'bkmgtpe';

/** `10G`, `1.5M`, `4096`: powers of 1024, as qemu-img has them; KiB and GiB are taken too. Throws BdevError. */
export function parseImageSize(text: string, field = 'size'): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([bkmgtpe])(?:ib)?)?$/i.exec(text.trim());
  const bytes = match === null ? NaN : Number(match[1]) * 1024 ** UNITS.indexOf((match[2] ?? 'b').toLowerCase());
  if (!Number.isSafeInteger(Math.ceil(bytes))) {
    throw usage(field, `Invalid image size specified: ${text}`, 'write bytes, or a number with k, M, G, T, P or E');
  }
  return Math.ceil(bytes);
}

/** Something on the command line that there is not. */
export function usage(field: string, message: string, hint: string): BdevError {
  return new BdevError('usage', field, message, hint);
}

/** `a=1,b=2`, where `,,` stands for a comma in a value; a name alone is switched on. */
export function keyValues(text: string): Map<string, string> {
  const values = new Map<string, string>();
  for (const part of text.replaceAll(',,', '\0').split(',')) {
    if (part === '') continue;
    const at = part.indexOf('=');
    values.set(at < 0 ? part : part.slice(0, at), at < 0 ? 'on' : part.slice(at + 1).replaceAll('\0', ','));
  }
  return values;
}

/** As `keyValues`, of all texts. @param known the names that there are. Throws BdevError. */
export function parseOptions(texts: readonly string[], known: readonly string[]): Map<string, string> {
  const options = new Map<string, string>();
  for (const text of texts) {
    for (const [name, value] of keyValues(text)) {
      if (!known.includes(name)) {
        throw usage(`-o ${name}`, `Invalid parameter '${name}'`, `use one of: ${known.join(', ')}`);
      }
      options.set(name, value);
    }
  }
  return options;
}

/** `on`, `off` and their like. Throws BdevError. */
export function parseSwitch(name: string, text: string): boolean {
  if (['on', 'yes', 'true', 'y'].includes(text)) return true;
  if (['off', 'no', 'false', 'n'].includes(text)) return false;
  throw usage(name, `Parameter '${name}' is '${text}'`, 'write on or off');
}

/** One of a few words. Throws BdevError. */
export function parseChoice<T extends string>(name: string, text: string, choices: readonly T[]): T {
  const found = choices.find((choice) => choice === text);
  if (found === undefined) throw usage(name, `Invalid parameter '${name}': '${text}'`, `use ${choices.join(', ')}`);
  return found;
}

/** `3.28 MiB`: three digits, as qemu-img prints sizes. */
export function humanSize(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'];
  let unit = 0;
  let value = bytes;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number(value.toPrecision(3))} ${units[unit]}`;
}

export function print(text: string): void {
  process.stdout.write(text);
}

export function printJson(value: unknown): void {
  print(`${JSON.stringify(value, null, 4)}\n`);
}

/** A line that is written over while it goes on, on a terminal; else one line for each tenth. */
export class ProgressLine {
  readonly #isShown: boolean;
  #last = -1;

  constructor(isShown: boolean) {
    this.#isShown = isShown;
  }

  update(fraction: number): void {
    const percent = Math.floor(fraction * 1000) / 10;
    const isTerminal = process.stderr.isTTY;
    if (!this.#isShown || percent < this.#last + (isTerminal ? 0.1 : 10)) return;
    this.#last = percent;
    process.stderr.write(isTerminal ? `    (${percent.toFixed(2)}/100%)\r` : `    (${percent.toFixed(2)}/100%)\n`);
  }

  end(): void {
    if (!this.#isShown) return;
    if (this.#last < 100) this.#last = 0;
    this.update(1);
    if (process.stderr.isTTY) process.stderr.write('\n');
  }
}
