/** Values of command-line options, checked where they are parsed: commander names the option and exits with 1. */
import { InvalidArgumentError } from 'commander';
import type { NetworkAddress } from './config/config.js';
import { parseListen, parseMode, parseSize } from './config/values.js';
import type { Parsed } from './config/values.js';

/** Where the metrics page is to be. commander would turn a null into an empty text. */
export type ListenOption = NetworkAddress | 'off';

export const listenOption = (text: string): ListenOption => valueOf(parseListen(text)) ?? 'off';
export const modeOption = (text: string): number => valueOf(parseMode(text));
export const sizeOption = (text: string): number => valueOf(parseSize(text));

/** A parser of whole numbers within bounds. */
export function numberOption(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (/^\d+$/.test(text) && value >= least && value <= most) return value;
    throw new InvalidArgumentError(`Write a whole number from ${least} to ${most}.`);
  };
}

/** `on` and `off`. */
export function switchOption(text: string): boolean {
  if (text === 'on' || text === 'off') return text === 'on';
  throw new InvalidArgumentError('Write on or off.');
}

function valueOf<T>(parsed: Parsed<T>): T {
  if ('value' in parsed) return parsed.value;
  throw new InvalidArgumentError(`${parsed.message}: ${parsed.remedy}.`);
}

/** What an option of the metrics page means to a config. */
export function listenAddress(option: ListenOption): NetworkAddress | null {
  return option === 'off' ? null : option;
}
