/** A client that connects to a socket as another user: a process of its own that gives up its identity first, which takes root. */
import { spawn } from 'node:child_process';

export interface Identity {
  readonly uid: number;
  readonly gid: number;
  readonly groups?: readonly number[];
}

/** Whether this process can run as somebody else. */
export const canBeOthers = process.geteuid!() === 0;

const CLIENT = `
const { connect } = require('node:net');
const { identity, path, hello } = JSON.parse(process.argv[1]);
process.setgroups(identity.groups ?? []);
process.setgid(identity.gid);
process.setuid(identity.uid);
const end = (what) => { console.log(what); process.exit(); };
const socket = connect(path, () => socket.write(Buffer.from(hello, 'hex')));
socket.on('error', ({ code }) => end(code === 'ECONNRESET' || code === 'EPIPE' ? 'closed' : code));
socket.on('data', () => end('answered'));
socket.on('close', () => end('closed'));
`;

/** Connects and says `hello`. Resolves with `answered`, `closed`, or the error of connect(2). */
export function connectAs(identity: Identity, path: string, hello: Uint8Array): Promise<string> {
  const argument = JSON.stringify({ identity, path, hello: Buffer.from(hello).toString('hex') });
  const child = spawn(process.execPath, ['-e', CLIENT, argument], { stdio: ['ignore', 'pipe', 'inherit'] });
  let output = '';
  child.stdout.on('data', (data: Buffer) => (output += data.toString()));
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', () => resolve(output.trim()));
  });
}
