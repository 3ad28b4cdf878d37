/**
 * The fuzzer's command line.
 *
 *     npm run fuzz -- --cases 10000000 --seed 7
 *
 * Progress goes to stderr, one object of JSON (`-o json`) or a few lines to stdout. Exits with 0 when nothing was found, 1 when
 * something was, 130 when it was interrupted before the end, whatever it had found good until then. Leaves its totals, attacks that
 * found nothing and what was found, in .cache/results/fuzz.txt.
 */
import { tmpdir } from 'node:os';
import { Command, Option } from 'commander';
import { numberOption } from '../../src/target/options.js';
import { leaveTotals } from '../support/totals.js';
import { ATTACK_KINDS, Campaign } from './campaign.js';
import type { AttackKind } from './campaign.js';

const PROGRESS_MS = 5_000;
const INTERRUPTED = 130;

interface Options {
  readonly cases: number;
  readonly minutes?: number;
  readonly seed: number;
  readonly kind: AttackKind;
  readonly first: number;
  readonly attacks?: number;
  readonly dir: string;
  readonly output: 'text' | 'json';
}

function parseOptions(): Options {
  const count = numberOption(1, 2 ** 52);
  return new Command('fuzz')
    .description('Attacks a live daemon by messages and rings, and checks that it shrugs it off.')
    .option('--cases <number>', 'how many hostile messages and chains', count, 1_000_000)
    .option('--minutes <number>', 'at most so long', numberOption(1, 100_000))
    .option('--seed <number>', 'of all that is random', numberOption(0, 0x7fffffff), Date.now() & 0x7fffffff)
    .addOption(new Option('--kind <kind>', 'what to attack by').choices(ATTACK_KINDS).default('all'))
    .option('--first <number>', 'number of the first attack, to make one again', numberOption(0, 2 ** 52), 0)
    .option('--attacks <number>', 'at most so many attacks', count)
    .option('--dir <folder>', 'where disks are made', tmpdir())
    .addOption(new Option('-o, --output <format>', 'how to print').choices(['text', 'json']).default('text'))
    .parse()
    .opts();
}

async function main(): Promise<void> {
  const options = parseOptions();
  let isInterrupted = false;
  const onSignal = (): void => {
    // The second one does not wait.
    if (isInterrupted) process.exit(INTERRUPTED);
    isInterrupted = true;
  };
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);
  const startMs = performance.now();
  const endMs = startMs + (options.minutes ?? Infinity) * 60_000;
  let reportedMs = startMs;
  const campaign = await Campaign.start(options);
  const isOver = (): boolean => {
    const nowMs = performance.now();
    if (nowMs - reportedMs > PROGRESS_MS) {
      reportedMs = nowMs;
      const perSecond = campaign.cases / ((nowMs - startMs) / 1000);
      const left = Math.max(0, options.cases - campaign.cases) / perSecond;
      console.error(
        `${Math.round((nowMs - startMs) / 1000)} s: ${Math.round(campaign.cases)} of ${options.cases} cases, ` +
          `${Math.round(perSecond)}/s, ${Math.round(left)} s to go; ${campaign.attacks} attacks, ${campaign.audits} audits`,
      );
    }
    const made = campaign.attacks - options.first;
    return isInterrupted || nowMs > endMs || made >= (options.attacks ?? Infinity);
  };
  let problem: string | undefined;
  try {
    await campaign.run(options.cases, isOver);
  } catch (error) {
    problem = error instanceof Error ? error.message : String(error);
  }
  const report = campaign.report();
  try {
    await campaign.close();
  } catch (error) {
    problem ??= error instanceof Error ? error.message : String(error);
  }
  const isShort = isInterrupted && report.cases < options.cases;
  const result = problem !== undefined ? 'failed' : isShort ? 'interrupted' : 'passed';
  const finding = `FAILED fuzz: seed ${options.seed}: ${problem?.split('\n')[0]}`;
  if (problem === undefined) leaveTotals('fuzz', report.attacks, 0);
  else leaveTotals('fuzz', Math.max(0, report.attacks - 1), 1, [finding]);
  if (options.output === 'json') {
    console.log(JSON.stringify({ result, problem: problem ?? null, seed: options.seed, ...report }));
  } else {
    const { cases, ringCases, messageCases, seconds, attacks, audits } = report;
    console.log(
      `${result}: ${cases} cases (${ringCases} chains, ${messageCases} messages) in ${seconds} s, ${attacks} attacks, ${audits} audits`,
    );
    console.log(`seed ${options.seed}`);
  }
  if (problem !== undefined) console.error(`fuzz: seed ${options.seed}: ${problem}`);
  process.exitCode = problem !== undefined ? 1 : isShort ? INTERRUPTED : 0;
}

main().catch((error: unknown) => {
  console.error(`fuzz: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
});
