/**
 * Descriptors that a front-end hands over to be signalled or spoken to. Only an eventfd, a socket or a pipe will do: writing to anything else
 * could hold up the reactor, and so every disk on it, for as long as the front-end likes; and what cannot be polled would never wake
 * it.
 */
import { readlinkSync } from 'node:fs';
import { check, native } from '../../native/index.js';
import { ProtocolError } from './protocol.js';

const EVENTFD_LINK = 'anon_inode:[eventfd]';

/** Makes the descriptor fit to be signalled and polled. It stays the caller's. Throws ProtocolError, SystemError. */
export function adoptEventfd(fd: number): void {
  if (linkOf(fd) !== EVENTFD_LINK) throw new ProtocolError('a descriptor to signal with is not an eventfd');
  check(native.socketSetNonblocking(fd), 'use an eventfd');
}

/** As `adoptEventfd`, for a socket. */
export function adoptSocket(fd: number): void {
  if (!linkOf(fd).startsWith('socket:[')) throw new ProtocolError('a descriptor to send messages on is not a socket');
  check(native.socketSetNonblocking(fd), 'use a socket');
}

/** As `adoptEventfd`, for a pipe or a socket. */
export function adoptChannel(fd: number): void {
  if (!/^(pipe|socket):\[/.test(linkOf(fd))) throw new ProtocolError('a channel for state is neither pipe nor socket');
  check(native.socketSetNonblocking(fd), 'use a channel');
}

function linkOf(fd: number): string {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    return '';
  }
}
