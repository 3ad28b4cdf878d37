/**
 * Goal: a step does its work in the promised order; timers and deferred tasks run when they should; a reactor sleeps when its mode
 * says so, and only when everybody has been asked for a wake-up and nobody has work.
 *
 * Method: a ring without a kernel, which keeps a journal, and a clock that stands still.
 */
import { beforeEach, describe, expect, it } from 'vitest';
import { PollPhase } from '../../src/poller/poller.js';
import type { Poller, Timer } from '../../src/poller/poller.js';
import { Reactor, ReactorStat } from '../../src/poller/reactor.js';
import type { ReactorMode } from '../../src/poller/reactor.js';
import { RING_CQE_MORE } from '../../src/poller/ring.js';
import { MemoryRing } from '../support/memory-ring.js';
import { seededRandom } from '../support/seed.js';
import { SimClock } from '../support/sim-clock.js';

const POLL_US = 50;
const EVENT_LOOP_FD = 99;

let ring: MemoryRing;
let clock: SimClock;
let journal: string[];

beforeEach(() => {
  ring = new MemoryRing();
  clock = new SimClock();
  journal = ring.journal;
});

function makeReactor(mode: ReactorMode = 'busy'): Reactor {
  const random = seededRandom(0);
  // The ring has no arena and none is needed here.
  const arena = null as never;
  const reactor = new Reactor({ name: 'test', arena, ring, clock, random, mode, pollUs: POLL_US });
  clock.advance(1000);
  reactor.step();
  journal.length = 0;
  return reactor;
}

/** A poller that enters itself in the journal. */
function poller(name: string, isBusy: () => boolean = () => false): Poller {
  return {
    poll: () => {
      journal.push(name);
      return isBusy();
    },
  };
}

/** One that can also be armed. */
function sleeper(name: string, findsWork: () => boolean = () => false): Poller {
  return {
    poll: () => false,
    arm: () => {
      journal.push(`arm ${name}`);
      return findsWork();
    },
    disarm: () => void journal.push(`disarm ${name}`),
  };
}

function timer(name: string, action: () => void = () => undefined): Timer {
  return {
    heapIndex: -1,
    dueUs: -0.5,
    onTimer: () => {
      journal.push(name);
      action();
    },
  };
}

/** Runs a slice that the event loop ends in its `sleeps`-th sleep. @param during what happens in each sleep */
function runUntilSleep(reactor: Reactor, sleeps: number, during: (sleep: number, timeoutUs: number) => void): void {
  const eventLoop = ring.attach({ onCompletion: () => undefined });
  reactor.watchEventLoop(EVENT_LOOP_FD);
  journal.splice(journal.indexOf(`poll ${EVENT_LOOP_FD} by ${eventLoop + 1}`), 1);
  let sleep = 0;
  ring.onWait = (timeoutUs) => {
    during(++sleep, timeoutUs);
    if (sleep === sleeps) ring.post(eventLoop + 1, 1, RING_CQE_MORE);
  };
  reactor.runSlice();
  expect(sleep).toBe(sleeps);
}

const waits = (): string[] => journal.filter((entry) => entry.startsWith('wait'));

