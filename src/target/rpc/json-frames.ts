/**
 * Cuts a stream of bytes into JSON objects that follow each other with nothing or white space between them: how JSON-RPC is
 * spoken on SPDK's sockets, without lengths and without line ends. Finds where an object ends; whether it is one is for JSON.parse.
 */

const SPACES = new Set([0x20, 0x09, 0x0a, 0x0d]);
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPENING = new Set([0x7b, 0x5b]);
const CLOSING = new Set([0x7d, 0x5d]);

/** The stream holds something that cannot be a message, or one that is too long. Nothing behind it can be understood. */
export class FramingError extends Error {}

export class JsonFrames {
  readonly #bytesMax: number;
  #parts: Buffer[] = [];
  #bytes = 0;
  #depth = 0;
  #isInString = false;
  #isEscaped = false;

  /** @param bytesMax longest object */
  constructor(bytesMax: number) {
    this.#bytesMax = bytesMax;
  }

  /** Texts of the objects that end in these bytes. Throws FramingError. */
  push(chunk: Buffer): string[] {
    const texts: string[] = [];
    let start = 0;
    for (let at = 0; at < chunk.length; at++) {
      const byte = chunk[at]!;
      if (this.#depth === 0) {
        if (SPACES.has(byte)) continue;
        if (!OPENING.has(byte)) throw new FramingError('a request is a JSON object');
        this.#depth = 1;
        start = at;
      } else if (this.#isInString) {
        if (this.#isEscaped) this.#isEscaped = false;
        else if (byte === BACKSLASH) this.#isEscaped = true;
        else if (byte === QUOTE) this.#isInString = false;
      } else if (byte === QUOTE) {
        this.#isInString = true;
      } else if (OPENING.has(byte)) {
        this.#depth++;
      } else if (CLOSING.has(byte) && --this.#depth === 0) {
        this.#keep(chunk.subarray(start, at + 1));
        texts.push(Buffer.concat(this.#parts).toString('utf8'));
        this.#parts = [];
        this.#bytes = 0;
      }
    }
    if (this.#depth > 0) this.#keep(chunk.subarray(start));
    return texts;
  }

  #keep(part: Buffer): void {
    this.#bytes += part.length;
    if (this.#bytes > this.#bytesMax) throw new FramingError(`a message may have ${this.#bytesMax} bytes`);
    this.#parts.push(part);
  }
}
