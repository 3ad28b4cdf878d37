/**
 * Goal: a live daemon shrugs off a short campaign of hostile messages and rings, and the campaign would notice if it did not.
 *
 * Method: the fuzzer itself, for a while, from a seed that is printed; then what it must notice is done to it by hand. The long form is
 * `npm run fuzz`.
 */
import { tmpdir } from 'node:os';
import { describe, expect, it } from 'vitest';
import { Arena } from '../../native/index.js';
import { seed, seededRandom } from '../support/seed.js';
import { AttackMemory } from './attack-memory.js';
import { Campaign } from './campaign.js';
import { Finding } from './finding.js';

const CASES = 50_000;
/** On a slow machine it is fewer, but so many attacks in any case. */
const LONGEST_MS = 12_000;
const ATTACKS_MIN = 60;
const TIMEOUT_MS = 180_000;

function start(): Promise<Campaign> {
  return Campaign.start({ seed: seed & 0x7fffffff, kind: 'all', dir: tmpdir(), first: 0 });
}

describe('a daemon under attack', () => {
  it(
    'answers, serves others, and lets everything go',
    async () => {
      const campaign = await start();
      try {
        const endMs = performance.now() + LONGEST_MS;
        await campaign.run(CASES, () => campaign.attacks >= ATTACKS_MIN && performance.now() > endMs);
      } finally {
        await campaign.close();
      }
      const {
        ringCases,
        messageCases,
        audits,
        goodSessions,
        queueFaults,
        sessionFaults,
        rings,
        witnessBlocksVerified,
      } = campaign.report();
      expect(ringCases).toBeGreaterThan(100);
      expect(messageCases).toBeGreaterThan(100);
      expect(audits).toBeGreaterThan(0);
      expect(goodSessions).toBeGreaterThan(4);
      expect(queueFaults).toBeGreaterThan(50);
      expect(sessionFaults).toBeGreaterThan(10);
      expect(rings.lawful).toBeGreaterThan(50);
      expect(witnessBlocksVerified).toBeGreaterThan(4000);
    },
    TIMEOUT_MS,
  );
});

describe('the campaign', () => {
  it.each([
    ['the daemon', 0],
    ['the process of an isolated disk', 1],
  ] as const)(
    'notices when %s is gone',
    async (_what, which) => {
      const campaign = await start();
      try {
        process.kill(campaign.pids[which], 'SIGABRT');
        await expect(campaign.run(Infinity, () => false)).rejects.toMatchObject({ name: 'Finding', kind: 'crash' });
      } finally {
        await campaign.close();
      }
    },
    TIMEOUT_MS,
  );

  it('notices a byte that is written where nobody may write', () => {
    const arena = new Arena(2 ** 31);
    const memory = new AttackMemory(arena);
    memory.fill(seededRandom(1));
    for (const region of memory.regions) {
      const { live, mmapOffset, sizeBytes, guestAddress } = region;
      const last = mmapOffset + sizeBytes - 1;
      memory.snapshot();
      live[last]! ^= 1;
      expect(() => memory.verify(false), region.name).toThrow(Finding);
      memory.allow(guestAddress + sizeBytes - 1, 1);
      expect(() => memory.verify(false)).not.toThrow();
      // A range that goes beyond its region is nobody's to write, not even where it is memory.
      memory.snapshot();
      if (region !== memory.left) {
        live[last]! ^= 1;
        memory.allow(guestAddress + sizeBytes - 1, 2);
        expect(() => memory.verify(false), region.name).toThrow(Finding);
        live[last]! ^= 1;
      }
      // What lies in the file beside the region is guarded whatever the descriptors say.
      if (last + 1 < live.length) {
        memory.snapshot();
        live[last + 1]! ^= 1;
        expect(() => memory.verify(true), region.name).toThrow(Finding);
      }
    }
  });
});
