/** qemu-img and qemu-io of this machine, the judges of images, in a folder that is gone after the test. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const TIMEOUT_MS = 10_000;

export class QemuImg {
  readonly folder = mkdtempSync(join(tmpdir(), 'strata-img-'));

  path(name: string): string {
    return join(this.folder, name);
  }

  /** Runs `qemu-img`; it has to end well. @returns what it printed */
  run(...args: readonly string[]): string {
    const { status, stdout, stderr } = this.try(...args);
    if (status !== 0) throw new Error(`qemu-img ${args.join(' ')} ended with ${status}: ${stderr}`);
    return stdout;
  }

  /** The status is null when it took longer than `TIMEOUT_MS`: qemu-img walks damaged tables as often as they are named. */
  try(...args: readonly string[]): { status: number | null; stdout: string; stderr: string } {
    return this.exec('qemu-img', args);
  }

  exec(
    program: 'qemu-img' | 'qemu-io',
    args: readonly string[],
  ): { status: number | null; stdout: string; stderr: string } {
    return spawnSync(program, args, { cwd: this.folder, encoding: 'utf8', maxBuffer: 2 ** 26, timeout: TIMEOUT_MS });
  }

  /** Runs commands of `qemu-io` on an image of this folder. */
  io(name: string, ...commands: readonly string[]): string {
    const { status, stdout, stderr } = this.tryIo(name, ...commands);
    if (status !== 0)
      throw new Error(`qemu-io -c '${commands.join("' -c '")}' ended with ${status}: ${stdout}${stderr}`);
    return stdout;
  }

  tryIo(name: string, ...commands: readonly string[]): { status: number | null; stdout: string; stderr: string } {
    const args = ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), name];
    return spawnSync('qemu-io', args, { cwd: this.folder, encoding: 'utf8' });
  }

  info(name: string): Record<string, unknown> {
    return JSON.parse(this.run('info', '--output', 'json', name)) as Record<string, unknown>;
  }

  check(name: string): QemuCheck {
    const { status, stdout, stderr } = this.try('check', '-f', 'qcow2', '--output', 'json', name);
    return { status, words: stderr, ...(stdout === '' ? {} : (JSON.parse(stdout) as object)) };
  }

  remove(): void {
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export interface QemuCheck {
  readonly status: number | null;
  readonly words: string;
  readonly corruptions?: number;
  readonly leaks?: number;
  readonly 'check-errors'?: number;
  readonly 'image-end-offset'?: number;
  readonly 'total-clusters'?: number;
  readonly 'allocated-clusters'?: number;
  readonly 'fragmented-clusters'?: number;
  readonly 'compressed-clusters'?: number;
}
