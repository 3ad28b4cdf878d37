/**
 * Goal: what a reader of the repository may rely on and no compiler checks: files of bearable length that say what they
 * are for, a README that starts with the two commands, documents whose links lead somewhere.
 *
 * Method: the folders of the repository are read as text.
 */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const MAX_LINES = 900;
/** What a terminal or a repository page shows before anyone scrolls. */
const FIRST_SCREEN_LINES = 40;

/** Files below a folder of the repository, as paths from its root. A folder that does not exist has none. */
function filesIn(folder: string): string[] {
  if (!existsSync(join(root, folder))) return [];
  return readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' }).map((file) => join(folder, file));
}

const read = (file: string): string => readFileSync(join(root, file), 'utf8');

describe('source files', () => {
  const isCode = (file: string): boolean => /\.(ts|mjs|cc|h)$/.test(file);
  const product = ['native', 'src'].flatMap(filesIn).filter(isCode);
  const tools = ['bench', 'scripts', 'test'].flatMap(filesIn).filter(isCode);

  it('are found', () => {
    expect(product).toContain('src/bdev/bdev.ts');
    expect(product).toContain('native/index.ts');
  });

  it(`have at most ${MAX_LINES} lines in src/ and native/`, () => {
    const long = product.filter((file) => read(file).trimEnd().split('\n').length > MAX_LINES);
    expect(long).toEqual([]);
  });

  it('open with a comment', () => {
    const silent = [...product, ...tools].filter((file) => !/^(#!.*\n)?\s*\/[/*]/.test(read(file)));
    expect(silent).toEqual([]);
  });
});

describe('README.md', () => {
  it('names the two commands on its first screen', () => {
    const firstScreen = read('README.md').split('\n').slice(0, FIRST_SCREEN_LINES).join('\n');
    expect(firstScreen).toContain('npm start');
    expect(firstScreen).toContain('npm test');
  });
});

describe('documents', () => {
  const documents = [...readdirSync(root), ...filesIn('docs')].filter((file) => file.endsWith('.md'));

  it('are found', () => {
    expect(documents).toContain('README.md');
    expect(documents).toContain('docs/decisions/0001-dependencies.md');
  });

  it('link only to files that exist', () => {
    const broken = documents.flatMap((document) =>
      relativeLinks(read(document))
        .filter((link) => !existsSync(join(root, dirname(document), link)))
        .map((link) => `${document}: ${link}`),
    );
    expect(broken).toEqual([]);
  });
});

describe('relativeLinks', () => {
  it('takes inline links, images, and reference definitions, without their fragments', () => {
    const text = 'a [b](c.md#d) ![e](f/g.svg "title") [h](<i j.md>)\n\n[k]: ../l.md\n';
    expect(relativeLinks(text)).toEqual(['c.md', 'f/g.svg', 'i j.md', '../l.md']);
  });

  it('leaves addresses, fragments and code alone', () => {
    const text = '[a](https://b.example/c) [d](#e) `[f](g.md)`\n```\n[h](i.md)\n```\n';
    expect(relativeLinks(text)).toEqual([]);
  });
});

/** Targets of the relative links in a Markdown text. */
function relativeLinks(markdown: string): string[] {
  const prose = markdown.replace(/^```[^]*?^```/gm, '').replace(/`[^`\n]*`/g, '');
  const inline = prose.matchAll(/\]\((?:<([^>]+)>|([^)\s]+))[^)]*\)/g);
  const definitions = prose.matchAll(/^\[[^\]]+\]:\s+(?:<([^>]+)>|(\S+))/gm);
  return [...inline, ...definitions]
    .map(([, bracketed, plain]) => decodeURI((bracketed ?? plain ?? '').replace(/#.*$/, '')))
    .filter((link) => link !== '' && !/^[a-z][a-z0-9+.-]*:/i.test(link));
}
