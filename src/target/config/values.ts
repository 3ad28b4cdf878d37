/** The small languages inside settings: sizes, network addresses, file modes. Each parser answers a value or what is wrong with it. */
import type { ListenAddress } from '../../vhost-user/blk-controller.js';
import type { NetworkAddress } from './config.js';

/** A value, or why there is none and what to write instead. */
export type Parsed<T> = { readonly value: T } | { readonly message: string; readonly remedy: string };

const UNITS: Readonly<Record<string, number>> = {
  '': 1,
  B: 1,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  TiB: 2 ** 40,
  PiB: 2 ** 50,
};
const SIZE_REMEDY = 'write whole bytes or a size such as 64KiB, 512MiB or 10GiB';

/** `10GiB`, `1.5MiB` or a number of bytes, as bytes. */
export function parseSize(input: unknown): Parsed<number> {
  if (typeof input !== 'number' && typeof input !== 'string') {
    return { message: `${show(input)} is not a size`, remedy: SIZE_REMEDY };
  }
  const match = /^(\d+(?:\.\d+)?)\s*([A-Za-z]*)$/.exec(String(input).trim());
  if (match === null) return { message: `${show(input)} is not a size`, remedy: SIZE_REMEDY };
  const [, digits = '', unit = ''] = match;
  const scale = UNITS[unit];
  if (scale === undefined) {
    // K, KB, kib...: which of 1000 and 1024 is meant is not for us to guess.
    const meant = Object.keys(UNITS).find((known) => known.length === 3 && known[0] === unit[0]?.toUpperCase());
    const remedy = meant === undefined ? SIZE_REMEDY : `write ${digits}${meant} (units are powers of 1024)`;
    return { message: `${show(input)} has an unknown unit`, remedy };
  }
  const bytes = Number(digits) * scale;
  if (!Number.isSafeInteger(bytes))
    return { message: `${show(input)} is not a whole number of bytes`, remedy: SIZE_REMEDY };
  return { value: bytes };
}

/** `127.0.0.1:9464` or `[::1]:9464`; `off` is null. */
export function parseListen(input: unknown): Parsed<NetworkAddress | null> {
  const remedy = 'write HOST:PORT such as 127.0.0.1:9464, or off';
  // YAML 1.1 habits: some editors turn `off` into false.
  if (input === 'off' || input === false) return { value: null };
  const match = typeof input === 'string' ? /^(?:\[([0-9A-Fa-f:.]+)\]|([^:\s]+)):(\d{1,5})$/.exec(input) : null;
  const port = Number(match?.[3]);
  if (match === null || port > 65535) return { message: `${show(input)} is not an address`, remedy };
  return { value: { host: match[1] ?? match[2]!, port } };
}

/** Three octal digits with or without a leading zero, in quotes: a bare 0660 is a decimal number to YAML. */
export function parseMode(input: unknown): Parsed<number> {
  const remedy = 'write it in octal and in quotes, as "0660"';
  if (typeof input !== 'string') return { message: `${show(input)} is not a file mode`, remedy };
  if (!/^0?[0-7]{3}$/.test(input)) return { message: `${show(input)} is not a file mode`, remedy };
  return { value: parseInt(input, 8) };
}

/** Longest path of a unix socket, in bytes: sun_path of unix(7) less its end. */
export const SOCKET_PATH_MAX_BYTES = 107;

/** What is wrong with an absolute path as a socket's, or undefined. */
export function socketPathProblem(path: string): { message: string; remedy: string } | undefined {
  const bytes = Buffer.byteLength(path);
  if (bytes <= SOCKET_PATH_MAX_BYTES) return undefined;
  const message = `${path} is ${bytes} bytes long, a socket's path may have ${SOCKET_PATH_MAX_BYTES}`;
  return { message, remedy: 'choose a shorter path, as /run/strata/disk0.sock' };
}

/** `10 GiB`: the largest unit that leaves at most three digits before the point. */
export function formatSize(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number(value.toFixed(2))} ${units[unit]}`;
}

export function formatAddress(address: ListenAddress): string {
  return 'fd' in address ? `descriptor ${address.fd}` : address.socketPath;
}

/** A value as it may stand in a message. */
export function show(input: unknown): string {
  if (input === undefined) return 'nothing';
  const text = JSON.stringify(input) ?? typeof input;
  return text.length <= 60 ? text : `${text.slice(0, 57)}...`;
}
