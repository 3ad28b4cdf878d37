/** `strata img check`: exits with 0 when the image is sound, 2 when it is corrupt, 3 when clusters are leaked, 1 when it could not tell. */
import { checkImage } from '../../bdev/qcow2/check.js';
import type { CheckReport, Repair } from '../../bdev/qcow2/check.js';
import { runTask } from './node-file.js';
import { imageSpec } from './image-spec.js';
import type { SpecOptions } from './image-spec.js';
import { closeImage, openImage } from './open-image.js';
import { ProgressLine, parseChoice, print, printJson } from './words.js';

export interface CheckCommand extends SpecOptions {
  readonly quiet?: boolean;
  readonly format?: string;
  readonly output: 'human' | 'json';
  readonly repair?: string;
  readonly progress?: boolean;
  readonly discardSession?: boolean;
}

/** The format has nothing that could be checked. */
const EXIT_NO_CHECKS = 63;

/** @returns the exit code. Throws BdevError. */
export function checkCommand(path: string, command: CheckCommand): number {
  const repair = command.repair === undefined ? 'none' : parseChoice('repair', command.repair, ['leaks', 'all']);
  const { quiet = false } = command;
  const image = openImage(imageSpec(path, command.format ?? null, command), {
    mode: repair === 'none' ? 'read' : 'write',
    discardSession: command.discardSession === true,
  });
  try {
    if (image.format !== 'qcow2') {
      process.stderr.write('strata img: This image format does not support checks\n');
      return EXIT_NO_CHECKS;
    }
    const check = (how: Repair): CheckReport => {
      const progress = new ProgressLine(command.progress === true && !quiet);
      const report = runTask(checkImage(image.file, { repair: how, onProgress: (done) => progress.update(done) }));
      progress.end();
      return report;
    };
    let report = check(repair);
    if (!quiet) printFindings(report);
    const { corruptionsFixed, leaksFixed } = report;
    if (corruptionsFixed + leaksFixed > 0) {
      if (command.output === 'human' && !quiet) {
        print('The following inconsistencies were found and repaired:\n\n');
        print(`    ${leaksFixed} leaked clusters\n    ${corruptionsFixed} corruptions\n\n`);
        print('Double checking the fixed image now...\n');
      }
      report = { ...check('none'), corruptionsFixed, leaksFixed };
    }
    if (command.output === 'json') printJson(asJson(image.file.path, report));
    else if (!quiet) print(asText(report));
    return exitCodeOf(report);
  } finally {
    closeImage(image);
  }
}

function exitCodeOf({ checkErrors, corruptions, leaks }: CheckReport): number {
  if (checkErrors > 0) return 1;
  if (corruptions > 0) return 2;
  return leaks > 0 ? 3 : 0;
}

function printFindings({ findings, findingsOmitted }: CheckReport): void {
  const labels = { corruption: 'ERROR', leak: 'Leaked', error: 'Cannot check' } as const;
  for (const { kind, field, message, repaired } of findings) {
    process.stderr.write(`${repaired ? 'Repairing' : labels[kind]} ${field} ${message}\n`);
  }
  if (findingsOmitted > 0) process.stderr.write(`... and ${findingsOmitted} others\n`);
}

/** With qemu-img's names: what is 0 is left out, but for check-errors. */
function asJson(filename: string, report: CheckReport): Record<string, unknown> {
  const optional: [string, number][] = [
    ['image-end-offset', report.imageEndOffset],
    ['total-clusters', report.totalClusters],
    ['corruptions', report.corruptions],
    ['leaks', report.leaks],
    ['corruptions-fixed', report.corruptionsFixed],
    ['leaks-fixed', report.leaksFixed],
    ['allocated-clusters', report.allocatedClusters],
    ['fragmented-clusters', report.fragmentedClusters],
    ['compressed-clusters', report.compressedClusters],
  ];
  return {
    filename,
    format: 'qcow2',
    'check-errors': report.checkErrors,
    ...Object.fromEntries(optional.filter(([, value]) => value !== 0)),
  };
}

function asText(report: CheckReport): string {
  const { corruptions, leaks, checkErrors, totalClusters, allocatedClusters, imageEndOffset } = report;
  const lines: string[] = [];
  if (corruptions + leaks + checkErrors === 0) lines.push('No errors were found on the image.');
  if (corruptions > 0) {
    lines.push('', `${corruptions} errors were found on the image.`);
    lines.push('Data may be corrupted, or further writes to the image may corrupt it.');
  }
  if (leaks > 0) {
    lines.push('', `${leaks} leaked clusters were found on the image.`);
    lines.push('This means waste of disk space, but no harm to data.');
  }
  if (checkErrors > 0) lines.push('', `${checkErrors} internal errors have occurred during the check.`);
  if (totalClusters > 0 && allocatedClusters > 0) {
    const percent = (part: number, whole: number): string => `${((part * 100) / whole).toFixed(2)}%`;
    lines.push(
      `${allocatedClusters}/${totalClusters} = ${percent(allocatedClusters, totalClusters)} allocated, ` +
        `${percent(report.fragmentedClusters, allocatedClusters)} fragmented, ` +
        `${percent(report.compressedClusters, allocatedClusters)} compressed clusters`,
    );
  }
  if (imageEndOffset > 0) lines.push(`Image end offset: ${imageEndOffset}`);
  return `${lines.join('\n')}\n`;
}
