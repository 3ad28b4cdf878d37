/**
 * Goal: whoever writes a config file wrongly is told where, what and how to put it right, and all of it at once; what is not
 * written has the documented default.
 *
 * Method: a table of files with one mistake each, every one with the place, message and remedy it must get; then whole files.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { defaultConfig } from '../../src/target/config/defaults.js';
import { loadConfig } from '../../src/target/config/load.js';
import { ConfigError, optionSource } from '../../src/target/config/problem.js';
import type { Problem } from '../../src/target/config/problem.js';
import { nearest } from '../../src/target/config/suggest.js';
import { formatSize, parseListen, parseMode, parseSize } from '../../src/target/config/values.js';
import { newFolder, writeConfig } from './programs.js';

const root = fileURLToPath(new URL('../..', import.meta.url));

/** A file that is good, one setting per line, so that a mistake's line is known. */
const GOOD = {
  reactors: ['- name: r0', '  mode: adaptive'],
  bdevs: ['- name: d0', '  module: malloc', '  size: 1MiB'],
  controllers: ['- name: c0', '  bdev: d0', '  socket: c0.sock'],
} as const;

/** The good file with lines added to its sections, or with other ones. */
function file(changes: Partial<Record<keyof typeof GOOD, readonly string[]>>, ...rest: string[]): string {
  const sections = Object.entries({ ...GOOD, ...changes }).map(([name, lines]) =>
    [`${name}:`, ...lines.map((line) => `  ${line}`)].join('\n'),
  );
  return [...sections, ...rest, ''].join('\n');
}