describe('a step', () => {
  it('delivers completions, then runs deferred tasks, timers and pollers by phase, then enters the ring', () => {
    const reactor = makeReactor();
    reactor.addPoller(poller('publish'), PollPhase.publish);
    reactor.addPoller(poller('batch'), PollPhase.batch);
    reactor.addPoller(poller('take'), PollPhase.take);
    reactor.schedule(timer('timer'), 0);
    reactor.defer(() => void journal.push('deferred'));
    ring.post(ring.attach({ onCompletion: (result) => void journal.push(`completion ${result}`) }), 7);
    expect(reactor.step()).toBe(true);
    expect(journal).toEqual(['completion 7', 'deferred', 'timer', 'take', 'batch', 'publish', 'enter']);
  });

  it('is busy when anything had something to do', () => {
    const reactor = makeReactor();
    let busy = false;
    reactor.addPoller(
      poller('first', () => busy),
      PollPhase.take,
    );
    reactor.addPoller(poller('second'), PollPhase.take);
    expect(reactor.step()).toBe(false);
    busy = true;
    expect(reactor.step()).toBe(true);
    busy = false;
    reactor.defer(() => undefined);
    expect(reactor.step()).toBe(true);
    reactor.schedule(timer('timer'), 0);
    expect(reactor.step()).toBe(true);
    ring.post(ring.attach({ onCompletion: () => undefined }), 0);
    expect(reactor.step()).toBe(true);
    expect(reactor.step()).toBe(false);
  });

  it('has one time, that of its start', () => {
    const reactor = makeReactor();
    clock.advance(100);
    const start = clock.nowUs();
    const seen: number[] = [];
    reactor.addPoller(
      {
        poll: () => {
          seen.push(reactor.nowUs);
          clock.advance(10);
          return false;
        },
      },
      PollPhase.take,
    );
    reactor.defer(() => void seen.push(reactor.nowUs));
    reactor.step();
    expect(seen).toEqual([start, start]);
  });

  it('runs pollers that are added or removed meanwhile from the next step on, or no more', () => {
    const reactor = makeReactor();
    const late = poller('late');
    const adder: Poller = {
      poll: () => {
        journal.push('adder');
        reactor.addPoller(late, PollPhase.take);
        reactor.removePoller(adder);
        return true;
      },
    };
    reactor.addPoller(adder, PollPhase.take);
    reactor.addPoller(poller('other'), PollPhase.take);
    reactor.step();
    reactor.step();
    expect(journal).toEqual(['adder', 'other', 'enter', 'other', 'late', 'enter']);
  });

  it('runs a poller once in each phase it was added to, until it is removed from all', () => {
    const reactor = makeReactor();
    const both = poller('both');
    reactor.addPoller(both, PollPhase.take);
    reactor.addPoller(both, PollPhase.publish);
    reactor.step();
    reactor.removePoller(both);
    reactor.step();
    expect(journal).toEqual(['both', 'both', 'enter', 'enter']);
  });
});

describe('deferred tasks', () => {
  it('run in their order, in the next step; what they defer, in the one after', () => {
    const reactor = makeReactor();
    reactor.defer(() => {
      journal.push('one');
      reactor.defer(() => void journal.push('three'));
    });
    reactor.defer(() => void journal.push('two'));
    reactor.step();
    expect(journal).toEqual(['one', 'two', 'enter']);
    reactor.step();
    expect(journal.slice(3)).toEqual(['three', 'enter']);
  });
});

describe('timers', () => {
  it('fire once, when they are due and not before', () => {
    const reactor = makeReactor();
    reactor.schedule(timer('early'), 100);
    reactor.schedule(timer('late'), 101);
    clock.advance(99.9);
    reactor.step();
    expect(journal).toEqual(['enter']);
    clock.advance(0.2);
    reactor.step();
    expect(journal).toEqual(['enter', 'early', 'enter']);
    clock.advance(1000);
    reactor.step();
    reactor.step();
    expect(journal).toEqual(['enter', 'early', 'enter', 'late', 'enter', 'enter']);
  });

  it('may be moved and cancelled', () => {
    const reactor = makeReactor();
    const moved = timer('moved');
    const cancelled = timer('cancelled');
    reactor.schedule(moved, 10);
    reactor.schedule(moved, 1000);
    reactor.schedule(cancelled, 10);
    reactor.cancel(cancelled);
    clock.advance(500);
    reactor.step();
    expect(journal).toEqual(['enter']);
    clock.advance(500);
    reactor.step();
    expect(journal).toEqual(['enter', 'moved', 'enter']);
  });

  it('that go on and on do not keep a step from ending', () => {
    const reactor = makeReactor();
    const endless = timer('endless', () => reactor.schedule(endless, 0));
    reactor.schedule(endless, 0);
    reactor.step();
    expect(journal).toEqual(['endless', 'enter']);
    clock.advance(1);
    reactor.step();
    expect(journal).toEqual(['endless', 'enter', 'endless', 'enter']);
  });
});

