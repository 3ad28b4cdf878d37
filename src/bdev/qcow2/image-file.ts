/** The file that holds an image, as the code that works on metadata sees it. */
import type { Task } from '../task.js';

export interface ImageFile {
  /** In whole blocks where the file is a device or is read past the page cache. */
  readonly sizeBytes: number;
  /** Fills `bytes`; what lies beyond the end of the file reads as zeroes. Throws BdevError. */
  read(offset: number, bytes: Uint8Array): Task<void>;
  /** Any offset and length within the size. Throws BdevError. */
  write(offset: number, bytes: Uint8Array): Task<void>;
  /** Makes all that was written durable. Throws BdevError. */
  sync(): Task<void>;
  /** Whether a write beyond the end makes the file longer, so that it need not be asked to. */
  readonly growsByWriting?: boolean;
  /** Makes the file at least that long; it reads as zeroes there. Throws BdevError. */
  grow(sizeBytes: number): Task<void>;
  /** Reserves space that the file does not take yet, and makes it longer where need be. Throws BdevError. */
  allocate?(offset: number, lengthBytes: number): Task<void>;
  /** Gives space back that holds nothing any more, if it can. Throws BdevError. */
  deallocate?(offset: number, lengthBytes: number): Task<void>;
}
