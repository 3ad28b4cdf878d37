/** Who may be a disk's front-end: decided from the credentials that the kernel noted when a process connected. */
import { native } from '../../native/index.js';
import type { PeerCredentials } from '../../native/index.js';

/** A process may connect when its user or one of its groups is listed. */
export interface PeerRules {
  readonly uids: readonly number[];
  /** Compared with the peer's group and with its supplementary ones. */
  readonly gids: readonly number[];
}

/** @param fd connected socket of `peer` */
export function mayConnect({ uids, gids }: PeerRules, fd: number, peer: PeerCredentials): boolean {
  if (uids.includes(peer.uid) || gids.includes(peer.gid)) return true;
  if (gids.length === 0) return false;
  const groups = native.socketPeerGroups(fd);
  return typeof groups !== 'number' && groups.some((gid) => gids.includes(gid));
}
