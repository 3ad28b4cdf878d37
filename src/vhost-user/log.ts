/** Where this folder's events go: the daemon's structured log. */
export type LogFunction = (
  level: 'debug' | 'info' | 'warn' | 'error',
  message: string,
  fields?: Record<string, unknown>,
) => void;
