/**
 * Guest memory through which every access of the device is seen, before and after it happens: what a driver does in between can
 * be played at the worst moment, and a second look at the same field is noticed.
 */
import type { Arena } from '../../native/index.js';
import type { DescriptorChain } from '../../src/vhost-user/descriptor-chain.js';
import type { GuestMemory } from '../../src/vhost-user/guest-memory.js';

export interface Watcher {
  /** @param arenaOffset of the element @param bytes its size */
  beforeRead?: (arenaOffset: number, bytes: number) => void;
  afterRead?: (arenaOffset: number, bytes: number) => void;
  afterWrite?: (arenaOffset: number, bytes: number) => void;
}

type View = Uint8Array | Uint16Array | Uint32Array | Float64Array;

/** The same memory; the watcher may be changed at any time. */
export function watchedMemory(memory: GuestMemory, watcher: Watcher): GuestMemory {
  const watch = <T extends View>(view: T): T =>
    new Proxy(view, {
      get(target, property) {
        const index = typeof property === 'string' ? Number(property) : NaN;
        if (!Number.isInteger(index)) return Reflect.get(target, property, target) as unknown;
        const at = target.byteOffset + index * target.BYTES_PER_ELEMENT;
        watcher.beforeRead?.(at, target.BYTES_PER_ELEMENT);
        const value = target[index];
        watcher.afterRead?.(at, target.BYTES_PER_ELEMENT);
        return value;
      },
      set(target, property, value) {
        target[Number(property)] = value as number;
        watcher.afterWrite?.(target.byteOffset + Number(property) * target.BYTES_PER_ELEMENT, target.BYTES_PER_ELEMENT);
        return true;
      },
    });
  const windows = <T extends View>(views: readonly T[]): T[] => views.map((view) => watch(view));
  const { arena } = memory;
  const watchedArena = {
    buffer: arena.buffer,
    baseAddress: arena.baseAddress,
    u8: windows(arena.u8),
    u16: windows(arena.u16),
    u32: windows(arena.u32),
    view8: (offset: number, count: number) => watch(arena.view8(offset, count)),
    view16: (offset: number, count: number) => watch(arena.view16(offset, count)),
    view32: (offset: number, count: number) => watch(arena.view32(offset, count)),
    viewF64: (offset: number, count: number) => watch(arena.viewF64(offset, count)),
  } as unknown as Arena;
  return {
    arena: watchedArena,
    translate: (address: number, length: number) => memory.translate(address, length),
    shifts: memory.shifts,
    regionOf: (chain: DescriptorChain, at: number) => memory.regionOf(chain, at),
    place: (chain: DescriptorChain) => memory.place(chain),
    contiguousAt: (address: number) => memory.contiguousAt(address),
  } as unknown as GuestMemory;
}
