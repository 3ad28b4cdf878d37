/**
 * A real Linux guest in QEMU, run by emulation (TCG), with vhost-user-blk disks.
 *
 * The guest runs from memory (scripts/guest-image.ts) and obeys over a virtio-serial port, so its disks are wholly the
 * test's. Every failure carries the guest's console and QEMU's stderr. A Guest must be disposed; killing it is fine.
 */
import { closeSync, mkdtempSync, openSync, readSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { guestImage } from '../../scripts/guest-image.js';
import { Agent, type CommandResult } from './agent.js';
import { Child } from './child.js';
import { Monitor } from './monitor.js';

/** A disk as QEMU's vhost-user-blk-pci device sees it; what is left out is QEMU's default. */
export interface GuestDiskOptions {
  readonly socketPath: string;
  /** The daemon behind the socket, whose log then belongs to every failure message. */
  readonly backend?: { readonly log: string };
  readonly numQueues?: number;
  readonly queueSize?: number;
  readonly eventIdx?: boolean;
  readonly indirect?: boolean;
  readonly packed?: boolean;
  /** Seconds between QEMU's attempts to connect again; left out, it does not try. */
  readonly reconnectSeconds?: number;
  /** Whether QEMU offers VIRTIO_BLK_F_CONFIG_WCE to the guest. */
  readonly configWce?: boolean;
  /** More properties of the device, as `name=value`. */
  readonly extra?: readonly string[];
}

export interface GuestOptions {
  readonly disks: readonly GuestDiskOptions[];
  /** Above 2048 the machine splits its memory in two regions, the second one above 4 GiB. QEMU takes steps of 8 KiB. */
  readonly memoryMib?: number;
  readonly smp?: number;
  /** Memory that may be plugged in later: slots for it are there then. */
  readonly maxMemoryMib?: number;
  /**
   * The guest comes from another QEMU, by a socket there: see `migrated`. It has the same disks, memory and processors, and does not
   * run before `resume`.
   */
  readonly incomingPath?: string;
  /** Its root file system is that of the first disk, see `makeRootDisk`. */
  readonly rootOnDisk?: boolean;
}

/** Of `query-migrate`. */
export interface MigrationState {
  readonly status?: string;
  readonly ram?: { readonly 'dirty-sync-count': number; readonly transferred: number };
  readonly downtime?: number;
}

export interface RunOptions {
  readonly timeoutMs?: number;
}

const MIB = 2 ** 20;
const PAGE_BYTES = 4096;
const BOOT_TIMEOUT_MS = 120_000;
const RUN_TIMEOUT_MS = 60_000;
const SHUTDOWN_TIMEOUT_MS = 20_000;
const FIRST_DISK_SLOT = 0x10;

/**
 * Boots a guest and waits until it takes commands (about six seconds).
 *
 * @throws GuestSetupError when QEMU or another package is missing, Error with QEMU's stderr when the guest fails
 */
export async function bootGuest(options: GuestOptions): Promise<Guest> {
  const { kernelPath, initramfsPath } = guestImage();
  const directory = mkdtempSync(join(tmpdir(), 'strata-guest-'));
  const agentPath = join(directory, 'agent');
  const agent = await Agent.listen(agentPath);
  const { memoryMib = 768, smp = 2, maxMemoryMib, incomingPath, rootOnDisk = false } = options;
  const root = rootOnDisk ? ' strata.root' : '';
  const qmpPath = join(directory, 'qmp');
  const slots = maxMemoryMib === undefined ? '' : `,slots=4,maxmem=${maxMemoryMib}M`;
  const qemu = new Child('qemu-system-x86_64', [
    ...['-accel', 'tcg,thread=multi', '-cpu', 'max', '-smp', String(smp), '-m', `${memoryMib * 1024}K${slots}`],
    ...['-object', `memory-backend-memfd,id=memory,size=${memoryMib * 1024}K,share=on`],
    ...['-machine', 'q35,memory-backend=memory,usb=off'],
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-kernel', kernelPath, '-initrd', initramfsPath],
    ...['-append', `console=ttyS0 quiet loglevel=4 panic=-1 random.trust_cpu=on nowatchdog${root}`],
    ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
    ...['-chardev', `socket,id=agent,path=${agentPath}`, '-device', 'virtio-serial-pci,addr=0x2'],
    ...['-device', 'virtserialport,chardev=agent,name=strata.agent'],
    ...['-qmp', `unix:${qmpPath},server=on,wait=off`],
    ...(incomingPath === undefined ? [] : ['-S', '-incoming', `unix:${incomingPath}`]),
    ...options.disks.flatMap(diskArguments),
  ]);
  const guest = new Guest(qemu, agent, directory, options.disks);
  try {
    await guest.connectMonitor(qmpPath);
    if (incomingPath === undefined) await guest.findDisks();
  } catch (error) {
    await guest[Symbol.asyncDispose]();
    throw error;
  }
  return guest;
}

function diskArguments(disk: GuestDiskOptions, index: number): string[] {
  const properties = [
    `vhost-user-blk-pci,chardev=disk${index},addr=0x${(FIRST_DISK_SLOT + index).toString(16)}`,
    ...(disk.numQueues === undefined ? ['num-queues=1'] : [`num-queues=${disk.numQueues}`]),
    ...(disk.queueSize === undefined ? [] : [`queue-size=${disk.queueSize}`]),
    ...onOff('event_idx', disk.eventIdx),
    ...onOff('indirect_desc', disk.indirect),
    ...onOff('packed', disk.packed),
    ...onOff('config-wce', disk.configWce),
    ...(disk.extra ?? []),
  ];
  const reconnect = disk.reconnectSeconds === undefined ? '' : `,reconnect=${disk.reconnectSeconds}`;
  return ['-chardev', `socket,id=disk${index},path=${disk.socketPath}${reconnect}`, '-device', properties.join(',')];
}

function onOff(name: string, value: boolean | undefined): string[] {
  return value === undefined ? [] : [`${name}=${value ? 'on' : 'off'}`];
}

export class Guest implements AsyncDisposable {
  readonly #qemu: Child;
  readonly #agent: Agent;
  readonly #directory: string;
  readonly #options: readonly GuestDiskOptions[];
  #disks: readonly string[] = [];
  #monitor: Monitor | undefined;

  /** Use bootGuest. */
  constructor(qemu: Child, agent: Agent, directory: string, options: readonly GuestDiskOptions[]) {
    this.#qemu = qemu;
    this.#agent = agent;
    this.#directory = directory;
    this.#options = options;
    void qemu.exited.then(({ code, signal }) =>
      agent.abort(this.#failure(`QEMU ended (${signal ?? `exit code ${code}`})`)),
    );
  }

  /** The kernel's names of the disks (`vda`), in the order they were given to bootGuest. */
  get disks(): readonly string[] {
    return this.#disks;
  }

  /** What kernel and init wrote on the serial console. */
  get console(): string {
    return this.#qemu.stdout;
  }

  get pid(): number {
    return this.#qemu.pid;
  }

  /** Opens QEMU's monitor. Its socket is there a moment before QEMU listens on it. */
  async connectMonitor(path: string): Promise<void> {
    const deadline = performance.now() + BOOT_TIMEOUT_MS;
    while (this.#monitor === undefined) {
      if (!this.#qemu.running || performance.now() > deadline) throw this.#failure('QEMU did not start');
      try {
        this.#monitor = await Monitor.connect(path);
      } catch (error) {
        if (!['ENOENT', 'ECONNREFUSED'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
        await setTimeout(20);
      }
    }
  }

  /** Runs a command of QEMU's monitor. Throws Error with its answer when it fails. */
  async qmp(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    return this.#within(RUN_TIMEOUT_MS, `do ${command}`, this.#monitor!.execute(command, args));
  }

  /** State of the migration as QEMU tells it. */
  async migration(): Promise<MigrationState> {
    return (await this.qmp('query-migrate')) as MigrationState;
  }

  /** Waits until the migration has completed; the guest is in both then, and stopped in both. */
  async migrated(destination: Guest, timeoutMs: number): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const state = await this.migration();
      if (state.status === 'completed' && !(await destination.#isIncoming())) {
        destination.#disks = this.#disks;
        return;
      }
      if (state.status === 'failed' || performance.now() > deadline) {
        throw destination.#failure(this.#failure(`The migration is ${JSON.stringify(state)}`).message);
      }
      await setTimeout(50);
    }
  }

  /** Lets a guest that came from elsewhere run. */
  async resume(): Promise<void> {
    await this.qmp('cont');
  }

  /** Addresses of the pages whose content differs from that of the same guest in another QEMU; both are stopped. */
  differingPages(other: Guest): number[] {
    const files = [this.#openMemory(), other.#openMemory()] as const;
    try {
      const differing: number[] = [];
      const [ours, theirs] = [Buffer.alloc(MIB), Buffer.alloc(MIB)];
      for (let at = 0; ; at += MIB) {
        const length = readSync(files[0], ours, 0, MIB, at);
        if (length !== readSync(files[1], theirs, 0, MIB, at)) throw new Error('the memories differ in size');
        if (length === 0) return differing;
        if (ours.equals(theirs)) continue;
        for (let page = 0; page < length; page += PAGE_BYTES) {
          if (ours.compare(theirs, page, page + PAGE_BYTES, page, page + PAGE_BYTES) !== 0) differing.push(at + page);
        }
      }
    } finally {
      for (const fd of files) closeSync(fd);
    }
  }

  /** Waits for the guest and finds its disks by PCI slot: the kernel's naming order is not ours to rely on. */
  async findDisks(): Promise<void> {
    await this.#within(BOOT_TIMEOUT_MS, 'boot', this.#agent.ready);
    const names: string[] = [];
    for (let index = 0; index < this.#options.length; index++) {
      const slot = `/sys/bus/pci/devices/0000:00:${(FIRST_DISK_SLOT + index).toString(16)}.0`;
      names.push((await this.sh(`ls ${slot}/virtio*/block`)).trim());
    }
    this.#disks = names;
  }

  /**
   * Runs a shell script in the guest.
   *
   * @throws Error when the guest ends or does not answer in time (60 s unless told otherwise)
   */
  async run(script: string, options: RunOptions = {}): Promise<CommandResult> {
    const { timeoutMs = RUN_TIMEOUT_MS } = options;
    if (!this.#qemu.running) throw this.#failure('The guest has ended');
    return this.#within(timeoutMs, `run: ${script}`, this.#agent.request(script));
  }

  /**
   * Output of a shell script that must succeed; it stops at its first failing command.
   *
   * @throws Error with script and output when it exits with anything but 0, and as `run` does
   */
  async sh(script: string, options: RunOptions = {}): Promise<string> {
    const { code, output } = await this.run(`set -e\n${script}`, options);
    if (code !== 0) throw new Error(`Exit code ${code} in the guest from:\n${script}\n${output}`);
    return output;
  }

  /** Pulls the plug: nothing the guest holds in memory survives. */
  async kill(): Promise<void> {
    this.#qemu.kill('SIGKILL');
    await this.#qemu.exited;
  }

  /**
   * Powers the guest off; what is mounted stays as it is.
   *
   * @throws Error when QEMU has not ended by itself in time
   */
  async shutdown(): Promise<void> {
    void this.#agent.request('poweroff -f').catch(() => undefined);
    const exit = await this.#within(SHUTDOWN_TIMEOUT_MS, 'shut down', this.#qemu.exited);
    if (exit.code !== 0) throw this.#failure(`QEMU ended with ${exit.signal ?? exit.code}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#monitor?.close();
    await this.kill();
    await this.#agent[Symbol.asyncDispose]();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  /** Whether it is still on its way from another QEMU. */
  async #isIncoming(): Promise<boolean> {
    return ((await this.qmp('query-status')) as { status: string }).status === 'inmigrate';
  }

  /** Opens the file that is the guest's memory. */
  #openMemory(): number {
    const folder = `/proc/${this.pid}/fd`;
    const name = readdirSync(folder).find((fd) => linkTarget(join(folder, fd)).startsWith('/memfd:memory-backend'));
    if (name === undefined) throw this.#failure('QEMU has no memory of its guest open');
    return openSync(join(folder, name), 'r');
  }

  async #within<T>(timeoutMs: number, what: string, result: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined;
    const timeout = new Promise<never>((_resolve, reject) => {
      timer = globalThis.setTimeout(
        () => reject(this.#failure(`The guest did not ${what} within ${timeoutMs} ms`)),
        timeoutMs,
      );
    });
    try {
      return await Promise.race([result, timeout]);
    } finally {
      clearTimeout(timer);
    }
  }

  #failure(message: string): Error {
    const logs = this.#options.map(({ backend }, index) => section(`daemon of disk ${index}`, backend?.log ?? ''));
    return new Error(
      [message, section('QEMU stderr', this.#qemu.stderr), section('guest console', this.console), ...logs].join(''),
    );
  }
}

/** What a descriptor of another process is open on; nothing when it was closed meanwhile. */
function linkTarget(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}

/** The end of a log under its title; nothing when it is empty. */
function section(title: string, text: string): string {
  return text === '' ? '' : `\n--- ${title}\n${text.slice(-4000).trimEnd()}`;
}
