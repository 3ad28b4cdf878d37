/**
 * What happened in a run, event by event: a running hash of all of it, and the last events in words.
 *
 * Invariant: an event holds nothing that differs between two runs of one seed: no address, descriptor, process or real time.
 */

/** Events of a run with the names of their numbers. */
const KINDS = {
  boot: [],
  kill: ['ios'],
  powerCut: ['dirtyWrites'],
  stop: [],
  submit: ['op', 'offset', 'length', 'flags', 'number'],
  effect: ['number'],
  fault: ['number', 'fault'],
  done: ['number', 'result'],
  abandon: ['number', 'sectors'],
  ready: ['events'],
  sleep: ['timeoutUs'],
  request: ['queue', 'slot', 'type', 'sector', 'sectors', 'sequence'],
  answer: ['queue', 'slot', 'status', 'usedBytes'],
  kick: ['queue'],
  call: ['queue'],
  message: ['id', 'bytes', 'fds'],
  reply: ['id', 'bytes'],
  connect: [],
  hangUp: [],
  action: ['index'],
  log: [],
} as const;

export type TraceKind = keyof typeof KINDS;

const KIND_NAMES = Object.keys(KINDS) as TraceKind[];
const KIND_NUMBERS = Object.fromEntries(KIND_NAMES.map((name, i) => [name, i])) as Record<TraceKind, number>;
/** Events kept for a report. */
const KEPT = 200;
const WIDTH = 8;

export class Trace {
  /** Events so far. */
  count = 0;
  /** Is given every event in words; costs time. */
  sink: ((line: string) => void) | null = null;
  readonly #kept = new Float64Array(KEPT * WIDTH);
  readonly #texts: string[] = new Array<string>(KEPT).fill('');
  readonly #cell = new Float64Array(1);
  readonly #halves = new Uint32Array(this.#cell.buffer);
  #lo = 0x811c9dc5;
  #hi = 0x1b873593;

  add(nowUs: number, kind: TraceKind, a = 0, b = 0, c = 0, d = 0, e = 0, f = 0): void {
    this.#record(nowUs, kind, '', a, b, c, d, e, f);
  }

  /** An event in words. */
  say(nowUs: number, kind: 'log', text: string): void {
    for (let i = 0; i < text.length; i++) this.#mix(text.charCodeAt(i));
    this.#record(nowUs, kind, text, 0, 0, 0, 0, 0, 0);
  }

  /** Of all events, 16 hexadecimal digits. */
  get hash(): string {
    return [this.#hi, this.#lo].map((word) => (word >>> 0).toString(16).padStart(8, '0')).join('');
  }

  /** The last events in words, oldest first. */
  last(): string[] {
    const lines: string[] = [];
    for (let i = Math.max(0, this.count - KEPT); i < this.count; i++) lines.push(this.#line(i));
    return lines;
  }

  #record(nowUs: number, kind: TraceKind, text: string, ...numbers: number[]): void {
    const at = (this.count % KEPT) * WIDTH;
    this.#kept[at] = nowUs;
    this.#kept[at + 1] = KIND_NUMBERS[kind];
    for (let i = 0; i < 6; i++) this.#kept[at + 2 + i] = numbers[i]!;
    this.#texts[this.count % KEPT] = text;
    for (let i = 0; i < WIDTH; i++) {
      this.#cell[0] = this.#kept[at + i]!;
      this.#mix(this.#halves[0]!);
      this.#mix(this.#halves[1]!);
    }
    this.count++;
    this.sink?.(this.#line(this.count - 1));
  }

  #mix(word: number): void {
    this.#lo = Math.imul(this.#lo ^ word, 0x01000193);
    this.#hi = Math.imul((this.#hi ^ word) + 0x9e3779b9, 0x85ebca6b);
    this.#hi ^= this.#hi >>> 13;
  }

  #line(index: number): string {
    const at = (index % KEPT) * WIDTH;
    const kind = KIND_NAMES[this.#kept[at + 1]!]!;
    const numbers = KINDS[kind].map((name, i) => `${name}=${this.#kept[at + 2 + i]}`);
    const text = this.#texts[index % KEPT]!;
    return [String(index).padStart(6), this.#kept[at]!.toFixed(2).padStart(12), kind, ...numbers, text]
      .join(' ')
      .trimEnd();
  }
}
