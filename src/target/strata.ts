#!/usr/bin/env node
/** `strata`: the program, which is in commands.ts. What a daemon needs first is begun before that is loaded. */
if (process.argv[2] === 'serve') (await import('./reactor-entry.js')).prepareReactor();
await (process.argv[2] === 'img' ? import('./img/img.js') : import('./commands.js'));
