/** What is made of the rounds of a benchmark. */

/** A ratio over the rounds of a run. */
export interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** Middle value; the mean of the two middle ones of an even number. @param values at least one */
export function median(values: readonly number[]): number {
  if (values.length === 0) throw new Error('no values');
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/**
 * Ratio of two series round by round: what disturbs a machine for a while disturbs both sides of a round, and drops out.
 * @param numerator as many values as `denominator`
 */
export function pairedRatio(numerator: readonly number[], denominator: readonly number[]): Spread {
  const ratios = numerator.map((value, round) => value / denominator[round]!);
  return { median: median(ratios), min: Math.min(...ratios), max: Math.max(...ratios) };
}
