/**
 * Goal: an operator moves a disk to another bdev while its guest writes, and from then on that is the disk, whatever ends the daemon and
 * whichever bdev the config names.
 *
 * Method: the compiled daemon, asked on its control socket, with a driver that keeps stamped writes in flight over pivots and kills;
 * qemu-img reads what lies on the disks in the end.
 */
import { readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  DEPTH,
  DISK_BYTES,
  Host,
  IMAGE,
  TIMEOUT_MS,
  Writer,
  configText,
  expectDisk,
  mirrorState,
  stopWriting,
  writeDuring,
} from './mirrored-host.js';
import { STRATA, runToEnd, until, writeConfig } from './programs.js';

describe('a disk that is mirrored and moved while its guest writes', () => {
  it.each([
    ['on a reactor', ''],
    ['isolated', ', isolate: true, targets: [image]'],
  ])(
    'is the new one after a kill -9, %s, though the config names the old one',
    { timeout: TIMEOUT_MS },
    async (_, controller) => {
      const host = new Host();
      await host.start({ controller });
      const frontend = await host.connect();
      const writer = new Writer(frontend.queue);
      await writeDuring(
        frontend,
        writer,
        until('some writes', () => writer.answers > 100 || undefined),
      );
      const started = host.ask('controller_mirror', { name: 'vm', target: 'image', bytes_per_second: '40MiB' });
      expect(await writeDuring(frontend, writer, started)).toMatchObject({ state: 'copying', totalBytes: DISK_BYTES });
      expect(host.records).toEqual(['job-controller-vm.json']);
      await writeDuring(frontend, writer, mirrorState(host, 'ready'));
      const before = writer.answers;
      const pivot = host.ask('controller_mirror_pivot', { name: 'vm' });
      expect(await writeDuring(frontend, writer, pivot)).toMatchObject({ state: 'pivoted' });
      expect(host.records).toEqual(['pivot-vm.json']);
      expect(await host.ask('vhost_get_controllers', { name: 'vm' })).toMatchObject([
        {
          backend_specific: { block: { bdev: 'image' } },
          mirror: { state: 'pivoted', source: 'raw', target: 'image' },
        },
      ]);
      await writeDuring(
        frontend,
        writer,
        until('writes after it', () => writer.answers > before + 200 || undefined),
      );
      await host.program.kill();
      writer.turn(DEPTH);

      await host.start({ controller });
      await frontend.reconnect();
      expect(host.said('the config names the bdev that the disk was on before a pivot')).toMatchObject({
        controller: 'vm',
        from: 'raw',
        to: 'image',
      });
      await stopWriting(frontend, writer);
      await expectDisk(frontend, writer.model);
      frontend.close();
      expect((await host.program.stop()).exitCode).toBe(0);
      expect(host.contents('image.qcow2', 'qcow2').equals(writer.model)).toBe(true);
      expect(host.contents('raw.img', 'raw').equals(writer.model)).toBe(false);
      expect(() => host.qemuImg('check', '-q', 'image.qcow2')).not.toThrow();

      await host.start({ bdev: 'image' });
      expect(host.records).toEqual([]);
      await host.program.stop();
    },
  );

  it('is moved on, and back, and the record says where it is by now', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    const second = `${IMAGE}\n  - {name: second, module: uring, path: second.img, create: ${DISK_BYTES}}`;
    await host.start({ image: second });
    const frontend = await host.connect();
    const move = async (target: string): Promise<void> => {
      await host.ask('controller_mirror', { name: 'vm', target });
      await mirrorState(host, 'ready');
      await host.ask('controller_mirror_pivot', { name: 'vm' });
    };
    const writer = new Writer(frontend.queue);
    await writeDuring(frontend, writer, move('image'));
    await writeDuring(frontend, writer, move('second'));
    const record = JSON.parse(readFileSync(host.path('state/pivot-vm.json'), 'utf8')) as unknown;
    expect(record).toMatchObject({ controller: 'vm', from: 'raw', to: 'second', file: host.path('second.img') });
    await stopWriting(frontend, writer);
    await host.program.kill();
    await host.start({ image: second });
    await frontend.reconnect();
    await expectDisk(frontend, writer.model);
    await writeDuring(frontend, writer, move('raw'));
    expect(host.records).toEqual([]);
    await stopWriting(frontend, writer);
    await host.program.kill();
    await host.start({ image: second });
    await frontend.reconnect();
    await expectDisk(frontend, writer.model);
    frontend.close();
    await host.program.stop();
  });

  it(
    'keeps the daemon from starting with a config that does not fit, and says what to do',
    { timeout: TIMEOUT_MS },
    async () => {
      const host = new Host();
      await host.start();
      await host.ask('controller_mirror', { name: 'vm', target: 'image' });
      await mirrorState(host, 'ready');
      await host.ask('controller_mirror_pivot', { name: 'vm' });
      await host.program.stop();
      const record = host.path('state/pivot-vm.json');
      expect(host.refusal({ image: '' })).toMatch(
        /controllers\[0\]\.bdev: the disk of controller vm was moved from bdev raw to image, which is not there\n +-> bring back bdev image, which lay on .*image\.qcow2, or delete .*pivot-vm\.json/,
      );
      expect(host.refusal({ bdev: 'memory' })).toMatch(/and the config names memory\n +-> write `bdev: image`/);
      const elsewhere = IMAGE.replace('image.qcow2', 'other.qcow2');
      expect(host.refusal({ image: elsewhere })).toMatch(
        /which lay on .*image\.qcow2 then and lies on .*other\.qcow2 now/,
      );
      const used = `${IMAGE}\n  - {name: limited, module: qos, base: image}`;
      expect(host.refusal({ image: used })).toMatch(/which bdev limited uses now/);
      const renamed = configText().replace('name: vm,', 'name: vm2,');
      const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(host.folder, renamed)], host.folder);
      expect([ended.exitCode, ended.stderr]).toEqual([
        1,
        expect.stringMatching(/controller vm .*there is no such controller/),
      ]);
      writeFileSync(record, '{');
      expect(host.refusal({})).toMatch(/state_dir: .*pivot-vm\.json is no JSON/);
      rmSync(record);
      await host.start();
      const second = runToEnd(
        STRATA,
        ['serve', '--config', writeConfig(host.folder, configText().replaceAll('.sock', '2.sock'))],
        host.folder,
      );
      expect(second.stderr).toMatch(/state_dir: .*state is in use by another daemon/);
      await host.program.stop();
    },
  );
});

