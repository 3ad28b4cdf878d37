/**
 * The daemon's metrics in Prometheus' text format. The counters live in shared memory, where the reactors write them; they are read
 * when somebody asks and at no other time.
 *
 * Names of bdev metrics are those of node_exporter's disk collector, so that queries and dashboards for disks fit.
 */
import { Registry, collectDefaultMetrics } from 'prom-client';
import type { Metric } from 'prom-client';
import { IoType } from '../bdev/bdev-io.js';
import { IoCounter, LATENCY_BUCKETS, bucketUpperUs } from '../bdev/io-stats.js';
import type { IoStats } from '../bdev/io-stats.js';
import { ReactorStat } from '../poller/reactor.js';
import { CONTROLLER_STAT_NAMES } from '../vhost-user/controller-stats.js';
import type { Daemon, LiveInfo, RunningBdev } from './daemon.js';
import { VERSION } from './version.js';

type Labels = Readonly<Record<string, string>>;

interface Sample {
  readonly labels: Labels;
  readonly value: number;
  /** Name with a suffix, for the parts of a histogram. */
  readonly metricName?: string;
}

type MetricType = 'counter' | 'gauge' | 'histogram';

/** Every histogram bucket of IoStats would be 104 series for each bdev and operation: one per octave is told, up to 8 s. */
const LATENCY_STEPS = histogramSteps(8_388_608);

/** Operations by their label, with the names node_exporter gives their counters. */
const OPS = [
  { op: 'read', type: IoType.read, completed: 'reads_completed', bytes: 'read_bytes', time: 'read_time_seconds' },
  {
    op: 'write',
    type: IoType.write,
    completed: 'writes_completed',
    bytes: 'written_bytes',
    time: 'write_time_seconds',
  },
  {
    op: 'discard',
    type: IoType.discard,
    completed: 'discards_completed',
    bytes: 'discarded_bytes',
    time: 'discard_time_seconds',
  },
  { op: 'flush', type: IoType.flush, completed: 'flush_requests', bytes: null, time: 'flush_requests_time_seconds' },
  {
    op: 'write_zeroes',
    type: IoType.writeZeroes,
    completed: 'write_zeroes_completed',
    bytes: 'write_zeroes_bytes',
    time: 'write_zeroes_time_seconds',
  },
] as const;

export class Metrics {
  readonly #daemon: Daemon;
  readonly #registry = new Registry();
  #live: LiveInfo = { controllers: new Map(), answering: new Set() };

  constructor(daemon: Daemon) {
    this.#daemon = daemon;
    this.#registerProcess();
    this.#registerBdevs();
    this.#registerControllers();
    this.#registerReactors();
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  async text(): Promise<string> {
    this.#live = await this.#daemon.live();
    return this.#registry.metrics();
  }

  #registerProcess(): void {
    // The lag of the main thread's event loop would be measured by a timer a hundred times a second, in a daemon that should
    // sleep when it is idle, and says nothing of the reactors. The others break Prometheus' naming rules.
    const longestMs = 2 ** 31 - 1;
    collectDefaultMetrics({ register: this.#registry, eventLoopMonitoringPrecision: longestMs });
    for (const { name } of this.#registry.getMetricsAsArray()) {
      if (/^nodejs_(eventloop_lag|active)_/.test(name)) this.#registry.removeSingleMetric(name);
    }
    const labels = { version: VERSION, node: process.versions.node, v8: process.versions.v8, arch: process.arch };
    this.#add('strata_build_info', 'Version of the daemon and of what it runs on, as labels.', 'gauge', () => [
      { labels, value: 1 },
    ]);
  }