describe('a busy reactor', () => {
  it('never sleeps', () => {
    const reactor = makeReactor('busy');
    reactor.addPoller(sleeper('s'), PollPhase.take);
    reactor.addPoller({ poll: () => (clock.advance(10), false) }, PollPhase.take);
    reactor.runSlice();
    reactor.runSlice();
    expect(journal.every((entry) => entry === 'enter')).toBe(true);
    expect(journal.length).toBeGreaterThan(10);
  });
});

describe('an interrupt reactor', () => {
  it('sleeps as soon as there is nothing to do', () => {
    const reactor = makeReactor('interrupt');
    let work = 3;
    reactor.addPoller(
      poller('work', () => work-- > 0),
      PollPhase.take,
    );
    runUntilSleep(reactor, 1, () => clock.advance(100));
    expect(journal.slice(0, 9)).toEqual([
      ...['work', 'enter', 'work', 'enter', 'work', 'enter'],
      ...['work', 'enter', 'wait 1000000'],
    ]);
  });
});

describe('an adaptive reactor', () => {
  it('spins for its time after work, then sleeps', () => {
    const reactor = makeReactor('adaptive');
    let work = 1;
    let lastWorkUs = 0;
    const slept: number[] = [];
    reactor.addPoller(
      {
        poll: () => {
          clock.advance(10);
          if (work-- <= 0) return false;
          lastWorkUs = reactor.nowUs;
          return true;
        },
      },
      PollPhase.take,
    );
    runUntilSleep(reactor, 1, () => slept.push(clock.nowUs() - lastWorkUs));
    expect(slept[0]).toBeGreaterThanOrEqual(POLL_US);
    expect(slept[0]).toBeLessThanOrEqual(POLL_US + 20);
  });

  it('spins again for its time after each piece of work that a sleep ended with', () => {
    const reactor = makeReactor('adaptive');
    const slot = ring.attach({ onCompletion: () => undefined });
    reactor.addPoller({ poll: () => (clock.advance(10), false) }, PollPhase.take);
    let steps = 0;
    const stepsBetween: number[] = [];
    runUntilSleep(reactor, 4, () => {
      stepsBetween.push(reactor.stats[ReactorStat.steps]! - steps);
      steps = reactor.stats[ReactorStat.steps]!;
      ring.post(slot, 0);
    });
    // The completion's own step, and the quiet ones after it.
    for (const between of stepsBetween.slice(1)) expect(between).toBeGreaterThanOrEqual(POLL_US / 10);
  });
});

