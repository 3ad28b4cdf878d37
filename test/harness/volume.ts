/** A bdev used by operations that are plain data, with the oracle beside it that knows what each sector may hold. */
import { IoFlag, IoStatus, IoType, BdevIo } from '../../src/bdev/bdev-io.js';
import type { IoOwner } from '../../src/bdev/bdev-io.js';
import { Violation } from '../sim/oracle.js';
import type { Change, Oracle } from '../sim/oracle.js';
import { SECTOR_BYTES } from '../sim/sim-disk.js';
import type { SimLife } from './sim-machine.js';

/** What is done to a volume; sectors of 512 bytes. */
export type Operation = { readonly name: string } & (
  | {
      readonly type: 'read' | 'write' | 'discard' | 'writeZeroes';
      readonly sector: number;
      readonly sectors: number;
      readonly fua?: boolean;
      /** Added to the address of the data, to misalign it. */
      readonly shiftBytes?: number;
    }
  | { readonly type: 'flush' }
  /** Anything else a module can be told: it submits nothing by itself and returns whether it is over. */
  | { readonly type: 'call'; readonly start: (life: SimLife) => () => boolean }
);

/** Extra memory of a request, for its shift. */
const SHIFT_BYTES = 512;

/** One operation on its way. */
export class Ticket implements IoOwner {
  readonly operation: Operation;
  readonly io = new BdevIo();
  /** How often it completed: 1 when all is well. */
  completions = 0;
  status: IoStatus = IoStatus.success;
  change: Change | null = null;
  began = 0;
  address = 0;

  constructor(operation: Operation) {
    this.operation = operation;
  }

  onDone(io: BdevIo): void {
    this.completions++;
    this.status = io.status;
    this.settle();
  }

  /** What the completion means to the oracle. */
  settle: () => void = () => undefined;
}

export class Volume {
  readonly life: SimLife;
  readonly oracle: Oracle;

  constructor(life: SimLife, oracle: Oracle) {
    this.life = life;
    this.oracle = oracle;
  }

  /** Runs operations one after the other. Throws Died, Violation. */
  run(...operations: readonly Operation[]): Ticket[] {
    return operations.flatMap((operation) => this.runTogether(operation));
  }

  /** Runs operations all at once. */
  runTogether(...operations: readonly Operation[]): Ticket[] {
    const tickets = operations.map((operation) => this.start(operation));
    this.life.until(() => tickets.every((ticket) => ticket.completions > 0), operations.map(({ name }) => name).join());
    for (const ticket of tickets) {
      if (ticket.completions > 1) throw new Violation(`${ticket.operation.name} completed ${ticket.completions} times`);
      if (ticket.address > 0) this.life.arena.release(ticket.address);
    }
    return tickets;
  }

  start(operation: Operation): Ticket {
    const ticket = new Ticket(operation);
    if (operation.type === 'call') {
      const isOver = operation.start(this.life);
      this.life.until(isOver, operation.name);
      ticket.completions = 1;
      return ticket;
    }
    const isFlush = operation.type === 'flush';
    const lengthBytes = isFlush ? 0 : operation.sectors * SECTOR_BYTES;
    const flags = !isFlush && operation.fua === true ? IoFlag.fua : 0;
    ticket.began = this.oracle.now();
    ticket.io.prepare(IoType[operation.type], isFlush ? 0 : operation.sector * SECTOR_BYTES, lengthBytes, flags);
    ticket.settle = () => this.#settle(ticket);
    if (operation.type === 'write') ticket.change = this.oracle.beginWrite(operation.sector, operation.sectors);
    if (operation.type === 'writeZeroes') ticket.change = this.oracle.beginZeroes(operation.sector, operation.sectors);
    if (operation.type === 'discard') ticket.change = this.oracle.beginDiscard(operation.sector, operation.sectors);
    if (operation.type === 'read' || operation.type === 'write') {
      ticket.address = this.life.arena.allocate(lengthBytes + SHIFT_BYTES);
      const address = ticket.address + (operation.shiftBytes ?? 0);
      if (ticket.change !== null) this.#stamp(ticket.change, address, lengthBytes);
      ticket.io.addSegment(address, lengthBytes);
    }
    ticket.io.push(ticket, 0);
    this.life.open.channel.submit(ticket.io);
    return ticket;
  }

  #stamp(change: Change, address: number, lengthBytes: number): void {
    const words = new Uint32Array(lengthBytes / 4);
    this.oracle.stamp(change, words);
    this.life.arena.view8(address, lengthBytes).set(new Uint8Array(words.buffer));
  }

  #settle(ticket: Ticket): void {
    const { operation, change, began, io } = ticket;
    const isOk = ticket.status === IoStatus.success;
    if (change !== null) this.oracle.end(change, isOk, isOk && (io.flags & IoFlag.fua) !== 0);
    if (!isOk) return;
    if (operation.type === 'flush') this.oracle.flushed(began);
    if (operation.type === 'read') this.oracle.verify(began, operation.sector, this.#words(io));
  }

  #words(io: BdevIo): Uint32Array {
    return new Uint32Array(this.life.arena.view8(io.segmentAddresses[0]!, io.lengthBytes).slice().buffer);
  }
}

/** The contents of a whole volume, as a process with it open reads them. Throws Died. */
export function readAll(life: SimLife, sectors: number): Uint32Array {
  const lengthBytes = sectors * SECTOR_BYTES;
  const address = life.arena.allocate(lengthBytes);
  const ticket = new Ticket({ name: 'read', type: 'read', sector: 0, sectors });
  ticket.io.prepare(IoType.read, 0, lengthBytes, 0);
  ticket.io.addSegment(address, lengthBytes);
  ticket.io.push(ticket, 0);
  life.open.channel.submit(ticket.io);
  life.until(() => ticket.completions > 0, 'read of the volume');
  if (ticket.status !== IoStatus.success) throw new Violation(`the volume cannot be read: status ${ticket.status}`);
  const words = new Uint32Array(life.arena.view8(address, lengthBytes).slice().buffer);
  life.arena.release(address);
  return words;
}
