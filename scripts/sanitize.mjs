/**
 * Builds the addon with AddressSanitizer and UndefinedBehaviorSanitizer and runs the native tests on it, and those of what is native
 * elsewhere: compression and encryption. Any report of a sanitizer ends the process that caused it, and so fails its test.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync, realpathSync } from 'node:fs';
import { buildAddonVariant } from './addon-variant.mjs';
import { npmEnvironment, setUp } from './setup.mjs';
import { Stages } from './stages.mjs';

const CODEC_TESTS = ['test/bdev/qcow2/codec.test.ts', 'test/bdev/qcow2/luks.test.ts'];

await setUp({ forTests: true });
const stages = new Stages('sanitize');

const addon = await buildAddonVariant('sanitized', { ...npmEnvironment(), STRATA_SANITIZE: '1' });
stages.record('sanitized build', addon !== undefined);

if (addon !== undefined) {
  // A build that lost its flags on the way would pass every test.
  const compiled = readFileSync(addon, 'latin1');
  stages.record('instrumentation', compiled.includes('__asan_report_') && compiled.includes('__ubsan_handle_'));

  const compiler = process.env.CXX ?? 'g++';
  const runtime = execFileSync(compiler, ['-print-file-name=libasan.so'], { encoding: 'utf8' }).trim();
  await stages.vitest('native tests, sanitized', ['--project', 'unit', 'test/native', ...CODEC_TESTS], {
    env: {
      ...process.env,
      STRATA_ADDON: addon,
      LD_PRELOAD: realpathSync(runtime),
      // V8 gives its memory back to the system by exiting, which a leak check would call a leak.
      ASAN_OPTIONS: 'abort_on_error=1:detect_leaks=0',
      UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1',
    },
  });
}
stages.finish();
