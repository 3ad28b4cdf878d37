/** What a check found: the numbers that qemu-img has, and each finding in words up to a bound. */

/** As qemu-img counts: wrong in a way that data may be lost; clusters that nobody uses; what could not be looked at. */
export type FindingKind = 'corruption' | 'leak' | 'error';

export interface Finding {
  readonly kind: FindingKind;
  /** Name in the format, as `header.refcount_table_offset` or `l2@0x50000[17]`. */
  readonly field: string;
  readonly message: string;
  /** Whether it was put right. */
  readonly repaired: boolean;
}

export interface CheckReport {
  readonly corruptions: number;
  readonly leaks: number;
  readonly checkErrors: number;
  readonly corruptionsFixed: number;
  readonly leaksFixed: number;
  /** Clusters of the disk, and of the active mapping. */
  readonly totalClusters: number;
  readonly allocatedClusters: number;
  readonly fragmentedClusters: number;
  readonly compressedClusters: number;
  /** Where the last cluster in use ends; 0 when the check did not come that far. */
  readonly imageEndOffset: number;
  readonly findings: readonly Finding[];
  /** Findings beyond those. */
  readonly findingsOmitted: number;
}

const FINDINGS_MAX = 1000;

export interface ReportMark {
  readonly corruptions: number;
  readonly leaks: number;
  readonly checkErrors: number;
  readonly findings: number;
  readonly findingsOmitted: number;
}

export class ReportBuilder {
  corruptions = 0;
  leaks = 0;
  checkErrors = 0;
  corruptionsFixed = 0;
  leaksFixed = 0;
  totalClusters = 0;
  allocatedClusters = 0;
  fragmentedClusters = 0;
  compressedClusters = 0;
  imageEndOffset = 0;
  readonly findings: Finding[] = [];
  findingsOmitted = 0;

  /** @param message goes on from the field. @param times how often it is counted */
  corruption(field: string, message: string, times = 1): void {
    this.corruptions += times;
    this.#note('corruption', field, message, false);
  }

  leak(field: string, message: string): void {
    this.leaks++;
    this.#note('leak', field, message, false);
  }

  error(field: string, message: string, times = 1): void {
    this.checkErrors += times;
    this.#note('error', field, message, false);
  }

  repaired(kind: 'corruption' | 'leak', field: string, message: string, times = 1): void {
    if (kind === 'corruption') this.corruptionsFixed += times;
    else this.leaksFixed += times;
    this.#note(kind, field, message, true);
  }

  /** What there is so far, for `takeBack`. */
  mark(): ReportMark {
    const { corruptions, leaks, checkErrors, findingsOmitted } = this;
    return { corruptions, leaks, checkErrors, findingsOmitted, findings: this.findings.length };
  }

  /** Forgets what was found since. @returns the corruptions and leaks of then */
  takeBack(mark: ReportMark): { corruptions: number; leaks: number } {
    const since = { corruptions: this.corruptions - mark.corruptions, leaks: this.leaks - mark.leaks };
    ({ corruptions: this.corruptions, leaks: this.leaks, checkErrors: this.checkErrors } = mark);
    this.findings.length = mark.findings;
    this.findingsOmitted = mark.findingsOmitted;
    return since;
  }

  build(): CheckReport {
    const { corruptions, leaks, checkErrors, corruptionsFixed, leaksFixed, imageEndOffset } = this;
    const { totalClusters, allocatedClusters, fragmentedClusters, compressedClusters } = this;
    const { findings, findingsOmitted } = this;
    return {
      corruptions,
      leaks,
      checkErrors,
      corruptionsFixed,
      leaksFixed,
      totalClusters,
      allocatedClusters,
      fragmentedClusters,
      compressedClusters,
      imageEndOffset,
      findings,
      findingsOmitted,
    };
  }

  #note(kind: FindingKind, field: string, message: string, repaired: boolean): void {
    if (this.findings.length < FINDINGS_MAX) this.findings.push({ kind, field, message, repaired });
    else this.findingsOmitted++;
  }
}
