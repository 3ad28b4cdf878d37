/**
 * What was found out about a backing chain, so that it is not found out again: for each piece of the disk the first layer below the
 * top that may have something there. Backing images do not change, so what is known stays true.
 *
 * One byte for each cluster, or for more of them where that would be too many.
 */

/** Bytes of the map at most. */
const PIECES_MAX = 2 ** 24;
/** Layers that a byte can name. */
const LAYERS_MAX = 255;

export class ChainMap {
  readonly #pieceBytes: number;
  readonly #layers: Uint8Array;

  constructor(sizeBytes: number, clusterBytes: number) {
    let pieceBytes = clusterBytes;
    while (sizeBytes / pieceBytes > PIECES_MAX) pieceBytes *= 2;
    this.#pieceBytes = pieceBytes;
    // Layer 0 is the top, which does change: nothing is known of it.
    this.#layers = new Uint8Array(Math.ceil(sizeBytes / pieceBytes)).fill(1);
  }

  /** Number of the piece that a byte of the disk is in. */
  pieceOf(offset: number): number {
    return Math.floor(offset / this.#pieceBytes);
  }

  startOf(piece: number): number {
    return piece * this.#pieceBytes;
  }

  /** First layer that may have something of a piece. */
  layerOf(piece: number): number {
    return this.#layers[piece]!;
  }

  /** No layer before this one has anything of a piece. */
  note(piece: number, layer: number): void {
    if (piece < this.#layers.length && layer <= LAYERS_MAX) this.#layers[piece] = layer;
  }
}
