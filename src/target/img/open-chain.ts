/** An image with the images behind it, which the operator trusts who asks for what the disk holds. */
import { realpathSync } from 'node:fs';
import { openImage, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { usage } from './words.js';

const CHAIN_MAX = 200;

/** Opens what is behind an image, at least one, for reading. Throws BdevError; nothing stays open then. */
export function openBacking({ file, header }: OpenImage): OpenImage[] {
  const { backingFile = null, backingFormat = null } = header ?? {};
  if (backingFile === null) throw usage('backing_file', `${file.path} has no backing file`, 'name another image');
  if (backingFormat === null) throw noFormat(file.path);
  return openChain(resolveName(file.path, backingFile), backingFormat, false);
}

/**
 * Opens an image and its backing files for reading.
 * @param format of the first one, or null to look at its first bytes. Throws BdevError; nothing stays open then.
 */
export function openChain(path: string, format: string | null, forceShare: boolean): OpenImage[] {
  const chain: OpenImage[] = [];
  const seen = new Set<string>();
  try {
    let next: string | null = path;
    let nextFormat = format;
    while (next !== null) {
      const image = openImage(next, nextFormat, { mode: 'read', forceShare });
      chain.push(image);
      const real = realpathSync(next);
      if (seen.has(real) || chain.length > CHAIN_MAX) {
        throw usage('backing_file', `the backing chain leads back to '${next}'`, 'give one of the images another base');
      }
      seen.add(real);
      const name: string | null = image.header?.backingFile ?? null;
      nextFormat = image.header?.backingFormat ?? null;
      if (name !== null && nextFormat === null) throw noFormat(next);
      next = name === null ? null : resolveName(next, name);
    }
    return chain;
  } catch (error) {
    closeChain(chain);
    throw error;
  }
}

function noFormat(path: string): Error {
  const hint = 'say it with `rebase -u -F`: a guess could be what a guest has written';
  return usage('backing_fmt', `${path} does not say which format its backing file has`, hint);
}

export function closeChain(chain: readonly OpenImage[]): void {
  for (const { file } of chain) file.close();
}
