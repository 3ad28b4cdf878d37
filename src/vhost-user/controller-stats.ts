/** Counters of one controller, in shared memory: written by its reactor, read by anybody. */
export const ControllerStat = {
  /** Requests taken from virtqueues. */
  requests: 0,
  /** Requests answered with an error status. */
  requestErrors: 1,
  /** Times the guest was notified. */
  notifications: 2,
  /** Times the guest kicked. */
  kicks: 3,
  /** Queues that broke the ring's rules. */
  queueFaults: 4,
  /** Front-ends that connected. */
  sessions: 5,
  /** Sessions ended because the front-end broke the protocol. */
  sessionFaults: 6,
  /** Messages of front-ends. */
  messages: 7,
  /** Requests done again because they were in flight when the process before this one ended. */
  resubmitted: 8,
  /** Processes that connected and may not be the front-end. */
  peersDenied: 9,
  /** Front-ends that were turned away while another was connected. */
  frontEndsTurnedAway: 10,
  /** Sessions ended because a message did not come, or not to its end, in time. */
  messageTimeouts: 11,
} as const;

/** Metric suffix of each counter, by index. */
export const CONTROLLER_STAT_NAMES = [
  'requests',
  'request_errors',
  'notifications',
  'kicks',
  'queue_faults',
  'sessions',
  'session_faults',
  'messages',
  'resubmitted',
  'peers_denied',
  'front_ends_turned_away',
  'message_timeouts',
] as const;

export function newControllerStats(): Float64Array {
  return new Float64Array(new SharedArrayBuffer(CONTROLLER_STAT_NAMES.length * 8));
}
