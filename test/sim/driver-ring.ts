/** The driver's side of a virtqueue, split or packed: what the simulated guest does with one. */

/** A buffer of a request. */
export interface Piece {
  /** Guest address. */
  readonly address: number;
  readonly lengthBytes: number;
  readonly writable: boolean;
}

/** Parts of a ring for SET_VRING_ADDR, as guest addresses. */
export interface RingParts {
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
}

export interface DriverRing {
  readonly size: number;
  readonly parts: RingParts;
  /** Id and length of the entry that `takeUsed` took last. */
  readonly usedId: number;
  readonly usedBytes: number;
  /** What SET_VRING_BASE says of it. */
  readonly base: number;
  /** The device said in GET_VRING_BASE where it stopped. Returns whether all that it took is answered. */
  stoppedAt(base: number): boolean;
  /**
   * Adds a chain; the device sees it after `publish`. Pieces from `tabledFrom` on go to an indirect table in memory of the caller's.
   * Returns its id, -1 when there is no room.
   */
  add(pieces: readonly Piece[], tabledFrom: number, tableAddress: number): number;
  /** Returns whether the device wants to be kicked. */
  publish(): boolean;
  /** There is a used entry to take. */
  readonly hasUsed: boolean;
  /** Takes the next used entry. False when there is none. */
  takeUsed(): boolean;
  /** Asks to be called at the next used entry, or not at all. */
  wantCalls(on: boolean): void;
  /** Starts anew: empty, nothing in flight. */
  reset(): void;
}
