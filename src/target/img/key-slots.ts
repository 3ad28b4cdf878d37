/** `encrypt.*` of amend: passphrases of an encrypted image, each in a key slot of its own. */
import type { LuksHeader } from '../../bdev/qcow2/luks/luks-format.js';
import { LUKS_DEFAULTS, addPassphrase, readLuksHeader, removePassphrase, unlockLuks } from '../../bdev/qcow2/luks.js';
import type { LuksPlace } from '../../bdev/qcow2/luks.js';
import { BdevError } from '../../bdev/bdev.js';
import { inlineKeyWork } from '../../bdev/qcow2/luks/key-work.js';
import { SystemClock } from '../../poller/clock.js';
import { runTask } from './node-file.js';
import type { NodeFile } from './node-file.js';
import type { OpenImage } from './open-image.js';
import { readSecret } from './secrets.js';
import { parseChoice, usage } from './words.js';

/** Name, what it takes, what it does. */
export const KEY_SLOT_OPTIONS: readonly (readonly [string, string, string])[] = [
  ['encrypt.state', 'str', 'active: add a passphrase; inactive: erase one'],
  ['encrypt.new-secret', 'str', 'ID of the secret to add'],
  ['encrypt.old-secret', 'str', 'ID of the secret to erase'],
  ['encrypt.keyslot', 'num', 'Key slot to erase, 0 to 7'],
  ['encrypt.iter-time', 'num', `Milliseconds that it takes to try the new one (${LUKS_DEFAULTS.iterTimeMs})`],
];

/** Throws BdevError. */
export function amendKeySlots(
  { file, key, header }: OpenImage,
  options: ReadonlyMap<string, string>,
  { object }: { readonly object: readonly string[] },
): void {
  const of = (name: string): string | undefined => options.get(`encrypt.${name}`);
  if (![...options.keys()].some((name) => name.startsWith('encrypt.'))) return;
  const place = header!.luksHeader!;
  const state = parseChoice('encrypt.state', of('state') ?? '', ['active', 'inactive']);
  const refuse = (name: string, message: string): never => {
    throw usage(`encrypt.${name}`, message, `see \`amend -o help\``);
  };
  if (state === 'active') {
    const id = of('new-secret') ?? refuse('new-secret', "'new-secret' is required to activate a keyslot");
    if (of('old-secret') !== undefined) {
      refuse('old-secret', "'old-secret' must not be given when activating keyslots");
    }
    if (of('keyslot') !== undefined) refuse('keyslot', 'the first free key slot is taken, none that is named');
    if (key === null) {
      throw usage(
        'encrypt.key-secret',
        'a passphrase of the image is needed',
        'open it with --image-opts encrypt.key-secret=',
      );
    }
    const iterTimeMs = Number(of('iter-time') ?? LUKS_DEFAULTS.iterTimeMs);
    withPassphrase(id, object, (passphrase) => {
      runTask(addPassphrase(file, place, key, passphrase, iterTimeMs, new SystemClock(), inlineKeyWork));
    });
    return;
  }
  if (of('new-secret') !== undefined) refuse('new-secret', "'new-secret' must not be given when erasing keyslots");
  const id = of('old-secret');
  const slot = of('keyslot');
  if (id !== undefined) withPassphrase(id, object, (passphrase) => erasePassphrase(file, place, passphrase));
  else if (slot !== undefined && /^[0-7]$/.test(slot)) eraseSlot(file, place, Number(slot));
  else
    refuse(
      'keyslot',
      'To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given',
    );
}

/** From all slots that it opens. Throws BdevError. */
function erasePassphrase(file: NodeFile, place: LuksPlace, passphrase: Buffer): void {
  for (let erased = 0; ; erased++) {
    try {
      const unlocked = runTask(unlockLuks(file, place, passphrase, inlineKeyWork));
      unlocked.masterKey.fill(0);
      runTask(removePassphrase(file, place, unlocked));
    } catch (error) {
      if (erased > 0 && error instanceof BdevError && error.code === 'wrong-passphrase') return;
      throw error;
    }
  }
}

function eraseSlot(file: NodeFile, place: LuksPlace, slot: number): void {
  const header: LuksHeader = runTask(readLuksHeader(file, place));
  if (!header.slots[slot]!.isActive)
    throw usage('encrypt.keyslot', `Given keyslot ${slot} is already erased (inactive)`, 'see info');
  runTask(removePassphrase(file, place, { slot }));
}

function withPassphrase(id: string, objects: readonly string[], use: (passphrase: Buffer) => void): void {
  const passphrase = readSecret(id, objects);
  try {
    use(passphrase);
  } finally {
    passphrase.fill(0);
  }
}
