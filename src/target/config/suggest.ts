/** "Did you mean": the known word nearest to a misspelt one. */

/** Words that differ in more letters than this share of their length are different words. */
const LIKENESS = 0.4;

/** The best match for `word`, or undefined when none is near. */
export function nearest(word: string, known: readonly string[]): string | undefined {
  let best: string | undefined;
  let bestDistance = Infinity;
  for (const candidate of known) {
    const distance = editDistance(word.toLowerCase(), candidate.toLowerCase());
    if (distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  const longest = Math.max(word.length, best?.length ?? 0);
  return bestDistance <= Math.max(1, longest * LIKENESS) ? best : undefined;
}

/** A remedy for a word that is none of the known ones. */
export function suggest(word: string, known: readonly string[], what: string): string {
  const match = nearest(word, known);
  if (match !== undefined) return `did you mean \`${match}\`?`;
  return known.length === 0 ? `there is no ${what} yet: add one` : `use one of: ${known.join(', ')}`;
}

/** Insertions, deletions, replacements and swaps of neighbours between two words. */
function editDistance(a: string, b: string): number {
  const rows = Array.from({ length: a.length + 1 }, (_, i) => [i, ...new Array<number>(b.length).fill(0)]);
  for (let j = 0; j <= b.length; j++) rows[0]![j] = j;
  for (let i = 1; i <= a.length; i++) {
    for (let j = 1; j <= b.length; j++) {
      const replaced = rows[i - 1]![j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      let least = Math.min(replaced, rows[i - 1]![j]! + 1, rows[i]![j - 1]! + 1);
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      if (swapped) least = Math.min(least, rows[i - 2]![j - 2]! + 1);
      rows[i]![j] = least;
    }
  }
  return rows[a.length]![b.length]!;
}
