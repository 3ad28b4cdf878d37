/**
 * `strata img`: images as files, with the words, options and exit codes of qemu-img. Each command's code is loaded when it is used.
 */
import { Command, Option } from 'commander';
import { BdevError } from '../../bdev/bdev.js';
import { SystemClock } from '../../poller/clock.js';
import type { AmendCommand } from './amend.js';
import type { CheckCommand } from './check.js';
import type { CompareCommand } from './compare.js';
import type { ConvertCommand } from './convert.js';
import type { CreateCommand } from './create.js';
import type { DdCommand } from './dd.js';
import type { BitmapAction, BitmapCommand, ResizeCommand, SnapshotCommand } from './edit.js';
import { CACHE_MODES } from './image-spec.js';
import type { InfoCommand } from './info.js';
import type { MapCommand } from './map.js';
import type { MeasureCommand } from './measure.js';
import type { CommitCommand, RebaseCommand } from './rebase.js';

/** What a failed command exits with: 1, but for compare, where that says that two images differ. */
const FAILED = 1;
const COMPARE_FAILED = 2;
const COMPARE_NOT_READ = 4;

const collect = (value: string, before: readonly string[]): readonly string[] => [...before, value];
const output = (flags = '-o, --output <format>') =>
  new Option(flags, 'how to print').choices(['human', 'json']).default('human');
const format = () => new Option('-f, --format <format>', 'raw or qcow2; guessed from the first bytes when left out');
const options = () =>
  new Option('-o, --options <options>', 'name=value,...; `-o help` lists them').argParser(collect).default([]);
const forceShare = () => new Option('-U, --force-share', 'read also what another process writes to');
const quiet = () => new Option('-q, --quiet', 'print nothing but errors');
const discardSession = () =>
  new Option('--discard-session', 'give up the last writes of a daemon that was killed while it served the image');
const progress = () => new Option('-p, --progress', 'show how far it is');
const object = () =>
  new Option('--object <object>', 'secret,id=ID,file=PATH: a passphrase for encrypt.key-secret')
    .argParser(collect)
    .default([]);
const imageOpts = () => new Option('--image-opts', 'the image is named by options: driver=qcow2,file.filename=PATH');
const config = () => new Option('--config <file>', "the daemon's config: bdev:NAME is a disk of it");
const sourceCache = () =>
  new Option('-T, --source-cache <mode>', 'none and directsync read past the page cache')
    .choices([...CACHE_MODES])
    .default('writeback');
const targetCache = (otherwise: string) =>
  new Option('-t, --cache <mode>', 'all but unsafe: it is on the disk when the command ends')
    .choices([...CACHE_MODES])
    .default(otherwise);
const rateLimit = () => new Option('-r, --rate-limit <rate>', 'bytes per second');
const snapshot = () =>
  new Option('-l, --snapshot <snapshot>', 'as it was then: an id or name, or snapshot.id=ID,snapshot.name=NAME');

const program = new Command('strata img').description('Makes, checks and converts images, as qemu-img does.');

program
  .command('create')
  .description('make an empty image')
  .argument('[filename]')
  .argument('[size]', 'of the disk, as 10G; that of the backing file when left out')
  .addOption(quiet())
  .addOption(new Option('-f, --format <format>', 'raw or qcow2').default('raw'))
  .option('-b, --backing <file>', 'what shows through where the image holds nothing')
  .option('-F, --backing-format <format>', 'format of the backing file')
  .option('-u, --unsafe', 'do not open the backing file')
  .addOption(object())
  .addOption(options())
  .action((path: string | undefined, size: string | undefined, command: CreateCommand) =>
    run(async () => (await import('./create.js')).createCommand(path, size, command)),
  );

program
  .command('info')
  .description('say what an image is')
  .argument('<filename>')
  .addOption(format())
  .addOption(output())
  .option('--backing-chain', 'also of the backing files, beneath the folder of the image')
  .option('--backing-folder <folder>', 'beneath this folder instead')
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(config())
  .action((path: string, command: InfoCommand) =>
    run(async () => (await import('./info.js')).infoCommand(path, command)),
  );

program
  .command('check')
  .description('check an image; exits with 0 sound, 2 corrupt, 3 leaked clusters, 1 not checked')
  .argument('<filename>')
  .addOption(quiet())
  .addOption(format())
  .addOption(output())
  .option('-r, --repair <what>', 'repair leaks, or all')
  .addOption(discardSession())
  .addOption(progress())
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(sourceCache())
  .action((path: string, command: CheckCommand) =>
    run(async () => (await import('./check.js')).checkCommand(path, command)),
  );

