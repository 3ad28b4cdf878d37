/**
 * The service manager's protocol (sd_notify): tells it when the daemon is ready, when it stops, and, when it asks for that, that the
 * daemon is alive. Outside of a service it does nothing.
 */
import type { Log } from './log.js';
import { sendDatagram } from './system.js';

export class ServiceManager {
  readonly #socket: string | undefined;
  readonly #log: Log;
  #watchdog: NodeJS.Timeout | undefined;

  constructor(environment: NodeJS.ProcessEnv, log: Log) {
    this.#socket = environment['NOTIFY_SOCKET'];
    this.#log = log;
  }

  ready(status: string): void {
    this.#send(`READY=1\nSTATUS=${status}`);
  }

  stopping(status: string): void {
    this.#send(`STOPPING=1\nSTATUS=${status}`);
    clearInterval(this.#watchdog);
  }

  /**
   * Starts to report signs of life as often as the manager asks for.
   * @param isAlive answers whether the daemon does its work; without a sign of life the manager restarts it
   */
  watch(environment: NodeJS.ProcessEnv, isAlive: () => Promise<boolean>): void {
    const timeoutUs = Number(environment['WATCHDOG_USEC']);
    const pid = environment['WATCHDOG_PID'];
    if (!(timeoutUs > 0) || (pid !== undefined && Number(pid) !== process.pid)) return;
    const periodMs = Math.max(timeoutUs / 1000 / 2, 1000);
    this.#watchdog = setInterval(() => {
      void isAlive().then((alive) => {
        if (alive) this.#send('WATCHDOG=1');
        else this.#log.error('a reactor does not answer: no sign of life for the service manager');
      });
    }, periodMs).unref();
  }

  #send(text: string): void {
    if (this.#socket === undefined || this.#socket === '') return;
    const errno = sendDatagram(this.#socket, text);
    if (errno !== 0) this.#log.warn({ errno, socket: this.#socket }, 'the service manager cannot be told');
  }
}
