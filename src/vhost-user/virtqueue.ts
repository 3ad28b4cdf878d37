/** What a ring's implementation offers, split or packed; and what is wrong with a ring that breaks the rules. */
import type { DescriptorChain } from './descriptor-chain.js';
import type { RingLog } from './dirty-log.js';

/** `pop` found nothing. */
export const POP_NONE = -1;
/** `pop` found a broken ring: `fault` says what is wrong. The queue is not to be used any more. */
export const POP_BROKEN = -2;

export interface Virtqueue {
  /** Number of entries. */
  readonly size: number;
  /** Free-running index of the next entry to be taken, as GET_VRING_BASE wants it. */
  readonly nextAvailable: number;
  /** Why the ring is broken, or null. */
  readonly fault: string | null;
  /** Whether requests that were in flight when the ring was started are still to be taken. */
  readonly recovering: boolean;
  /** How many those were at the start. */
  readonly recoveredCount: number;
  /** Logs what is written to the ring from now on, null nowhere; what was written before is marked at once. */
  setLog(log: RingLog | null): void;
  /** Takes the next chain into `chain`; returns its head, POP_NONE or POP_BROKEN. */
  pop(chain: DescriptorChain): number;
  /** Gives a head back. Seen by the guest after `publish`. @param writtenBytes what was written to its buffers */
  push(head: number, writtenBytes: number): void;
  /** Makes what was pushed visible. Returns whether the guest wants to be notified of it. */
  publish(): boolean;
  /** Asks for kicks, or asks not to be kicked. Returns whether there is something to take already. */
  setNotification(on: boolean): boolean;
}
