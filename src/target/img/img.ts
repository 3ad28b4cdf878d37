/**
 * `strata img`: images as files, with the words, options and exit codes of qemu-img. Each command's code is loaded when it is used.
 */
import { Command, Option } from 'commander';
import { BdevError } from '../../bdev/bdev.js';
import type { CheckCommand } from './check.js';
import type { CompareCommand } from './compare.js';
import type { ConvertCommand, DdCommand } from './convert.js';
import type { CreateCommand } from './create.js';
import type { InfoCommand } from './info.js';
import type { MapCommand } from './map.js';
import type { MeasureCommand } from './measure.js';

/** What a failed command exits with: 1, but for compare, where that says that two images differ. */
const FAILED = 1;
const COMPARE_FAILED = 2;

const collect = (value: string, before: readonly string[]): readonly string[] => [...before, value];
const output = (flags = '-o, --output <format>') =>
  new Option(flags, 'how to print').choices(['human', 'json']).default('human');
const format = () => new Option('-f, --format <format>', 'raw or qcow2; guessed from the first bytes when left out');
const options = () =>
  new Option('-o, --options <options>', 'name=value,...; `-o help` lists them').argParser(collect).default([]);
const forceShare = () => new Option('-U, --force-share', 'read also what another process writes to');
const quiet = () => new Option('-q, --quiet', 'print nothing but errors');
const progress = () => new Option('-p, --progress', 'show how far it is');

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
  .addOption(progress())
  .addOption(forceShare())
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
  .action((path: string, command: MapCommand) => run(async () => (await import('./map.js')).mapCommand(path, command)));

program
  .command('compare')
  .description('compare two disks; exits with 0 the same, 1 different, 2 not compared')
  .argument('<filename1>')
  .argument('<filename2>')
  .addOption(format())
  .addOption(new Option('-F, --second-format <format>', 'format of the second image'))
  .option('-s, --strict', 'also sizes, and what is allocated')
  .addOption(progress())
  .addOption(quiet())
  .addOption(forceShare())
  .action((first: string, second: string, command: CompareCommand) =>
    run(async () => (await import('./compare.js')).compareCommand(first, second, command), COMPARE_FAILED),
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
  .option('-S, --sparse <size>', 'leave out zeroes of this length; 0 writes all', '4k')
  .option('-m, --parallel <count>', 'requests at once', '8')
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
  .action((operands: string[], command: DdCommand) =>
    run(async () => (await import('./convert.js')).ddCommand(operands, command)),
  );

await program.parseAsync([process.argv[0]!, process.argv[1]!, ...process.argv.slice(3)]);

/** @param action returns the exit code, or nothing for 0 */
async function run(action: () => Promise<number | void>, failed = FAILED): Promise<void> {
  try {
    process.exitCode = (await action()) ?? 0;
  } catch (error) {
    if (!(error instanceof BdevError)) throw error;
    process.stderr.write(`strata img: ${error.message}\n    -> ${error.hint}\n`);
    process.exitCode = failed;
  }
}
