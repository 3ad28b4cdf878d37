/**
 * A run of named stages that goes on after a failure, counts what passed and what failed, and says both at the end.
 *
 * A command counts as one; a vitest run counts its tests. A stage that ends badly counts at least one failure, whatever
 * it reported: a crash, an empty run and an error outside of any test are failures too. What was left out is listed,
 * never passed over. Where nobody watches (`CI`), a test that failed is tried once more, and listed when it passes then.
 * The totals are left in `.cache/results/<suite>.txt` as "<passed> <failed>" for a caller, the list below them.
 */
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { run } from './run.mjs';
import { root } from './setup.mjs';

const RESULTS = join(root, '.cache', 'results');
const VITEST = join(root, 'node_modules', 'vitest', 'vitest.mjs');

export class Stages {
  #suite;
  #stages = [];
  #remarks = [];

  /** @param {string} suite names the file of totals */
  constructor(suite) {
    this.#suite = suite;
    mkdirSync(RESULTS, { recursive: true });
    rmSync(join(RESULTS, `${suite}.txt`), { force: true });
  }

  /**
   * A stage that passes when its command exits with 0.
   * @returns {Promise<boolean>} whether it passed
   */
  async command(name, command, args, env = process.env) {
    console.log(`\n=== ${name}`);
    const exitCode = await run(command, args, { cwd: root, env });
    return this.record(name, exitCode === 0);
  }

  /** A stage that is known to have passed or failed. */
  record(name, passed) {
    this.#stages.push({ name, passed: passed ? 1 : 0, failed: passed ? 0 : 1 });
    return passed;
  }

  /**
   * A stage of tests.
   * @param {string} name also names the JSON report, `.cache/results/<name>.json`
   * @param {string[]} args of `vitest run`
   * @param {{ node?: string, env?: Record<string, string | undefined> }} [options] the Node that runs them
   */
  async vitest(name, args, { node = process.execPath, env = process.env } = {}) {
    console.log(`\n=== ${name}`);
    const report = join(RESULTS, `${name.replaceAll(/\W+/g, '-')}.json`);
    rmSync(report, { force: true });
    const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${report}`];
    const retry = process.env.CI ? ['--retry=1'] : [];
    const exitCode = await run(node, [VITEST, 'run', ...args, ...retry, ...reporters], { cwd: root, env });
    const {
      numPassedTests = 0,
      numFailedTests = 0,
      testResults = [],
    } = existsSync(report) ? JSON.parse(readFileSync(report, 'utf8')) : {};
    const clean = exitCode === 0 && numPassedTests > 0;
    this.#stages.push({ name, passed: numPassedTests, failed: Math.max(numFailedTests, clean ? 0 : 1) });
    const tests = testResults.flatMap(({ assertionResults }) => assertionResults);
    for (const { status, fullName, failureMessages } of tests.filter(({ failureMessages }) => failureMessages.length)) {
      const verdict = status === 'passed' ? 'PASSED AT THE SECOND TRY' : 'FAILED';
      this.#remarks.push(
        `${verdict} ${name}: ${fullName}\n    ${failureMessages[0].split('\n').slice(0, 6).join('\n    ')}`,
      );
    }
    for (const { name: file, message } of testResults.filter(({ message }) => message)) {
      this.#remarks.push(`FAILED ${name}: ${relative(root, file)}: ${message}`);
    }
    const skipped = tests
      .filter(({ status }) => status !== 'passed' && status !== 'failed')
      .map(({ ancestorTitles, title }) => ancestorTitles[0] ?? title);
    for (const group of new Set(skipped)) {
      this.leaveOut(`${name}: ${group}: ${skipped.filter((title) => title === group).length} skipped`);
    }
  }

  /** Something that should run did not, and nobody counts it as passed. */
  leaveOut(what) {
    this.#remarks.push(`LEFT OUT ${what}`);
  }

  /** Prints the summary, leaves the totals, and sets the exit code: 0 when something passed and nothing failed. */
  finish() {
    const sum = (key) => this.#stages.reduce((total, stage) => total + stage[key], 0);
    const [passed, failed] = [sum('passed'), sum('failed')];
    console.log('\n=== summary');
    for (const stage of this.#stages) {
      const verdict = stage.failed > 0 ? 'FAILED' : 'ok';
      console.log(`${verdict.padEnd(7)}${stage.name}: ${stage.passed} passed, ${stage.failed} failed`);
    }
    for (const remark of this.#remarks) console.log(remark);
    writeFileSync(join(RESULTS, `${this.#suite}.txt`), [`${passed} ${failed}`, ...this.#remarks, ''].join('\n'));
    process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
  }
}
