/** The descriptors this process holds, to notice those that leak, and what a descriptor is. */
import { readFileSync, readdirSync, readlinkSync } from 'node:fs';

/** What each open descriptor leads to, as `7 -> socket:[1234]`; the listing's own is left out. */
export function openDescriptors(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return [`${fd} -> ${readlinkSync(`/proc/self/fd/${fd}`)}`];
    } catch {
      return [];
    }
  });
}

/** Whether the descriptor is closed in a program that is executed. */
export function closesOnExec(fd: number): boolean {
  const flags = /flags:\s*([0-7]+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))![1]!;
  return (parseInt(flags, 8) & 0o2000000) !== 0;
}