program
  .command('measure')
  .description('say how large the file of an image would be')
  .argument('[filename]', 'the image it would be made from')
  .option('--size <size>', 'of the disk, instead of an image')
  .addOption(format())
  .addOption(new Option('-O, --target-format <format>', 'raw or qcow2').default('raw'))
  .addOption(options())
  .addOption(output('--output <format>'))
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(snapshot())
  .action((path: string | undefined, command: MeasureCommand) =>
    run(async () => (await import('./measure.js')).measureCommand(path, command)),
  );

program
  .command('map')
  .description('say where the data of a disk is, in which image of its chain')
  .argument('<filename>')
  .addOption(format())
  .addOption(output())
  .option('-s, --start-offset <offset>', 'from here on')
  .option('-l, --max-length <length>', 'so far')
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .action((path: string, command: MapCommand) => run(async () => (await import('./map.js')).mapCommand(path, command)));

program
  .command('compare')
  .description('compare two disks; exits with 0 the same, 1 different, 2 not compared, 4 not read')
  .argument('<filename1>')
  .argument('<filename2>')
  .addOption(format())
  .addOption(new Option('-F, --second-format <format>', 'format of the second image'))
  .option('-s, --strict', 'also sizes, and what is allocated')
  .addOption(progress())
  .addOption(quiet())
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(config())
  .addOption(sourceCache())
  .action((first: string, second: string, command: CompareCommand) =>
    run(
      async () => (await import('./compare.js')).compareCommand(first, second, command),
      (error) => (error.code === 'io-error' ? COMPARE_NOT_READ : COMPARE_FAILED),
    ),
  );

program
  .command('convert')
  .description('make an image of the disk that another one holds')
  .argument('<filename>')
  .argument('<output>')
  .addOption(format())
  .addOption(new Option('-O, --target-format <format>', 'raw or qcow2').default('raw'))
  .addOption(options())
  .option('-B, --backing <file>', 'backing file of the output: only what differs is copied')
  .option('-F, --backing-format <format>', 'format of the backing file')
  .option('-n, --no-create', 'the output is there')
  .option('--target-is-zero', 'the output, which is there, reads as zeroes')
  .option('-S, --sparse <size>', 'leave out zeroes of this length; 0 writes all (4k)')
  .option('-c, --compress', 'compress the output; -o compression_type=zstd is faster and smaller than zlib')
  .option('-m, --parallel <count>', 'requests at once', '8')
  .option('-W, --out-of-order', 'write what is ready first')
  .option('-C, --copy-offload', 'taken, and without effect')
  .addOption(rateLimit())
  .addOption(snapshot())
  .option('--salvage', 'what cannot be read is zeroes in the output')
  .option('--bitmaps', 'copy the bitmaps, too')
  .option('--skip-broken-bitmaps', 'leave out those that a program left in use')
  .option('--resume', 'go on where an earlier one was cut off, and leave what is needed for that')
  .option('--target-image-opts', 'the output, which is there, is named by options')
  .addOption(object())
  .addOption(imageOpts())
  .addOption(config())
  .addOption(targetCache('unsafe'))
  .addOption(sourceCache())
  .addOption(progress())
  .addOption(quiet())
  .addOption(forceShare())
  .action((source: string, target: string, command: ConvertCommand) =>
    run(async () => (await import('./convert.js')).convertCommand(source, target, command)),
  );

program
  .command('dd')
  .description('copy part of a disk: if=FILE of=FILE [bs=SIZE] [count=BLOCKS] [skip=BLOCKS]')
  .argument('<operands...>')
  .addOption(format())
  .addOption(new Option('-O, --target-format <format>', 'raw or qcow2').default('raw'))
  .addOption(forceShare())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(config())
  .action((operands: string[], command: DdCommand) =>
    run(async () => (await import('./dd.js')).ddCommand(operands, command)),
  );