function problemsOf(text: string, name?: string): readonly Problem[] {
  try {
    loadConfig(writeConfig(newFolder(), text, name));
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  throw new Error('the file was accepted');
}

const bdevs = (...lines: string[]) => ({ bdevs: [...GOOD.bdevs, ...lines] });
const controllers = (...lines: string[]) => ({ controllers: [...GOOD.controllers, ...lines] });
const uring = (...lines: string[]) => bdevs('- name: u', '  module: uring', '  path: u.img', ...lines);

describe('a mistake in a config file gets its place, its reason and its remedy', () => {
  const table: [string, string, { line: number | null; field: string; message: RegExp; remedy: RegExp }][] = [
    [
      'unknown key',
      file(uring('  pth: x')),
      { line: 11, field: 'bdevs[1].pth', message: /unknown key/, remedy: /did you mean `path`/ },
    ],
    [
      'unknown key at the top',
      file({}, 'controlers: []'),
      { line: 12, field: 'controlers', message: /unknown key/, remedy: /did you mean `controllers`/ },
    ],
    [
      'unknown key unlike any other',
      file({}, 'log: {colour: red}'),
      { line: 12, field: 'log.colour', message: /unknown key/, remedy: /known keys: level, format/ },
    ],
    [
      'unknown key in a rule',
      file(bdevs('- {name: e, module: error, base: d0, rules: [{type: any, action: fail, frst: 2}]}')),
      { line: 8, field: 'bdevs[1].rules[0].frst', message: /unknown key/, remedy: /did you mean `first`/ },
    ],
    [
      'unknown module',
      file(bdevs('- name: u', '  module: urng')),
      { line: 9, field: 'bdevs[1].module', message: /"urng"/, remedy: /did you mean `uring`/ },
    ],
    [
      'no module',
      file(bdevs('- name: u')),
      { line: 8, field: 'bdevs[1].module', message: /missing/, remedy: /null, malloc, uring, passthru/ },
    ],
    [
      'missing key',
      file(bdevs('- name: u', '  module: uring')),
      { line: 8, field: 'bdevs[1].path', message: /missing/, remedy: /add it: a text/ },
    ],
    [
      'missing size',
      file(bdevs('- name: n', '  module: null')),
      { line: 8, field: 'bdevs[1].size', message: /missing/, remedy: /add it/ },
    ],
    [
      'ambiguous unit',
      file(uring('  create: 10GB')),
      { line: 11, field: 'bdevs[1].create', message: /unknown unit/, remedy: /write 10GiB/ },
    ],
    [
      'size that is none',
      file(uring('  create: big')),
      { line: 11, field: 'bdevs[1].create', message: /"big" is not a size/, remedy: /64KiB/ },
    ],
    [
      'odd block size',
      file(uring('  block_size: 1024')),
      { line: 11, field: 'bdevs[1].block_size', message: /1024/, remedy: /512, 4096/ },
    ],
    [
      'text for a switch',
      file(uring('  direct: "yes"')),
      { line: 11, field: 'bdevs[1].direct', message: /"yes"/, remedy: /true or false/ },
    ],
    [
      'number for a name',
      file(bdevs('- name: 17', '  module: null', '  size: 1MiB')),
      { line: 8, field: 'bdevs[1].name', message: /17, a number/, remedy: /quotes/ },
    ],
    [
      'name with blanks',
      file(bdevs('- name: a b', '  module: null', '  size: 1MiB')),
      { line: 8, field: 'bdevs[1].name', message: /"a b" is not a name/, remedy: /letters, digits/ },
    ],
    ['UUID', file(uring('  uuid: 12')), { line: 11, field: 'bdevs[1].uuid', message: /12/, remedy: /quotes/ }],
    [
      'negative time',
      file(bdevs('- {name: d, module: delay, base: d0, read_us: -1}')),
      { line: 8, field: 'bdevs[1].read_us', message: /-1/, remedy: /at least 0/ },
    ],
    [
      'too many queues',
      file(controllers('  queues: 65')),
      { line: 12, field: 'controllers[0].queues', message: /65/, remedy: /at most 64/ },
    ],
    [
      'mode without quotes',
      file(controllers('  socket_mode: 0660')),
      { line: 12, field: 'controllers[0].socket_mode', message: /660/, remedy: /in quotes, as "0660"/ },
    ],
    [
      'long serial',
      file(controllers('  serial: 123456789012345678901x')),
      { line: 12, field: 'controllers[0].serial', message: /not a serial number/, remedy: /at most 20/ },
    ],
    [
      'long socket path',
      file({ controllers: ['- name: c0', '  bdev: d0', `  socket: /run/${'x'.repeat(120)}.sock`] }),
      { line: 11, field: 'controllers[0].socket', message: /130 bytes/, remedy: /shorter path/ },
    ],
    [
      'unknown reactor mode',
      file({ reactors: ['- name: r0', '  mode: poling'] }),
      { line: 3, field: 'reactors[0].mode', message: /"poling"/, remedy: /use one of: adaptive, busy, interrupt/ },
    ],
    [
      'metrics address',
      file({}, 'metrics:', '  listen: 9464'),
      { line: 13, field: 'metrics.listen', message: /9464 is not an address/, remedy: /127\.0\.0\.1:9464, or off/ },
    ],
    [
      'log level',
      file({}, 'log:', '  level: verbose'),
      { line: 13, field: 'log.level', message: /"verbose"/, remedy: /debug, info, warn, error/ },
    ],
    [
      'drain timeout',
      file({}, 'drain_timeout_s: 0'),
      { line: 12, field: 'drain_timeout_s', message: /0/, remedy: /more than 0/ },
    ],
    [
      'no controllers',
      file({ controllers: ['[]'] }),
      { line: 8, field: 'controllers', message: /has 0 entries/, remedy: /at least 1/ },
    ],
    [
      'a list entry of the wrong kind',
      file(bdevs('- disk')),
      { line: 8, field: 'bdevs[1]', message: /"disk"/, remedy: /key: value/ },
    ],
    [
      'bdev that is not there',
      file({ controllers: ['- name: c0', '  bdev: do', '  socket: c0.sock'] }),
      { line: 10, field: 'controllers[0].bdev', message: /no bdev do/, remedy: /did you mean `d0`/ },
    ],
    [
      'base that is not there',
      file(bdevs('- {name: p, module: passthru, base: disk9}')),
      { line: 8, field: 'bdevs[1].base', message: /no bdev disk9/, remedy: /use one of: d0, p/ },
    ],
    [
      'reactor that is not there',
      file(controllers('  reactor: r1')),
      { line: 12, field: 'controllers[0].reactor', message: /no reactor r1/, remedy: /did you mean `r0`/ },
    ],
    [
      'name that is used twice',
      file(bdevs('- {name: d0, module: null, size: 1MiB}')),
      { line: 8, field: 'bdevs[1].name', message: /d0 is the name of bdevs\[0\] too/, remedy: /another name/ },
    ],
    [
      'socket that is used twice',
      file({
        ...bdevs('- {name: n, module: null, size: 1MiB}'),
        ...controllers('- {name: c1, bdev: n, socket: ./c0.sock}'),
      }),
      { line: 13, field: 'controllers[1].socket', message: /controllers\[0\] too/, remedy: /another path/ },
    ],
    [
      'bdev with two writers',
      file(bdevs('- {name: p, module: passthru, base: d0}')),
      { line: 11, field: 'controllers[0].bdev', message: /written by bdev p already/, remedy: /read_only/ },
    ],
    [
      'circle',
      file(bdevs('- {name: a, module: passthru, base: b}', '- {name: b, module: passthru, base: a}')),
      { line: 8, field: 'bdevs[1].base', message: /a -> b -> a/, remedy: /another bdev/ },
    ],
    [
      'stack on two reactors',
      file({
        reactors: ['- {name: r0}', '- {name: r1}'],
        controllers: [
          '- {name: c0, bdev: d0, socket: a.sock, reactor: r0}',
          '- {name: c1, bdev: d0, socket: b.sock, reactor: r1, read_only: true}',
        ],
      }),
      {
        line: 10,
        field: 'controllers[1].reactor',
        message: /shares a bdev .* c0, which runs on r0/,
        remedy: /same reactor/,
      },
    ],
    [
      'user that is none',
      file(controllers('  allow:', '    users: [root, "a b"]')),
      { line: 13, field: 'controllers[0].allow.users[1]', message: /"a b" is not a user/, remedy: /libvirt-qemu/ },
    ],
    [
      'number that is no group',
      file(controllers('  socket_group: -1')),
      { line: 12, field: 'controllers[0].socket_group', message: /-1 is not a user or group/, remedy: /64055/ },
    ],
    [
      'unknown list of peers',
      file(controllers('  allow: {user: [root]}')),
      { line: 12, field: 'controllers[0].allow.user', message: /unknown key/, remedy: /did you mean `users`/ },
    ],
    [
      'handshake timeout of nothing',
      file(controllers('  handshake_timeout_s: 0')),
      { line: 12, field: 'controllers[0].handshake_timeout_s', message: /is 0/, remedy: /more than 0/ },
    ],
    ['YAML', 'bdevs:\n  - [a\n', { line: 3, field: '', message: /Flow sequence/, remedy: /correct the YAML/ }],
    [
      'key that is given twice',
      file({}, 'log: {}', 'log: {}'),
      { line: 13, field: '', message: /unique/, remedy: /correct the YAML/ },
    ],
    ['empty file', '', { line: null, field: '', message: /null/, remedy: /key: value/ }],
  ];

  it.each(table)('%s', (_name, text, expected) => {
    const problems = problemsOf(text);
    expect(problems).toHaveLength(1);
    const [problem] = problems;
    expect(problem!.file).toMatch(/strata\.yaml$/);
    expect({ line: problem!.line, field: problem!.field }).toEqual({ line: expected.line, field: expected.field });
    expect(problem!.message).toMatch(expected.message);
    expect(problem!.remedy).toMatch(expected.remedy);
  });

  it('and so do all the others in the file, from top to bottom', () => {
    const text = file(
      { ...uring('  create: 1GB', '  lok: true'), ...controllers('  queues: 0') },
      'log: {level: loud}',
      'metrics: {listen: here}',
    );
    const fields = problemsOf(text).map(({ line, field }) => `${line} ${field}`);
    expect(fields).toEqual([
      '11 bdevs[1].create',
      '12 bdevs[1].lok',
      '17 controllers[0].queues',
      '18 log.level',
      '19 metrics.listen',
    ]);
  });

  it('also in JSON, which may not be written as YAML', () => {
    const [syntax] = problemsOf('{\n "bdevs": [\n  {"name": d0}\n ]\n}', 'strata.json');
    expect(syntax).toMatchObject({ line: 3, message: expect.stringMatching(/JSON/) });
    const [size] = problemsOf(
      '{\n\t"bdevs": [\n\t\t{"name": "d0", "module": "null", "size": "1MB"}\n\t],\n"controllers": [{"name": "c", "bdev": "d0", "socket": "s"}]}',
      'strata.json',
    );
    expect(size).toMatchObject({ line: 3, field: 'bdevs[0].size', remedy: expect.stringMatching(/write 1MiB/) });
  });

  it('and so does a file that cannot be read or has no known format', () => {
    const folder = newFolder();
    expect(() => loadConfig(join(folder, 'none.yaml'))).toThrow(
      /none\.yaml: cannot be read: ENOENT\n {4}-> check the path/,
    );
    expect(() => loadConfig(folder)).toThrow(/extension/);
    expect(problemsOf('', 'strata.toml')[0]).toMatchObject({
      remedy: expect.stringMatching(/\.yaml, \.yml or \.json/),
    });
  });
});

describe('a good config file', () => {
  it('needs no more than a bdev and a controller; the rest has defaults', () => {
    const folder = newFolder();
    const path = writeConfig(
      folder,
      'bdevs: [{name: d, module: uring, path: d.img}]\ncontrollers: [{name: a-name-of-24-characters, bdev: d, socket: d.sock}]\n',
    );
    expect(loadConfig(path).config).toEqual({
      reactors: [{ name: 'reactor0', mode: 'adaptive', pollUs: 100, core: undefined }],
      bdevs: [
        {
          name: 'd',
          uuid: undefined,
          module: 'uring',
          path: join(folder, 'd.img'),
          readOnly: false,
          create: null,
          blockSizeBytes: null,
          direct: true,
          iopoll: false,
          fixedBuffers: false,
          lock: true,
        },
      ],
      controllers: [
        {
          name: 'a-name-of-24-characters',
          bdev: 'd',
          address: { socketPath: join(folder, 'd.sock'), mode: 0o660 },
          serial: 'a-name-of-24-charact',
          queues: 16,
          readOnly: false,
          writeCache: true,
          reactor: null,
          isolate: false,
          targets: [],
          allow: null,
          socketGroup: null,
          handshakeTimeoutS: 60,
        },
      ],
      metrics: { host: '127.0.0.1', port: 9464 },
      rpc: null,
      log: { level: 'info', format: 'auto' },
      drainTimeoutS: 10,
      coreDumps: false,
      stateDir: null,
    });
  });

  it('reaches every module with all its settings', () => {
    const text = `
bdevs:
  - {name: n, module: null, size: 1GiB, block_size: 4096, read_zeroes: true}
  - {name: m, module: malloc, size: 64KiB}
  - name: u
    module: uring
    uuid: 123e4567-e89b-42d3-a456-426614174000
    path: /dev/vdb
    read_only: true
    create: 1TiB
    block_size: 512
    direct: false
    iopoll: true
    fixed_buffers: true
    lock: false
  - {name: p, module: passthru, base: n}
  - {name: d, module: delay, base: p, read_us: 1, write_us: 2, flush_us: 3, discard_us: 4, jitter_us: 5.5}
  - name: e
    module: error
    base: m
    rules:
      - {type: write_zeroes, action: no_space}
      - {type: read, action: fail, first: 2, count: 3, errno: 5, from_offset: 4KiB, to_offset: 8KiB, probability: 0.5}
  - name: q
    module: qos
    base: d
    group: gold
    read_iops: 1
    write_iops: 2
    total_iops: 3
    read_bytes_per_second: 1KiB
    write_bytes_per_second: 2KiB
    total_bytes_per_second: 3KiB
    burst_seconds: 0.5
controllers:
  - name: c
    bdev: q
    socket: c.sock
    socket_mode: "600"
    socket_group: kvm
    allow: {users: [libvirt-qemu, 64055], groups: [0]}
    handshake_timeout_s: 2.5
    queues: 4
    serial: ABC
    read_only: true
    write_cache: false
    isolate: true
metrics: {listen: off}
log: {level: debug, format: json}
core_dumps: true
`;
    const { config } = loadConfig(writeConfig(newFolder(), text));
    expect(config.bdevs).toMatchObject([
      { name: 'n', module: 'null', sizeBytes: 2 ** 30, blockSizeBytes: 4096, readZeroes: true },
      { name: 'm', module: 'malloc', sizeBytes: 65536, blockSizeBytes: 512 },
      {
        name: 'u',
        module: 'uring',
        uuid: '123e4567-e89b-42d3-a456-426614174000',
        path: '/dev/vdb',
        readOnly: true,
        create: { sizeBytes: 2 ** 40 },
        blockSizeBytes: 512,
        direct: false,
        iopoll: true,
        fixedBuffers: true,
        lock: false,
      },
      { name: 'p', module: 'passthru', base: 'n' },
      { name: 'd', module: 'delay', base: 'p', readUs: 1, writeUs: 2, flushUs: 3, discardUs: 4, jitterUs: 5.5 },
      {
        name: 'e',
        module: 'error',
        base: 'm',
        rules: [
          { type: 'writeZeroes', action: 'noSpace', first: 1, count: null },
          {
            type: 'read',
            action: 'fail',
            first: 2,
            count: 3,
            errno: 5,
            fromOffsetBytes: 4096,
            toOffsetBytes: 8192,
            probability: 0.5,
          },
        ],
      },
      {
        name: 'q',
        module: 'qos',
        base: 'd',
        group: 'gold',
        readIops: 1,
        writeIops: 2,
        totalIops: 3,
        readBytesPerSecond: 1024,
        writeBytesPerSecond: 2048,
        totalBytesPerSecond: 3072,
        burstSeconds: 0.5,
      },
    ]);
    expect(config.controllers[0]).toMatchObject({
      address: { mode: 0o600 },
      socketGroup: 'kvm',
      allow: { users: ['libvirt-qemu', 64055], groups: [0] },
      handshakeTimeoutS: 2.5,
      queues: 4,
      serial: 'ABC',
      readOnly: true,
      writeCache: false,
      isolate: true,
    });
    expect(config).toMatchObject({ metrics: null, log: { level: 'debug', format: 'json' }, coreDumps: true });
  });

  it('may be JSON, with tabs', () => {
    const text =
      '{\n\t"bdevs": [\n\t\t{"name": "d", "module": "null", "size": 4096}],\n\t"controllers": [{"name": "c", "bdev": "d", "socket": "/s"}]\n}\n';
    expect(loadConfig(writeConfig(newFolder(), text, 'c.json')).config.bdevs[0]).toMatchObject({ sizeBytes: 4096 });
  });

  it('is what the package and the documents show', () => {
    const shown = ['README.md', 'docs/configuration.md', 'docs/operations.md'].flatMap((document) => {
      const text = readFileSync(join(root, document), 'utf8');
      return [...text.matchAll(/^```yaml\n([^]*?)^```/gm)].map((match) => match[1]!);
    });
    shown.push(readFileSync(join(root, 'packaging/strata.yaml'), 'utf8'));
    expect(shown.length).toBeGreaterThanOrEqual(3);
    const folder = newFolder();
    for (const text of shown) {
      writeFileSync(join(folder, 'shown.yaml'), text);
      expect(() => loadConfig(join(folder, 'shown.yaml')), text).not.toThrow();
    }
  });
});

describe('the embedded defaults', () => {
  it('are a sparse 10 GiB file, a socket and a loopback metrics page', () => {
    const { config, source } = defaultConfig('/srv');
    expect(config.bdevs).toMatchObject([{ path: '/srv/data/disk0.img', create: { sizeBytes: 10 * 2 ** 30 } }]);
    expect(config.controllers).toMatchObject([{ address: { socketPath: '/srv/run/disk0.sock', mode: 0o660 } }]);
    expect(config.metrics).toEqual({ host: '127.0.0.1', port: 9464 });
    expect(source.locate(['metrics', 'listen'])).toEqual({ file: null, line: null, field: '--metrics' });
  });

  it('name an option where one overrides a file', () => {
    const base = { locate: () => ({ file: 'f.yaml', line: 3, field: 'x' }) };
    const source = optionSource({ 'metrics.listen': '--metrics' }, base);
    expect(source.locate(['metrics', 'listen']).field).toBe('--metrics');
    expect(source.locate(['log', 'level'])).toEqual({ file: 'f.yaml', line: 3, field: 'x' });
  });
});

describe('sizes', () => {
  it.each([
    ['0', 0],
    ['512', 512],
    [512, 512],
    ['1B', 1],
    ['64KiB', 65536],
    ['1.5 MiB', 1572864],
    ['10GiB', 10737418240],
    ['2TiB', 2199023255552],
    ['1PiB', 2 ** 50],
  ])('%s is %d bytes', (text, bytes) => {
    expect(parseSize(text)).toEqual({ value: bytes });
  });

  it.each(['', '-1', -1, '1e3', '1.3', 1.3, '0x10', '10 GiB GiB', '10gb', '10K', '9PiBs', '16PiB', null, true, NaN])(
    '%s is none',
    (input) => {
      expect(parseSize(input)).toMatchObject({ remedy: expect.stringMatching(/write/) });
    },
  );

  it('are read as they are shown', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 1023 }), fc.integer({ min: 0, max: 4 }), (count, power) => {
        const bytes = count * 1024 ** power;
        expect(parseSize(formatSize(bytes))).toEqual({ value: bytes });
      }),
    );
  });
});

