/** Something the daemon must never do, and did. */

export type FindingKind =
  /** The process ended. */
  | 'crash'
  /** It does not answer, or not end a session. */
  | 'hang'
  /** A reply that is none. */
  | 'reply'
  /** Memory was written that the device had no right to write, or a used entry lies. */
  | 'memory'
  /** A request that keeps the rules was not carried out as it has to be. */
  | 'answer'
  /** Another disk was touched, or not served. */
  | 'witness'
  /** Descriptors, threads, mappings or memory stay behind. */
  | 'leak'
  /** The daemon's own counts are wrong. */
  | 'metrics';

export class Finding extends Error {
  readonly kind: FindingKind;
  readonly detail: string;

  constructor(kind: FindingKind, detail: string) {
    super(`${kind}: ${detail}`);
    this.name = 'Finding';
    this.kind = kind;
    this.detail = detail;
  }
}
