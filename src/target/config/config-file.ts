/** Reads a YAML or JSON file as plain values, and remembers on which line each of them stands. */
import { readFileSync } from 'node:fs';
import { extname } from 'node:path';
import { LineCounter, isMap, isScalar, isSeq, parseDocument } from 'yaml';
import type { Document, Node } from 'yaml';
import { ConfigError, formatPath } from './problem.js';
import type { ConfigSource, FieldPath, Place } from './problem.js';

export interface ConfigFile {
  readonly value: unknown;
  readonly source: ConfigSource;
}

/** Throws ConfigError when the file cannot be read or is not what its extension says. */
export function readConfigFile(file: string): ConfigFile {
  const format = formatOf(file);
  const text = readText(file);
  // JSON is read by the YAML parser too, for the lines.
  const lines = new LineCounter();
  const document = parseDocument(text, {
    lineCounter: lines,
    prettyErrors: false,
    version: '1.2',
    merge: false,
    schema: format === 'json' ? 'json' : 'core',
  });
  const mistakes = [...document.errors, ...document.warnings].map(({ message, pos }) => ({
    line: lines.linePos(pos[0]).line,
    message,
  }));
  // YAML would let comments and other things pass that readers of a .json file would not.
  const jsonError = format === 'json' ? jsonErrorOf(text) : undefined;
  if (jsonError !== undefined) mistakes.splice(0, Infinity, { line: mistakes[0]?.line ?? 1, message: jsonError });
  if (mistakes.length > 0) {
    const remedy = `correct the ${format.toUpperCase()} there`;
    throw new ConfigError(mistakes.map(({ line, message }) => ({ file, line, field: '', message, remedy })));
  }
  return {
    value: document.toJS() as unknown,
    source: { locate: (path) => ({ file, line: lineOf(document, lines, path), field: formatPath(path) }) },
  };
}

function formatOf(file: string): 'yaml' | 'json' {
  switch (extname(file)) {
    case '.yaml':
    case '.yml':
      return 'yaml';
    case '.json':
      return 'json';
    default:
      throw fileError(file, 'has an extension that says nothing of its format', 'name it .yaml, .yml or .json');
  }
}

function readText(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const remedy = code === 'ENOENT' ? 'check the path' : 'check that it is a file this user may read';
    throw fileError(file, `cannot be read: ${code}`, remedy);
  }
}

function jsonErrorOf(text: string): string | undefined {
  try {
    JSON.parse(text);
    return undefined;
  } catch (error) {
    // It quotes what stands around the mistake, line ends and all.
    return (error as Error).message.replaceAll(/\s+/g, ' ');
  }
}

function fileError(file: string, message: string, remedy: string): ConfigError {
  const place: Place = { file, line: null, field: '' };
  return new ConfigError([{ ...place, message, remedy }]);
}

/** Line of the setting at `path`, or of the group it is missing from. */
function lineOf(document: Document.Parsed, lines: LineCounter, path: FieldPath): number | null {
  let node: unknown = document.contents;
  let offset = startOf(node);
  for (const step of path) {
    if (isMap(node)) {
      const pair = node.items.find((item) => isScalar(item.key) && item.key.value === step);
      if (pair === undefined) break;
      offset = startOf(pair.key) ?? offset;
      node = pair.value;
    } else if (isSeq(node) && typeof step === 'number') {
      node = node.items[step];
      offset = startOf(node) ?? offset;
    } else break;
  }
  return offset === null ? null : lines.linePos(offset).line;
}

function startOf(node: unknown): number | null {
  return (node as Node | null | undefined)?.range?.[0] ?? null;
}
