/**
 * Goal: the commands around the daemon say what they are asked for, to people and to programs, with an exit code that tells.
 *
 * Method: the compiled program is run; what doctor would find on other hosts is asked of its checks.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { attachLines } from '../../src/target/attach.js';
import {
  checkCores,
  checkFolder,
  checkKernel,
  checkLockedMemory,
  checkNode,
  checkOpenFiles,
  formatFindings,
  ioUringRemedy,
} from '../../src/target/doctor.js';
import { VERSION } from '../../src/target/version.js';
import { ONE_DISK, STRATA, newFolder, runToEnd, writeConfig } from './programs.js';

const CONFIG = `
bdevs: [{name: x, module: null, size: 1MiB}, {name: y, module: null, size: 1MiB}]
controllers: [{name: vm-1, bdev: x, socket: one.sock}, {name: vm-2, bdev: y, socket: "two,2.sock"}]
`;

describe('both programs', () => {
  it.each([STRATA, ONE_DISK])('%s tells its version and its options', (program) => {
    expect(runToEnd(program, ['--version'], newFolder()).stdout).toBe(`${VERSION}\n`);
    const help = runToEnd(program, ['--help'], newFolder());
    expect(help).toMatchObject({ exitCode: 0, stderr: '' });
    expect(help.stdout).toMatch(/Usage:/);
  });

  it('refuse a misspelt command with a suggestion', () => {
    const ended = runToEnd(STRATA, ['serv'], newFolder());
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toMatch(/Did you mean serve/);
  });
});

describe('strata check-config', () => {
  it('says what would be served and where', () => {
    const folder = newFolder();
    const config = writeConfig(folder, `reactors: [{name: r0}, {name: r1}]${CONFIG}`);
    expect(runToEnd(STRATA, ['check-config', config], folder)).toMatchObject({
      exitCode: 0,
      stdout: `${config} is good\n  r0: bdevs x; controllers vm-1\n  r1: bdevs y; controllers vm-2\n`,
    });
    const json = runToEnd(STRATA, ['check-config', config, '-o', 'json'], folder);
    expect(JSON.parse(json.stdout)).toMatchObject({ reactors: [{ name: 'r0', bdevs: ['x'] }, { name: 'r1' }] });
  });

  it('says what is wrong, in words on stderr and as JSON on stdout', () => {
    const folder = newFolder();
    const config = writeConfig(folder, 'bdevs: []\n');
    const ended = runToEnd(STRATA, ['check-config', config, '-o', 'json'], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toContain(`${config}:1: bdevs: has 0 entries\n    -> give it at least 1`);
    expect(JSON.parse(ended.stdout)).toMatchObject({
      errors: [
        { file: config, line: 1, field: 'bdevs' },
        { file: config, line: 1, field: 'controllers', message: 'is missing' },
      ],
    });
  });
});

describe('strata attach', () => {
  it('prints lines for each monitor', () => {
    const folder = newFolder();
    const config = writeConfig(folder, CONFIG);
    const { exitCode, stdout } = runToEnd(STRATA, ['attach', 'vm-1', '--config', config], folder);
    expect(exitCode).toBe(0);
    const socket = join(folder, 'one.sock');
    for (const monitor of ['QEMU', 'libvirt', 'cloud-hypervisor', 'Firecracker', 'crosvm']) {
      expect(stdout).toContain(`# ${monitor}: `);
    }
    expect(stdout.split(socket)).toHaveLength(6);
    expect(JSON.parse(runToEnd(STRATA, ['attach', 'vm-1', '-c', config, '-o', 'json'], folder).stdout)).toHaveProperty(
      'libvirt',
    );
  });

  it('knows the embedded default without being asked', () => {
    const folder = newFolder();
    const { stdout } = runToEnd(STRATA, ['attach'], folder);
    expect(stdout).toContain(`path=${join(folder, 'run/disk0.sock')}`);
  });

  it('asks back for a name it does not know', () => {
    const folder = newFolder();
    const config = writeConfig(folder, CONFIG);
    const unknown = runToEnd(STRATA, ['attach', 'vm1', '--config', config], folder);
    expect(unknown.exitCode).toBe(1);
    expect(unknown.stderr).toMatch(/no controller vm1\n {4}-> did you mean `vm-1`/);
    expect(runToEnd(STRATA, ['attach', '--config', config], folder).stderr).toMatch(/which of vm-1, vm-2/);
  });

  it('escapes names and paths for where they go', () => {
    const lines = Object.fromEntries(
      attachLines({ name: 'vm-1.a', socketPath: "/run/a b's,1&.sock" }).map(({ monitor, lines }) => [monitor, lines]),
    );
    expect(lines['QEMU']).toContain(`'socket,id=strata-vm-1.a,path=/run/a b'\\''s,,1&.sock,reconnect=1'`);
    expect(lines['libvirt']).toContain("path='/run/a b&apos;s,1&amp;.sock'");
    expect(lines['Firecracker']).toContain('"drive_id":"vm_1_a"');
  });
});

describe('strata doctor', () => {
  it('looks at this host', () => {
    const folder = newFolder();
    const { exitCode, stdout } = runToEnd(STRATA, ['doctor', '-o', 'json'], folder);
    const { findings } = JSON.parse(stdout) as { findings: { check: string; verdict: string; remedy: string }[] };
    const checks = findings.map(({ check }) => check);
    for (const check of [
      'node',
      'kernel',
      'io_uring',
      'open files',
      'locked memory',
      'huge pages',
      'cores',
      'permissions',
    ]) {
      expect(checks).toContain(check);
    }
    expect(exitCode).toBe(findings.some(({ verdict }) => verdict === 'fail') ? 1 : 0);
    for (const { verdict, remedy } of findings) if (verdict !== 'ok') expect(remedy).not.toBe('');
    expect(runToEnd(STRATA, ['doctor'], folder).stdout.split('\n').length).toBeGreaterThan(checks.length);
  });

  it.each([
    ['an old Node', checkNode('18.20.4'), 'fail', /Node 20\.19/],
    ['a new Node', checkNode('24.1.0'), 'ok', /^$/],
    ['an old kernel', checkKernel('5.10.0-28-amd64'), 'fail', /Linux 5\.19/],
    ['a usable kernel', checkKernel('5.19.0'), 'warn', /6\.1/],
    ['a good kernel', checkKernel('6.1.0-18-amd64'), 'ok', /^$/],
    ['few open files', checkOpenFiles(1024), 'warn', /LimitNOFILE/],
    ['many open files', checkOpenFiles(Infinity), 'ok', /^$/],
    ['little locked memory', checkLockedMemory(65536), 'ok', /LimitMEMLOCK/],
    ['a single core', checkCores(1), 'warn', /two or more/],
  ] as const)('on a host with %s', (_name, finding, verdict, remedy) => {
    expect(finding.verdict).toBe(verdict);
    expect(finding.remedy).toMatch(remedy);
  });

  it('knows how io_uring is forbidden', () => {
    expect(ioUringRemedy('EPERM')).toMatch(/io_uring/);
    expect(ioUringRemedy('ENOSYS')).toMatch(/CONFIG_IO_URING/);
    expect(ioUringRemedy('ENOMEM')).toMatch(/memory/);
  });

  it('sees a folder that cannot hold the default disk', () => {
    const folder = newFolder();
    expect(checkFolder(folder).verdict).toBe('ok');
    mkdirSync(join(folder, 'data'));
    writeFileSync(join(folder, 'run'), '');
    expect(checkFolder(folder)).toMatchObject({ verdict: 'warn', found: expect.stringMatching(/run is not a folder/) });
  });

  it('lays its findings out in columns', () => {
    const text = formatFindings([checkCores(1), checkKernel('6.1.0')]);
    expect(text).toBe(
      'warn  cores   1 for this process\n      -> give it two or more: a reactor that polls takes one from the guest\nok    kernel  Linux 6.1.0\n',
    );
  });
});
