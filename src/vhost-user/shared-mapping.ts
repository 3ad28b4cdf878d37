/** Memory that a front-end shares by a file: mapped into the arena, where a guard catches that the file is cut short later. */
import { checkObject, native } from '../../native/index.js';
import type { Arena } from '../../native/index.js';
import { ProtocolError } from './protocol.js';

const PAGE_BYTES = 4096;
/** Part of the arena, and bytes at most, that front-ends' memory leaves free: buffers of all disks of the reactor are made there. */
const RESERVE_PART = 1 / 16;
const RESERVE_BYTES_MAX = 2 ** 34;

export interface SharedMapping {
  /** For `arena.release`. */
  readonly mappingOffset: number;
  /** Arena offset of the first byte asked for. */
  readonly arenaOffset: number;
}

/**
 * Maps [fileOffset, fileOffset + lengthBytes) of a regular file, in which it must lie whole; the two add up below 2^53. The descriptor
 * stays the caller's. Throws ProtocolError for what the front-end did wrong, SystemError when mapping fails.
 * @param what as it is called in errors, with its article
 */
export function mapSharedFile(
  arena: Arena,
  fd: number,
  fileOffset: number,
  lengthBytes: number,
  what: string,
): SharedMapping {
  const facts = checkObject(native.fileStat(fd), `stat ${what}`);
  if (facts.kind !== 'file') throw new ProtocolError(`${what} is not a file`);
  if (fileOffset + lengthBytes > facts.sizeBytes) {
    throw new ProtocolError(`${what} ends at ${fileOffset + lengthBytes}, its file at ${facts.sizeBytes}`);
  }
  // hugetlbfs files are mapped in whole pages of theirs, which their block size tells; elsewhere it may be less than a page.
  const pageBytes = Math.max(PAGE_BYTES, facts.preferredIoBytes);
  const pageOffset = Math.floor(fileOffset / pageBytes) * pageBytes;
  const lead = fileOffset - pageOffset;
  const freeBytes = arena.sizeBytes - arena.usedBytes;
  if (freeBytes - lead - lengthBytes < Math.min(arena.sizeBytes * RESERVE_PART, RESERVE_BYTES_MAX)) {
    throw new ProtocolError(`${what} of ${lengthBytes} bytes is more than there is address space for`);
  }
  const mappingOffset = arena.mapFile(fd, pageOffset, lead + lengthBytes, pageBytes);
  return { mappingOffset, arenaOffset: mappingOffset + lead };
}
