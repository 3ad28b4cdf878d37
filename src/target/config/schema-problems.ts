/** Turns what the schema refuses into problems an operator can act on: each with its field, the value found and a remedy. */
import type { z } from 'zod';
import type { FieldPath, Problems } from './problem.js';
import { configSchema } from './schema.js';
import { nearest, suggest } from './suggest.js';
import { show } from './values.js';

type Issue = z.core.$ZodIssue;

/**
 * Adds one problem for each thing that `issues` hold against `value`.
 * @param schema what the value was to be: a config file unless told otherwise
 */
export function addSchemaProblems(
  problems: Problems,
  issues: readonly Issue[],
  value: unknown,
  schema: z.ZodObject = configSchema,
): void {
  for (const issue of issues) addIssue(problems, issue, value, schema);
}

function addIssue(problems: Problems, issue: Issue, value: unknown, schema: z.ZodObject): void {
  const path = issue.path as FieldPath;
  const isMissing = issue.input === undefined;
  switch (issue.code) {
    case 'unrecognized_keys':
      for (const key of issue.keys) addUnknownKey(problems, path, key, value, schema);
      return;
    case 'custom':
      problems.add(path, customMessage(issue), remedyOf(issue) ?? 'see docs/configuration.md');
      return;
    case 'invalid_type':
      if (isMissing) problems.add(path, 'is missing', `add it: ${kindOf(issue.expected)}`);
      else if (issue.expected === 'string' && typeof issue.input === 'number') {
        problems.add(path, `is ${show(issue.input)}, a number`, 'put it in quotes');
      } else problems.add(path, `is ${show(issue.input)}`, `write ${kindOf(issue.expected)}`);
      return;
    case 'invalid_value':
      addInvalidValue(problems, path, issue.input, issue.values.map(String));
      return;
    case 'invalid_union':
      // By its discriminator, or a union of literals.
      addInvalidValue(problems, path, issue.input === undefined ? undefined : valueAt(value, path), alternatives(path));
      return;
    case 'too_small':
    case 'too_big': {
      const isSmall = issue.code === 'too_small';
      const words = issue.inclusive === false ? ['more than', 'less than'] : ['at least', 'at most'];
      const bound = `${words[isSmall ? 0 : 1]} ${String(isSmall ? issue.minimum : issue.maximum)}`;
      if (issue.origin === 'array') {
        const count = Array.isArray(issue.input) ? issue.input.length : 0;
        problems.add(path, `has ${count} entries`, `give it ${bound}`);
      } else {
        problems.add(path, `is ${show(issue.input)}`, `choose a value of ${bound}`);
      }
      return;
    }
    default:
      problems.add(path, issue.message, 'see docs/configuration.md');
  }
}

/** Messages that start with a verb speak of the value: `is not a name` becomes `"a b" is not a name`. */
function customMessage(issue: Issue): string {
  const aboutValue = issue.message.startsWith('is not ');
  return aboutValue ? `${show(issue.input)} ${issue.message}` : issue.message;
}

function remedyOf(issue: Issue): string | undefined {
  const params = 'params' in issue ? issue.params : undefined;
  return typeof params?.['remedy'] === 'string' ? params['remedy'] : undefined;
}

function addUnknownKey(problems: Problems, path: FieldPath, key: string, value: unknown, schema: z.ZodObject): void {
  const known = knownKeys(path, value, schema);
  const match = nearest(key, known);
  const remedy = match === undefined ? `remove it; known keys: ${known.join(', ')}` : `did you mean \`${match}\`?`;
  problems.add([...path, key], 'is an unknown key', remedy);
}

function addInvalidValue(problems: Problems, path: FieldPath, input: unknown, values: readonly string[]): void {
  if (input === undefined) problems.add(path, 'is missing', `add it: one of ${values.join(', ')}`);
  else
    problems.add(path, `is ${show(input)}`, suggest(typeof input === 'string' ? input : show(input), values, 'value'));
}

const KINDS: Readonly<Record<string, string>> = {
  string: 'a text',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
  array: 'a list',
  object: 'a group of `key: value` lines',
};

function kindOf(expected: string): string {
  return KINDS[expected] ?? expected;
}

/** What may stand where a union was not matched. */
function alternatives(path: FieldPath): string[] {
  switch (path.at(-1)) {
    case 'module':
      return [...bdevSchemas().keys()];
    case 'lock':
      return ['true', 'false', 'running'];
    default:
      return ['512', '4096'];
  }
}

/** Keys of the group of settings at `path`. */
function knownKeys(path: FieldPath, value: unknown, root: z.ZodObject): string[] {
  if (path[0] === 'bdevs' && path.length === 2) {
    const { module } = valueAt(value, path) as { module: string };
    return Object.keys(bdevSchemas().get(module)?.shape ?? {});
  }
  let schema: z.core.$ZodType = root;
  for (const key of path) {
    schema = unwrap(schema);
    if (isKind(schema, 'array')) schema = (schema as z.ZodArray).element;
    else if (isKind(schema, 'object')) schema = shapeOf(schema)[key]!;
    else if (isKind(schema, 'union')) schema = shapeOf(bdevSchemas().get('error')!)[key]!;
  }
  return Object.keys(shapeOf(unwrap(schema)));
}

function shapeOf(schema: z.core.$ZodType): Record<string, z.core.$ZodType> {
  return (schema as z.ZodObject).shape;
}

function isKind(schema: z.core.$ZodType, kind: string): boolean {
  return schema._zod.def.type === kind;
}

/** The schema below defaults and the like. */
function unwrap(schema: z.core.$ZodType): z.core.$ZodType {
  let inner = schema;
  while ('innerType' in inner._zod.def) inner = inner._zod.def.innerType as z.core.$ZodType;
  return inner;
}

/** The schema of each module by its name. */
function bdevSchemas(): Map<string, z.ZodObject> {
  const union = configSchema.shape.bdevs.element;
  return new Map(union.options.map((option) => [option.shape.module.value, option]));
}

function valueAt(value: unknown, path: FieldPath): unknown {
  let inner = value;
  for (const key of path) inner = (inner as Record<string | number, unknown> | undefined)?.[key];
  return inner;
}
