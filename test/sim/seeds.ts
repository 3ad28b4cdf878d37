/** Seeds that once failed and are run always. */
import { readFileSync } from 'node:fs';

export function keptSeeds(): number[] {
  const lines = readFileSync(new URL('seeds.txt', import.meta.url), 'utf8').split('\n');
  return lines.filter((line) => /^\d/.test(line)).map((line) => Number.parseInt(line, 10));
}
