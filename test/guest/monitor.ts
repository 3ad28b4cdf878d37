/** QEMU's monitor (QMP): one JSON object a line; commands are answered in order, events in between are dropped. */
import { connect } from 'node:net';
import type { Socket } from 'node:net';

interface Answer {
  readonly return?: unknown;
  readonly error?: { readonly desc: string };
}

export class Monitor {
  readonly #socket: Socket;
  readonly #waiting: ((answer: Answer) => void)[] = [];
  #received = '';

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.setEncoding('utf8').on('data', (text: string) => this.#onText(text));
    // QEMU's end is noticed by its exit.
    socket.on('error', () => undefined);
  }

  static async connect(path: string): Promise<Monitor> {
    const socket = connect(path);
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    const monitor = new Monitor(socket);
    await monitor.execute('qmp_capabilities', {});
    return monitor;
  }

  /** Throws Error with QEMU's words when the command fails. */
  async execute(command: string, args: Record<string, unknown>): Promise<unknown> {
    const answer = await new Promise<Answer>((resolve) => {
      this.#waiting.push(resolve);
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
    });
    if (answer.error !== undefined) throw new Error(`${command}: ${answer.error.desc}`);
    return answer.return;
  }

  close(): void {
    this.#socket.destroy();
  }

  #onText(text: string): void {
    this.#received += text;
    const lines = this.#received.split('\n');
    this.#received = lines.pop()!;
    for (const line of lines) {
      const answer = JSON.parse(line) as Answer;
      if ('return' in answer || 'error' in answer) this.#waiting.shift()?.(answer);
    }
  }
}
