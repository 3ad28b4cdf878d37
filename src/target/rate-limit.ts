/**
 * Keeps a guest or front-end from filling the log: messages above a steady rate are counted instead of written, and the next one
 * that passes says how many were left out.
 */
import type { Clock } from '../poller/clock.js';
import type { LogFunction } from '../vhost-user/log.js';

const BURST = 20;
const PER_SECOND = 1;

export function limitRate(log: LogFunction, clock: Clock): LogFunction {
  let tokens = BURST;
  let filledUs = clock.nowUs();
  let leftOut = 0;
  return (level, message, fields) => {
    const nowUs = clock.nowUs();
    tokens = Math.min(BURST, tokens + ((nowUs - filledUs) / 1e6) * PER_SECOND);
    filledUs = nowUs;
    if (tokens < 1) {
      leftOut++;
      return;
    }
    tokens--;
    log(level, message, leftOut === 0 ? fields : { ...fields, messagesLeftOut: leftOut });
    leftOut = 0;
  };
}
