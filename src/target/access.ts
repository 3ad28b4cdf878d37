/** Who gets at a controller's socket: from names of users and groups to what the kernel tells of a peer. */
import type { PeerRules } from '../vhost-user/peer-rules.js';
import type { AccessConfig, ControllerConfig } from './config/config.js';
import type { FieldPath, Problems } from './config/problem.js';
import { groupOfFileAt } from './socket-path.js';
import { groupId, userId } from './system.js';

const ROOT = 0;

/** Adds a problem for every name that this host does not know, and for a group that this process cannot give away. */
export function checkAccess({ allow, socketGroup }: AccessConfig, path: FieldPath, problems: Problems): void {
  const lists = [
    ['users', 'user', userId],
    ['groups', 'group', groupId],
  ] as const;
  for (const [key, what, lookUp] of lists) {
    allow?.[key].forEach((account, i) => {
      if (numberOf(account, lookUp) !== undefined) return;
      problems.add([...path, 'allow', key, i], `there is no ${what} ${account}`, `create it, or write its number`);
    });
  }
  if (socketGroup === null) return;
  const field = [...path, 'socket_group'];
  const gid = numberOf(socketGroup, groupId);
  const isMine = gid === process.getegid!() || process.getgroups!().includes(gid ?? -1);
  if (gid === undefined) {
    problems.add(field, `there is no group ${socketGroup}`, 'create it, or write its number');
  } else if (!isMine && process.geteuid!() !== ROOT) {
    problems.add(
      field,
      `this user is not in the group ${socketGroup}`,
      'add it to the group, and start the daemon anew',
    );
  }
}

/** Group of the socket, undefined to leave it to the kernel. Takes a config that `checkAccess` found nothing wrong with. */
export function socketGid({ socketGroup }: AccessConfig): number | undefined {
  return socketGroup === null ? undefined : numberOf(socketGroup, groupId);
}

/**
 * Who may connect, null for a descriptor that was handed in with no list: its maker has decided. The folder of the socket exists.
 * Takes a config that `checkAccess` found nothing wrong with.
 */
export function peerRules(config: ControllerConfig): PeerRules | null {
  const { allow, address } = config;
  if (allow !== null) {
    return {
      uids: allow.users.map((user) => numberOf(user, userId)!),
      gids: allow.groups.map((group) => numberOf(group, groupId)!),
    };
  }
  if ('fd' in address) return null;
  return { uids: [process.geteuid!(), ROOT], gids: [socketGid(config) ?? groupOfFileAt(address.socketPath)] };
}

function numberOf(account: string | number, lookUp: (name: string) => number | undefined): number | undefined {
  return typeof account === 'number' ? account : lookUp(account);
}
