/**
 * The daemon's log, on stderr: one JSON object or one line of text for each event. Under journald each line starts with its
 * priority, which the journal takes off again.
 */
import { fstatSync, writeSync } from 'node:fs';
import { pino } from 'pino';
import type { LogConfig } from './config/config.js';

export type Log = pino.Logger;

const STDERR = 2;
/** syslog(3) priorities by pino's level. */
const PRIORITIES: Readonly<Record<string, number>> = { debug: 7, info: 6, warn: 4, error: 3, fatal: 2 };

export function openLog(config: LogConfig, environment: NodeJS.ProcessEnv): Log {
  const isText = config.format === 'text' || (config.format === 'auto' && process.stderr.isTTY);
  const isJournal = stderrIsJournal(environment);
  return pino(
    {
      level: config.level,
      base: null,
      messageKey: 'message',
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    },
    {
      write: (line: string) => {
        const entry = isText || isJournal ? (JSON.parse(line) as LogEntry) : null;
        const text = isText ? formatEntry(entry!) : line;
        writeLine(isJournal ? `<${PRIORITIES[entry!.level] ?? 6}>${text}` : text);
      },
    },
  );
}

interface LogEntry {
  readonly level: string;
  readonly time: string;
  readonly message: string;
  readonly [field: string]: unknown;
}

/** `2026-01-31T12:00:00.000Z info  front-end connected controller=disk0 pid=4711` */
export function formatEntry({ level, time, message, ...fields }: LogEntry): string {
  const details = Object.entries(fields).map(([key, value]) => {
    const text = typeof value === 'string' && /^[^\s"=]+$/.test(value) ? value : JSON.stringify(value);
    return ` ${key}=${text}`;
  });
  return `${time} ${level.padEnd(5)} ${message}${details.join('')}\n`;
}

/** The log must not end the daemon: a reader that went away is its own loss. */
function writeLine(text: string): void {
  try {
    writeSync(STDERR, text);
  } catch {
    // Nowhere to report it to.
  }
}

/** JOURNAL_STREAM is inherited: it is ours only while stderr is still the file it names. */
function stderrIsJournal(environment: NodeJS.ProcessEnv): boolean {
  const stream = environment['JOURNAL_STREAM'];
  if (stream === undefined) return false;
  const { dev, ino } = fstatSync(STDERR);
  return stream === `${dev}:${ino}`;
}
