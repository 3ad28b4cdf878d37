/** `strata img dd`: part of a disk as another image. */
import { CREATE_DEFAULTS } from '../../bdev/qcow2/create.js';
import { configuredTarget, copyToTarget, imageTarget, isDevice, refuseSelf } from './copy-image.js';
import { makeImage } from './create.js';
import { DiskHost } from './disk-host.js';
import { openSource } from './disk-source.js';
import type { DiskSource, SourceOptions } from './disk-source.js';
import { parseFormat } from './image-options.js';
import { ProgressLine, parseImageSize, usage } from './words.js';

export interface DdCommand extends SourceOptions {
  readonly format?: string;
  readonly targetFormat: string;
}

const OPERANDS = ['if', 'of', 'bs', 'count', 'skip'];

/** `dd if=A of=B [bs=N] [count=N] [skip=N]`. Rejects with BdevError. */
export async function ddCommand(words: readonly string[], command: DdCommand): Promise<void> {
  const given = operandsOf(words);
  const from = given.get('if');
  const to = given.get('of');
  if (from === undefined || to === undefined) {
    throw usage('if', 'Must specify both input and output file names', 'as if=A of=B');
  }
  const format = parseFormat(command.targetFormat);
  const host = new DiskHost();
  let source: DiskSource | null = null;
  try {
    source = await openSource(host, from, command.format ?? null, command);
    refuseSelf(source, to);
    const range = rangeOf(given, source.sizeBytes);
    const bdev = await configuredTarget(host, to, command);
    if (bdev === null) makeImage(to, format, { ...CREATE_DEFAULTS, sizeBytes: range.lengthBytes });
    copyToTarget(host, source, bdev ?? imageTarget(host, { path: to, format }), {
      range,
      isTargetZero: bdev === null && !isDevice(to),
      hasBacking: false,
      sparseBytes: 4096,
      parallel: 8,
      filters: { bytesPerSecond: null, onLoss: null },
      progress: new ProgressLine(false),
    });
  } finally {
    host.close();
    source?.close();
  }
}

function operandsOf(words: readonly string[]): Map<string, string> {
  const given = new Map<string, string>();
  for (const word of words) {
    const at = word.indexOf('=');
    const name = word.slice(0, Math.max(at, 0));
    if (!OPERANDS.includes(name)) {
      throw usage(word, `Unrecognized operand '${word}'`, `use ${OPERANDS.join('=, ')}=`);
    }
    given.set(name, word.slice(at + 1));
  }
  return given;
}

function rangeOf(given: ReadonlyMap<string, string>, sizeBytes: number): { start: number; lengthBytes: number } {
  const blockBytes = parseImageSize(given.get('bs') ?? '512', 'bs');
  if (blockBytes === 0 || blockBytes % 512 !== 0) throw usage('bs', `bs is ${blockBytes}`, 'use a multiple of 512');
  const start = Math.min(sizeBytes, Number(given.get('skip') ?? 0) * blockBytes);
  const most = given.has('count') ? Number(given.get('count')) * blockBytes : Infinity;
  const lengthBytes = Math.min(sizeBytes - start, most);
  if (Number.isSafeInteger(start) && Number.isSafeInteger(lengthBytes)) return { start, lengthBytes };
  throw usage('count', 'skip and count are whole numbers', 'as count=10');
}
