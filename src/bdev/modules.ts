/** The bdev modules there are. A new one is added here and in the config schema. */
import type { BdevConfig, BdevModule } from './bdev.js';
import { delayModule } from './delay/delay.js';
import { errorModule } from './error/error.js';
import { mallocModule } from './malloc/malloc.js';
import { nullModule } from './null/null.js';
import { passthruModule } from './passthru/passthru.js';
import { qcow2Module } from './qcow2/qcow2.js';
import { qosModule } from './qos/qos.js';
import { uringModule } from './uring/uring.js';

/** Each module takes its own config; the schema guarantees that it gets it. */
export const modules = [
  nullModule,
  mallocModule,
  uringModule,
  passthruModule,
  delayModule,
  errorModule,
  qosModule,
  qcow2Module,
] as unknown as readonly BdevModule<BdevConfig>[];