  #registerBdevs(): void {
    for (const { op, type, completed, bytes, time } of OPS) {
      const what = op.replace('_', ' ');
      this.#addBdev(`${completed}_total`, `Requests of type ${what} that succeeded.`, (stats) =>
        stats.counter(type, IoCounter.completed),
      );
      if (bytes !== null) {
        this.#addBdev(`${bytes}_total`, `Bytes of all ${what} requests that succeeded.`, (stats) =>
          stats.counter(type, IoCounter.bytes),
        );
      }
      this.#addBdev(
        `${time}_total`,
        `Time that all ${what} requests took, in seconds.`,
        (stats) => stats.counter(type, IoCounter.timeUs) / 1e6,
      );
    }
    this.#add('strata_bdev_io_errors_total', 'Requests that failed.', 'counter', () =>
      this.#daemon.bdevs.flatMap((bdev) =>
        OPS.map(({ op, type }) => ({
          labels: { bdev: bdev.name, op },
          value: bdev.stats.counter(type, IoCounter.errors),
        })),
      ),
    );
    this.#add('strata_bdev_io_now', 'Requests in flight.', 'gauge', () =>
      this.#daemon.bdevs.map((bdev) => ({ labels: { bdev: bdev.name }, value: bdev.stats.inflight })),
    );
    this.#add('strata_bdev_size_bytes', 'Size of the disk.', 'gauge', () =>
      this.#daemon.bdevs.map((bdev) => ({ labels: { bdev: bdev.name }, value: bdev.sizeBytes })),
    );
    this.#add('strata_bdev_info', 'Module, UUID and reactor of a bdev, as labels.', 'gauge', () =>
      this.#daemon.bdevs.map(({ name, module, uuid, reactor }) => ({
        labels: { bdev: name, module, uuid, reactor },
        value: 1,
      })),
    );
    const histogram = 'strata_bdev_io_latency_seconds';
    this.#add(histogram, 'Time a request took, by operation.', 'histogram', () =>
      this.#daemon.bdevs.flatMap((bdev) => OPS.flatMap((op) => latencySamples(histogram, bdev, op))),
    );
  }

  #registerControllers(): void {
    const HELP = {
      requests: 'Requests taken from virtqueues.',
      request_errors: 'Requests answered with an error status.',
      notifications: 'Times the guest was notified.',
      kicks: 'Times the guest kicked.',
      queue_faults: "Queues that broke the ring's rules.",
      sessions: 'Front-ends that connected.',
      session_faults: 'Sessions ended because the front-end broke the protocol.',
      messages: 'Messages of front-ends.',
      resubmitted: 'Requests done again after a restart, because they were in flight before it.',
      peers_denied: 'Processes that connected and may not be the front-end.',
      front_ends_turned_away: 'Front-ends that were turned away while another was connected.',
      message_timeouts: 'Sessions ended because a message did not come, or not to its end, in time.',
    } as const satisfies Record<(typeof CONTROLLER_STAT_NAMES)[number], string>;
    CONTROLLER_STAT_NAMES.forEach((name, i) => {
      this.#add(`strata_controller_${name}_total`, HELP[name], 'counter', () =>
        this.#daemon.controllers.map(({ config, stats }) => ({
          labels: { controller: config.name },
          value: stats[i]!,
        })),
      );
    });
    const gauges = [
      ['connected', 'Whether a front-end is connected.', (info) => (info.peer === null ? 0 : 1)],
      ['queues_running', 'Virtqueues that are being served.', (info) => info.queuesRunning],
      ['requests_now', 'Requests in flight.', (info) => info.inflight],
      ['guest_memory_bytes', 'Guest memory that is mapped.', (info) => info.guestMemoryBytes],
    ] as const satisfies [string, string, (info: Info) => number][];
    for (const [name, help, read] of gauges) {
      // A reactor that does not answer has no value to give: its controllers are left out.
      this.#add(`strata_controller_${name}`, help, 'gauge', () =>
        [...this.#live.controllers.values()].map((info) => ({ labels: { controller: info.name }, value: read(info) })),
      );
    }
    this.#add('strata_controller_info', 'Bdev and reactor of a controller, as labels.', 'gauge', () =>
      this.#daemon.controllers.map(({ config, reactor }) => ({
        labels: { controller: config.name, bdev: config.bdev, reactor },
        value: 1,
      })),
    );
  }

  #registerReactors(): void {
    const counters = [
      ['busy_seconds', 'Time spent in steps that found work.', ReactorStat.busyUs, 1e-6],
      ['idle_seconds', 'Time spent in steps that found none.', ReactorStat.idleUs, 1e-6],
      ['sleep_seconds', 'Time spent asleep.', ReactorStat.sleepUs, 1e-6],
      ['steps', 'Steps of the reactor.', ReactorStat.steps, 1],
      ['sleeps', 'Times the reactor went to sleep.', ReactorStat.sleeps, 1],
    ] as const;
    for (const [name, help, index, scale] of counters) {
      this.#add(`strata_reactor_${name}_total`, help, 'counter', () =>
        this.#daemon.reactors.map((reactor) => ({
          labels: { reactor: reactor.name },
          value: reactor.thread.stats[index]! * scale,
        })),
      );
    }
    this.#add('strata_reactor_aborts_total', 'Times the process of an isolated disk ended by itself.', 'counter', () =>
      this.#daemon.reactors.flatMap(({ name, isolation }) =>
        isolation === null ? [] : [{ labels: { reactor: name }, value: isolation.supervisor.aborts }],
      ),
    );
    this.#add('strata_reactor_up', 'Whether the reactor answers.', 'gauge', () =>
      this.#daemon.reactors.map(({ name }) => ({
        labels: { reactor: name },
        value: this.#live.answering.has(name) ? 1 : 0,
      })),
    );
  }

  #addBdev(name: string, help: string, read: (stats: IoStats) => number): void {
    this.#add(`strata_bdev_${name}`, help, 'counter', () =>
      this.#daemon.bdevs.map((bdev) => ({ labels: { bdev: bdev.name }, value: read(bdev.stats) })),
    );
  }

  /** Registers a metric whose samples are read at each scrape. prom-client's own kinds hold their values themselves. */
  #add(name: string, help: string, type: MetricType, read: () => Sample[]): void {
    const metric = { name, help, type, get: async () => ({ name, help, type, values: read(), aggregator: 'sum' }) };
    this.#registry.registerMetric(metric as unknown as Metric);
  }
}