describe('a pivot', () => {
  it('is refused where it would not hold, and what there is goes on', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    await host.start({ more: '' });
    const ask = (method: string, params = {}): Promise<unknown> => host.ask(method, { name: 'vm', ...params });
    await expect(ask('controller_mirror_pivot')).rejects.toThrow(/set `state_dir`/);
    await expect(ask('controller_mirror', { target: 'none' })).rejects.toThrow(/target: there is no bdev none/);
    await expect(ask('controller_mirror', { target: 'image-file' })).rejects.toThrow(/target: /);
    await host.program.stop();

    await host.start({ more: 'state_dir: state\nreactors: [{name: a}, {name: b}]', controller: ', reactor: b' });
    await expect(ask('controller_mirror', { target: 'image' })).rejects.toThrow(/targets: \[image\]/);
    await host.program.stop();
    await host.start({
      more: 'state_dir: state\nreactors: [{name: a}, {name: b}]',
      controller: ', reactor: b, targets: [image]',
    });
    await expect(ask('controller_mirror_pivot')).rejects.toThrow(/vm is not mirrored/);
    await ask('controller_mirror', { target: 'image' });
    await ask('controller_mirror_cancel');
    expect(host.records).toEqual([]);
    await host.program.stop();

    await host.start();
    await ask('controller_mirror', { target: 'memory' });
    await expect(host.ask('bdev_resize', { name: 'raw', new_size: '1GiB' })).rejects.toThrow(
      /raw is mirrored to memory/,
    );
    await mirrorState(host, 'ready');
    await expect(ask('controller_mirror_pivot')).rejects.toThrow(/what memory holds is gone when the daemon ends/);
    expect(await ask('controller_mirror_cancel')).toMatchObject({ state: 'cancelled' });
    expect((await host.program.stop()).exitCode).toBe(0);
  });

  it('does not happen when it cannot be written down', { timeout: TIMEOUT_MS }, async () => {
    const host = new Host();
    await host.start();
    const frontend = await host.connect();
    const writer = new Writer(frontend.queue);
    await host.ask('controller_mirror', { name: 'vm', target: 'image' });
    await mirrorState(host, 'ready');
    renameSync(host.path('state'), host.path('away'));
    writeFileSync(host.path('state'), '');
    const pivot = host.ask('controller_mirror_pivot', { name: 'vm' });
    await expect(writeDuring(frontend, writer, pivot)).rejects.toThrow(/cannot be written down: ENOTDIR/);
    expect(await mirrorState(host, 'ready')).toMatchObject({ doneBytes: DISK_BYTES });
    await host.ask('controller_mirror_cancel', { name: 'vm' });
    await writeDuring(
      frontend,
      writer,
      until('writes', () => writer.answers > 300 || undefined),
    );
    await stopWriting(frontend, writer);
    await host.program.kill();
    rmSync(host.path('state'));
    renameSync(host.path('away'), host.path('state'));
    rmSync(host.path('state/job-controller-vm.json'));
    await host.start();
    await frontend.reconnect();
    await expectDisk(frontend, writer.model);
    frontend.close();
    await host.program.stop();
    expect(host.contents('raw.img', 'raw').equals(writer.model)).toBe(true);
  });
});
