/** `strata img map`: what of a disk is where, through all images of its chain. */
import { CryptMethod, hasExternalData } from '../../bdev/qcow2/format.js';
import { mapDisk } from './disk-map.js';
import type { DiskExtent } from './disk-map.js';
import { imageSpec } from './image-spec.js';
import type { SpecOptions } from './image-spec.js';
import { closeChain, openChain } from './open-chain.js';
import type { OpenImage } from './open-image.js';
import { parseImageSize, print, usage } from './words.js';

export interface MapCommand extends SpecOptions {
  readonly format?: string;
  readonly output: 'human' | 'json';
  readonly startOffset?: string;
  readonly maxLength?: string;
}

/** One line of the map, with the names of qemu-img's JSON. */
export interface MapEntry {
  readonly start: number;
  length: number;
  readonly depth: number;
  readonly present: boolean;
  readonly zero: boolean;
  readonly data: boolean;
  readonly offset?: number;
}

/** Throws BdevError. */
export function mapCommand(path: string, command: MapCommand): void {
  const chain = openChain(imageSpec(path, command.format ?? null, command));
  try {
    const start = parseImageSize(command.startOffset ?? '0', 'start-offset');
    const range =
      command.maxLength === undefined
        ? { start }
        : { start, lengthBytes: parseImageSize(command.maxLength, 'max-length') };
    if (command.output === 'json') printEntries(entriesOf(chain, range));
    else printTable(chain, entriesOf(chain, range));
  } finally {
    closeChain(chain);
  }
}

/** The map of the first image: neighbours that go on from one another are one. Throws BdevError. */
export function* entriesOf(
  chain: readonly OpenImage[],
  range: { start: number; lengthBytes?: number },
): Generator<MapEntry> {
  let last: MapEntry | null = null;
  for (const extent of mapDisk(chain, range)) {
    const entry = entryOf(chain, extent);
    if (last !== null && goesOn(last, entry)) {
      last.length += entry.length;
      continue;
    }
    if (last !== null) yield last;
    last = entry;
  }
  if (last !== null) yield last;
}

function entryOf(chain: readonly OpenImage[], { start, lengthBytes, kind, depth, hostOffset }: DiskExtent): MapEntry {
  const zero = kind === 'zero' || kind === 'unallocated';
  const { header } = chain[depth]!;
  const isEncrypted = header !== null && header.cryptMethod !== CryptMethod.none;
  const isElsewhere = isEncrypted || (header !== null && hasExternalData(header) && header.dataFile === null);
  const offset = hostOffset === null || isElsewhere ? {} : { offset: hostOffset };
  return { start, length: lengthBytes, depth, present: kind !== 'unallocated', zero, data: !zero, ...offset };
}

function goesOn(last: MapEntry, next: MapEntry): boolean {
  const { depth, present, zero, data, offset } = last;
  const isAlike = depth === next.depth && present === next.present && zero === next.zero && data === next.data;
  if (!isAlike || (offset === undefined) !== (next.offset === undefined)) return false;
  return offset === undefined || offset + last.length === next.offset;
}

/** One entry to a line, as the list may be long. */
function printEntries(entries: Iterable<MapEntry>): void {
  let separator = '[';
  for (const { start, length, depth, present, zero, data, offset } of entries) {
    const place = offset === undefined ? '' : `, "offset": ${offset}`;
    print(
      `${separator}{ "start": ${start}, "length": ${length}, "depth": ${depth}, "present": ${present}, ` +
        `"zero": ${zero}, "data": ${data}${place}}`,
    );
    separator = ',\n';
  }
  print(separator === '[' ? '[]\n' : ']\n');
}

/** Only what has data, and where it is. */
function printTable(chain: readonly OpenImage[], entries: Iterable<MapEntry>): void {
  const hex = (value: number): string => (value === 0 ? '0' : `0x${value.toString(16)}`).padEnd(16);
  print(`${'Offset'.padEnd(16)}${'Length'.padEnd(16)}${'Mapped to'.padEnd(16)}File\n`);
  for (const { start, length, depth, data, offset } of entries) {
    if (!data) continue;
    if (offset === undefined) {
      const message = 'File contains external, encrypted or compressed clusters.';
      throw usage('output', message, 'use --output json');
    }
    const image = chain[depth]!;
    print(`${hex(start)}${hex(length)}${hex(offset)}${image.header?.dataFile ?? image.file.path}\n`);
  }
}