describe('addresses and modes', () => {
  it.each([
    ['127.0.0.1:9464', { host: '127.0.0.1', port: 9464 }],
    ['[::1]:0', { host: '::1', port: 0 }],
    ['localhost:80', { host: 'localhost', port: 80 }],
    ['off', null],
    [false, null],
  ])('%s is an address', (text, value) => {
    expect(parseListen(text)).toEqual({ value });
  });

  it.each(['', ':80', '9464', 9464, '127.0.0.1', '::1:80', 'a b:80', '127.0.0.1:65536', null, true])(
    '%s is no address',
    (input) => {
      expect(parseListen(input)).toHaveProperty('remedy');
    },
  );

  it('modes are octal text', () => {
    expect(parseMode('0660')).toEqual({ value: 0o660 });
    expect(parseMode('600')).toEqual({ value: 0o600 });
    for (const input of [660, '66', '0999', '00660', '4755', 'rw']) expect(parseMode(input)).toHaveProperty('remedy');
  });
});

describe('suggestions', () => {
  it.each([
    ['contrlers', 'controllers'],
    ['BDEVS', 'bdevs'],
    ['sokcet', 'socket'],
    ['readonly', 'read_only'],
  ])('%s means %s', (word, meant) => {
    expect(nearest(word, ['bdevs', 'controllers', 'socket', 'read_only', 'log'])).toBe(meant);
  });

  it('are not made when nothing is near', () => {
    expect(nearest('quux', ['bdevs', 'controllers'])).toBeUndefined();
    expect(nearest('x', [])).toBeUndefined();
  });
});
