/** An image with the images behind it, which the operator trusts who asks for what the disk holds. */
import { realpathSync } from 'node:fs';
import type { ImageSpec } from './image-spec.js';
import { closeImage, openImage, resolveName } from './open-image.js';
import type { OpenImage } from './open-image.js';
import { usage } from './words.js';

const CHAIN_MAX = 200;

/** Opens what is behind an image, at least one, for reading. Throws BdevError; nothing stays open then. */
export function openBacking(image: OpenImage): OpenImage[] {
  const behind = backingSpec(image);
  if (behind !== null) return openChain(behind);
  throw usage('backing_file', `${image.file.path} has no backing file`, 'name another image');
}

/** Opens what is behind an image, if anything is. Throws BdevError; nothing stays open then. */
export function openBehind(image: OpenImage): OpenImage[] {
  const behind = backingSpec(image);
  return behind === null ? [] : openChain(behind);
}

/** Opens an image and its backing files for reading. Throws BdevError; nothing stays open then. */
export function openChain(spec: ImageSpec): OpenImage[] {
  const chain: OpenImage[] = [];
  const seen = new Set<string>();
  try {
    for (let next: ImageSpec | null = spec; next !== null;) {
      const image = openImage(next, { mode: 'read' });
      chain.push(image);
      const real = realpathSync(next.path);
      if (seen.has(real) || chain.length > CHAIN_MAX) {
        throw usage('backing_file', `the backing chain leads back to '${next.path}'`, 'give one of them another base');
      }
      seen.add(real);
      const behind = backingSpec(image);
      next = behind === null || spec.forceShare !== true ? behind : { ...behind, forceShare: true };
    }
    return chain;
  } catch (error) {
    closeChain(chain);
    throw error;
  }
}

/** What is behind an image: as it was said, or as the image says. Throws BdevError. */
function backingSpec({ spec, header }: OpenImage): ImageSpec | null {
  if (spec.backing !== undefined) return spec.backing;
  const { backingFile = null, backingFormat = null } = header ?? {};
  if (backingFile === null) return null;
  if (backingFormat === null) {
    const hint = 'say it with `rebase -u -F`: a guess could be what a guest has written';
    throw usage('backing_fmt', `${spec.path} does not say which format its backing file has`, hint);
  }
  return { path: resolveName(spec.path, backingFile), format: backingFormat };
}

export function closeChain(chain: readonly OpenImage[]): void {
  for (const image of chain) closeImage(image);
}
