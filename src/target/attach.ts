/** Lines that attach a guest to a disk, ready to paste: one snippet for each virtual machine monitor. */

export interface AttachTarget {
  /** Controller name. */
  readonly name: string;
  /** Absolute. */
  readonly socketPath: string;
}

export interface AttachLines {
  readonly monitor: 'QEMU' | 'libvirt' | 'cloud-hypervisor' | 'Firecracker' | 'crosvm';
  /** What the lines do not show and the reader needs. */
  readonly note: string;
  readonly lines: string;
}

/** Shared memory is what they all need: the daemon reads and writes the guest's own pages. */
export function attachLines({ name, socketPath }: AttachTarget): AttachLines[] {
  return [
    {
      monitor: 'QEMU',
      note: 'add a kernel or a boot disk; the guest sees /dev/vda',
      lines: [
        'qemu-system-x86_64 -machine q35,accel=kvm,memory-backend=mem -cpu host -smp 2 -m 2G \\',
        '  -object memory-backend-memfd,id=mem,size=2G,share=on \\',
        `  -chardev ${shell(`socket,id=strata-${name},path=${socketPath.replaceAll(',', ',,')},reconnect=1`)} \\`,
        `  -device vhost-user-blk-pci,chardev=strata-${name}`,
      ].join('\n'),
    },
    {
      monitor: 'libvirt',
      note: "the first element goes into <domain>, the second into <devices>; libvirt's QEMU user needs access to the socket",
      lines: [
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        '',
        "<disk type='vhostuser' device='disk'>",
        "  <driver name='qemu' type='raw'/>",
        `  <source type='unix' path='${xml(socketPath)}'/>`,
        "  <target dev='vda' bus='virtio'/>",
        '</disk>',
      ].join('\n'),
    },
    {
      monitor: 'cloud-hypervisor',
      note: 'add --kernel or --firmware',
      lines: [
        'cloud-hypervisor --cpus boot=2 --memory size=2G,shared=on \\',
        `  --disk ${shell(`vhost_user=on,socket=${socketPath},num_queues=2,queue_size=128`)}`,
      ].join('\n'),
    },
    {
      monitor: 'Firecracker',
      note: 'before InstanceStart; firecracker.sock is its API socket. Without Writeback the guest sends no flushes',
      lines: [
        'curl --unix-socket firecracker.sock -X PUT -H "Content-Type: application/json" \\',
        `  http://localhost/drives/${driveId(name)} \\`,
        `  -d ${shell(JSON.stringify({ drive_id: driveId(name), socket: socketPath, is_root_device: false, cache_type: 'Writeback' }))}`,
      ].join('\n'),
    },
    {
      monitor: 'crosvm',
      note: 'in place of --block, with the usual arguments around it',
      lines: `crosvm run --vhost-user ${shell(`block,socket=${socketPath}`)} /path/to/bzImage`,
    },
  ];
}

/** The snippets under headings. */
export function formatAttachLines(snippets: readonly AttachLines[]): string {
  return snippets.map(({ monitor, note, lines }) => `# ${monitor}: ${note}\n${lines}\n`).join('\n');
}

/** Quoted for a POSIX shell where it has to be. */
function shell(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

function xml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll("'", '&apos;');
}

/** Firecracker takes letters, digits and underscores only. */
function driveId(name: string): string {
  return name.replaceAll(/\W/g, '_');
}
