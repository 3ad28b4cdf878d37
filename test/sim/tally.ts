/** What a run did, for totals. */
export interface Tally {
  requests: number;
  sectorsChecked: number;
  ios: number;
  faults: number;
  kills: number;
  powerCuts: number;
  stops: number;
  controls: number;
  /** Of images, that were begun. */
  edits: number;
  /** Moves of the disk to another one. */
  pivots: number;
  events: number;
}

export function emptyTally(): Tally {
  return {
    requests: 0,
    sectorsChecked: 0,
    ios: 0,
    faults: 0,
    kills: 0,
    powerCuts: 0,
    stops: 0,
    controls: 0,
    edits: 0,
    pivots: 0,
    events: 0,
  };
}
