/** `strata img amend`: changes what an image was made with, by the rules of qemu-img. */
import { Autoclear, hasExternalData } from '../../bdev/qcow2/format.js';
import type { Qcow2Header } from '../../bdev/qcow2/format.js';
import { setLazyRefcounts, updateHeader } from '../../bdev/qcow2/edit/header.js';
import { changeRefcountWidth } from '../../bdev/qcow2/edit/refcount-width.js';
import { downgradeImage, upgradeImage } from '../../bdev/qcow2/edit/version.js';
import { openForEdit, resizeQcow2 } from './edit.js';
import type { EditCommand } from './edit.js';
import { parseCompat, parseRefcountBits, roundUp } from './image-options.js';
import { KEY_SLOT_OPTIONS, amendKeySlots } from './key-slots.js';
import { runTask } from './node-file.js';
import { closeImage } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { ProgressLine, keyValues, parseImageSize, parseSwitch, print, usage } from './words.js';

export interface AmendCommand extends EditCommand {
  readonly options: readonly string[];
  readonly object: readonly string[];
  readonly progress?: boolean;
}

const OPTIONS: readonly (readonly [string, string, string])[] = [
  ['backing_file', 'str', 'As it is; use rebase to change it'],
  ['backing_fmt', 'str', 'As it is; use rebase to change it'],
  ['compat', 'str', 'Version of the format: 0.10 or v2, 1.1 or v3'],
  ['data_file', 'str', 'File name of the external data file'],
  ['data_file_raw', 'on/off', 'off: the external data file need not stay valid as a raw image'],
  ...KEY_SLOT_OPTIONS,
  ['lazy_refcounts', 'on/off', 'Postpone refcount updates'],
  ['refcount_bits', 'num', 'Width of a reference count in bits, 1 to 64'],
  ['size', 'size', 'Virtual disk size'],
];

type Options = ReadonlyMap<string, string>;

/** Throws BdevError. */
export function amendCommand(path: string | undefined, command: AmendCommand): void {
  if (command.options.length === 0) throw usage('-o', 'Must specify options (-o)', 'as -o compat=1.1');
  if (command.options.some((text) => text === 'help' || text === '?')) {
    const lines = OPTIONS.map(([name, takes, text]) => `  ${`${name}=<${takes}>`.padEnd(25)}- ${text}\n`);
    print(`Amend options for 'qcow2':\n${lines.join('')}`);
    return;
  }
  if (path === undefined) throw usage('filename', 'Expecting one image file name', 'name the image');
  const image = openForEdit(path, command, ['qcow2', 'raw']);
  const progress = new ProgressLine(command.progress === true && command.quiet !== true);
  try {
    if (image.header === null) {
      throw usage('format', "Format driver 'raw' does not support option amendment", 'name a qcow2 image');
    }
    amend(image, image.header, parseAmendments(command.options), command, (done) => progress.update(done));
  } finally {
    closeImage(image);
  }
  progress.end();
}

function parseAmendments(texts: readonly string[]): Options {
  const options = new Map<string, string>();
  for (const [name, value] of texts.flatMap((text) => [...keyValues(text)])) {
    if (!OPTIONS.some(([known]) => known === name)) {
      const hint = `This option is only supported for image creation; use ${OPTIONS.map(([known]) => known).join(', ')}`;
      throw usage(`-o ${name}`, `Invalid parameter '${name}'`, hint);
    }
    options.set(name, value);
  }
  return options;
}

/** In the order of qemu-img: up first, down last. Throws BdevError. */
function amend(
  image: OpenImage,
  header: Qcow2Header,
  options: Options,
  command: AmendCommand,
  onProgress: (fraction: number) => void,
): void {
  const { file } = image;
  const text = (name: string): string | null => options.get(name) ?? null;
  const compat = text('compat');
  const version = compat === null ? header.version : amendedVersion(compat);
  const bits = text('refcount_bits');
  const order = bits === null ? header.refcountOrder : parseRefcountBits(bits);
  const lazy = text('lazy_refcounts');
  const isLazy = lazy === null ? null : parseSwitch('lazy_refcounts', lazy);
  const size = text('size');
  const sizeBytes = size === null ? header.sizeBytes : roundUp(parseImageSize(size));
  assertPossible(header, options, { version, order, isLazy });
  if (version === 3) runTask(upgradeImage(file));
  amendKeySlots(image, options, command);
  runTask(changeRefcountWidth(file, order, onProgress));
  runTask(updateHeader(file, (current) => dataFileChange(current, options)));
  if (isLazy !== null && version === 3) runTask(setLazyRefcounts(file, isLazy));
  if (sizeBytes !== header.sizeBytes) {
    resizeQcow2(image, header, sizeBytes, { preallocation: 'off', mayShrink: true });
  }
  if (version === 2) runTask(downgradeImage(file, header.backingFile !== null, onProgress));
}

function amendedVersion(text: string): 2 | 3 {
  try {
    return parseCompat(text);
  } catch {
    throw usage('compat', `Unknown compatibility level ${text}`, 'use 0.10 or 1.1');
  }
}

/** In the words of qemu-img, before anything is changed. Throws BdevError. */
function assertPossible(
  header: Qcow2Header,
  options: Options,
  { version, order, isLazy }: { version: 2 | 3; order: number; isLazy: boolean | null },
): void {
  const refuse = (field: string, message: string, hint: string): never => {
    throw usage(field, message, hint);
  };
  const { backingFile, backingFormat } = header;
  const isOther = (name: string, now: string | null): boolean => options.has(name) && options.get(name) !== (now ?? '');
  if (isOther('backing_file', backingFile) || isOther('backing_fmt', backingFormat)) {
    refuse('backing_file', 'Cannot amend the backing file', "You can use 'rebase' instead.");
  }
  if (version === 2 && order !== 4) {
    const message = 'Refcount widths other than 16 bits require compatibility level 1.1 or above';
    refuse('refcount_bits', message, 'use compat=1.1 or greater');
  }
  if (version === 2 && isLazy === true) {
    const message = 'Lazy refcounts only supported with compatibility level 1.1 and above';
    refuse('lazy_refcounts', message, 'use compat=1.1 or greater');
  }
  if (options.has('data_file') && !hasExternalData(header)) {
    const message = 'data-file can only be set for images that use an external data file';
    refuse('data_file', message, 'convert the image with -o data_file=');
  }
  const isRaw = (header.autoclear & Autoclear.rawExternalData) !== 0n;
  if (options.has('data_file_raw') && parseSwitch('data_file_raw', options.get('data_file_raw')!) && !isRaw) {
    refuse('data_file_raw', 'data-file-raw cannot be set on existing images', 'convert the image');
  }
  if ([...options.keys()].some((name) => name.startsWith('encrypt.')) && header.luksHeader === null) {
    refuse('encrypt', "Can't amend encryption options - encryption not present", 'convert the image');
  }
}

function dataFileChange(header: Qcow2Header, options: Options): Partial<Qcow2Header> {
  const dataFile = options.get('data_file');
  const raw = options.get('data_file_raw');
  const isCleared = raw !== undefined && !parseSwitch('data_file_raw', raw);
  return {
    ...(dataFile === undefined ? {} : { dataFile }),
    ...(isCleared ? { autoclear: header.autoclear & ~Autoclear.rawExternalData } : {}),
  };
}
