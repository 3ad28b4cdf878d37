#!/usr/bin/env node
/** `strata`: the program, which is in commands.ts. What a daemon needs first is begun before that is loaded. */
import { prepareReactor } from './reactor-entry.js';

if (process.argv[2] === 'serve') prepareReactor();
await (process.argv[2] === 'img' ? import('./img/img.js') : import('./commands.js'));
