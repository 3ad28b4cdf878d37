/**
 * Goal: long jobs go on when the daemon, or the process of an isolated disk, is back; each is begun again once, until it ends for good.
 *
 * Method: the compiled daemon, killed and stopped in the middle of streams, backups and mirrors.
 */
import { existsSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { DISK_BYTES, Host, MIB, TIMEOUT_MS, configText, mirrorState } from './mirrored-host.js';
import type { ConfigOptions } from './mirrored-host.js';
import { Program, STRATA, until, writeConfig } from './programs.js';

describe('a long job', () => {
  /** An overlay on an image with data all over. */
  function newChain(host: Host): void {
    const below = Buffer.alloc(DISK_BYTES, 'what lies below it all ');
    writeFileSync(host.path('below.raw'), below);
    host.qemuImg('create', '-q', '-f', 'qcow2', '-b', 'below.raw', '-F', 'raw', 'top.qcow2');
  }
  const overlay: ConfigOptions = {
    bdev: 'top',
    image: `
  - {name: top-file, module: uring, path: top.qcow2}
  - {name: top, module: qcow2, base: top-file, image_dir: .}
  - {name: copy, module: uring, path: copy.img, create: ${DISK_BYTES}}`,
  };
  const jobOf = (host: Host): Promise<Record<string, unknown>> => host.ask('bdev_qcow2_job_get', { name: 'top' });
  const isUnderWay = async (host: Host): Promise<true | undefined> =>
    Number((await jobOf(host))['doneBytes']) > 0 || undefined;

  it.each(['kill', 'stop'] as const)(
    'goes on after a %s of the daemon: a stream',
    { timeout: TIMEOUT_MS },
    async (end) => {
      const host = new Host();
      newChain(host);
      await host.start(overlay);
      await host.ask('bdev_qcow2_stream', { name: 'top', bytes_per_second: '12MiB' });
      await until('a part', () => isUnderWay(host));
      expect(host.records).toEqual(['job-bdev-top.json']);
      await host.program[end]();
      expect(host.records).toEqual(['job-bdev-top.json']);
      await host.start(overlay);
      expect(host.said('a job goes on after the restart')).toMatchObject({ bdev: 'top', operation: 'stream' });
      await until('its end', async () => (await jobOf(host))['state'] === 'done' || undefined);
      await until('no record', () => host.records.length === 0 || undefined);
      await host.program.stop();
      rmSync(host.path('below.raw'));
      expect(host.contents('top.qcow2', 'qcow2').equals(Buffer.alloc(DISK_BYTES, 'what lies below it all '))).toBe(
        true,
      );
    },
  );

  it('goes on after a kill: a commit', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    newChain(host);
    const data = Buffer.alloc(DISK_BYTES, 'what the guest has written ');
    writeFileSync(host.path('data.raw'), data);
    host.qemuImg('convert', '-n', '-f', 'raw', '-O', 'qcow2', 'data.raw', 'top.qcow2');
    await host.start(overlay);
    await host.ask('bdev_qcow2_commit', { name: 'top', bytes_per_second: '12MiB' });
    await until('a part', () => isUnderWay(host));
    await host.program.kill();
    await host.start(overlay);
    expect(host.said('a job goes on after the restart')).toMatchObject({ bdev: 'top', operation: 'commit' });
    await until('its end', async () => (await jobOf(host))['state'] === 'done' || undefined);
    await until('no record', () => host.records.length === 0 || undefined);
    await host.program.stop();
    expect(readFileSync(host.path('below.raw')).equals(data)).toBe(true);
  });

  it(
    'begins anew after a kill: a backup; and ends for good when it is cancelled',
    { timeout: TIMEOUT_MS },
    async () => {
      const host = new Host();
      newChain(host);
      await host.start(overlay);
      await host.ask('bdev_qcow2_backup', { name: 'top', target: 'copy', bytes_per_second: '12MiB' });
      await until('a part', () => isUnderWay(host));
      await host.program.kill();
      await host.start(overlay);
      expect(await jobOf(host)).toMatchObject({ type: 'backup', state: 'running' });
      await host.ask('bdev_qcow2_job_cancel', { name: 'top' });
      await until('no record', () => host.records.length === 0 || undefined);
      await host.program.kill();
      await host.start(overlay);
      expect(await jobOf(host)).toBeNull();
      await host.program.stop();
    },
  );

  it('is not begun again for ever when the daemon ends soon after each time', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    await host.start();
    await host.ask('controller_mirror', { name: 'vm', target: 'image', bytes_per_second: '1MiB' });
    for (let kill = 0; kill < 4; kill++) {
      await host.program.kill();
      await host.start();
      const what = kill < 3 ? 'a job goes on after the restart' : 'a job cannot go on after the restart';
      expect(host.said(what)).toMatchObject({ controller: 'vm' });
    }
    expect(host.records).toEqual([]);
    await host.program.stop();
  });

  it('goes on after a kill of the process of an isolated disk: a mirror', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    await host.start({ controller: ', isolate: true, targets: [image]' });
    await host.ask('controller_mirror', { name: 'vm', target: 'image', bytes_per_second: '12MiB' });
    const { pid } = await until('its process', () => childOf(host.program.pid));
    process.kill(pid, 'SIGKILL');
    await host.program.logged('a job goes on after the restart');
    expect(await host.ask('controller_mirror_get', { name: 'vm' })).toMatchObject({
      target: 'image',
      bytesPerSecond: 12 * MIB,
    });
    await host.program.stop();
    // And after an orderly stop, too.
    await host.start({ controller: ', isolate: true, targets: [image]' });
    expect(host.said('a job goes on after the restart')).toMatchObject({ controller: 'vm', operation: 'mirror' });
    await mirrorState(host, 'ready');
    await host.program.stop();
  });

  it('that cannot go on is a warning, and said of the disk; the daemon serves', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    newChain(host);
    await host.start(overlay);
    await host.ask('bdev_qcow2_backup', { name: 'top', target: 'copy', bytes_per_second: '12MiB' });
    await host.ask('controller_mirror', { name: 'vm', target: 'memory', bytes_per_second: '12MiB' });
    await host.program.kill();
    const without = { ...overlay, image: overlay.image!.replace(/\n.*name: copy.*/, '') };
    writeFileSync(host.path('strata.yaml'), '');
    const config = writeConfig(host.folder, configText(without).replace(/.*name: memory.*\n/, ''));
    host.program = await Program.serving(STRATA, ['serve', '--config', config], host.folder);
    const warnings = host.program.log.filter(({ message }) => message === 'a job cannot go on after the restart');
    expect(warnings).toMatchObject([
      { level: 'warn', bdev: 'top', operation: 'backup', error: 'there is no bdev copy' },
      { level: 'warn', controller: 'vm', operation: 'mirror', error: 'there is no bdev memory' },
    ]);
    expect(await jobOf(host)).toMatchObject({
      type: 'backup',
      state: 'failed',
      error: expect.stringMatching(/no bdev copy/) as string,
    });
    expect(await host.ask('controller_mirror_get', { name: 'vm' })).toMatchObject({ state: 'failed' });
    expect(host.records).toEqual([]);
    expect(existsSync(host.path('vm.sock'))).toBe(true);
    await host.program.stop();
  });
});

/** The first process that a process has started. */
function childOf(parent: number): { readonly pid: number } | undefined {
  const lists = readdirSync(`/proc/${parent}/task`).map((task) =>
    readFileSync(`/proc/${parent}/task/${task}/children`, 'utf8').trim(),
  );
  const pid = Number(lists.join(' ').trim().split(' ')[0]);
  return pid > 0 ? { pid } : undefined;
}