describe('a sleep', () => {
  const runOnce = (reactor: Reactor): void => runUntilSleep(reactor, 1, () => undefined);

  it('comes after every sleeper was armed, and disarms all of them', () => {
    const reactor = makeReactor('interrupt');
    reactor.addPoller(sleeper('a'), PollPhase.take);
    reactor.addPoller(sleeper('b'), PollPhase.publish);
    runOnce(reactor);
    expect(journal).toEqual(['enter', 'arm a', 'arm b', 'wait 1000000', 'disarm a', 'disarm b', 'enter']);
  });

  it('is called off by a sleeper that finds work; those that were armed are disarmed, the others not asked', () => {
    const reactor = makeReactor('interrupt');
    let finds = 2;
    reactor.addPoller(sleeper('a'), PollPhase.take);
    reactor.addPoller(
      sleeper('b', () => finds-- > 0),
      PollPhase.take,
    );
    reactor.addPoller(sleeper('c'), PollPhase.take);
    runOnce(reactor);
    const calledOff = ['enter', 'arm a', 'arm b', 'disarm a', 'disarm b'];
    expect(journal.slice(0, 10)).toEqual([...calledOff, ...calledOff]);
    expect(journal.slice(10, 15)).toEqual(['enter', 'arm a', 'arm b', 'arm c', 'wait 1000000']);
  });

  it('arms a poller of several phases once, and one that was removed no more', () => {
    const reactor = makeReactor('interrupt');
    const twice = sleeper('twice');
    const gone = sleeper('gone');
    reactor.addPoller(twice, PollPhase.take);
    reactor.addPoller(twice, PollPhase.publish);
    reactor.addPoller(gone, PollPhase.take);
    reactor.removePoller(gone);
    runOnce(reactor);
    expect(journal.slice(0, 4)).toEqual(['enter', 'arm twice', 'wait 1000000', 'disarm twice']);
  });

  it('is called off by a task that was deferred in the step before it', () => {
    const reactor = makeReactor('interrupt');
    let defers = 1;
    reactor.addPoller(
      {
        poll: () => {
          if (defers-- > 0) reactor.defer(() => void journal.push('deferred'));
          return false;
        },
      },
      PollPhase.publish,
    );
    runOnce(reactor);
    expect(journal.slice(0, 3)).toEqual(['enter', 'deferred', 'enter']);
  });

  it('ends when the next timer is due', () => {
    const reactor = makeReactor('interrupt');
    reactor.schedule(timer('timer'), 250.4);
    clock.advance(0.25);
    runUntilSleep(reactor, 2, (_, timeoutUs) => clock.advance(timeoutUs));
    const [first] = waits();
    const timeoutUs = Number(first!.slice('wait '.length));
    expect(timeoutUs).toBeGreaterThan(245);
    expect(timeoutUs).toBeLessThanOrEqual(251);
    // One sleep is enough: it does not wake a moment too early.
    expect(journal.slice(journal.indexOf(first!) + 1)[0]).toBe('timer');
  });

  it('that asks for no wake-up is short, and comes only while many requests are in flight', () => {
    const reactor = makeReactor('interrupt');
    reactor.addPoller(sleeper('a'), PollPhase.take);
    ring.inflight = 100;
    // None of the sleeps ends with a completion.
    runUntilSleep(reactor, 3, () => clock.advance(50));
    const [unarmed, ...armed] = waits();
    expect(Number(unarmed!.slice('wait '.length))).toBeLessThanOrEqual(50);
    expect(journal.indexOf('arm a')).toBeGreaterThan(journal.indexOf(unarmed!));
    expect(armed).toEqual(['wait 1000000', 'wait 1000000']);
  });
});

describe('a slice', () => {
  it('ends when the event loop has something to do, be it in the middle of work', () => {
    const reactor = makeReactor('busy');
    reactor.watchEventLoop(99);
    expect(journal).toEqual(['poll 99 by 0']);
    let steps = 0;
    reactor.addPoller(
      {
        poll: () => {
          if (++steps === 5) ring.post(0, 1, RING_CQE_MORE);
          return true;
        },
      },
      PollPhase.take,
    );
    reactor.runSlice();
    expect(steps).toBe(6);
  });

  it('ends by itself, however much work there is', () => {
    const reactor = makeReactor('busy');
    const startUs = clock.nowUs();
    reactor.addPoller({ poll: () => (clock.advance(7), true) }, PollPhase.take);
    reactor.runSlice();
    expect(clock.nowUs() - startUs).toBeLessThan(25_000);
  });
});

describe('the counters', () => {
  it('add up to the time that passed, and tell work from rest', () => {
    const reactor = makeReactor('interrupt');
    const startUs = reactor.nowUs;
    const stepsBefore = reactor.stats[ReactorStat.steps]!;
    const idleBefore = reactor.stats[ReactorStat.idleUs]!;
    let work = 10;
    reactor.addPoller(
      {
        poll: () => {
          const isBusy = work-- > 0;
          clock.advance(isBusy ? 20 : 3);
          return isBusy;
        },
      },
      PollPhase.take,
    );
    runUntilSleep(reactor, 3, () => clock.advance(700));
    const { busyUs, idleUs, sleepUs, steps } = ReactorStat;
    const { stats } = reactor;
    expect(stats[busyUs]! + stats[idleUs]! - idleBefore + stats[sleepUs]!).toBeCloseTo(reactor.nowUs - startUs, 1);
    expect(stats[busyUs]).toBeCloseTo(200, 1);
    expect(stats[sleepUs]).toBeCloseTo(3 * 700, 1);
    expect(stats[ReactorStat.sleeps]).toBe(3);
    // Ten busy ones, a quiet one before each sleep, and the one that sees the event loop.
    expect(stats[steps]! - stepsBefore).toBe(14);
  });
});
