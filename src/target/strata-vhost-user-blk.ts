#!/usr/bin/env node
/** `strata-vhost-user-blk`: the program, which is in one-disk.ts. What it needs first is begun before that is loaded. */
import { prepareReactor } from './reactor-entry.js';

if (!process.argv.includes('--print-capabilities')) prepareReactor();
await import('./one-disk.js');
