/** What is wrong with an image, by the name of the field in the format. */
import { BdevError } from '../bdev.js';

/**
 * A field of an image holds what it may not hold.
 * @param field as `header.cluster_bits` or `l1[3]`
 * @param problem goes on from the field: `is 40, it may be 9 to 21`
 */
export function badImage(field: string, problem: string): BdevError {
  return new BdevError(
    'bad-image',
    field,
    `the qcow2 image is damaged or hostile: ${field} ${problem}`,
    'restore the image from a backup; `strata img check` says what else is wrong with it',
  );
}

/** The image is good and asks for what there is not. */
export function unsupportedImage(field: string, problem: string, hint: string): BdevError {
  return new BdevError('unsupported-image', field, `the qcow2 image cannot be used: ${field} ${problem}`, hint);
}
