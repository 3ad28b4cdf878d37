/** `strata`: the daemon that serves many disks, and the commands around it. */
import { Command, Option } from 'commander';
import { accessSync, constants, existsSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { attachLines, formatAttachLines } from './attach.js';
import type { AttachLines } from './attach.js';
import type { ControllerConfig, DaemonConfig } from './config/config.js';
import { DEFAULT_DISK_PATH, DEFAULT_RPC_SOCKET, SERVICE_RPC_SOCKET, defaultConfig } from './config/defaults.js';
import { loadConfig } from './config/load.js';
import type { LoadedConfig } from './config/load.js';
import { ConfigError, optionSource } from './config/problem.js';
import { planReactors } from './config/stacks.js';
import { suggest } from './config/suggest.js';
import { formatSize } from './config/values.js';
import { examine, formatFindings } from './doctor.js';
import { listenAddress, listenOption } from './options.js';
import type { ListenOption } from './options.js';
import { METHODS } from './rpc/methods.js';
import { callRpc, parseParamWords } from './rpc/rpc-client.js';
import type { RpcResponse } from './rpc/rpc-client.js';
import { Service, orExplain } from './service.js';
import type { Announcement } from './service.js';
import { makeFolder } from './socket-path.js';
import { VERSION } from './version.js';

type Output = 'text' | 'json';

interface ServeOptions {
  readonly config?: string;
  readonly metrics?: ListenOption;
  readonly output: Output;
}

const outputOption = () =>
  new Option('-o, --output <format>', 'how to print').choices(['text', 'json']).default('text');

const program = new Command('strata')
  .description('Serves virtual disks to virtual machines over vhost-user-blk.')
  .version(VERSION);

program
  .command('serve')
  .description('serve the disks of a config file, or one sparse 10 GiB disk below the current folder')
  .option('-c, --config <file>', 'YAML or JSON, see docs/configuration.md')
  .option('--metrics <host:port>', 'where /metrics and /healthz are served, or off', listenOption)
  .addOption(outputOption())
  .action(serve);

program
  .command('check-config')
  .description('say what is wrong with a config file, or what it would serve')
  .argument('<file>')
  .addOption(outputOption())
  .action(checkConfig);

program
  .command('attach')
  .description('print the lines that attach a guest to a disk')
  .argument('[name]', 'name of a controller')
  .option('-c, --config <file>', 'the config file it is defined in')
  .addOption(outputOption())
  .action(attach);

program
  .command('doctor')
  .description('look for what this host lacks; exits with 1 when the daemon cannot run')
  .addOption(outputOption())
  .action(doctor);

program
  .command('rpc')
  .description('ask a running daemon, or tell it to do something, by JSON-RPC')
  .argument('<method>', 'see the list below')
  .argument('[params...]', 'key=value, or one JSON object in quotes')
  .option('-s, --socket <path>', `control socket; by default ${DEFAULT_RPC_SOCKET} or ${SERVICE_RPC_SOCKET}`)
  .addOption(outputOption())
  .addHelpText(
    'after',
    `\nMethods:\n${METHODS.map(({ name, summary }) => `  ${name.padEnd(24)}${summary}`).join('\n')}`,
  )
  .action(rpc);

// The program itself goes to img/img.ts, which is loaded instead of this file.
program.command('img').description('make, check and convert images, as qemu-img does: see `strata img --help`');

await program.parseAsync();

async function serve(options: ServeOptions): Promise<void> {
  const { config, source } = await explained(options.output, () => loadOrDefault(options.config));
  const overridden: DaemonConfig =
    options.metrics === undefined ? config : { ...config, metrics: listenAddress(options.metrics) };
  const places = options.metrics === undefined ? source : optionSource({ 'metrics.listen': '--metrics' }, source);
  await explained(options.output, async () => {
    if (options.config === undefined) makeDefaultFolder(dirname(resolve(DEFAULT_DISK_PATH)));
    await new Service(overridden, places).run((announcement) => announce(announcement, options.output));
  });
}

/** The folder of the default disk; those of a config file lie where their owner has made room for them. Throws ConfigError. */
function makeDefaultFolder(path: string): void {
  try {
    makeFolder(path);
    accessSync(`${path}/.`, constants.W_OK | constants.X_OK);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const remedy = 'run it in a folder of this user, or name a config file with --config';
    throw new ConfigError([{ file: null, line: null, field: path, message: `cannot be used: ${code}`, remedy }]);
  }
}

async function checkConfig(file: string, options: { readonly output: Output }): Promise<void> {
  const { config } = await explained(options.output, () => loadConfig(file));
  const reactors = planReactors(config).map(({ reactor, bdevs, controllers }) => ({
    name: reactor.name,
    bdevs: bdevs.map((bdev) => bdev.name),
    controllers: controllers.map((controller) => controller.name),
  }));
  if (options.output === 'json') {
    printJson({ file, reactors });
    return;
  }
  print(`${file} is good\n`);
  for (const { name, bdevs, controllers } of reactors) {
    print(`  ${name}: bdevs ${bdevs.join(', ') || 'none'}; controllers ${controllers.join(', ') || 'none'}\n`);
  }
}

async function attach(
  name: string | undefined,
  options: { readonly config?: string; readonly output: Output },
): Promise<void> {
  const { config } = await explained(options.output, () => loadOrDefault(options.config));
  const names = config.controllers.map((controller) => controller.name);
  const wanted = name ?? (names.length === 1 ? names[0] : undefined);
  const controller = config.controllers.find((candidate) => candidate.name === wanted);
  if (controller === undefined) {
    const message = name === undefined ? `which of ${names.join(', ')}?` : `there is no controller ${name}`;
    return program.error(`strata attach: ${message}\n    -> ${suggest(name ?? '', names, 'controller')}`);
  }
  const snippets = snippetsFor(controller);
  if (options.output === 'json') printJson(Object.fromEntries(snippets.map(({ monitor, lines }) => [monitor, lines])));
  else print(formatAttachLines(snippets));
}

function doctor(options: { readonly output: Output }): void {
  const findings = examine(process.cwd());
  if (options.output === 'json') printJson({ version: VERSION, findings });
  else print(formatFindings(findings));
  if (findings.some(({ verdict }) => verdict === 'fail')) process.exitCode = 1;
}

async function rpc(
  method: string,
  words: readonly string[],
  options: { readonly socket?: string; readonly output: Output },
): Promise<void> {
  const socketPath = options.socket ?? (existsSync(DEFAULT_RPC_SOCKET) ? DEFAULT_RPC_SOCKET : SERVICE_RPC_SOCKET);
  let response: RpcResponse;
  try {
    response = await callRpc(socketPath, method, parseParamWords(words));
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const isAway = code === 'ENOENT' || code === 'ECONNREFUSED';
    const what = isAway ? `no daemon listens on ${socketPath}` : message;
    const remedy = isAway ? 'start it with `rpc.socket` in its config, or name the socket with --socket' : 'try --help';
    return program.error(`strata rpc: ${what}\n    -> ${remedy}`);
  }
  if ('result' in response) {
    printJson(response.result);
    return;
  }
  if (options.output === 'json') printJson({ error: response.error });
  for (const { field, message, remedy } of response.error.data ?? []) {
    process.stderr.write(`${field === '' ? '' : `${field}: `}${message}\n    -> ${remedy}\n`);
  }
  process.exitCode = 1;
}

function loadOrDefault(file: string | undefined): LoadedConfig {
  return file === undefined ? defaultConfig(process.cwd()) : loadConfig(resolve(file));
}

function announce({ daemon, httpUrl }: Announcement, output: Output): void {
  const disks = daemon.controllers.map(({ config }) => {
    const bdev = daemon.bdevs.find(({ name }) => name === config.bdev)!;
    const { module, sizeBytes, blockSizeBytes } = bdev;
    const socket = 'socketPath' in config.address ? config.address.socketPath : null;
    return { name: config.name, bdev: config.bdev, module, sizeBytes, blockSizeBytes, socket };
  });
  if (output === 'json') {
    printJson({ status: 'serving', pid: process.pid, version: VERSION, http: httpUrl, disks });
    return;
  }
  print(`strata ${VERSION} serves\n\n`);
  for (const { name, module, sizeBytes, socket } of disks) {
    print(`  ${name}: ${formatSize(sizeBytes)}, ${module}, ${socket}\n`);
  }
  if (httpUrl !== null) print(`  metrics: ${httpUrl}/metrics, health: ${httpUrl}/healthz\n`);
  const first = daemon.controllers[0]!.config;
  print(`\nAttach a guest to ${first.name}:\n\n`);
  print(formatAttachLines(snippetsFor(first).filter(({ monitor }) => monitor !== 'crosvm')));
  if (disks.length > 1) print('\n`strata attach NAME` prints the lines of the others.\n');
}

function snippetsFor(controller: ControllerConfig): AttachLines[] {
  const { name, address } = controller;
  return 'socketPath' in address ? attachLines({ name, socketPath: address.socketPath }) : [];
}

/** Problems of the configuration go to stderr in words, and to stdout for programs. */
async function explained<T>(output: Output, action: () => T | Promise<T>): Promise<T> {
  return orExplain(async () => {
    try {
      return await action();
    } catch (error) {
      if (error instanceof ConfigError && output === 'json') printJson({ errors: error.problems });
      throw error;
    }
  });
}

function print(text: string): void {
  process.stdout.write(text);
}

function printJson(value: unknown): void {
  print(`${JSON.stringify(value, null, 2)}\n`);
}