program
  .command('snapshot')
  .description('list, take, bring back or delete the snapshots within an image')
  .argument('<filename>')
  .option('-l, --list', 'list them, as without an option')
  .option('-c, --create <name>', 'keep what the disk holds now')
  .option('-a, --apply <snapshot>', 'make the disk what it was, by id or name')
  .option('-d, --delete <snapshot>', 'delete one, by id or name')
  .addOption(format())
  .addOption(output())
  .addOption(quiet())
  .addOption(forceShare())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  .action((path: string, command: SnapshotCommand) =>
    run(async () => (await import('./edit.js')).snapshotCommand(path, command, new SystemClock().wallMs())),
  );

program
  .command('resize')
  .description('give a disk another size: 20G, +10G, -10G')
  .argument('<filename>')
  .argument('<size>')
  .addOption(format())
  .option('--shrink', 'what lies beyond the new end may be lost')
  .option('--preallocation <mode>', 'of what is new: off, metadata, falloc, full')
  .addOption(quiet())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  // Otherwise -10G would be taken for options.
  .allowUnknownOption()
  .action((path: string, size: string, command: ResizeCommand) =>
    run(async () => (await import('./edit.js')).resizeCommand(path, size, command)),
  );

const bitmapActions: BitmapAction[] = [];
const bitmap = program
  .command('bitmap')
  .description('change a bitmap of an image; actions are carried out in the order they are given')
  .argument('<filename>')
  .argument('<bitmap>')
  .option('--add', 'add it, with nothing in it')
  .option('--remove', 'remove it')
  .option('--clear', 'forget what is in it')
  .option('--enable', 'record writes in it')
  .option('--disable', 'record no writes in it')
  .option('--merge <source>', 'add what another bitmap has')
  .option('-g, --granularity <size>', 'what one bit stands for, with --add')
  .option('-b, --source-file <file>', 'image of the bitmap to merge')
  .option('-F, --source-format <format>', 'format of that image')
  .addOption(format())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  .action((path: string, name: string, command: BitmapCommand) =>
    run(async () => (await import('./edit.js')).bitmapCommand(path, name, bitmapActions, command)),
  );
for (const what of ['add', 'remove', 'clear', 'enable', 'disable'] as const) {
  bitmap.on(`option:${what}`, () => bitmapActions.push({ what }));
}
bitmap.on('option:merge', (source: string) => bitmapActions.push({ what: 'merge', source }));

program
  .command('rebase')
  .description('give an image another backing file; its disk stays what it is')
  .argument('<filename>')
  .requiredOption('-b, --backing <file>', "the new one; '' for none")
  .option('-F, --backing-format <format>', 'its format')
  .option('-u, --unsafe', 'only change the name: both hold the same')
  .addOption(format())
  .addOption(progress())
  .addOption(quiet())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(forceShare())
  .addOption(targetCache('writeback'))
  .addOption(sourceCache())
  .action((path: string, command: RebaseCommand) =>
    run(async () => (await import('./rebase.js')).rebaseCommand(path, command)),
  );

program
  .command('commit')
  .description('write what an image holds to its backing file, and empty it')
  .argument('<filename>')
  .option('-b, --base <file>', 'to this image of the chain; nothing is emptied')
  .option('-d, --keep', 'do not empty it')
  .addOption(format())
  .addOption(progress())
  .addOption(quiet())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  .addOption(rateLimit())
  .addOption(targetCache('writeback'))
  .action((path: string, command: CommitCommand) =>
    run(async () => (await import('./rebase.js')).commitCommand(path, command)),
  );

program
  .command('amend')
  .description('change what an image was made with')
  .argument('[filename]')
  .addOption(options())
  .addOption(format())
  .addOption(targetCache('writeback'))
  .option('--force', 'taken, and without effect: the last passphrase is never erased')
  .addOption(progress())
  .addOption(quiet())
  .addOption(discardSession())
  .addOption(object())
  .addOption(imageOpts())
  .action((path: string | undefined, command: AmendCommand) =>
    run(async () => (await import('./amend.js')).amendCommand(path, command)),
  );

await program.parseAsync([process.argv[0]!, process.argv[1]!, ...process.argv.slice(3)]);

/** @param action returns the exit code, or nothing for 0 */
async function run(
  action: () => Promise<number | void>,
  exitCodeOf: (error: BdevError) => number = () => FAILED,
): Promise<void> {
  try {
    process.exitCode = (await action()) ?? 0;
  } catch (error) {
    if (!(error instanceof BdevError)) throw error;
    process.stderr.write(`strata img: ${error.message}\n    -> ${error.hint}\n`);
    process.exitCode = exitCodeOf(error);
  }
}