type Info = LiveInfo['controllers'] extends ReadonlyMap<string, infer T> ? T : never;

interface HistogramStep {
  readonly le: string;
  /** Bucket of IoStats that comes first behind the step. */
  readonly endBucket: number;
}

function histogramSteps(longestUs: number): HistogramStep[] {
  const steps: HistogramStep[] = [];
  for (let bucket = 0; bucket < LATENCY_BUCKETS; bucket++) {
    const upperUs = bucketUpperUs(bucket);
    const isOctave = Number.isInteger(Math.log2(upperUs));
    if (isOctave && upperUs <= longestUs) steps.push({ le: String(upperUs / 1e6), endBucket: bucket + 1 });
  }
  return steps;
}

function latencySamples(name: string, bdev: RunningBdev, { op, type }: (typeof OPS)[number]): Sample[] {
  const labels = { bdev: bdev.name, op };
  const samples: Sample[] = [];
  let count = 0;
  let bucket = 0;
  for (const { le, endBucket } of LATENCY_STEPS) {
    for (; bucket < endBucket; bucket++) count += bdev.stats.bucket(type, bucket);
    samples.push({ labels: { ...labels, le }, value: count, metricName: `${name}_bucket` });
  }
  for (; bucket < LATENCY_BUCKETS; bucket++) count += bdev.stats.bucket(type, bucket);
  samples.push({ labels: { ...labels, le: '+Inf' }, value: count, metricName: `${name}_bucket` });
  const seconds = bdev.stats.counter(type, IoCounter.timeUs) / 1e6;
  samples.push({ labels, value: seconds, metricName: `${name}_sum` });
  samples.push({ labels, value: count, metricName: `${name}_count` });
  return samples;
}
