/**
 * The guest can be had on this host. When QEMU or a package is missing, this is the test that fails and names the line
 * that installs it.
 */
import { statSync } from 'node:fs';
import { expect, it } from 'vitest';
import { guestImage } from '../../scripts/guest-image.js';

it('a guest can be built from the packages of this host', () => {
  const { kernelPath, initramfsPath } = guestImage();
  expect(statSync(kernelPath).size).toBeGreaterThan(2 ** 20);
  expect(statSync(initramfsPath).size).toBeGreaterThan(2 ** 20);
});
