/**
 * Goal: the control socket speaks JSON-RPC 2.0 as SPDK's clients expect it, answers every mistake with what is wrong and what to do,
 * is bounded against clients that are none, and what it changes is changed.
 *
 * Method: the framing against any cut of its bytes; the compiled programs, asked over the socket as SPDK's rpc.py does it and by
 * `strata rpc`.
 */
import fc from 'fast-check';
import { mkdirSync, statSync, truncateSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { FramingError, JsonFrames } from '../../src/target/rpc/json-frames.js';
import { METHODS } from '../../src/target/rpc/methods.js';
import { callRpc, parseParamWords } from '../../src/target/rpc/rpc-client.js';
import type { RpcResponse } from '../../src/target/rpc/rpc-client.js';
import { seed } from '../support/seed.js';
import { Program, STRATA, newFolder, runToEnd, until, writeConfig } from './programs.js';

const MIB = 2 ** 20;
const CONFIG = `
bdevs:
  - {name: file, module: uring, path: disk.img, create: 16MiB}
  - {name: limited, module: qos, base: file}
  - {name: nothing, module: "null", size: 16MiB}
  - {name: memory, module: malloc, size: 16MiB, block_size: 4096}
controllers:
  - {name: vm, bdev: limited, socket: vm.sock}
  - {name: other, bdev: nothing, socket: other.sock, read_only: true}
metrics: {listen: "127.0.0.1:0"}
rpc: {socket: control.sock}
`;

async function serve(config = CONFIG): Promise<{ folder: string; socket: string; program: Program }> {
  const folder = newFolder();
  const program = await Program.serving(STRATA, ['serve', '--config', writeConfig(folder, config)], folder);
  return { folder, socket: join(folder, 'control.sock'), program };
}

const call = async (socket: string, method: string, params: Record<string, unknown> = {}): Promise<unknown> => {
  const response = await callRpc(socket, method, params);
  if ('error' in response) throw new Error(`${response.error.code}: ${response.error.message}`);
  return response.result;
};

/** Sends bytes in these pieces and returns all that comes back, up to `count` responses or the end. */
async function exchange(
  socketPath: string,
  pieces: readonly (string | Buffer)[],
  count: number,
): Promise<RpcResponse[]> {
  const socket = connect(socketPath);
  const frames = new JsonFrames(MIB);
  const responses: RpcResponse[] = [];
  await new Promise<void>((resolve) => {
    socket.on('data', (data: Buffer) => {
      responses.push(...frames.push(data).map((text) => JSON.parse(text) as RpcResponse));
      if (responses.length >= count) resolve();
    });
    // A connection that is ended with some of what was sent unread is reset.
    socket.on('error', () => undefined);
    socket.on('close', () => resolve());
    for (const piece of pieces) socket.write(piece);
  });
  socket.destroy();
  return responses;
}

describe('frames', () => {
  it('are the objects of a stream, wherever it is cut and whatever is in their texts', () => {
    const text = fc.oneof(fc.string({ unit: 'binary' }), fc.constantFrom('}{', '\\"', '"]}', '\\\\', '\u{1f600}'));
    const value = fc.dictionary(text, fc.oneof(text, fc.array(text), fc.dictionary(text, text)));
    const property = fc.property(
      fc.array(value, { maxLength: 5 }),
      fc.constantFrom('', ' ', '\n', '\r\n\t'),
      fc.infiniteStream(fc.integer({ min: 1, max: 9 })),
      (values, between, cuts) => {
        // Texts are compared, not values: JSON.parse of Node 24 confuses keys with escapes in them.
        const texts = values.map((one) => JSON.stringify(one));
        const bytes = Buffer.from(texts.map((one) => between + one).join('') + between);
        const frames = new JsonFrames(1e6);
        const found: string[] = [];
        for (let at = 0; at < bytes.length;) {
          const length = cuts.next().value as number;
          found.push(...frames.push(bytes.subarray(at, at + length)));
          at += length;
        }
        expect(found).toEqual(texts);
      },
    );
    fc.assert(property, { seed, numRuns: 300 });
  });

  it('are bounded, and nothing else', () => {
    expect(new JsonFrames(10).push(Buffer.from('{"a": 123}'))).toHaveLength(1);
    expect(() => new JsonFrames(10).push(Buffer.from('{"a": 1234}'))).toThrow(FramingError);
    const frames = new JsonFrames(10);
    for (let i = 0; i < 10; i++) frames.push(Buffer.from('{'));
    expect(() => frames.push(Buffer.from('{'))).toThrow(FramingError);
    for (const text of ['1', '"a"', 'null', '}', 'GET / HTTP/1.1']) {
      expect(() => new JsonFrames(10).push(Buffer.from(text))).toThrow(FramingError);
    }
  });
});

describe('parameters on the command line', () => {
  it('are one JSON object, or words', () => {
    expect(parseParamWords([])).toEqual({});
    expect(parseParamWords(['{"a": [1]}'])).toEqual({ a: [1] });
    expect(parseParamWords(['name=vm1', 'size=10', 'new_size=20GiB', 'on=true', 'x=a=b'])).toEqual({
      name: 'vm1',
      size: 10,
      new_size: '20GiB',
      on: true,
      x: 'a=b',
    });
    for (const words of [['vm1'], ['=1'], ['{"a":']]) expect(() => parseParamWords(words)).toThrow();
  });
});

describe('the control socket', () => {
  it('has its mode, is there when the daemon serves, and gone when it has ended', async () => {
    const { socket, program } = await serve();
    expect(statSync(socket).mode & 0o7777).toBe(0o660);
    expect(await call(socket, 'rpc_get_methods')).toEqual(METHODS.map(({ name }) => name));
    expect((await program.stop()).exitCode).toBe(0);
    expect(() => statSync(socket)).toThrow('ENOENT');
  });

  it('speaks of bdevs and controllers in the words of SPDK', async () => {
    const { folder, socket } = await serve();
    const bdevs = (await call(socket, 'bdev_get_bdevs')) as Record<string, unknown>[];
    expect(bdevs.map(({ name }) => name)).toEqual(['file', 'limited', 'nothing', 'memory']);
    expect(await call(socket, 'bdev_get_bdevs', { name: 'file' })).toEqual([
      expect.objectContaining({
        name: 'file',
        block_size: 512,
        num_blocks: 32768,
        claimed: true,
        claimed_by: 'limited',
        supported_io_types: { read: true, write: true, unmap: true, flush: true, reset: false, write_zeroes: true },
        driver_specific: { uring: expect.objectContaining({ path: join(folder, 'disk.img') }) as unknown },
      }),
    ]);
    expect(await call(socket, 'vhost_get_controllers', { name: 'other' })).toEqual([
      expect.objectContaining({
        ctrlr: 'other',
        socket: join(folder, 'other.sock'),
        backend_specific: { block: { readonly: true, bdev: 'nothing', transport: 'vhost_user_blk' } },
        state: 'listening',
      }),
    ]);
  });

  it('answers in order what comes in one piece, and nothing to what has no id', async () => {
    const { socket } = await serve();
    const request = (id: unknown, method: string): string => JSON.stringify({ jsonrpc: '2.0', id, method }, null, 2);
    const silent = JSON.stringify({ jsonrpc: '2.0', method: 'rpc_get_methods' });
    const all = [request(1, 'rpc_get_methods'), silent, request('two', 'nonsense'), request(3, 'bdev_get_bdevs')];
    const responses = await exchange(socket, [all.join('\n')], 3);
    expect(responses.map((response) => (response as unknown as { id: unknown }).id)).toEqual([1, 'two', 3]);
  });

  it.each<[string, string, Record<string, unknown>, number, string]>([
    ['a method that is none', 'bdev_get_bdev', {}, -32601, 'did you mean `bdev_get_bdevs`?'],
    [
      'a parameter that is none',
      'bdev_resize',
      { nam: 'file', new_size: 1 },
      -32602,
      'nam: is an unknown key -> did you mean `name`?',
    ],
    ['a parameter too few', 'bdev_resize', { name: 'file' }, -32602, 'new_size: is missing -> add it'],
    ['a parameter of another kind', 'bdev_resize', { name: 7, new_size: 1 }, -32602, 'name: is 7, a number'],
    ['a size that is none', 'bdev_resize', { name: 'file', new_size: '10GB' }, -32602, 'write 10GiB'],
    [
      'a bdev that is none',
      'bdev_resize',
      { name: 'fil', new_size: 1 },
      -19,
      'name: there is no bdev fil -> did you mean `file`?',
    ],
    ['a controller that is none', 'vhost_get_controllers', { name: 'x' }, -19, 'use one of: vm, other'],
    [
      'a size that shrinks the disk',
      'bdev_resize',
      { name: 'file', new_size: '8MiB' },
      -22,
      'new_size: the disk is in use',
    ],
    [
      'a size of half a block',
      'bdev_resize',
      { name: 'memory', new_size: 17 * MIB + 512 },
      -22,
      'choose a multiple of 4096',
    ],
    ['another module', 'bdev_uring_rescan', { name: 'nothing' }, -22, 'is of module null, not uring'],
  ])('says what is wrong with %s', async (_what, method, params, code, words) => {
    const { socket } = await serve();
    const response = await callRpc(socket, method, params);
    if (!('error' in response)) throw new Error('it was accepted');
    expect(response.error.code).toBe(code);
    expect(response.error.message).toContain(words);
    expect(response.error.data!.every(({ remedy }) => remedy !== '')).toBe(true);
    // And the daemon goes on.
    expect(await call(socket, 'rpc_get_methods')).toBeInstanceOf(Array);
  });

  it('ends the connection of a client that is none, and serves the next', async () => {
    const { socket } = await serve();
    const wrong = [
      'GET / HTTP/1.1\r\n\r\n',
      `{"x": "${'y'.repeat(300 * 1024)}"}`,
      '['.repeat(300 * 1024),
      Buffer.alloc(64, 0xff),
    ];
    for (const bytes of wrong) {
      const [response, ...more] = await exchange(socket, [bytes], 2);
      expect(response).toMatchObject({ id: null, error: { code: -32700 } });
      expect(more).toEqual([]);
    }
    for (const text of [
      '[]',
      '{}',
      '{"jsonrpc": "1.0", "id": 1, "method": "x"}',
      '{"jsonrpc":"2.0","id":1,"method":3}',
    ]) {
      expect((await exchange(socket, [text], 1))[0]).toMatchObject({ error: { code: -32600 } });
    }
    expect((await exchange(socket, ['{"jsonrpc": }'], 1))[0]).toMatchObject({ error: { code: -32700 } });
    expect(await call(socket, 'rpc_get_methods')).toBeInstanceOf(Array);
  });

  it('makes disks larger: file, filters above it, memory, nothing; the metrics and the log say so', async () => {
    const { folder, socket, program } = await serve();
    const blocks = async (): Promise<Record<string, number>> => {
      const bdevs = (await call(socket, 'bdev_get_bdevs')) as { name: string; num_blocks: number }[];
      return Object.fromEntries(bdevs.map(({ name, num_blocks: count }) => [name, count]));
    };
    expect(await call(socket, 'bdev_resize', { name: 'limited', new_size: '24MiB' })).toBe(true);
    expect(statSync(join(folder, 'disk.img')).size).toBe(24 * MIB);
    truncateSync(join(folder, 'disk.img'), 32 * MIB);
    expect(await call(socket, 'bdev_uring_rescan', { name: 'file' })).toBe(true);
    expect(await call(socket, 'bdev_null_resize', { name: 'nothing', new_size: 17 })).toBe(true);
    expect(await call(socket, 'bdev_resize', { name: 'memory', new_size: 20 * MIB })).toBe(true);
    expect(await blocks()).toEqual({ file: 65536, limited: 65536, nothing: 34816, memory: 5120 });
    const metrics = await (await fetch(`${await program.url()}/metrics`)).text();
    expect(metrics).toContain(`strata_bdev_size_bytes{bdev="limited"} ${32 * MIB}`);
    expect(program.log.filter(({ message }) => message === 'resized').map(({ bdev }) => bdev)).toEqual([
      ...['file', 'limited', 'file', 'limited', 'nothing', 'memory'],
    ]);
    // A file that was cut under a disk in use is not taken for its size.
    truncateSync(join(folder, 'disk.img'), 8 * MIB);
    await expect(call(socket, 'bdev_uring_rescan', { name: 'file' })).rejects.toThrow('cannot shrink');
    expect((await blocks())['file']).toBe(65536);
  });

  it('that cannot be had keeps the daemon from starting, and nothing is left', () => {
    const folder = newFolder();
    mkdirSync(join(folder, 'control.sock'));
    const ended = runToEnd(STRATA, ['serve', '--config', writeConfig(folder, CONFIG)], folder);
    expect(ended.exitCode).toBe(1);
    expect(ended.stderr).toContain('rpc.socket');
    expect(ended.stderr).toContain('exists and is not a socket');
    const same = writeConfig(folder, CONFIG.replace('control.sock', 'vm.sock'));
    expect(runToEnd(STRATA, ['check-config', same], folder).stderr).toContain('is the socket of controllers[0] too');
  });
});

describe('strata rpc', () => {
  it('prints the result, and the problems with exit code 1', async () => {
    const { folder, socket } = await serve();
    const run = (...args: string[]): ReturnType<typeof runToEnd> =>
      runToEnd(STRATA, ['rpc', '-s', socket, ...args], folder);
    expect(JSON.parse(run('bdev_get_bdevs', 'name=nothing').stdout)).toMatchObject([{ name: 'nothing' }]);
    expect(run('bdev_resize', 'name=nothing', 'new_size=1GiB')).toMatchObject({ exitCode: 0, stdout: 'true\n' });
    expect(run('bdev_resize', '{"name": "nothin", "new_size": 1}')).toMatchObject({
      exitCode: 1,
      stdout: '',
      stderr: 'name: there is no bdev nothin\n    -> did you mean `nothing`?\n',
    });
    const json = run('-o', 'json', 'bdev_resize', 'name=nothing');
    expect(JSON.parse(json.stdout)).toMatchObject({ error: { code: -32602, data: [{ field: 'new_size' }] } });
    expect(run('bdev_resize', 'nonsense').stderr).toContain('write key=value');
  });

  it('says when there is no daemon, and lists the methods', () => {
    const folder = newFolder();
    expect(runToEnd(STRATA, ['rpc', '-s', 'none.sock', 'x'], folder).stderr).toContain(
      'no daemon listens on none.sock',
    );
    expect(runToEnd(STRATA, ['rpc', '--help'], folder).stdout).toContain('bdev_resize');
  });

  it('finds the socket of a daemon on the embedded defaults', async () => {
    const folder = newFolder();
    await Program.serving(STRATA, ['serve', '--metrics', 'off'], folder);
    const answer = await until(
      'an answer',
      () => runToEnd(STRATA, ['rpc', 'vhost_get_controllers'], folder).stdout || undefined,
    );
    expect(JSON.parse(answer)).toMatchObject([{ ctrlr: 'disk0' }]);
  });
});
