/**
 * Goal: every module the config schema knows can really be served.
 *
 * Method: one daemon with a disk on a stack of all filters over each leaf; a real front-end writes and reads through it.
 */
import { expect, it } from 'vitest';
import { join } from 'node:path';
import { modules } from '../../src/bdev/modules.js';
import { configSchema } from '../../src/target/config/schema.js';
import { Frontend } from '../frontend/frontend.js';
import { Program, STRATA, newFolder, writeConfig } from './programs.js';

const LEAVES = {
  null: '{name: leaf, module: null, size: 64MiB, read_zeroes: true}',
  malloc: '{name: leaf, module: malloc, size: 64MiB}',
  uring: '{name: leaf, module: uring, path: disk.img, create: 64MiB, fixed_buffers: true}',
};

const stackOn = (leaf: string): string =>
  [
    'bdevs:',
    `  - ${leaf}`,
    '  - {name: through, module: passthru, base: leaf}',
    '  - {name: faulty, module: error, base: through, rules: [{type: write, action: fail, first: 2, count: 1}]}',
    '  - {name: slow, module: delay, base: faulty, write_us: 100}',
    '  - {name: limited, module: qos, base: slow, total_iops: 10000}',
    'controllers: [{name: vm, bdev: limited, socket: vm.sock}]',
    'metrics: {listen: off}',
  ].join('\n');

it('the schema and the list of modules name the same modules', () => {
  const options = configSchema.shape.bdevs.element.options as readonly { shape: { module: { value: string } } }[];
  expect(options.map((option) => option.shape.module.value).sort()).toEqual(modules.map(({ name }) => name).sort());
});

it.each(Object.entries(LEAVES))('a stack of every filter over %s serves a guest', async (name, leaf) => {
  const folder = newFolder();
  const program = await Program.serving(STRATA, ['serve', '--config', writeConfig(folder, stackOn(leaf))], folder);
  const frontend = await Frontend.connect(join(folder, 'vm.sock'));
  const data = Buffer.alloc(8192, 'strata');
  expect((await frontend.queue.write(16, data)).status).toBe(0);
  expect((await frontend.queue.write(16, data)).status, 'the second write is made to fail').toBe(1);
  expect((await frontend.queue.write(32, data)).status).toBe(0);
  const read = await frontend.queue.read(32, data.length);
  expect(read.status).toBe(0);
  expect(Buffer.from(read.data)).toEqual(name === 'null' ? Buffer.alloc(data.length) : data);
  frontend.close();
  expect((await program.stop()).exitCode).toBe(0);
});
