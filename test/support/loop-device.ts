/** Loop devices for tests: real block devices of any sector size. Only root may make them. */
import { execFileSync } from 'node:child_process';

export const isRoot = process.getuid?.() === 0;

export interface LoopDevice {
  /** As `/dev/loop0`. */
  readonly path: string;
  detach(): void;
}

/** Throws with what losetup says. */
export function attachLoop(file: string, sectorBytes: 512 | 4096): LoopDevice {
  const options = ['--find', '--show', '--sector-size', String(sectorBytes), file];
  const path = execFileSync('losetup', options, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();
  return { path, detach: () => void execFileSync('losetup', ['--detach', path]) };
}
