/**
 * `strata-vhost-user-blk`: one disk on one socket, by the conventions that QEMU's management tools expect of a vhost-user back-end:
 * it takes a path or an inherited descriptor, stays in the foreground, and ends on SIGTERM.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { resolve } from 'node:path';
import type { AnyBdevConfig, DaemonConfig } from './config/config.js';
import { BASE_CONFIG, DEFAULT_ACCESS } from './config/defaults.js';
import { optionSource } from './config/problem.js';
import { DEFAULT_POLL_US, DEFAULT_QUEUES, DEFAULT_SOCKET_MODE, QUEUES_MAX, SERIAL_MAX_BYTES } from './config/schema.js';
import { socketPathProblem } from './config/values.js';
import { listenAddress, listenOption, modeOption, numberOption, sizeOption, switchOption } from './options.js';
import type { ListenOption } from './options.js';
import { Service, orExplain } from './service.js';
import { VERSION } from './version.js';

interface Options {
  readonly socketPath?: string;
  readonly fd?: number;
  readonly printCapabilities?: true;
  readonly blkFile?: string;
  readonly bdev?: 'null' | 'malloc';
  readonly size?: number;
  readonly readOnly: boolean;
  readonly serial: string;
  readonly numQueues: number;
  readonly blockSize?: '512' | '4096';
  readonly writeCache: boolean;
  readonly direct: boolean;
  readonly lock: 'on' | 'off' | 'running';
  readonly mode: 'adaptive' | 'busy' | 'interrupt';
  readonly pollUs: number;
  readonly core?: number;
  readonly socketMode: number;
  readonly metrics: ListenOption;
  readonly rpcSocket?: string;
}

/** As QEMU's interface description of vhost-user back-ends names them. */
const CAPABILITIES = { type: 'block', features: ['read-only', 'blk-file'] };
const NAME = 'disk';

const program = new Command('strata-vhost-user-blk')
  .description('Serves one virtual disk over vhost-user-blk.')
  .version(VERSION)
  .option('--socket-path <path>', 'listen on a unix socket there')
  .option('--fd <number>', 'use an inherited socket, listening or connected', numberOption(0, 2 ** 31 - 1))
  .option('--print-capabilities', 'print what this back-end can do, as JSON, and exit')
  .option('--blk-file <path>', 'regular file or block device to serve')
  .addOption(new Option('--bdev <module>', 'serve a disk without a file, for measurements').choices(['null', 'malloc']))
  .option('--size <size>', 'size of a --bdev, as 10GiB', sizeOption)
  .option('--read-only', 'refuse writes', false)
  .option('--serial <text>', `serial number the guest sees, at most ${SERIAL_MAX_BYTES} characters`, serialOption, '')
  .option('--num-queues <number>', 'request queues on offer', numberOption(1, QUEUES_MAX), DEFAULT_QUEUES)
  .addOption(
    new Option('--block-size <bytes>', 'sector size; by default what the file asks for').choices(['512', '4096']),
  )
  .option('--write-cache <on|off>', 'off: every write is durable when it completes', switchOption, true)
  .option('--direct <on|off>', "off: go through the host's page cache", switchOption, true)
  .addOption(
    new Option('--lock <when>', 'keep other writers out of the file; running: only while a guest uses it')
      .choices(['on', 'off', 'running'])
      .default('on'),
  )
  .addOption(
    new Option('--mode <mode>', 'how the reactor waits').choices(['adaptive', 'busy', 'interrupt']).default('adaptive'),
  )
  .option('--poll-us <number>', 'how long an adaptive reactor polls', numberOption(0, 1e9), DEFAULT_POLL_US)
  .option('--core <number>', 'core to run on', numberOption(0, 4095))
  .option('--socket-mode <mode>', 'permissions of the socket', modeOption, DEFAULT_SOCKET_MODE)
  .option('--metrics <host:port>', 'where /metrics and /healthz are served, or off', listenOption, 'off')
  .option('--rpc-socket <path>', 'control socket, see `strata rpc`')
  .action(run);

await program.parseAsync();

async function run(options: Options): Promise<void> {
  if (options.printCapabilities) {
    process.stdout.write(`${JSON.stringify(CAPABILITIES)}\n`);
    return;
  }
  const { rpcSocket } = options;
  const config: DaemonConfig = {
    ...BASE_CONFIG,
    reactors: [{ name: 'reactor0', mode: options.mode, pollUs: options.pollUs, core: options.core }],
    bdevs: [bdevOf(options)],
    controllers: [
      {
        name: NAME,
        bdev: NAME,
        address: addressOf(options),
        serial: options.serial,
        queues: options.numQueues,
        readOnly: options.readOnly,
        writeCache: options.writeCache,
        reactor: null,
        isolate: false,
        targets: [],
        ...DEFAULT_ACCESS,
      },
    ],
    metrics: listenAddress(options.metrics),
    rpc: rpcSocket === undefined ? null : { socketPath: resolve(rpcSocket), mode: options.socketMode },
  };
  const source = optionSource({
    'metrics.listen': '--metrics',
    'rpc.socket': '--rpc-socket',
    'reactors[0].core': '--core',
    'bdevs[0].path': '--blk-file',
    'bdevs[0].block_size': '--block-size',
    'bdevs[0].direct': '--direct',
    'controllers[0].socket': options.fd === undefined ? '--socket-path' : '--fd',
  });
  await orExplain(() => new Service(config, source).run(() => undefined));
}

function addressOf({ socketPath, fd, socketMode }: Options): DaemonConfig['controllers'][number]['address'] {
  if ((socketPath === undefined) === (fd === undefined)) {
    program.error('error: give exactly one of --socket-path and --fd');
  }
  if (socketPath === undefined) return { fd: fd! };
  const path = resolve(socketPath);
  const problem = socketPathProblem(path);
  if (problem !== undefined) program.error(`error: --socket-path: ${problem.message}\n    -> ${problem.remedy}`);
  return { socketPath: path, mode: socketMode };
}

function bdevOf({ blkFile, bdev, size, readOnly, blockSize, direct, lock }: Options): AnyBdevConfig {
  if ((blkFile === undefined) === (bdev === undefined))
    program.error('error: give exactly one of --blk-file and --bdev');
  if ((bdev === undefined) !== (size === undefined)) program.error('error: --bdev and --size go together');
  const blockSizeBytes = blockSize === undefined ? null : blockSize === '512' ? 512 : 4096;
  const memory = { name: NAME, sizeBytes: size ?? 0, blockSizeBytes: blockSizeBytes ?? 512 } as const;
  if (bdev === 'null') return { ...memory, module: 'null', readZeroes: false };
  if (bdev === 'malloc') return { ...memory, module: 'malloc' };
  return {
    name: NAME,
    module: 'uring',
    path: resolve(blkFile!),
    readOnly,
    create: null,
    blockSizeBytes,
    direct,
    iopoll: false,
    fixedBuffers: false,
    lock: lock === 'running' ? lock : lock === 'on',
  };
}

function serialOption(text: string): string {
  if (/^[\x20-\x7e]*$/.test(text) && text.length <= SERIAL_MAX_BYTES) return text;
  throw new InvalidArgumentError(`Use at most ${SERIAL_MAX_BYTES} printable ASCII characters.`);
}
